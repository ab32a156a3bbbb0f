"""Two sides of one version: who gets which, what a bad candidate costs, how they are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.batcher import Batcher
from serve.comparisons import Comparison
from serve.engine import Engine, Head, HeadOutputError, LiveHead, Row, Snapshot
from serve.jobs import Answer, Job
from serve.metrics import Metrics
from serve.rollout import Trial
from serve.running import RunningTrunk
from serve.task_settings import TaskSettings
from tests.serve.harness import until
from tests.serve.oracle import SIZE_PX, Heads, expected_scores

BatcherMaker = Callable[..., Batcher]


@pytest.fixture
def sides(heads: Heads) -> tuple[LiveHead, LiveHead]:
    """Two heads of one version of colours: seed 1 is live, seed 3 the candidate."""
    bundles = [heads(seed) for seed in (1, 3)]
    live, candidate = (LiveHead("colours", 4, b.digest, Head.of_bundle(b)) for b in bundles)
    return live, candidate


@pytest.fixture
def make_batcher(engine: Engine, sides: tuple[LiveHead, LiveHead]) -> Iterator[BatcherMaker]:
    """A function that starts an open batcher with a rollout to a share of the callers."""
    made: list[Batcher] = []

    def make(share: float, *, candidate: LiveHead = sides[1], **settings: float) -> Batcher:
        rollout = replace(sides[0], candidate=candidate, share=share)
        rules = {"colours": TaskSettings.model_validate(settings)}
        snapshot = Snapshot(4, {"colours": rollout}, rules)
        made.append(Batcher(RunningTrunk(engine, 4), snapshot, Metrics(), max_queued=64))
        made[-1].set_open(is_open=True)
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def one_colour(seed: int) -> NDArray[np.uint8]:
    """A picture of one colour: unlike noise, others get other labels."""
    colour = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
    return np.broadcast_to(colour, (SIZE_PX, SIZE_PX, 3)).copy()


def ask(batcher: Batcher, picture: int, caller: str = "") -> str:
    """The bundle that answers, alone in its batch."""
    answers = batcher.submit(Job([one_colour(picture)], ("colours",), caller=caller)).result(5)
    assert answers[0][0].live.version == 4
    return answers[0][0].live.bundle


def trial_of(batcher: Batcher) -> Trial:
    return batcher.comparisons.trials.get("colours", (4, Trial()))[1]


def test_a_share_of_the_callers_gets_the_candidate(
    make_batcher: BatcherMaker, sides: tuple[LiveHead, LiveHead]
) -> None:
    """Of 300 callers about a third, within four standard deviations."""
    batcher = make_batcher(1 / 3)

    answered = [ask(batcher, 0, caller=f"caller {n}") for n in range(300)]

    assert set(answered) == {side.bundle for side in sides}
    assert abs(answered.count(sides[1].bundle) - 100) < 4 * (300 * 2 / 9) ** 0.5


def test_a_caller_stays_with_its_side_and_goes_over_once(make_batcher: BatcherMaker) -> None:
    """Whatever pictures it sends, in any replica; a larger share only adds callers."""
    narrow, wide = make_batcher(0.2), make_batcher(0.6)
    callers = [f"caller {n}" for n in range(60)]

    few = [{ask(narrow, picture, caller) for picture in range(3)} for caller in callers]
    many = [ask(wide, 7, caller) for caller in callers]

    assert all(len(bundles) == 1 for bundles in few)
    old = narrow.snapshot.heads["colours"].bundle
    assert all(now != old for before, now in zip(few, many, strict=True) if before != {old})


def test_without_a_name_the_picture_says_who_asks(make_batcher: BatcherMaker) -> None:
    """The same picture gets the same side; others may get another."""
    batcher = make_batcher(0.5)

    first = [ask(batcher, picture) for picture in range(20)]

    assert first == [ask(batcher, picture) for picture in range(20)]
    assert len(set(first)) == 2


def test_a_shadow_answers_nobody_and_is_compared(
    make_batcher: BatcherMaker, sides: tuple[LiveHead, LiveHead]
) -> None:
    """Its answers are only counted: the disagreements are numpy's."""
    batcher = make_batcher(0.0)

    answered = []
    for picture in range(12):
        answered.append(ask(batcher, picture))
        until(lambda due=picture: trial_of(batcher).compared > due)

    labels = [
        [int(np.argmax(expected_scores(one_colour(picture), seed))) for picture in range(12)]
        for seed in (1, 3)
    ]
    differ = sum(ours != theirs for ours, theirs in zip(*labels, strict=True))
    assert answered == [sides[0].bundle] * 12
    trial = trial_of(batcher)
    assert (trial.served, trial.failed, trial.disagreed) == (0, 0, differ)
    assert 0 < differ < 12


