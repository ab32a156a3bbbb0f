"""The queue and its worker: what starts, what waits, what is refused, and what a swap may see."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from serve.batcher import Batcher
from serve.engine import Engine, Head, HeadOutputError, LiveHead, Row, Snapshot, open_session
from serve.jobs import (
    Answer,
    Job,
    OverloadedError,
    StoppingError,
    UndecidedError,
    UnknownTaskError,
)
from serve.metrics import Metrics
from serve.running import RunningTrunk
from tests.serve.graphs import LABELS, constant_head
from tests.serve.harness import until
from tests.serve.oracle import TOLERANCE, expected_scores, some_picture

BundleMaker = Callable[..., Bundle]
COLOURS, SHAPES = ("colours",), ("shapes",)
HELD = frozenset(COLOURS)


class GatedEngine:
    """The engine, stopped at each batch until a test lets it go on.

    Args:
        batches: The tasks and versions of each batch that has started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.batches: list[list[tuple[str, int]]] = []
        self.may_run = threading.Event()
        self.error: Exception | None = None

    def __call__(
        self, pictures: NDArray[np.uint8], rows: list[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        """In place of `Engine.run`."""
        self.batches.append([(row.head.task, row.head.version) for row in rows])
        self.may_run.wait(5)
        if self.error is not None:
            raise self.error
        return Engine.run(self._engine, pictures, rows)


@pytest.fixture
def live(make_bundle: BundleMaker) -> Callable[..., LiveHead]:
    """A function that loads a head by task, version and seed."""

    def load(task: str, version: int, seed: int) -> LiveHead:
        bundle = make_bundle(task, seed=seed)
        return LiveHead(task, version, bundle.digest, Head.of_bundle(bundle))

    return load


@pytest.fixture
def snapshot(live: Callable[..., LiveHead]) -> Snapshot:
    """Two tasks: colours with seed 1, shapes with seed 2."""
    return Snapshot(3, {"colours": live("colours", 1, 1), "shapes": live("shapes", 1, 2)})


@pytest.fixture
def gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> GatedEngine:
    """The engine's batches stop here, from now on."""
    gate = GatedEngine(engine)
    monkeypatch.setattr(engine, "run", gate)
    return gate


@pytest.fixture
def batcher(engine: Engine, snapshot: Snapshot) -> Iterator[Batcher]:
    """An open batcher that takes 4 pictures a batch and lets 6 requests wait."""
    batcher = Batcher(RunningTrunk(engine, 4), snapshot, Metrics(), max_queued=6)
    batcher.set_open(is_open=True)
    yield batcher
    batcher.close()


def job(tasks: tuple[str, ...] | None = COLOURS, *, seed: int = 0, pictures: int = 1) -> Job:
    """A request of noise."""
    return Job([some_picture(seed + place) for place in range(pictures)], tasks)


def versions(answered: Future[list[list[Answer]]]) -> list[tuple[str, int]]:
    """Task and version of each answer to the first picture."""
    return [(answer.live.task, answer.live.version) for answer in answered.result(5)[0]]


def busy(batcher: Batcher, gate: GatedEngine, tasks: tuple[str, ...]) -> Future[list[list[Answer]]]:
    """A request whose batch has started and cannot end yet."""
    started = len(gate.batches)
    answered = batcher.submit(job(tasks))
    until(lambda: len(gate.batches) > started)
    return answered


def test_answers_are_numpys(batcher: Batcher) -> None:
    """Several pictures of several tasks, in the order asked."""
    answers = batcher.submit(job(("shapes", "colours"), seed=7, pictures=3)).result(5)

    for place, row in enumerate(answers):
        for answer, seed in zip(row, (2, 1), strict=True):
            truth = expected_scores(some_picture(7 + place), seed)
            np.testing.assert_allclose(answer.scores, truth, atol=TOLERANCE)
    assert [answer.live.task for answer in answers[0]] == ["shapes", "colours"]


def test_all_tasks_are_asked_by_none(batcher: Batcher) -> None:
    """Whatever is live, from one snapshot."""
    assert versions(batcher.submit(job(None))) == [("colours", 1), ("shapes", 1)]


def test_all_of_no_tasks_is_no_answer_at_once(engine: Engine) -> None:
    """A service without tasks says so, instead of letting the caller wait."""
    batcher = Batcher(RunningTrunk(engine, 4), Snapshot(), Metrics(), max_queued=6)
    batcher.set_open(is_open=True)
    answers = batcher.submit(job(None, pictures=2)).result(5)
    batcher.close()

    assert answers == [[], []]


def test_what_waits_forms_one_batch_up_to_its_size(batcher: Batcher, gate: GatedEngine) -> None:
    """While one batch runs five requests gather; the next batches take four and one."""
    first = busy(batcher, gate, COLOURS)
    waiting = [batcher.submit(job(tasks)) for tasks in (COLOURS, SHAPES, COLOURS, SHAPES, COLOURS)]
    gate.may_run.set()
    for answered in (first, *waiting):
        answered.result(5)

    assert [len(batch) for batch in gate.batches] == [1, 4, 1]


def test_a_batch_sees_one_snapshot(
    batcher: Batcher, gate: GatedEngine, live: Callable[..., LiveHead]
) -> None:
    """Pointers that move while a batch runs are the next batch's."""
    before = busy(batcher, gate, ("colours", "shapes"))
    new = [live("colours", 2, 3), live("shapes", 2, 4)]
    batcher.flip(batcher.snapshot.with_heads(4, new))
    after = batcher.submit(job(("colours", "shapes")))
    gate.may_run.set()

    assert versions(before) == [("colours", 1), ("shapes", 1)]
    assert versions(after) == [("colours", 2), ("shapes", 2)]


def test_a_hold_lets_other_tasks_go_on(batcher: Batcher) -> None:
    """Rows of the held task queue, a request for both among them; the others pass them by."""
    batcher.hold(HELD)
    held = [batcher.submit(job(COLOURS)), batcher.submit(job(("shapes", "colours")))]
    other = batcher.submit(job(SHAPES))

    assert versions(other) == [("shapes", 1)]
    assert not any(answered.done() for answered in held)
    batcher.release()
    assert [versions(answered)[-1] for answered in held] == [("colours", 1), ("colours", 1)]


def test_all_tasks_wait_if_any_is_held(batcher: Batcher) -> None:
    """Its answer must be from one moment."""
    batcher.hold(HELD)
    everything = batcher.submit(job(None))
    batcher.submit(job(SHAPES)).result(5)

    assert not everything.done()
    batcher.release()
    assert versions(everything) == [("colours", 1), ("shapes", 1)]


def test_what_was_held_is_answered_in_the_order_it_came(
    batcher: Batcher, gate: GatedEngine
) -> None:
    """A batch that passes them by does not change their order."""
    batcher.hold(HELD)
    order: list[int] = []
    for place in range(4):
        held = job(COLOURS)
        held.done.add_done_callback(lambda _, place=place: order.append(place))
        batcher.submit(held)
    gate.may_run.set()
    batcher.submit(job(SHAPES)).result(5)
    batcher.release()
    until(lambda: len(order) == 4)

    assert order == [0, 1, 2, 3]


def test_a_held_task_may_be_one_without_a_head(
    batcher: Batcher, live: Callable[..., LiveHead]
) -> None:
    """Its first head is on the way: requests wait for it, and other unknown tasks are refused."""
    batcher.hold(frozenset({"textures"}))
    waiting = batcher.submit(job(("textures",)))
    with pytest.raises(UnknownTaskError):
        batcher.submit(job(("moods",)))
    batcher.flip(batcher.snapshot.with_heads(4, [live("textures", 1, 5)]))

    assert versions(waiting) == [("textures", 1)]


def test_a_first_head_that_does_not_come_leaves_its_requests_unknown(batcher: Batcher) -> None:
    """The swap was undone, so there is still no such task."""
    batcher.hold(frozenset({"textures"}))
    waiting = batcher.submit(job(("textures",)))
    batcher.release()

    with pytest.raises(UnknownTaskError, match="no task 'textures'"):
        waiting.result(5)


def test_an_unknown_task_is_refused_with_the_closest_names(batcher: Batcher) -> None:
    """At once, before it waits in the queue."""
    with pytest.raises(UnknownTaskError, match="The closest names are: colours"):
        batcher.submit(job(("colour",)))


def test_drained_means_that_no_row_of_the_task_is_in_flight(
    batcher: Batcher, gate: GatedEngine
) -> None:
    """Waits for the batch that had started, and gives up in time."""
    flying = busy(batcher, gate, COLOURS)
    batcher.hold(HELD)
    too_early = batcher.wait_drained(0.05)
    threading.Timer(0.05, gate.may_run.set).start()
    in_time = batcher.wait_drained(5.0)

    assert (too_early, in_time) == (False, True)
    assert flying.done()


def test_rows_of_other_tasks_do_not_keep_a_drain_waiting(
    batcher: Batcher, gate: GatedEngine
) -> None:
    """A long batch of another task is none of this swap's business."""
    busy(batcher, gate, SHAPES)
    batcher.hold(HELD)

    assert batcher.wait_drained(0.0)
    gate.may_run.set()


def test_after_a_flip_what_waited_is_answered_by_the_new_head(
    batcher: Batcher, live: Callable[..., LiveHead]
) -> None:
    """The flip ends the hold."""
    batcher.hold(HELD)
    waiting = batcher.submit(job(COLOURS, seed=3))
    batcher.flip(batcher.snapshot.with_heads(4, [live("colours", 2, 9)]))
    answer = waiting.result(5)[0][0]

    assert (answer.live.version, batcher.snapshot.number) == (2, 4)
    np.testing.assert_allclose(answer.scores, expected_scores(some_picture(3), 9), atol=TOLERANCE)


def test_an_undecided_hold_refuses_its_task_until_it_is_settled(batcher: Batcher) -> None:
    """What waits and what comes is told to try again; other tasks and the time after are not."""
    batcher.hold(HELD)
    waiting = batcher.submit(job(COLOURS))
    batcher.refuse_held()

    with pytest.raises(UndecidedError):
        waiting.result(5)
    with pytest.raises(UndecidedError):
        batcher.submit(job(None))
    assert versions(batcher.submit(job(SHAPES))) == [("shapes", 1)]
    batcher.release()
    assert versions(batcher.submit(job(COLOURS))) == [("colours", 1)]


def test_a_caller_that_goes_away_while_others_are_refused_harms_nobody(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one between being looked at and being refused would leave the rest without an answer."""
    batcher.hold(HELD)
    gone, other = job(COLOURS), job(COLOURS)
    batcher.submit(gone)
    batcher.submit(other)
    refuse = gone.done.set_exception

    def go_away_first(error: Exception) -> None:
        gone.done.cancel()
        refuse(error)

    monkeypatch.setattr(gone.done, "set_exception", go_away_first)
    batcher.refuse_held()

    with pytest.raises(UndecidedError):
        other.done.result(5)


def test_a_full_queue_refuses_at_once(batcher: Batcher, gate: GatedEngine) -> None:
    """Six wait behind the running batch; the seventh is told so and none of the six is lost."""
    busy(batcher, gate, COLOURS)
    waiting = [batcher.submit(job()) for _ in range(6)]
    with pytest.raises(OverloadedError, match="6 requests wait already"):
        batcher.submit(job())
    gate.may_run.set()

    assert all(versions(answered) == [("colours", 1)] for answered in waiting)


def test_a_request_whose_caller_has_gone_is_never_run(batcher: Batcher, gate: GatedEngine) -> None:
    """Cancelled while it waited, so no row is spent on it."""
    busy(batcher, gate, COLOURS)
    gone, kept = batcher.submit(job(SHAPES)), batcher.submit(job(COLOURS))
    gone.cancel()
    gate.may_run.set()
    kept.result(5)

    assert gate.batches == [[("colours", 1)], [("colours", 1)]]


def test_a_batch_that_fails_is_its_requests_answer_and_the_worker_goes_on(
    batcher: Batcher, gate: GatedEngine
) -> None:
    """Everyone in the batch hears why; the next batch is answered."""
    gate.may_run.set()
    gate.error = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        batcher.submit(job()).result(5)
    gate.error = None

    assert versions(batcher.submit(job())) == [("colours", 1)]
    assert batcher.is_alive


def test_logits_that_are_no_numbers_fail_their_request_alone(
    batcher: Batcher, gate: GatedEngine
) -> None:
    """Side by side in one batch: one request has a broken task in it, the other has not."""
    head = Head(open_session(constant_head([0, np.nan, 0])), LABELS, "softmax", 1.0)
    broken = LiveHead("broken", 1, "sha256:" + 64 * "0", head)
    batcher.flip(batcher.snapshot.with_heads(4, [broken]))
    first = busy(batcher, gate, SHAPES)
    bad, good = batcher.submit(job(("colours", "broken"))), batcher.submit(job(COLOURS))
    gate.may_run.set()

    assert versions(first) == [("shapes", 1)]
    assert versions(good) == [("colours", 1)]
    with pytest.raises(HeadOutputError, match="not finite"):
        bad.result(5)
    assert len(gate.batches) == 2


def test_nothing_starts_before_the_batcher_is_open(
    engine: Engine, snapshot: Snapshot, gate: GatedEngine
) -> None:
    """A replica that is not admitted may take requests, and answers none."""
    gate.may_run.set()
    batcher = Batcher(RunningTrunk(engine, 4), snapshot, Metrics(), max_queued=6)
    waiting = batcher.submit(job())
    time.sleep(0.05)

    assert gate.batches == []
    batcher.set_open(is_open=True)
    assert versions(waiting) == [("colours", 1)]
    batcher.close()


def test_closing_finishes_what_waits(batcher: Batcher, gate: GatedEngine) -> None:
    """Both batches, the running one and the next."""
    waiting = [busy(batcher, gate, COLOURS), *(batcher.submit(job()) for _ in range(3))]
    threading.Timer(0.05, gate.may_run.set).start()
    batcher.close()

    assert all(versions(answered) == [("colours", 1)] for answered in waiting)
    assert not batcher.is_alive


def test_closing_refuses_what_may_not_start_and_what_comes(batcher: Batcher) -> None:
    """Nobody would ever end the hold, so nobody is left waiting for it."""
    batcher.hold(HELD)
    held = batcher.submit(job(COLOURS))
    batcher.close()

    with pytest.raises(StoppingError, match="try again"):
        held.result(0)
    with pytest.raises(StoppingError):
        batcher.submit(job(SHAPES))
