"""A job that has started, cut into units of work, so that a large one runs over several batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.engine import Engine, LiveHead, Row
from serve.heads import HeadOutputError
from serve.jobs import Answer, FeaturesOnlyError, Job

Scores = NDArray[np.float32] | HeadOutputError

# Assumed, not measured: heads alone cost a small part of a trunk's run.
FEATURES_COST = 1 / 64
# A picture whose rows do not fit into a batch goes through the trunk with each part of them. Parts
# of at least this cost, in pictures, keep the trunk's share of the work at a half.
LEAST_PART = 2.0


class Unit(NamedTuple):
    """Some inputs of a job, asked of some of its heads, at a cost in pictures."""

    inputs: range
    heads: range
    cost: float


class Work:
    """A job with what it saw live when it started, which all its units are answered from.

    Args:
        live: One head for each task, in the order asked.
        batch_cost: What fits into one batch, in pictures.
        heads: Of each task the side that answers.
        units: What was not taken yet.
        must_repeat: A candidate failed; the job has to be run again without candidates.
        blamed: The tasks whose candidate failed.

    Raises:
        FeaturesOnlyError: the job has features, and a head needs pictures.
    """

    def __init__(self, job: Job, live: Sequence[LiveHead], *, batch_cost: float) -> None:
        heads = job.sides(live)
        if job.has_features:
            for head in heads:
                if head.needs_picture:
                    raise FeaturesOnlyError(head.task)
        self.job, self.live, self.heads = job, live, heads
        self.must_repeat = False
        self.blamed: list[LiveHead] = []
        self.units = deque(
            _cut(
                len(job.inputs) if heads else 0,
                FEATURES_COST if job.has_features else 1.0,
                [head.row_cost for head in heads],
                max(batch_cost, LEAST_PART),
            )
        )
        self._num_unanswered = len(self.units)
        self._answers: list[list[Answer]] = [[] for _ in job.inputs]
        if not self.units:  # no task is live, and all were asked for
            job.answer(self._answers)

    def rows(self, unit: Unit, first_input: int) -> list[Row]:
        """The rows of a unit whose inputs stand in the batch from `first_input` on."""
        heads = [self.heads[place] for place in unit.heads]
        return [
            Row(first_input + offset, head) for offset in range(len(unit.inputs)) for head in heads
        ]

    def give(self, unit: Unit, scores: Iterator[Scores]) -> None:
        """Take a unit's scores; after the last, or the first error, the job is done."""
        for place in unit.inputs:
            mine = list(islice(scores, len(unit.heads)))
            for head, score in zip(unit.heads, mine, strict=True):
                if isinstance(score, HeadOutputError) and self._is_candidate(head):
                    self.repeat([head])
                elif isinstance(score, HeadOutputError):
                    self.fail(score)
                else:
                    self._answers[place].append(Answer(self.heads[head], score))
        self._num_unanswered -= 1
        if not self._num_unanswered and not self.must_repeat:
            self.job.answer(self._answers)

    @property
    def candidates(self) -> list[int]:
        """Places of the tasks that a candidate answers."""
        return [place for place in range(len(self.heads)) if self._is_candidate(place)]

    def repeat(self, blamed: Iterable[int]) -> None:
        """Leave the rest undone: what is live beside the candidates is to answer instead."""
        self.units.clear()
        self.must_repeat = self.job.is_stable = True
        self.blamed.extend(self.live[place] for place in blamed)

    def fail(self, error: Exception) -> None:
        """Answer the job with an error, and leave the rest of it undone."""
        self.units.clear()
        self.job.fail(error)

    def _is_candidate(self, place: int) -> bool:
        return self.heads[place] is not self.live[place]


class Ran(NamedTuple):
    """What a batch was, and how long its trunk and its heads took."""

    num_pictures: int
    num_rows: int
    trunk_s: float
    head_s: float


def run_units(engine: Engine, units: Sequence[tuple[Work, Unit]]) -> Ran:
    """Run a batch and hand out its scores."""
    pictures = [(work, unit) for work, unit in units if not work.job.has_features]
    features = [(work, unit) for work, unit in units if work.job.has_features]
    of_pictures = of_features = Ran(0, 0, 0.0, 0.0)
    if pictures:
        of_pictures = _run(engine.run, pictures, lambda: engine.trunk_s)
    if features:
        of_features = _run(engine.run_features, features, lambda: 0.0)
    return Ran(
        of_pictures.num_pictures,
        of_pictures.num_rows + of_features.num_rows,
        of_pictures.trunk_s,
        of_pictures.head_s + of_features.head_s,
    )


def _run(
    run: Callable[[NDArray[Any], list[Row]], Sequence[Scores]],
    units: Sequence[tuple[Work, Unit]],
    trunk_s_of: Callable[[], float],
) -> Ran:
    """Run units of one kind of input; afterwards `trunk_s_of` says how long their trunk took."""
    inputs, rows = _side_by_side(units)
    began_s = time.monotonic()
    scores = iter(run(inputs, rows))
    ended_s, trunk_s = time.monotonic(), trunk_s_of()
    # Before anyone hears that its job is done.
    if trunk_s:
        _note(units, ("trunk", began_s, began_s + trunk_s))
    _note(units, ("head", began_s + trunk_s, ended_s))
    for job in {work.job for work, _ in units}:
        job.spent.running_s += ended_s - began_s
    for work, unit in units:
        work.give(unit, scores)
    return Ran(len(inputs), len(rows), trunk_s, ended_s - began_s - trunk_s)


def _side_by_side(units: Sequence[tuple[Work, Unit]]) -> tuple[NDArray[Any], list[Row]]:
    inputs: list[NDArray[Any]] = []
    rows: list[Row] = []
    for work, unit in units:
        rows.extend(work.rows(unit, len(inputs)))
        inputs.extend(work.job.inputs[place] for place in unit.inputs)
    return np.stack(inputs), rows


def _note(units: Sequence[tuple[Work, Unit]], step: tuple[str, float, float]) -> None:
    """A step of every request of a batch that is traced."""
    for timeline in {id(work): work.job.timeline for work, _ in units}.values():
        if timeline:
            timeline.steps.append(step)


def _cut(
    num_inputs: int, input_cost: float, row_costs: Sequence[float], largest: float
) -> Iterator[Unit]:
    """Units of about one picture, or of one part of the rows of an input with very many."""
    cost = input_cost + sum(row_costs)
    if cost <= largest:
        step = max(1, int(1.0 / cost))
        for first in range(0, num_inputs, step):
            inputs = range(first, min(first + step, num_inputs))
            yield Unit(inputs, range(len(row_costs)), cost * len(inputs))
        return
    parts = list(_parts(row_costs, largest - input_cost))
    for place in range(num_inputs):
        for part, rows_cost in parts:
            yield Unit(range(place, place + 1), part, input_cost + rows_cost)


def _parts(row_costs: Sequence[float], largest: float) -> Iterator[tuple[range, float]]:
    """Stretches of rows that cost at most `largest`, or one row that costs more."""
    first, cost = 0, 0.0
    for place, row_cost in enumerate(row_costs):
        if place > first and cost + row_cost > largest:
            yield range(first, place), cost
            first, cost = place, 0.0
        cost += row_cost
    yield range(first, len(row_costs)), cost
