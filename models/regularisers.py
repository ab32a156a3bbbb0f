"""What is minimised beside plain cross-entropy, and what is done to pictures and labels before."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

# Zhang et al. 2017 find 0.1 to 0.4 best on photographs (arXiv:1710.09412, section 3.1); Yun et al.
# 2019 use 1, every share alike (arXiv:1905.04899, section 3.1).
MIXUP_ALPHA, CUTMIX_ALPHA = 0.2, 1.0

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def classification_loss(
    logits: Float[Tensor, "batch num_classes"],
    targets: Int[Tensor, " batch"] | Float[Tensor, "batch num_classes"],
    *,
    class_weights: Float[Tensor, " num_classes"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of labels, or of shares of labels.

    Args:
        class_weights: What a picture of each class counts; 1 is what it counts without.
        label_smoothing: Share of the label that is spread over all classes, from 0 to below 1.

    Returns:
        The sum over the batch by its size, in nats: not by the sum of weights, which would make a
        batch of frequent classes alone count as much as one of rare ones.
    """
    losses = F.cross_entropy(
        logits, targets, weight=class_weights, label_smoothing=label_smoothing, reduction="none"
    )
    return losses.mean()


def l2_sp_penalty(
    parameters: Sequence[Tensor], starts: Sequence[Tensor], *, strength: float
) -> Float[Tensor, ""]:
    """strength/2 * |parameters - starts|^2: how far a network has gone from where it started.

    Source: Li et al. 2018, arXiv:1802.01483, equation 3; the head's own term is its weight decay.
    """
    distances = [
        (tensor - start).square().sum() for tensor, start in zip(parameters, starts, strict=True)
    ]
    return 0.5 * strength * torch.stack(distances).sum()


def balanced_weights(
    labels: Int[Tensor, " pictures"], *, num_classes: int
) -> Float[Tensor, " num_classes"]:
    """What a picture has to count for all classes to count alike; 1 on average over pictures."""
    counts = labels.bincount(minlength=num_classes)
    return len(labels) / (num_classes * counts.clamp(min=1)).float()


def balanced_chances(labels: Int[Tensor, " pictures"]) -> NDArray[np.float64]:
    """How likely each picture has to be drawn for all classes to be drawn alike; they sum to 1."""
    counts = labels.bincount()
    chances = 1 / counts[labels].double().numpy()
    return chances / chances.sum()


def mixer(name: Literal["none", "mixup", "cutmix"], *, num_classes: int) -> Mixer | None:
    """What blends a batch [batch, channels, height, width] with itself, and its labels alike.

    One share is drawn for each batch, from torch's global generator; labels become float32
    [batch, num_classes].
    """
    if name == "mixup":
        return v2.MixUp(alpha=MIXUP_ALPHA, num_classes=num_classes)
    if name == "cutmix":
        return v2.CutMix(alpha=CUTMIX_ALPHA, num_classes=num_classes)
    return None
