"""Specification of models/regularisers.py: what is minimised beside plain cross-entropy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from torch import Tensor

from models.regularisers import (
    CUTMIX_ALPHA,
    MIXUP_ALPHA,
    balanced_chances,
    balanced_weights,
    classification_loss,
    l2_sp_penalty,
    mixer,
)

LOGITS = torch.tensor(
    [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [-1.0, 0.2, 0.1], [2.0, 2.0, 2.5]]
).double()
LABELS = torch.tensor([0, 1, 2, 0])


def cross_entropy(shares: np.ndarray, weights: np.ndarray) -> float:
    """Mean over rows of - sum over classes of weight * share * log probability, in numpy."""
    logits = LOGITS.numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(weights * shares * log_probabilities).sum() / len(logits))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_the_loss_is_cross_entropy_against_smoothed_labels(
    smoothing: float, weights: list[float]
) -> None:
    """(1 - s) of a label stays, s is spread over all three: Szegedy et al., section 7."""
    shares = (1 - smoothing) * np.eye(3)[LABELS] + smoothing / 3

    loss = classification_loss(
        LOGITS, LABELS, class_weights=torch.tensor(weights).double(), label_smoothing=smoothing
    )

    assert float(loss) == pytest.approx(cross_entropy(shares, np.array(weights)))


def test_labels_may_be_shares_of_labels() -> None:
    """What mixing makes of them; one-hot shares are the labels themselves."""
    one_hot = F.one_hot(LABELS, 3).double()
    mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)

    assert float(classification_loss(LOGITS, mixed)) == pytest.approx(
        cross_entropy(mixed.numpy(), np.ones(3))
    )
    torch.testing.assert_close(
        classification_loss(LOGITS, one_hot), classification_loss(LOGITS, LABELS)
    )


def test_smoothing_keeps_a_model_from_being_sure_as_the_formula_says() -> None:
    """Free logits end at a probability of 1 - s + s/3 for their label, and not at 1."""
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classification_loss(logits, torch.arange(3), label_smoothing=0.3)
        loss.backward()
        return loss

    optimizer.step(closure)

    assert logits.softmax(dim=-1).diagonal().tolist() == pytest.approx([0.8, 0.8, 0.8], abs=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Of the loss with all its settings, and of the pull to the start."""
    logits = LOGITS.clone().requires_grad_()
    shares = torch.tensor([[0.2, 0.8, 0.0]]).double().repeat(4, 1)
    weights = torch.tensor([0.5, 2.0, 1.0]).double()

    def loss(values: Tensor) -> Tensor:
        held = l2_sp_penalty([values], [torch.ones_like(values)], strength=0.3)
        mixed = classification_loss(values, shares, class_weights=weights, label_smoothing=0.1)
        return mixed + held

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_l2_sp_ends_between_the_start_and_the_task_as_the_closed_form_says(strength: float) -> None:
    """curvature/2 (w - aim)^2 + strength/2 (w - start)^2 is least at their weighted mean."""
    start, aim, curvature = torch.tensor([1.0, -2.0]), torch.tensor([5.0, 3.0]), 2.0
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=1 / (curvature + 10))

    for _ in range(300):
        optimizer.zero_grad()
        task = 0.5 * curvature * (weights - aim).square().sum()
        (task + l2_sp_penalty([weights], [start], strength=strength)).backward()
        optimizer.step()

    expected = (curvature * aim + strength * start) / (curvature + strength)
    torch.testing.assert_close(weights.detach(), expected, atol=1e-5, rtol=0)


def test_balanced_weights_and_chances_are_those_of_scikit_learn() -> None:
    """Weights count every class alike and a picture 1 on average; chances draw classes alike."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])

    weights = balanced_weights(labels, num_classes=3)
    chances = balanced_chances(labels)

    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    assert float(weights[labels].mean()) == pytest.approx(1.0)
    by_sample = compute_sample_weight("balanced", labels.numpy())
    np.testing.assert_allclose(chances, by_sample / by_sample.sum())


def test_mixup_blends_every_picture_with_another_and_its_label_alike() -> None:
    """X = l x_i + (1 - l) x_j, y = l y_i + (1 - l) y_j with the same l: Zhang et al., section 2."""
    mix = mixer("mixup", num_classes=3)
    assert mix is not None
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    torch.manual_seed(0)

    mixed, shares = mix(images, LABELS)

    kept = float(shares[1, 1])
    assert 0 < kept < 1
    torch.testing.assert_close(mixed, kept * images + (1 - kept) * images.roll(1, 0))
    one_hot = F.one_hot(LABELS, 3).float()
    torch.testing.assert_close(shares, kept * one_hot + (1 - kept) * one_hot.roll(1, 0))


def test_cutmix_patches_in_as_much_of_another_picture_as_its_label_counts() -> None:
    """The share of pixels is the share of the label: Yun et al., section 3.1."""
    mix = mixer("cutmix", num_classes=3)
    assert mix is not None
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    torch.manual_seed(1)

    mixed, shares = mix(images, LABELS)

    is_patched = mixed != images
    assert 0 < int(is_patched.sum()) < is_patched.numel()
    assert torch.equal(mixed[is_patched], images.roll(1, 0)[is_patched])
    patched = is_patched.float().mean(dim=(1, 2, 3))
    one_hot = F.one_hot(LABELS, 3).float()
    expected = (1 - patched)[:, None] * one_hot + patched[:, None] * one_hot.roll(1, 0)
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize(("name", "alpha"), [("mixup", MIXUP_ALPHA), ("cutmix", CUTMIX_ALPHA)])
def test_shares_are_drawn_from_the_papers_distribution(name: str, alpha: float) -> None:
    """Beta(alpha, alpha): mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    mix = mixer("mixup" if name == "mixup" else "cutmix", num_classes=2)
    assert mix is not None
    torch.manual_seed(0)

    drawn = np.array([mix._dist.sample(()).item() for _ in range(4000)])  # pyrefly: ignore

    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def test_nothing_is_mixed_unless_asked_for() -> None:
    """Labels stay labels."""
    assert mixer("none", num_classes=3) is None


@pytest.mark.parametrize("how", ["weights", "sampling"])
def test_balance_finds_more_of_a_rare_class(how: str) -> None:
    """A linear model on the pixels of real digits, 4 eights beside 60 of every other class."""
    values, targets = load_digits(return_X_y=True)
    pixels, labels = torch.from_numpy(values).float() / 16, torch.from_numpy(targets).long()
    rows = torch.cat([(labels == c).nonzero()[: 4 if c == 8 else 60, 0] for c in range(10)])
    unseen = (labels == 8).nonzero()[4:, 0]
    chances = torch.from_numpy(balanced_chances(labels[rows]))
    weights = balanced_weights(labels[rows], num_classes=10)
    recall: dict[bool, float] = {}
    for is_balanced in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            drawn = rows
            if is_balanced and how == "sampling":
                drawn = rows[torch.multinomial(chances, len(rows), replacement=True)]
            loss = classification_loss(
                model(pixels[drawn]), labels[drawn],
                class_weights=weights if is_balanced and how == "weights" else None,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = model(pixels[unseen]).argmax(dim=-1) == 8
        recall[is_balanced] = float(found.float().mean())

    # One standard error of 170 unseen eights is 0.04.
    assert recall[True] > recall[False] + 0.1
