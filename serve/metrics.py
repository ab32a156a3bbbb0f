"""What a replica counts, and how the counts of many become the fleet's.

A caller reaches one random replica, so `/metrics` is answered from the sum over all of them: every
replica reports its samples to the conductor, which keeps those of replicas that are gone, so that
no counter goes back when one of them stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serve.statistics import Statistics

# The tasks that have samples of their own: the first of the log, so that all replicas name the same
# ones and no task ever loses its name. There may be ten thousand.
MAX_TASKS = 100
OTHERS = "(others)"  # no task can be called so
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The counters of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.models = Statistics()
        self.requests = Counter(
            "headstock_requests",
            "Answered HTTP requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.errors = Counter(
            "headstock_errors",
            "Requests without success, by what was wrong.",
            ["kind"],
            registry=self.registry,
        )
        self.request_seconds = self._histogram(
            "headstock_request_seconds", "From the request's arrival to its answer."
        )
        self.decode_seconds = self._histogram(
            "headstock_decode_seconds", "Decoding one request's pictures."
        )
        self.queue_seconds = self._histogram(
            "headstock_queue_seconds", "From the queue's entry to the start of the batch."
        )
        self.run_seconds = self._histogram(
            "headstock_run_seconds", "One batch through the trunk and its heads."
        )
        self.trunk_seconds = self._histogram(
            "headstock_trunk_seconds", "One batch through the trunk, with its adapters."
        )
        self.head_seconds = self._histogram(
            "headstock_head_seconds", "The heads and tails of one batch."
        )
        self.batch_pictures = Histogram(
            "headstock_batch_pictures",
            "Pictures in a batch.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "headstock_batch_rows",
            "Rows in a batch: a picture has one for each task that is asked.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=self.registry,
        )
        self.waiting = Gauge(
            "headstock_waiting_requests",
            "Requests that were let in and of which nothing has run yet.",
            registry=self.registry,
        )
        self._rows: dict[str, int] = {}
        self.hold_seconds = self._histogram(
            "headstock_hold_seconds", "How long a swap held the rows of its task here."
        )

    def count_rows(self, task: str, num: int) -> None:
        """So many rows of a task were answered, by the only thread that answers."""
        self._rows[task] = self._rows.get(task, 0) + num

    def report(self, tasks: Iterable[str]) -> Report:
        """All samples, in a form that travels.

        Args:
            tasks: Every task that ever was, in the order of the log.
        """
        named = list(islice(tasks, MAX_TASKS))
        rows = dict(self._rows)
        counts = {task: rows.pop(task) for task in named if task in rows}
        counts |= {OTHERS: sum(rows.values())} if rows else {}
        family = Family("headstock_task_rows", "Rows answered, by task.", "counter", [])
        for task, num in counts.items():
            family.samples.append(("headstock_task_rows_total", (("task", task),), float(num)))
        return [*report_of(self.registry), family]

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(name, documentation, buckets=LATENCY_BUCKETS_S, registry=self.registry)


@dataclass(frozen=True)
class Family:
    """One metric with its samples: (name, labels, value)."""

    name: str
    documentation: str
    type: str
    samples: list[tuple[str, tuple[tuple[str, str], ...], float]]


Report = list[Family]


def report_of(registry: CollectorRegistry) -> Report:
    """All samples of a registry."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(s.name, tuple(sorted(s.labels.items())), s.value) for s in metric.samples],
        )
        for metric in registry.collect()
    ]


def fleet_text(reports: Iterable[Report], live_versions: Mapping[str, int], replicas: int) -> bytes:
    """The Prometheus text of the whole fleet.

    Args:
        reports: The last report of every replica that ever was.
        live_versions: Task -> its live version, in the order of the log.
        replicas: Replicas that answer now.
    """
    registry = CollectorRegistry()
    registry.register(_Fleet(merge(reports)))
    versions = Gauge(
        "headstock_live_version",
        "The version that each of the first tasks answers with.",
        ["task"],
        registry=registry,
    )
    for task, version in islice(live_versions.items(), MAX_TASKS):
        versions.labels(task).set(version)
    tasks = Gauge("headstock_live_tasks", "Tasks that answer.", registry=registry)
    tasks.set(len(live_versions))
    Gauge("headstock_replicas", "Replicas that answer.", registry=registry).set(replicas)
    return generate_latest(registry)


def merge(reports: Iterable[Report]) -> Report:
    """Several reports as one: samples of the same name and labels add up."""
    families: dict[str, Family] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in (family for report in reports for family in report):
        families[family.name] = family
        mine = sums.setdefault(family.name, {})
        for name, labels, value in family.samples:
            # When a counter was made is each process's own affair.
            if not name.endswith("_created"):
                mine[name, labels] = mine.get((name, labels), 0.0) + value
    return [
        replace(
            family,
            samples=[(sample, labels, value) for (sample, labels), value in sums[name].items()],
        )
        for name, family in families.items()
    ]


class _Fleet(Collector):
    """Merged samples, as the Prometheus client wants to collect them."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        for family in self._report:
            metric = Metric(family.name, family.documentation, family.type)
            for name, labels, value in family.samples:
                metric.add_sample(name, dict(labels), value)
            yield metric
