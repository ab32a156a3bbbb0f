"""Which size of specialisation pays: head, bias, ssf, lora, adapter or tail?

MobileNetV1-0.25 with ImageNet weights, specialised on folders of a few hundred photographs, several
splits of each into train and validation. Data and weights are looked for in `../shared`, or where
HEADSTOCK_SHARED says.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.report import Figure, arguments, finish, note
from models.backbones import build_backbone
from models.evaluate import Estimate
from models.recipe import read_data
from models.train_task import TrainedTask, compare_strategies

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HEADSTOCK_SHARED", REPOSITORY.parent / "shared"))
NET = f"{REPOSITORY / 'tests' / 'end_to_end' / 'my_nets.py'}:mobilenet_v1_025"
WEIGHTS = SHARED / "weights" / "mobilenet_v1_0.25_128_tfpad_rebn.pth"
TASKS = ("clothing10", "trash6")
NUM_EPOCHS, QUICK_EPOCHS = 30, 3


def main() -> None:
    """Compare all strategies on every task and split."""
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    net, _ = build_backbone(NET, weights=WEIGHTS)
    figures: list[Figure] = []
    for task in TASKS[:1] if chosen.quick else TASKS:
        for seed in range(1 if chosen.quick else 2):
            data = read_data(str(SHARED / "data" / task), seed=seed)
            num_epochs = QUICK_EPOCHS if chosen.quick else NUM_EPOCHS
            trained = compare_strategies(net, data, seed=seed, num_epochs=num_epochs)
            note(f"{task}, seed {seed}: proposed {trained.proposed}")
            figures += _figures(f"{task}, seed {seed}", trained)
    finish("strategies", figures, chosen)


def _figures(where: str, trained: TrainedTask) -> Iterator[Figure]:
    for row in trained.rows:
        name = f"{where}: {row.strategy}"
        if row.cross_validated:
            yield _figure(f"{name}, cross-validated", row.cross_validated)
        yield _figure(f"{name}, test", row.test)
        yield _figure(f"{name}, test less the head's", row.against_head.value)
        yield Figure(f"{name}, size", row.num_bytes, row.num_bytes, row.num_bytes, "bytes")
        yield Figure(f"{name}, training", row.seconds, row.seconds, row.seconds, "s")


def _figure(name: str, estimate: Estimate) -> Figure:
    return Figure(name, estimate.value, estimate.low, estimate.high, "share")


if __name__ == "__main__":
    main()
