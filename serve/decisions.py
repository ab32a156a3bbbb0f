"""What was decided about the number of replicas: the last of it, and what changed it lately."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Gauge

from serve.autoscale import Decision
from serve.metrics import Report, report_of

MOST_KEPT = 20


@dataclass(frozen=True)
class Made:
    """A decision, and when it was heard of (UTC, ISO 8601)."""

    at: str
    decision: Decision


@dataclass(frozen=True)
class ReplicaCount:
    """How many replicas there are, and why.

    Args:
        answering: Those that are admitted.
        last: The last decision; None where their number is fixed.
        changes: The last decisions that changed the number, the newest first.
    """

    answering: int
    last: Made | None
    changes: tuple[Made, ...]


class Decisions:
    """The decisions that the policy tells of."""

    def __init__(self) -> None:
        self._last: Made | None = None
        self._changes: deque[Made] = deque(maxlen=MOST_KEPT)
        self._registry = CollectorRegistry()
        self._wanted = Gauge(
            "headstock_replicas_wanted",
            "Replicas that there should be, by the rule that decided.",
            ["rule"],
            registry=self._registry,
        )

    def take(self, decision: Decision) -> None:
        """Note a decision."""
        self._last = Made(datetime.now(UTC).isoformat(), decision)
        if decision.replicas != decision.before:
            self._changes.appendleft(self._last)
        self._wanted.clear()  # one rule decides
        self._wanted.labels(decision.rule).set(decision.replicas)

    def count(self, answering: int) -> ReplicaCount:
        """What is known of the number of replicas."""
        return ReplicaCount(answering, self._last, tuple(self._changes))

    def metrics(self) -> Report:
        """What is wanted now; nothing where the number is fixed."""
        return report_of(self._registry)
