"""A student while it learns, and the lessons that it learns from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.backbones import Backbone
from models.batches import Batch
from models.data import PictureData
from models.errors import LearningError
from models.fitting import (
    Score,
    follow_batch_statistics,
    freeze_batch_statistics,
    parameter_groups,
    score,
)
from models.heads import Head, LinearHead, features_of
from models.logistic import choose_logistic_head
from models.losses import distillation_loss, feature_loss, label_loss

SCRATCH_RATE = 3e-3
TRAINED_RATE, FITTED_HEAD_RATE = 5e-4, 1e-3


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


class Pupil(nn.Module):
    """The student, with a head and a projection for each lesson: all that the optimizer changes."""

    def __init__(
        self,
        student: Backbone,
        lessons: Sequence[Lesson],
        *,
        temperature: float,
        soft_weight: float,
        feature_weight: float,
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
        # A plain tuple: teachers are no part of the state that is trained and kept.
        self._lessons = tuple(lessons)
        self._temperature = temperature
        self._soft_weight = soft_weight
        self._feature_weight = feature_weight

    @property
    def task_heads(self) -> tuple[LinearHead, ...]:
        """The head of each lesson."""
        return tuple(head for head in self.heads if isinstance(head, LinearHead))

    def fit_heads(self) -> None:
        """Start each head on frozen features: random heads would first spoil a trained trunk."""
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
        """A trained trunk moves slowly, its heads faster; from scratch all move alike."""
        trunk_rate = SCRATCH_RATE if from_scratch else TRAINED_RATE
        head_rate = SCRATCH_RATE if from_scratch else FITTED_HEAD_RATE
        new = nn.ModuleList([self.heads, self.projections])
        return torch.optim.AdamW(
            [
                *parameter_groups(self.student, rate=factor * trunk_rate),
                *parameter_groups(new, rate=factor * head_rate),
            ]
        )

    def prepare(self, *, from_scratch: bool, num_batches: int) -> None:
        """Training mode; the batch statistics of a trained student stay as they are."""
        self.train()
        if from_scratch:
            follow_batch_statistics(self.student, num_batches=num_batches)
        else:
            freeze_batch_statistics(self.student)

    def loss(self, batch: Batch, labels: Int[Tensor, "batch lessons"]) -> Float[Tensor, ""]:
        """Mean over the lessons."""
        device = self.student.mean.device
        features = self.student(batch.images[self.student.preprocessing].to(device))
        losses = [
            self._lesson_loss(at, features, batch, labels[:, at].to(device))
            for at in range(len(self._lessons))
        ]
        return torch.stack(losses).mean()

    def _lesson_loss(self, at: int, features: Tensor, batch: Batch, labels: Tensor) -> Tensor:
        logits = self.heads[at](features)
        if self._soft_weight == 0 and self._feature_weight == 0:
            return label_loss(logits, labels)
        target, teacher_logits = _ask(self._lessons[at], batch, features.device)
        loss = distillation_loss(
            logits,
            teacher_logits,
            labels,
            temperature=self._temperature,
            soft_weight=self._soft_weight,
        )
        if self._feature_weight == 0:
            return loss
        return loss + self._feature_weight * feature_loss(self.projections[at](features), target)

    def score(self) -> Score:
        """Mean over the lessons, each on its own validation pictures."""
        scores = [
            score(self.student, head, lesson.data.validation)
            for head, lesson in zip(self.task_heads, self._lessons, strict=True)
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
