"""Distil one student trunk from one or several teachers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.augment import Augmentation
from models.backbones import Backbone
from models.batches import TrainingPictures, pool
from models.data import Picture
from models.evaluate import Estimate, accuracy
from models.fitting import fit
from models.heads import LinearHead, features_of, logits_of
from models.methods import METHOD, METHODS, DistillationError, Method
from models.progress import ProgressCallback, unheard
from models.pupil import Lesson, Pupil

__all__ = ["Distillation", "DistillationError", "Lesson", "distil"]

BATCH_SIZE = 32


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
    method: Method = METHODS[METHOD],
    num_epochs: int | None = None,
    batch_size: int = BATCH_SIZE,
    rate_factor: float = 1.0,
    unlabelled: Sequence[Picture] = (),
    num_views: int | None = None,
    keep_last: bool = False,
    progress: ProgressCallback = unheard,
) -> Distillation:
    """Teach `student`, in place, what every teacher knows about every picture of the pool.

    Args:
        lessons: Teachers with their data. The pool is all their training pictures; labels count
            where a lesson has them. A picture that any lesson holds out is left out of the pool.
        from_scratch: Whether the student starts from random values; else its batch statistics stay.
        augmentation: Drawn once a picture, so that student and teachers see the same crop.
        method: What the student is taught by; `METHODS` has those of the papers.
        num_epochs: At most; half of them without a better validation score end it. None: the usual
            number of the method.
        unlabelled: More pictures for the pool, of which only teachers speak.
        num_views: Fixed views of each picture, about which teachers are asked only once, which
            saves their time from epoch `num_views` on; None draws a new view in every epoch.
            Pictures as they are, with no augmentation and not blended, are always the same.
        keep_last: Keep the student of the last epoch instead of the best on validation.

    Raises:
        DistillationError: no lessons, two of one name, nothing to learn from or to validate on, or
            the method cannot compare these networks.
        TrainingError: a loss is not finite.
    """
    started = time.monotonic()
    num_epochs = method.num_epochs if num_epochs is None else num_epochs
    _check(lessons, method=method, unlabelled=unlabelled, num_views=num_views)
    pictures, labels = pool(
        [lesson.data.train for lesson in lessons],
        [split for lesson in lessons for split in (lesson.data.validation, lesson.data.test)],
        unlabelled=unlabelled,
    )
    if not pictures:
        raise DistillationError(
            "No picture is left to learn from: each is held out by some lesson. "
            "Expected lessons on the same pictures to be split alike."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = TrainingPictures(
            pictures,
            [student.preprocessing, *(lesson.backbone.preprocessing for lesson in lessons)],
            augmentation=augmentation,
            batch_size=batch_size,
            seed=seed,
            num_views=num_views,
            blended=method.blends,
        )
        pupil = Pupil(student, lessons, method, keeps_answers=batches.come_again)
        if not from_scratch:
            pupil.fit_heads()
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
            patience=max(1, num_epochs // 2),
            stage="distil",
            progress=progress,
            keep_last=keep_last,
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
        for name in ("validation", "test"):
            split, where = lesson.data.splits[name], f"{lesson.data.name}/"
            logits = logits_of(head, features_of(student, split, stage=name))
            if name == "test":
                answers.append(logits)
            metrics[f"{where}{name}"] = accuracy(logits, split.labels)
            metrics[f"{where}teacher_{name}"] = accuracy(lesson.answers_to(split), split.labels)
    return metrics, tuple(answers)


def _check(
    lessons: Sequence[Lesson],
    *,
    method: Method,
    unlabelled: Sequence[Picture],
    num_views: int | None,
) -> None:
    if num_views is not None and num_views < 1:
        raise DistillationError(f"num_views={num_views}; expected at least 1.")
    if unlabelled and not method.needs:
        raise DistillationError(
            f"There are {len(unlabelled)} unlabelled pictures, but this method asks no teacher, "
            "so nothing can be learned from them. Choose another method, or leave them out."
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
