"""Which replicas are heard of, which are silent, which are gone, and what each has counted."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol, runtime_checkable

from serve.messages import Poll
from serve.metrics import Report, merge
from serve.protocol import ReplicaId
from serve.rates import Spent

logger = logging.getLogger(__name__)

SILENCE_S = 5.0  # a member that is alive but not heard of for so long has to be killed
START_S = 60.0  # one that has never been heard of may still be starting


@runtime_checkable
class Fleet(Protocol):
    """The replica processes, as the runtime sees them."""

    def living(self) -> frozenset[ReplicaId]:
        """Every replica process that is not confirmed dead."""
        ...

    def kill(self, replica: ReplicaId) -> None:
        """End a replica's process; `living` no longer names it once its death is confirmed."""
        ...


class RollCall:
    """What is known of the replicas beside their part in a swap."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._heard_at_s: dict[ReplicaId, float] = {}
        self._started_at_s = time.monotonic()
        self._metrics: dict[ReplicaId, Report] = {}
        self._gone_metrics: Report = []
        self._spent: dict[ReplicaId, Spent] = {}

    def hear(self, poll: Poll) -> None:
        """Note a replica's report."""
        self._heard_at_s[poll.replica] = time.monotonic()
        if poll.metrics is not None:
            self._metrics[poll.replica] = poll.metrics
        self._spent[poll.replica] = poll.spent

    def is_silent(self, replica: ReplicaId, *, busy_s: float) -> bool:
        """Whether a replica would have been heard of.

        Args:
            busy_s: How long it may say nothing because of what the swap makes it do.
        """
        now = time.monotonic()
        if replica not in self._heard_at_s:
            return now - self._started_at_s > START_S
        return now - self._heard_at_s[replica] > SILENCE_S + busy_s

    async def kill(self, replica: ReplicaId) -> None:
        """End a silent one."""
        logger.error("replica %s is silent and is killed", replica)
        await asyncio.to_thread(self._fleet.kill, replica)

    async def gone(self, members: frozenset[ReplicaId]) -> frozenset[ReplicaId]:
        """Those of the members that are confirmed dead; what they counted is kept."""
        gone = members - await asyncio.to_thread(self._fleet.living)
        for replica in gone:
            logger.warning("replica %s is gone", replica)
            self._spent.pop(replica, None)
            if replica in self._metrics:
                # What it had waiting is gone with it.
                counted = [one for one in self._metrics.pop(replica) if one.type != "gauge"]
                self._gone_metrics = merge([self._gone_metrics, counted])
        return gone

    def spent(self) -> dict[ReplicaId, Spent]:
        """What each replica has answered of tokens that have a rate."""
        return dict(self._spent)

    def metrics(self) -> list[Report]:
        """What all replicas have counted, those that are gone among them."""
        return [self._gone_metrics, *self._metrics.values()]
