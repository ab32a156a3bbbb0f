"""Large requests over several batches: what goes between, what a swap sees, what is dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest

from serve.batcher import Batcher
from serve.engine import Engine, LiveHead, Snapshot
from serve.jobs import Answer, DeadlineError, FeaturesOnlyError, Job, OverloadedError, StoppingError
from serve.metrics import Metrics
from serve.running import RunningTrunk
from serve.task_settings import TaskSettings
from tests.serve.harness import until
from tests.serve.stepped import SteppedEngine, ask, live_head, snapshot_of

TASKS = "abcdefgh"
A = frozenset("a")
BatcherMaker = Callable[..., Batcher]


class Pages:
    """Heads of some tasks are not in memory.

    Args:
        away: These tasks.
        pinned: Tasks of the heads that are in use, one entry for each job.
        asked: What was to be pinned, in order.
    """

    def __init__(self, away: str = "") -> None:
        self.away = set(away)
        self.pinned: list[str] = []
        self.asked: list[str] = []

    def pin(self, heads: Sequence[LiveHead]) -> bool:
        """All or nothing."""
        tasks = "".join(head.task for head in heads)
        self.asked.append(tasks)
        if self.away & set(tasks):
            return False
        self.pinned.append(tasks)
        return True

    def unpin(self, heads: Sequence[LiveHead]) -> None:
        """What was pinned together."""
        self.pinned.remove("".join(head.task for head in heads))

    def close(self) -> None:
        """Nothing to do."""


@pytest.fixture
def stepped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> SteppedEngine:
    """The engine runs a batch for each step."""
    return SteppedEngine(engine, monkeypatch)


@pytest.fixture
def make_batcher(engine: Engine, stepped: SteppedEngine) -> Iterator[BatcherMaker]:
    """A function that makes an open batcher of 2 pictures a batch, at 5 ms each."""
    made: list[Batcher] = []

    def make(
        snapshot: Snapshot | None = None,
        *,
        max_pictures: int = 2,
        max_queued: int = 600,
        residency: Pages | None = None,
    ) -> Batcher:
        batcher = Batcher(
            RunningTrunk(engine, max_pictures, 0.005, residency or Pages()),
            snapshot or snapshot_of(*map(live_head, TASKS)),
            Metrics(),
            max_queued=max_queued,
        )
        batcher.set_open(is_open=True)
        made.append(batcher)
        return batcher

    yield make
    stepped.step(1000)
    for batcher in made:
        batcher.close()


@pytest.fixture
def batcher(make_batcher: BatcherMaker) -> Batcher:
    """With all tasks from a to h."""
    return make_batcher()


def occupy(batcher: Batcher, stepped: SteppedEngine, task: str = "h") -> Future[list[list[Answer]]]:
    """A batch runs and does not end before a step; what is asked meanwhile waits together."""
    num_before = len(stepped.batches)
    answered = batcher.submit(ask(task, 255))
    stepped.wait_for(num_before + 1)
    return answered


def versions(answered: Future[list[list[Answer]]]) -> set[int]:
    """The versions that an answer is made of."""
    return {answer.live.version for row in answered.result(5) for answer in row}


def numbers(answered: Future[list[list[Answer]]]) -> list[int]:
    """The numbers of the pictures that were answered."""
    return [int(row[0].scores[1]) for row in answered.result(5)]


def test_the_earliest_deadline_goes_first(batcher: Batcher, stepped: SteppedEngine) -> None:
    """Of what waits when the worker becomes free."""
    occupy(batcher, stepped)
    now_s = time.monotonic()
    for number in (40, 10, 30, 20):
        batcher.submit(ask("a", number, deadline_s=now_s + number))
    stepped.step(3)
    stepped.wait_for(3)

    assert stepped.pictures()[1:] == [[10, 20], [30, 40]]


def test_a_small_request_overtakes_a_large_one(batcher: Batcher, stepped: SteppedEngine) -> None:
    """64 pictures were there first; the one that came later is in the next batch but one."""
    occupy(batcher, stepped)
    large = batcher.submit(ask("a", *range(64)))
    stepped.step()
    stepped.wait_for(2)
    small = batcher.submit(ask("a", 100))
    stepped.step(2)

    assert numbers(small) == [100]
    stepped.step(100)
    assert numbers(large) == list(range(64))


def test_a_small_request_overtakes_a_fan_out(
    make_batcher: BatcherMaker, stepped: SteppedEngine
) -> None:
    """One picture of eight tasks with adapters takes eight batches, and one of h goes between."""
    batcher = make_batcher(snapshot_of(*(live_head(task, row_cost=0.9) for task in TASKS)))
    fan_out = batcher.submit(ask(TASKS, 1))
    stepped.wait_for(1)
    small = batcher.submit(ask("h", 2))
    stepped.step(2)

    assert numbers(small) == [2]
    stepped.step(100)
    assert versions(fan_out) == {1}
    assert sorted(task for batch in stepped.batches for task, _, n in batch if n == 1) == [*TASKS]


def test_the_budget_of_a_batch_is_kept(make_batcher: BatcherMaker, stepped: SteppedEngine) -> None:
    """Rows with adapters cost more than the picture alone, so fewer go together."""
    heads = [live_head("a", row_cost=1.0), live_head("b", row_cost=0.5), live_head("h")]
    batcher = make_batcher(snapshot_of(*heads), max_pictures=4)
    occupy(batcher, stepped)
    for number, task in enumerate("ababhh"):
        batcher.submit(ask(task, number))
    stepped.step(10)
    until(lambda: sum(map(len, stepped.batches)) == 7)

    # 2 + 1.5, then 2 + 1.5, then 1 + 1.
    assert stepped.tasks() == [["h"], ["a", "b"], ["a", "b"], ["h", "h"]]


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 20), (3.0, 30)])
def test_a_flood_leaves_another_task_its_share(
    make_batcher: BatcherMaker, stepped: SteppedEngine, weight: float, expected: int
) -> None:
    """Of 40 pictures b gets its share by weight, though all of a was there first."""
    settings = {"b": TaskSettings(weight=weight)}
    snapshot = snapshot_of(*map(live_head, TASKS)).with_heads(2, [], settings)
    batcher = make_batcher(snapshot)
    occupy(batcher, stepped)
    for task in "ab":
        for number in range(100):
            batcher.submit(ask(task, number))
    stepped.step(21)
    stepped.wait_for(22)
    served = [task for batch in stepped.tasks()[1:21] for task in batch]

    assert served.count("b") == pytest.approx(expected, abs=2)


def test_a_job_keeps_its_snapshot_over_all_its_batches(
    batcher: Batcher, stepped: SteppedEngine
) -> None:
    """A flip between two of them is for those who start later."""
    large = batcher.submit(ask("ab", *range(6)))
    stepped.wait_for(1)
    batcher.flip(batcher.snapshot.with_heads(2, [live_head("a", 2), live_head("b", 2)]))
    later = batcher.submit(ask("ab", 7))
    stepped.step(10)

    assert versions(large) == {1}
    assert versions(later) == {2}


def test_a_hold_runs_what_has_started_first(batcher: Batcher, stepped: SteppedEngine) -> None:
    """Though others are due earlier; then it is drained, and what has not started waits."""
    large = batcher.submit(ask("a", 1, 2, 3, 4, 5, 6))
    stepped.wait_for(1)
    for number in range(10):
        batcher.submit(ask("b", 100 + number, deadline_s=time.monotonic() + 5))
    waiting = batcher.submit(ask("a", 50))
    batcher.hold(A)
    too_early = batcher.wait_drained(0.0)
    stepped.step(3)
    in_time = batcher.wait_drained(5.0)

    assert (too_early, in_time) == (False, True)
    assert numbers(large) == [1, 2, 3, 4, 5, 6]
    assert stepped.pictures()[:3] == [[1, 2], [3, 4], [5, 6]]
    stepped.step(10)
    until(lambda: len(stepped.batches) == 8)
    assert not waiting.done()
    batcher.flip(batcher.snapshot.with_heads(2, [live_head("a", 2)]))
    stepped.step()
    assert versions(waiting) == {2}


def test_a_replica_that_is_not_admitted_starts_its_unfinished_jobs_anew(
    batcher: Batcher, stepped: SteppedEngine
) -> None:
    """What is live may change without a drain meanwhile, so nothing old is said afterwards."""
    large = batcher.submit(ask("a", 1, 2, 3, 4))
    stepped.wait_for(1)
    batcher.set_open(is_open=False)
    batcher.flip(batcher.snapshot.with_heads(2, [live_head("a", 2)]))
    batcher.set_open(is_open=True)
    stepped.step(10)

    assert versions(large) == {2}
    assert numbers(large) == [1, 2, 3, 4]


def test_a_job_whose_deadline_passes_fails_and_costs_no_more(
    batcher: Batcher, stepped: SteppedEngine
) -> None:
    """One that waits and one that has run in part; a third is answered as if they were not."""
    part = batcher.submit(ask("a", *range(10), deadline_s=time.monotonic() + 0.2))
    stepped.wait_for(1)
    late = batcher.submit(ask("b", 50, deadline_s=time.monotonic() + 0.1))
    kept = batcher.submit(ask("c", 60))
    time.sleep(0.25)
    stepped.step(10)

    assert numbers(kept) == [60]
    for answered in (part, late):
        with pytest.raises(DeadlineError, match=r"No answer within 0\.\d+ s"):
            answered.result(5)
    assert stepped.pictures() == [[0, 1], [60]]


def test_a_deadline_passes_for_what_is_held_too(batcher: Batcher) -> None:
    """Nothing else would wake the worker."""
    batcher.hold(A)
    held = batcher.submit(ask("a", 1, deadline_s=time.monotonic() + 0.05))

    with pytest.raises(DeadlineError):
        held.result(5)
    assert not batcher._waiting


def test_an_answer_that_is_ready_too_late_is_not_given(
    batcher: Batcher, stepped: SteppedEngine
) -> None:
    """The caller has stopped waiting, and its deadline is the same whoever looks at it."""
    late = batcher.submit(ask("a", 1, deadline_s=time.monotonic() + 0.05))
    stepped.wait_for(1)
    time.sleep(0.1)
    stepped.step()

    with pytest.raises(DeadlineError):
        late.result(5)


def test_a_caller_that_goes_away_frees_what_is_left(
    batcher: Batcher, stepped: SteppedEngine
) -> None:
    """Its later pictures are not run; a drain does not wait for them."""
    gone = batcher.submit(ask("a", *range(10)))
    stepped.wait_for(1)
    kept = batcher.submit(ask("b", 60))
    assert gone.cancel()
    stepped.step(10)

    assert numbers(kept) == [60]
    assert stepped.pictures() == [[0, 1], [60]]
    batcher.hold(A)
    assert batcher.wait_drained(0.0)


def test_callers_that_went_away_make_room_in_a_full_queue(
    make_batcher: BatcherMaker, stepped: SteppedEngine
) -> None:
    """A queue of those who do not wait any more is not full."""
    batcher = make_batcher(max_queued=2)
    occupy(batcher, stepped)
    gone, _ = batcher.submit(ask("a", 1)), batcher.submit(ask("a", 2))
    with pytest.raises(OverloadedError):
        batcher.submit(ask("a", 3))
    gone.cancel()

    batcher.submit(ask("a", 3))
    with pytest.raises(OverloadedError):
        batcher.submit(ask("a", 4))


def test_what_is_not_in_memory_waits_and_others_go_on(
    make_batcher: BatcherMaker, stepped: SteppedEngine
) -> None:
    """It tries again when it is woken, and not before."""
    pages = Pages(away="a")
    batcher = make_batcher(residency=pages)
    stepped.step(100)
    away = batcher.submit(ask("ab", 1))
    assert numbers(batcher.submit(ask("b", 2))) == [2]
    assert numbers(batcher.submit(ask("c", 3))) == [3]

    assert pages.asked == ["ab", "b", "c"]
    pages.away.clear()
    batcher.wake()
    assert numbers(away) == [1]
    until(lambda: pages.pinned == [])


def test_heads_stay_in_memory_until_the_last_unit(
    make_batcher: BatcherMaker, stepped: SteppedEngine
) -> None:
    """From the first; one that is dropped on the way lets go of them too."""
    pages = Pages()
    batcher = make_batcher(residency=pages)
    batcher.submit(ask("a", *range(4)))
    stepped.wait_for(1)
    first = list(pages.pinned)
    stepped.step()
    stepped.wait_for(2)
    last = list(pages.pinned)
    stepped.step()
    until(lambda: pages.pinned == [])
    dropped = batcher.submit(ask("b", *range(10, 20)))
    stepped.wait_for(3)
    dropped.cancel()
    reads = list(pages.pinned)  # its batch still does
    stepped.step()
    until(lambda: pages.pinned == [])

    assert (first, last, reads) == (["a"], ["a"], ["b"])
    assert pages.asked == ["a", "b"]


def test_a_flip_lets_those_that_were_not_in_memory_try_again(
    make_batcher: BatcherMaker, stepped: SteppedEngine
) -> None:
    """The new head needs not what the old one needed."""
    pages = Pages(away="a")
    batcher = make_batcher(residency=pages)
    stepped.step(100)
    away = batcher.submit(ask("a", 1))
    until(lambda: pages.asked == ["a"])
    pages.away.clear()
    batcher.flip(batcher.snapshot.with_heads(2, [live_head("a", 2)]))

    assert versions(away) == {2}


def test_closing_refuses_what_is_not_in_memory(make_batcher: BatcherMaker) -> None:
    """Nobody would wake it."""
    batcher = make_batcher(residency=Pages(away="a"))
    away = batcher.submit(ask("a", 1))
    batcher.close()

    with pytest.raises(StoppingError):
        away.result(0)


def test_features_are_answered_beside_pictures(batcher: Batcher, stepped: SteppedEngine) -> None:
    """In one turn of the worker: pictures through the trunk, features past it."""
    occupy(batcher, stepped)
    picture = batcher.submit(ask("a", 1))
    features = batcher.submit(Job([np.full(3, 2, np.float32), np.full(3, 3, np.float32)], ("b",)))
    stepped.step(3)

    assert numbers(picture) == [1]
    assert numbers(features) == [2, 3]
    assert stepped.batches[1:] == [[("a", 1, 1)], [("b", 1, 2), ("b", 1, 3)]]


def test_a_task_that_needs_the_picture_refuses_features(make_batcher: BatcherMaker) -> None:
    """With a reason, and without running anything."""
    batcher = make_batcher(snapshot_of(live_head("a", needs_picture=True)))
    refused = batcher.submit(Job([np.zeros(3, np.float32)], ("a",)))

    with pytest.raises(FeaturesOnlyError, match="send it the picture"):
        refused.result(5)
