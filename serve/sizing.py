"""How many pictures make a batch: measured at start, because only the device knows."""

from __future__ import annotations

from collections.abc import Callable


def largest_batch(
    seconds_of: Callable[[int], float], *, target_s: float, most: int
) -> tuple[int, float]:
    """The largest batch that runs within the target, and the time of one picture in it.

    Batches of 1, 2, 4, ... are tried until one takes too long; between that and the last that did
    not, time is taken to grow evenly. On a CPU it does, where one picture keeps a thread busy; on a
    GPU larger batches cost little more, and all sizes are tried.

    Args:
        seconds_of: Runs a batch of that many pictures and says how long it took.
        most: Never more than this; and never less than one, however slow the device is.
    """
    size, seconds = 1, seconds_of(1)
    while size < most and seconds < target_s:
        larger = min(2 * size, most)
        larger_s = seconds_of(larger)
        if larger_s > target_s:
            more = int((larger - size) * (target_s - seconds) / (larger_s - seconds))
            seconds += (larger_s - seconds) * more / (larger - size)
            size += more
            break
        size, seconds = larger, larger_s
    return size, seconds / size
