"""How often each model was asked and how long that took: counted in every replica, told as one.

A replica reports what changed since its last report, as totals since its start: a report that comes
twice, or never, falsifies nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from serve.protocol import ReplicaId

MAX_VERSIONS = 8  # of each model; those that answer are fewer
GONE_S = 600.0  # a replica reports every second


@dataclass(slots=True)
class Counts:
    """What was asked of one version of a model.

    Args:
        answered: Requests, and in `answered_ns` the time from their arrival to their answer.
        failed: Those without an answer.
        decoding_ns: Of the answered ones, the decoding of their pictures.
        running_ns: Of the answered ones, the batches that their rows were in.
        num_rows: Inputs of the answered ones; a row that was run twice was answered once.
        last_ms: When the last row was run, in milliseconds since 1970.
        runs: How many batches had so many rows of the model.
        runs_ns: The time that those took.
    """

    answered: int = 0
    answered_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    decoding_ns: int = 0
    running_ns: int = 0
    num_rows: int = 0
    last_ms: int = 0
    runs: dict[int, int] = field(default_factory=dict)
    runs_ns: dict[int, int] = field(default_factory=dict)

    @property
    def waiting_ns(self) -> int:
        """All the rest of the time of the answered ones."""
        return max(0, self.answered_ns - self.decoding_ns - self.running_ns)

    def plus(self, other: Counts) -> Counts:
        """Both together, in an object of its own."""
        return Counts(
            self.answered + other.answered,
            self.answered_ns + other.answered_ns,
            self.failed + other.failed,
            self.failed_ns + other.failed_ns,
            self.decoding_ns + other.decoding_ns,
            self.running_ns + other.running_ns,
            self.num_rows + other.num_rows,
            max(self.last_ms, other.last_ms),
            _added(self.runs, other.runs),
            _added(self.runs_ns, other.runs_ns),
        )


# Of each model the counts of each of its versions.
ModelCounts = Mapping[str, Mapping[int, Counts]]


class Statistics:
    """The counts of one replica, added to by its engine's thread and those that ask."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[int, Counts]] = {}
        self._changed: set[str] = set()
        self._lock = threading.Lock()

    def answered(
        self,
        models: Iterable[tuple[str, int]],
        total_s: float,
        *,
        num_rows: int,
        decoding_s: float,
        running_s: float,
    ) -> None:
        """A request of so many inputs was answered by each of these models and versions."""
        total_ns, decoding_ns, running_ns = map(_ns, (total_s, decoding_s, running_s))
        with self._lock:
            for model, version in models:
                counts = self._of(model, version)
                counts.answered += 1
                counts.answered_ns += total_ns
                counts.num_rows += num_rows
                counts.decoding_ns += decoding_ns
                counts.running_ns += running_ns

    def failed(self, models: Iterable[tuple[str, int]], total_s: float) -> None:
        """A request of these models and versions has no answer."""
        with self._lock:
            for model, version in models:
                counts = self._of(model, version)
                counts.failed += 1
                counts.failed_ns += _ns(total_s)

    def ran(self, rows: Mapping[tuple[str, int], int], seconds: float) -> None:
        """A batch had so many rows of these models and versions."""
        took_ns, now_ms = _ns(seconds), time.time_ns() // 1_000_000
        with self._lock:
            for (model, version), num in rows.items():
                counts = self._of(model, version)
                counts.last_ms = now_ms
                counts.runs[num] = counts.runs.get(num, 0) + 1
                counts.runs_ns[num] = counts.runs_ns.get(num, 0) + took_ns

    def report(self, *, everything: bool = False) -> ModelCounts:
        """Totals of the models that were asked since the last report, or of all."""
        with self._lock:
            names = self._counts.keys() if everything else self._changed
            report = {
                name: {version: _copied(c) for version, c in self._counts[name].items()}
                for name in names
            }
            self._changed = set()
        return report

    def _of(self, model: str, version: int) -> Counts:
        self._changed.add(model)
        versions = self._counts.setdefault(model, {})
        if version not in versions:
            versions[version] = Counts()
            if len(versions) > MAX_VERSIONS:
                del versions[min(versions)]
                return versions.get(version, Counts())
        return versions[version]


class FleetStatistics:
    """The counts of all replicas, those that are gone among them."""

    def __init__(self) -> None:
        self._counts: dict[ReplicaId, dict[str, Mapping[int, Counts]]] = {}
        self._heard_at_s: dict[ReplicaId, float] = {}
        self._gone: dict[str, Mapping[int, Counts]] = {}
        self._ended: set[ReplicaId] = set()

    def take(self, replica: ReplicaId, counts: ModelCounts, members: Collection[ReplicaId]) -> None:
        """Note what a replica has counted since it started.

        Args:
            members: Those that answer; others that are silent for long are gone.
        """
        if replica in self._ended:  # what it counted before would count twice
            return
        self._counts.setdefault(replica, {}).update(counts)
        self._heard_at_s[replica] = now_s = time.monotonic()
        for other in self._counts.keys() - set(members):
            if now_s > self._heard_at_s[other] + GONE_S:
                self._end(other)

    def _end(self, replica: ReplicaId) -> None:
        for model, versions in self._counts.pop(replica).items():
            self._gone[model] = _sum([self._gone.get(model, {}), versions])
        del self._heard_at_s[replica]
        self._ended.add(replica)

    def of(self, model: str | None) -> ModelCounts:
        """What the fleet counted of a model, or of every one that was ever asked."""
        names = set(self._gone).union(*self._counts.values()) if model is None else {model}
        return {name: self._total(name) for name in names}

    def _total(self, model: str) -> Mapping[int, Counts]:
        return _sum([self._gone.get(model, {}), *(c.get(model, {}) for c in self._counts.values())])


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _added(mine: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return {size: mine.get(size, 0) + other.get(size, 0) for size in mine.keys() | other.keys()}


def _copied(counts: Counts) -> Counts:
    return replace(counts, runs=dict(counts.runs), runs_ns=dict(counts.runs_ns))


def _sum(several: Iterable[Mapping[int, Counts]]) -> dict[int, Counts]:
    total: dict[int, Counts] = {}
    for versions in several:
        for version, counts in versions.items():
            total[version] = total.get(version, Counts()).plus(counts)
    newest = sorted(total)[-MAX_VERSIONS:]
    return {version: total[version] for version in newest}
