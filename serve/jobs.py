"""A request on its way to its answer, and the ways in which it may have none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.bundle import TrunkManifest
from serve.engine import LiveHead, Snapshot
from serve.settings import REQUEST_TIMEOUT_S
from serve.timeline import Timeline

Kind = Literal["", "pixels", "features"]
Inputs = Sequence[NDArray[np.uint8] | NDArray[np.float32]]


class UnknownTaskError(Exception):
    """A request asks for a task that is not live."""

    def __init__(self, task: str, known: Iterable[str]) -> None:
        self.task, self.known = task, tuple(known)
        closest = get_close_matches(task, self.known, n=3)
        hint = f" The closest names are: {', '.join(closest)}." if closest else ""
        super().__init__(f"There is no task {task!r}.{hint} GET /tasks lists what is live.")


class RetiredTaskError(Exception):
    """A request asks for a task that was retired.

    Args:
        since: UTC, ISO 8601.
    """

    def __init__(self, task: str, version: int, since: str) -> None:
        when = since[:19].replace("T", " ")
        super().__init__(
            f"Task {task!r} was retired by its version {version}, on {when} UTC. "
            "A push or a rollback makes it answer again."
        )


class FeaturesOnlyError(Exception):
    """A request brings features, and a task that it asks needs the picture."""

    def __init__(self, task: str) -> None:
        super().__init__(
            f"Task {task!r} has layers of its own before its features; send it the picture."
        )


class OtherTrunkError(Exception):
    """A request brings what was made for one trunk, or asks for it, and another is served by now.

    Args:
        version: What it asks for by number, if it does.
    """

    def __init__(self, version: LiveHead | None = None) -> None:
        what = f"version {version.version} of {version.task!r}" if version else "what it brings"
        super().__init__(
            f"The trunk was changed while this request waited, and {what} was made for the one "
            "before. Ask for the model's metadata again: it says what is taken and answers now."
        )


class OverloadedError(Exception):
    """More waits than can be answered in time; the request was refused at once.

    Args:
        retry_after_s: When to ask again, in whole seconds.
    """

    def __init__(self, reason: str, *, retry_after_s: int = 1) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class UndecidedError(Exception):
    """A swap of this task is undecided and neither conductor nor store can be reached."""


class StoppingError(Exception):
    """This replica is about to go; another one answers."""

    def __init__(self) -> None:
        super().__init__("This replica is stopping; try again, and another one answers.")


class DeadlineError(Exception):
    """The time that a request had is over; what was left of it is not run.

    Args:
        allowed_s: From the request's arrival to its deadline.
    """

    def __init__(self, allowed_s: float) -> None:
        super().__init__(
            f"No answer within {allowed_s:.3g} s; allow more time, or try again later."
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version of a task says of one picture; `scores` is float32 [labels]."""

    live: LiveHead
    scores: NDArray[np.float32]


def any_task(_: str) -> bool:
    """Every task may be asked."""
    return True


@dataclass(frozen=True, slots=True, eq=False)
class VersionHead:
    """The head of one version of a task, and the trunk beside which it was loaded."""

    live: LiveHead
    trunk: TrunkManifest


