"""Which kind of head does best on frozen features of a few hundred photographs?

Every kind on four folders of photographs, on features of MobileNetV2 and of MobileNetV1-0.25 with
ImageNet weights, several splits of each into train and validation; the test folders stay. Data and
weights are looked for in `../shared`, or where HEADSTOCK_SHARED says; features are cached.
"""

import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.report import Figure, arguments, finish, note
from benchmarks.strategies import NET, SHARED, WEIGHTS
from models.backbones import Backbone, build_backbone
from models.data import PictureData, join
from models.evaluate import accuracy
from models.feature_cache import FeatureCache, default_folder, features_by_split
from models.head_kinds import HEAD_KINDS, HeadKind, Known, fit_head
from models.heads import logits_of
from models.recipe import read_data

TASKS = ("clothing10", "trash6", "grocery_fruit8", "sign_digits10")
MOBILENET_V2 = SHARED / "weights" / "mobilenet_v2_imagenet_trunk_rebn.pth"
NUM_SEEDS = 3


def main() -> None:
    """Compare all kinds on every backbone, task and split."""
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    figures: list[Figure] = []
    small, _ = build_backbone(NET, weights=WEIGHTS)
    backbones = {"MobileNetV1-0.25": small}
    if not chosen.quick:
        backbones["MobileNetV2"], _ = build_backbone("mobilenet_v2", weights=MOBILENET_V2)
    for name, backbone in backbones.items():
        for task in TASKS:
            figures += _figures(name, backbone, task, num_seeds=1 if chosen.quick else NUM_SEEDS)
    finish("heads", figures, chosen)


def _figures(name: str, backbone: Backbone, task: str, *, num_seeds: int) -> Iterator[Figure]:
    found: dict[HeadKind, list[float]] = {kind: [] for kind in HEAD_KINDS}
    seconds: dict[HeadKind, list[float]] = {kind: [] for kind in HEAD_KINDS}
    for seed in range(num_seeds):
        data = read_data(str(SHARED / "data" / task), seed=seed)
        for kind, (right, took_s) in _try_all(name, backbone, data, seed=seed).items():
            found[kind].append(right)
            seconds[kind].append(took_s)
        told = ", ".join(f"{kind} {values[-1]:.3f}" for kind, values in found.items())
        note(f"{name}, {task}, seed {seed}: {told}")
    for kind, values in found.items():
        where = f"{name}, {task}: {kind}"
        # The interval of three splits is their range.
        yield Figure(where, statistics.mean(values), min(values), max(values), "share")
        took_s = statistics.median(seconds[kind])
        yield Figure(f"{where}, fitting", took_s, min(seconds[kind]), max(seconds[kind]), "s")


def _try_all(
    name: str, backbone: Backbone, data: PictureData, *, seed: int
) -> dict[HeadKind, tuple[float, float]]:
    """Test accuracy of every kind, and the seconds that choosing and fitting took."""
    pictures = {split: part.pictures for split, part in data.splits.items()}
    features = features_by_split(
        backbone, pictures, cache=FeatureCache(default_folder(), f"benchmark {name}")
    )
    known = Known(
        torch.cat([features["train"], features["validation"]]),
        join(data.train, data.validation).labels,
        num_train=len(data.train),
        num_classes=len(data.labels),
        seed=seed,
    )
    results: dict[HeadKind, tuple[float, float]] = {}
    for kind in HEAD_KINDS:
        began_s = time.monotonic()
        head = fit_head(kind, known).head
        took_s = time.monotonic() - began_s
        right = accuracy(logits_of(head, features["test"]), data.test.labels)
        results[kind] = (right.value, took_s)
    return results


if __name__ == "__main__":
    main()
