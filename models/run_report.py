"""What a run of `teach` or `distil` reports: its answers, and those of its rivals."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from models import transfer
from models.augment import Augmentation
from models.backbones import Backbone, build_backbone
from models.baseline import pixel_baseline
from models.checkpoint import package_versions
from models.data import PictureData, join
from models.distil import Distillation
from models.evaluate import Estimate
from models.fine_tuning import FineTuning, fine_tuning
from models.heads import features_of
from models.learning_curve import CurvePoint, learning_curve
from models.logbook import Logbook
from models.progress import Progress, ProgressCallback
from models.pupil import Lesson
from models.report import Report, report_task
from models.untrained import FROM_SCRATCH, PIXELS, UNTRAINED, untrained_logits


def teacher_report(
    net: Backbone,
    data: PictureData,
    taught: transfer.Teaching,
    *,
    rivals: Mapping[str, Tensor],
    curve: tuple[CurvePoint, ...],
    weights: str | None,
    logbook: Logbook,
    command: str,
    seed: int,
) -> Report:
    """A teacher, against the same network without its weights and a linear model on pixels.

    Args:
        rivals: What it is compared with -> test logits.
    """
    task = report_task(
        data, taught.test_logits, metrics=taught.metrics, rivals=rivals, learning_curve=curve,
        notes=taught.notes, seed=seed,
    )  # fmt: skip
    return Report(
        kind="teacher", title=f"Teacher of {data.name}",
        facts={**_facts(net), "weights": str(weights)}, tasks=(task,), phases=logbook.phases,
        curves=logbook.curves, command=command, seed=seed, versions=package_versions(),
    )  # fmt: skip


def student_report(
    net: Backbone,
    lessons: Sequence[Lesson],
    distilled: Distillation,
    *,
    logbook: Logbook,
    command: str,
    seed: int,
) -> Report:
    """A student, lesson by lesson; it has no learning curve, since it has seen the pictures."""
    tasks = tuple(
        report_task(
            lesson.data, logits, metrics=_metrics_of(lesson, distilled),
            rivals={PIXELS: pixel_baseline(lesson.data, progress=logbook).test_logits}, seed=seed,
        )
        for lesson, logits in zip(lessons, distilled.test_logits, strict=True)
    )  # fmt: skip
    return Report(
        kind="student", title=f"Student of {', '.join(lesson.data.name for lesson in lessons)}",
        facts=_facts(net), tasks=tasks, phases=logbook.phases, curves=logbook.curves,
        command=command, seed=seed, versions=package_versions(),
    )  # fmt: skip


def curve_of(
    net: Backbone, data: PictureData, *, seed: int, progress: ProgressCallback
) -> tuple[CurvePoint, ...]:
    """On the features as they came, before training sees the pictures."""
    known = join(data.train, data.validation)
    features = features_of(net, known, stage="features", progress=progress)
    return learning_curve(
        features, known.labels, num_classes=len(data.labels), seed=seed, progress=progress
    )


def without_source(
    net: Backbone,
    data: PictureData,
    how: FineTuning,
    *,
    augmentation: Augmentation | None,
    seed: int,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """What the same network reaches on test without the weights: by as much training, or frozen.

    Wang et al. 2019 (arXiv:1811.09751) compare one algorithm with and without its source. From
    random weights all layers learn, at the rate that is usual for it.
    """

    def heard(step: Progress) -> None:
        progress(dataclasses.replace(step, stage=f"{step.stage}, from scratch"))

    if how.num_epochs == 0:
        return {UNTRAINED: untrained_logits(net, data, seed=seed, progress=progress)}
    scratch, _ = build_backbone(net.reference, weights=None, allow_untrained=True, seed=seed)
    usual = fine_tuning("scratch", num_epochs=how.num_epochs, patience=how.patience)
    # What pulls towards the start has nothing to pull to.
    held = dataclasses.replace(how.regularisation, l2_sp=0.0)
    as_much = dataclasses.replace(usual, regularisation=held, schedule=how.schedule)
    taught = transfer.teach(
        scratch, data, as_much, augmentation=augmentation, seed=seed, progress=heard
    )
    return {FROM_SCRATCH: taught.test_logits}


def _facts(net: Backbone) -> dict[str, str]:
    return {
        "backbone": net.name,
        "parameters": f"{net.num_parameters:,}",
        "pictures of": f"{net.preprocessing.size_px} px",
    }


def _metrics_of(lesson: Lesson, distilled: Distillation) -> dict[str, Estimate]:
    """One lesson's accuracies, without its name before them."""
    prefix = f"{lesson.data.name}/"
    return {
        name.removeprefix(prefix): value
        for name, value in distilled.metrics.items()
        if name.startswith(prefix)
    }
