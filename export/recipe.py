"""From a student's folder to a trunk, from a folder of pictures to a bundle: whole recipes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.adapter import Adapter
from export.bundle import (
    STUDENT,
    TRUNK_ADAPTED,
    TRUNK_GRAPH,
    Bundle,
    Precision,
    TrunkManifest,
    read_trunk_folder,
)
from export.errors import ExportError
from export.head import NUM_GOLDEN, bundle_head, spread
from export.heldout import heldout_of
from export.provenance import provenance_of
from export.tail import bundle_tail
from export.trunk import TrunkReport, export_trunk
from export.variants import PrecisionRefusedError as PrecisionRefusedError  # noqa: PLC0414 (its door)
from export.variants import Variants, find_variants
from models.checkpoint import load_student, restore_backbone
from models.comparison import Strategy
from models.data import PictureData, Split, to_batch
from models.digits import DIGIT_TRAITS, load_digit_traits
from models.errors import LearningError
from models.feature_cache import FeatureCache
from models.feature_cache import default_folder as default_folder  # noqa: PLC0414 (its door)
from models.head_kinds import HeadKind, is_head_kind
from models.head_report import head_report
from models.label_table import has_label_table
from models.logbook import Logbook
from models.multilabel import MultiLabelData, load_label_folder
from models.progress import ProgressCallback, unheard
from models.recipe import load_samples, read_data
from models.report import Report
from models.report_page import write_report
from models.specialise import WIDTH
from models.train_multilabel import TrainedLabels, train_multilabel
from models.train_task import TrainedTask, compare_strategies, train_task


@dataclass(frozen=True)
class MadeHead:
    """A head, an adapter or a tail that was trained and bundled, with its report."""

    data: PictureData
    trained: TrainedTask
    bundle: Bundle
    report: Report

    def write(self, out: Path) -> None:
        """Write the bundle to a folder, and the report beside it: everything in a bundle is named.

        Raises:
            BundleError: see `Bundle.write`.
            DataError: a picture that the report shows cannot be read any more.
        """
        self.bundle.write(out)
        write_report(report_folder(out), self.report, [self.data])


@dataclass(frozen=True)
class MadeLabels:
    """A head that gives a picture any number of labels, trained and bundled."""

    data: MultiLabelData
    trained: TrainedLabels
    bundle: Bundle


def report_folder(bundle: Path) -> Path:
    """Where the report of a bundle's folder is."""
    return bundle.with_name(f"{bundle.name}.report")


def make_trunk(
    student: Path,
    out: Path,
    *,
    precision: Precision | Literal["auto"] = "fp32",
    sources: Sequence[str] = (),
    command: str,
    progress: ProgressCallback = unheard,
) -> TrunkReport:
    """Export a student's folder as a trunk's, with a variant if another precision is asked for.

    Args:
        sources: Folders of pictures or digits tasks, for calibration and for heads that judge.

    Raises:
        LearningError: no student, its backbone cannot be built, or the data cannot be read.
        ExportError: the graph does not compute what the student does, or the precision is refused;
            then nothing is written.
    """
    known = load_student(student)
    samples = load_samples(student)
    # The student's own seed, so that nothing it learned from is tested on.
    seed = known.record.seed
    tasks = [read_data(source, seed=seed, progress=progress) for source in sources]

    def find(graph: bytes) -> Variants:
        return find_variants(
            graph,
            precision,
            tasks,
            samples.numpy(),
            known.backbone.preprocessing,
            progress=progress,
        )

    return export_trunk(
        known.backbone,
        samples,
        out,
        provenance=provenance_of(command=command, seed=seed),
        find=find,
        progress=progress,
    )


