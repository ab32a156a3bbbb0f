"""Which web pages may ask: none, unless a setting names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.settings import load_settings
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem

PAGE = "https://pets.example"
FORM = {"origin": PAGE, "content-type": "text/plain"}  # what a browser sends without asking first
ASKING = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization",
}


def served(store: Path, trunk: Path, **settings: Any) -> LocalFleet:
    """A service of one replica."""
    return LocalFleet(store, trunk, replicas=1, **settings)


@pytest.fixture(scope="module")
def closed(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Any]
) -> Iterator[HttpClient]:
    """One as it comes, on loopback."""
    with served(tmp_path_factory.mktemp("store"), trunk_folder) as fleet:
        fleet.must_push(Heads(make_bundle)(1))
        yield HttpClient(fleet, "replica-1")


def test_by_default_a_browser_is_told_nothing(closed: HttpClient) -> None:
    """Neither when it asks first nor on an answer."""
    asked = closed.request("OPTIONS", "/predict/colours", headers=ASKING)
    told = closed.get("/v2/health/live")

    assert asked.status_code == 405
    for answer in (asked, told):
        assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/tasks/colours/rollback"), ("POST", "/predict/colours")]
)
def test_a_page_cannot_use_a_browser_to_reach_a_service_that_asks_nobody(
    closed: HttpClient, method: str, path: str
) -> None:
    """What looks like a form is sent without asking, so it is refused when it comes."""
    refused = closed.request(method, path, content=png_of(0), headers=FORM)
    own = closed.post(
        "/predict/colours", content=png_of(0), headers={"origin": "http://test", "host": "test"}
    )

    assert f"Pages of '{PAGE}' may not ask" in problem(refused, 403)
    assert "Pages of 'null'" in problem(closed.get("/tasks", headers={"origin": "null"}), 403)
    assert own.status_code == 200


def test_a_page_that_is_named_may_ask(tmp_path: Path, trunk_folder: Path) -> None:
    """With its token, and no other page."""
    with served(tmp_path, trunk_folder, cors_origins=(PAGE,)) as fleet:
        http = HttpClient(fleet, "replica-1")
        asked = http.request("OPTIONS", "/predict/pets", headers=ASKING)
        told = http.get("/tasks", headers={"origin": PAGE})
        other = http.request("OPTIONS", "/predict/pets", headers={**ASKING, "origin": "https://a"})

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-credentials" not in asked.headers
    assert told.headers["access-control-allow-origin"] == PAGE
    assert "x-headstock-version" in told.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in other.headers


def test_pages_are_named_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a variable has them."""
    monkeypatch.setenv("HEADSTOCK_CORS_ORIGINS", f"{PAGE}, https://b.example")

    assert load_settings(store="/s").cors_origins == (PAGE, "https://b.example")
