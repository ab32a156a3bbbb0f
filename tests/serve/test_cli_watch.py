"""`headstock watch`: what is live, how much it is asked, and why there are so many replicas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import pytest

from serve import cli_watch
from serve.answers import Live
from serve.autoscale import Decision
from serve.cli_watch import drawn, looks, rows_answered
from serve.client import Client, ClientError
from serve.console import out
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of

RISE = Decision(3, "rise", 12.0, 14.0, 3, 2, 1, 0.5, replica_rate=5.0, startup_s=4.0)
STEADY = Decision(3, "steady", 12.0, 14.0, 3, 0, 3, 0.5, replica_rate=5.0, startup_s=4.0)


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """One replica with one task."""
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        yield fleet


class Time:
    """What `watch` uses of `time`: moments that are given, and what happens while it sleeps."""

    def __init__(self, sleep: Callable[[], object], moments: Iterable[float] = count()) -> None:
        self._sleep, self._moments = sleep, iter(moments)

    def sleep(self, _: float) -> None:
        """See `time.sleep`."""
        self._sleep()

    def monotonic(self) -> float:
        """See `time.monotonic`."""
        return next(self._moments)


def interrupted(after: int) -> Time:
    """Ctrl-C after so many looks."""
    looked = count(1)

    def sleep() -> None:
        if next(looked) == after:
            raise KeyboardInterrupt

    return Time(sleep)


def test_json_is_a_line_for_each_look(
    run: Run, monkeypatch: pytest.MonkeyPatch, heads: Heads
) -> None:
    """Nothing else is printed, and Ctrl-C is no failure."""
    monkeypatch.setattr(cli_watch, "time", interrupted(after=3))
    done = run("watch", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]

    assert (done.code, done.err, len(lines)) == (0, "", 3)
    (task,) = lines[-1]["tasks"]
    assert (task["task"], task["version"], task["bundle"]) == ("colours", 1, heads(1).digest)
    assert lines[-1]["replicas"]["answering"] == 1


def test_rates_are_what_was_answered_between_two_looks(
    fleet: LocalFleet, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the service's own count; of the first look nothing is known yet."""
    http, client = HttpClient(fleet, "replica-1"), connect()

    def ask_eight() -> None:
        before = rows_answered(client.metrics()).get("colours", 0.0)
        for _ in range(8):
            http.post("/predict/colours", content=png_of(0))
        until(lambda: rows_answered(client.metrics()).get("colours") == before + 8)

    monkeypatch.setattr(cli_watch, "time", Time(ask_eight, moments=(10.0, 14.0, 18.0)))
    first, second, third = islice(looks(client, every_s=1.0), 3)
    told = [look["tasks"][0]["rows_per_s"] for look in (first, second, third)]

    assert told == [None, 2.0, 2.0]


def test_a_count_that_began_anew_has_no_rate_for_once(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the conductor, which adds up, is another."""
    client, counts = connect(), iter((100, 20, 30))
    text = 'headstock_task_rows_total{{task="colours"}} {}\n'.format
    monkeypatch.setattr(client, "metrics", lambda: text(next(counts)))
    monkeypatch.setattr(cli_watch, "time", Time(lambda: None, moments=(0.0, 1.0, 2.0)))
    told = [look["tasks"][0]["rows_per_s"] for look in islice(looks(client, every_s=1.0), 3)]

    assert told == [None, None, 10.0]


def test_a_service_that_is_away_for_a_while_is_looked_for_again(
    connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks on while it restarts goes on looking; who calls it by a wrong name is told."""
    client = connect()
    live, away = client.tasks(), ClientError(0, "http://test does not answer")
    answers = iter((live, away, live))

    def tasks() -> Live:
        answer = next(answers, away)
        if isinstance(answer, ClientError):
            raise answer
        return answer

    monkeypatch.setattr(client, "tasks", tasks)
    monkeypatch.setattr(cli_watch, "time", Time(lambda: None))
    first, second, third = islice(looks(client, every_s=1.0), 3)

    assert second["error"] == "http://test does not answer"
    assert first["tasks"][0]["task"] == third["tasks"][0]["task"] == "colours"
    with pytest.raises(ClientError):
        next(looks(client, every_s=1.0))


def test_people_see_tasks_replicas_and_why(
    fleet: LocalFleet, connect: Callable[..., Client]
) -> None:
    """The decisions as sentences, the newest first."""
    fleet.decisions.take(RISE)
    fleet.decisions.take(STEADY)
    look = next(looks(connect(), every_s=1.0))
    with out.capture() as shown:
        out.print(drawn(look))
    lines = shown.get().splitlines()

    assert any("colours" in line and " 1 " in line and "push" in line for line in lines)
    assert any(line.startswith("1 replicas answer, 3 wanted") for line in lines)
    assert any(line.startswith(f"now: {STEADY}"[:60]) for line in lines)
    assert any(str(RISE)[:40] in line for line in lines)


def test_without_decisions_or_conductor_that_is_said(connect: Callable[..., Client]) -> None:
    """What is live is known without the conductor."""
    look = next(looks(connect(), every_s=1.0))
    with out.capture() as fixed:
        out.print(drawn(look))
    with out.capture() as alone:
        out.print(drawn({**look, "replicas": None}))
    with out.capture() as away:
        out.print(drawn({"at": "now", "error": "it does not answer [503]"}))

    assert "1 replicas answer, a fixed number" in fixed.get()
    assert "replicas: the conductor does not answer" in alone.get()
    assert "it does not answer [503]" in away.get()
