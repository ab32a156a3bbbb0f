"""`teacher.json` and `student.json`: what is known of a checkpoint, as plain records."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.augment import Augmentation
from models.evaluate import Estimate
from models.fine_tuning import FineTuning
from models.pictures import Preprocessing

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Labels = Annotated[tuple[str, ...], Field(min_length=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRecord(_Strict):
    """Which data was learned from, without the data."""

    name: str
    sha256: Sha256
    num_pictures: dict[str, dict[str, int]] = Field(description="split -> label -> pictures")


class TaskRecord(_Strict):
    """One task that a student learned, from one teacher."""

    labels: Labels
    teacher: str = Field(description="the teacher's backbone")
    data: DataRecord


class _Record(_Strict):
    schema_version: Literal[1] = 1
    backbone: Annotated[str, Field(min_length=1)]  # a name, or /path/to/my_nets.py:function
    cut: str
    num_features: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    metrics: dict[str, Estimate]
    seed: int
    command: str
    versions: dict[str, str]


class TeacherRecord(_Record):
    """`teacher.json`."""

    labels: Labels
    head: Literal["linear", "cosine"]
    data: DataRecord
    start_sha256: Sha256 = Field(description="of the tensors that fine-tuning began with")
    fine_tuning: FineTuning
    augmentation: Augmentation | None


class StudentRecord(_Record):
    """`student.json`."""

    tasks: Annotated[tuple[TaskRecord, ...], Field(min_length=1)]

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Name of the data -> its labels."""
        return {task.data.name: task.labels for task in self.tasks}
