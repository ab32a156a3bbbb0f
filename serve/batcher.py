"""Requests wait here until a worker is free; batches form by themselves, without a timer.

Binding is late: a worker that becomes free takes what waits at that moment, so an idle service adds
no delay and a busy one batches. Each batch takes one snapshot of what is live under the same lock
under which swaps hold, drain and flip, so no answer can mix versions.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from serve.engine import Engine, HeadOutputError, LiveHead, Row, Snapshot
from serve.metrics import Metrics

logger = logging.getLogger(__name__)

CLOSE_S = 10.0


class UnknownTaskError(Exception):
    """A request asks for a task that is not live."""

    def __init__(self, task: str, known: Iterable[str]) -> None:
        closest = get_close_matches(task, list(known), n=3)
        hint = f" The closest names are: {', '.join(closest)}." if closest else ""
        super().__init__(f"There is no task {task!r}.{hint} GET /tasks lists what is live.")


class OverloadedError(Exception):
    """The queue is full; the request was refused at once."""


class UndecidedError(Exception):
    """A swap of this task is undecided and neither conductor nor store can be reached."""


class StoppingError(Exception):
    """This replica is about to go; another one answers."""

    def __init__(self) -> None:
        super().__init__("This replica is stopping; try again, and another one answers.")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version of a task says of one picture; `scores` is float32 [labels]."""

    live: LiveHead
    scores: NDArray[np.float32]


@dataclass(slots=True)
class Job:
    """One request: every picture is asked of every task.

    Args:
        pictures: Uint8 [height, width, 3] each, as the trunk takes them.
        tasks: Names, or None for all that are live.
        done: Answers as [picture][task], in the order asked.
    """

    pictures: Sequence[NDArray[np.uint8]]
    tasks: tuple[str, ...] | None
    done: Future[list[list[Answer]]] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)

    def touches(self, tasks: frozenset[str]) -> bool:
        """Whether the request asks any of these tasks."""
        return bool(tasks) and (self.tasks is None or not tasks.isdisjoint(self.tasks))


