"""Specification of models/heads.py: features to logits."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from models.backbones import build_backbone
from models.data import Picture, Split
from models.heads import (
    CosineHead,
    HeadError,
    LinearHead,
    cosine_head,
    extract_features,
    features_of,
    logits_of,
)


def clouds(
    *, num_classes: int = 3, each: int = 20, num_features: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features around one random point a class, all positive like pooled ReLU features."""
    random = torch.Generator().manual_seed(seed)
    points = 5 + torch.rand(num_classes, num_features, generator=random)
    labels = torch.arange(num_classes).repeat_interleave(each)
    noise = 0.1 * torch.randn(len(labels), num_features, generator=random)
    return points[labels] + noise, labels


def test_an_untrained_linear_head_prefers_no_class() -> None:
    """All logits are zero."""
    assert LinearHead(4, 3)(torch.randn(2, 4)).eq(0).all()


def test_prototypes_tell_classes_apart_from_one_picture_each() -> None:
    """One-shot: the class of the nearest prototype."""
    features, labels = clouds(each=21)
    first = torch.tensor([0, 21, 42])

    head = cosine_head(features[first], labels[first], num_classes=3, scale=8.0)

    assert (head(features).argmax(-1) == labels).float().mean() > 0.95


def test_logits_are_scaled_cosines_to_the_class_means() -> None:
    """Written out in numpy: centre, normalise, average, normalise, multiply."""
    features, labels = clouds(each=4)
    rows = features.double().numpy()
    means = np.stack([rows[labels.numpy() == label].mean(0) for label in range(3)])
    centred = rows - means.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    prototypes = np.stack([unit[labels.numpy() == label].mean(0) for label in range(3)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)

    head = cosine_head(features, labels, num_classes=3, scale=7.0)

    expected = torch.from_numpy(7.0 * unit @ prototypes.T).float()
    torch.testing.assert_close(head(features), expected, atol=1e-4, rtol=1e-4)


def test_a_frequent_class_does_not_pull_the_centre_to_itself() -> None:
    """Repeating one class's pictures changes no logit."""
    features, labels = clouds(each=4)
    more = torch.cat([features, features[:4].repeat(9, 1)])
    more_labels = torch.cat([labels, labels[:4].repeat(9)])

    balanced = cosine_head(features, labels, num_classes=3, scale=8.0)
    skewed = cosine_head(more, more_labels, num_classes=3, scale=8.0)

    torch.testing.assert_close(skewed(features), balanced(features), atol=1e-3, rtol=1e-3)


def test_prototypes_agree_with_nearest_centroids_on_clear_classes() -> None:
    """scikit-learn's nearest centroid is the same idea with another distance."""
    features, labels = clouds(each=10)
    test, _ = clouds(each=10, seed=0)
    centroids = NearestCentroid().fit(features.numpy(), labels.numpy())

    head = cosine_head(features, labels, num_classes=3, scale=8.0)

    assert head(test).argmax(-1).tolist() == centroids.predict(test.numpy()).tolist()


def test_a_feature_row_at_the_centre_gives_finite_logits() -> None:
    """Its direction is undefined; NaN must not leave."""
    features, labels = clouds()
    head = cosine_head(features, labels, num_classes=3, scale=8.0)

    assert torch.isfinite(head(head.centre[None])).all()


def test_a_class_without_pictures_is_named() -> None:
    """Not a prototype of NaN."""
    features, labels = clouds()

    with pytest.raises(HeadError, match="Class 3 has no picture"):
        cosine_head(features, labels, num_classes=4, scale=8.0)


def test_features_with_nan_are_refused() -> None:
    """They come of broken weights, and the message says so."""
    features, labels = clouds()
    features[0, 0] = float("nan")

    with pytest.raises(HeadError, match="NaN or infinity"):
        cosine_head(features, labels, num_classes=3, scale=8.0)


def test_one_class_is_no_task() -> None:
    """A head that can only say yes is refused."""
    with pytest.raises(HeadError, match="at least two classes; there is 1"):
        cosine_head(torch.randn(2, 3), torch.tensor([0, 0]), num_classes=1, scale=8.0)


def test_features_do_not_depend_on_the_batch_size() -> None:
    """In evaluation mode every picture stands for itself."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8, generator=random)

    one = extract_features(backbone.train(), images, batch_size=2)
    all_at_once = extract_features(backbone, images)

    # Other batch sizes may take other convolution kernels.
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=1e-5)
    assert backbone.training
    assert not one.requires_grad


def test_an_empty_split_has_no_features() -> None:
    """[0, num_features], so that callers need no special case."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)

    nothing = features_of(backbone, Split((), torch.zeros(0, dtype=torch.int64)), stage="x")

    assert nothing.shape == (0, 128)


def test_features_of_a_split_are_those_of_its_pictures_in_order() -> None:
    """Progress counts the pictures."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    arrays = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (0, 90, 255)]
    split = Split(tuple(Picture(a, str(i)) for i, a in enumerate(arrays)), torch.tensor([0, 1, 0]))
    heard: list[tuple[str, int, int]] = []

    features = features_of(
        backbone, split, stage="here", progress=lambda p: heard.append((p.stage, p.done, p.total))
    )

    expected = extract_features(backbone, torch.from_numpy(np.stack(arrays)))
    torch.testing.assert_close(features, expected)
    assert heard == [("here", 3, 3)]


@pytest.mark.parametrize("head", [LinearHead(4, 3), CosineHead(4, 3)])
def test_logits_come_without_gradients(head: LinearHead | CosineHead) -> None:
    """[rows, num_classes], ready to be compared."""
    logits = logits_of(head, torch.randn(5, 4))

    assert logits.shape == (5, 3)
    assert not logits.requires_grad
