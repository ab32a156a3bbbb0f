"""Malformed requests in short; and that the benchmark notices what it is there to notice."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks import fuzz_http
from benchmarks.fuzz_http import Fuzzer, served
from tests.serve.listening import listening

NUM_CASES = 2_000
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a quiet machine
def test_no_malformed_request_harms_the_service(tmp_path: Path) -> None:
    """Each gets an answer that is listed, and the service goes on."""
    with served(tmp_path) as (url, _), closing(Fuzzer(url)) as fuzzer:
        fuzzer.run(NUM_CASES, first_seed=7)
        is_ready = httpx.get(f"{url}/v2/health/ready").is_success

    assert fuzzer.tally.statuses.total() >= NUM_CASES
    assert not fuzzer.tally.problems
    assert is_ready
    assert {200, 400, 404, 415, 422} <= fuzzer.tally.statuses.keys()


def late(_: Request) -> Response:
    """An answer that takes too long."""
    time.sleep(0.05)
    return JSONResponse({})


FAULTS: dict[str, tuple[Callable[[Request], Response], str]] = {
    "an error of ours": (lambda _: Response(status_code=500), ": 500"),
    "not now, but not when": (lambda _: Response(status_code=503), ": 503"),
    "a status that is not listed": (lambda _: Response(status_code=418), "418 is not listed"),
    "another media type": (lambda _: Response("x", media_type="text/css"), "Content-Type"),
    "another shape": (lambda _: JSONResponse({"task": 1}), "schema"),
    "an answer that is late": (late, " s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind by its own name."""
    answer, says = FAULTS[fault]
    monkeypatch.setattr(fuzz_http, "SLOW_S", 10.0 if fault != "an answer that is late" else 0.03)
    app = Starlette(routes=[Route("/{path:path}", answer, methods=METHODS)])
    with listening(app) as url, closing(Fuzzer(url)) as fuzzer:
        fuzzer.run(60)

    assert any(says in problem for problem in fuzzer.tally.problems), fuzzer.tally.problems
