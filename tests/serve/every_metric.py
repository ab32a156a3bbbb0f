"""Every metric that `/metrics` can have, taken from the code that makes them."""

from __future__ import annotations

from serve.conductor import Conductor
from serve.metrics import Metrics, Report, fleet_text
from serve.rollout_watch import RolloutWatch
from serve.store_calls import StoreCalls
from serve.swap_metrics import SwapMetrics


def metric_names() -> set[str]:
    """As they are scraped: counters with `_total`, histograms without `_bucket`."""
    reports: list[Report] = [
        Metrics().report([]),
        SwapMetrics().report(),
        StoreCalls().report(),
        RolloutWatch(Conductor.__new__(Conductor), webhook_url="").metrics(),
    ]
    lines = fleet_text(reports, {}, replicas=0).decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}
