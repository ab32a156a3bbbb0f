"""What a replica tells whoever decides how many replicas there should be."""

from __future__ import annotations

import time

from serve.batcher import Batcher

# Fewer rows in half a second say little of what one costs: the loop has other things to do as well.
FEWEST_ROWS = 8
KEPT = 0.98  # of what was seen before, with each half second in which there was something to see


class Demand:
    """The work that comes to this replica, and how much of it the replica can do.

    A row here is a picture through the trunk; further tasks of the same picture count as what their
    heads cost beside it.
    """

    def __init__(self, batcher: Batcher, *, decode_threads: int) -> None:
        self._batcher, self._decode_threads = batcher, decode_threads
        self._loop, self._decoding = Mean(), Mean()
        self._arrived, self._loop_s = 0.0, 0.0
        self._decoded, self._decoded_s = 0.0, 0.0

    def stats(self) -> dict[str, float]:
        """Rows that ever arrived and that wait, and what one takes; read by `scaling.Scaling`.

        To be called every half second in the thread that answers HTTP. That may be what a replica
        is slowest at: the trunk of a small student runs for less time than it takes to read a
        request and to answer it.
        """
        self._look()
        admission = self._batcher.admission
        decode_s = self._decoding.value / self._decode_threads
        return {
            "arrived": admission.arrived,
            "waiting": admission.waiting,
            "row_s": max(admission.run_s, decode_s, self._loop.value),
            "batch": float(self._batcher.trunk.max_pictures),
        }

    def _look(self) -> None:
        admission, loop_s = self._batcher.admission, time.thread_time()
        rows = admission.arrived - self._arrived
        if rows >= FEWEST_ROWS:
            self._loop.see(loop_s - self._loop_s, rows)
        decoded, decoded_s = admission.decoded, admission.decoded_s
        # Unlike admission's pace this is the mean, however much pictures differ: of many small ones
        # and a few large ones, the large ones take the time.
        if decoded > self._decoded:
            self._decoding.see(decoded_s - self._decoded_s, decoded - self._decoded)
        self._arrived, self._loop_s = admission.arrived, loop_s
        self._decoded, self._decoded_s = decoded, decoded_s


class Mean:
    """Seconds of each of many, as seen lately."""

    def __init__(self) -> None:
        self._seconds, self._num = 0.0, 0.0

    @property
    def value(self) -> float:
        """0 before anything was seen."""
        return self._seconds / self._num if self._num else 0.0

    def see(self, seconds: float, num: float) -> None:
        """So many took so long together."""
        self._seconds = KEPT * self._seconds + seconds
        self._num = KEPT * self._num + num
