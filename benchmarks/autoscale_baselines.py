"""What the policy is compared with: Knative's, Ray Serve's, and a plan that knows the future."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.autoscale_world import BINS_A_TICK, TICK_S, Policy, Seen, World
from serve.autoscale import BIN_S, burst_rates

CLAIRVOYANT_WINDOW_S = 16.0
TINY = 1e-9  # rounding must not ask for a whole replica more


@dataclass
class Knative:
    """The KPA: a stable window, and a panic window of a tenth of it while load rises fast.

    Source: knative/serving pkg/autoscaler/scaling/autoscaler.go: panic from twice the ready pods
    on, no scaling down in panic, at most half of the pods leave at a tick, and scale-down-delay
    (the largest wish of a while) on top.

    Args:
        metric: "concurrency" (requests in the system) or "rps".
        target: Of that metric, for each replica.
    """

    metric: str
    target: float
    stable_s: float
    down_delay_s: float
    _panic_since_s: float | None = field(default=None, repr=False)
    _panic_replicas: int = field(default=0, repr=False)
    _wishes: list[tuple[float, int]] = field(default_factory=list, repr=False)

    def __call__(self, seen: Seen) -> int:
        """Replicas wanted at this tick."""
        panic_s = max(self.stable_s / 10, TICK_S)
        ready = max(seen.ready, 1)
        stable = math.ceil(self._mean(seen, self.stable_s) / self.target - TINY)
        panic = math.ceil(self._mean(seen, panic_s) / self.target - TINY)
        stable = max(stable, ready // 2)
        panic = max(panic, ready // 2)
        is_over = panic >= 2 * ready
        if is_over:
            self._panic_since_s = seen.now_s
        elif self._panic_since_s is not None and seen.now_s - self._panic_since_s > self.stable_s:
            self._panic_since_s, self._panic_replicas = None, 0
        wish = stable
        if self._panic_since_s is not None:
            self._panic_replicas = max(self._panic_replicas, panic, stable)
            wish = self._panic_replicas
        self._wishes.append((seen.now_s, wish))
        while self._wishes[0][0] < seen.now_s - self.down_delay_s:
            self._wishes.pop(0)
        return max(wish for _, wish in self._wishes)

    def _mean(self, seen: Seen, window_s: float) -> float:
        bins = round(window_s / BIN_S)
        if self.metric == "rps":
            return float(seen.arrived[-bins:].mean()) / BIN_S
        return float(seen.in_system[-bins:].mean())


@dataclass
class RayServe:
    """Ray Serve 2.60's own policy: ongoing requests over a look-back, and delays each way.

    Source: ray/serve/autoscaling_policy.py, `_core_replica_queue_length_policy` and
    `_apply_delay_logic`.
    """

    target_ongoing: float
    look_back_s: float
    up_delay_s: float
    down_delay_s: float
    _direction: int = field(default=0, repr=False)
    _since_s: float = field(default=0.0, repr=False)

    def __call__(self, seen: Seen) -> int:
        """Replicas wanted at this tick."""
        ongoing = float(seen.in_system[-round(self.look_back_s / BIN_S) :].mean())
        wish = max(math.ceil(ongoing / self.target_ongoing - TINY), 1)
        direction = (wish > seen.asked) - (wish < seen.asked)
        if direction != self._direction:
            self._direction, self._since_s = direction, seen.now_s
        delay_s = self.up_delay_s if direction > 0 else self.down_delay_s
        if seen.now_s - self._since_s < delay_s:
            return seen.asked
        self._direction = 0
        return wish


def clairvoyant_plans(arrivals_s: list[float], world: World) -> Iterator[Callable[[float], Policy]]:
    """Families of plans that know all arrivals, each by a factor on what they take for the need.

    The need is the mean rate around each moment, or the largest demand of any burst around it; a
    replica is asked for a start-up delay before it is needed, and kept where the gap to its next
    use is shorter than a start, which no plan for the same need can do cheaper.
    """
    bins = (int(arrivals_s[-1] / TICK_S) + 2) * BINS_A_TICK
    arrived = np.histogram(arrivals_s, np.arange(bins + 1) * BIN_S)[0].astype(np.float64)
    slack_s = world.deadline_s - world.service.full_s
    window = np.ones(round(CLAIRVOYANT_WINDOW_S / BIN_S))
    yield partial(_plan, np.convolve(arrived, window / len(window), "same") / BIN_S, world)
    later = burst_rates(arrived[::-1].copy(), slack_s)[::-1]
    yield partial(_plan, np.maximum(burst_rates(arrived, slack_s), later), world)


def _plan(rates: Float[np.ndarray, " bins"], world: World, factor: float) -> Policy:
    per_tick = rates.reshape(-1, BINS_A_TICK).max(axis=1)
    needed = np.ceil(factor * per_tick / world.service.rate).astype(int)
    ahead = int(world.startup_s / TICK_S) + 2
    padded = np.concatenate([needed, np.ones(ahead, dtype=int)])
    plan = sliding_window_view(padded, ahead).max(axis=1).tolist()

    def policy(seen: Seen) -> int:
        tick = round(seen.now_s / TICK_S)
        return plan[tick] if tick < len(needed) else world.max_replicas

    return policy


def knative_settings() -> list[Knative]:
    """24 settings by requests a second, and 12 by concurrency."""
    by_rate = product(["rps"], [0.8, 1.3, 1.8, 2.2, 2.5, 2.8], [30.0, 60.0], [0.0, 300.0])
    by_concurrency = product(["concurrency"], [0.3, 0.6, 1.0, 1.5, 2.2, 3.0], [60.0], [0.0, 300.0])
    return [Knative(*setting) for setting in (*by_rate, *by_concurrency)]


def ray_settings() -> list[RayServe]:
    """24 settings; Ray Serve's own are 2 ongoing requests, 30 s, 30 s and 600 s."""
    targets = [0.3, 0.6, 1.0, 1.5, 2.2, 3.0]
    return [RayServe(*setting) for setting in product(targets, [5.0, 30.0], [0.0], [30.0, 600.0])]
