"""Specification of models/rivals.py: whether transfer pays, in numbers and in words."""

import pytest
import torch
from torch import Tensor

from models.rivals import gaps, verdict


def right(num: int, *, of: int = 100) -> Tensor:
    return torch.arange(of) < num


def test_the_gap_is_the_error_with_the_source_less_the_error_without() -> None:
    """Wang et al. 2019: 30 % less 20 %, so above 0 is negative transfer."""
    (gap,) = gaps(right(70), {"pixels": right(80)})

    assert gap.gap.value == pytest.approx((1 - 0.7) - (1 - 0.8))
    assert gap.gap.low <= gap.gap.value <= gap.gap.high
    assert (gap.is_harm, gap.is_gain) == (True, False)
    assert gap.accuracy.value == pytest.approx(0.8)
    # Ten lost and none won: the sign test's 1 in 2^10.
    assert gap.p_harm == pytest.approx(2**-10)


def test_harm_says_not_to_ship_with_numbers_and_interval() -> None:
    """Whatever the other rivals."""
    is_fit, words = verdict(gaps(right(70), {"pixels": right(80), "noise": right(10)}))

    assert not is_fit
    assert words.startswith("Do not ship: negative transfer.")
    assert "10.0 points worse than pixels (0.800 [" in words
    assert "95 % interval -16.0 to -5.0" in words
    assert "chance" not in words
    assert "noise" not in words


def test_harm_that_may_be_chance_is_called_so_and_still_not_to_ship() -> None:
    """The rival is simpler, so it has nothing to prove."""
    is_fit, words = verdict(gaps(right(79), {"pixels": right(80)}))

    assert not is_fit
    assert "which may be chance" in words


def test_a_gain_within_the_interval_is_not_claimed() -> None:
    """One picture more in a hundred."""
    is_fit, words = verdict(gaps(right(81), {"pixels": right(80), "noise": right(10)}))

    assert is_fit
    assert words.startswith("That transfer pays is not shown")
    assert "1.0 points better than pixels" in words
    assert "noise" not in words


def test_a_tie_is_no_gain() -> None:
    """The same pictures right."""
    _, words = verdict(gaps(right(80), {"pixels": right(80)}))

    assert "not better than pixels" in words


def test_a_clear_gain_is_said_with_its_numbers() -> None:
    """Against every rival."""
    is_fit, words = verdict(gaps(right(90), {"pixels": right(60), "noise": right(10)}))

    assert is_fit
    assert words.startswith("Transfer pays")
    assert "30.0 points better than pixels" in words
    assert "80.0 points better than noise" in words


def test_nothing_to_compare_with_is_an_error() -> None:
    """Silence would read as success."""
    with pytest.raises(ValueError, match="no rival"):
        verdict(())
