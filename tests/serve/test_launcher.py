"""What HAProxy, as the launcher sets it up, lets through to a replica."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.serve.front_door import FrontDoor


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the headers that it got."""
    if scope["type"] == "http":
        headers = [[name, value] for name, value in Request(scope).headers.items()]
        answer: Response = JSONResponse(headers)
        await answer(scope, receive, send)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """HAProxy before a replica that tells what it heard."""
    with FrontDoor(tmp_path_factory.mktemp("door"), echo, body_timeout_s=10.0) as opened:
        yield opened


def heard(door: FrontDoor, headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """What the replica hears of a request with these headers."""
    answer = httpx.get(f"http://127.0.0.1:{door.port}/tasks", headers=headers, timeout=20)
    assert answer.status_code == 200
    return [(name, value) for name, value in answer.json()]


def request_ids(door: FrontDoor, *sent: bytes) -> list[str]:
    """The ids that the replica hears where these were sent."""
    told = heard(door, [(b"X-Request-Id", value) for value in sent])
    return [value for name, value in told if name == "x-request-id"]


def test_a_request_keeps_the_id_that_it_came_with(door: FrontDoor) -> None:
    """A caller finds his request again by it."""
    assert request_ids(door, b"order-7/b,c") == ["order-7/b,c"]


@pytest.mark.parametrize("sent", [(), (b"a", b"b"), (b"\xe9",), (b"a\xff",), (b"a b",), (b"",)])
def test_one_without_a_usable_id_gets_one(door: FrontDoor, sent: tuple[bytes, ...]) -> None:
    """None, two, or one that is no plain ASCII: Ray answers what is not UTF-8 with 500."""
    (given,) = request_ids(door, *sent)

    assert len(given) == 36
    assert given.count("-") == 4


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-timeout-seconds",
        b"X-Request-Disconnect-Disabled",
        b"x-session-id",
        b"X_Session_Id",
        b"serve_multiplexed_model_id",
        b"Serve-Multiplexed-Model-Id",
    ],
)
def test_a_caller_cannot_speak_to_ray(door: FrontDoor, name: bytes) -> None:
    """What it takes from headers would go round our deadlines, or fail where it is not UTF-8."""
    told = heard(door, [(name, b"\xff1"), (b"x-headstock-caller", b"me")])

    assert name.decode().lower() not in dict(told)
    assert dict(told)["x-headstock-caller"] == "me"


@pytest.mark.parametrize(("min_replicas", "is_asleep"), [(0, False), (1, True), (0, True)])
def test_what_looks_on_is_answered_by_itself_where_all_sleep(
    tmp_path: Path, *, min_replicas: int, is_asleep: bool
) -> None:
    """Nowhere else: a replica answers for the fleet, and a fleet that lost its last is not well."""
    looks = ("/v2/health/live", "/v2/health/ready", "/metrics")
    with FrontDoor(
        tmp_path, echo, body_timeout_s=10.0, min_replicas=min_replicas, is_asleep=is_asleep
    ) as door:
        url = f"http://127.0.0.1:{door.port}"
        live, ready, metrics = (httpx.get(f"{url}{path}", timeout=20) for path in looks)
        httpx.post(f"{url}/predict/pets", timeout=20)
        asked = [path for _, path in door.seen]

    assert {live.status_code, ready.status_code, metrics.status_code} == {200}
    if min_replicas == 0 and is_asleep:
        assert asked == ["/predict/pets"]
        assert live.content == ready.content == b""
        values = {
            sample.name: sample.value
            for family in text_string_to_metric_families(metrics.text)
            for sample in family.samples
        }
        assert values == {"headstock_replicas": 0.0, "headstock_replicas_wanted": 0.0}
    else:
        assert asked == [*looks, "/predict/pets"]
