"""Distil one student trunk from one or several teachers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.augment import Augmentation
from models.backbones import Backbone
from models.batches import Batch, TrainingPictures, pool
from models.data import PictureData
from models.errors import LearningError
from models.evaluate import Estimate, accuracy
from models.fitting import Score, fit
from models.heads import Head, LinearHead, features_of, logits_of
from models.losses import distillation_loss, feature_loss
from models.progress import ProgressCallback, unheard
from models.transfer import freeze_batch_statistics, parameter_groups, score

NUM_EPOCHS = 20
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


"""draft"""
