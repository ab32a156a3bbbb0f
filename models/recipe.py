"""From a folder of pictures to a teacher's folder, from teachers to a student's: whole recipes.

What the command line and the demo call; each function reads like the steps that it takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import transfer
from models.augment import DRAWINGS, PHOTOS, RANDAUGMENT, Augmentation
from models.backbones import Backbone, build_backbone
from models.checkpoint import (
    load_teacher,
    package_versions,
    save_student,
    save_teacher,
    tensors_sha256,
)
from models.data import DataError, PictureData, to_batch
from models.digits import DIGIT_TASKS, load_digit_task
from models.distil import (
    Distillation,
    DistillationError,
    Lesson,
    distil,
)
from models.fine_tuning import FineTuning, FineTuningError
from models.fine_tuning import fine_tuning as fine_tuning  # noqa: PLC0414 (its door)
from models.folders import load_folder, read_pictures
from models.logbook import Logbook
from models.methods import METHOD, MethodName, find_method
from models.progress import ProgressCallback, unheard
from models.rate_finder import RateSweep
from models.record import TaskRecord
from models.report import Report
from models.report_page import write_report
from models.resume import Snapshot
from models.run_report import curve_of, student_report, teacher_report, without_source
from models.untrained import PIXELS
from models.weights import WeightsReport

SAMPLES = "samples.safetensors"
NUM_SAMPLES = 32  # pictures kept beside a student, so that its export is checked on real ones

AUGMENTATIONS: Mapping[str, Augmentation | None] = {
    "photos": PHOTOS,
    "randaugment": RANDAUGMENT,
    "drawings": DRAWINGS,
    "none": None,
}


@dataclass(frozen=True)
class MadeTeacher:
    """A teacher that was written to its folder, with its report."""

    data: PictureData
    taught: transfer.Teaching
    weights: WeightsReport
    report: Report


@dataclass(frozen=True)
class MadeStudent:
    """A student that was written to its folder, with its report.

    Args:
        teacher_parameters: Learned values of each teacher's backbone.
    """

    lessons: tuple[Lesson, ...]
    distilled: Distillation
    weights: WeightsReport
    teacher_parameters: tuple[int, ...]
    report: Report


def read_data(source: str, *, seed: int, progress: ProgressCallback = unheard) -> PictureData:
    """A folder of pictures, or one of the digits tasks by its name if there is no such folder.

    Raises:
        DataError: neither, or the folder cannot be learned from.
    """
    if Path(source).exists():
        return load_folder(Path(source), seed=seed, progress=progress)
    for task in DIGIT_TASKS:
        if source == task:
            return load_digit_task(task, seed=seed)
    raise DataError(
        f"There is no folder {source}; expected one with a subfolder a class, or one of "
        f"{', '.join(DIGIT_TASKS)} (scikit-learn's handwritten digits)."
    )


def default_augmentation(data: PictureData) -> str:
    """Photos may be mirrored; writing may not."""
    return "drawings" if data.name in DIGIT_TASKS else "photos"


def make_teacher(
    source: str,
    out: Path,
    *,
    backbone: str,
    weights: str | None,
    how: FineTuning,
    augmentation: str | None,
    seed: int,
    command: str,
    compare: bool = True,
    progress: ProgressCallback = unheard,
) -> MadeTeacher:
    """Fine-tune a teacher on a folder of pictures and write its folder.

    A run that was interrupted goes on after its last whole epoch when it is asked for again.

    Args:
        augmentation: A key of `AUGMENTATIONS`; None chooses by the kind of data.
        compare: Train the same network from random weights too, to see whether the weights help.

    Raises:
        LearningError: data, weights, backbone or training are not what they have to be.
    """
    logbook = Logbook(progress)
    data = read_data(source, seed=seed, progress=logbook)
    net, report = _start(backbone, weights=weights, how=how, seed=seed)
    start_sha256 = tensors_sha256(net)
    chosen = AUGMENTATIONS[augmentation or default_augmentation(data)]
    run = repr((data.fingerprint, net.reference, start_sha256, how, chosen, seed))
    snapshot = Snapshot(out.with_name(f"{out.name}.unfinished"), f"{run} {package_versions()}")
    curve = curve_of(net, data, seed=seed, progress=logbook) if report.is_trained else ()
    taught = transfer.teach(
        net, data, how, augmentation=chosen, seed=seed, snapshot=snapshot, progress=logbook
    )
    rivals = {PIXELS: taught.baseline_logits}
    if report.is_trained and compare:
        rivals |= without_source(net, data, how, augmentation=chosen, seed=seed, progress=logbook)
    save_teacher(
        out,
        taught.backbone,
        taught.head,
        labels=data.labels,
        data=data.record(),
        start_sha256=start_sha256,
        fine_tuning=how,
        augmentation=chosen,
        metrics=taught.metrics,
        seed=seed,
        command=command,
    )
    told = teacher_report(
        net, data, taught, rivals=rivals, curve=curve, weights=weights, logbook=logbook,
        command=command, seed=seed,
    )  # fmt: skip
    write_report(out, told, [data])
    snapshot.remove()
    return MadeTeacher(data, taught, report, told)


def find_rate(
    source: str,
    out: Path,
    *,
    backbone: str,
    weights: str | None,
    how: FineTuning,
    augmentation: str | None,
    seed: int,
    progress: ProgressCallback = unheard,
) -> RateSweep:
    """Let the learning rate rise step by step, and write `rates.svg` and `rates.json` into `out`.

    Raises:
        LearningError: data, weights, backbone or settings are not what they have to be.
    """
    data = read_data(source, seed=seed, progress=progress)
    net, _ = _start(backbone, weights=weights, how=how, seed=seed)
    chosen = AUGMENTATIONS[augmentation or default_augmentation(data)]
    sweep = transfer.find_rate(net, data, how, augmentation=chosen, seed=seed, progress=progress)
    sweep.write(out)
    return sweep


def _start(
    backbone: str, *, weights: str | None, how: FineTuning, seed: int
) -> tuple[Backbone, WeightsReport]:
    is_from_scratch = how.strategy == "scratch"
    if is_from_scratch and weights is not None:
        raise FineTuningError(
            f"The strategy scratch starts from random values, and weights {weights} were given; "
            "leave out one of the two."
        )
    return build_backbone(backbone, weights=weights, allow_untrained=is_from_scratch, seed=seed)


def make_student(
    teachers: Sequence[Path],
    sources: Sequence[str],
    out: Path,
    *,
    student: str,
    weights: str | None,
    augmentation: str | None,
    seed: int,
    command: str,
    num_epochs: int | None = None,
    method: MethodName = METHOD,
    changes: Mapping[str, float] = MappingProxyType({}),
    unlabelled: Sequence[Path] = (),
    num_views: int | None = None,
    keep_last: bool = False,
    progress: ProgressCallback = unheard,
) -> MadeStudent:
    """Distil a student from teachers and the data that they learned from, and write its folder.

    Args:
        augmentation: A key of `AUGMENTATIONS`; None chooses by the kind of data.
        num_epochs: None: the usual number of the method.
        method: What teaches the student.
        changes: Weights and temperature of the method, by the names of `find_method`.
        num_views: This and `keep_last` are those of `distil`.
        unlabelled: Folders of more pictures, in any subfolders.

    Raises:
        LearningError: data, weights, backbones or training are not what they have to be.
    """
    if len(teachers) != len(sources):
        raise DistillationError(
            f"There are {len(teachers)} teachers and {len(sources)} data; give one for each, in "
            "the same order."
        )
    logbook = Logbook(progress)
    chosen = find_method(method, **changes)
    known = [load_teacher(folder) for folder in teachers]
    lessons = tuple(
        Lesson(
            teacher.backbone,
            teacher.head,
            teacher.labels,
            # The teacher's own seed, so that nothing it trained on is tested on.
            read_data(source, seed=teacher.record.seed, progress=logbook),
        )
        for teacher, source in zip(known, sources, strict=True)
    )
    net, report = build_backbone(student, weights=weights, allow_untrained=True, seed=seed)
    more = [picture for folder in unlabelled for picture in read_pictures(folder)]
    distilled = distil(
        net,
        lessons,
        from_scratch=not report.is_trained,
        augmentation=AUGMENTATIONS[augmentation or default_augmentation(lessons[0].data)],
        seed=seed,
        num_epochs=num_epochs,
        method=chosen,
        unlabelled=more,
        num_views=num_views,
        keep_last=keep_last,
        progress=logbook,
    )
    tasks = tuple(
        TaskRecord(
            labels=lesson.labels, teacher=lesson.backbone.reference, data=lesson.data.record()
        )
        for lesson in lessons
    )
    save_student(out, net, tasks=tasks, metrics=distilled.metrics, seed=seed, command=command)
    save_file({"pictures": _samples(lessons, net)}, out / SAMPLES)
    sizes = tuple(teacher.backbone.num_parameters for teacher in known)
    told = student_report(net, lessons, distilled, logbook=logbook, command=command, seed=seed)
    write_report(out, told, [lesson.data for lesson in lessons])
    return MadeStudent(lessons, distilled, report, sizes, told)


def load_samples(folder: Path) -> UInt8[Tensor, "pictures height width 3"]:
    """The pictures that were kept beside a student.

    Raises:
        DataError: they are missing.
    """
    if not (folder / SAMPLES).is_file():
        raise DataError(f"{folder / SAMPLES} is missing; distil the student again.")
    return load_file(folder / SAMPLES)["pictures"]


def _samples(lessons: Sequence[Lesson], net: Backbone) -> UInt8[Tensor, "pictures height width 3"]:
    each = -(-NUM_SAMPLES // len(lessons))
    return torch.cat(
        [to_batch(lesson.data.test.pictures[:each], net.preprocessing) for lesson in lessons]
    )
