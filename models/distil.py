"""Distil one student trunk from one or several teachers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.augment import Augmentation
from models.backbones import Backbone
from models.batches import TrainingPictures, pool
from models.evaluate import Estimate, accuracy
from models.fitting import fit
from models.heads import LinearHead, features_of, logits_of
from models.progress import ProgressCallback, unheard
from models.pupil import DistillationError, Lesson, Pupil

__all__ = ["Distillation", "DistillationError", "Lesson", "distil"]

NUM_EPOCHS = 16
PATIENCE = 8
BATCH_SIZE = 32
# Hinton et al. find 2.5 to 4 best for small students (2015, section 3); the shares are assumed.
TEMPERATURE = 4.0
SOFT_WEIGHT = 0.9
FEATURE_WEIGHT = 1.0


@dataclass(frozen=True)
class Distillation:
    """A distilled student and how good it is.

    Args:
        heads: The student's own head for each lesson.
        metrics: For each lesson "NAME/validation", "NAME/test", "NAME/teacher_validation" and
            "NAME/teacher_test", NAME being that of its data. Validation also chose the state.
        num_pictures: Pictures in the pool that the student learned from.
        test_logits: The student's answers on the test split of each lesson.
    """

    student: Backbone
    heads: tuple[LinearHead, ...]
    metrics: dict[str, Estimate]
    num_pictures: int
    best_epoch: int
    seconds: float
    test_logits: tuple[Tensor, ...]


def distil(
    student: Backbone,
    lessons: Sequence[Lesson],
    *,
    from_scratch: bool,
    augmentation: Augmentation | None,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    patience: int = PATIENCE,
    batch_size: int = BATCH_SIZE,
    rate_factor: float = 1.0,
    temperature: float = TEMPERATURE,
    soft_weight: float = SOFT_WEIGHT,
    feature_weight: float = FEATURE_WEIGHT,
    progress: ProgressCallback = unheard,
) -> Distillation:
    """Teach `student`, in place, what every teacher knows about every picture of the pool.

    Args:
        lessons: Teachers with their data. The pool is all their training pictures; labels count
            where a lesson has them. A picture that any lesson holds out is left out of the pool.
        from_scratch: Whether the student starts from random values; else its batch statistics stay.
        augmentation: Drawn once a picture, so that student and teachers see the same crop.
        temperature: Softening factor of the predictions, above 0.
        soft_weight: Share of the teachers' predictions against labels, from 0 to 1.
        feature_weight: Weight of feature matching, at least 0. With both weights 0 no teacher is
            asked: training without distillation, for comparison.

    Raises:
        DistillationError: no lessons, two of one name, a weight out of range, or nothing to learn
            from or to validate on.
        TrainingError: a loss is not finite.
    """
    started = time.monotonic()
    _check(lessons, temperature=temperature, soft_weight=soft_weight, feature_weight=feature_weight)
    pictures, labels = pool(
        [lesson.data.train for lesson in lessons],
        [split for lesson in lessons for split in (lesson.data.validation, lesson.data.test)],
    )
    if not pictures:
        raise DistillationError(
            "No picture is left to learn from: each is held out by some lesson. "
            "Expected lessons on the same pictures to be split alike."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pupil = Pupil(
            student,
            lessons,
            temperature=temperature,
            soft_weight=soft_weight,
            feature_weight=feature_weight,
        )
        if not from_scratch:
            pupil.fit_heads()
        batches = TrainingPictures(
            pictures,
            [student.preprocessing, *(lesson.backbone.preprocessing for lesson in lessons)],
            augmentation=augmentation,
            batch_size=batch_size,
            seed=seed,
        )
        fitted = fit(
            pupil,
            epoch_batches=batches.epoch,
            num_batches=batches.num_batches,
            loss_of=lambda batch: pupil.loss(batch, labels[batch.rows]),
            validate=pupil.score,
            before_epoch=lambda _epoch: pupil.prepare(
                from_scratch=from_scratch, num_batches=batches.num_batches
            ),
            start_is_usable=not from_scratch,
            optimizer=pupil.optimizer(from_scratch=from_scratch, factor=rate_factor),
            num_epochs=num_epochs,
            patience=patience,
            stage="distil",
            progress=progress,
        )
    heads = pupil.task_heads
    metrics, test_logits = _metrics(student, heads, lessons)
    seconds = time.monotonic() - started
    return Distillation(
        student, heads, metrics, len(pictures), fitted.best_epoch, seconds, test_logits
    )


def _metrics(
    student: Backbone, heads: Sequence[LinearHead], lessons: Sequence[Lesson]
) -> tuple[dict[str, Estimate], tuple[Tensor, ...]]:
    """Accuracies of student and teachers, and the student's answers on test."""
    metrics: dict[str, Estimate] = {}
    answers: list[Tensor] = []
    for head, lesson in zip(heads, lessons, strict=True):
        for role, backbone, own_head in (
            ("", student, head),
            ("teacher_", lesson.backbone, lesson.head),
        ):
            for name in ("validation", "test"):
                split = lesson.data.splits[name]
                logits = logits_of(own_head, features_of(backbone, split, stage=name))
                metrics[f"{lesson.data.name}/{role}{name}"] = accuracy(logits, split.labels)
                if (role, name) == ("", "test"):
                    answers.append(logits)
    return metrics, tuple(answers)


def _check(
    lessons: Sequence[Lesson], *, temperature: float, soft_weight: float, feature_weight: float
) -> None:
    if not (temperature > 0 and 0 <= soft_weight <= 1 and feature_weight >= 0):
        raise DistillationError(
            f"temperature={temperature}, soft_weight={soft_weight}, "
            f"feature_weight={feature_weight}; expected temperature > 0, "
            "0 <= soft_weight <= 1 and feature_weight >= 0."
        )
    if not lessons:
        raise DistillationError("There is no teacher to learn from; expected at least one.")
    names = [lesson.data.name for lesson in lessons]
    if len(set(names)) < len(names):
        raise DistillationError(f"Two lessons share a name: {names}; give each data its own.")
    for lesson in lessons:
        if not len(lesson.data.validation):
            raise DistillationError(
                f"{lesson.data.name} has no validation pictures; expected at least 2 pictures to "
                "learn from in some class."
            )
