"""The criteria by which real heads accept or refuse a precision."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from export.agreement import (
    HeadOutcome,
    clustered,
    judge,
    mcnemar,
    objections,
    significantly_worse,
)
from models.evaluate import Estimate


def outcome(
    name: str, *, lost: int = 0, won: int = 0, num: int = 200, keys: str = "", shift: float = 0.0
) -> HeadOutcome:
    """A head that loses and wins so many answers of `num`, all of which it got right or wrong."""
    before = np.zeros(num, bool)
    before[won:] = True
    after = before.copy()
    after[:won] = True
    after[num - lost :] = False
    pictures = tuple(f"{keys or name}{number}" for number in range(num))
    return HeadOutcome(name, pictures, before == after, before, after, shift)


def estimate(value: float, low: float | None = None) -> Estimate:
    """With a lower end."""
    return Estimate(value, value if low is None else low, 1.0, 1000)


@pytest.mark.parametrize(
    ("num_heads", "agreement", "low", "worse", "reason"),
    [
        (10, 0.985, -0.0099, (), None),
        (9, 0.985, -0.0099, (), "9 heads, fewer than 10"),
        (10, 0.9849, -0.0099, (), "agreement 98.5% below 98.5%"),
        (10, 0.985, -0.01, (), "accuracy may fall by -1.0 points, beyond -1.0"),
        (10, 0.985, -0.0099, ("cats",), "significantly worse: cats"),
    ],
)
def test_each_criterion_alone_refuses(
    num_heads: int, agreement: float, low: float, worse: tuple[str, ...], reason: str | None
) -> None:
    """At its bound the first case passes; each other one is just beyond one bound."""
    found = objections(num_heads, estimate(agreement), estimate(0.0, low), worse)

    assert found == (() if reason is None else (reason,))


def test_heads_that_agree_everywhere_accept() -> None:
    """Nothing changed, so every number is at its best and no interval has a width."""
    found = judge([outcome(f"head{number}") for number in range(10)])

    assert found.is_accepted
    assert (found.agreement.value, found.agreement.low) == (1.0, 1.0)
    assert (found.accuracy_change.low, found.accuracy_change.high) == (0.0, 0.0)


def test_the_pool_weighs_answers_and_not_heads() -> None:
    """3 of 100 and 0 of 900 changed: 0.3 %, and not 1.5 %."""
    found = judge([outcome("small", lost=3, num=100), outcome("large", num=900, shift=0.2)])

    assert found.agreement.value == pytest.approx(0.997)
    assert found.accuracy_change.value == pytest.approx(-0.003)
    assert found.accuracy_before.value == pytest.approx(1.0)
    assert found.accuracy_after.value == pytest.approx(0.997)
    assert (found.worst_head, found.worst_change) == ("small", pytest.approx(-0.03))
    assert found.largest_shift == 0.2


def test_losses_and_wins_cancel_in_accuracy_and_not_in_agreement() -> None:
    """An answer that became right is a changed answer too."""
    found = judge([outcome("head", lost=20, won=20)])

    assert found.accuracy_change.value == 0.0
    assert found.agreement.value == pytest.approx(0.8)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (6, 2), (2, 6), (30, 12)])
def test_the_chance_of_so_many_losses_is_the_binomial_one(lost: int, won: int) -> None:
    """SciPy's exact test of a fair coin, one-sided."""
    one = outcome("head", lost=lost, won=won)
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0

    assert mcnemar(one.before, one.after) == pytest.approx(expected)


def test_many_heads_make_a_lucky_one_less_remarkable() -> None:
    """Five losses and no win: a chance of 1 in 32, enough for one head and not for ten."""
    bad = outcome("bad", lost=5)

    assert significantly_worse([bad]) == ("bad",)
    assert significantly_worse([bad, *(outcome(f"head{n}") for n in range(9))]) == ()


def test_after_the_worst_head_the_next_is_compared_with_fewer() -> None:
    """Holm: 0.05 / 2 for the first, 0.05 for the second; Bonferroni would let the second go."""
    first, second = outcome("first", lost=20), outcome("second", lost=5)

    assert significantly_worse([second, first]) == ("first", "second")


def test_a_head_that_wins_is_not_worse() -> None:
    """However many answers changed."""
    assert significantly_worse([outcome("better", won=40)]) == ()


def test_heads_that_share_pictures_do_not_make_the_interval_narrower() -> None:
    """Ten copies of one head know no more than one: the interval is that of one."""
    one = judge([outcome("head", lost=6, num=300, keys="shared")]).accuracy_change
    copies = judge([outcome(f"head{n}", lost=6, num=300, keys="shared") for n in range(10)])
    strangers = judge([outcome(f"head{n}", lost=6, num=300) for n in range(10)]).accuracy_change

    assert copies.accuracy_change.low == pytest.approx(one.low)
    # With pictures of their own they know ten times as much: a third of the width.
    assert (strangers.value - strangers.low) < 0.5 * (one.value - one.low)


def test_the_interval_is_that_of_a_mean_of_independent_answers() -> None:
    """One answer a picture: mean ± 1.96 standard errors."""
    values = np.repeat([1.0, 0.0], [300, 700])
    found = clustered(values, [str(number) for number in range(1000)])
    error = 1.96 * np.sqrt(0.3 * 0.7 / 1000)

    # 2,000 resamples know a bound to a few percent of the error.
    assert found.low == pytest.approx(0.3 - error, abs=0.1 * error)
    assert found.high == pytest.approx(0.3 + error, abs=0.1 * error)


def test_nothing_to_judge_is_an_error() -> None:
    """No heads, or a head without pictures, say nothing about a precision."""
    with pytest.raises(ValueError, match="no heads"):
        judge([])
    with pytest.raises(ValueError, match="no pictures"):
        judge([outcome("empty", num=0)])
