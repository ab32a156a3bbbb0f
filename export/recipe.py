"""From a student's folder to a trunk, from a folder of pictures to a bundle: whole recipes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from export.bundle import STUDENT, TRUNK_GRAPH, Bundle, read_trunk_folder
from export.errors import ExportError
from export.head import bundle_head
from export.provenance import provenance_of
from export.trunk import TrunkReport, export_trunk
from models.checkpoint import load_student, restore_backbone
from models.data import PictureData, Split, to_batch
from models.progress import ProgressCallback, unheard
from models.recipe import load_samples, read_data
from models.train_head import HeadKind, TrainedHead, train_head

MAX_GOLDEN_CANDIDATES = 512  # test pictures among which the golden samples are chosen


@dataclass(frozen=True)
class MadeHead:
    """A head that was trained and bundled."""

    data: PictureData
    trained: TrainedHead
    bundle: Bundle


def make_trunk(
    student: Path, out: Path, *, command: str, progress: ProgressCallback = unheard
) -> TrunkReport:
    """Export a student's folder as a trunk's.

    Raises:
        LearningError: no student, or its backbone cannot be built.
        ExportError: the graph does not compute what the student does.
    """
    known = load_student(student)
    return export_trunk(
        known.backbone,
        load_samples(student),
        out,
        provenance=provenance_of(command=command, seed=known.record.seed),
        progress=progress,
    )


def make_head(
    source: str,
    trunk: Path,
    *,
    task: str,
    kind: HeadKind | None,
    seed: int,
    command: str,
    max_train: int | None = None,
    progress: ProgressCallback = unheard,
) -> MadeHead:
    """Train a head for a folder of pictures on a trunk, and bundle it.

    Args:
        kind: None chooses by the number of pictures.
        max_train: Learn from about so many pictures, and from all of them if it is None.

    Raises:
        LearningError: the data or the trunk's backbone are not what they have to be.
        ExportError: no student in the trunk's folder, or the graph is not what was trained.
        BundleError: no trunk, or the task's name is not one.
    """
    manifest, files = read_trunk_folder(trunk)
    if STUDENT not in files:
        raise ExportError(
            f"{trunk} has no {STUDENT}, which heads are trained on; use the folder that "
            "`headstock export` wrote."
        )
    backbone = restore_backbone(manifest.backbone, trunk / STUDENT)
    data = read_data(source, seed=seed, progress=progress)
    if max_train is not None:
        # The head learns from validation too, once that has chosen its setting.
        data = dataclasses.replace(
            data,
            train=_every_nth(data.train, max_train * 3 // 4),
            validation=_every_nth(data.validation, max_train // 4),
        )
    trained = train_head(backbone, data, kind=kind, progress=progress)
    candidates = _every_nth(data.test, MAX_GOLDEN_CANDIDATES)
    bundle = bundle_head(
        trained.head,
        task=task,
        labels=data.labels,
        trunk=manifest,
        trunk_graph=files[TRUNK_GRAPH],
        pictures=to_batch(candidates.pictures, manifest.preprocessing),
        picture_labels=candidates.labels,
        data=data.record(),
        metrics=trained.metrics,
        provenance=provenance_of(command=command, seed=seed),
        notes=trained.notes,
    )
    return MadeHead(data, trained, bundle)


def _every_nth(split: Split, num_pictures: int) -> Split:
    """About as many pictures of every class; a split keeps its classes together."""
    step = max(1, len(split) // num_pictures)
    return Split(split.pictures[::step], split.labels[::step])
