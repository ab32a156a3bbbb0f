"""Specification of models/learning_curve.py: would more pictures help?"""

import itertools

import pytest
import torch
from torch import Tensor

from models.learning_curve import learning_curve


def blobs(num: int, *, noise: float) -> tuple[Tensor, Tensor]:
    """Two classes that differ in one of forty features; they come sorted by a nuisance."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    features = noise * torch.randn(num, 40, generator=random)
    features[:, 0] += 2.0 * labels
    return features, labels


def test_more_pictures_help_where_features_are_noisy() -> None:
    """Each point has about twice the pictures of the one before, all judged on the same ones."""
    features, labels = blobs(240, noise=1.0)

    curve = learning_curve(features, labels, num_classes=2, seed=0)

    counts = [point.num_pictures for point in curve]
    assert counts == [20, 40, 80, 160]
    assert all(point.accuracy.num_samples == 240 for point in curve)
    assert curve[-1].accuracy.value > curve[0].accuracy.value + 0.05
    assert curve[0].gained is None
    for before, after in itertools.pairwise(curve):
        assert after.gained is not None
        gained = after.accuracy.value - before.accuracy.value
        assert after.gained.value.value == pytest.approx(gained)


def test_pictures_are_judged_by_heads_that_had_not_seen_them() -> None:
    """Labels that are noise stay at chance, though forty features could memorise them."""
    features, labels = blobs(90, noise=1.0)
    features[:, 0] -= 2.0 * labels

    curve = learning_curve(features, labels, num_classes=2, seed=0)

    assert all(0.25 < point.accuracy.value < 0.75 for point in curve)


def test_pictures_that_come_sorted_are_mixed() -> None:
    """The first of a class may all be of one kind, such as one digit among the even ones."""
    features, labels = blobs(480, noise=0.1)
    # Which feature tells the classes apart depends on the place.
    is_late = torch.arange(480) >= 240
    features[is_late] = features[is_late].roll(20, dims=1)

    curve = learning_curve(features, labels, num_classes=2, seed=0)

    assert curve[1].accuracy.value > 0.9


def test_a_share_without_a_class_is_left_out_and_few_pictures_have_no_curve() -> None:
    """An eighth of 4 pictures is none."""
    features, labels = blobs(16, noise=0.1)

    assert len(learning_curve(features, labels, num_classes=2, seed=0)) < 4
    assert learning_curve(features[:10], labels[:10], num_classes=2, seed=0) == ()
