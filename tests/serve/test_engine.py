"""Rows in, scores out: against numpy, and against each row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from serve.engine import Engine, LiveHead, Retired, Row, Snapshot
from serve.heads import Head, HeadOutputError
from serve.onnx_session import open_session
from serve.task_settings import TaskSettings
from tests.serve.graphs import LABELS, first_row_head, two_row_head
from tests.serve.oracle import TOLERANCE, expected_scores, some_picture

BundleMaker = Callable[..., Bundle]
PICTURES = np.stack([some_picture(seed) for seed in range(5)])


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


def test_a_snapshot_without_a_retired_task_knows_since_when(
    make_bundle: BundleMaker,
) -> None:
    """Until it has a head again; other tasks are as they were."""
    head, other = live(make_bundle(seed=1)), live(make_bundle("shapes", seed=3))
    before = Snapshot(1, {"colours": head, "shapes": other})
    gone = before.with_heads(2, [Retired("colours", 2, "now")])
    back = gone.with_heads(3, [head])

    assert (gone.heads, gone.retired) == (
        {"shapes": other},
        {"colours": Retired("colours", 2, "now")},
    )
    assert (back.heads, back.retired) == ({"colours": head, "shapes": other}, {})
    assert before.heads.keys() == {"colours", "shapes"}


def test_a_snapshot_has_settings_for_every_task() -> None:
    """Those that were set, else the defaults; new heads alone leave them as they are."""
    wanted = TaskSettings(weight=2)
    before = Snapshot()
    after = before.with_heads(1, [], {"colours": wanted})

    assert after.with_heads(2, []).settings_of("colours") == wanted
    assert after.settings_of("shapes") == before.settings_of("colours") == TaskSettings()


def test_features_skip_the_trunk(engine: Engine, make_bundle: BundleMaker) -> None:
    """Rows from the features of pictures are those from the pictures, bit for bit."""
    rows = [Row(place, live(make_bundle(seed=seed))) for seed in (1, 2) for place in range(5)]
    past_trunk = engine.run_features(engine.features(PICTURES), rows)

    np.testing.assert_array_equal(numbers(past_trunk), numbers(engine.run(PICTURES, rows)))