@dataclass(slots=True)
class TimeSpent:
    """Where the time of a request goes: decoding its pictures, running the batches of its rows."""

    asked_at: float = field(default_factory=time.monotonic)
    decoding_s: float = 0.0
    running_s: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """One request: every input is asked of every task.

    Args:
        inputs: All pictures, uint8 [height, width, 3] as the trunk takes them; or all features,
            float32 [num_features].
        tasks: Names, or None for all that are live and that the caller may ask.
        may_ask: Of a task that is not named, whether the caller may ask it.
        deadline_s: When its caller stops waiting, as `time.monotonic` tells it.
        done: Answers as [input][task], in the order asked.
        num_inputs: How many, said before they are decoded.
        cost: What all its units cost, in pictures.
        cost_taken: What its units that were taken cost, in pictures.
        caller: Who asks, as far as is known; one caller gets one side of a canary.
        is_stable: A candidate has failed it: what is live beside that answers instead.
        timeline: Where its steps are noted, if it is traced.
        encoded: The pictures as they came, if they can be decoded anew for another trunk.
        made_for: The trunk that the inputs were decoded or computed for; None: for any.
        kind: What its caller sent, "pixels" or "features"; "" for encoded pictures.
        version: What answers instead of what is live when it starts, where it asks one task for
            that; if the task is retired by then, nothing does.
    """

    inputs: Inputs
    tasks: tuple[str, ...] | None
    deadline_s: float = field(default_factory=lambda: time.monotonic() + REQUEST_TIMEOUT_S)
    done: Future[list[list[Answer]]] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)
    num_inputs: int = 0
    cost: float = 0.0
    cost_taken: float = 0.0
    caller: str = ""
    may_ask: Callable[[str], bool] = any_task
    is_stable: bool = False
    timeline: Timeline | None = None
    encoded: Sequence[bytes] = ()
    made_for: TrunkManifest | None = None
    kind: Kind = ""
    spent: TimeSpent = field(default_factory=TimeSpent)
    version: VersionHead | None = None

    def fits(self, trunk: TrunkManifest) -> bool:
        """Whether a trunk takes its inputs, and runs the version that it asks for.

        A trunk takes pictures of its size, and its own features.
        """
        # Its adapter is in the memory of the very trunk that it was loaded beside.
        if self.version is not None and self.version.trunk is not trunk:
            return False
        if self.made_for is None or self.made_for is trunk:
            return True
        if self.has_features:
            return self.made_for.digest == trunk.digest
        mine, theirs = self.made_for.preprocessing, trunk.preprocessing
        return (mine.size_px, mine.resize_px) == (theirs.size_px, theirs.resize_px)

    def tasks_of(self, live: Iterable[str]) -> Iterable[str]:
        """The tasks that are asked, of those that are live if none are named."""
        return filter(self.may_ask, live) if self.tasks is None else self.tasks

    def sides(self, heads: Sequence[LiveHead]) -> list[LiveHead]:
        """Of each task the side that answers this request."""
        if self.is_stable or not self.inputs or not any(head.share for head in heads):
            return list(heads)
        # One picture asked twice is one caller too, so it gets one answer.
        caller = self.caller.encode() or self.inputs[0].tobytes()
        sides = [head.side_for(caller) for head in heads]
        return [
            head if self.has_features and side.needs_picture else side
            for head, side in zip(heads, sides, strict=True)
        ]

    @property
    def has_features(self) -> bool:
        """Whether its inputs skip the trunk."""
        return bool(self.inputs) and self.inputs[0].ndim == 1

    def touches(self, tasks: frozenset[str]) -> bool:
        """Whether the request asks any of these tasks."""
        return bool(tasks) and (self.tasks is None or not tasks.isdisjoint(self.tasks))

    def answer(self, answers: list[list[Answer]]) -> None:
        """Hand over the answers, unless its time is over."""
        now_s = time.monotonic()
        if now_s >= self.deadline_s:
            self.fail_late()
            return
        with contextlib.suppress(InvalidStateError):  # the caller may have gone
            self.done.set_result(answers)

    def fail(self, error: Exception) -> None:
        """Say why there is no answer; one that is there already stays."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)

    def fail_late(self) -> None:
        """Its time is over."""
        self.fail(DeadlineError(self.deadline_s - self.queued_at))

    def fail_unfit(self) -> None:
        """The trunk that it was made for is served no longer."""
        self.fail(OtherTrunkError(self.version.live if self.version else None))


def model_name(task: str, kind: Kind) -> str:
    """The model that a task is to those who send this kind of input."""
    return f"{task}.{kind}" if kind else task


def no_head_of(task: str, snapshot: Snapshot) -> UnknownTaskError | RetiredTaskError:
    """Why a task has no head in a snapshot."""
    if retired := snapshot.retired.get(task):
        return RetiredTaskError(task, retired.version, retired.since)
    return UnknownTaskError(task, snapshot.heads)
