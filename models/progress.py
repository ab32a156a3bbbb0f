"""How long-running functions say how far they are; they never print."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step of a stage is done.

    Args:
        stage: What is being done, as a caller would show it ("decode", "fine-tune").
        done: Steps done, from 1 to `total`.
        note: What this step brought ("validation 0.912"); may be empty.
        values: The same as numbers, name -> value, for curves over the steps of a stage.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


ProgressCallback = Callable[[Progress], None]


def unheard(_progress: Progress) -> None:
    """Listen to nothing: the default where nobody watches."""
