"""A deterministic simulator of a fleet that grows and shrinks: virtual time, one queue.

Requests wait in one queue, first come first served, and whichever replica is free first takes what
waits, up to a full batch, as the batcher does. A replica costs from the moment it is asked for; it
answers after its start-up delay, and one that is let go finishes its batch first.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from serve.autoscale import BIN_S, ServiceTime

TICK_S = 2.0  # between decisions: Knative's tick, and how often replicas here report
BINS_A_TICK = round(TICK_S / BIN_S)


@dataclass(frozen=True)
class World:
    """What is the same for every policy."""

    service: ServiceTime
    deadline_s: float
    startup_s: float
    min_replicas: int
    max_replicas: int
    initial_replicas: int


@dataclass(frozen=True)
class Seen:
    """What a policy may look at when it decides.

    Args:
        arrived: Requests that arrived in each bin up to now.
        all_arrived: The same with what is still to come; no policy may look at it.
        in_system: Requests that wait or run, at the end of each bin up to now.
        ready: Replicas that answer.
        asked: Replicas that answer or start.
    """

    now_s: float
    arrived: Float[np.ndarray, " bins"]
    all_arrived: Float[np.ndarray, " all_bins"]
    in_system: Float[np.ndarray, " bins"]
    queued: int
    ready: int
    asked: int


Policy = Callable[[Seen], int]


@dataclass
class Run:
    """What a simulation gave.

    Args:
        latency_s: Of every request, in order of arrival.
        replicas: Asked for after each tick.
    """

    latency_s: Float[np.ndarray, " requests"]
    replica_seconds: float
    replicas: list[int]


def simulate(arrivals_s: Sequence[float], policy: Policy, world: World) -> Run:
    """Let a policy run a fleet through these arrivals.

    Args:
        arrivals_s: When each request arrives, from 0, ascending.
    """
    fleet = _Fleet(list(arrivals_s), world)
    edges = np.arange(len(fleet.finished) + 1) * BIN_S
    arrived = np.histogram(arrivals_s, edges)[0].astype(np.float64)
    arrived_by = np.cumsum(arrived)
    in_system = np.zeros(len(arrived))
    replicas: list[int] = []
    finished_by = 0
    tick = 0
    while fleet.num_started < len(fleet.arrivals_s):
        tick += 1
        now_s, end = tick * TICK_S, tick * BINS_A_TICK
        if end > len(arrived):
            raise RuntimeError("The policy left requests unanswered.")
        fleet.run_until(now_s)
        begin = end - BINS_A_TICK
        finished = finished_by + np.cumsum(fleet.finished[begin:end])
        finished_by = int(finished[-1])
        in_system[begin:end] = arrived_by[begin:end] - finished
        seen = Seen(
            now_s=now_s,
            arrived=arrived[:end],
            all_arrived=arrived,
            in_system=in_system[:end],
            queued=int(arrived_by[end - 1]) - fleet.num_started,
            ready=fleet.num_ready(now_s),
            asked=len(fleet.replicas),
        )
        wanted = min(max(policy(seen), world.min_replicas), world.max_replicas)
        fleet.resize(wanted, now_s)
        replicas.append(wanted)
    fleet.resize(0, max(tick * TICK_S, fleet.arrivals_s[-1]))
    latency_s = np.repeat(fleet.finish_s, fleet.batches) - np.asarray(arrivals_s)
    return Run(latency_s, fleet.replica_seconds, replicas)


class _Fleet:
    """The replicas: a heap of (free from, ready from, asked for at)."""

    def __init__(self, arrivals_s: list[float], world: World) -> None:
        self.arrivals_s, self._world = arrivals_s, world
        self.replicas = [(0.0, 0.0, 0.0)] * world.initial_replicas
        self.num_started = 0
        self.finish_s: list[float] = []
        self.batches: list[int] = []
        self.replica_seconds = 0.0
        # Twice the time that the requests take, for those that are late at the end.
        ticks = int((2 * arrivals_s[-1] + 20 * world.startup_s + 60) / TICK_S) + 1
        self.finished = np.zeros(ticks * BINS_A_TICK, dtype=np.int64)

    def run_until(self, now_s: float) -> None:
        """Start every batch that can start before this time."""
        arrivals_s, replicas, service = self.arrivals_s, self.replicas, self._world.service
        fixed_s, row_s, largest = service.fixed_s, service.row_s, service.batch
        begin, num = self.num_started, len(arrivals_s)
        while begin < num and replicas:
            free_s, ready_s, asked_s = replicas[0]
            first_s = arrivals_s[begin]
            start_s = max(free_s, first_s)
            if start_s >= now_s:
                break
            end = bisect_right(arrivals_s, start_s, begin, min(begin + largest, num))
            finish_s = start_s + fixed_s + row_s * (end - begin)
            heapq.heapreplace(replicas, (finish_s, ready_s, asked_s))
            self.finish_s.append(finish_s)
            self.batches.append(end - begin)
            place = int(finish_s / BIN_S)
            if place < len(self.finished):
                self.finished[place] += end - begin
            begin = end
        self.num_started = begin

    def num_ready(self, now_s: float) -> int:
        """Replicas that answer."""
        return sum(ready_s <= now_s for _, ready_s, _ in self.replicas)

    def resize(self, wanted: int, now_s: float) -> None:
        """Ask for more, or let go: those still starting first, then whichever is free first."""
        for _ in range(wanted - len(self.replicas)):
            ready_s = now_s + self._world.startup_s
            heapq.heappush(self.replicas, (ready_s, ready_s, now_s))
        while len(self.replicas) > wanted:
            gone = max(
                (replica for replica in self.replicas if replica[1] > now_s),
                key=lambda replica: replica[1],
                default=self.replicas[0],
            )
            self.replicas.remove(gone)
            heapq.heapify(self.replicas)
            until_s = now_s if gone[1] > now_s else max(now_s, gone[0])
            self.replica_seconds += until_s - gone[2]
