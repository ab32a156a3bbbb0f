"""Train a head that gives a picture any number of labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Backbone
from models.baseline import thumbnails
from models.evaluate import Estimate
from models.feature_cache import FeatureCache, features_by_split
from models.heads import LinearHead, logits_of
from models.logistic import choose_logistic_head, logistic_head
from models.multilabel import MultiLabelData
from models.multilabel_metrics import measure
from models.progress import Progress, ProgressCallback, unheard
from models.thresholds import choose_thresholds

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainedLabels:
    """A head for several labels a picture, and how good it is.

    Args:
        head: One logit a label; its sigmoid is the score.
        thresholds: For each label the least score at which it is given.
        metrics: Those of `measure`, each as "test NAME", with "baseline_test NAME" of "map", "f1"
            and "exact" of the same on thumbnails. Test was looked at once.
        notes: What a user should know.
    """

    head: LinearHead
    thresholds: tuple[float, ...]
    metrics: dict[str, Estimate]
    notes: tuple[str, ...]
    strategy: Literal["linear"] = "linear"


def train_multilabel(
    backbone: Backbone,
    data: MultiLabelData,
    *,
    cache: FeatureCache | None = None,
    progress: ProgressCallback = unheard,
) -> TrainedLabels:
    """Logistic regression for each label on frozen features; nothing is drawn at random.

    Strengths of the penalty and thresholds are chosen on validation, the thresholds by the scores
    of heads that learned from train alone; then each label's head learns from both.

    Raises:
        HeadError: features are not finite.
    """
    pictures = {name: split.pictures for name, split in data.splits.items()}
    features = features_by_split(backbone, pictures, cache=cache, progress=progress)
    head, thresholds = _fit(features, data, progress=progress)
    metrics = {
        f"test {name}": value for name, value in _test(head, thresholds, features, data).items()
    }
    pixels = {name: thumbnails(pictures[name]) for name in pictures}
    baseline = _test(*_fit(pixels, data), pixels, data)
    for name in ("map", "f1", "exact"):
        if name in baseline:
            metrics[f"baseline_test {name}"] = baseline[name]
    return TrainedLabels(head, thresholds, metrics, tuple(_notes(metrics, data, thresholds)))


def _fit(
    features: Features, data: MultiLabelData, *, progress: ProgressCallback = unheard
) -> tuple[LinearHead, tuple[float, ...]]:
    train, validation = features["train"], features["validation"]
    both = torch.cat([train, validation])
    judged, final = (LinearHead(train.shape[1], len(data.labels)) for _ in range(2))
    for place in range(len(data.labels)):
        own, other = data.train.labels[:, place], data.validation.labels[:, place]
        on_train, l2 = choose_logistic_head(train, own, validation, other, num_classes=2)
        on_both = logistic_head(both, torch.cat([own, other]), num_classes=2, l2=l2)
        _set(judged, place, on_train)
        _set(final, place, on_both)
        progress(Progress("labels", place + 1, len(data.labels), data.labels[place]))
    scores = logits_of(judged, validation).sigmoid()
    return final.eval(), choose_thresholds(scores, data.validation.labels)


def _set(head: LinearHead, place: int, of_two: LinearHead) -> None:
    """One label's logit: what its own head says for it, less what it says against it."""
    with torch.no_grad():
        head.weight[place] = of_two.weight[1] - of_two.weight[0]
        head.bias[place] = of_two.bias[1] - of_two.bias[0]


def _test(
    head: LinearHead, thresholds: tuple[float, ...], features: Features, data: MultiLabelData
) -> dict[str, Estimate]:
    scores = logits_of(head, features["test"]).sigmoid()
    return measure(scores, data.test.labels, thresholds, names=data.labels)


def _notes(
    metrics: Mapping[str, Estimate], data: MultiLabelData, thresholds: tuple[float, ...]
) -> list[str]:
    values = ", ".join(
        f"{name} {value:.3f}" for name, value in zip(data.labels, thresholds, strict=True)
    )
    notes = [
        f"A label is given from its threshold on, which has the best F1 on validation: {values}."
    ]
    ours, baseline = metrics.get("test map"), metrics.get("baseline_test map")
    if ours and baseline and ours.value < baseline.value:
        notes.insert(
            0,
            f"The head's mean average precision ({ours}) is worse on test than that of a linear "
            f"model on 16 px thumbnails ({baseline}): the trunk knows little of such pictures.",
        )
    return notes
