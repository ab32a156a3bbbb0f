"""What a caller is told whose request was lost with its replica: to ask again."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.client import Client, ClientError
from serve.client_sending import wait_s
from tests.serve.front_door import FrontDoor


async def nobody(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """What stands behind a door whose replica is gone."""
    raise AssertionError("no request gets this far")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """HAProxy, after its only replica went."""
    folder = tmp_path_factory.mktemp("door")
    with FrontDoor(folder, nobody, body_timeout_s=10.0) as opened:
        opened.stop_replica()
        yield opened


def test_without_a_replica_the_answer_is_to_ask_again(door: FrontDoor) -> None:
    """As a problem, and with the field that clients of the open protocol read."""
    answer = httpx.post(f"http://127.0.0.1:{door.port}/predict/pets", content=b"x", timeout=20)

    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) == 1
    assert answer.json()["status"] == 503
    assert answer.json()["error"] == answer.json()["detail"]


def test_the_client_asks_again_after_such_an_answer(door: FrontDoor) -> None:
    """It is one of the answers that it takes for "not now"."""
    answer = httpx.get(f"http://127.0.0.1:{door.port}/tasks", timeout=20)

    again_s = wait_s(answer, attempt=1, tries=4, left_s=30.0)

    assert again_s is not None
    assert again_s >= 1


def test_the_client_tells_what_happened_when_it_may_not_ask_again(door: FrontDoor) -> None:
    """In the words of the answer."""
    with (
        Client(f"http://127.0.0.1:{door.port}", tries=1) as client,
        pytest.raises(ClientError, match="none answers now") as refused,
    ):
        client.predict("pets", b"x")

    assert refused.value.status == 503
