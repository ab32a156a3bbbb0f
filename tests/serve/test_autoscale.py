"""How many replicas follow from what was observed, whatever it was."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.autoscale import (
    BIN_S,
    STALE_S,
    Aim,
    Decision,
    Observed,
    ServiceTime,
    burst_rates,
    choose,
    decide,
    forecast,
)

SERVICE = ServiceTime(fixed_s=0.25, row_s=0.25, batch=4)
AIM = Aim(deadline_s=3.0, startup_s=30.0, min_replicas=1, max_replicas=20)
MINUTE = round(60 / BIN_S)

counts = st.lists(st.integers(0, 200), max_size=400).map(lambda rows: np.array(rows, np.float64))
observations = st.builds(
    Observed,
    arrived=counts,
    age_s=st.floats(0, 100),
    queued=st.integers(0, 5000),
    replicas=st.integers(0, 30),
    nodes=st.integers(0, 4),
)


def steady(rate: float, seconds: float = 400.0, *, replicas: int = 4) -> Observed:
    """The same rows in every bin."""
    arrived = np.full(round(seconds / BIN_S), rate * BIN_S)
    return Observed(arrived, age_s=0.0, queued=0, replicas=replicas)


@given(observations, st.integers(0, 5), st.integers(5, 25), st.integers(1, 8))
@settings(deadline=None)
def test_replicas_are_never_outside_the_bounds(
    observed: Observed, least: int, most: int, per_node: int
) -> None:
    """The lower bound gives way only to nodes that have no room."""
    aim = AIM.model_copy(
        update={"min_replicas": least, "max_replicas": most, "max_replicas_per_node": per_node}
    )
    room = min(most, per_node * observed.nodes)

    assert min(least, room) <= decide(observed, SERVICE, aim).replicas <= room


@given(observations, st.floats(1.0, 4.0))
@settings(deadline=None)
def test_a_multiple_of_every_burst_never_needs_less_capacity(
    observed: Observed, factor: float
) -> None:
    """Each moment's burst asks for as many times more as all of its rows are."""
    once = burst_rates(observed.arrived, 1.5)

    np.testing.assert_allclose(burst_rates(observed.arrived * factor, 1.5), once * factor)


@given(observations, st.integers(1, 1000), st.integers(1, 500))
@settings(deadline=None)
def test_more_rows_now_or_waiting_never_mean_fewer_replicas(
    observed: Observed, rows: int, queued: int
) -> None:
    """Monotone in the newest bin and in the queue."""
    arrived = observed.arrived.copy()
    arrived[-1:] += rows
    busier = replace(observed, arrived=arrived, queued=observed.queued + queued)

    assert decide(busier, SERVICE, AIM).replicas >= decide(observed, SERVICE, AIM).replicas


@given(observations)
@settings(deadline=None)
def test_old_metrics_never_let_a_replica_go(observed: Observed) -> None:
    """What nobody reports may still come."""
    within = replace(observed, replicas=min(max(observed.replicas, 1), 20))
    stale = replace(within, age_s=STALE_S + 0.1)

    assert decide(stale, SERVICE, AIM).replicas >= within.replicas


@given(observations, st.integers(1, 3))
@settings(deadline=None)
def test_a_replica_that_has_not_reported_lets_none_go(observed: Observed, unheard: int) -> None:
    """Nobody knows yet what comes to it."""
    within = replace(observed, replicas=min(max(observed.replicas, 1), 20), unheard=unheard)

    assert decide(within, SERVICE, AIM).replicas >= within.replicas


QUIET = steady(0.0, replicas=3)


@pytest.mark.parametrize(
    "unknown", [replace(QUIET, unheard=1), replace(QUIET, age_s=STALE_S + 0.1)]
)
def test_what_is_let_go_when_all_is_known_stays_where_it_is_not(unknown: Observed) -> None:
    """After as much was seen as is kept, so that nothing else holds it."""
    assert decide(QUIET, SERVICE, AIM).replicas == 1
    assert decide(unknown, SERVICE, AIM).replicas == 3


