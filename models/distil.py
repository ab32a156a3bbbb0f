"""Distil one student trunk from one or several teachers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.augment import Augmentation
from models.backbones import Backbone
from models.batches import Batch, TrainingPictures, pool
from models.data import PictureData
from models.errors import LearningError
from models.evaluate import Estimate, accuracy
from models.fitting import Score, fit, freeze_batch_statistics, parameter_groups, score
from models.heads import Head, LinearHead, features_of, logits_of
from models.logistic import choose_logistic_head
from models.losses import distillation_loss, feature_loss, label_loss
from models.progress import ProgressCallback, unheard

NUM_EPOCHS = 16
PATIENCE = 8
BATCH_SIZE = 32
SCRATCH_RATE = 3e-3
TRAINED_RATE = 5e-4
TEMPERATURE = 4.0
SOFT_WEIGHT = 0.9
FEATURE_WEIGHT = 1.0


class DistillationError(LearningError):
    """Teachers and data do not belong together."""


@dataclass(frozen=True)
class Lesson:
    """One teacher with the data of its task.

    Raises:
        DistillationError: the teacher's labels are not those of the data.
    """

    backbone: Backbone
    head: Head
    labels: tuple[str, ...]
    data: PictureData

    def __post_init__(self) -> None:
        if self.labels != self.data.labels:
            raise DistillationError(
                f"The teacher knows the labels {list(self.labels)}, but {self.data.name} has "
                f"{list(self.data.labels)}; expected the data that the teacher learned from."
            )


@dataclass(frozen=True)
class Distillation:
    """A distilled student and how good it is.

    Args:
        heads: The student's own head for each lesson.
        metrics: For each lesson "NAME/validation", "NAME/test", "NAME/teacher_validation" and
            "NAME/teacher_test", NAME being that of its data. Validation also chose the state.
        num_pictures: Pictures in the pool that the student learned from.
    """

    student: Backbone
    heads: tuple[LinearHead, ...]
    metrics: dict[str, Estimate]
    num_pictures: int
    best_epoch: int
    seconds: float


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
        pupil = _Pupil(student, lessons, feature_weight=feature_weight)
        if not from_scratch:
            pupil.fit_heads()
        batches = TrainingPictures(
            pictures,
            [student.preprocessing, *(lesson.backbone.preprocessing for lesson in lessons)],
            augmentation=augmentation,
            batch_size=batch_size,
            seed=seed,
        )
        best_epoch, _ = fit(
            pupil,
            epoch_batches=batches.epoch,
            num_batches=batches.num_batches,
            loss_of=lambda batch: pupil.loss(
                batch, labels[batch.rows], temperature=temperature, soft_weight=soft_weight
            ),
            validate=lambda: pupil.score(lessons),
            before_epoch=lambda: pupil.prepare(from_scratch=from_scratch),
            optimizer=pupil.optimizer(from_scratch=from_scratch, factor=rate_factor),
            num_epochs=num_epochs,
            patience=patience,
            stage="distil",
            progress=progress,
        )
    heads = pupil.task_heads
    metrics = _metrics(student, heads, lessons)
    seconds = time.monotonic() - started
    return Distillation(student, heads, metrics, len(pictures), best_epoch, seconds)


class _Pupil(nn.Module):
    """The student with what it needs while it learns: a head and a projection for each lesson."""

    def __init__(
        self, student: Backbone, lessons: Sequence[Lesson], *, feature_weight: float
    ) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleList(
            LinearHead(student.num_features, len(lesson.labels)) for lesson in lessons
        )
        self.projections = nn.ModuleList(
            nn.Linear(student.num_features, lesson.backbone.num_features) for lesson in lessons
        )
        self.to(student.mean.device)
        # A plain tuple, so that no teacher becomes a part that the optimizer changes.
        self._lessons = tuple(lessons)
        self._feature_weight = feature_weight

    @property
    def task_heads(self) -> tuple[LinearHead, ...]:
        return tuple(head for head in self.heads if isinstance(head, LinearHead))

    def fit_heads(self) -> None:
        """Start each head on the frozen features: random heads would first spoil a trained trunk."""
        for head, lesson in zip(self.task_heads, self._lessons, strict=True):
            fitted, _ = choose_logistic_head(
                features_of(self.student, lesson.data.train, stage="features"),
                lesson.data.train.labels,
                features_of(self.student, lesson.data.validation, stage="features"),
                lesson.data.validation.labels,
                num_classes=len(lesson.labels),
            )
            head.load_state_dict(fitted.state_dict())

    def optimizer(self, *, from_scratch: bool, factor: float) -> torch.optim.AdamW:
        """A trained trunk moves slowly; what is new moves fast."""
        trunk_rate = SCRATCH_RATE if from_scratch else TRAINED_RATE
        new = nn.ModuleList([self.heads, self.projections])
        return torch.optim.AdamW(
            [
                *parameter_groups(self.student, rate=factor * trunk_rate),
                *parameter_groups(new, rate=factor * SCRATCH_RATE),
            ]
        )

    def prepare(self, *, from_scratch: bool) -> None:
        self.train()
        if not from_scratch:
            freeze_batch_statistics(self.student)

    def loss(
        self, batch: Batch, labels: Tensor, *, temperature: float, soft_weight: float
    ) -> Float[Tensor, ""]:
        """Mean over the lessons."""
        device = self.student.mean.device
        features = self.student(batch.images[self.student.preprocessing].to(device))
        losses: list[Tensor] = []
        for at, lesson in enumerate(self._lessons):
            logits, own_labels = self.heads[at](features), labels[:, at].to(device)
            if soft_weight == 0 and self._feature_weight == 0:
                losses.append(label_loss(logits, own_labels))
                continue
            target, teacher_logits = _ask(lesson, batch, device)
            loss = distillation_loss(
                logits, teacher_logits, own_labels, temperature=temperature, soft_weight=soft_weight
            )
            if self._feature_weight:
                hint = feature_loss(self.projections[at](features), target)
                loss = loss + self._feature_weight * hint
            losses.append(loss)
        return torch.stack(losses).mean()

    def score(self, lessons: Sequence[Lesson]) -> Score:
        """Mean over the lessons, each on its own validation pictures."""
        scores = [
            score(self.student, head, lesson.data.validation)
            for head, lesson in zip(self.task_heads, lessons, strict=True)
        ]
        return Score(
            sum(one.accuracy for one in scores) / len(scores),
            sum(one.negative_loss for one in scores) / len(scores),
        )


def _ask(lesson: Lesson, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A teacher's features and logits, on the same crops as the student's."""
    images = batch.images[lesson.backbone.preprocessing].to(lesson.backbone.mean.device)
    with torch.no_grad():
        features = lesson.backbone.eval()(images)
        logits = lesson.head(features)
    return features.to(device), logits.to(device)


def _metrics(
    student: Backbone, heads: Sequence[LinearHead], lessons: Sequence[Lesson]
) -> dict[str, Estimate]:
    metrics: dict[str, Estimate] = {}
    for head, lesson in zip(heads, lessons, strict=True):
        for role, backbone, own_head in (
            ("", student, head),
            ("teacher_", lesson.backbone, lesson.head),
        ):
            for name in ("validation", "test"):
                split = lesson.data.splits[name]
                logits = logits_of(own_head, features_of(backbone, split, stage=name))
                metrics[f"{lesson.data.name}/{role}{name}"] = accuracy(logits, split.labels)
    return metrics


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
