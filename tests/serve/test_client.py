"""The clients: what they send again and when, and that both say the same."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from export.bundle import Bundle
from serve.client import AsyncClient, Client, ClientError
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of

ANSWER = {
    "task": "colours",
    "version": 1,
    "bundle": "sha256:0",
    "label": "red",
    "score": 1.0,
    "scores": {"red": 1.0},
}
SWAPPED = {"task": "colours", "version": 2}


class Scripted:
    """A service that gives these answers, one after the other, and the last one for ever.

    Args:
        answers: A status with its headers, or an error of the connection.
    """

    def __init__(self, *answers: tuple[int, dict[str, str]] | httpx.TransportError) -> None:
        self._answers = answers
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.requests.append(request)
        answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
        if isinstance(answer, httpx.TransportError):
            raise answer
        status, headers = answer
        return httpx.Response(status, headers=headers, json=ANSWER)


LATER = (503, {"retry-after": "0"})
GONE = httpx.ConnectError("refused")
FINE = (200, dict[str, str]())

Ask = Callable[..., Any]


@pytest.fixture(params=["waiting", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Calls a method of either client, whose requests a function answers."""

    def waiting(service: Scripted, name: str, *args: Any, **client: Any) -> Any:
        with Client("http://test", **client) as asking:
            asking._http = httpx.Client(
                base_url="http://test", transport=httpx.MockTransport(service)
            )
            return getattr(asking, name)(*args)

    def awaiting(service: Scripted, name: str, *args: Any, **client: Any) -> Any:
        async def ask() -> Any:
            async with AsyncClient("http://test", **client) as asking:
                transport = httpx.MockTransport(service)
                asking._http = httpx.AsyncClient(base_url="http://test", transport=transport)
                return await getattr(asking, name)(*args)

        return asyncio.run(ask())

    return waiting if request.param == "waiting" else awaiting


@pytest.mark.parametrize(
    "trouble", [LATER, (429, {"retry-after": "0"}), GONE, httpx.ReadError("reset")]
)
def test_what_may_pass_is_asked_again(
    ask: Ask, trouble: tuple[int, dict[str, str]] | httpx.TransportError
) -> None:
    """Whoever is told when to come back does so, and a broken connection is opened anew."""
    service = Scripted(trouble, trouble, FINE)

    assert ask(service, "predict", "colours", b"picture").label == "red"
    assert len(service.requests) == 3
    assert {request.content for request in service.requests} == {b"picture"}


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 500, 503])
def test_what_stays_is_not_asked_again(ask: Ask, status: int) -> None:
    """Nor is a 503 that does not say when to come back."""
    service = Scripted((status, {}))

    with pytest.raises(ClientError, match=f"answers {status}") as refused:
        ask(service, "predict", "colours", b"picture")
    assert refused.value.status == status
    assert len(service.requests) == 1


@pytest.mark.parametrize(("trouble", "status"), [(LATER, 503), (GONE, 0)])
def test_a_request_is_sent_as_often_as_allowed(
    ask: Ask, trouble: tuple[int, dict[str, str]] | httpx.TransportError, status: int
) -> None:
    """Then the last outcome is the caller's."""
    service = Scripted(trouble)

    with pytest.raises(ClientError) as refused:
        ask(service, "predict", "colours", b"picture", tries=3)
    assert refused.value.status == status
    assert len(service.requests) == 3


def test_a_change_that_is_sent_again_keeps_its_key(ask: Ask) -> None:
    """So it is made once, however often it arrives; another call is another change."""
    service = Scripted(GONE, LATER, FINE)
    ask(service, "rollback", "colours")
    ask(service, "rollback", "colours")
    keys = [request.headers["idempotency-key"] for request in service.requests]

    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_no_wait_is_longer_than_the_caller_has(ask: Ask) -> None:
    """Who is told to come back after his time is over hears it at once."""
    service = Scripted((503, {"retry-after": "30"}))
    began_s = time.monotonic()

    with pytest.raises(ClientError, match="503"):
        ask(service, "predict", "colours", b"picture", timeout_s=5.0)
    assert time.monotonic() - began_s < 4.0
    assert len(service.requests) == 1


def test_the_wait_is_as_long_as_the_service_says(ask: Ask) -> None:
    """At least: what is drawn comes on top."""
    service = Scripted((503, {"retry-after": "1"}), FINE)
    began_s = time.monotonic()
    ask(service, "predict", "colours", b"picture")

    assert time.monotonic() - began_s >= 1.0


def test_waits_are_drawn_and_grow_up_to_a_limit() -> None:
    """Callers who were turned away together do not come back together."""
    from serve.client_sending import FIRST_WAIT_S, LONGEST_WAIT_S, wait_s  # noqa: PLC0415

    waits = {
        attempt: [wait_s(GONE, attempt=attempt, tries=99, left_s=60.0) for _ in range(200)]
        for attempt in (1, 3, 20)
    }
    longest = {attempt: max(w or 0.0 for w in drawn) for attempt, drawn in waits.items()}

    assert all(len(set(drawn)) > 100 for drawn in waits.values())
    # Of 200 draws one is in the upper tenth, but for one run in a thousand million.
    assert 0.9 * FIRST_WAIT_S < longest[1] <= FIRST_WAIT_S
    assert 0.9 * 4 * FIRST_WAIT_S < longest[3] <= 4 * FIRST_WAIT_S
    assert 0.9 * LONGEST_WAIT_S < longest[20] <= LONGEST_WAIT_S


def test_a_name_stays_a_name_in_the_path(ask: Ask) -> None:
    """Whatever characters it has, it is one part of the path."""
    service = Scripted(FINE)
    ask(service, "predict", "../a?b/c#d", b"picture")

    assert service.requests[0].url.raw_path == b"/predict/..%2Fa%3Fb%2Fc%23d"


def test_both_clients_have_the_same_calls() -> None:
    """With the same parameters, as `help` shows them."""
    calls = {name for name in vars(Client) if not name.startswith("_")}

    assert calls == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in calls:
        of_each = [inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient)]
        assert of_each[0].parameters == of_each[1].parameters
        assert next(iter(of_each[0].parameters)) == "self"


@pytest.fixture
def fleet(
    tmp_path: Path, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[LocalFleet]:
    """One replica without tasks."""
    del make_bundle
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=1) as fleet:
        yield fleet


def test_the_async_client_pushes_asks_and_reads_like_the_other(
    connect: Callable[..., Client], http: HttpClient, heads: Heads
) -> None:
    """One service, asked by both."""

    async def ask() -> tuple[Any, ...]:
        async with AsyncClient("http://test") as client:
            transport = httpx.ASGITransport(http._app)
            client._http = httpx.AsyncClient(base_url="http://test", transport=transport)
            pushed = await client.push(heads(1))
            prediction = await client.predict("colours", png_of(0))
            several = await client.predict_tasks(None, png_of(0), top=1)
            log = [record async for record in client.log()]
            return pushed, prediction, several, await client.history("colours"), log

    pushed, prediction, several, history, log = asyncio.run(ask())
    with connect() as client:
        assert pushed["version"] == client.tasks()["tasks"][0]["version"] == 1
        assert prediction == client.predict("colours", png_of(0))
        assert several == client.predict_tasks(["colours"], png_of(0), top=1)
        assert list(several[0].scores) == [prediction.label]
        assert history == client.history("colours")
        assert log == list(client.log())
