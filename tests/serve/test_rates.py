"""How often a token may ask, by a clock of the test's own and by a real fleet's reports."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.messages import Swapped
from serve.rates import BURST_S, SILENT_S, Rates
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.holders import bearer, token_for
from tests.serve.test_http import problem

TOKEN = "0" * 12
LAG_S = 2.5  # as `rates.py` states it


class World:
    """Replicas that report to each other through something like the conductor, in turn.

    Args:
        report_s: Between two reports of one replica.
    """

    def __init__(self, replicas: int, *, rate_per_s: float, report_s: float = 1.0) -> None:
        self.now_s, self.rate_per_s, self.report_s = 0.0, rate_per_s, report_s
        self.names = [f"r{n}" for n in range(replicas)]
        self.rates = {name: Rates(name, lambda: self.now_s) for name in self.names}
        self.told: dict[str, dict[str, int]] = {}
        self.due = {name: report_s * n / replicas for n, name in enumerate(self.names)}
        self.is_up = True
        self.answered: list[float] = []
        self.refused = 0

    def go_on(self, seconds: float, asked_per_s: float, where: list[float]) -> None:
        """Requests at even distances, to replicas by chance with these weights."""
        chance = random.Random(0)  # noqa: S311 (traffic, no secret)
        for _ in range(round(seconds * asked_per_s)):
            self.now_s += 1 / asked_per_s
            for name in self.names:
                if self.is_up and self.now_s >= self.due[name]:
                    self.due[name] += self.report_s
                    self.rates[name].hear(self.told)
                    self.told[name] = dict(self.rates[name].spent())
            (name,) = chance.choices(self.names, where)
            if self.rates[name].take(TOKEN, self.rate_per_s) == 0:
                self.answered.append(self.now_s)
            else:
                self.refused += 1

    def most_in(self, seconds: float) -> int:
        """The most that was answered in any such time."""
        return max(
            sum(start <= at <= start + seconds for at in self.answered)
            for start in self.answered[:: max(1, len(self.answered) // 200)]
        )


def bound(rate_per_s: float, seconds: float, replicas: int) -> float:
    """The stated one."""
    burst = max(1.0, BURST_S * rate_per_s)
    return rate_per_s * seconds + burst + (replicas - 1) * (burst + rate_per_s * LAG_S)


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("asked", [2.0, 10.0])
@pytest.mark.parametrize("is_even", [True, False])
def test_a_fleet_answers_what_one_token_may_ask_within_the_stated_error(
    replicas: int, asked: float, *, is_even: bool
) -> None:
    """In every span of time; and after the first burst its rate, to a twentieth."""
    rate = 20.0
    world = World(replicas, rate_per_s=rate)
    where = [1.0 if is_even else 0.5**place for place in range(replicas)]
    world.go_on(120, rate * asked, where)

    for seconds in (1, 5, 20, 60):
        assert world.most_in(seconds) <= bound(rate, seconds, replicas)
    settled = [at for at in world.answered if at >= 60]
    assert len(settled) / 60 == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_who_keeps_to_his_rate_is_never_refused(replicas: int) -> None:
    """Wherever his requests go, and when they go elsewhere all at once."""
    world = World(replicas, rate_per_s=20.0)
    for turn in range(6):
        only = [float(place == turn % replicas) for place in range(replicas)]
        world.go_on(10, 19.0, only)
        world.go_on(10, 19.0, [1.0] * replicas)

    assert world.refused == 0
    assert len(world.answered) == round(120 * 19.0)


def test_who_asks_too_often_is_slowed_down_evenly() -> None:
    """Not answered in bursts: after the first, each second brings his rate to a fifth.

    Filled at the whole rate between two reports the buckets bring 13 to 26 of 20.
    """
    world = World(4, rate_per_s=20.0)
    world.go_on(60, 200.0, [1.0] * 4)

    counts = [sum(t <= at < t + 1 for at in world.answered) for t in range(30, 58)]
    assert min(counts) >= 16
    assert max(counts) <= 24


def test_without_a_conductor_each_replica_counts_for_itself() -> None:
    """Also one that had no share of the traffic before; and nothing is owed when it is back."""
    world = World(2, rate_per_s=10.0)
    world.go_on(5, 10.0, [1.0, 1.0])
    world.go_on(20, 10.0, [1.0, 0.0])
    world.is_up = False
    world.go_on(2 * SILENT_S, 100.0, [0.0, 1.0])
    world.answered.clear()
    world.go_on(10, 100.0, [0.0, 1.0])

    assert len(world.answered) == pytest.approx(100, abs=2)


def test_a_restarted_conductor_charges_nothing_twice() -> None:
    """Its first answers name some replicas only, and then all with what they ever answered."""
    world = World(3, rate_per_s=20.0)
    world.go_on(30, 18.0, [1.0] * 3)
    world.told.clear()
    world.go_on(30, 18.0, [1.0] * 3)

    assert world.refused == 0


def test_a_wait_is_long_enough() -> None:
    """Alone, a request that comes after it is answered, and one before it is not."""
    world = World(1, rate_per_s=0.5)
    rates = world.rates["r0"]
    assert rates.take(TOKEN, 0.5) == 0
    wait_s = rates.take(TOKEN, 0.5)
    world.now_s += wait_s * 0.99
    assert rates.take(TOKEN, 0.5) > 0
    world.now_s += wait_s * 0.02

    assert wait_s == pytest.approx(2.0)
    assert rates.take(TOKEN, 0.5) == 0


# A fleet


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path) -> Iterator[LocalFleet]:
    """Three replicas that ask for tokens."""
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=3, access="on") as fleet:
        yield fleet


def test_a_real_fleet_keeps_to_the_rate_within_the_stated_error(fleet: LocalFleet) -> None:
    """Three callers, each on a replica of his own, that ask as fast as they can with one token."""
    rate, seconds = 50.0, 8.0
    counts = dict.fromkeys(fleet.replicas, 0)
    began_s = time.monotonic()

    def hammer(name: str) -> None:
        while time.monotonic() < began_s + seconds:
            if fleet.replicas[name].rates.take(TOKEN, rate) == 0:
                counts[name] += 1
            time.sleep(0.001)

    threads = [threading.Thread(target=hammer, args=(name,)) for name in counts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    answered = sum(counts.values())
    assert answered <= bound(rate, seconds, len(counts))
    assert answered >= rate * seconds
    # Each for itself they would have answered three times as much.
    assert answered < 0.75 * len(counts) * (rate * seconds + BURST_S * rate)


def test_what_one_replica_answers_the_others_do_not(fleet: LocalFleet) -> None:
    """A burst on one leaves nothing on the next, once that has heard of it."""
    one, other = (fleet.replicas[f"replica-{n}"].rates for n in (1, 2))
    until(lambda: "replica-1" in other._heard)
    assert other.take(TOKEN, 1.0) == 0
    until(lambda: one.take(TOKEN, 1.0) > 0)
    until(lambda: other.take(TOKEN, 1.0) > 1, limit_s=LAG_S)


def test_too_often_is_told_when_to_come_back(fleet: LocalFleet) -> None:
    """429 with whole seconds; others are answered meanwhile."""
    http = HttpClient(fleet, "replica-1")
    for seed, rate in ((1, 0.5), (2, None)):
        token = token_for(seed, "predict:*", rate_per_s=rate)
        assert isinstance(fleet.issue(token), Swapped)
    first, second = (http.get("/tasks", headers=bearer(1)) for _ in range(2))

    assert first.status_code == 200
    assert "more than 0.5 requests a second" in problem(second, 429)
    assert second.headers["retry-after"] == "2"
    assert http.get("/tasks", headers=bearer(2)).status_code == 200
