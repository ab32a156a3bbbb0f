"""The simulator against formulas, and against a twin that moves time in small steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.autoscale_baselines import Knative, RayServe
from benchmarks.autoscale_traces import PEAK_WINDOW_S, TRACES, real_trace
from benchmarks.autoscale_world import BINS_A_TICK, TICK_S, Seen, World, simulate
from serve.autoscale import ServiceTime

SERVICE_S = 1 / 64
ONE_BY_ONE = ServiceTime(fixed_s=0.0, row_s=SERVICE_S, batch=1)


def world(service: ServiceTime, replicas: int, startup_s: float = 10.0) -> World:
    """As many at the start as may ever be."""
    return World(service, 3.0, startup_s, 1, replicas, replicas)


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_one_replica_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1: mean wait = load / (2 (1 - load)) service times."""
    chance = np.random.default_rng(0)
    arrivals_s = np.cumsum(chance.exponential(SERVICE_S / load, 200_000))
    run = simulate(arrivals_s.tolist(), lambda _: 1, world(ONE_BY_ONE, 1))

    # At 0.9 waits are alike over thousands of requests, so the mean of 200,000 still varies.
    assert np.mean(run.latency_s) / SERVICE_S - 1 == pytest.approx(
        load / (2 * (1 - load)), rel=0.06
    )


@pytest.mark.parametrize(("replicas", "load"), [(2, 0.7), (5, 0.9)])
def test_several_replicas_wait_as_crommelin_says(replicas: int, load: float) -> None:
    """M/D/c: the mean wait, from Crommelin's series (1932)."""
    chance = np.random.default_rng(1)
    arrivals_s = np.cumsum(chance.exponential(SERVICE_S / (load * replicas), 200_000))
    run = simulate(arrivals_s.tolist(), lambda _: replicas, world(ONE_BY_ONE, replicas))

    assert np.mean(run.latency_s) / SERVICE_S - 1 == pytest.approx(
        _crommelin(replicas, load), rel=0.06
    )