def test_without_metrics_nothing_changes() -> None:
    """A controller that just started has seen nothing."""
    observed = Observed(np.zeros(0), age_s=0.0, queued=0, replicas=7)

    decision = decide(observed, SERVICE, AIM)

    assert (decision.replicas, decision.rule) == (7, "unknown")


def test_no_replica_goes_before_as_much_was_seen_as_is_kept() -> None:
    """A quiet minute says nothing of the five before it."""
    young, old = steady(1.0, seconds=299.0, replicas=5), steady(1.0, seconds=300.0, replicas=5)

    assert decide(young, SERVICE, AIM).rule == "young"
    assert decide(old, SERVICE, AIM).rule == "fall"


@pytest.mark.parametrize("rate", [2.0, 10.0, 30.0])
def test_a_steady_load_does_not_flap(rate: float) -> None:
    """Three times an hour of Poisson arrivals: at most four changes of direction an hour."""
    num_turns = 0
    for seed in range(3):
        arrived = np.random.default_rng(seed).poisson(rate * BIN_S, 7200).astype(np.float64)
        demand = forecast(arrived, SERVICE, AIM)
        chosen = [10]
        for end in range(600, len(arrived), 4):
            seen = Observed(arrived[:end], age_s=0.0, queued=0, replicas=chosen[-1])
            chosen.append(choose(seen, demand[:end], SERVICE, AIM).replicas)
        steps = np.diff(chosen[1:])
        num_turns += int((np.diff(np.sign(steps[steps != 0])) != 0).sum())

    assert num_turns <= 3 * 4


def test_a_queue_wakes_a_service_that_was_scaled_to_zero() -> None:
    """One replica, at once, for a single row; the rest follows from what arrives."""
    aim = AIM.model_copy(update={"min_replicas": 0})
    idle = replace(steady(0.0), replicas=0)

    assert decide(idle, SERVICE, aim).replicas == 0
    assert decide(replace(idle, queued=1), SERVICE, aim).replicas == 1


def test_nothing_but_a_row_that_waits_wakes_a_service() -> None:
    """A forecast from what came before it slept does not: it would never sleep."""
    aim = AIM.model_copy(update={"min_replicas": 0})
    seconds = np.arange(0, 600, BIN_S)
    growing = Observed(seconds / 6 * BIN_S, age_s=0.0, queued=0, replicas=1)

    assert decide(growing, SERVICE, aim).replicas > 1
    assert decide(replace(growing, replicas=0), SERVICE, aim).replicas == 0
    assert decide(replace(growing, replicas=0, queued=1), SERVICE, aim).replicas > 1


def test_the_last_replica_stays_while_a_row_waits() -> None:
    """Also where nothing is known of what came, and there is no replica yet."""
    aim = AIM.model_copy(update={"min_replicas": 0})
    quiet = replace(steady(0.0), replicas=3, queued=1)
    unknown = Observed(np.zeros(0), age_s=0.0, queued=0, replicas=0)

    assert decide(quiet, SERVICE, aim).replicas == 1
    assert decide(unknown, SERVICE, aim).replicas == 0
    assert decide(replace(unknown, queued=1), SERVICE, aim).rule == "wake"


def test_a_service_that_nobody_asks_goes_to_zero_only_if_that_is_allowed() -> None:
    """Idle for longer than capacity is kept."""
    zero = AIM.model_copy(update={"min_replicas": 0})

    assert decide(steady(0.0, replicas=3), SERVICE, zero).replicas == 0
    assert decide(steady(0.0, replicas=3), SERVICE, AIM).replicas == 1


def test_a_growing_load_is_met_for_the_time_at_which_a_new_replica_answers() -> None:
    """10 rows/s more a minute, and a start of 60 s: ready for what comes a minute later."""
    seconds = np.arange(0, 300, BIN_S)
    arrived = (10 + seconds / 6) * BIN_S
    aim = AIM.model_copy(update={"startup_s": 60.0})

    growth = (forecast(arrived, SERVICE, aim) - burst_rates(arrived, 3.0 - SERVICE.full_s))[-1]

    # 55 and 45 rows/s in the last two minutes; one deviation of the difference is taken for chance.
    assert growth == pytest.approx(10 - math.sqrt(60 * (55 + 45)) / 60, rel=0.02)


