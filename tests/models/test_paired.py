"""Specification of models/paired.py: two models on the same pictures."""

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from models.paired import difference


def rights(*, both: int, first: int, second: int, neither: int) -> tuple[Tensor, Tensor]:
    """Which pictures two models got right, by how many of each kind there are."""
    outcomes = [(True, True)] * both + [(True, False)] * first
    outcomes += [(False, True)] * second + [(False, False)] * neither
    table = torch.tensor(outcomes)
    return table[:, 0], table[:, 1]


@pytest.mark.parametrize(("first", "second"), [(3, 12), (12, 3), (1, 0), (7, 7)])
def test_the_test_is_mcnemars(first: int, second: int) -> None:
    """A binomial test of the pictures on which the two differ, whatever they agree on."""
    found = difference(*rights(both=50, first=first, second=second, neither=20))

    expected = binomtest(first, first + second, alternative="less").pvalue
    assert found.p_lower == pytest.approx(expected)
    assert found.value.value == pytest.approx((first - second) / (70 + first + second))


def test_the_interval_is_that_of_a_paired_difference() -> None:
    """As wide as its standard error says: sqrt((b + c)/n - d^2) / sqrt(n), times 1.96."""
    found = difference(*rights(both=500, first=60, second=40, neither=400)).value

    half = 1.96 * ((0.1 - 0.02**2) / 1000) ** 0.5
    # The quantiles of a distribution in steps of 1/1000.
    assert found.low == pytest.approx(0.02 - half, abs=2e-3)
    assert found.high == pytest.approx(0.02 + half, abs=2e-3)


def test_models_that_never_differ_differ_by_nothing() -> None:
    """No interval, and no evidence."""
    found = difference(*rights(both=5, first=0, second=0, neither=5))

    assert (found.value.value, found.value.low, found.value.high, found.p_lower) == (0, 0, 0, 1)


def test_no_pictures_are_an_error() -> None:
    """Not a division by zero."""
    with pytest.raises(ValueError, match="no pictures to compare on"):
        difference(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))
