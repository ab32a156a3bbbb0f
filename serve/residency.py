"""Whether what heads need is in memory: adapters and tails may be paged out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from serve.engine import LiveHead


class AdaptersTooLargeError(Exception):
    """A request needs more adapters at once than memory holds."""

    def __init__(self, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"The tasks asked need {needed_bytes} bytes of adapters at once; this service keeps "
            f"{budget_bytes} (adapter_memory_bytes). Ask fewer tasks in one request."
        )


@runtime_checkable
class Residency(Protocol):
    """Keeps what heads need in memory while rows of them run; called under the batcher's lock."""

    def pin(self, heads: Sequence[LiveHead]) -> bool:
        """Keep all of them until they are unpinned; False if some have to be brought in first.

        Must be quick. Once they are there, `Batcher.wake` lets the job try again.

        Raises:
            AdaptersTooLargeError: memory never holds all of them at once.
        """
        ...

    def unpin(self, heads: Sequence[LiveHead]) -> None:
        """No row of this job reads them any more. Must be quick."""
        ...

    def close(self) -> None:
        """Nothing needs any of it any more."""
        ...


class AllResident:
    """Every head is in memory all the time."""

    def pin(self, heads: Sequence[LiveHead]) -> bool:
        """Nothing to do."""
        del heads
        return True

    def unpin(self, heads: Sequence[LiveHead]) -> None:
        """Nothing to do."""
        del heads

    def close(self) -> None:
        """Nothing to do."""