def test_a_slow_candidate_is_counted_as_slower(
    make_batcher: BatcherMaker,
    engine: Engine,
    sides: tuple[LiveHead, LiveHead],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the task's own limit, whichever side is asked first."""
    slow = sides[1].bundle

    def run(
        pictures: NDArray[np.uint8], rows: list[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        time.sleep(0.1 if any(row.head.bundle == slow for row in rows) else 0)
        return Engine.run(engine, pictures, rows)

    monkeypatch.setattr(engine, "run", run)
    for limit, slower in ((2.0, 4), (1000.0, 0)):
        batcher = make_batcher(0.0, max_slowdown=limit)
        for picture in range(4):
            ask(batcher, picture)
            until(lambda due=picture, b=batcher: trial_of(b).compared > due)

        assert trial_of(batcher).slower == slower


@pytest.mark.parametrize("failure", ["an answer that is no number", "an error of the whole batch"])
def test_a_candidate_that_fails_costs_nobody_an_answer(
    make_batcher: BatcherMaker,
    engine: Engine,
    sides: tuple[LiveHead, LiveHead],
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
) -> None:
    """What is live beside it answers instead, and the failures are counted."""
    bad = sides[1].bundle

    def run(
        pictures: NDArray[np.uint8], rows: list[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        is_bad = [row.head.bundle == bad for row in rows]
        if any(is_bad) and "batch" in failure:
            raise RuntimeError("out of memory")
        answers = Engine.run(engine, pictures, rows)
        return [HeadOutputError("NaN") if b else a for a, b in zip(answers, is_bad, strict=True)]

    monkeypatch.setattr(engine, "run", run)
    batcher = make_batcher(0.5)

    jobs = [Job([one_colour(n)], ("colours",), caller=str(n)) for n in range(40)]
    meant = sum(job.sides([batcher.snapshot.heads["colours"]])[0].bundle == bad for job in jobs)
    answered = [batcher.submit(job) for job in jobs]

    bundles = {done.result(5)[0][0].live.bundle for done in answered}
    assert bundles == {sides[0].bundle}
    assert meant >= 10
    until(lambda: trial_of(batcher).failed >= meant)


def test_comparisons_take_a_small_share_of_a_busy_engine(
    make_batcher: BatcherMaker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While requests wait all the time: by the limit, 2 % of it; 4 % leaves room for chance."""
    spent = {"requests": 0.0, "comparisons": 0.0}
    batcher = make_batcher(0.0)
    comparing = batcher.comparisons.run

    def run(
        pictures: NDArray[np.uint8], rows: list[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        time.sleep(0.002)
        return Engine.run(engine, pictures, rows)

    def timed(comparison: Comparison) -> None:
        began_s = time.monotonic()
        comparing(comparison)
        spent["comparisons"] += time.monotonic() - began_s

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(batcher.comparisons, "run", timed)
    began_s = time.monotonic()
    waiting: list[Future[list[list[Answer]]]] = []
    while time.monotonic() < began_s + 2:
        waiting = [done for done in waiting if not done.done()]
        while len(waiting) < 30:
            waiting.append(batcher.submit(Job([one_colour(0)], ("colours",))))
        time.sleep(0.001)

    assert 0 < spent["comparisons"] < 0.04 * (time.monotonic() - began_s)
