"""Teachers and students on disk: a readable record and a file of tensors.

A folder holds `teacher.json` + `teacher.safetensors`, or `student.json` + `student.safetensors`.
Nothing in it is code. But a record may name the user's own file as its backbone, and that file is
run when the checkpoint is loaded; so load checkpoints of your own.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.augment import Augmentation
from models.backbones import Backbone, build_backbone
from models.errors import LearningError
from models.evaluate import Estimate
from models.fine_tuning import FineTuning
from models.heads import CosineHead, Head, LinearHead
from models.record import DataRecord, StudentRecord, TaskRecord, TeacherRecord

TEACHER, STUDENT = "teacher", "student"
# What decides on the numbers: a run with other versions may end elsewhere.
RECORDED_PACKAGES = ("headstock", "numpy", "pillow", "scikit-learn", "torch", "torchvision")

AnyRecord = TypeVar("AnyRecord", TeacherRecord, StudentRecord)


class CheckpointError(LearningError):
    """A folder is no checkpoint, or its record or tensors are not what they should be."""


@dataclass(frozen=True)
class Teacher:
    """A fine-tuned backbone with the head of its own task."""

    backbone: Backbone
    head: Head
    labels: tuple[str, ...]
    record: TeacherRecord


@dataclass(frozen=True)
class Student:
    """A distilled backbone: the trunk before its export."""

    backbone: Backbone
    record: StudentRecord


def save_teacher(
    folder: Path,
    backbone: Backbone,
    head: Head,
    *,
    labels: tuple[str, ...],
    data: DataRecord,
    start_sha256: str,
    fine_tuning: FineTuning,
    augmentation: Augmentation | None,
    metrics: Mapping[str, Estimate],
    seed: int,
    command: str,
) -> Teacher:
    """Write a teacher's folder, made if it is missing.

    Args:
        start_sha256: What `tensors_sha256` said of the backbone before it was fine-tuned.
        command: The command line that made it.
    """
    record = TeacherRecord(
        backbone=backbone.reference,
        cut=backbone.cut,
        num_features=backbone.num_features,
        preprocessing=backbone.preprocessing,
        metrics=dict(metrics),
        seed=seed,
        command=command,
        versions=package_versions(),
        labels=labels,
        head="linear" if isinstance(head, LinearHead) else "cosine",
        data=data,
        start_sha256=start_sha256,
        fine_tuning=fine_tuning,
        augmentation=augmentation,
    )
    tensors = nn.ModuleDict({"backbone": backbone, "head": head}).state_dict()
    _write(folder, TEACHER, record, tensors)
    return Teacher(backbone, head, labels, record)


def save_student(
    folder: Path,
    backbone: Backbone,
    *,
    tasks: tuple[TaskRecord, ...],
    metrics: Mapping[str, Estimate],
    seed: int,
    command: str,
) -> Student:
    """Write a student's folder, made if it is missing.

    Args:
        tasks: What it learned, one for each teacher.
        command: The command line that made it.
    """
    record = StudentRecord(
        backbone=backbone.reference,
        cut=backbone.cut,
        num_features=backbone.num_features,
        preprocessing=backbone.preprocessing,
        metrics=dict(metrics),
        seed=seed,
        command=command,
        versions=package_versions(),
        tasks=tasks,
    )
    _write(folder, STUDENT, record, backbone.state_dict())
    return Student(backbone, record)


def load_teacher(folder: Path) -> Teacher:
    """Read a teacher's folder.

    Raises:
        CheckpointError: no teacher, a field of the record is wrong, or the tensors do not fit.
        BackboneError: the backbone that the record names cannot be built.
    """
    record = _read_record(folder, TEACHER, TeacherRecord)
    backbone = _rebuild(record.backbone, record)
    num_classes = len(record.labels)
    heads: dict[str, type[Head]] = {"linear": LinearHead, "cosine": CosineHead}
    head = heads[record.head](record.num_features, num_classes)
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    _load_tensors(both, folder / f"{TEACHER}.safetensors")
    return Teacher(backbone, head.eval(), record.labels, record)


def load_student(folder: Path) -> Student:
    """Read a student's folder.

    Raises:
        CheckpointError: no student, a field of the record is wrong, or the tensors do not fit.
        BackboneError: the backbone that the record names cannot be built.
    """
    record = _read_record(folder, STUDENT, StudentRecord)
    backbone = _rebuild(record.backbone, record)
    _load_tensors(backbone, folder / f"{STUDENT}.safetensors")
    return Student(backbone, record)


def restore_backbone(reference: str, tensors: Path) -> Backbone:
    """Build a backbone and fill it from a `student.safetensors`, such as a trunk's folder has.

    Raises:
        CheckpointError: the file is missing, damaged or of another backbone.
        BackboneError: the backbone cannot be built.
    """
    backbone, _ = build_backbone(reference, weights=None, allow_untrained=True)
    _load_tensors(backbone, tensors)
    return backbone


def tensors_sha256(module: nn.Module) -> str:
    """Sha256 over the name and bytes of every tensor of a module's state."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Package -> version, of the packages that decide on the numbers."""
    return {name: version(name) for name in RECORDED_PACKAGES}


def _write(
    folder: Path, name: str, record: TeacherRecord | StudentRecord, tensors: dict[str, Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The record last, so that a folder with a record is whole.
    (folder / f"{name}.json").unlink(missing_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(record.model_dump_json(indent=2) + "\n")


def _read_record(folder: Path, name: str, kind: type[AnyRecord]) -> AnyRecord:
    path = folder / f"{name}.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a {name}: it has no {path.name}.")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the whole"
        raise CheckpointError(
            f"{path} is invalid: {field}: {problem['msg']}. It was changed by hand or written by "
            f"another version; make the {name} again."
        ) from error


def _rebuild(reference: str, record: TeacherRecord | StudentRecord) -> Backbone:
    backbone, _ = build_backbone(reference, weights=None, allow_untrained=True)
    for field in ("cut", "num_features", "preprocessing"):
        recorded, built = getattr(record, field), getattr(backbone, field)
        if recorded != built:
            raise CheckpointError(
                f"The record says {field} {recorded}, but {reference} is built with {built} now. "
                "Bring back the backbone's old definition, or train again."
            )
    return backbone


def _load_tensors(module: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it holds the tensors of the checkpoint.")
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the tensors of this backbone: {str(error).splitlines()[-1]}. "
            "The file is damaged or belongs to another checkpoint."
        ) from error
