"""What do strategies, schedules and regularisers of `headstock teach` bring against the plain one?

MobileNetV1-0.25 with ImageNet weights, fine-tuned on folders of a few hundred photographs, three
splits of each into train and validation. A run that was stopped goes on. Data and weights are
looked for in `../shared`, or where HEADSTOCK_SHARED says.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import Figure, arguments, finish, note
from models.augment import PHOTOS, RANDAUGMENT, Augmentation
from models.backbones import build_backbone
from models.data import PictureData, Split
from models.fine_tuning import StrategyName, fine_tuning
from models.heads import features_of, logits_of
from models.recipe import read_data
from models.transfer import teach

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HEADSTOCK_SHARED", REPOSITORY.parent / "shared"))
NET = f"{REPOSITORY / 'tests' / 'end_to_end' / 'my_nets.py'}:mobilenet_v1_025"
WEIGHTS = SHARED / "weights" / "mobilenet_v1_0.25_128_tfpad_rebn.pth"
TASKS = ("clothing10", "trash6")
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
PLAIN, UNBALANCED = "full", "unbalanced"
KEPT_OF_RARE = 6  # one picture of so many, in every second class of the unbalanced tasks
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; what it is compared with is `against`."""

    strategy: StrategyName
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augmentation: Augmentation = PHOTOS
    against: str = PLAIN


