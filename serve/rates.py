"""How often a token may ask: a bucket for each in every replica, which knows of the whole fleet.

A replica takes from its bucket what it answers itself, and what the others have answered as soon
as it hears of that; a bucket may be in debt then, so that over time the fleet answers what was
allowed. Between two reports it is filled by this replica's own share of the last traffic, so that
a caller who asks too often is slowed down and not answered in bursts.

Of N replicas that hear of each other within L seconds, the fleet answers in any T seconds at most
rate T + burst + (N - 1) (burst + rate L) requests: the last to answer was not ahead of what it
knew, and of the others it did not know what they answered in L seconds, which each bounds by
itself. L is 2.5 s; more while a replica loads a bundle. Without a conductor each replica counts for
itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

BURST_S = 2.0  # a bucket holds what its rate allows in this time, about as long as news may take
HEAR_S = 0.25  # a share of less traffic than in this time would be chance
SILENT_S = 5.0  # whoever hears nothing for so long is alone

Spent = Mapping[str, int]  # requests answered since a process started, by token


@dataclass(slots=True)
class _Bucket:
    """Of one token.

    Args:
        share: Of the fleet's last traffic that came here.
        spent: Ever.
        filled: Since the last report.
    """

    rate_per_s: float
    level: float
    filled_at_s: float
    heard_at_s: float
    share: float = 1.0
    spent: int = 0
    spent_at_report: int = 0
    filled: float = 0.0

    @property
    def capacity(self) -> float:
        return max(1.0, BURST_S * self.rate_per_s)

    def fill(self, now_s: float) -> None:
        share = 1.0 if now_s - self.heard_at_s > SILENT_S else self.share
        gain = self.rate_per_s * share * (now_s - self.filled_at_s)
        self.level, self.filled = min(self.capacity, self.level + gain), self.filled + gain
        self.filled_at_s = now_s

    def hear(self, theirs: int, now_s: float) -> None:
        """As if it had been filled at its whole rate, and the others had taken from it."""
        self.fill(now_s)
        allowed = self.rate_per_s * (now_s - self.heard_at_s)
        self.level = min(self.capacity, self.level - self.filled + allowed - theirs)
        mine = self.spent - self.spent_at_report
        self.share = mine / (mine + theirs) if mine + theirs else 1.0
        self.spent_at_report, self.filled, self.heard_at_s = self.spent, 0.0, now_s


class Rates:
    """The buckets of one replica.

    Args:
        clock: Seconds, as `time.monotonic` counts them.
    """

    def __init__(self, replica: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._replica, self._clock = replica, clock
        self._buckets: dict[str, _Bucket] = {}
        self._heard: dict[str, Spent] = {}
        self._heard_at_s = clock()
        self._lock = threading.Lock()

    def take(self, token_id: str, rate_per_s: float) -> float:
        """Take one request; 0, or how many seconds to wait until there may be one."""
        with self._lock:
            now_s = self._clock()
            bucket = self._buckets.get(token_id)
            if bucket is None:
                capacity = max(1.0, BURST_S * rate_per_s)
                bucket = _Bucket(rate_per_s, capacity, now_s, now_s)
                self._buckets[token_id] = bucket
            bucket.fill(now_s)
            if bucket.level < 1:
                return (1 - bucket.level) / rate_per_s
            bucket.level -= 1
            bucket.spent += 1
            return 0.0

    def spent(self) -> Spent:
        """What this replica has answered since it started, for the others to hear."""
        with self._lock:
            return {token_id: bucket.spent for token_id, bucket in self._buckets.items()}

    def hear(self, fleet: Mapping[str, Spent]) -> None:
        """Take what others have answered.

        Args:
            fleet: What each replica last reported, by its name.
        """
        with self._lock:
            now_s = self._clock()
            if now_s - self._heard_at_s < HEAR_S:
                return
            others = {name: spent for name, spent in fleet.items() if name != self._replica}
            for token_id, bucket in self._buckets.items():
                bucket.hear(self._news_of(token_id, others), now_s)
            # Who is missing, as after a restart of the conductor, is remembered.
            self._heard |= others
            self._heard_at_s = now_s

    def _news_of(self, token_id: str, others: Mapping[str, Spent]) -> int:
        """What the others answered since they were last heard of; of a new one it is not known."""
        return sum(
            max(0, spent.get(token_id, 0) - self._heard[name].get(token_id, 0))
            for name, spent in others.items()
            if name in self._heard
        )
