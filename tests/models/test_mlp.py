"""Specification of models/mlp.py: a small network that is stopped early."""

import pytest
import torch
import torch.nn.functional as F

from models.evaluate import accuracy
from models.heads import HeadError, logits_of
from models.logistic import choose_logistic_head
from models.mlp import MlpHead, mlp_head
from tests.models.features import clouds


def rings(num: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a point is inside a circle: what no affine map can say."""
    points = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
    return 100 * points, (points.norm(dim=1) < 1.18).long()  # half of them


def test_it_learns_what_no_affine_head_can() -> None:
    """Inside or outside of a circle: chance for a straight line."""
    train, validation, test = (rings(200, seed=seed) for seed in (0, 1, 2))
    head, _ = mlp_head(*train, *validation, num_classes=2, dropout=0.2, seed=0)
    straight, _ = choose_logistic_head(*train, *validation, num_classes=2)

    assert accuracy(logits_of(head, test[0]), test[1]).value > 0.9
    assert accuracy(logits_of(straight, test[0]), test[1]).value < 0.65


def test_the_epoch_that_is_best_on_validation_is_kept() -> None:
    """The head's own accuracy and loss there are the best that were seen."""
    train, validation = clouds(400), clouds(60, seed=1)
    head, fitted = mlp_head(*train, *validation, num_classes=3, dropout=0.0, seed=0)
    logits = logits_of(head, validation[0])

    assert accuracy(logits, validation[1]).value == fitted.best.accuracy
    assert float(F.cross_entropy(logits, validation[1])) == pytest.approx(
        -fitted.best.negative_loss, abs=1e-5
    )
    assert fitted.best == max(epoch.validation for epoch in fitted.epochs)
    assert fitted.best_epoch < len(fitted.epochs) < 60  # it was stopped


def test_the_same_seed_gives_the_same_head_whatever_was_drawn_before() -> None:
    """And another seed another one."""
    rows = (*clouds(40), *clouds(20, seed=1))
    heads: list[MlpHead] = []
    for seed in (3, 3, 4):
        torch.rand(7)
        head, _ = mlp_head(*rows, num_classes=3, dropout=0.5, seed=seed)
        heads.append(head)

    assert torch.equal(heads[0].hidden.weight, heads[1].hidden.weight)
    assert not torch.equal(heads[0].hidden.weight, heads[2].hidden.weight)


def test_without_validation_nothing_says_when_to_stop() -> None:
    """So it is refused, with what to train instead."""
    rows, labels = clouds(30)

    with pytest.raises(HeadError, match=r"An MLP needs validation pictures.*train a cosine head"):
        mlp_head(rows, labels, rows[:0], labels[:0], num_classes=3, dropout=0.5, seed=0)
