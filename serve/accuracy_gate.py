"""The gate that compares a bundle with what is live on the task's held-out pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.contender import Contender
from serve.graph_gate import GateError
from serve.heldout import Heldout
from serve.tango import Paired, interval, is_worse, smallest_visible_drop

BATCH = 8  # the trunk's memory grows with its largest batch, and stays


def check_accuracy(
    bundle: Contender, live: Contender, sample: Heldout, *, task: str, margin: float
) -> str:
    """The bundle is not worse than the live one by more than the margin, chance aside.

    Raises:
        GateError: it is; or one of the two cannot be run.
    """
    mine, theirs = right_answers([bundle, live], sample)
    paired = Paired(len(mine), int((mine & ~theirs).sum()), int((~mine & theirs).sum()))
    low, high = interval(paired)
    found = (
        f"accuracy {mine.mean():.3f} against {theirs.mean():.3f} of what is live, on the task's "
        f"{paired.num} held-out pictures: a difference of {paired.difference:+.3f} "
        f"({low:+.3f} to {high:+.3f} with 90 % confidence), where the margin is {margin:g}"
    )
    if is_worse(paired, margin=margin):
        raise GateError(
            f"The head is worse than what is live: {found}. If that is meant, widen the margin: "
            f"headstock task set {task} margin={math.ceil(-100 * low) / 100:g}."
        )
    if low >= -margin:
        return found
    return f"{found}; {_blindness(paired, margin)}"


def right_answers(contenders: Sequence[Contender], sample: Heldout) -> list[NDArray[np.bool_]]:
    """Which pictures each contender gets right, bool [n]; what is not finite is wrong.

    Raises:
        GateError: one of them cannot be run.
    """
    right: list[list[NDArray[np.bool_]]] = [[] for _ in contenders]
    for start in range(0, len(sample.pictures), BATCH):
        pictures = sample.pictures[start : start + BATCH]
        labels = sample.labels[start : start + BATCH]
        # The trunk runs once for all that start from the same.
        given = {(one.engine, one.takes): one for one in contenders}
        outputs = {start: one.start(pictures) for start, one in given.items()}
        for place, one in enumerate(contenders):
            logits = _logits(one, outputs[one.engine, one.takes])
            is_finite = np.isfinite(logits).all(axis=1)
            right[place].append(is_finite & (logits.argmax(axis=1) == labels))
    return [np.concatenate(parts) for parts in right]


def _logits(contender: Contender, given: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        return contender.logits(given)
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:
        raise GateError(f"The graph cannot be run on held-out pictures: {error}") from error


def _blindness(paired: Paired, margin: float) -> str:
    """What so few pictures could not have shown."""
    drop = smallest_visible_drop(paired, margin=margin)
    seen = f"only a drop of {drop:.3f} or more" if drop is not None else "no drop at all"
    return (
        f"the sample is too small to tell a drop of {margin:g} from chance: with these pictures "
        f"{seen} would have shown"
    )