ARMS: dict[str, Arm] = {
    PLAIN: Arm("full"),
    "linear": Arm("linear"),
    "last": Arm("last"),
    "surgical": Arm("surgical"),
    "gradual": Arm("gradual"),
    "direct": Arm("direct"),
    "scratch": Arm("scratch"),
    "batch norm follows": Arm("full", {"batch_norm": "follow"}),
    "one rate for all blocks": Arm("full", {"rate_decay": 1.0}),
    "one-cycle": Arm("full", {"schedule": "one-cycle"}),
    "randaugment": Arm("full", augmentation=RANDAUGMENT),
    "mixup": Arm("full", {"mix": "mixup"}),
    "cutmix": Arm("full", {"mix": "cutmix"}),
    "label smoothing 0.1": Arm("full", {"label_smoothing": 0.1}),
    "dropout 0.3": Arm("full", {"dropout": 0.3}),
    "l2-sp 0.01": Arm("full", {"l2_sp": 0.01}),
    "average of 2 epochs": Arm("full", {"average_epochs": 2.0}),
    UNBALANCED: Arm("full"),
    f"{UNBALANCED}, weights": Arm("full", {"balance": "weights"}, against=UNBALANCED),
    f"{UNBALANCED}, sampling": Arm("full", {"balance": "sampling"}, against=UNBALANCED),
}
QUICK_ARMS = (PLAIN, "linear", "last", "label smoothing 0.1")


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        right: Whether each test picture is answered rightly, by the state that was kept.
        is_rare: Whether each test picture is of a class that was made rare.
        last_validation: Accuracy after the last epoch, kept or not; NaN without epochs.
    """

    task: str
    arm: str
    seed: int
    right: list[bool]
    is_rare: list[bool]
    best_epoch: int
    last_validation: float
    seconds: float


def main() -> None:
    """Fine-tune cell by cell; one that is done is not done again."""
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    arms, tasks = (QUICK_ARMS, TASKS[:1]) if chosen.quick else (tuple(ARMS), TASKS)
    seeds = QUICK_SEEDS if chosen.quick else SEEDS
    kept = Path(tempfile.gettempdir()) / f"headstock-fine-tuning-{len(tasks)}-{len(arms)}.jsonl"
    cells = _finished(kept)
    done = {(cell.task, cell.arm, cell.seed) for cell in cells}
    for task, seed in product(tasks, seeds):
        data = read_data(str(SHARED / "data" / task), seed=seed)
        for arm in arms:
            if (task, arm, seed) in done:
                continue
            cells.append(_cell(task, arm, seed, data))
            with kept.open("a") as file:
                file.write(json.dumps(asdict(cells[-1])) + "\n")
            note(f"{len(cells)} of {len(seeds) * len(tasks) * len(arms)}: {_line(cells[-1])}")
    kept.unlink()
    finish("fine_tuning", list(_figures(cells, arms, tasks)), chosen)


def _finished(kept: Path) -> list[Cell]:
    lines = kept.read_text().splitlines() if kept.exists() else []
    return [Cell(**json.loads(line)) for line in lines]


def _cell(task: str, arm: str, seed: int, data: PictureData) -> Cell:
    how = ARMS[arm]
    if arm.startswith(UNBALANCED):
        data = dataclasses.replace(data, train=_unbalanced(data.train))
    net, _ = build_backbone(
        NET,
        weights=None if how.strategy == "scratch" else WEIGHTS,
        allow_untrained=how.strategy == "scratch",
        seed=seed,
    )
    settings = fine_tuning(how.strategy, **how.settings)
    taught = teach(net, data, settings, augmentation=how.augmentation, seed=seed)
    logits = logits_of(taught.head, features_of(net, data.test, stage="test"))
    return Cell(
        task=task,
        arm=arm,
        seed=seed,
        right=(logits.argmax(dim=-1) == data.test.labels).tolist(),
        is_rare=(data.test.labels % 2 == 1).tolist(),
        best_epoch=taught.best_epoch,
        last_validation=taught.epochs[-1].validation.accuracy if taught.epochs else float("nan"),
        seconds=taught.seconds,
    )


def _unbalanced(train: Split) -> Split:
    """One picture of six in every second class."""
    keep: list[int] = []
    for label in train.labels.unique().tolist():
        rows = (train.labels == label).nonzero().flatten().tolist()
        keep += rows[::KEPT_OF_RARE] if label % 2 else rows
    return Split(tuple(train.pictures[row] for row in keep), train.labels[keep])


def _figures(cells: Sequence[Cell], arms: Sequence[str], tasks: Sequence[str]) -> Iterator[Figure]:
    for arm in arms:
        own = [cell for cell in cells if cell.arm == arm]
        for task in tasks:
            yield _mean_figure(f"{arm}: {task}", _shares(own, task))
        if arm != (against := ARMS[arm].against):
            plain = [cell for cell in cells if cell.arm == against]
            differences = np.concatenate([_shares(own, t) - _shares(plain, t) for t in tasks])
            yield _mean_figure(f"{arm}: less {against}", differences)
        if arm.startswith(UNBALANCED):
            rare = np.concatenate([_shares(own, task, rare=True) for task in tasks])
            yield _mean_figure(f"{arm}: recall of the rare classes", rare)
        yield _spread(f"{arm}: best epoch", (cell.best_epoch for cell in own), "epoch")
        last = [cell.last_validation for cell in own if not np.isnan(cell.last_validation)]
        if last:
            yield _spread(f"{arm}: validation after the last epoch", last, "share")
        yield _spread(f"{arm}: training", (cell.seconds for cell in own), "s")


def _shares(cells: Iterable[Cell], task: str, *, rare: bool = False) -> NDArray[np.float64]:
    """Of every test picture the share of seeds that answer it rightly."""
    of_task = [cell for cell in cells if cell.task == task]
    shares = np.mean([cell.right for cell in of_task], axis=0)
    return shares[np.array(of_task[0].is_rare)] if rare else shares


def _mean_figure(name: str, values: NDArray[np.float64]) -> Figure:
    """Mean over pictures with a bootstrap interval; seeds share pictures, so pictures are drawn."""
    drawn = np.random.default_rng(0).choice(values, (NUM_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Figure(name, float(values.mean()), float(low), float(high), "share")


def _spread(name: str, values: Iterable[float], unit: str) -> Figure:
    """Mean over runs, from the least to the most."""
    all_values = list(values)
    return Figure(name, float(np.mean(all_values)), min(all_values), max(all_values), unit)


def _line(cell: Cell) -> str:
    share = sum(cell.right) / len(cell.right)
    epochs = f"best epoch {cell.best_epoch}, {cell.seconds:.0f} s"
    return f"{cell.task}, seed {cell.seed}, {cell.arm}: {share:.3f}, {epochs}"


if __name__ == "__main__":
    main()
