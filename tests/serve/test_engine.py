"""Rows in, scores out: against numpy, and against each row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from serve.engine import Engine, Head, HeadOutputError, LiveHead, Row, Snapshot, open_session
from serve.task_settings import TaskSettings
from tests.serve.graphs import LABELS, constant_head, first_row_head, two_row_head
from tests.serve.oracle import TOLERANCE, expected_scores, some_picture

BundleMaker = Callable[..., Bundle]
Link = Literal["softmax", "sigmoid", "none"]
PICTURES = np.stack([some_picture(seed) for seed in range(5)])
NO_FEATURES = np.zeros((1, 3), np.float32)


def live(bundle: Bundle) -> LiveHead:
    """A bundle's head as the first version of its task."""
    return LiveHead(bundle.manifest.task, 1, bundle.digest, Head.of_bundle(bundle))


def broken(graph: bytes) -> LiveHead:
    """A head that a gate should have refused."""
    head = Head(open_session(graph), LABELS, "softmax", 1.0)
    return LiveHead("broken", 1, "sha256:" + 64 * "0", head)


def numbers(scores: Sequence[NDArray[np.float32] | HeadOutputError]) -> NDArray[np.float32]:
    """Scores of rows that all have some, float32 [rows, labels]."""
    return np.stack([score for score in scores if not isinstance(score, HeadOutputError)])


def scores_of(logits: list[float], link: Link, temperature: float = 1.0) -> NDArray[np.float32]:
    """The scores of a head that gives these logits, float32 [labels]."""
    head = Head(open_session(constant_head(logits)), LABELS, link, temperature)
    return head.scores(NO_FEATURES)[0]


def test_features_are_the_trunks(engine: Engine) -> None:
    """The tiny trunk gives channel means in 0..1."""
    means = PICTURES.reshape(5, -1, 3).astype(np.float64).mean(axis=1) / 255

    np.testing.assert_allclose(engine.features(PICTURES), means, atol=TOLERANCE)


def test_a_batch_mixes_tasks_and_every_row_is_its_own_tasks_answer(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Fifteen rows in any order over five pictures and three heads with 3, 3 and 7 labels."""
    many = tuple(f"label {place}" for place in range(7))
    heads = {
        1: live(make_bundle("colours", seed=1)),
        2: live(make_bundle("shapes", seed=2)),
        3: live(make_bundle("many", seed=3, labels=many)),
    }
    chance = np.random.default_rng(0)
    asked = [(picture, seed) for picture in range(5) for seed in heads]
    chance.shuffle(asked)
    scores = engine.run(PICTURES, [Row(picture, heads[seed]) for picture, seed in asked])

    for (picture, seed), got in zip(asked, scores, strict=True):
        truth = expected_scores(PICTURES[picture], seed, len(heads[seed].head.labels))
        assert not isinstance(got, HeadOutputError)
        np.testing.assert_allclose(got, truth, atol=TOLERANCE)


def test_a_row_is_answered_alike_alone_and_among_others(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """What else is in the batch changes nothing but rounding."""
    head = live(make_bundle(seed=1))
    together = engine.run(PICTURES, [Row(place, head) for place in range(5)])
    alone = [engine.run(PICTURES[[place]], [Row(0, head)])[0] for place in range(5)]

    np.testing.assert_allclose(numbers(together), numbers(alone), atol=TOLERANCE)


def test_softmax_is_taken_of_logits_over_temperature() -> None:
    """Against the formula, for a temperature that is not 1."""
    expected = np.exp(np.array([1.0, 2.0, 4.0]) / 2.5)

    np.testing.assert_allclose(
        scores_of([1, 2, 4], "softmax", 2.5), expected / expected.sum(), atol=TOLERANCE
    )


def test_sigmoid_is_taken_of_each_logit() -> None:
    """Against the formula; the labels do not share one unit of probability."""
    expected = 1 / (1 + np.exp(-np.array([-3.0, 0.0, 3.0]) / 2))

    np.testing.assert_allclose(scores_of([-3, 0, 3], "sigmoid", 2.0), expected, atol=TOLERANCE)


def test_without_a_link_the_scores_are_the_logits() -> None:
    """Divided by the temperature like all others."""
    np.testing.assert_allclose(scores_of([-3, 0, 3], "none", 2.0), [-1.5, 0, 1.5], atol=TOLERANCE)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_extreme_logits_give_probabilities(link: Link) -> None:
    """No overflow on the way: the largest wins by all, the smallest loses by all."""
    scores = scores_of([-3e38, 0, 3e38], link)

    assert np.isfinite(scores).all()
    assert (scores[0], scores[2]) == (0, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("link", ["softmax", "sigmoid", "none"])
def test_logits_that_are_no_numbers_never_leave(bad: float, link: Link) -> None:
    """Not even where a link would make a number of them."""
    with pytest.raises(HeadOutputError, match="not finite"):
        scores_of([0, bad, 1], link)


def test_a_temperature_too_small_for_float32_gives_no_scores() -> None:
    """The quotient overflows; that is an error of the head and no warning on a console."""
    with pytest.raises(HeadOutputError, match="not finite"):
        scores_of([0, 1, 2], "softmax", 1e-300)


@pytest.mark.parametrize("graph", [two_row_head(), first_row_head()], ids=["fails", "wrong shape"])
def test_a_head_that_fails_spoils_no_other_rows(
    engine: Engine, make_bundle: BundleMaker, graph: bytes
) -> None:
    """Its own rows get an error; the same pictures are answered for the other task."""
    good, bad = live(make_bundle(seed=1)), broken(graph)
    rows = [Row(place, head) for place in range(5) for head in (bad, good)]
    scores = engine.run(PICTURES, rows)

    assert all(isinstance(score, HeadOutputError) for score in scores[::2])
    truth = [expected_scores(picture, 1) for picture in PICTURES]
    np.testing.assert_allclose(numbers(scores[1::2]), truth, atol=TOLERANCE)


def test_a_snapshot_is_never_changed(make_bundle: BundleMaker) -> None:
    """The next one is another object with the new head; the older one still has the old."""
    old, new = live(make_bundle(seed=1)), live(make_bundle(seed=2))
    other = live(make_bundle("shapes", seed=3))
    before = Snapshot(4, {"colours": old, "shapes": other})
    after = before.with_heads(5, [new])

    assert (before.number, before.heads["colours"]) == (4, old)
    assert (after.number, after.heads["colours"]) == (5, new)
    assert after.heads["shapes"] is other


def test_a_snapshot_has_settings_for_every_task() -> None:
    """Those that were set, else the defaults; new heads alone leave them as they are."""
    wanted = TaskSettings(weight=2)
    before = Snapshot()
    after = before.with_heads(1, [], {"colours": wanted})

    assert after.with_heads(2, []).settings_of("colours") == wanted
    assert after.settings_of("shapes") == before.settings_of("colours") == TaskSettings()
