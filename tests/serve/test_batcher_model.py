"""Whatever comes in whatever order: every job ends once, from one moment, and holds are kept.

The worker's thread is replaced by the test, which takes each batch from the real `_next_batch` and
lets anything happen while it runs; the clock is the test's too.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.batcher import Batcher
from serve.engine import Engine, LiveHead
from serve.jobs import (
    Answer,
    DeadlineError,
    FeaturesOnlyError,
    Job,
    OverloadedError,
    UndecidedError,
)
from serve.metrics import Metrics
from serve.running import RunningTrunk
from serve.work import Unit, Work, run_units
from tests.serve.stepped import live_head, scores_of, snapshot_of

TASKS = "abc"
ROW_COSTS = {"a": 0.0, "b": 0.6, "c": 0.3}
BATCH_COST = 3
MAX_QUEUED = 6
DECLARED = (DeadlineError, UndecidedError, FeaturesOnlyError, ZeroDivisionError)


class IdleError(Exception):
    """The worker would wait now."""


class Pages:
    """What is in memory, and which jobs use it."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.pinned: Counter[tuple[str, int]] = Counter()

    def pin(self, heads: Any) -> bool:
        """All or nothing."""
        if any(head.task in self.away for head in heads):
            return False
        self.pinned.update((head.task, head.version) for head in heads)
        return True

    def unpin(self, heads: Any) -> None:
        """What was pinned, once."""
        self.pinned.subtract((head.task, head.version) for head in heads)
        assert min(self.pinned.values(), default=0) >= 0

    def close(self) -> None:
        """Nothing to do."""


def head_of(task: str, version: int) -> LiveHead:
    """Task c cannot be asked by features alone."""
    return live_head(task, version, row_cost=ROW_COSTS[task], needs_picture=task == "c")


def no_thread(_: Batcher) -> None:
    """In place of the worker."""


class Ending(NamedTuple):
    """A job has ended: when, and which versions it may have been answered from then."""

    job: Job
    now_s: float
    moments: list[dict[str, int]]
    oldest: dict[str, int]


