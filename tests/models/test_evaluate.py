"""Specification of models/evaluate.py: accuracies and their intervals."""

import math

import pytest
import torch

from models.evaluate import Estimate, accuracy, balance_notes, class_balance, share

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "samples"), [(0, 1), (0, 50), (7, 10), (119, 120), (360, 360)])
def test_the_interval_holds_exactly_the_shares_that_the_data_does_not_reject(
    hits: int, samples: int
) -> None:
    """Wilson's bounds solve |observed - p| = z * sqrt(p (1 - p) / n), the score test itself."""
    estimate = share(hits, samples)

    for bound in (estimate.low, estimate.high):
        distance = abs(hits / samples - bound)
        assert math.isclose(
            distance, Z * math.sqrt(bound * (1 - bound) / samples), rel_tol=1e-9, abs_tol=1e-9
        )
    assert 0 <= estimate.low <= hits / samples <= estimate.high <= 1


def test_a_perfect_score_still_has_a_width() -> None:
    """Ten of ten is no proof of perfection."""
    assert share(10, 10).low < 0.75


def test_more_samples_narrow_the_interval() -> None:
    """Four times the samples halve the width, nearly."""
    few, many = share(80, 100), share(320, 400)

    ratio = (many.high - many.low) / (few.high - few.low)

    assert 0.48 < ratio < 0.52


@pytest.mark.parametrize(("hits", "samples"), [(0, 0), (2, 1), (-1, 5)])
def test_a_share_of_nothing_is_refused(hits: int, samples: int) -> None:
    """Impossible counts are an error of the caller."""
    with pytest.raises(ValueError, match="0 <= hits <= samples"):
        share(hits, samples)


def test_accuracy_counts_the_largest_logit() -> None:
    """Two of three rows are right."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])

    assert accuracy(logits, torch.tensor([1, 0, 0])) == share(2, 3)


def test_nan_logits_have_no_accuracy() -> None:
    """NaN counts as the largest value in torch, so it would look like a prediction."""
    with pytest.raises(ValueError, match="Logits hold NaN"):
        accuracy(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


def test_an_estimate_reads_as_value_and_interval() -> None:
    """The form that tables print."""
    assert str(Estimate(0.5, 0.25, 0.75, 10)) == "0.500 [0.250, 0.750]"


def test_class_balance_names_the_largest_first() -> None:
    """Shares sum to one."""
    balance = class_balance({"a": 1, "b": 3})

    assert list(balance.items()) == [("b", 0.75), ("a", 0.25)]


def test_unbalanced_classes_are_noted() -> None:
    """With 98 % of one class, 98 % accuracy may mean that the other is never seen."""
    (note,) = balance_notes({"cat": 490, "dog": 10})

    assert note.startswith("Classes are unbalanced: 'cat' has 98.0% of the pictures, 'dog' 2.0%")
    assert balance_notes({"cat": 40, "dog": 10}) == ()
