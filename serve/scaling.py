"""The policy as Ray Serve asks it: from what replicas report to how many there should be.

Ray's controller makes one `Scaling` and asks it ten times a second. What it remembers is lost with
the controller; the next one lets nothing go until it has seen as much as is kept.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.serve._private.common import ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingContext

from serve.autoscale import BIN_S, HOLD_S, STALE_S, Aim, Decision, Observed, ServiceTime, decide

# Where Ray's controller says that it starts or stops replicas; the reason goes beside it.
logger = logging.getLogger("ray.serve")

FIRST_START_S = 30.0  # until a start was seen
LONGEST_START_S = 600.0  # what takes longer waits for room, which says nothing of the next start
MOST_BINS = 10_000  # more than an hour, which is the most that is kept
FEWEST_TRIED = 32  # rows after which a replica knows what one takes
NOTHING_KNOWN = ServiceTime(fixed_s=0.0, row_s=1.0, batch=1)


class Scaling:
    """Ray Serve's class of policy; see `autoscale` for what it decides by.

    Args:
        deadline_s: From a row's arrival to its answer, at most.
        max_queued: Requests that wait in a replica, at most; what comes beyond it is refused.
        keep_s: How long capacity that was needed is kept; derived if it is not given.
        conductor: Name and namespace of the actor that is told of each decision.
    """

    def __init__(
        self, *, deadline_s: float, max_queued: int, keep_s: float | None, conductor: Sequence[str]
    ) -> None:
        self._deadline_s, self._max_queued, self._keep_s = deadline_s, max_queued, keep_s
        self._conductor_name = conductor
        self._conductor: Any = None
        self._arrivals = Arrivals()
        self._service = NOTHING_KNOWN
        self._rows_s: deque[tuple[float, float]] = deque()  # when, and what a row took
        self._starts = Starts()
        self._older: frozenset[ReplicaID] | None = None
        self._last_replicas, self._decided_s = 1, -math.inf

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be; Ray keeps to its own bounds beyond that."""
        now_s = time.monotonic()
        self._starts.see(ctx.target_num_replicas, ctx.current_num_replicas, now_s)
        if now_s - self._decided_s < BIN_S:
            return self._last_replicas, {}
        self._decided_s = now_s
        try:
            decision = self._decide(ctx, now_s)
        # An error here would end the round in which Ray looks after the replicas.
        except Exception:
            logger.exception("how many replicas there should be is not known; nothing changes")
            self._last_replicas = ctx.target_num_replicas
        else:
            self._last_replicas = decision.replicas
            if decision.replicas != decision.before:
                logger.info("headstock scaling %s", json.dumps(asdict(decision)))
            self._tell(decision)
        return self._last_replicas, {}

    def _decide(self, ctx: AutoscalingContext, now_s: float) -> Decision:
        if self._older is None:
            # What they answered before somebody looked is no news.
            self._older = frozenset(ctx.running_replicas)
        reports = ctx.raw_metrics or {}
        self._arrivals.hear(reports.get("arrived", {}), now_s, older=self._older)
        self._measure(reports, now_s)
        running = frozenset(ctx.running_replicas)
        arrived, age_s = self._arrivals.of(running, now_s)
        queued = sum(_newest(reports.get("waiting", {})).values()) + ctx.total_queued_requests
        observed = Observed(
            arrived,
            age_s=age_s,
            queued=math.ceil(queued),
            replicas=ctx.target_num_replicas,
            unheard=len(running - self._arrivals.heard),
        )
        return decide(observed, self._service, self._aim(ctx))

    def _aim(self, ctx: AutoscalingContext) -> Aim:
        startup_s = self._starts.seconds
        return Aim(
            # What waits longer is refused before.
            deadline_s=min(self._deadline_s, self._max_queued * self._service.row_s),
            startup_s=startup_s,
            # Ray's, which an upgrade scales while it moves load from one cluster to the next.
            min_replicas=ctx.capacity_adjusted_min_replicas,
            max_replicas=max(1, ctx.capacity_adjusted_max_replicas),
            hold_s=None if self._keep_s is None else max(self._keep_s, startup_s),
        )

    def _measure(
        self, reports: dict[str, dict[ReplicaID, list[TimeStampedValue]]], now_s: float
    ) -> None:
        """Take from the reports what a replica can do: half of them are slower, half faster."""
        arrived, rows_s = _newest(reports.get("arrived", {})), _newest(reports.get("row_s", {}))
        if not rows_s:
            return
        # One that has just started knows its trunk's time alone.
        tried = [seconds for name, seconds in rows_s.items() if arrived[name] >= FEWEST_TRIED]
        self._rows_s.append((now_s, statistics.median(tried or rows_s.values())))
        while self._rows_s[0][0] < now_s - (self._keep_s or HOLD_S):
            self._rows_s.popleft()
        batches = _newest(reports["batch"]).values()
        self._service = ServiceTime(
            # A replica measures full batches; of what is the same for every batch, the policy
            # needs no more than what a row of those has of it.
            fixed_s=0.0,
            # The slowest: as with demand, what is better for a moment lets no replica go.
            row_s=max(row_s for _, row_s in self._rows_s),
            batch=max(1, round(statistics.median(batches))),
        )

    def _tell(self, decision: Decision) -> None:
        """Show it in `/metrics` and `headstock watch`; scaling goes on where nobody listens."""
        try:
            if self._conductor is None:
                name, namespace = self._conductor_name
                self._conductor = ray.get_actor(name, namespace=namespace)
            self._conductor.scaled.remote(decision)
        except Exception as error:  # noqa: BLE001 (Ray has no common class for these)
            self._conductor = None
            logger.debug("nobody was told of a decision: %s", error)


