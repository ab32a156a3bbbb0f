"""Specification of models/losses.py: what a student is taught by."""

import pytest
import torch
import torch.nn.functional as F

from models.batches import UNKNOWN
from models.losses import distillation_loss, feature_loss, label_loss

RANDOM = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 4, generator=RANDOM)
OTHERS = torch.randn(6, 4, generator=RANDOM)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_a_student_that_copies_its_teacher_has_no_soft_loss(temperature: float) -> None:
    """The teacher term is zero exactly when both agree, at every temperature."""
    loss = distillation_loss(LOGITS, LOGITS, LABELS, temperature=temperature, soft_weight=1.0)

    # The T^2 factor amplifies float32 rounding: 1.2e-5 at T=20.
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-4, rtol=0)


def test_without_a_soft_share_the_loss_is_cross_entropy() -> None:
    """Soft weight 0 is training on labels alone."""
    loss = distillation_loss(LOGITS, OTHERS, LABELS, temperature=4.0, soft_weight=0.0)

    torch.testing.assert_close(loss, F.cross_entropy(LOGITS, LABELS))


def test_the_soft_term_is_the_divergence_from_teacher_to_student() -> None:
    """At temperature 1 it is sum p log(p / q), written out."""
    teacher, student = OTHERS.softmax(-1), LOGITS.softmax(-1)
    divergence = (teacher * (teacher / student).log()).sum(-1).mean()

    loss = distillation_loss(LOGITS, OTHERS, LABELS, temperature=1.0, soft_weight=1.0)

    torch.testing.assert_close(loss, divergence)


def test_a_high_temperature_matches_logits() -> None:
    """In the limit the loss is half the mean squared difference of centred logits.

    Hinton et al. 2015, equation 4: that is why soft targets carry more than the winner.
    """
    centred = (LOGITS - LOGITS.mean(-1, keepdim=True)) - (OTHERS - OTHERS.mean(-1, keepdim=True))
    expected = centred.square().mean(-1).mean() / 2

    loss = distillation_loss(
        LOGITS.double(), OTHERS.double(), LABELS, temperature=1e3, soft_weight=1.0
    )

    # The next term of the expansion is of order 1/T.
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=0)


def test_pictures_without_a_label_count_for_the_teacher_only() -> None:
    """The label term is a mean over the labelled rows."""
    labels = torch.tensor([0, UNKNOWN, 2, UNKNOWN, UNKNOWN, 1])
    known = labels != UNKNOWN

    torch.testing.assert_close(
        label_loss(LOGITS, labels), F.cross_entropy(LOGITS[known], labels[known])
    )


def test_a_batch_without_any_label_has_a_label_loss_of_zero() -> None:
    """Not NaN, which would end the training."""
    assert label_loss(LOGITS, torch.full((6,), UNKNOWN)).item() == 0


def test_features_that_point_alike_match_at_any_scale() -> None:
    """A teacher whose features are ten times as large teaches the same."""
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(
        feature_loss(features, 10 * features), torch.tensor(0.0), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(feature_loss(features, -features), torch.tensor(2.0))
