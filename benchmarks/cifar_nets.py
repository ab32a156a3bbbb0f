"""CIFAR ResNets as their user would bring them: published key names, shortcuts without weights.

Name one as `benchmarks/cifar_nets.py:resnet20`.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.backbones import Architecture
from models.pictures import Preprocessing

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that drops pixels and adds empty channels.

    Source: He et al. 2016, arXiv:1512.03385, option A of section 4.2.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride, self.more = channels // in_channels, channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] to maps of the block's width."""
        shortcut = maps
        if self.more:
            kept = maps[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(kept, (0, 0, 0, 0, self.more // 2, self.more // 2))
        inner = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(inner)) + shortcut)


def resnet20() -> Architecture:
    """Three blocks a stage; 64 features."""
    return _resnet("cifar_resnet20", num_blocks=3)


def resnet56() -> Architecture:
    """Nine blocks a stage; 64 features."""
    return _resnet("cifar_resnet56", num_blocks=9)


def _resnet(name: str, *, num_blocks: int) -> Architecture:
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False),
        bn1=nn.BatchNorm2d(WIDTHS[0]),
    )
    in_channels = WIDTHS[0]
    for number, channels in enumerate(WIDTHS, start=1):
        widths = [in_channels, *[channels] * num_blocks]
        blocks = [Block(before, channels) for before in widths[:-1]]
        layers[f"layer{number}"] = nn.Sequential(*blocks)
        in_channels = channels
    layers["linear"] = nn.Linear(in_channels, 10)
    prefix = OrderedDict((key, layers[key]) for key in ("conv1", "bn1"))
    prefix["relu"] = nn.ReLU()
    prefix |= {key: layers[key] for key in ("layer1", "layer2")}
    return Architecture(
        name=name,
        network=nn.ModuleDict(layers),
        prefix=nn.Sequential(prefix),
        suffix=nn.Sequential(layers["layer3"], nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        cut="layer3",
        preprocessing=Preprocessing(
            size_px=32, resize_px=32, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)
        ),
    )
