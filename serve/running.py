"""A trunk that answers in this process, and what goes by it: its batches, its adapters."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from export.bundle import Digest
from serve import memory
from serve.engine import Engine
from serve.residency import AllResident, Residency
from serve.sizing import largest_batch

logger = logging.getLogger(__name__)

BATCH_TRIALS = 5


@dataclass(frozen=True, eq=False)
class RunningTrunk:
    """A trunk as the batcher runs it.

    Args:
        max_pictures: What fits into a batch, in pictures through the trunk.
        picture_s: Time that one picture takes in a batch of that size.
        residency: Keeps what heads need in memory.
    """

    engine: Engine
    max_pictures: int
    picture_s: float = 0.0
    residency: Residency = field(default_factory=AllResident)

    @property
    def digest(self) -> Digest:
        """Of the trunk."""
        return self.engine.manifest.digest

    def close(self) -> None:
        """Let go of what only this trunk needs; nothing of it runs any more."""
        self.residency.close()
        memory.give_back()


def measured(engine: Engine, *, target_s: float, most: int) -> tuple[int, float]:
    """Pictures in a batch, and seconds for each, as measured on this device now."""
    size_px = engine.manifest.preprocessing.size_px

    def seconds_of(num_pictures: int) -> float:
        pictures = np.zeros((num_pictures, size_px, size_px, 3), np.uint8)
        engine.features(pictures)  # the first run of a size allocates
        seconds = []
        for _ in range(BATCH_TRIALS):
            began_s = time.perf_counter()
            engine.features(pictures)
            seconds.append(time.perf_counter() - began_s)
        return statistics.median(seconds)

    size, picture_s = largest_batch(seconds_of, target_s=target_s, most=most)
    logger.info(
        "batches of up to %d pictures at %.2f ms each, for a target of %.0f ms",
        size,
        1000 * picture_s,
        1000 * target_s,
    )
    return size, picture_s