def test_a_crowd_is_met_by_its_rate_at_once() -> None:
    """Rows of two seconds may wait, and a demand by bursts alone would take them for a few."""
    arrived = np.concatenate([np.full(240, 2.0), np.full(4, 20.0)])
    observed = Observed(arrived, age_s=0.0, queued=0, replicas=3)

    assert decide(observed, SERVICE, AIM).demand >= 40.0


def test_what_waits_too_long_is_answered_while_new_replicas_start() -> None:
    """Four replicas answer 12.8 rows/s, and a row may wait 1.75 s; the rest goes within 30 s."""
    calm = steady(10.0, replicas=4)
    behind = decide(replace(calm, queued=500), SERVICE, AIM)

    more = behind.demand - decide(calm, SERVICE, AIM).demand
    assert more == pytest.approx((500 - 12.8 * 1.75) / 30)
    assert behind.rule == "queue"


def test_what_was_needed_within_a_start_is_kept() -> None:
    """Down again only once the busiest moment is a start-up delay ago."""
    quiet, busy = np.full(2 * MINUTE, 1.0), np.full(MINUTE, 8.0)
    aim = AIM.model_copy(update={"startup_s": 120.0, "hold_s": 120.0})
    before = decide(Observed(np.concatenate([quiet, busy]), 0.0, 0, 9), SERVICE, aim).needed

    for minutes, is_kept in ((1, True), (4, False)):
        arrived = np.concatenate([quiet, busy, np.full(minutes * MINUTE, 1.0)])
        needed = decide(Observed(arrived, 0.0, 0, 9), SERVICE, aim).needed

        assert (needed >= before) == is_kept


@given(st.lists(st.integers(0, 50), min_size=1, max_size=90), st.floats(0.1, 5))
@settings(deadline=None)
def test_the_capacity_for_bursts_is_that_of_a_queue(rows: list[int], slack_s: float) -> None:
    """The twin: a queue served bin by bin at that rate never holds more than the slack's worth."""
    rate = float(burst_rates(np.array(rows, np.float64), slack_s).max())
    # Only some lengths of a burst are looked at; those between ask for at most half as much again.
    longest_wait_s = _longest_wait_s(rows, rate * 1.5 + 1e-9)

    assert longest_wait_s <= slack_s + 1e-6
    assert sum(rows) == 0 or _longest_wait_s(rows, rate * 0.99) > slack_s * 0.9


@given(observations, st.integers(0, 400))
@settings(deadline=None)
def test_a_forecast_looks_at_nothing_later(observed: Observed, end: int) -> None:
    """A longer record only adds to a shorter one; a forecast from the end of it is the same."""
    whole = forecast(observed.arrived, SERVICE, AIM)

    np.testing.assert_allclose(forecast(observed.arrived[:end], SERVICE, AIM), whole[:end])
    assert decide(observed, SERVICE, AIM) == choose(observed, whole, SERVICE, AIM)


def test_a_decision_says_what_it_was_made_from() -> None:
    """One line, for the log."""
    decision = Decision(5, "rise", 12.25, 14.0, 5, 3, 4, 1.5, replica_rate=3.2, startup_s=30.0)

    assert str(decision) == (
        "4 -> 5 replicas by rule rise: 12.2 rows/s came, capacity for 14.0 rows/s is needed "
        "(5 replicas of 3.2 rows/s), 3 rows wait, observed 1.5 s ago"
    )


def test_bounds_that_cross_are_refused() -> None:
    """With both numbers."""
    with pytest.raises(ValidationError, match="min_replicas is 3, more than max_replicas, 2"):
        Aim(deadline_s=1, startup_s=1, min_replicas=3, max_replicas=2)


def _longest_wait_s(rows: list[int], rate: float) -> float:
    """Served continuously at a rate; a bin's rows are all there at its end."""
    waiting, longest = 0.0, 0.0
    for count in rows:
        # All of a bin's rows, less what is served while they come.
        waiting = max(0.0, waiting + count - rate * BIN_S)
        longest = max(longest, waiting / rate if rate else float("inf") if waiting else 0.0)
    return longest
