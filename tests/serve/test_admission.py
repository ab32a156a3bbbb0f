"""Who is let in: those that what is ahead leaves time for, and no more than may wait."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from serve.admission import DECODE_S, Admission, Pace
from serve.jobs import Job, OverloadedError
from serve.schedule import Schedule

PICTURE = np.zeros((1, 1, 3), np.uint8)
PICTURE_S = 0.01
A_SECOND = 1.006  # of which 0.8 may be planned: 80 pictures of 10 ms, and a little


def job(
    allowed_s: float, tasks: tuple[str, ...] = ("a",), *, pictures: int = 1, decoded: bool = True
) -> Job:
    """A request that has so much time."""
    inputs = [PICTURE] * pictures if decoded else []
    return Job(inputs, tasks, time.monotonic() + allowed_s, num_inputs=pictures)


def admission(
    weight_of: Callable[[str], float] = lambda _: 1.0,
    *,
    max_waiting: int = 1000,
    picture_s: float = PICTURE_S,
    batch_cost: float = 1.0,
) -> Admission:
    """An empty one: 10 ms a picture, one a batch, two decoders."""
    return Admission(
        weight_of,
        max_waiting=max_waiting,
        batch_cost=batch_cost,
        picture_s=picture_s,
        decode_threads=2,
    )


def let_in(door: Admission, asked: Job) -> bool:
    """Whether it is let in, at a cost of its pictures."""
    try:
        door.admit(asked, num_inputs=asked.num_inputs, cost=float(asked.num_inputs))
    except OverloadedError:
        return False
    return True


def test_all_that_asks_is_counted_and_what_is_let_in_waits() -> None:
    """Who is refused would have been answered by a larger fleet."""
    door = admission()
    asked = [job(A_SECOND) for _ in range(100)]
    num_in = sum(let_in(door, one) for one in asked)
    waiting = door.waiting
    asked[0].cost_taken = 1.0
    asked[1].done.set_result([])

    assert num_in < 100
    assert (door.arrived, waiting, door.waiting) == (100.0, num_in, num_in - 2)


def test_as_many_are_let_in_as_can_be_answered() -> None:
    """Of a second 0.8 may be planned: 80 pictures of 10 ms."""
    door = admission()

    assert [let_in(door, job(A_SECOND)) for _ in range(100)] == [True] * 80 + [False] * 20


def test_a_refusal_says_why_and_when_to_ask_again() -> None:
    """What waits, what the request has, and the time after which what waits is done."""
    door = admission()
    assert let_in(door, job(9.0, pictures=240))

    with pytest.raises(
        OverloadedError, match=r"takes about 2\.4 s, and this .* has 1 s"
    ) as refused:
        door.admit(job(1.0, ("b",), pictures=120), num_inputs=120, cost=120.0)
    assert refused.value.retry_after_s == 3


def test_with_nothing_ahead_a_request_is_let_in_whatever_the_estimate() -> None:
    """A pace that is far too slow is unlearnt only by running something."""
    door = admission(picture_s=100.0)

    assert let_in(door, job(0.1))
    assert not let_in(door, job(0.1))


@pytest.mark.parametrize("end", ["answered", "failed", "cancelled"])
def test_whoever_leaves_makes_room(end: str) -> None:
    """However a request ended, it is not ahead of anyone any more."""
    door = admission(max_waiting=1)
    first = job(1.0)
    assert let_in(door, first)
    assert not let_in(door, job(1.0))

    if end == "answered":
        first.answer([])
    elif end == "failed":
        first.fail(ValueError())
    else:
        first.done.cancel()
    assert let_in(door, job(1.0))


def test_those_that_wait_for_a_decoder_count() -> None:
    """Two decoders at 2 ms a picture are slower than an engine at 0.1 ms."""
    door = admission(picture_s=0.0001)
    num = [let_in(door, job(0.1, decoded=False)) for _ in range(100)].count(True)

    # The last waits for the others by twos, then decodes and runs itself.
    assert num == pytest.approx((0.8 * 0.1 - DECODE_S) / (DECODE_S / 2), abs=2)


def test_more_than_may_wait_are_refused_whatever_their_time() -> None:
    """What has begun to run does not wait."""
    door = admission(max_waiting=2, picture_s=0.0)
    running, *_ = asked = [job(30.0) for _ in range(3)]

    assert [let_in(door, one) for one in asked] == [True, True, False]
    running.cost_taken = 1.0
    assert let_in(door, job(30.0))


def test_a_flood_of_one_task_does_not_refuse_another() -> None:
    """Its fair share is half of the engine, whatever waits for the first."""
    door = admission()
    while let_in(door, job(1.0, ("flood",))):
        pass

    assert [let_in(door, job(A_SECOND, ("other",))) for _ in range(50)].count(True) == 40


def test_a_heavier_task_gets_a_larger_part() -> None:
    """Three times the weight, three quarters of the engine."""
    door = admission({"flood": 1.0, "heavy": 3.0}.__getitem__)
    while let_in(door, job(1.0, ("flood",))):
        pass

    assert [let_in(door, job(A_SECOND, ("heavy",))) for _ in range(90)].count(True) == 60


def test_what_is_due_later_is_not_ahead() -> None:
    """A large request that has time lets a small one pass that has not."""
    door = admission()
    assert let_in(door, job(30.0, pictures=100))

    assert let_in(door, job(0.1))


@pytest.mark.parametrize("seed", range(20))
def test_no_request_has_to_wait_for_more_than_was_estimated(seed: int) -> None:
    """The real schedule as the judge: random requests of tasks of several weights."""
    chance = np.random.default_rng(seed)
    drawn = chance.choice([0.5, 1.0, 2.0], 4).tolist()
    weights: dict[str, float] = {task: drawn[place] for place, task in enumerate("abcd")}
    schedule = Schedule(weights.__getitem__, picture_s=PICTURE_S)
    door = admission(weights.__getitem__, batch_cost=4.0)
    for _ in range(30):
        one = job(
            float(chance.uniform(20, 40)),
            (str(chance.choice(list("abcd"))),),
            pictures=int(chance.integers(1, 4)),
        )
        assert let_in(door, one)
        schedule.add(one)
    last = job(30.0, (str(chance.choice(list("abcd"))),))
    last.cost = 1.0
    estimate = door._pictures_until(last, list(door._jobs))
    schedule.add(last)

    # A task may be ahead of its share by a batch, and so may each of the others.
    assert pictures_until(schedule, last) <= estimate + 4 * 4.0


def pictures_until(schedule: Schedule, last: Job) -> float:
    """What the schedule runs until a request has run, in pictures."""
    run = 0.0
    while True:
        schedule.begin(4.0)
        for _ in range(4):
            one = schedule.peek()
            if one is None:
                break
            run += 1.0
            schedule.take(1.0, has_more=one.cost_taken + 1.0 < one.cost)
            if one is last:
                return run


def test_a_pace_follows_what_is_seen() -> None:
    """After some hundred batches it is what they took, faster or slower."""
    pace = Pace(0.01)
    for seconds in (0.05, 0.002):
        for _ in range(200):
            pace.see(seconds)
        assert pace.seconds == pytest.approx(seconds, rel=0.05)


def test_a_batch_that_stood_still_does_not_shut_the_door() -> None:
    """A process that was frozen for an hour is no reason to refuse what comes after."""
    door = admission()
    door.see_run(1.0, 3600.0)
    assert let_in(door, job(1.0))

    assert [let_in(door, job(1.0)) for _ in range(100)].count(True) > 70


def test_small_batches_say_nothing_of_large_ones_unless_they_are_faster() -> None:
    """On a GPU one picture takes as long as many."""
    door = admission(picture_s=0.001, batch_cost=16.0)
    for _ in range(200):
        door.see_run(1.0, 0.01)
    assert door._run_pace.seconds == 0.001
    for _ in range(200):
        door.see_run(1.0, 0.0005)

    assert door._run_pace.seconds == pytest.approx(0.0005, rel=0.05)


def test_the_batch_that_runs_now_is_ahead() -> None:
    """It may be a full one, and it has to end first."""
    door = admission(batch_cost=4.0)
    running = job(30.0)
    assert let_in(door, running)
    running.cost_taken = 1.0

    assert not let_in(door, job(0.055))
    assert let_in(door, job(0.1))


def test_a_request_has_to_be_decoded_itself() -> None:
    """Ten pictures at 2 ms, though no decoder is busy."""
    door = admission(picture_s=0.0001)
    assert let_in(door, job(30.0))

    assert not let_in(door, job(0.015, pictures=10, decoded=False))
    assert let_in(door, job(0.015, pictures=10))