services = st.builds(
    ServiceTime,
    fixed_s=st.sampled_from([0.0, 0.25, 0.5]),
    row_s=st.sampled_from([0.125, 0.5]),
    batch=st.integers(1, 5),
)


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=60),
    services,
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.sampled_from([2.0, 7.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_simulator_does_what_its_twin_does(
    eighths: list[int], service: ServiceTime, wishes: list[int], startup_s: float
) -> None:
    """Every answer's time and the replica-seconds, with time in steps of an eighth of a second."""
    arrivals_s = sorted(eighth / 8 for eighth in eighths)

    def policy(seen: Seen) -> int:
        return wishes[(round(seen.now_s / TICK_S) - 1) % len(wishes)]

    run = simulate(arrivals_s, policy, world(service, 5, startup_s))
    latency_s, replica_seconds = _twin(arrivals_s, service, wishes, startup_s)

    np.testing.assert_allclose(run.latency_s, latency_s)
    assert run.replica_seconds == pytest.approx(replica_seconds)


def test_a_policy_that_leaves_everything_waiting_is_an_error() -> None:
    """It would be simulated for ever."""
    stuck = World(ONE_BY_ONE, 3.0, 2.0, 0, 1, 0)

    with pytest.raises(RuntimeError, match="left requests unanswered"):
        simulate([1.0], lambda _: 0, stuck)


def test_what_a_policy_sees_in_the_system_is_what_came_less_what_was_answered() -> None:
    """Little's law: its mean is the rate times the latency."""
    chance = np.random.default_rng(2)
    arrivals_s = np.cumsum(chance.exponential(SERVICE_S / 1.6, 50_000))
    last: list[Seen] = []

    def policy(seen: Seen) -> int:
        last[:] = [seen]
        return 2

    run = simulate(arrivals_s.tolist(), policy, world(ONE_BY_ONE, 2))

    rate = len(arrivals_s) / arrivals_s[-1]
    # Looked at twice a second only.
    assert last[0].in_system.mean() == pytest.approx(rate * run.latency_s.mean(), rel=0.1)


def _seen(rate: float, in_system: float, *, asked: int, now_s: float = 200.0) -> Seen:
    bins = round(now_s / TICK_S) * BINS_A_TICK
    arrived = np.full(bins, rate / 2)
    return Seen(now_s, arrived, arrived, np.full(bins, in_system), 0, asked, asked)


def test_knative_divides_by_its_target() -> None:
    """config-autoscaler: the mean over the stable window, rounded up."""
    assert Knative("concurrency", 2.0, 60.0, 0.0)(_seen(0, 9.0, asked=4)) == 5
    assert Knative("rps", 2.5, 60.0, 0.0)(_seen(11.0, 0.0, asked=4)) == 5


def test_knative_panics_at_twice_what_is_ready_and_then_only_grows() -> None:
    """The short window decides, and nothing goes for a stable window."""
    policy = Knative("rps", 1.0, 60.0, 0.0)
    calm = _seen(3.0, 0.0, asked=3)
    burst = calm.arrived.copy()
    burst[-12:] = 4.0  # 8 a second for 6 s
    crowd = Seen(200.0, burst, burst, calm.in_system, 0, 3, 3)

    assert policy(crowd) == 8
    assert policy(_seen(3.0, 0.0, asked=8, now_s=220.0)) == 8
    assert policy(_seen(3.0, 0.0, asked=8, now_s=262.0)) == 4  # not below half of the ready pods


def test_ray_waits_for_its_delays() -> None:
    """Up at once, down only after it was wished for without a break."""
    policy = RayServe(2.0, 30.0, up_delay_s=0.0, down_delay_s=30.0)

    assert policy(_seen(0, 9.0, asked=3)) == 5
    assert policy(_seen(0, 3.0, asked=5, now_s=202.0)) == 5
    assert policy(_seen(0, 3.0, asked=5, now_s=232.0)) == 2


@pytest.mark.parametrize("name", list(TRACES))
def test_the_busiest_half_minute_of_a_trace_has_the_peak_rate(name: str) -> None:
    """Or somewhat less where chance has its say; bursts go above."""
    if name == "real" and real_trace() is None:
        pytest.skip("the real trace is not in the shared data of this machine")
    times = TRACES[name](np.random.default_rng(3), 25.6)
    ends = np.searchsorted(times, times + PEAK_WINDOW_S)
    busiest = (ends - np.arange(len(times))).max() / PEAK_WINDOW_S

    assert (np.diff(times) >= 0).all()
    if name == "real":
        assert busiest == pytest.approx(25.6, rel=0.02)
    elif name.startswith("cv"):
        assert len(times) / times[-1] == pytest.approx(0.6 * 25.6, rel=0.25)
    else:
        assert 25.6 * 0.9 < busiest < 25.6 * 1.2


def _crommelin(replicas: int, load: float) -> float:
    """Mean wait of M/D/c in service times: sum over i of e^(-ia) (tails of Poisson counts).

    Source: Crommelin 1932; as in Tijms 2003, A First Course in Stochastic Models, 9.6.
    """
    offered = replicas * load
    total = 0.0
    for i in range(1, 400):
        mean = i * offered
        at = math.exp(i * replicas * math.log(mean) - mean - math.lgamma(i * replicas + 1))
        tail, term, count = 0.0, at, i * replicas
        while term > 1e-17 * max(tail, 1e-300):
            tail += term
            count += 1
            term *= mean / count
        beyond = tail - at
        # sum_{j >= ic} p_j - (c / a) sum_{j > ic} p_j
        total += tail - beyond / load
    return total


def _twin(
    arrivals_s: list[float], service: ServiceTime, wishes: list[int], startup_s: float
) -> tuple[list[float], float]:
    """The rules, one eighth of a second after the other, with nothing clever."""
    replicas = [{"ready": 0.0, "asked": 0.0, "free": 0.0} for _ in range(5)]
    latency_s = [0.0] * len(arrivals_s)
    next_row, cost, step = 0, 0.0, 0
    while True:
        now_s = step / 8
        if now_s and now_s % TICK_S == 0:
            wanted = wishes[(round(now_s / TICK_S) - 1) % len(wishes)]
            while len(replicas) < wanted:
                replicas.append(
                    {"ready": now_s + startup_s, "asked": now_s, "free": now_s + startup_s}
                )
            while len(replicas) > wanted:
                cost += _let_go(replicas, now_s)
            if next_row == len(arrivals_s):
                break
        idle = [r for r in replicas if r["free"] <= now_s]
        for replica in sorted(idle, key=lambda r: (r["free"], r["ready"], r["asked"])):
            waiting = [row for row in arrivals_s[next_row:] if row <= now_s][: service.batch]
            if waiting:
                replica["free"] = now_s + service.fixed_s + service.row_s * len(waiting)
            for arrived_s in waiting:
                latency_s[next_row] = replica["free"] - arrived_s
                next_row += 1
        step += 1
    end_s = max(now_s, arrivals_s[-1])
    while replicas:
        cost += _let_go(replicas, end_s)
    return latency_s, cost


def _let_go(replicas: list[dict[str, float]], now_s: float) -> float:
    """Those still starting first, the last of them; else whichever is free first."""
    starting = [r for r in replicas if r["ready"] > now_s]
    if starting:
        gone = max(starting, key=lambda r: r["ready"])
        end_s = now_s
    else:
        gone = min(replicas, key=lambda r: (r["free"], r["ready"], r["asked"]))
        end_s = max(now_s, gone["free"])
    replicas.remove(gone)
    return end_s - gone["asked"]
