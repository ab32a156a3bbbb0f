"""Real heads that try a precision: trained once on float features, never again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from export.agreement import MIN_HEADS, HeadOutcome
from export.errors import ExportError
from export.parity import open_session, run
from models.data import PictureData
from models.heads import LinearHead, logits_of
from models.logistic import choose_logistic_head, logistic_head
from models.pictures import Preprocessing
from models.progress import Progress, ProgressCallback, unheard

BATCH = 16
NUM_MORE = 10  # labels of a task that may each get a head of their own


@dataclass(frozen=True)
class TrialHead:
    """A head and the test labels that it is judged on.

    Args:
        task: Place of its data among those given.
    """

    name: str
    task: int
    head: LinearHead
    labels: Int[Tensor, " pictures"]


@dataclass(frozen=True)
class Trial:
    """Heads, with the float features of the test pictures of their tasks.

    Args:
        tests: For each task its test pictures, uint8 [pictures, size, size, 3].
        keys: For each task the keys of these pictures.
        expected: For each task the float features of these pictures.
    """

    heads: tuple[TrialHead, ...]
    tests: tuple[UInt8[np.ndarray, "pictures height width 3"], ...]
    keys: tuple[tuple[str, ...], ...]
    expected: tuple[Tensor, ...]

    def outcomes(
        self, graph: bytes, *, stage: str, progress: ProgressCallback = unheard
    ) -> list[HeadOutcome]:
        """What the heads say of features that another graph gives."""
        session = open_session(graph)
        found: list[Tensor] = []
        for task, pictures in enumerate(self.tests):
            found.append(torch.from_numpy(features(session, pictures)))
            progress(Progress(stage, task + 1, len(self.tests)))
        return [
            _outcome(head, self.keys[head.task], self.expected[head.task], found[head.task])
            for head in self.heads
        ]


def make_trial(
    graph: bytes,
    tasks: Sequence[PictureData],
    preprocessing: Preprocessing,
    *,
    progress: ProgressCallback = unheard,
) -> Trial:
    """Train a head for every task, and heads for one label against the rest until they are enough.

    Args:
        graph: The float trunk.

    Raises:
        ExportError: fewer than `MIN_HEADS` heads can be made.
        HeadError: a task cannot be learned.
    """
    asked = _questions(tasks)
    session = open_session(graph)
    seen: list[dict[str, Tensor]] = []
    tests: list[UInt8[np.ndarray, "pictures height width 3"]] = []
    for place, data in enumerate(tasks):
        pictures = {
            name: torch.cat(list(split.batches(preprocessing, batch_size=BATCH))).numpy()
            for name, split in data.splits.items()
            if len(split)
        }
        seen.append({n: torch.from_numpy(features(session, p)) for n, p in pictures.items()})
        tests.append(pictures["test"])
        progress(Progress("float features", place + 1, len(tasks)))
    heads: list[TrialHead] = []
    for task, label in asked:
        heads.append(_train(tasks[task], task, label, seen[task]))
        progress(Progress("heads", len(heads), len(asked)))
    return Trial(
        tuple(heads),
        tuple(tests),
        tuple(tuple(picture.key for picture in data.test.pictures) for data in tasks),
        tuple(splits["test"] for splits in seen),
    )


def features(
    session: onnxruntime.InferenceSession, pictures: UInt8[np.ndarray, "pictures height width 3"]
) -> Float[np.ndarray, "pictures num_features"]:
    """Features of pictures, in batches as serving makes them."""
    starts = range(0, len(pictures), BATCH)
    parts = [run(session, ("features",), pictures[start : start + BATCH]) for start in starts]
    return np.concatenate([part["features"] for part in parts])


def _questions(tasks: Sequence[PictureData]) -> list[tuple[int, int | None]]:
    """Each task as it is (None), then single labels against the rest, in turn over the tasks.

    With two labels, one against the rest is the task itself.
    """
    whole: list[tuple[int, int | None]] = [(task, None) for task in range(len(tasks))]
    single: list[tuple[int, int | None]] = [
        (task, label)
        for label in range(max(len(data.labels) for data in tasks))
        for task, data in enumerate(tasks)
        if label < len(data.labels) > 2  # noqa: PLR2004
    ]
    asked = whole + single[: max(0, MIN_HEADS - len(whole))]
    if len(asked) < MIN_HEADS:
        raise ExportError(
            f"These data give {len(asked)} heads (each task, and each of its labels against the "
            f"rest); a precision is judged by at least {MIN_HEADS}. Give more --data."
        )
    return asked


def _train(
    data: PictureData, task: int, label: int | None, seen: Mapping[str, Tensor]
) -> TrialHead:
    labels = {
        name: split.labels if label is None else (split.labels == label).long()
        for name, split in data.splits.items()
    }
    num_classes = len(data.labels) if label is None else 2
    none = torch.zeros(0, seen["train"].shape[1])
    validation = seen.get("validation", none)
    _, l2 = choose_logistic_head(
        seen["train"], labels["train"], validation, labels["validation"], num_classes=num_classes
    )
    head = logistic_head(
        torch.cat([seen["train"], validation]),
        torch.cat([labels["train"], labels["validation"]]),
        num_classes=num_classes,
        l2=l2,
    )
    name = data.name if label is None else f"{data.name}: {data.labels[label]} or not"
    return TrialHead(name, task, head, labels["test"])


def _outcome(
    trial: TrialHead, keys: tuple[str, ...], expected: Tensor, found: Tensor
) -> HeadOutcome:
    before, after = logits_of(trial.head, expected), logits_of(trial.head, found)
    first, second = before.argmax(dim=1), after.argmax(dim=1)
    scale = max(1.0, float(before.abs().max()))
    return HeadOutcome(
        trial.name,
        keys,
        (first == second).numpy(),
        (first == trial.labels).numpy(),
        (second == trial.labels).numpy(),
        float((after - before).abs().max()) / scale,
    )
