"""Real photographs in every size of specialisation: ImageNet weights, a few hundred garments."""

from pathlib import Path

import pytest
import torch

from models.adapters import fold
from models.backbones import Backbone, build_backbone
from models.data import PictureData
from models.evaluate import accuracy
from models.prefix_maps import PrefixMaps, outputs_of, prefix_maps
from models.recipe import read_data
from models.specialise import RATES, SpecialKind, specialise
from models.train_head import train_head

pytestmark = [pytest.mark.slow]

NETS = Path(__file__).with_name("my_nets.py")
KINDS: tuple[SpecialKind, ...] = tuple(RATES)


@pytest.fixture(scope="module")
def trunk(shared: Path) -> Backbone:
    torch.set_num_threads(1)
    backbone, report = build_backbone(
        f"{NETS}:mobilenet_v1_025",
        weights=shared / "weights" / "mobilenet_v1_0.25_128_tfpad_rebn.pth",
    )
    assert not report.missing
    return backbone


@pytest.fixture(scope="module")
def garments(shared: Path) -> PictureData:
    return read_data(str(shared / "data" / "clothing10"), seed=0)


@pytest.fixture(scope="module")
def maps(trunk: Backbone, garments: PictureData) -> dict[str, PrefixMaps]:
    return {name: prefix_maps(trunk, split, stage=name) for name, split in garments.splits.items()}


def test_published_batch_norms_fold_without_a_trace(
    trunk: Backbone, maps: dict[str, PrefixMaps]
) -> None:
    """Trained statistics span orders of magnitude; the features stay within 1e-5 of their scale."""
    plain = outputs_of(trunk.suffix, maps["test"].maps)
    folded = outputs_of(fold(trunk.suffix), maps["test"].maps)

    assert float((folded - plain).abs().max()) <= 1e-5 * float(plain.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_starts_from_the_head_and_learns_the_garments(
    kind: SpecialKind, trunk: Backbone, garments: PictureData, maps: dict[str, PrefixMaps]
) -> None:
    """Epoch 0 names what the head alone names; training ends no worse on validation."""
    parts, classes = (maps["train"], maps["validation"]), len(garments.labels)
    head = train_head(trunk, garments, kind="linear").metrics

    start = specialise(trunk, kind, *parts, num_classes=classes, seed=0, num_epochs=0)
    trained = specialise(trunk, kind, *parts, num_classes=classes, seed=0)

    test = accuracy(outputs_of(trained.tail, maps["test"].maps), garments.test.labels)
    assert start.validation.accuracy == head["validation"].value
    assert trained.validation >= start.validation
    assert trained.best_epoch > 0
    assert test.low > head["baseline_test"].value
