"""What happened while something was learned: how long each phase took, and its curves."""

import time
from dataclasses import dataclass

from models.progress import Progress, ProgressCallback, unheard


@dataclass(frozen=True)
class Phase:
    """One stage of the progress, and the time that passed up to its last step."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Curve:
    """A value that was followed over the steps (epochs) of a stage.

    Args:
        first: Number of the first step; above 1 where a run went on after an interruption.
    """

    stage: str
    name: str
    first: int
    values: tuple[float, ...]


class Logbook:
    """A progress callback that remembers what it hears and passes it on.

    The time between two steps counts for the stage of the later one, since a step is told when it
    is done; so work that tells nothing counts for whatever is told next.
    """

    def __init__(self, heard: ProgressCallback = unheard) -> None:
        self._heard = heard
        self._last = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._values: dict[tuple[str, str, int], list[float]] = {}
        self._first: dict[str, int] = {}

    def __call__(self, step: Progress) -> None:
        """Note a step."""
        now = time.monotonic()
        self._seconds[step.stage] = self._seconds.get(step.stage, 0.0) + now - self._last
        self._last = now
        first = self._first.setdefault(step.stage, step.done)
        for name, value in step.values.items():
            self._values.setdefault((step.stage, name, first), []).append(value)
        self._heard(step)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Every stage, in the order in which they were first heard of."""
        return tuple(Phase(name, seconds) for name, seconds in self._seconds.items())

    @property
    def curves(self) -> tuple[Curve, ...]:
        """Every value that steps brought."""
        return tuple(Curve(*of, tuple(values)) for of, values in self._values.items())
