"""The gate that compares a bundle with what is live on the task's held-out pictures."""

from __future__ import annotations

import math

from serve.contender import Contender
from serve.exam import Exam
from serve.graph_gate import GateError
from serve.tango import Paired, interval, is_worse, smallest_visible_drop


def check_accuracy(
    bundle: Contender, live: Contender, exam: Exam, *, task: str, margin: float
) -> str:
    """The bundle is not worse than the live one by more than the margin, chance aside.

    Raises:
        GateError: it is; or one of the two cannot be run, or there is no such exam.
        StoreError: the exam cannot be read.
    """
    mine, theirs = exam.right_answers([bundle, live])
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


def _blindness(paired: Paired, margin: float) -> str:
    """What so few pictures could not have shown."""
    drop = smallest_visible_drop(paired, margin=margin)
    seen = f"only a drop of {drop:.3f} or more" if drop is not None else "no drop at all"
    return (
        f"the sample is too small to tell a drop of {margin:g} from chance: with these pictures "
        f"{seen} would have shown"
    )
