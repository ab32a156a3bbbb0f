"""Train one task's head on a trunk: a data change, and a matter of seconds."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import Backbone
from models.baseline import pixel_baseline
from models.data import PictureData, join
from models.evaluate import Estimate, accuracy, balance_notes
from models.heads import Head, cosine_head, features_of, logits_of
from models.logistic import choose_logistic_head, logistic_head
from models.progress import ProgressCallback, unheard

HeadKind = Literal["linear", "cosine"]
# Up to this many pictures of the rarest class, prototypes are the safer choice (assumed; Wang et
# al. 2019, arXiv:1911.04623, find them ahead at 1 and 5).
FEW_PICTURES = 5
COSINE_SCALES = (2.0, 4.0, 8.0, 16.0, 32.0)
DEFAULT_SCALE = 8.0


@dataclass(frozen=True)
class TrainedHead:
    """A head and how good it is.

    Args:
        setting: The L2 strength of a linear head, the scale of a cosine head.
        metrics: Accuracies: "test", "baseline_test" and, where there is validation,
            "validation" and "baseline_validation". Validation was measured before the last fit,
            which learns from train and validation together, and chose `setting`.
        notes: What a user should know, such as a head worse than the baseline.
    """

    head: Head
    kind: HeadKind
    setting: float
    metrics: dict[str, Estimate]
    notes: tuple[str, ...]


def train_head(
    backbone: Backbone,
    data: PictureData,
    *,
    kind: HeadKind | None = None,
    progress: ProgressCallback = unheard,
) -> TrainedHead:
    """Train a head on frozen features. Nothing is drawn at random: same data, same head.

    Args:
        kind: None takes "cosine" where the rarest class has at most `FEW_PICTURES`, else "linear".

    Raises:
        HeadError: a class has no picture to learn from, or the features are not finite.
    """
    kind = kind or choose_kind(data)
    num_classes = len(data.labels)
    features = {
        name: features_of(backbone, split, stage=f"{name} features", progress=progress)
        for name, split in data.splits.items()
    }
    choose = _choose_linear if kind == "linear" else _choose_cosine
    head, setting = choose(features, data)
    metrics = pixel_baseline(data, progress=progress)
    if len(data.validation):
        logits = logits_of(head, features["validation"])
        metrics["validation"] = accuracy(logits, data.validation.labels)
    both = torch.cat([features["train"], features["validation"]])
    labels = join(data.train, data.validation).labels
    if kind == "linear":
        head = logistic_head(both, labels, num_classes=num_classes, l2=setting)
    else:
        head = cosine_head(both, labels, num_classes=num_classes, scale=setting)
    metrics["test"] = accuracy(logits_of(head, features["test"]), data.test.labels)
    return TrainedHead(head.eval(), kind, setting, metrics, _notes(metrics, data))


def choose_kind(data: PictureData) -> HeadKind:
    """The kind of head that fits the number of pictures."""
    counts = data.counts
    rarest = min(counts["train"][label] + counts["validation"][label] for label in data.labels)
    return "cosine" if rarest <= FEW_PICTURES else "linear"


def _choose_linear(features: dict[str, Tensor], data: PictureData) -> tuple[Head, float]:
    return choose_logistic_head(
        features["train"],
        data.train.labels,
        features["validation"],
        data.validation.labels,
        num_classes=len(data.labels),
    )


def _choose_cosine(features: dict[str, Tensor], data: PictureData) -> tuple[Head, float]:
    """Only the scale is chosen: it changes how sure the head is, not which class is first."""
    head = cosine_head(
        features["train"], data.train.labels, num_classes=len(data.labels), scale=DEFAULT_SCALE
    )
    if not len(data.validation):
        return head, DEFAULT_SCALE
    unscaled = logits_of(head, features["validation"]) / DEFAULT_SCALE
    losses = {
        scale: float(F.cross_entropy(scale * unscaled, data.validation.labels))
        for scale in COSINE_SCALES
    }
    best = min(losses, key=lambda scale: losses[scale])
    head.scale.fill_(best)
    return head, best


def _notes(metrics: dict[str, Estimate], data: PictureData) -> tuple[str, ...]:
    notes = balance_notes(data.counts["train"])
    head, baseline = metrics["test"], metrics["baseline_test"]
    if head.value < baseline.value:
        note = (
            f"The head ({head}) is worse on test than a linear model on 16 px thumbnails "
            f"({baseline}): the trunk knows little of such pictures."
        )
        return (note, *notes)
    return notes
