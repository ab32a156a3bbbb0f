"""Features to logits, logits to scores: against formulas, and each row against itself alone."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serve.affine import AffineMap
from serve.heads import Head, HeadOutputError, Link, logits_of, score
from serve.onnx_session import open_session
from tests.serve.graphs import LABELS, constant_head
from tests.serve.oracle import TOLERANCE

REPEATABLE = settings(derandomize=True, deadline=None)  # the machine may be busy
SESSION = open_session(constant_head([0, 0, 0]))


def labelled(num_labels: int, link: Link = "softmax", temperature: float = 1.0) -> Head:
    """A head of so many labels, whose logits come from elsewhere."""
    return Head(SESSION, tuple(map(str, range(num_labels))), link, temperature)


def scores_of(logits: list[float], link: Link, temperature: float = 1.0) -> NDArray[np.float32]:
    """The scores of one row with these logits, float32 [labels]."""
    row = np.asarray(logits, np.float32)
    (scores,) = score([row], [labelled(len(logits), link, temperature)])
    if isinstance(scores, HeadOutputError):
        raise scores
    return scores


def reference(logits: NDArray[np.float32], head: Head) -> NDArray[np.float64] | None:
    """The formula in float64; None where a quotient is not a finite float32."""
    with np.errstate(all="ignore"):
        logits = logits / np.float32(head.temperature)
    if not np.isfinite(logits).all():
        return None
    exact = logits.astype(np.float64)
    if head.link == "softmax":
        exponentials = np.exp(exact - exact.max())
        return exponentials / exponentials.sum()
    # 1 / (1 + exp(-x)) without its overflow.
    return np.exp(-np.logaddexp(0, -exact)) if head.link == "sigmoid" else exact


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


LOGIT = st.one_of(
    st.floats(-20, 20, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38]),
)
ROW = st.tuples(
    st.lists(LOGIT, min_size=1, max_size=9),
    st.sampled_from(get_args(Link)),
    st.sampled_from([0.25, 1.0, 3.0]),
)


@REPEATABLE
@given(st.lists(ROW, max_size=12))
def test_a_batch_of_any_heads_gives_every_row_what_it_gives_alone(
    rows: list[tuple[list[float], Link, float]],
) -> None:
    """Bit for bit, and within rounding of the formula; a bad row is an error and spoils none."""
    heads = [labelled(len(logits), link, temperature) for logits, link, temperature in rows]
    logits = [np.asarray(row[0], np.float32) for row in rows]
    together = score(logits, heads)

    assert len(together) == len(rows)
    for row, head, got in zip(logits, heads, together, strict=True):
        (alone,) = score([row], [head])
        expected = reference(row, head)
        if expected is None:
            assert isinstance(got, HeadOutputError)
        else:
            assert isinstance(alone, np.ndarray)
            assert isinstance(got, np.ndarray)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, alone)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_other_rows_change_no_bit_of_a_packed_heads_answer() -> None:
    """Affine heads of any size, alone and in one batch of all of them."""
    chance = np.random.default_rng(0)
    sizes = chance.integers(2, 101, 40)
    weights = [chance.normal(size=(size, 576)).astype(np.float32) for size in sizes]
    maps = [AffineMap(weight, np.zeros(len(weight), np.float32)) for weight in weights]
    heads = [
        replace(labelled(int(size)), runner=one) for size, one in zip(sizes, maps, strict=True)
    ]
    features = chance.normal(size=(len(heads), 576)).astype(np.float32)
    together = logits_of(features, heads)

    for place, head in enumerate(heads):
        (alone,) = logits_of(features[[place]], [head])
        np.testing.assert_array_equal(together[place], alone)
        among_its_own = head.logits(features)[place]
        np.testing.assert_array_equal(np.asarray(alone), among_its_own)


def test_an_error_in_place_of_logits_stays_where_it_is() -> None:
    """Rows beside it are scored."""
    failed = HeadOutputError("The tail failed.")
    scores = score([np.zeros(2, np.float32), failed], [labelled(2), labelled(2)])

    assert scores[1] is failed
    np.testing.assert_array_equal(scores[0], [0.5, 0.5])


def test_logits_come_back_in_the_order_of_the_rows() -> None:
    """Rows of one head share a run, wherever they are in the batch."""
    ones, twos = (
        Head(open_session(constant_head([number] * 3)), LABELS, "none", 1.0) for number in (1, 2)
    )
    logits = logits_of(np.zeros((4, 3), np.float32), [ones, twos, twos, ones])

    np.testing.assert_array_equal(logits, np.array([[1] * 3, [2] * 3, [2] * 3, [1] * 3]))
