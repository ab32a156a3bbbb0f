"""Requests wait here until a worker is free; batches form by themselves, without a timer.

Binding is late: a worker that becomes free takes what waits at that moment, so an idle service adds
no delay and a busy one batches. A job starts with one snapshot of what is live, under the same lock
under which swaps hold, drain and flip, and keeps it over all its batches, so no answer can mix
versions. In which order jobs run is `schedule.py`'s affair, how they are cut and run `work.py`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from serve.admission import Admission
from serve.comparisons import Comparison, Comparisons
from serve.engine import Snapshot
from serve.jobs import (
    Answer,
    FeaturesOnlyError,
    Job,
    StoppingError,
    UndecidedError,
    model_name,
    no_head_of,
)
from serve.metrics import Metrics
from serve.residency import AdaptersTooLargeError
from serve.running import RunningTrunk
from serve.schedule import Schedule
from serve.work import FEATURES_COST, Unit, Work, run_units

logger = logging.getLogger(__name__)

CLOSE_S = 10.0


def _cannot_decode(job: Job) -> None:
    job.fail_unfit()


class Batcher:
    """The queue, its worker, and the pointers to what is live.

    Args:
        max_queued: Requests that may wait, for their decoding too; one more is refused.
        decode_threads: Pictures that are decoded at once.
        decode_anew: Asked, under the lock, to make the inputs of a waiting job fit the trunk, and
            then to `resume` it.
    """

    def __init__(
        self,
        trunk: RunningTrunk,
        snapshot: Snapshot,
        metrics: Metrics,
        *,
        max_queued: int,
        decode_threads: int = 1,
        decode_anew: Callable[[Job], None] = _cannot_decode,
    ) -> None:
        # What is served, and what the worker runs: the same but for a moment of a change.
        self._trunk = self._running = trunk
        self._snapshot, self._metrics = snapshot, metrics
        self._max_queued, self._decode_anew = max_queued, decode_anew
        self._schedule = Schedule(self._weight_of, picture_s=trunk.picture_s)
        self.admission = Admission(
            self._weight_of,
            max_waiting=max_queued,
            batch_cost=float(trunk.max_pictures),
            picture_s=trunk.picture_s,
            decode_threads=decode_threads,
        )
        self.comparisons = Comparisons(trunk.engine)
        metrics.waiting.set_function(lambda: self.admission.num_waiting)
        self._changed = threading.Condition()
        # Every job is in one of the two from its arrival to its end; dicts, as sets with an order.
        self._waiting: dict[Job, None] = {}
        self._started: dict[Job, Work] = {}
        self._absent: set[Job] = set()  # those that wait for what is not in memory
        self._unfit: set[Job] = set()  # those that wait to be decoded for another trunk
        self._held: frozenset[str] = frozenset()
        self._is_undecided = False
        self._is_open = False  # until the conductor has admitted this replica, nothing starts
        self._is_closed = False
        self._must_start_anew = False
        self._free_since_s = 0.0  # the worker
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    @property
    def snapshot(self) -> Snapshot:
        """What is live here now."""
        return self._snapshot

    @property
    def trunk(self) -> RunningTrunk:
        """What is served here now."""
        return self._trunk

    @property
    def served(self) -> tuple[RunningTrunk, Snapshot]:
        """What is served and what is live, of one moment."""
        with self._changed:
            return self._trunk, self._snapshot

    @property
    def is_alive(self) -> bool:
        """Whether the worker still takes batches."""
        return self._worker.is_alive()

    def expect(self, job: Job, num_inputs: int) -> None:
        """Let a request in whose pictures are still to be decoded; `submit` queues it then.

        Raises:
            OverloadedError: too much waits for it to be answered in time.
        """
        heads = self._snapshot.heads
        asked = [job.version.live] if job.version else map(heads.get, job.tasks_of(heads))
        a_row = sum(head.row_cost for head in asked if head)
        an_input = FEATURES_COST if job.has_features else 1.0
        self.admission.admit(job, num_inputs=num_inputs, cost=num_inputs * (an_input + a_row))

    def submit(self, job: Job) -> Future[list[list[Answer]]]:
        """Queue a request.

        Raises:
            UnknownTaskError: no such task is live, nor about to be.
            RetiredTaskError: it was, and is retired.
            OtherTrunkError: its inputs were made for another trunk, and cannot be made anew.
            OverloadedError: see `expect`, which is not asked twice.
            UndecidedError: see there.
            StoppingError: see there.
        """
        with self._changed:
            if self._is_closed:
                raise StoppingError
            self._refuse_unknown(job)
            is_held = job.touches(self._held)
            if self._is_undecided and is_held:
                raise UndecidedError("A swap of this task is undecided; try again shortly.")
            if job not in self.admission:
                self.expect(job, len(job.inputs))
            self._forget_gone()
            self._wait(job)
            self._changed.notify_all()
        return job.done

    def resume(self, job: Job) -> None:
        """A job that waited to be decoded anew may go on."""
        with self._changed:
            self._unfit.discard(job)
            if job in self._waiting:
                self._wait(job)
            self._changed.notify_all()

    def set_open(self, *, is_open: bool) -> None:
        """Start answering, once this replica has been admitted; or let everything wait.

        What is live may change before it is opened again, without a drain: jobs that are not
        finished then start anew.
        """
        with self._changed:
            self._is_open = is_open
            self._must_start_anew |= not is_open
            self._changed.notify_all()

    def hold(self, tasks: frozenset[str]) -> None:
        """Start no more jobs of these tasks; those that have started end before anything else.

        Other tasks go on, and what arrives waits.
        """
        with self._changed:
            self._held = tasks
            self._queue_all()

    def wait_drained(self, timeout_s: float) -> bool:
        """Wait until no row of a held task is in flight; False if that takes too long."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(job.touches(self._held) for job in self._started), timeout_s
            )

    def flip(self, snapshot: Snapshot, trunk: RunningTrunk | None = None) -> None:
        """Move the pointers and end the hold, in one step.

        Args:
            trunk: What takes the place of the trunk that is served, with all its heads. What waits
                and does not fit it is decoded anew; the other is closed after its last batch.
        """
        with self._changed:
            self._snapshot = snapshot
            if trunk is not None:
                self._trunk = trunk
                self._must_start_anew = True
            self._absent.clear()  # the new heads may be in memory
            self._end_hold()

    def release(self) -> None:
        """End the hold; what was live stays live."""
        with self._changed:
            self._end_hold()

    def wake(self) -> None:
        """What heads need was brought into memory: try the jobs again that waited for it.

        The caller holds no lock that `Residency.pin` waits for.
        """
        with self._changed:
            self._absent.clear()
            self._queue_all()

    def refuse_held(self) -> None:
        """The hold has run out and nobody can say how it ended: refuse its rows until it does."""
        with self._changed:
            self._is_undecided = True
            refused = [job for job in self._waiting if job.touches(self._held)]
            for job in refused:
                self._forget(job)
        for job in refused:
            job.fail(UndecidedError("A swap of this task is undecided; try again shortly."))

    def close(self) -> None:
        """Finish what may start, then stop the worker; what is held or not admitted is refused."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._worker.join(timeout=CLOSE_S)
        with self._changed:
            refused = [*self._waiting, *self._started]
            self._waiting.clear()
        for job in refused:
            job.fail(StoppingError())

    def _end_hold(self) -> None:
        self._held, self._is_undecided = frozenset(), False
        self._queue_all()

    def _queue_all(self) -> None:
        """Queue anew whatever may run, because what may has changed."""
        self._schedule.clear()
        for job, work in self._started.items():
            if work.units:
                self._schedule.add(job, is_first=job.touches(self._held))
        for job in self._waiting:
            if not (job in self._absent or job in self._unfit or job.touches(self._held)):
                self._schedule.add(job)
        self._changed.notify_all()

    def _wait(self, job: Job) -> None:
        """Let a job wait for its turn, or for inputs that the trunk takes."""
        self._waiting[job] = None
        if not job.fits(self._trunk.engine.manifest):
            self._unfit.add(job)
            self._decode_anew(job)
            if job.done.done():  # it cannot be
                self._forget(job)
        elif not job.touches(self._held):
            self._schedule.add(job)

    def _refuse_unknown(self, job: Job) -> None:
        # A held task may be about to get its first head: its rows wait for the outcome instead.
        for task in job.tasks or ():
            if task not in self._snapshot.heads and task not in self._held:
                raise no_head_of(task, self._snapshot)

    def _forget_gone(self) -> None:
        """Let go of the pictures of callers that have gone, before they are too many."""
        if len(self._waiting) < self._max_queued:
            return
        gone = [job for job in self._waiting if job.done.done()]
        for job in gone:
            self._forget(job)
        if gone:
            self._queue_all()

    def _forget(self, job: Job) -> None:
        # It may still be in the schedule, and is passed over there.
        del self._waiting[job]
        self._absent.discard(job)
        self._unfit.discard(job)

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if isinstance(batch, Comparison):
                self.comparisons.run(batch)
                with self._changed:
                    self._running.residency.unpin(batch.sides)
            else:
                self._run(batch)

    def _run(self, batch: list[tuple[Work, Unit]]) -> None:
        started_at = time.monotonic()
        try:
            ran = run_units(self._running.engine, batch)
        # Whatever goes wrong in one batch is its requests' answer, and the worker goes on.
        except Exception as error:
            logger.exception("a batch failed")
            # Without the candidates first: a rollout costs nobody an answer.
            has_candidates = any(work.candidates for work, _ in batch)
            for work, _ in batch:
                if has_candidates:
                    work.repeat(work.candidates)
                else:
                    work.fail(error)
        else:
            self._metrics.batch_pictures.observe(ran.num_pictures)
            self._metrics.batch_rows.observe(ran.num_rows)
            self._metrics.trunk_seconds.observe(ran.trunk_s)
            self._metrics.head_seconds.observe(ran.head_s)
            for work, unit in batch:
                for place in unit.heads:
                    self._metrics.count_rows(work.heads[place].task, len(unit.inputs))
            seconds = time.monotonic() - started_at
            self._metrics.run_seconds.observe(seconds)
            self._metrics.models.ran(_rows_of(batch), seconds)
            cost = sum(unit.cost for _, unit in batch)
            self.admission.see_run(cost, time.monotonic() - self._free_since_s)

    def _next_batch(self) -> list[tuple[Work, Unit]] | Comparison | None:
        """Wait for something to run; None if the batcher is closed. No batch runs meanwhile."""
        with self._changed:
            self._free_since_s = time.monotonic()
            while True:
                self._end_jobs()
                if comparison := self._choose_comparison(is_idle=False):
                    return comparison
                if self._is_open and (batch := self._choose()):
                    return batch
                if self._is_closed:
                    return None
                if comparison := self._choose_comparison(is_idle=True):
                    return comparison
                self._changed.wait(self._time_to_wake_s())
                self._free_since_s = time.monotonic()

    def _end_jobs(self) -> None:
        """Let go of the jobs that are over, those that are late among them."""
        now_s = time.monotonic()
        late = [job for job in (*self._waiting, *self._started) if job.deadline_s <= now_s]
        for job in late:
            job.fail_late()
            if job in self._waiting:
                self._forget(job)
        for job, work in list(self._started.items()):
            if job.done.done():
                self._see(work)
                self._end(job)
            elif work.must_repeat:
                self._see(work)
                self._end(job)
                self._wait_again(job)
        if self._must_start_anew:
            self._must_start_anew = False
            started = list(self._started)
            for job in started:
                self._end(job)
            self._change_trunk()
            for job in started:
                self._wait_again(job)
            self._queue_all()

    def _change_trunk(self) -> None:
        """Run what is served from here on; no batch is under way, and no job has started."""
        if self._running is self._trunk:
            return
        old, self._running = self._running, self._trunk
        new = self._running
        self._schedule.picture_s = new.picture_s
        self.admission.change_trunk(batch_cost=float(new.max_pictures), picture_s=new.picture_s)
        self.comparisons.change_trunk(new.engine)
        for job in list(self._waiting):
            if job not in self._unfit and not job.fits(new.engine.manifest):
                self._wait(job)
        # What it waits for may wait for this lock.
        threading.Thread(target=old.close, name="closing", daemon=True).start()

    def _wait_again(self, job: Job) -> None:
        job.cost_taken = 0.0
        self._wait(job)

    def _see(self, work: Work) -> None:
        """Note what a job that has ended says of the candidates of its tasks."""
        # What a caller makes up as features may fail any head.
        for live in [] if work.job.has_features else work.blamed:
            self.comparisons.count(live, served=1, failed=1)
        if work.must_repeat or work.job.done.cancelled() or work.job.done.exception():
            return
        for place in work.candidates:
            self.comparisons.count(work.live[place], served=len(work.job.inputs))
        for live in work.live:
            if live.candidate is not None and not work.job.has_features:
                slowdown = self._snapshot.settings_of(live.task).max_slowdown
                picture = np.asarray(work.job.inputs[0], np.uint8)
                self.comparisons.offer(picture, live, max_slowdown=slowdown)

    def _choose_comparison(self, *, is_idle: bool) -> Comparison | None:
        """One that may run now, with all that it needs kept in memory."""
        due_s = self.comparisons.due_in_s(is_idle=is_idle)
        if due_s is None or due_s > 0 or not self._is_open:
            return None
        comparison = self.comparisons.take()
        try:
            return comparison if self._running.residency.pin(comparison.sides) else None
        except AdaptersTooLargeError:
            return None

    def _end(self, job: Job) -> None:
        self._running.residency.unpin(self._started.pop(job).heads)
        self._changed.notify_all()

    def _choose(self) -> list[tuple[Work, Unit]]:
        """Take units up to the cost of a batch, starting jobs on the way."""
        batch: list[tuple[Work, Unit]] = []
        cost = 0.0
        batch_cost = float(self._running.max_pictures)
        self._schedule.begin(batch_cost)
        while cost < batch_cost and (job := self._schedule.peek()) is not None:
            work = self._started.get(job) or self._prepare(job)
            if work is None:
                self._schedule.drop()
                continue
            unit = work.units[0]
            if batch and cost + unit.cost > batch_cost:
                break
            if job not in self._started and not self._start(work):
                self._schedule.drop()
                continue
            work.units.popleft()
            self._schedule.take(unit.cost, has_more=bool(work.units))
            batch.append((work, unit))
            cost += unit.cost
        return batch

    def _prepare(self, job: Job) -> Work | None:
        """A waiting job as units of what is live now; None if there is nothing to run."""
        if job not in self._waiting:
            return None
        if job.done.done():  # its caller has gone
            self._forget(job)
            return None
        heads = self._snapshot.heads
        try:
            live = [heads[task] for task in job.tasks_of(heads)]
            live = [job.version.live] if job.version else live
            work = Work(job, live, batch_cost=float(self._running.max_pictures))
        except KeyError as error:  # it waited for a head that did not come
            job.fail(no_head_of(error.args[0], self._snapshot))
        except FeaturesOnlyError as error:
            job.fail(error)
        else:
            if work.units:
                return work
        self._forget(job)
        return None

    def _start(self, work: Work) -> bool:
        """Whether all is in memory; if so, the job is in flight from now on."""
        try:
            is_there = self._running.residency.pin(work.heads)
        except AdaptersTooLargeError as error:
            self._forget(work.job)
            work.fail(error)
            return False
        if not is_there:
            self._absent.add(work.job)
            return False
        self._forget(work.job)
        self._started[work.job] = work
        now_s = time.monotonic()
        self._metrics.queue_seconds.observe(now_s - work.job.queued_at)
        if work.job.timeline:
            work.job.timeline.steps.append(("queue", work.job.queued_at, now_s))
        return True

    def _weight_of(self, task: str) -> float:
        return self._snapshot.settings_of(task).weight

    def _time_to_wake_s(self) -> float | None:
        """Until a job that may not run now is late, or a comparison may run; None for neither."""
        now_s = time.monotonic()
        times_s = [job.deadline_s - now_s for job in (*self._waiting, *self._started)]
        if (due_s := self.comparisons.due_in_s(is_idle=True)) is not None:
            times_s.append(due_s)
        return min(max(0.0, min(times_s)), threading.TIMEOUT_MAX) if times_s else None


def _rows_of(batch: list[tuple[Work, Unit]]) -> Counter[tuple[str, int]]:
    """How many rows of each model and version."""
    rows: Counter[tuple[str, int]] = Counter()
    for work, unit in batch:
        for place in unit.heads:
            live = work.heads[place]
            rows[model_name(live.task, work.job.kind), live.version] += len(unit.inputs)
    return rows
