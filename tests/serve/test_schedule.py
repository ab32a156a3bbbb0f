"""Whose turn it is: fair shares by weight first, then the earliest deadline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from serve.jobs import Job
from serve.schedule import Schedule
from tests.serve.stepped import ask

BATCH = 4.0


def equal(_: str) -> float:
    """All tasks weigh the same."""
    return 1.0


def schedule_of(*jobs: Job, weight_of: Callable[[str], float] = equal) -> Schedule:
    """A schedule in which these jobs wait; a picture takes one second."""
    schedule = Schedule(weight_of, picture_s=1.0)
    for job in jobs:
        schedule.add(job)
    return schedule


def run_batch(schedule: Schedule, *, left: dict[Job, int] | None = None) -> list[Job]:
    """The jobs of one batch of four pictures; each asks for one picture or for those left."""
    batch: list[Job] = []
    schedule.begin(BATCH)
    while len(batch) < BATCH and (job := schedule.peek()) is not None:
        num_left = (left or {}).get(job, 1) - 1
        if left is not None:
            left[job] = num_left
        schedule.take(1.0, has_more=num_left > 0)
        batch.append(job)
    return batch


def test_the_earliest_deadline_goes_first() -> None:
    """Within one task and between tasks that have had the same."""
    jobs = [ask(task, number, deadline_s=100 - number) for number, task in enumerate("abab")]

    assert run_batch(schedule_of(*jobs)) == jobs[::-1]


def test_equal_deadlines_go_as_they_came() -> None:
    """Nothing else tells them apart."""
    jobs = [ask(task, deadline_s=5.0) for task in "ccc"]

    assert run_batch(schedule_of(*jobs)) == jobs


def test_a_large_request_lets_those_between_that_are_due_before_its_next_unit() -> None:
    """Its n-th picture is due n seconds after its deadline, so it blocks nobody for long."""
    large, small, late = (ask("a", deadline_s=due) for due in (10.0, 11.5, 50.0))
    left = {large: 6, small: 1, late: 1}
    schedule = schedule_of(large, small, late)
    batches = run_batch(schedule, left=left) + run_batch(schedule, left=left)

    assert batches == [large, large, small, large, large, large, large, late]


def test_shares_follow_weights() -> None:
    """A flood of each task, 1 : 3; the deadlines all favour the light one."""
    jobs = [
        *(ask("a", deadline_s=number) for number in range(400)),
        *(ask("b", deadline_s=1000 + number) for number in range(400)),
    ]
    schedule = schedule_of(*jobs, weight_of={"a": 1.0, "b": 3.0}.__getitem__)
    tasks = Counter(job.tasks for _ in range(100) for job in run_batch(schedule))

    # Each may be ahead by one batch, and a batch is chosen as a whole.
    assert tasks["a",] == pytest.approx(100, abs=2 * BATCH)
    assert tasks["b",] == pytest.approx(300, abs=2 * BATCH)


def test_a_flood_keeps_another_task_waiting_for_two_batches_at_most() -> None:
    """Though all of the flood is due earlier."""
    flood = [ask("a", deadline_s=number) for number in range(100)]
    schedule = schedule_of(*flood)
    for _ in range(5):
        run_batch(schedule)
    late = ask("b", deadline_s=10_000.0)
    schedule.add(late)

    assert late in run_batch(schedule) + run_batch(schedule)


def test_a_pause_is_neither_paid_for_nor_saved_up() -> None:
    """A task that comes back shares from now on, instead of taking what it did not take before."""
    schedule = schedule_of(*(ask("a", deadline_s=1000.0 + number) for number in range(400)))
    for _ in range(50):
        run_batch(schedule)
    for number in range(100):
        schedule.add(ask("b", deadline_s=float(number)))
    tasks = Counter(job.tasks for _ in range(10) for job in run_batch(schedule))

    assert tasks["b",] == pytest.approx(20, abs=BATCH)


@pytest.mark.parametrize("num_tasks", [1, 2, 17, 100])
def test_a_request_for_several_tasks_is_charged_to_each_in_equal_parts(num_tasks: int) -> None:
    """Of 3,200 pictures each of n tasks had 3,200 / n, give or take the one that is next."""
    job = ask("a")
    job.tasks = tuple(f"task{number}" for number in range(num_tasks))
    schedule = schedule_of(job)
    schedule.begin(BATCH)
    for _ in range(3200):
        schedule.take(1.0, has_more=True)
    given = [schedule._virtual_time(task) for task in job.tasks]

    # 17 tasks are charged 9 and 8 at a time, so by 1/9 and 1/8.
    assert given == pytest.approx([3200 / num_tasks] * num_tasks, rel=0.07)
    assert sum(given) == pytest.approx(3200)


def test_a_flood_for_several_tasks_does_not_starve_one_of_them() -> None:
    """They compete by their deadlines, although a is always behind b, and served with b only."""
    schedule = schedule_of()
    for number in range(200):
        schedule.add(ask("ab", deadline_s=float(number)))
        schedule.add(ask("b", deadline_s=number + 0.5))
    served = [job.tasks for _ in range(50) for job in run_batch(schedule)]

    assert served.count(("b",)) == pytest.approx(100, abs=2 * BATCH)


def test_nobody_waits_while_there_is_room() -> None:
    """A task far ahead of another is still run when the other has nothing more."""
    schedule = schedule_of(*(ask("a", deadline_s=number) for number in range(100)))
    for _ in range(10):
        run_batch(schedule)
    other = ask("b", deadline_s=10_000.0)
    schedule.add(other)
    batches = [run_batch(schedule) for _ in range(3)]

    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_a_job_that_somebody_waits_for_goes_before_all_others() -> None:
    """Whatever its deadline and however much its task has had."""
    flood = [ask("a", deadline_s=number) for number in range(8)]
    schedule = schedule_of(*flood)
    run_batch(schedule)
    awaited = ask("a", deadline_s=10_000.0)
    schedule.add(awaited, is_first=True)

    assert run_batch(schedule, left={awaited: 2} | dict.fromkeys(flood, 1))[:2] == [awaited] * 2


def test_a_job_that_is_dropped_costs_its_task_nothing() -> None:
    """Its caller has gone."""
    gone, kept = ask("a", deadline_s=1.0), ask("a", deadline_s=2.0)
    schedule = schedule_of(gone, kept)
    schedule.begin(BATCH)
    schedule.drop()

    assert schedule.peek() is kept
    assert schedule._virtual_time("a") == 0.0
