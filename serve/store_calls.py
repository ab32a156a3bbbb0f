"""How long calls of a store take, and how many fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import AlreadyExistsError
from prometheus_client import CollectorRegistry, Histogram

from serve.metrics import LATENCY_BUCKETS_S, Report, report_of


class StoreCalls:
    """The counters of one store."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = Histogram(
            "headstock_store_call_seconds",
            "One call of the store, with all its tries.",
            ["call", "outcome"],
            buckets=LATENCY_BUCKETS_S,
            registry=self._registry,
        )

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        """Time a call; what is not there, or is there already, is an answer too."""
        began_s, outcome = time.monotonic(), "failed"
        try:
            yield
            outcome = "done"
        except FileNotFoundError:
            outcome = "absent"
            raise
        except AlreadyExistsError:
            outcome = "exists"
            raise
        finally:
            self._seconds.labels(call, outcome).observe(time.monotonic() - began_s)

    def report(self) -> Report:
        """All samples."""
        return report_of(self._registry)
