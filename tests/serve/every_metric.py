"""Every metric that `/metrics` can have, taken from the code that counts."""

from __future__ import annotations

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from serve.autoscale import Decision
from serve.conductor import Conductor
from serve.decisions import Decisions
from serve.metrics import Metrics, fleet_text
from serve.rollout_watch import RolloutWatch
from serve.store_calls import StoreCalls
from serve.swap_metrics import SwapMetrics


def metric_names() -> set[str]:
    """As they are scraped: counters with `_total`, histograms without `_bucket`."""
    return {f"{f.name}_total" if f.type == "counter" else f.name for f in _families()}


def metric_labels() -> dict[str, set[str]]:
    """Of every sample that there may be the names of its labels."""
    return {sample.name: set(sample.labels) for f in _families() for sample in f.samples}


def _families() -> list[Metric]:
    """A fleet that has counted everything once."""
    metrics, swaps, store = Metrics(), SwapMetrics(), StoreCalls()
    rollouts = RolloutWatch(Conductor.__new__(Conductor), webhook_url="")
    metrics.requests.labels("/tasks", 200).inc()
    metrics.errors.labels("picture").inc()
    metrics.count_rows("pets", 1)
    swaps.made([0.0, 1.0, 2.0, 3.0, 4.0])
    with store.timed("get"):
        pass
    rollouts._changes.labels("rollback").inc()
    decisions = Decisions()
    decisions.take(Decision(2, "rise", 1.0, 1.0, 2, 0, 1, 0.0, replica_rate=1.0, startup_s=1.0))
    reports = [metrics.report(["pets"]), swaps.report(), store.report(), rollouts.metrics()]
    reports += [decisions.metrics()]
    return list(text_string_to_metric_families(fleet_text(reports, {"pets": 1}, 1).decode()))
