"""Fine-tune a teacher: its head first, on frozen features, then every layer."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.augment import Augmentation
from models.backbones import Backbone
from models.baseline import pixel_baseline
from models.batches import Batch, TrainingPictures
from models.data import PictureData, Split
from models.evaluate import Estimate, accuracy, balance_notes
from models.fitting import (
    TrainingError,
    fit,
    follow_batch_statistics,
    freeze_batch_statistics,
    parameter_groups,
    score,
)
from models.heads import Head, LinearHead, features_of, logits_of
from models.logistic import choose_logistic_head
from models.progress import ProgressCallback, unheard

NUM_EPOCHS = 12
PATIENCE = 5
BATCH_SIZE = 32
# The head has to move far and the trunk only a little; early layers least, since edges and colours
# are the same in every task (discriminative rates: Howard & Ruder 2018, arXiv:1801.06146).
HEAD_RATE, SUFFIX_RATE, PREFIX_RATE = 1e-3, 3e-4, 1e-4
SCRATCH_RATE = 3e-3


@dataclass(frozen=True)
class Teaching:
    """A taught backbone and how good it is.

    Args:
        backbone: The backbone that was given, its best state on validation.
        metrics: Accuracies: "validation", "test", "baseline_validation", "baseline_test" and,
            for a backbone that came with weights, "head_only_validation". The validation split
            also chose the state, so "validation" is optimistic; test was looked at once.
        best_epoch: 0 if no epoch was better than the head on the backbone as it came.
        notes: What a user should know, such as a teacher worse than the baseline.
    """

    backbone: Backbone
    head: LinearHead
    metrics: dict[str, Estimate]
    best_epoch: int
    seconds: float
    notes: tuple[str, ...]


def teach(
    backbone: Backbone,
    data: PictureData,
    *,
    from_scratch: bool,
    augmentation: Augmentation | None,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    patience: int = PATIENCE,
    batch_size: int = BATCH_SIZE,
    rate_factor: float = 1.0,
    progress: ProgressCallback = unheard,
) -> Teaching:
    """Fine-tune `backbone`, in place, with a linear head for the task.

    Args:
        from_scratch: Whether the backbone starts from random values. Then there is no use in a
            head alone, all layers learn at one higher rate, and batch statistics are learned too.
        augmentation: None trains on the pictures as they are.
        num_epochs: At most; 0 trains the head alone.
        rate_factor: Scales every learning rate.

    Raises:
        TrainingError: validation is empty, or a loss is not finite.
        HeadError: the backbone's features are not finite.
    """
    started = time.monotonic()
    _check(data, num_epochs=num_epochs, from_scratch=from_scratch)
    metrics = pixel_baseline(data, progress=progress)
    head = LinearHead(backbone.num_features, len(data.labels))
    if not from_scratch:
        head = _frozen_head(backbone, data, progress=progress)
        metrics["head_only_validation"] = _accuracy(backbone, head, data.validation)
    head.to(backbone.mean.device)
    best_epoch = 0
    if num_epochs:
        best_epoch = _tune(
            backbone, head, data, from_scratch=from_scratch, augmentation=augmentation, seed=seed,
            num_epochs=num_epochs, patience=patience, batch_size=batch_size,
            rate_factor=rate_factor, progress=progress,
        )  # fmt: skip
    metrics["validation"] = _accuracy(backbone, head, data.validation)
    metrics["test"] = _accuracy(backbone, head, data.test)
    seconds = time.monotonic() - started
    return Teaching(backbone, head.eval(), metrics, best_epoch, seconds, _notes(metrics, data))


def _check(data: PictureData, *, num_epochs: int, from_scratch: bool) -> None:
    if not len(data.validation):
        raise TrainingError(
            f"{data.name} has no validation pictures: every class has a single one to learn from. "
            "Expected at least 2 in some class; add pictures, or train a cosine head."
        )
    if from_scratch and num_epochs == 0:
        raise TrainingError(
            "A backbone from random values cannot be taught with 0 epochs; allow at least 1."
        )


def _frozen_head(
    backbone: Backbone, data: PictureData, *, progress: ProgressCallback
) -> LinearHead:
    train = features_of(backbone, data.train, stage="features", progress=progress)
    validation = features_of(backbone, data.validation, stage="validation features")
    head, _ = choose_logistic_head(
        train,
        data.train.labels,
        validation,
        data.validation.labels,
        num_classes=len(data.labels),
    )
    return head


def _tune(
    backbone: Backbone,
    head: LinearHead,
    data: PictureData,
    *,
    from_scratch: bool,
    augmentation: Augmentation | None,
    seed: int,
    num_epochs: int,
    patience: int,
    batch_size: int,
    rate_factor: float,
    progress: ProgressCallback,
) -> int:
    """Train every layer; the best epoch."""
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    preprocessing, device = backbone.preprocessing, backbone.mean.device
    pictures = TrainingPictures(
        data.train.pictures,
        [preprocessing],
        augmentation=augmentation,
        batch_size=batch_size,
        seed=seed,
    )
    labels = data.train.labels

    def loss_of(batch: Batch) -> Tensor:
        logits = head(backbone(batch.images[preprocessing].to(device)))
        return F.cross_entropy(logits, labels[batch.rows].to(device))

    def before_epoch() -> None:
        both.train()
        if from_scratch:
            follow_batch_statistics(backbone, num_batches=pictures.num_batches)
        else:
            freeze_batch_statistics(backbone)

    # Dropout and stochastic depth draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        best_epoch, _ = fit(
            both,
            epoch_batches=pictures.epoch,
            num_batches=pictures.num_batches,
            loss_of=loss_of,
            validate=lambda: score(backbone, head, data.validation),
            before_epoch=before_epoch,
            start_is_usable=not from_scratch,
            optimizer=_optimizer(backbone, head, from_scratch=from_scratch, factor=rate_factor),
            num_epochs=num_epochs,
            patience=patience,
            stage="teach",
            progress=progress,
        )
    return best_epoch


def _accuracy(backbone: Backbone, head: Head, split: Split) -> Estimate:
    return accuracy(logits_of(head, features_of(backbone, split, stage="test")), split.labels)


def _optimizer(
    backbone: Backbone, head: LinearHead, *, from_scratch: bool, factor: float
) -> torch.optim.AdamW:
    rates = (
        ((backbone.prefix, PREFIX_RATE), (backbone.suffix, SUFFIX_RATE), (head, HEAD_RATE))
        if not from_scratch
        else ((backbone, SCRATCH_RATE), (head, SCRATCH_RATE))
    )
    groups = [
        group for module, rate in rates for group in parameter_groups(module, rate=rate * factor)
    ]
    return torch.optim.AdamW(groups)


def _notes(metrics: Mapping[str, Estimate], data: PictureData) -> tuple[str, ...]:
    notes = balance_notes(data.counts["train"])
    teacher, baseline = metrics["test"], metrics["baseline_test"]
    if teacher.value < baseline.value:
        note = (
            f"Negative transfer: the teacher ({teacher}) is worse on test than a linear model on "
            f"16 px thumbnails ({baseline}). Try other weights, more epochs or lower rates."
        )
        return (note, *notes)
    return notes