class AnyOrder:
    """Callers, swaps, a pager and a worker, in any order."""

    def __init__(self, engine: Engine, chance: np.random.Generator) -> None:
        self.engine, self.chance = engine, chance
        self.now_s = 0.0
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(monotonic=lambda: self.now_s)
        self.patch.setattr("serve.batcher.time", clock)
        self.patch.setattr("serve.jobs.time", clock)
        self.patch.setattr(Batcher, "_work", no_thread)
        self.patch.setattr(self.engine, "run", scores_of)
        self.patch.setattr(self.engine, "run_features", scores_of)
        self.pages = Pages()
        self.moments: list[dict[str, int]] = [
            dict.fromkeys(TASKS, 1)
        ]  # versions that were live together
        self.batcher = Batcher(
            RunningTrunk(self.engine, BATCH_COST, 0.1, self.pages),
            snapshot_of(*(head_of(task, 1) for task in TASKS)),
            Metrics(),
            max_queued=MAX_QUEUED,
        )
        self.patch.setattr(self.batcher._changed, "wait", self._would_wait)
        self.submitted: dict[Job, int] = {}  # and the moment when each came
        self.ended: set[Job] = set()
        self.endings: list[Ending] = []
        self.rows: dict[Work, Counter[tuple[int, int]]] = {}
        self.running: list[tuple[Work, Unit]] = []
        self.held = ""
        self.may_go_on: set[Job] = set()  # those that had started when the hold began
        self.is_open = False
        self.oldest: dict[str, int] = dict.fromkeys(
            TASKS, 1
        )  # versions below must not be said any more

    @staticmethod
    def _would_wait(_: float | None = None) -> None:
        raise IdleError

    def step(self) -> None:
        """Something happens that can happen now."""
        may_happen = {
            self.submit: 8,
            self.start_batch: 0 if self.running else 8,
            self.end_batch: 8 if self.running else 0,
            self.go_away: 1 if self.submitted else 0,
            self.let_time_pass: 1,
            self.page: 2,
            self.hold: 0 if self.held or not self.is_open else 3,
            self.flip: 3 if self.held else 0,
            self.release: 1 if self.held else 0,
            self.refuse: 1 if self.held else 0,
            self.shut: 1 if self.is_open else 0,
            self.catch_up: 0 if self.is_open else 2,
            self.open: 0 if self.is_open else 3,
        }
        weights = np.array(list(may_happen.values())) / sum(may_happen.values())
        list(may_happen)[self.chance.choice(len(weights), p=weights)]()
        self.endings_are_right()
        self.nothing_is_lost()

    def some_tasks(self, share: float = 0.5) -> str:
        """Some of all tasks, or none."""
        return "".join(task for task in TASKS if self.chance.random() < share)

    def submit(self) -> None:
        """Somebody asks."""
        tasks = self.some_tasks() or None
        num = int(self.chance.integers(1, 6))
        allowed_s = self.chance.choice([1.5, 4.0, 1e6])
        is_features = self.chance.random() < 0.2
        shape, kind = ((3,), np.float32) if is_features else ((2, 2, 3), np.uint8)
        inputs = [np.full(shape, number, kind) for number in range(num)]
        asked = None if tasks is None else tuple(tasks)
        job = Job(inputs, asked, self.now_s + allowed_s)  # pyrefly: ignore
        first = len(self.moments) - 1

        def end(_: Future[list[list[Answer]]]) -> None:
            # What is wrong is found later: a future swallows what its callbacks raise.
            self.endings.append(Ending(job, self.now_s, self.moments[first:], dict(self.oldest)))

        job.done.add_done_callback(end)
        try:
            self.batcher.submit(job)
        except (OverloadedError, UndecidedError):
            return
        self.submitted[job] = first

    def endings_are_right(self) -> None:
        """Each job ends once: with a declared error, or with all its answers from one moment."""
        endings, self.endings = self.endings, list[Ending]()
        for ending in endings:
            assert ending.job not in self.ended
            self.ended.add(ending.job)
            self.check(ending)

    def check(self, ending: Ending) -> None:
        """One of them."""
        job = ending.job
        if job.done.cancelled() or job.done.exception() is not None:
            assert job.done.cancelled() or isinstance(job.done.exception(), DECLARED)
            return
        assert ending.now_s < job.deadline_s
        answers = job.done.result()
        tasks = job.tasks or tuple(TASKS)
        said = [{a.live.task: a.live.version for a in row} for row in answers]
        together = [{t: moment[t] for t in tasks} for moment in ending.moments]
        assert said[0] in together
        assert said == [said[0]] * len(job.inputs)
        assert all(said[0][task] >= ending.oldest[task] for task in tasks)
        for number, row in enumerate(answers):
            assert [a.live.task for a in row] == list(tasks)
            assert [list(a.scores) for a in row] == [[said[0][t], number] for t in tasks]
        rows = [rows for work, rows in self.rows.items() if work.job is job][-1]
        assert rows == Counter((i, h) for i in range(len(job.inputs)) for h in range(len(tasks)))

    def start_batch(self) -> None:
        """The worker is free."""
        try:
            batch = self.batcher._next_batch()
        except IdleError:
            return
        assert isinstance(batch, list)  # there is no rollout, so nothing is compared
        self.running = batch
        assert self.is_open
        cost = sum(unit.cost for _, unit in self.running)
        assert cost <= BATCH_COST + 1e-9 or len(self.running) == 1
        for work, unit in self.running:
            assert work.job.deadline_s > self.now_s
            assert not set(work.job.tasks or TASKS) & set(self.held) or work.job in self.may_go_on
            assert all(self.pages.pinned[head.task, head.version] for head in work.heads)
            rows = self.rows.setdefault(work, Counter())
            rows.update((place, head) for place in unit.inputs for head in unit.heads)
            assert max(rows.values()) == 1

    def end_batch(self) -> None:
        """It ends well, or the device fails."""
        batch, self.running = self.running, list[tuple[Work, Unit]]()
        if self.chance.random() < 0.1:
            for work, _ in batch:
                work.fail(ZeroDivisionError())
        else:
            run_units(self.engine, batch)

    def go_away(self) -> None:
        """A caller."""
        list(self.submitted)[self.chance.integers(len(self.submitted))].done.cancel()

    def let_time_pass(self) -> None:
        """A second."""
        self.now_s += 1.0

    def page(self) -> None:
        """Other heads are in memory than before."""
        self.pages.away = set(self.some_tasks(0.3))
        self.batcher.wake()

    def hold(self) -> None:
        """A swap comes."""
        self.held = self.some_tasks() or "a"
        self.batcher.hold(frozenset(self.held))
        self.may_go_on = set(self.batcher._started)

    def flip(self) -> None:
        """The swap is made, if all is drained."""
        try:
            assert self.batcher.wait_drained(0.0)
        except IdleError:
            return
        assert not any(set(w.job.tasks or TASKS) & set(self.held) for w, _ in self.running)
        self._move(self.held)
        self.oldest.update(dict.fromkeys(self.held, len(self.moments)))
        self.held = ""

    def release(self) -> None:
        """The swap is undone."""
        self.held = ""
        self.batcher.release()

    def refuse(self) -> None:
        """Nobody knows."""
        self.batcher.refuse_held()
        assert not any(job.touches(frozenset(self.held)) for job in self.batcher._waiting)

    def shut(self) -> None:
        """The conductor does not know this replica."""
        self.is_open = False
        self.batcher.set_open(is_open=False)

    def catch_up(self) -> None:
        """What is live changes without a drain, which ends any hold."""
        tasks = self.some_tasks() or "b"
        self._move(tasks)
        self.held = ""
        if not self.running:
            self.oldest.update(dict.fromkeys(tasks, len(self.moments)))

    def open(self) -> None:
        """The replica is admitted."""
        self.is_open = True
        self.batcher.set_open(is_open=True)

    def _move(self, tasks: str) -> None:
        number = len(self.moments) + 1
        self.moments.append(self.moments[-1] | dict.fromkeys(tasks, number))
        heads = [head_of(task, number) for task in tasks]
        self.batcher.flip(self.batcher.snapshot.with_heads(number, heads))

    def nothing_is_lost(self) -> None:
        """A job that has not ended is waiting or started, and started ones alone are in memory."""
        waiting, started = set(self.batcher._waiting), set(self.batcher._started)
        assert not waiting & started
        assert self.batcher._absent <= waiting
        assert set(self.submitted) - self.ended <= waiting | started
        used = Counter(
            (head.task, head.version)
            for work in self.batcher._started.values()
            for head in work.heads
        )
        assert used == +self.pages.pinned

    def end(self) -> None:
        """Once everything is possible again, everybody has an answer."""
        self.batcher.release()
        self.held = ""
        self.pages.away.clear()
        self.batcher.wake()
        self.open()
        for _ in range(1000):
            if self.running:
                self.end_batch()
            self.start_batch()
            if not self.running:
                break
        self.endings_are_right()
        assert set(self.submitted) <= self.ended
        assert not self.batcher._waiting
        assert not self.batcher._started
        assert self.batcher._schedule.peek() is None
        assert not +self.pages.pinned


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_job_ends_once_from_one_moment(engine: Engine, seed: int) -> None:
    """Random callers, swaps, pages, failures and deadlines: 200 of them."""
    world = AnyOrder(engine, np.random.default_rng(seed))
    try:
        world.open()
        for _ in range(200):
            world.step()
        world.end()
    finally:
        world.patch.undo()
