"""Heads: features to logits for one task, as plain modules that export to a small graph."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from models.backbones import Backbone
from models.data import Split
from models.errors import LearningError
from models.progress import Progress, ProgressCallback, unheard

EXTRACT_BATCH = 64
# Of the pictures that a head keeps: a quarter of what a bundle may have, held-out sample included.
MAX_KEPT_BYTES = 16 * 2**20


class HeadError(LearningError):
    """A head cannot be made from these features or labels."""


class LinearHead(nn.Module):
    """One affine map; any standardisation of the features is folded into it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        # Zero, so that an untrained head gives every class the same score.
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    @override
    def forward(
        self, features: Float[Tensor, "rows num_features"]
    ) -> Float[Tensor, "rows num_classes"]:
        """Features to logits."""
        return F.linear(features, self.weight, self.bias)


class CosineHead(nn.Module):
    """Logits are scaled cosines between centred features and one prototype a class.

    Source: prototypes of Snell et al. 2017 (arXiv:1703.05175), compared by a scaled cosine as in
    Gidaris & Komodakis 2018 (arXiv:1804.09458), on centred features as in Wang et al. 2019
    (arXiv:1911.04623): pooled ReLU features are all positive, so without centring every cosine is
    close to 1.
    """

    centre: Tensor
    prototypes: Tensor
    scale: Tensor

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(num_features))
        self.register_buffer("prototypes", torch.zeros(num_classes, num_features))
        self.register_buffer("scale", torch.ones(()))

    @override
    def forward(
        self, features: Float[Tensor, "rows num_features"]
    ) -> Float[Tensor, "rows num_classes"]:
        """Features to logits."""
        directions = F.normalize(features - self.centre, dim=-1)
        return self.scale * F.linear(directions, self.prototypes)


Head = LinearHead | CosineHead


def features_of(
    backbone: Backbone, split: Split, *, stage: str, progress: ProgressCallback = unheard
) -> Float[Tensor, "rows num_features"]:
    """Features of a split's pictures, decoded as serving would decode them."""
    parts: list[Tensor] = []
    for batch in split.batches(backbone.preprocessing, batch_size=EXTRACT_BATCH):
        parts.append(extract_features(backbone, batch))
        done = min(len(split), len(parts) * EXTRACT_BATCH)
        progress(Progress(stage, done, len(split)))
    return torch.cat(parts) if parts else torch.zeros(0, backbone.num_features)


def extract_features(
    backbone: Backbone,
    pictures: UInt8[Tensor, "rows height width 3"],
    *,
    batch_size: int = EXTRACT_BATCH,
) -> Float[Tensor, "rows num_features"]:
    """Features of decoded pictures, batch by batch, in evaluation mode and without gradients.

    Returns:
        Features on the CPU, wherever the backbone is.
    """
    was_training, device = backbone.training, backbone.mean.device
    backbone.eval()
    with torch.no_grad():
        parts = [backbone(batch.to(device)).cpu() for batch in pictures.split(batch_size)]
    backbone.train(was_training)
    return torch.cat(parts)


def logits_of(
    head: nn.Module, features: Float[Tensor, "rows num_features"]
) -> Float[Tensor, "rows num_classes"]:
    """Logits on the CPU, wherever the head is, without gradients."""
    device = next(iter(head.state_dict().values())).device
    with torch.no_grad():
        return head(features.to(device)).cpu()


def cosine_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    scale: float,
) -> CosineHead:
    """Prototypes out of one or more pictures of every class.

    Args:
        scale: Factor on the cosines, above 0: how sharp the probabilities are.

    Raises:
        HeadError: a class has no picture, or the features hold NaN.
    """
    check_rows(features, labels, num_classes=num_classes)
    head = CosineHead(features.shape[1], num_classes)
    # The mean of class means, so that a frequent class does not pull the centre to itself.
    head.centre.copy_(class_means(features, labels, num_classes=num_classes).mean(dim=0))
    directions = F.normalize(features - head.centre, dim=-1)
    means = class_means(directions, labels, num_classes=num_classes)
    head.prototypes.copy_(F.normalize(means, dim=-1))
    head.scale.fill_(scale)
    return head


def check_rows(
    features: Float[Tensor, "rows num_features"], labels: Int[Tensor, " rows"], *, num_classes: int
) -> None:
    """Refuse what no head can be trained on.

    Raises:
        HeadError: fewer than two classes, a class without a row, or features with NaN or all alike.
    """
    if num_classes < 2:  # noqa: PLR2004
        raise HeadError(f"A head needs at least two classes; there is {num_classes}.")
    counts = labels.bincount(minlength=num_classes)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise HeadError(f"Class {empty[0]} has no picture to learn from; expected at least one.")
    if not bool(torch.isfinite(features).all()):
        raise HeadError("Features hold NaN or infinity; check the weights of the backbone.")
    if torch.equal(features, features[:1].expand_as(features)):
        raise HeadError(
            "Every picture has the same features, so there is nothing to tell classes apart by; "
            "check the weights of the backbone, and whether the pictures differ."
        )


def check_size(features: Float[Tensor, "rows num_features"]) -> None:
    """Refuse more pictures than a head that keeps them may hold.

    Raises:
        HeadError: they take more than `MAX_KEPT_BYTES` as float32.
    """
    num_bytes = 4 * features.numel()
    if num_bytes > MAX_KEPT_BYTES:
        raise HeadError(
            f"Such a head keeps the features of its pictures: {len(features)} of them take "
            f"{num_bytes / 2**20:.0f} MiB, at most {MAX_KEPT_BYTES // 2**20} are allowed. Train a "
            "linear, linear_svm or mlp head, which do not grow with the pictures."
        )


def standard_of(
    features: Float[Tensor, "rows num_features"],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each feature, float64; infinite where it never changes."""
    rows = features.double().numpy()
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    # A feature that never changes says nothing; dividing by rounding errors would make it loud.
    return mean, np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, np.inf)


def class_means(
    features: Float[Tensor, "rows num_features"], labels: Int[Tensor, " rows"], *, num_classes: int
) -> Float[Tensor, "num_classes num_features"]:
    """The mean of each class's rows, of which there has to be one."""
    one_hot = F.one_hot(labels, num_classes).T.to(features.dtype)
    return one_hot @ features / one_hot.sum(dim=1, keepdim=True)
