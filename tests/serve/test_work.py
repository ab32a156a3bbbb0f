"""A job in units: nothing is left out, nothing comes twice, and no unit is larger than a batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.heads import HeadOutputError
from serve.jobs import FeaturesOnlyError, Job
from serve.work import Work
from tests.serve.stepped import ask, live_head

COSTS = st.lists(st.sampled_from([0.0, 0.05, 0.3, 1.5]), min_size=1, max_size=40)


def work_of(job: Job, costs: list[float], *, batch_cost: float = 4.0) -> Work:
    """A job for heads of these row costs."""
    heads = [live_head(f"task{place}", row_cost=cost) for place, cost in enumerate(costs)]
    return Work(job, heads, batch_cost=batch_cost)


def features(num: int) -> Job:
    """A request of features."""
    return Job([np.full(3, number, np.float32) for number in range(num)], ("task0",))


@given(num=st.integers(1, 70), costs=COSTS, batch=st.integers(1, 32), is_features=st.booleans())
def test_units_hold_every_row_once(
    num: int, costs: list[float], batch: int, *, is_features: bool
) -> None:
    """Every input is asked of every head, in order, at a cost that adds up."""
    job = features(num) if is_features else ask("a", *range(num))
    units = list(work_of(job, costs, batch_cost=float(batch)).units)
    rows = [(place, head) for unit in units for place in unit.inputs for head in unit.heads]
    input_cost = 1 / 64 if is_features else 1.0

    assert rows == [(place, head) for place in range(num) for head in range(len(costs))]
    for unit in units:
        rows_cost = sum(costs[head] for head in unit.heads)
        assert unit.cost == pytest.approx(len(unit.inputs) * (input_cost + rows_cost))
        # A unit that cannot be cut further may cost what it costs.
        is_atom = len(unit.inputs) == len(unit.heads) == 1
        assert unit.cost <= max(batch, 2.0) + 1e-9 or is_atom


def test_each_picture_is_a_unit() -> None:
    """So that 64 of them do not keep others waiting; however many heads that cost nothing."""
    units = work_of(ask("a", *range(64)), [0.0] * 500).units

    assert Counter(unit.cost for unit in units) == {1.0: 64}


def test_features_share_a_unit_up_to_the_cost_of_a_picture() -> None:
    """They skip the trunk, so many of them are small."""
    units = work_of(features(100), [0.0]).units

    assert [len(unit.inputs) for unit in units] == [64, 36]


def test_a_picture_of_many_adapters_is_cut() -> None:
    """500 rows of 0.3 pictures each in batches of 4: ten rows, and the trunk again for each ten."""
    units = work_of(ask("a", 1), [0.3] * 500).units

    assert {len(unit.heads) for unit in units} == {10}
    assert sum(unit.cost for unit in units) == pytest.approx(500 * 0.3 + 50)


def test_a_head_that_needs_the_picture_refuses_features() -> None:
    """With the name of its task."""
    heads = [live_head("plain"), live_head("adapted", needs_picture=True)]

    with pytest.raises(FeaturesOnlyError, match="'adapted'"):
        Work(features(1), heads, batch_cost=4.0)
    assert Work(ask("a", 1), heads, batch_cost=4.0).units


def test_the_first_error_ends_the_job_and_what_is_left_of_it() -> None:
    """No more units are run for an answer that cannot be given."""
    job = ask("a", 1, 2)
    work = work_of(job, [0.0])
    unit = work.units.popleft()
    work.give(unit, iter([HeadOutputError("broken")]))

    with pytest.raises(HeadOutputError, match="broken"):
        job.done.result(0)
    assert not work.units


def test_answers_come_after_the_last_unit_in_the_order_asked() -> None:
    """As [picture][task], though the rows were run in parts."""
    job = ask("a", 1, 2)
    work = work_of(job, [3.0, 3.0])
    units = list(work.units)
    for number, unit in enumerate(units):
        assert not job.done.done()
        work.give(unit, iter([np.array([number], np.float32)]))
    answers = job.done.result(0)

    assert [[answer.live.task for answer in row] for row in answers] == [["task0", "task1"]] * 2
    assert [[answer.scores[0] for answer in row] for row in answers] == [[0, 1], [2, 3]]