def make_head(
    source: str,
    trunk: Path,
    *,
    task: str,
    strategy: Strategy | HeadKind | Literal["auto"] = "head",
    width: int = WIDTH,
    seed: int,
    command: str,
    max_train: int | None = None,
    cache: Path | None = None,
    progress: ProgressCallback = unheard,
) -> MadeHead:
    """Train a head, an adapter or a tail for a folder of pictures on a trunk, and bundle it.

    Args:
        strategy: "head" chooses its kind by the number of pictures; "auto" compares all sizes and
            takes the smallest that does not lose; see
            `models.comparison.smallest_that_does_not_lose`.
        width: Rank of "lora", channels of "adapter".
        max_train: Learn from about so many pictures, and from all of them if it is None.
        cache: Folder of features that were computed before; None: they are not kept.

    Raises:
        LearningError: the data or the trunk's backbone are not what they have to be.
        ExportError: no student in the trunk's folder, or the graph is not what was trained.
        BundleError: no trunk, or the task's name is not one.
    """
    manifest, files = _trunk_to_learn_on(trunk)
    logbook = Logbook(progress)
    backbone = restore_backbone(manifest.backbone, trunk / STUDENT)
    data = read_data(source, seed=seed, progress=logbook)
    if max_train is not None:
        # The head learns from validation too, once that has chosen its setting.
        data = dataclasses.replace(
            data,
            train=_every_nth(data.train, max_train * 3 // 4),
            validation=_every_nth(data.validation, max_train // 4),
        )
    features = None if cache is None else FeatureCache(cache, manifest.digest)
    if strategy == "auto":
        trained = compare_strategies(
            backbone, data, width=width, seed=seed, cache=features, progress=logbook
        )
    else:
        kind = strategy if is_head_kind(strategy) else None
        trained = train_task(
            backbone, data, strategy="head" if is_head_kind(strategy) else strategy, kind=kind,
            width=width, seed=seed, cache=features, progress=logbook,
        )  # fmt: skip
    report = head_report(
        task, backbone, data, trained, trunk=manifest.digest, logbook=logbook, command=command,
        seed=seed,
    )  # fmt: skip
    (found,) = report.tasks
    golden = spread(data.test.labels, NUM_GOLDEN)
    about: dict[str, Any] = {
        "task": task,
        "labels": data.labels,
        "trunk": manifest,
        "trunk_graph": files[TRUNK_GRAPH],
        "pictures": to_batch([data.test.pictures[row] for row in golden], manifest.preprocessing),
        "picture_labels": data.test.labels[golden],
        "data": data.record(),
        "metrics": {**found.metrics, **found.test_scores},
        "provenance": provenance_of(command=command, seed=seed),
        "verdict": found.verdict,
        "notes": found.notes,
        "heldout": heldout_of(data.test, manifest.preprocessing, seed=seed),
    }
    bundle = _bundle(trained, about, adapted_graph=files.get(TRUNK_ADAPTED))
    return MadeHead(data, trained, bundle, report)


def make_label_head(
    data: MultiLabelData,
    trunk: Path,
    *,
    task: str,
    strategy: str = "linear",
    seed: int,
    command: str,
    cache: Path | None = None,
    progress: ProgressCallback = unheard,
) -> MadeLabels:
    """Train a head that gives a picture any number of labels, and bundle it with its thresholds.

    Args:
        strategy: "linear", or "head", which is the same here.
        cache: See `make_head`.

    Raises:
        LearningError: another strategy, or see `train_multilabel`.
        ExportError: see `make_head`.
        BundleError: see `make_head`.
    """
    if strategy not in {"head", "linear"}:
        raise LearningError(
            f"The strategy is {strategy!r}, and the pictures of {data.name} have any number of "
            "labels each; expected 'linear', the only one for such pictures."
        )
    manifest, files = _trunk_to_learn_on(trunk)
    features = None if cache is None else FeatureCache(cache, manifest.digest)
    backbone = restore_backbone(manifest.backbone, trunk / STUDENT)
    trained = train_multilabel(backbone, data, cache=features, progress=progress)
    golden = spread(data.test.combinations, NUM_GOLDEN)
    bundle = bundle_head(
        trained.head,
        task=task,
        labels=data.labels,
        trunk=manifest,
        trunk_graph=files[TRUNK_GRAPH],
        pictures=to_batch([data.test.pictures[row] for row in golden], manifest.preprocessing),
        picture_labels=data.test.combinations[golden],
        data=data.record(),
        metrics=trained.metrics,
        provenance=provenance_of(command=command, seed=seed),
        link="sigmoid",
        thresholds=trained.thresholds,
        notes=trained.notes,
        heldout=heldout_of(data.test, manifest.preprocessing, seed=seed),
    )
    return MadeLabels(data, trained, bundle)


def read_label_data(
    source: str, *, seed: int, progress: ProgressCallback = unheard
) -> MultiLabelData | None:
    """A folder with a labels.csv or the digits' traits; None if the source is neither.

    Raises:
        DataError: the folder cannot be learned from.
    """
    if has_label_table(Path(source)):
        return load_label_folder(Path(source), seed=seed, progress=progress)
    return load_digit_traits(seed=seed) if source == DIGIT_TRAITS else None


def _trunk_to_learn_on(trunk: Path) -> tuple[TrunkManifest, Mapping[str, bytes]]:
    manifest, files = read_trunk_folder(trunk)
    if STUDENT not in files:
        raise ExportError(
            f"{trunk} has no {STUDENT}, which heads are trained on; use the folder that "
            "`headstock export` wrote."
        )
    return manifest, files


def _bundle(trained: TrainedTask, about: dict[str, Any], *, adapted_graph: bytes | None) -> Bundle:
    special = trained.special
    if special is None:
        return bundle_head(trained.head.head, temperature=trained.head.temperature, **about)
    if special.adapter is None:
        return bundle_tail(special.tail, **about)
    if adapted_graph is None:
        raise ExportError(
            f"The trunk's folder has no {TRUNK_ADAPTED}, which adapters run on: it was exported by "
            "an older version, or has no layer for adapters. Export the student again."
        )
    kind, weights = special.adapter
    return bundle_head(
        special.tail.head, adapter=Adapter(kind, weights), adapted_graph=adapted_graph, **about
    )


def _every_nth(split: Split, num_pictures: int) -> Split:
    """About as many pictures of every class; a split keeps its classes together."""
    step = max(1, len(split) // num_pictures)
    return Split(split.pictures[::step], split.labels[::step])
