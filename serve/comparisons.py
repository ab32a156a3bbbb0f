"""Pictures on which a candidate is compared with what is live, in the pauses between batches.

Both sides answer the picture alone, one after the other, so that labels, scores and times come in
pairs. Nobody waits for it, it touches no caller's batch, and it takes a small share of the engine's
time: what does not fit is passed over, so comparisons are a sample and memory is bounded.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.engine import Engine, LiveHead, Row
from serve.heads import HeadOutputError
from serve.rollout import LESS_CONFIDENT, Trial
from serve.work import Scores

logger = logging.getLogger(__name__)

MAX_WAITING = 16
BUSY_SHARE = 0.02  # of the engine's time, while requests wait
IDLE_SHARE = 0.2


@dataclass(frozen=True)
class Comparison:
    """A picture, uint8 [height, width, 3], and the version whose two sides answer it."""

    picture: NDArray[np.uint8]
    live: LiveHead
    max_slowdown: float

    @property
    def sides(self) -> tuple[LiveHead, LiveHead]:
        """What is live, and the candidate."""
        assert self.live.candidate is not None
        return self.live, self.live.candidate


class Comparisons:
    """What waits to be compared, and what comparing has shown since the replica started.

    Only the engine's worker calls it, but for `trials`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Comparison] = deque(maxlen=MAX_WAITING)
        self._trials: dict[str, tuple[int, Trial]] = {}
        self._num_run = 0
        self._last_s = 0.0  # how long the last one took
        self._ended_s = 0.0

    @property
    def trials(self) -> dict[str, tuple[int, Trial]]:
        """Of each task that had a rollout the version of the last one, and its counts."""
        return dict(self._trials)

    def offer(self, picture: NDArray[np.uint8], live: LiveHead, *, max_slowdown: float) -> None:
        """Compare on this picture when there is time; the oldest that waits makes room."""
        self._waiting.append(Comparison(picture, live, max_slowdown))

    def count(self, live: LiveHead, **counts: int) -> None:
        """Add to what was seen of a rollout; of a task's older ones nothing is kept."""
        version, trial = self._trials.get(live.task, (0, Trial()))
        if live.version > version:
            version, trial = live.version, Trial()
        if live.version == version:
            self._trials[live.task] = (version, trial.plus(**counts))

    def due_in_s(self, *, is_idle: bool) -> float | None:
        """How long to wait before the next may run; None if none waits."""
        if not self._waiting:
            return None
        pause_s = self._last_s / (IDLE_SHARE if is_idle else BUSY_SHARE)
        return max(0.0, self._ended_s + pause_s - time.monotonic())

    def change_trunk(self, engine: Engine) -> None:
        """Compare on another trunk from here on; what waits was of the one before."""
        self._engine = engine
        self._waiting.clear()

    def take(self) -> Comparison:
        """The next one."""
        return self._waiting.popleft()

    def run(self, comparison: Comparison) -> None:
        """Ask both sides, and count what they did."""
        live, candidate = sides = comparison.sides
        began_s = time.monotonic()
        # Whoever comes second finds the picture in the caches.
        order = sides if self._num_run % 2 else sides[::-1]
        self._num_run += 1
        answers = {side.bundle: self._timed(comparison.picture, side) for side in order}
        self._ended_s = time.monotonic()
        self._last_s = self._ended_s - began_s
        (scores, live_s), (found, candidate_s) = answers[live.bundle], answers[candidate.bundle]
        if scores is None:  # nothing to compare with
            return
        if found is None:
            self.count(live, compared=1, failed=1)
            return
        self.count(
            live,
            compared=1,
            disagreed=int(_labels(live, scores) != _labels(candidate, found)),
            slower=int(candidate_s > comparison.max_slowdown * live_s),
            less_confident=int(_is_less_confident(live, scores, candidate, found)),
        )

    def _timed(
        self, picture: NDArray[np.uint8], head: LiveHead
    ) -> tuple[NDArray[np.float32] | None, float]:
        """Scores of one side, None if it has none, and the seconds that they took."""
        began_s = time.perf_counter()
        answers: Sequence[Scores]
        try:
            answers = self._engine.run(picture[None], [Row(0, head)])
        # Whatever it raises, it is the side's failure and nobody else's.
        except Exception:
            logger.exception("comparing %s of task %s failed", head.bundle, head.task)
            return None, 0.0
        seconds = time.perf_counter() - began_s
        return (None if isinstance(answers[0], HeadOutputError) else answers[0]), seconds


def _labels(head: LiveHead, scores: NDArray[np.float32]) -> set[str]:
    return set(head.head.labels_given(scores))


def _is_less_confident(
    live: LiveHead, scores: NDArray[np.float32], candidate: LiveHead, found: NDArray[np.float32]
) -> bool:
    # Scores without a link are logits, of any scale.
    if "none" in {live.head.link, candidate.head.link}:
        return False
    return bool(found.max() < scores.max() - LESS_CONFIDENT)
