"""Counts of models: added up over replicas, exact whatever becomes of reports and replicas."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from serve import statistics
from serve.statistics import MAX_VERSIONS, Counts, FleetStatistics, Statistics


def counted(*requests: tuple[str, int]) -> Statistics:
    """A replica that answered one request of each of these models and versions."""
    mine = Statistics()
    for model, version in requests:
        mine.answered([(model, version)], 0.5, num_rows=2, decoding_s=0.1, running_s=0.3)
        mine.ran({(model, version): 2}, 0.3)
    return mine


def answered(fleet: FleetStatistics) -> Mapping[tuple[str, int], int]:
    """How many requests of each model and version the fleet answered."""
    return {
        (model, version): counts.answered
        for model, versions in fleet.of(None).items()
        for version, counts in versions.items()
    }


def test_a_request_is_counted_with_its_parts() -> None:
    """What is neither decoding nor running is waiting."""
    mine = counted(("a", 1), ("a", 1))
    mine.failed([("a", 1)], 0.2)
    counts = mine.report()["a"][1]

    assert (counts.answered, counts.answered_ns) == (2, 1_000_000_000)
    assert (counts.failed, counts.failed_ns) == (1, 200_000_000)
    assert (counts.decoding_ns, counts.running_ns) == (200_000_000, 600_000_000)
    assert counts.waiting_ns == 200_000_000
    assert (counts.num_rows, counts.runs, counts.runs_ns) == (4, {2: 2}, {2: 600_000_000})
    assert counts.last_ms > 1_600_000_000_000


def test_a_report_says_what_changed_since_the_last() -> None:
    """As totals; or all, to one who may have missed some."""
    mine = counted(("a", 1), ("b", 1))
    assert set(mine.report()) == {"a", "b"}
    assert mine.report() == {}
    mine.failed([("b", 1)], 0.1)
    report = mine.report()

    assert report["b"][1].answered == 1
    assert set(report) == {"b"}
    assert set(mine.report(everything=True)) == {"a", "b"}


def test_a_report_does_not_change_afterwards() -> None:
    """It is sent by another thread while the counting goes on."""
    mine = counted(("a", 1))
    report = mine.report()
    mine.ran({("a", 1): 2}, 0.3)

    assert report["a"][1].runs == {2: 1}


def test_both_sides_of_a_sum_count() -> None:
    """Every field but the time of the last, which is the later one."""
    one = Counts(1, 2, 3, 4, 5, 6, 7, 8, {1: 1, 2: 5}, {1: 10, 2: 0})
    other = Counts(10, 20, 30, 40, 50, 60, 70, 6, {2: 1, 3: 1}, {2: 7, 3: 9})

    assert one.plus(other) == Counts(
        11, 22, 33, 44, 55, 66, 77, 8, {1: 1, 2: 6, 3: 1}, {1: 10, 2: 7, 3: 9}
    )


def test_the_fleet_counts_each_replica_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that come twice or out of the blue, replicas that end: the sum is that of all."""
    monkeypatch.setattr(statistics, "GONE_S", 0.0)
    chance = np.random.default_rng(0)
    fleet = FleetStatistics()
    truth: dict[tuple[str, int], int] = {}
    living = {f"r{n}": Statistics() for n in range(3)}
    for step in range(300):
        name = str(chance.choice(sorted(living)))
        key = (str(chance.choice(["a", "b"])), int(chance.integers(1, 4)))
        living[name].answered([key], 0.1, num_rows=1, decoding_s=0.0, running_s=0.0)
        truth[key] = truth.get(key, 0) + 1
        for other, theirs in living.items():
            if chance.random() < 0.5:
                report = theirs.report(everything=bool(chance.random() < 0.2))
                for _ in range(int(chance.integers(1, 3))):
                    fleet.take(other, report, living)
        if chance.random() < 0.05:
            fleet.take(name, living[name].report(everything=True), living)
            del living[name]
            living[f"r{step}x"] = Statistics()
    for name, mine in living.items():
        fleet.take(name, mine.report(everything=True), living)

    assert answered(fleet) == truth


def test_what_a_replica_that_was_given_up_says_later_counts_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its counts were kept when it was."""
    monkeypatch.setattr(statistics, "GONE_S", 0.0)
    fleet, late = FleetStatistics(), counted(("a", 1))
    fleet.take("late", late.report(), {"late"})
    fleet.take("other", {}, {"other"})
    fleet.take("late", late.report(everything=True), {"other"})

    assert answered(fleet) == {("a", 1): 1}


def test_a_replica_that_is_silent_for_a_moment_is_not_gone() -> None:
    """Though it is no member yet, or no longer."""
    fleet, mine = FleetStatistics(), counted(("a", 1))
    fleet.take("joins", {}, set())
    fleet.take("other", {}, {"other"})
    fleet.take("joins", mine.report(), {"other"})

    assert answered(fleet) == {("a", 1): 1}


def test_of_a_model_the_last_few_versions_are_counted() -> None:
    """In a replica and in the fleet: pushes all day take no more memory."""
    mine = counted(*(("a", version) for version in range(1, 100)))
    fleet = FleetStatistics()
    fleet.take("r", mine.report(), {"r"})
    kept = [*range(100 - MAX_VERSIONS, 100)]

    assert sorted(mine.report(everything=True)["a"]) == kept
    assert sorted(fleet.of("a")["a"]) == kept
    mine.failed([("a", 1)], 0.1)
    assert sorted(mine.report()["a"]) == kept
