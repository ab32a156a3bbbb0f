"""Fine-tune a teacher on pictures of its task, and measure what that brought."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from models.augment import Augmentation
from models.backbones import Backbone
from models.baseline import pixel_baseline
from models.batches import Batch, TrainingPictures
from models.data import PictureData, Split
from models.evaluate import Estimate, accuracy, balance_notes
from models.fine_tuning import FineTuning, FineTuningError
from models.fitting import Epoch, TrainingError, fit, score
from models.heads import Head, LinearHead, features_of, logits_of
from models.logistic import choose_logistic_head
from models.progress import ProgressCallback, unheard
from models.rate_finder import RateSweep, sweep_rates
from models.regularisers import balanced_chances
from models.resume import Snapshot
from models.tuned import Tuned


@dataclass(frozen=True)
class Teaching:
    """A taught backbone and how good it is.

    Args:
        backbone: The backbone that was given, its best state on validation.
        metrics: Accuracies: "validation", "test", "baseline_validation", "baseline_test" and,
            where the head was fitted first, "head_only_validation". The validation split also chose
            the state, so "validation" is optimistic; test was looked at once.
        best_epoch: 0 if no epoch was better than the head on the backbone as it came.
        epochs: What each epoch brought.
        notes: What a user should know, such as a teacher worse than the baseline.
        test_logits: Its answers on the test split.
        baseline_logits: Those of the linear model on pixels.
    """

    backbone: Backbone
    head: LinearHead
    metrics: dict[str, Estimate]
    best_epoch: int
    epochs: tuple[Epoch, ...]
    seconds: float
    notes: tuple[str, ...]
    test_logits: Float[Tensor, "pictures num_classes"]
    baseline_logits: Float[Tensor, "pictures num_classes"]


def teach(
    backbone: Backbone,
    data: PictureData,
    how: FineTuning,
    *,
    augmentation: Augmentation | None,
    seed: int,
    snapshot: Snapshot | None = None,
    progress: ProgressCallback = unheard,
) -> Teaching:
    """Fine-tune `backbone`, in place, with a linear head for the task.

    Args:
        augmentation: None trains on the pictures as they are.
        snapshot: See `models.fitting.fit`; None if an interrupted run may start anew.

    Raises:
        TrainingError: validation is empty, or a loss is not finite.
        FineTuningError: the backbone has no block of the number that is asked for.
        HeadError: the backbone's features are not finite.
    """
    started = time.monotonic()
    _check(data)
    baseline = pixel_baseline(data, progress=progress)
    metrics = baseline.metrics
    head = _first_head(backbone, data, how, progress=progress)
    if how.probes_head:
        metrics["head_only_validation"] = _accuracy(backbone, head, data.validation)
    tuned = Tuned(backbone, head, data, how)
    pictures = training_pictures(backbone, data, how, augmentation=augmentation, seed=seed)
    # Dropout, stochastic depth and mixing draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fitted = fit(
            tuned.network,
            epoch_batches=pictures.epoch,
            num_batches=pictures.num_batches,
            loss_of=tuned.loss,
            validate=lambda: score(backbone, head, data.validation),
            before_epoch=lambda epoch: tuned.prepare(epoch, num_batches=pictures.num_batches),
            start_is_usable=how.probes_head,
            optimizer=tuned.optimizer(),
            num_epochs=how.num_epochs,
            patience=how.patience,
            stage="teach",
            progress=progress,
            schedule=how.schedule,
            average=tuned.average(pictures),
            snapshot=snapshot,
        )
    metrics["validation"] = _accuracy(backbone, head, data.validation)
    test_logits = logits_of(head, features_of(backbone, data.test, stage="test", progress=progress))
    metrics["test"] = accuracy(test_logits, data.test.labels)
    return Teaching(
        backbone.requires_grad_(requires_grad=True),
        head.eval(),
        metrics,
        fitted.best_epoch,
        fitted.epochs,
        time.monotonic() - started,
        (*_notes(metrics, data), *_choice(tuned)),
        test_logits,
        baseline.test_logits,
    )


def find_rate(
    backbone: Backbone,
    data: PictureData,
    how: FineTuning,
    *,
    augmentation: Augmentation | None,
    seed: int,
    progress: ProgressCallback = unheard,
) -> RateSweep:
    """What the loss does while the rate rises, with all other settings; spoils the backbone.

    Raises:
        FineTuningError: with the strategy nothing learns by steps.
        LearningError: see `teach`.
    """
    _check(data)
    if not how.num_epochs:
        raise FineTuningError(
            "There is no rate to find where only the head is fitted; expected at least 1 epoch, "
            "and another strategy than linear."
        )
    tuned = Tuned(backbone, _first_head(backbone, data, how, progress=progress), data, how)
    pictures = training_pictures(backbone, data, how, augmentation=augmentation, seed=seed)

    def batches() -> Iterator[Batch]:
        for epoch in count(1):
            # Gradual unfreezing would change what is measured while it is measured.
            tuned.prepare(how.num_epochs, num_batches=pictures.num_batches)
            yield from pictures.epoch(epoch)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sweep_rates(tuned.optimizer(), batches(), tuned.loss, progress=progress)


def _check(data: PictureData) -> None:
    if not len(data.validation):
        raise TrainingError(
            f"{data.name} has no validation pictures: every class has a single one to learn from. "
            "Expected at least 2 in some class; add pictures, or train a cosine head."
        )


def _first_head(
    backbone: Backbone, data: PictureData, how: FineTuning, *, progress: ProgressCallback
) -> LinearHead:
    device = backbone.mean.device
    if not how.probes_head:
        return LinearHead(backbone.num_features, len(data.labels)).to(device)
    train = features_of(backbone, data.train, stage="features", progress=progress)
    validation = features_of(backbone, data.validation, stage="validation features")
    head, _ = choose_logistic_head(
        train,
        data.train.labels,
        validation,
        data.validation.labels,
        num_classes=len(data.labels),
    )
    return head.to(device)


def training_pictures(
    backbone: Backbone,
    data: PictureData,
    how: FineTuning,
    *,
    augmentation: Augmentation | None,
    seed: int,
) -> TrainingPictures:
    """The training split in batches, classes drawn alike if that is asked for."""
    is_drawn = how.regularisation.balance == "sampling"
    return TrainingPictures(
        data.train.pictures,
        [backbone.preprocessing],
        augmentation=augmentation,
        batch_size=how.batch_size,
        seed=seed,
        chances=balanced_chances(data.train.labels) if is_drawn else None,
    )


def _accuracy(backbone: Backbone, head: Head, split: Split) -> Estimate:
    return accuracy(logits_of(head, features_of(backbone, split, stage="test")), split.labels)


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


def _choice(tuned: Tuned) -> Iterator[str]:
    """Why surgical fine-tuning took the block that it took."""
    if (chosen := tuned.chosen_block) is None or not tuned.gradient_norms:
        return
    norms = ", ".join(
        f"{number} ({block.name}) {norm:.2g}"
        for number, (block, norm) in enumerate(
            zip(tuned.blocks, tuned.gradient_norms, strict=True), start=1
        )
    )
    yield f"The block at {chosen.name} was fine-tuned; gradients for their size: {norms}."
