"""A student while it learns, and the lessons that it learns from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.answers import Answer, Memory, features_and_maps
from models.backbones import Backbone
from models.batches import UNKNOWN, Batch
from models.data import PictureData, Split
from models.fitting import (
    Score,
    follow_batch_statistics,
    freeze_batch_statistics,
    parameter_groups,
    score,
)
from models.grids import as_grid, one_size
from models.heads import EXTRACT_BATCH, Head, LinearHead, features_of
from models.logistic import choose_logistic_head
from models.losses import label_loss
from models.methods import DistillationError, Hint, Method

SCRATCH_RATE = 3e-3
TRAINED_RATE, FITTED_HEAD_RATE = 5e-4, 1e-3


@dataclass(frozen=True)
class Lesson:
    """One teacher with the data of its task, and what the teacher was asked already.

    Raises:
        DistillationError: the teacher's labels are not those of the data.
    """

    backbone: Backbone
    head: Head
    labels: tuple[str, ...]
    data: PictureData
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)

    def answers_to(self, split: Split) -> Float[Tensor, "pictures num_classes"]:
        """The teacher's logits for pictures as serving would decode them, on the CPU."""
        batches = split.batches(self.backbone.preprocessing, batch_size=EXTRACT_BATCH)
        answers = [
            self.memory.ask(self.backbone, self.head, batch, with_maps=False, keep=True).logits
            for batch in batches
        ]
        return torch.cat(answers).cpu() if answers else torch.zeros(0, len(self.labels))

    def __post_init__(self) -> None:
        if self.labels != self.data.labels:
            raise DistillationError(
                f"The teacher knows the labels {list(self.labels)}, but {self.data.name} has "
                f"{list(self.data.labels)}; expected the data that the teacher learned from."
            )


class Pupil(nn.Module):
    """The student, with a head and a projection for each lesson: all that the optimizer changes.

    Args:
        keeps_answers: Whether teachers remember what they said, as pictures come again.

    Raises:
        DistillationError: the method compares maps, and those of both networks are no grids.
    """

    def __init__(
        self,
        student: Backbone,
        lessons: Sequence[Lesson],
        method: Method,
        *,
        keeps_answers: bool,
    ) -> None:
        super().__init__()
        self.student = student
        self.heads = nn.ModuleList(
            LinearHead(student.num_features, len(lesson.labels)) for lesson in lessons
        )
        self.projections = nn.ModuleList(
            _projection(student, lesson.backbone, method) for lesson in lessons
        )
        self.to(student.mean.device)
        self._method = method
        self._keeps_answers = keeps_answers
        # A plain tuple: teachers are no part of the state that is trained and kept.
        self._lessons = tuple(lessons)

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
        if self._method.blends:
            labels = torch.full_like(labels, UNKNOWN)
        images = batch.images[self.student.preprocessing]
        features, maps = features_and_maps(
            self.student, images, with_maps="maps" in self._method.needs
        )
        losses = [
            self._lesson_loss(at, Answer(head(features), features, maps), batch, labels[:, at])
            for at, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()

    def _lesson_loss(self, at: int, student: Answer, batch: Batch, labels: Tensor) -> Tensor:
        method, device = self._method, student.logits.device
        labels = labels.to(device)
        loss = method.label_weight * label_loss(student.logits, labels)
        if not method.needs:
            return loss
        lesson = self._lessons[at]
        teacher = lesson.memory.ask(
            lesson.backbone,
            lesson.head,
            batch.images[lesson.backbone.preprocessing],
            with_maps="maps" in method.needs,
            keep=self._keeps_answers,
        )
        if method.soft and method.soft_weight > 0:
            logits = teacher.logits.to(device)
            soft = method.soft(student.logits, logits, labels, method.temperature)
            loss = loss + method.soft_weight * soft
        if method.hint and method.hint_weight > 0:
            hint = self._hint_loss(at, method.hint, student, teacher)
            loss = loss + method.hint_weight * hint
        return loss

    def _hint_loss(self, at: int, hint: Hint, student: Answer, teacher: Answer) -> Tensor:
        device = student.logits.device
        if student.maps is None or teacher.maps is None:
            own, target = student.features, teacher.features.to(device)
            return hint.loss(self.projections[at](own), target)
        own, target = one_size(
            as_grid(student.maps, name=self.student.name),
            as_grid(teacher.maps.to(device), name=self._lessons[at].backbone.name),
        )
        return hint.loss(self.projections[at](own), target)

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


def _projection(student: Backbone, teacher: Backbone, method: Method) -> nn.Module:
    """The student's features or maps to the teacher's width, where the method compares them so."""
    if not method.hint or not method.hint.is_projected or method.hint_weight == 0:
        return nn.Identity()
    if method.hint.reads == "features":
        return nn.Linear(student.num_features, teacher.num_features)
    return nn.Conv2d(_num_channels(student), _num_channels(teacher), 1)


def _num_channels(backbone: Backbone) -> int:
    """Of the maps at the cut, found on one black picture."""
    size_px, device = backbone.preprocessing.size_px, backbone.mean.device
    black = torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8, device=device)
    with torch.no_grad():
        maps = backbone.eval().prefix(backbone.normalise(black))
    return as_grid(maps, name=backbone.name).shape[1]
