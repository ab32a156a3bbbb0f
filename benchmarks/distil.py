"""How much of the gap between teacher and student does each way of distilling close?

Two pairs on real pictures: ResNet-56 to ResNet-20 from random values on 4,000 small pictures, and
MobileNetV2 to MobileNetV1-0.25 from ImageNet weights on 300 photographs. Every arm has the same
pictures, crops and number of epochs; the last epoch counts, not the best. A run that was stopped
goes on. Data and weights are looked for in `../shared`, or where HEADSTOCK_SHARED says.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from benchmarks.report import Figure, arguments, finish, note
from models.augment import PHOTOS
from models.backbones import build_backbone
from models.distil import Lesson, distil
from models.fine_tuning import fine_tuning
from models.methods import METHODS, MethodName
from models.recipe import read_data
from models.transfer import teach

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HEADSTOCK_SHARED", REPOSITORY.parent / "shared"))
CIFAR_NETS = REPOSITORY / "benchmarks" / "cifar_nets.py"
MY_NETS = REPOSITORY / "tests" / "end_to_end" / "my_nets.py"
STATE = Path(tempfile.gettempdir()) / "headstock-distil.jsonl"
BASELINE: MethodName = "labels"
METHODS_COMPARED: tuple[MethodName, ...] = ("kd", "cosine", "dist", "standardised", "patient")
NUM_SEEDS = 3
AIM = 0.3
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Pair:
    """A teacher and a student on one task.

    Args:
        student_weights: None: random values.
        num_views: Fixed crops of each picture, so that the teacher need not be asked every time.
    """

    task: str
    teacher: str
    teacher_weights: str
    student: str
    student_weights: str | None
    num_epochs: int
    num_views: int


PAIRS = (
    Pair(
        "clothing10", "mobilenet_v2", "mobilenet_v2_imagenet_trunk_rebn.pth",
        f"{MY_NETS}:mobilenet_v1_025", "mobilenet_v1_0.25_128_tfpad_rebn.pth", 12, 2,
    ),
    Pair(
        "cifar10_small", f"{CIFAR_NETS}:resnet56", "cifar10_resnet56.pth",
        f"{CIFAR_NETS}:resnet20", None, 20, 4,
    ),
)  # fmt: skip
QUICK = Pair(
    "clothing10", "mobilenet_v2", "mobilenet_v2_imagenet_trunk_rebn.pth",
    f"{MY_NETS}:mobilenet_v1_025", "mobilenet_v1_0.25_128_tfpad_rebn.pth", 4, 1,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Accuracies on test of one student after its last epoch, and of its teacher."""

    task: str
    num_epochs: int
    seed: int
    method: MethodName
    student: float
    teacher: float


def main() -> None:
    """Run what is missing and report all."""
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    pairs, num_seeds = ((QUICK,), 1) if chosen.quick else (PAIRS, NUM_SEEDS)
    methods: tuple[MethodName, ...] = ("kd", "dist") if chosen.quick else METHODS_COMPARED
    figures: list[Figure] = []
    for pair in pairs:
        runs = list(_runs(pair, (BASELINE, *methods), num_seeds))
        figures += _figures(pair.task, runs, methods)
    finish("distil", figures, chosen)


def _runs(pair: Pair, methods: Sequence[MethodName], num_seeds: int) -> Iterator[Run]:
    """Those that are written down, and then the others."""
    lines = STATE.read_text().splitlines() if STATE.exists() else []
    done = {_key(run): run for run in (Run(**json.loads(line)) for line in lines)}
    wanted = [(pair.task, pair.num_epochs, s, m) for s in range(num_seeds) for m in methods]
    lesson = _lesson(pair) if any(key not in done for key in wanted) else None
    for key in wanted:
        if key not in done:
            assert lesson is not None
            done[key] = _run(pair, lesson, seed=key[2], method=key[3])
            with STATE.open("a") as file:
                file.write(json.dumps(asdict(done[key])) + "\n")
        note(f"{pair.task}, seed {key[2]}: {key[3]} {done[key].student:.3f}")
        yield done[key]


def _lesson(pair: Pair) -> Lesson:
    """The teacher is a head on its frozen trunk: fine-tuning lost on validation in both pairs."""
    data = read_data(str(SHARED / "data" / pair.task), seed=0)
    weights = SHARED / "weights" / pair.teacher_weights
    teacher, _ = build_backbone(pair.teacher, weights=weights)
    taught = teach(teacher, data, fine_tuning("linear"), augmentation=None, seed=0)
    return Lesson(teacher, taught.head, data.labels, data)


def _run(pair: Pair, lesson: Lesson, *, seed: int, method: MethodName) -> Run:
    weights = SHARED / "weights" / pair.student_weights if pair.student_weights else None
    student, _ = build_backbone(pair.student, weights=weights, allow_untrained=True, seed=seed)
    made = distil(
        student, [lesson], from_scratch=weights is None, augmentation=PHOTOS, seed=seed,
        method=METHODS[method], num_epochs=pair.num_epochs, num_views=pair.num_views,
        keep_last=True,
    )  # fmt: skip
    name = lesson.data.name
    student_test, teacher_test = made.metrics[f"{name}/test"], made.metrics[f"{name}/teacher_test"]
    return Run(pair.task, pair.num_epochs, seed, method, student_test.value, teacher_test.value)


def _figures(task: str, runs: Sequence[Run], methods: Sequence[MethodName]) -> Iterator[Figure]:
    teacher = runs[0].teacher
    yield Figure(f"{task}: teacher", teacher, teacher, teacher, "accuracy")
    by_method: Mapping[MethodName, list[float]] = {
        method: [run.student for run in runs if run.method == method]
        for method in (BASELINE, *methods)
    }
    for method, values in by_method.items():
        yield Figure(f"{task}: {method}", mean(values), min(values), max(values), "accuracy")
    closed = {
        method: gap_closed(by_method[method], by_method[BASELINE], teacher=teacher)
        for method in methods
    }
    for method, (value, low, high) in closed.items():
        yield Figure(f"{task}: gap closed by {method}", value, low, high, "share")
    best, (value, low, high) = max(closed.items(), key=lambda item: item[1][0])
    aim = f">= {max(AIM, 2 * closed['kd'][0]):.3g} (0.3, and twice that of kd)"
    yield Figure(f"{task}: gap closed by the best, {best}", value, low, high, "share", aim)


def gap_closed(
    distilled: Sequence[float], plain: Sequence[float], *, teacher: float
) -> tuple[float, float, float]:
    """(distilled - plain) / (teacher - plain), of means over seeds.

    Args:
        distilled: A seed's student beside the one of that seed in `plain`.

    Returns:
        The share and its interval of 95 %, resampled over seeds.
    """
    pairs = np.array([distilled, plain])
    chance = np.random.default_rng(0)
    drawn = chance.integers(pairs.shape[1], size=(NUM_RESAMPLES, pairs.shape[1]))
    means = pairs[:, drawn].mean(axis=2)
    shares = (means[0] - means[1]) / (teacher - means[1])
    whole = pairs.mean(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float((whole[0] - whole[1]) / (teacher - whole[1])), float(low), float(high)


def _key(run: Run) -> tuple[str, int, int, MethodName]:
    return (run.task, run.num_epochs, run.seed, run.method)


if __name__ == "__main__":
    main()
