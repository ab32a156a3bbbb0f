"""Specification of models/logistic.py: a linear head with a chosen penalty."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from models import logistic
from models.heads import HeadError, LinearHead
from models.logistic import choose_logistic_head, logistic_head


def rows(num_classes: int = 3, *, num: int = 90, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping classes on features of very different scale and offset."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % num_classes
    points = torch.randn(num_classes, 5, generator=torch.Generator().manual_seed(99))
    features = points[labels] + torch.randn(num, 5, generator=random)
    return features * torch.tensor([1.0, 100, 0.01, 1, 1]) + 7, labels


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_folded_head_is_scikit_learns_model_on_standardised_features(num_classes: int) -> None:
    """One affine map on raw features gives the probabilities of scaler and model together."""
    features, labels = rows(num_classes)
    scaler = StandardScaler()
    scaled = scaler.fit_transform(features.double().numpy())
    model = LogisticRegression(C=1 / (0.01 * len(labels)), max_iter=1000, tol=1e-8)
    model.fit(scaled, labels.numpy())

    head = logistic_head(features, labels, num_classes=num_classes, l2=0.01)

    with torch.no_grad():
        probabilities = head(features).softmax(-1)
    expected = torch.from_numpy(model.predict_proba(scaled)).float()
    # Both stop when their gradient is small, not when it is zero.
    torch.testing.assert_close(probabilities, expected, atol=2e-3, rtol=0)


def test_the_penalised_loss_is_at_its_minimum() -> None:
    """No step in a random direction lowers mean cross-entropy + l2/2 |weights|^2."""
    features, labels = rows()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    scaled, l2 = (features - mean) / deviation, 0.05
    head = logistic_head(features, labels, num_classes=3, l2=l2)
    weight = (head.weight * deviation).detach()
    bias = (head.bias + head.weight @ mean).detach()

    def objective(weight: Tensor, bias: Tensor) -> float:
        loss = F.cross_entropy(scaled @ weight.T + bias, labels)
        return float(loss + l2 / 2 * weight.square().sum())

    random = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 0.05 * torch.randn(weight.shape, generator=random)
        assert objective(weight + step, bias) > objective(weight, bias)


def test_more_features_than_rows_are_no_trouble() -> None:
    """The usual case on a trunk; the fit happens in the space of the rows."""
    random = torch.Generator().manual_seed(0)
    features, labels = torch.randn(12, 200, generator=random), torch.arange(12) % 3

    head = logistic_head(features, labels, num_classes=3, l2=0.1)

    assert (head(features).argmax(-1) == labels).all()


def test_a_constant_feature_is_ignored() -> None:
    """A dead channel of the trunk gets weight zero instead of a division by zero."""
    features, labels = rows()
    features[:, 2] = 3.0

    head = logistic_head(features, labels, num_classes=3, l2=0.01)

    assert head.weight[:, 2].eq(0).all()
    assert torch.isfinite(head(features)).all()


def test_the_penalty_does_not_depend_on_the_number_of_rows() -> None:
    """The same rows twice give the same head, so a chosen strength holds for a larger set."""
    features, labels = rows()

    once = logistic_head(features, labels, num_classes=3, l2=0.1)
    twice = logistic_head(features.repeat(2, 1), labels.repeat(2), num_classes=3, l2=0.1)

    torch.testing.assert_close(once(features), twice(features), atol=2e-2, rtol=0)


def test_the_strength_with_the_lowest_validation_loss_is_kept() -> None:
    """Compared with every strength fitted on its own."""
    features, labels = rows(num=60)
    validation, validation_labels = rows(num=300, seed=1)

    head, chosen = choose_logistic_head(
        features, labels, validation, validation_labels, num_classes=3
    )

    losses = {
        l2: validation_loss(
            logistic_head(features, labels, num_classes=3, l2=l2), validation, validation_labels
        )
        for l2 in logistic.L2_STRENGTHS
    }
    assert chosen == min(losses, key=lambda l2: losses[l2])
    assert math.isclose(validation_loss(head, validation, validation_labels), losses[chosen])


def validation_loss(head: LinearHead, features: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(head(features), labels))


def test_without_validation_a_default_strength_is_taken() -> None:
    """A handful of pictures leaves nothing to choose on."""
    features, labels = rows()

    _, chosen = choose_logistic_head(features, labels, features[:0], labels[:0], num_classes=3)

    assert chosen == logistic.DEFAULT_L2


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_a_penalty_that_is_not_positive_is_refused(l2: float) -> None:
    """Without one, separable rows have no best weights."""
    features, labels = rows()

    with pytest.raises(HeadError, match="expected a value above 0"):
        logistic_head(features, labels, num_classes=3, l2=l2)
