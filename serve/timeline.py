"""What one request went through, and when; kept only for requests that are traced."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """Steps as (name, begin, end), by `time.monotonic`."""

    steps: list[tuple[str, float, float]] = field(default_factory=list)


CURRENT: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Note a step of the request that is answered now."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        if timeline := CURRENT.get():
            timeline.steps.append((name, began_s, time.monotonic()))
