"""Specification of models/thresholds.py: from which score on a label is given."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from models.thresholds import USUAL, choose_thresholds


def drawn(seed: int, *, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of two labels, one column each, and whether pictures have them."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(40, 2, generator=generator) < share).long()
    noise = torch.rand(40, 2, generator=generator)
    return (0.3 * labels + 0.6 * noise).clamp(0, 1), labels


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_has_a_better_f1(seed: int) -> None:
    """Against every threshold on a fine grid, by scikit-learn."""
    scores, labels = drawn(seed, share=0.3)
    chosen = choose_thresholds(scores, labels)

    for column, threshold in enumerate(chosen):
        truth, values = labels[:, column].numpy(), scores[:, column].double().numpy()
        best = max(f1_score(truth, values >= one) for one in np.linspace(0.0005, 0.9995, 1000))
        assert f1_score(truth, values >= threshold) >= best - 1e-12


def test_of_thresholds_that_are_as_good_the_one_closest_to_a_half_is_taken() -> None:
    """Perfect between .2 and .4, so halfway between the two; with nothing in the way, .5."""
    scores = torch.tensor([[0.1, 0.1], [0.2, 0.0], [0.4, 1.0], [0.9, 0.9]])
    labels = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])

    assert choose_thresholds(scores, labels) == pytest.approx((0.3, 0.5))


def test_a_label_that_validation_says_nothing_of_gets_the_usual_threshold() -> None:
    """No picture has it, or all have."""
    scores = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1]]).repeat(5, 1)

    assert choose_thresholds(scores, labels) == (USUAL, USUAL)


def test_a_rare_label_gets_a_lower_threshold_than_a_half() -> None:
    """Calibrated scores of a label that a twentieth of all pictures has."""
    generator = torch.Generator().manual_seed(0)
    scores = 0.1 * torch.rand(4000, 1, generator=generator) ** 0.5
    scores[:200] *= 4
    labels = (torch.rand(4000, 1, generator=generator) < scores).long()

    (threshold,) = choose_thresholds(scores, labels)
    assert 0 < threshold < 0.3


def test_scores_of_zero_and_one_give_thresholds_that_a_manifest_may_hold() -> None:
    """Strictly between them."""
    scores = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    labels = torch.tensor([[1, 1], [1, 0], [1, 0]])
    labels[2, 0] = 0

    assert all(0 < threshold < 1 for threshold in choose_thresholds(scores, labels))
