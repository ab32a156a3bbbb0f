"""Specification of models/blocks.py: the parts of a backbone that learn together."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from models.backbones import Architecture, Backbone, build_backbone
from models.blocks import Block, blocks_of, relative_gradient_norms
from models.pictures import Preprocessing

MY_NETS = Path(__file__).parents[1] / "end_to_end" / "my_nets.py"


def untrained(name: str) -> Backbone:
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True)
    return backbone


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("small32", ["prefix.stem.0", "prefix.stage2.0.0.0", "suffix.stage3.0.0.0"]),
        (
            "resnet18",
            ["prefix.conv1", "prefix.layer1.0", "prefix.layer2.0", "prefix.layer3.0",
             "suffix.stage.layer4.0"],
        ),
        (
            # One stage for every halving of the map, and the cut between the last two.
            f"{MY_NETS}:mobilenet_v1_025",
            ["prefix.0", "prefix.9", "prefix.21", "prefix.33", "suffix.0.69"],
        ),
        ("squeezenet1_1", ["prefix.0", "prefix.3", "prefix.6", "suffix.stage.9"]),
    ],
)  # fmt: skip
def test_a_block_ends_where_the_map_changes_its_size(name: str, begins: list[str]) -> None:
    """Stem and four stages of a ResNet, the stages of halving of a MobileNet."""
    assert [block.name for block in blocks_of(untrained(name))] == begins


@pytest.mark.parametrize("name", ["small32", "resnet18", f"{MY_NETS}:mobilenet_v1_025"])
def test_every_weight_is_in_one_block(name: str) -> None:
    """Nothing is forgotten and nothing learns twice."""
    backbone = untrained(name)

    members = [id(tensor) for block in blocks_of(backbone) for tensor in block.parameters]

    assert sorted(members) == sorted(id(tensor) for tensor in backbone.parameters())


def test_a_part_that_is_no_sequence_is_one_block() -> None:
    """A user's own module may do anything between its layers."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)

        @override
        def forward(self, maps: torch.Tensor) -> torch.Tensor:
            return self.left(maps) + self.right(maps)

    prefix = Branches()
    suffix = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = Architecture(
        "own", nn.ModuleList([prefix, suffix]), prefix, suffix, "0",
        Preprocessing(8, 8, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    )  # fmt: skip

    assert [b.name for b in blocks_of(Backbone(parts, reference="own"))] == ["prefix", "suffix.0"]


def test_relative_gradient_norms_are_those_of_the_paper() -> None:
    """|gradient| / |weights| of each block by one backward over all rows."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 4), nn.Linear(4, 3)
    rows, labels = torch.randn(12, 5), torch.randint(3, (12,))
    blocks = [Block("first", nn.ModuleList([first])), Block("second", nn.ModuleList([second]))]

    def losses():  # noqa: ANN202
        for part in torch.arange(12).split(5):
            loss = F.cross_entropy(second(torch.tanh(first(rows[part]))), labels[part])
            yield loss, len(part) / 12

    norms = relative_gradient_norms(blocks, losses)

    F.cross_entropy(second(torch.tanh(first(rows))), labels).backward()
    for norm, layer in zip(norms, (first, second), strict=True):
        gradient = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in layer.parameters()])
        assert norm == pytest.approx(float(gradient.norm() / weights.norm()), rel=1e-5)
