"""Specification of models/checkpoint.py: teachers and students on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.augment import PHOTOS
from models.backbones import Backbone, build_backbone
from models.checkpoint import (
    CheckpointError,
    load_student,
    load_teacher,
    restore_backbone,
    save_student,
    save_teacher,
    tensors_sha256,
)
from models.evaluate import Estimate
from models.fine_tuning import fine_tuning
from models.heads import CosineHead, Head, LinearHead
from models.record import DataRecord, TaskRecord

LABELS = ("cat", "dog", "eel")
DATA = DataRecord(name="pets", sha256="0" * 64, num_pictures={"train": dict.fromkeys(LABELS, 5)})
METRICS = {"test": Estimate(0.9, 0.8, 0.95, 50)}
IMAGES = torch.arange(32 * 32 * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
IMAGES = IMAGES.reshape(1, 32, 32, 3)


def small(seed: int = 1) -> Backbone:
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=seed)
    return backbone


def write_teacher(folder: Path, head: Head | None = None) -> Backbone:
    backbone = small()
    save_teacher(
        folder, backbone, head or LinearHead(128, 3),
        labels=LABELS, data=DATA, start_sha256=tensors_sha256(backbone),
        fine_tuning=fine_tuning("surgical", block=2, dropout=0.1), augmentation=PHOTOS,
        metrics=METRICS, seed=1, command="headstock teach pets",
    )  # fmt: skip
    return backbone


def write_student(folder: Path) -> Backbone:
    backbone = small()
    task = TaskRecord(labels=LABELS, teacher="resnet18", data=DATA)
    save_student(folder, backbone, tasks=(task,), metrics=METRICS, seed=1, command="distil")
    return backbone


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_a_teacher_comes_back_bit_for_bit(kind: type[Head], tmp_path: Path) -> None:
    """Backbone, head, labels and record are those that were saved."""
    head = kind(128, 3)
    for tensor in head.state_dict().values():
        torch.nn.init.uniform_(tensor.unsqueeze(0), 0.1, 1.0)
    backbone = write_teacher(tmp_path / "new" / "teacher", head)

    teacher = load_teacher(tmp_path / "new" / "teacher")

    with torch.no_grad():
        expected, logits = head(backbone(IMAGES)), teacher.head(teacher.backbone(IMAGES))
    assert torch.equal(expected, logits)
    assert logits.abs().min() > 0
    assert (teacher.labels, teacher.record.metrics) == (LABELS, METRICS)
    assert not teacher.backbone.training


def test_a_student_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Its file of tensors has the keys of the backbone alone, so that a trunk can ship it."""
    backbone = write_student(tmp_path)

    student = load_student(tmp_path)

    assert torch.equal(student.backbone(IMAGES), backbone(IMAGES))
    assert student.record.labels == {"pets": LABELS}
    assert torch.equal(
        restore_backbone("small32", tmp_path / "student.safetensors")(IMAGES), backbone(IMAGES)
    )


def test_the_record_says_how_it_was_made(tmp_path: Path) -> None:
    """Command, seed, preprocessing, data and versions, readable without this program."""
    write_teacher(tmp_path)

    record = json.loads((tmp_path / "teacher.json").read_text())

    assert (record["command"], record["seed"]) == ("headstock teach pets", 1)
    assert record["preprocessing"]["size_px"] == 32
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["data"]["sha256"] == "0" * 64


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    """Nothing in a checkpoint depends on the time or the place."""
    for name in ("a", "b"):
        write_teacher(tmp_path / name)

    for file in ("teacher.json", "teacher.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "one"), ("labels", ["cat"]), ("head", "svm"), ("schema_version", 2),
        ("surplus", 1), ("num_features", 0),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field: str, value: object, tmp_path: Path) -> None:
    """A record that was changed by hand says where."""
    write_teacher(tmp_path)
    change(tmp_path / "teacher.json", **{field: value})

    with pytest.raises(CheckpointError, match=rf"teacher\.json is invalid: {field}"):
        load_teacher(tmp_path)


def test_a_folder_without_a_record_is_no_teacher(tmp_path: Path) -> None:
    """A student's folder is not taken for a teacher's."""
    write_student(tmp_path)

    with pytest.raises(CheckpointError, match=r"is not a teacher: it has no teacher\.json"):
        load_teacher(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    """The record alone is not enough."""
    write_student(tmp_path)
    (tmp_path / "student.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"student\.safetensors is missing"):
        load_student(tmp_path)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    """Half a file is not loaded."""
    write_student(tmp_path)
    path = tmp_path / "student.safetensors"
    path.write_bytes(path.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        load_student(tmp_path)


def test_tensors_of_another_backbone_are_refused(tmp_path: Path) -> None:
    """Names and shapes have to fit completely."""
    write_student(tmp_path)
    change(tmp_path / "student.json", backbone="small32_teacher")

    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        load_student(tmp_path)


def test_a_backbone_that_was_redefined_since_is_noticed(tmp_path: Path) -> None:
    """Preprocessing that differs would lower accuracy without a word."""
    write_student(tmp_path)
    record = json.loads((tmp_path / "student.json").read_text())
    change(tmp_path / "student.json", preprocessing=record["preprocessing"] | {"resize_px": 40})

    with pytest.raises(CheckpointError, match="The record says preprocessing"):
        load_student(tmp_path)


def test_a_users_own_backbone_is_found_again(tmp_path: Path) -> None:
    """The record keeps the import path, and loading runs that file."""
    nets = Path(__file__).parents[1] / "end_to_end" / "my_nets.py"
    backbone, _ = build_backbone(f"{nets}:mobilenet_v1_025", weights=None, allow_untrained=True)
    task = TaskRecord(labels=LABELS, teacher="small32", data=DATA)
    save_student(tmp_path, backbone, tasks=(task,), metrics={}, seed=0, command="x")

    assert load_student(tmp_path).backbone.name == "mobilenet_v1_025"
