"""How swaps went, as the conductor sees them: how long each phase took, and how they ended."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from serve.metrics import LATENCY_BUCKETS_S, Report, report_of


class SwapMetrics:
    """The counters of one conductor; a new one begins anew."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.phase_seconds = Histogram(
            "headstock_swap_phase_seconds",
            "How long the phases of swaps took that were made.",
            ["phase"],
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self.swaps = Counter(
            "headstock_swaps",
            "Swaps by how they ended: made, vetoed by a replica, undone, or overtaken.",
            ["outcome"],
            registry=self._registry,
        )

    def made(self, times_s: list[float]) -> None:
        """A swap was made.

        Args:
            times_s: When it began, and when each phase ended.
        """
        self.swaps.labels("made").inc()
        phases = zip(("stage", "hold", "commit", "flip"), times_s[:-1], times_s[1:], strict=True)
        for phase, began_s, ended_s in phases:
            self.phase_seconds.labels(phase).observe(ended_s - began_s)

    def report(self) -> Report:
        """All samples."""
        return report_of(self._registry)
