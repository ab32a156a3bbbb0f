"""How long-running functions say how far they are; they never print."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step of a stage is done.

    Args:
        stage: What is being done, as a caller would show it ("decode", "fine-tune").
        done: Steps done, from 1 to `total`.
        note: What this step brought ("validation 0.912"); may be empty.
    """

    stage: str
    done: int
    total: int
    note: str = ""


ProgressCallback = Callable[[Progress], None]


def unheard(_progress: Progress) -> None:
    """Listen to nothing: the default where nobody watches."""