class Arrivals:
    """Rows that arrived in the fleet, in bins, on the clock of the one who hears of them.

    Replicas count on clocks of their own. The newest point of a report is taken to be of the moment
    in which the report is first seen, at most a second later; so each row counts once, and no clock
    of another machine says when.
    """

    def __init__(self) -> None:
        self._bins: list[float] = []
        self._began_s: float | None = None
        self._counts: dict[ReplicaID, float] = {}
        self._newest: dict[ReplicaID, float] = {}  # as the replica's clock says
        self._heard_s: dict[ReplicaID, float] = {}

    @property
    def heard(self) -> frozenset[ReplicaID]:
        """Every replica that has reported."""
        return frozenset(self._heard_s)

    def hear(
        self,
        reports: dict[ReplicaID, list[TimeStampedValue]],
        now_s: float,
        *,
        older: frozenset[ReplicaID],
    ) -> None:
        """Add what is new in the reports: of each replica how many rows ever arrived, over time.

        Args:
            older: Replicas whose first count is no news.
        """
        for replica, points in reports.items():
            if not points or points[-1].timestamp == self._newest.get(replica):
                continue
            shift_s = now_s - points[-1].timestamp
            if self._began_s is None:
                self._began_s = points[0].timestamp + shift_s
            for point in points:
                if point.timestamp <= self._newest.get(replica, -math.inf):
                    continue
                first = point.value if replica in older else 0.0
                rows = point.value - self._counts.get(replica, first)
                self._add(rows, point.timestamp + shift_s)
                self._counts[replica] = point.value
            self._newest[replica] = points[-1].timestamp
            self._heard_s[replica] = now_s

    def of(self, running: Iterable[ReplicaID], now_s: float) -> tuple[NDArray[np.float64], float]:
        """Rows in each bin up to the last that all replicas have reported, and how old that is.

        Of a replica that has been silent for too long no more is waited for: what others count is
        seen, and that not all is.
        """
        if self._began_s is None:
            return np.zeros(0), 0.0
        last_s = min([now_s, *(self._heard_s[r] for r in running if r in self._heard_s)])
        num = int((max(last_s, now_s - STALE_S) - self._began_s) / BIN_S)
        self._bins += [0.0] * (num - len(self._bins))
        arrived = np.array(self._bins[: max(0, num)])
        self._forget(len(self._bins) - MOST_BINS)
        return arrived, now_s - last_s

    def _add(self, rows: float, at_s: float) -> None:
        assert self._began_s is not None
        place = max(0, int((at_s - self._began_s) / BIN_S))
        self._bins += [0.0] * (place + 1 - len(self._bins))
        self._bins[place] += rows

    def _forget(self, num: int) -> None:
        if num > 0 and self._began_s is not None:
            del self._bins[:num]
            self._began_s += num * BIN_S


class Starts:
    """How long it takes from asking for a replica until Ray calls it running."""

    def __init__(self) -> None:
        self.seconds = FIRST_START_S
        self._asked: list[tuple[int, float]] = []  # replicas asked for, and when; ascending

    def see(self, target: int, running: int, now_s: float) -> None:
        """Note what is asked for and what runs now."""
        self._asked = [(num, asked_s) for num, asked_s in self._asked if num <= target]
        for num, asked_s in self._asked:
            # Both at once: nobody waited for it, as where another policy had asked.
            if num <= running and 0 < now_s - asked_s < LONGEST_START_S:
                self.seconds = now_s - asked_s
        self._asked = [(num, asked_s) for num, asked_s in self._asked if num > running]
        if target > running and target > max((num for num, _ in self._asked), default=0):
            self._asked.append((target, now_s))


def _newest(series: dict[ReplicaID, list[TimeStampedValue]]) -> dict[ReplicaID, float]:
    return {replica: points[-1].value for replica, points in series.items() if points}
