"""Specification of models/losses.py: what a student's logits are taught by."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, pearsonr, zscore
from torch import Tensor

from models.batches import UNKNOWN
from models.losses import (
    correlation_loss,
    decoupled_loss,
    label_loss,
    soft_target_loss,
    standardised_loss,
)

RANDOM = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(6, 4, generator=RANDOM)
OTHERS = 2 * torch.randn(6, 4, generator=RANDOM)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])

# Every loss between two networks' logits: (student, teacher) -> loss.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft targets": lambda s, t: soft_target_loss(s, t, temperature=4.0),
    "standardised": lambda s, t: standardised_loss(s, t, temperature=2.0),
    "decoupled": lambda s, t: decoupled_loss(s, t, LABELS, temperature=4.0, others_weight=8.0),
    "correlation": lambda s, t: correlation_loss(s, t, temperature=4.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_copies_its_teacher_has_no_loss(name: str) -> None:
    """Each loss is zero where both agree."""
    # The T^2 factor amplifies float64 rounding.
    assert LOSSES[name](OTHERS.double(), OTHERS.double()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_falls_as_the_student_approaches_its_teacher(name: str) -> None:
    """On the straight way from one to the other."""
    shares = torch.linspace(0, 1, 6)

    losses = [LOSSES[name](LOGITS + share * (OTHERS - LOGITS), OTHERS).item() for share in shares]

    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 100 * losses[-1]


@pytest.mark.parametrize("name", LOSSES)
def test_the_slope_is_that_of_the_loss(name: str) -> None:
    """By finite differences."""
    student = LOGITS.double().requires_grad_()

    assert torch.autograd.gradcheck(LOSSES[name], (student, OTHERS.double()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_fresh_head_gets_a_slope(name: str) -> None:
    """Its logits are all zero, where a deviation has no slope of its own."""
    student = torch.zeros(6, 4, requires_grad=True)

    LOSSES[name](student, OTHERS).backward()

    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_are_the_divergence_from_teacher_to_student(temperature: float) -> None:
    """Sum p log(p / q), times T^2, by SciPy."""
    teacher = softmax(OTHERS.double().numpy() / temperature, axis=1)
    student = softmax(LOGITS.double().numpy() / temperature, axis=1)
    expected = temperature**2 * entropy(teacher, student, axis=1).mean()

    loss = soft_target_loss(LOGITS.double(), OTHERS.double(), temperature=temperature)

    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_a_high_temperature_matches_logits() -> None:
    """In the limit the loss is half the mean squared difference of centred logits.

    Hinton et al. 2015, equation 4: that is why soft targets carry more than the winner.
    """
    centred = (LOGITS - LOGITS.mean(-1, keepdim=True)) - (OTHERS - OTHERS.mean(-1, keepdim=True))
    expected = centred.square().mean(-1).mean() / 2

    loss = soft_target_loss(LOGITS.double(), OTHERS.double(), temperature=1e3)

    # The next term of the expansion is of order 1/T.
    torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=0)


def test_standardised_logits_are_scores_of_each_row() -> None:
    """SciPy's z-scores, with the deviation of a sample, then soft targets."""
    teacher, student = (
        softmax(zscore(logits.double().numpy(), axis=1, ddof=1) / 2, axis=1)
        for logits in (OTHERS, LOGITS)
    )
    expected = 4 * entropy(teacher, student, axis=1).mean()

    loss = standardised_loss(LOGITS.double(), OTHERS.double(), temperature=2.0)

    # A variance of about 1 has 1e-6 added to it.
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_standardised_logits_match_at_any_range() -> None:
    """A small student need not reach the range of its teacher's logits."""
    loss = standardised_loss(0.1 * OTHERS.double() + 7, OTHERS.double(), temperature=2.0)

    # The 1e-6 that is added to variances weighs more where they are small.
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert soft_target_loss(0.1 * OTHERS + 7, OTHERS, temperature=2.0) > 0.1


@pytest.mark.parametrize("others_weight", [0.0, 1.0, 8.0])
def test_decoupled_soft_targets_are_two_divergences(others_weight: float) -> None:
    """Written out row by row: the label against the rest, and the rest among themselves."""
    teacher, student = (softmax(logits.double().numpy() / 4, axis=1) for logits in (OTHERS, LOGITS))
    expected = 0.0
    for p, q, label in zip(teacher, student, LABELS.tolist(), strict=True):
        sure = entropy([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = entropy(np.delete(p, label), np.delete(q, label))  # it makes them sum to 1
        expected += (sure + others_weight * others) * 16 / len(teacher)

    loss = decoupled_loss(
        LOGITS.double(), OTHERS.double(), LABELS, temperature=4.0, others_weight=others_weight
    )

    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_decoupled_parts_make_soft_targets_when_weighed_by_the_teachers_doubt() -> None:
    """The paper's equation 6: KD = sure + (1 - p of the label) x others."""
    teacher, one_row = OTHERS.double()[:1], LOGITS.double()[:1]
    doubt = 1 - teacher.div(4).softmax(dim=-1)[0, LABELS[0]].item()

    loss = decoupled_loss(one_row, teacher, LABELS[:1], temperature=4.0, others_weight=doubt)

    torch.testing.assert_close(loss, soft_target_loss(one_row, teacher, temperature=4.0))


def test_where_no_label_is_known_the_teachers_first_choice_is_decoupled() -> None:
    """So pictures without labels can be learned from."""
    unknown = torch.full_like(LABELS, UNKNOWN)

    def loss(labels: Tensor) -> Tensor:
        return decoupled_loss(LOGITS, OTHERS, labels, temperature=4.0, others_weight=8.0)

    torch.testing.assert_close(loss(unknown), loss(OTHERS.argmax(dim=-1)))
    assert not torch.isclose(loss(unknown), loss(LABELS))


def test_two_classes_have_no_others_to_compare() -> None:
    """Then the second part is zero and the first is plain soft targets."""
    student, teacher, labels = LOGITS[:, :2], OTHERS[:, :2], LABELS % 2

    loss = decoupled_loss(student, teacher, labels, temperature=4.0, others_weight=8.0)

    torch.testing.assert_close(loss, soft_target_loss(student, teacher, temperature=4.0))


def test_correlations_are_pearsons() -> None:
    """SciPy's, of every row and every column of the softened predictions."""
    teacher, student = (softmax(logits.double().numpy() / 4, axis=1) for logits in (OTHERS, LOGITS))
    rows = np.mean([pearsonr(q, p).statistic for q, p in zip(student, teacher, strict=True)])
    columns = np.mean([pearsonr(q, p).statistic for q, p in zip(student.T, teacher.T, strict=True)])

    loss = correlation_loss(LOGITS.double(), OTHERS.double(), temperature=4.0)

    assert loss.item() == pytest.approx(16 * (2 - rows - columns), rel=1e-6)


def test_a_batch_of_one_has_no_correlation_within_classes() -> None:
    """That part is 1, as for classes that do not correlate; nothing becomes NaN."""
    loss = correlation_loss(LOGITS[:1], LOGITS[:1], temperature=1.0)

    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_the_label_loss_is_cross_entropy() -> None:
    """By SciPy."""
    expected = -log_softmax(LOGITS.double().numpy(), axis=1)[np.arange(6), LABELS.numpy()].mean()

    assert label_loss(LOGITS, LABELS).item() == pytest.approx(expected)
    assert label_loss(torch.zeros(6, 4), LABELS).item() == pytest.approx(math.log(4))


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
