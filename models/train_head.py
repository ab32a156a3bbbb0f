"""Train one task's head on a trunk: a data change, and a matter of seconds."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbones import Backbone
from models.baseline import pixel_baseline
from models.data import PictureData, join
from models.evaluate import Estimate, accuracy, balance_notes
from models.feature_cache import FeatureCache, features_by_split
from models.head_kinds import FittedHead, HeadKind, Known, Setting, fit_head
from models.heads import logits_of
from models.progress import ProgressCallback, unheard

# Up to this many pictures of the rarest class, prototypes are the safer choice (assumed; Wang et
# al. 2019, arXiv:1911.04623, find them ahead at 1 and 5).
FEW_PICTURES = 5


@dataclass(frozen=True)
class TrainedHead:
    """A head and how good it is.

    Args:
        setting: What was chosen for it, such as the L2 strength of a linear head.
        temperature: What its logits are divided by before the softmax.
        metrics: Accuracies: "test", "baseline_test" and, where there is validation,
            "validation" and "baseline_validation". Validation was measured before the last fit,
            which learns from train and validation together (but for "mlp", which has none), and
            chose `setting`.
        notes: What a user should know, such as a head worse than the baseline.
        features: Split -> float32 [pictures, num_features], what it learned from and was tested on.
        test_logits: Its answers on the test split, at that temperature.
        baseline_logits: Those of the linear model on pixels.
    """

    head: nn.Module
    kind: HeadKind
    setting: Setting
    temperature: float
    metrics: dict[str, Estimate]
    notes: tuple[str, ...]
    features: dict[str, Tensor]
    test_logits: Float[Tensor, "pictures num_classes"]
    baseline_logits: Float[Tensor, "pictures num_classes"]


def train_head(
    backbone: Backbone,
    data: PictureData,
    *,
    kind: HeadKind | None = None,
    seed: int = 0,
    cache: FeatureCache | None = None,
    progress: ProgressCallback = unheard,
) -> TrainedHead:
    """Train a head on frozen features. Same data and seed, same head.

    Args:
        kind: None takes "cosine" where the rarest class has at most `FEW_PICTURES`, else "linear".
        seed: Of folds and of an MLP; the other kinds draw nothing.
        cache: Where features are looked for, and kept.

    Raises:
        HeadError: a class has no picture to learn from, the features are not finite, or the kind
            does not do for such data.
    """
    kind = kind or choose_kind(data)
    pictures = {name: split.pictures for name, split in data.splits.items()}
    features = features_by_split(backbone, pictures, cache=cache, progress=progress)
    known = Known(
        torch.cat([features["train"], features["validation"]]),
        join(data.train, data.validation).labels,
        num_train=len(data.train),
        num_classes=len(data.labels),
        seed=seed,
    )
    fitted = fit_head(kind, known)
    baseline = pixel_baseline(data, progress=progress)
    metrics = baseline.metrics
    if len(data.validation):
        logits = logits_of(fitted.on_train, features["validation"])
        metrics["validation"] = accuracy(logits, data.validation.labels)
    test_logits = logits_of(fitted.head, features["test"]) / fitted.temperature
    metrics["test"] = accuracy(test_logits, data.test.labels)
    notes = (*_notes(metrics, data), _how(kind, fitted))
    return TrainedHead(
        fitted.head.eval(), kind, fitted.setting, fitted.temperature, metrics, notes,
        features, test_logits, baseline.test_logits,
    )  # fmt: skip


def choose_kind(data: PictureData) -> HeadKind:
    """The kind of head that fits the number of pictures."""
    counts = data.counts
    rarest = min(counts["train"][label] + counts["validation"][label] for label in data.labels)
    return "cosine" if rarest <= FEW_PICTURES else "linear"


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


def _how(kind: HeadKind, fitted: FittedHead) -> str:
    setting = ", ".join(f"{name} {value:g}" for name, value in fitted.setting.items())
    return f"The head is of the kind {kind}: {setting}, chosen by {fitted.chosen_by}."
