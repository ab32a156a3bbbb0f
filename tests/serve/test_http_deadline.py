"""How long a caller waits: its own deadline, its task's, and the service's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from export.bundle import Bundle
from serve.http.routes import http_app
from serve.task_settings import TaskSettings
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem

HEADER = "x-headstock-timeout-ms"


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[LocalFleet]:
    """One replica with two tasks, that takes half a second for an answer at most."""
    heads = Heads(make_bundle)
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, request_timeout_s=0.5) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield fleet


def ask_held(fleet: LocalFleet, path: str, **headers: str) -> tuple[httpx.Response, float]:
    """Ask while every task is held, so that no answer comes; and how long it took."""
    batcher = fleet.replicas["replica-1"].batcher
    batcher.hold(frozenset({"colours", "shapes"}))
    began_s = time.monotonic()
    try:
        answer = HttpClient(fleet, "replica-1").post(path, content=png_of(0), headers=headers)
    finally:
        batcher.release()
    return answer, time.monotonic() - began_s


@pytest.mark.parametrize("value", ["1", "500"])
def test_a_deadline_within_the_services_own_is_taken(fleet: LocalFleet, value: str) -> None:
    """A late answer is 503 with the time that was allowed and when to come back."""
    answer, took_s = ask_held(fleet, "/predict/colours", **{HEADER: value})

    assert f"No answer within {int(value) / 1000:g} s" in problem(answer, 503)
    assert answer.headers["retry-after"] == "1"
    assert took_s >= int(value) / 1000


@pytest.mark.parametrize("value", ["0", "-5", "501", "1.5", "", "soon", "٣", "9" * 13, "9" * 5000])
def test_another_deadline_is_malformed(fleet: LocalFleet, value: str) -> None:
    """400 with the range, before anything is done."""
    headers = {HEADER: value.encode()}
    client = HttpClient(fleet, "replica-1")
    answer = client.post("/predict/colours", content=png_of(0), headers=headers)

    assert "expected a whole number of milliseconds from 1 to 500" in problem(answer, 400)


def test_a_request_that_says_nothing_has_the_services_deadline(fleet: LocalFleet) -> None:
    """The setting `request_timeout_s`."""
    assert "No answer within 0.5 s" in problem(ask_held(fleet, "/predict/colours")[0], 503)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/predict/colours", "0.05"),
        ("/predict?tasks=shapes,colours", "0.05"),
        ("/predict?tasks=*", "0.05"),
        ("/predict/shapes", "0.5"),
    ],
)
def test_a_tasks_deadline_counts_for_requests_that_say_nothing(
    fleet: LocalFleet, path: str, allowed: str
) -> None:
    """The strictest of the tasks that are asked; one beyond the service's own changes nothing."""
    batcher = fleet.replicas["replica-1"].batcher
    before = batcher.snapshot
    deadlines = {"colours": TaskSettings(deadline_s=0.05), "shapes": TaskSettings(deadline_s=9.0)}
    batcher.flip(before.with_heads(before.number, [], deadlines))
    answer, _ = ask_held(fleet, path)
    batcher.flip(before)

    assert f"No answer within {allowed} s" in problem(answer, 503)


def test_what_cannot_be_answered_in_time_is_refused_at_once(fleet: LocalFleet) -> None:
    """503 with the time after which what waits is done, long before the deadline."""
    replica = fleet.replicas["replica-1"]
    replica.batcher.hold(frozenset({"colours"}))
    # As many as take the decoders seconds, for a caller who has half of one.
    pictures = [png_of(0)] * 20_000
    waiting = replica.ask(pictures, ("colours",), time.monotonic() + 100)
    began_s = time.monotonic()
    answer = HttpClient(fleet, "replica-1").post("/predict/colours", content=png_of(0))
    took_s = time.monotonic() - began_s
    waiting.cancel()
    replica.batcher.release()

    assert "What waits here takes about" in problem(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert took_s < 0.5


def test_a_caller_that_goes_away_frees_its_rows(fleet: LocalFleet) -> None:
    """The server cancels what it is doing for it, and nothing of it waits any more."""
    batcher = fleet.replicas["replica-1"].batcher
    batcher.hold(frozenset({"colours"}))

    async def hang_up() -> int:
        transport = httpx.ASGITransport(
            http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = asyncio.ensure_future(client.post("/predict/colours", content=png_of(0)))
            await asyncio.to_thread(until, lambda: batcher.admission.num_waiting == 1)
            asked.cancel()
            await asyncio.wait([asked])
        return batcher.admission.num_waiting

    num_waiting = asyncio.run(hang_up())
    batcher.release()

    assert num_waiting == 0


def test_the_callers_deadline_wins_over_the_tasks(fleet: LocalFleet) -> None:
    """The caller knows better how long it waits."""
    batcher = fleet.replicas["replica-1"].batcher
    before = batcher.snapshot
    batcher.flip(before.with_heads(9, [], {"colours": TaskSettings(deadline_s=0.01)}))
    answer, _ = ask_held(fleet, "/predict/colours", **{HEADER: "100"})
    batcher.flip(before)

    assert "No answer within 0.1 s" in problem(answer, 503)
