"""Networks as a user would bring them: MobileNetV1 with its published key names.

Name one as `tests/end_to_end/my_nets.py:mobilenet_v1_025`.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.backbones import Architecture
from models.pictures import Preprocessing

# Output channels at width 1.0 and stride of each pair of depthwise and pointwise convolution.
PAIRS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
    (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
LAST_STAGE = 3 + 6 * 11  # the stem's three layers, then six for each pair


class EndPaddedConv2d(nn.Conv2d):
    """A stride-2 convolution padded at the right and bottom only, as TensorFlow does it.

    Symmetric padding loads the same weights without complaint and costs 11 points of accuracy.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] to maps of half the size."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def mobilenet_v1_025() -> Architecture:
    """0.25 wide, for 128 px; 256 features."""
    return _mobilenet_v1("mobilenet_v1_025", width=0.25, size_px=128)


def mobilenet_v1_05() -> Architecture:
    """0.5 wide, for 160 px; 512 features."""
    return _mobilenet_v1("mobilenet_v1_05", width=0.5, size_px=160)


def _mobilenet_v1(name: str, *, width: float, size_px: int) -> Architecture:
    channels = int(32 * width)
    layers: list[nn.Module] = _conv(3, channels, kernel=3, stride=2)
    for out_channels, stride in PAIRS:
        out = int(out_channels * width)
        layers += _conv(channels, channels, kernel=3, stride=stride, groups=channels)
        layers += _conv(channels, out, kernel=1)
        channels = out
    features = nn.Sequential(*layers)
    network = nn.ModuleDict({"features": features, "classifier": nn.Linear(channels, 1000)})
    middle = (127.5, 127.5, 127.5)
    return Architecture(
        name=name,
        network=network,
        prefix=features[:LAST_STAGE],
        suffix=nn.Sequential(features[LAST_STAGE:], nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        cut=f"features.{LAST_STAGE}",
        preprocessing=Preprocessing(
            size_px=size_px, resize_px=round(size_px * 8 / 7), mean=middle, std=middle
        ),
    )


def _conv(
    in_channels: int, out_channels: int, *, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    kind = EndPaddedConv2d if stride == 2 else nn.Conv2d
    padding = 0 if stride == 2 else kernel // 2
    conv = kind(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True)]