class Batcher:
    """The queue, its worker, and the pointers to what is live.

    Args:
        max_pictures: Largest batch that a worker takes.
        max_queued: Requests that may wait; one more is refused.
    """

    def __init__(
        self,
        engine: Engine,
        snapshot: Snapshot,
        metrics: Metrics,
        *,
        max_pictures: int,
        max_queued: int,
    ) -> None:
        self._engine, self._snapshot, self._metrics = engine, snapshot, metrics
        self._max_pictures, self._max_queued = max_pictures, max_queued
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._held: frozenset[str] = frozenset()
        self._is_undecided = False
        self._is_open = False  # until the conductor has admitted this replica, nothing starts
        self._is_closed = False
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @property
    def snapshot(self) -> Snapshot:
        """What is live here now."""
        return self._snapshot

    @property
    def is_alive(self) -> bool:
        """Whether the worker still takes batches."""
        return self._worker.is_alive()

    def submit(self, job: Job) -> Future[list[list[Answer]]]:
        """Queue a request.

        Raises:
            UnknownTaskError: no such task is live, nor about to be.
            OverloadedError: the queue is full.
            UndecidedError: see there.
            StoppingError: see there.
        """
        with self._changed:
            if self._is_closed:
                raise StoppingError
            self._refuse_unknown(job)
            if self._is_undecided and job.touches(self._held):
                raise UndecidedError("A swap of this task is undecided; try again shortly.")
            if len(self._waiting) >= self._max_queued:
                raise OverloadedError(
                    f"{len(self._waiting)} requests wait already; try again shortly."
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job.done

    def set_open(self, *, is_open: bool) -> None:
        """Start answering, once this replica has been admitted; or let everything wait."""
        with self._changed:
            self._is_open = is_open
            self._changed.notify_all()

    def hold(self, tasks: frozenset[str]) -> None:
        """Start no more rows of these tasks; other tasks go on, and what arrives waits."""
        with self._changed:
            self._held = tasks

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no row of a held task is in flight; False if that takes too long."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(job.touches(self._held) for job in self._running), timeout_s
            )

    def flip(self, snapshot: Snapshot) -> None:
        """Move the pointers and end the hold, in one step."""
        with self._changed:
            self._snapshot = snapshot
            self._end_hold()

    def release(self) -> None:
        """End the hold; what was live stays live."""
        with self._changed:
            self._end_hold()

    def refuse_held(self) -> None:
        """The hold has run out and nobody can say how it ended: refuse its rows until it does."""
        with self._changed:
            self._is_undecided = True
            refused = [job for job in self._waiting if job.touches(self._held)]
            self._waiting = deque(job for job in self._waiting if not job.touches(self._held))
        for job in refused:
            _fail(job, UndecidedError("A swap of this task is undecided; try again shortly."))

    def close(self) -> None:
        """Finish what may start, then stop the worker; what is held or not admitted is refused."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._worker.join(timeout=CLOSE_S)
        with self._changed:
            refused, self._waiting = self._waiting, deque()
        for job in refused:
            _fail(job, StoppingError())

    def _end_hold(self) -> None:
        self._held, self._is_undecided = frozenset(), False
        self._changed.notify_all()

    def _refuse_unknown(self, job: Job) -> None:
        # A held task may be about to get its first head: its rows wait for the outcome instead.
        heads = self._snapshot.heads
        for task in job.tasks or ():
            if task not in heads and task not in self._held:
                raise UnknownTaskError(task, heads)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._startable())
                jobs = self._take()
                snapshot = self._snapshot
                if not jobs and self._is_closed:
                    return
                self._running = jobs
            try:
                self._answer(jobs, snapshot)
            # Whatever goes wrong in one batch is its requests' answer, and the worker goes on.
            except Exception as error:
                logger.exception("a batch failed")
                for job in jobs:
                    _fail(job, error)
            finally:
                with self._changed:
                    self._running = []
                    self._changed.notify_all()

    def _startable(self) -> bool:
        return self._is_open and any(not job.touches(self._held) for job in self._waiting)

    def _take(self) -> list[Job]:
        """Take the requests that may start, oldest first, up to the size of a batch."""
        taken: list[Job] = []
        left: deque[Job] = deque()
        num_pictures = 0
        while self._is_open and self._waiting and (not taken or num_pictures < self._max_pictures):
            job = self._waiting.popleft()
            if job.touches(self._held):
                left.append(job)
            elif job.done.set_running_or_notify_cancel():  # else the caller has gone
                taken.append(job)
                num_pictures += len(job.pictures)
        self._waiting.extendleft(reversed(left))
        return taken

    def _answer(self, jobs: list[Job], snapshot: Snapshot) -> None:
        started_at = time.monotonic()
        batch = _Batch(snapshot.heads)
        for job in jobs:
            self._metrics.queue_seconds.observe(started_at - job.queued_at)
            batch.add(job)
        if not batch.rows:  # all tasks were asked for, and there are none
            batch.give([])
            return
        batch.give(self._engine.run(np.stack(batch.pictures), batch.rows))
        self._metrics.batch_pictures.observe(len(batch.pictures))
        self._metrics.run_seconds.observe(time.monotonic() - started_at)


class _Batch:
    """The rows of several requests, side by side for one run."""

    def __init__(self, heads: Mapping[str, LiveHead]) -> None:
        self._heads = heads
        self._jobs: list[tuple[Job, list[LiveHead]]] = []
        self.pictures: list[NDArray[np.uint8]] = []
        self.rows: list[Row] = []

    def add(self, job: Job) -> None:
        tasks = tuple(self._heads) if job.tasks is None else job.tasks
        if unknown := [task for task in tasks if task not in self._heads]:
            _fail(job, UnknownTaskError(unknown[0], self._heads))
            return
        live = [self._heads[task] for task in tasks]
        first = len(self.pictures)
        self.pictures.extend(job.pictures)
        self.rows.extend(
            Row(first + offset, head) for offset in range(len(job.pictures)) for head in live
        )
        self._jobs.append((job, live))

    def give(self, scores: Sequence[NDArray[np.float32] | HeadOutputError]) -> None:
        """Hand each request its answers, or the first error among its rows."""
        place = iter(scores)
        for job, live in self._jobs:
            mine = [[next(place) for _ in live] for _ in job.pictures]
            try:
                answers = [
                    [_answer(head, score) for head, score in zip(live, row, strict=True)]
                    for row in mine
                ]
            except HeadOutputError as error:
                _fail(job, error)
            else:
                job.done.set_result(answers)


def _answer(live: LiveHead, scores: NDArray[np.float32] | HeadOutputError) -> Answer:
    if isinstance(scores, HeadOutputError):
        raise scores
    return Answer(live, scores)


def _fail(job: Job, error: Exception) -> None:
    # The caller may go away at this very moment, or have its answer already.
    with contextlib.suppress(InvalidStateError):
        job.done.set_exception(error)
