"""A small convolutional net for 32 px pictures, in two sizes: a teacher and a student.

Both are built alike: a stride-2 stem, then stages that each halve the map and double the channels.
The teacher uses plain 3x3 convolutions. The student splits each into a depthwise 3x3 and a
pointwise 1x1 (Howard et al. 2017, arXiv:1704.04861), which costs about a ninth, and puts 1x1
convolutions into the last stage, where low-rank adapters are cheap.
"""

from collections import OrderedDict
from typing import no_type_check

from torch import Tensor, nn
from typing_extensions import override


class Residual(nn.Module):
    """The body's output plus its input, so that depth costs no gradient."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    @override
    @no_type_check  # torch.fx, which folds batch norms, calls it with stand-ins for tensors
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] to maps of the same shape."""
        return maps + self.body(maps)


def small32_teacher() -> tuple[nn.Sequential, nn.Sequential]:
    """Prefix and suffix of the teacher: 128 features, 0.28 M parameters."""
    prefix = _named(
        stem=_conv(3, 16, stride=2),
        stage1=_conv(16, 32),
        stage2=nn.Sequential(_conv(32, 64, stride=2), Residual(_conv(64, 64))),
    )
    suffix = _named(
        stage3=nn.Sequential(_conv(64, 128, stride=2), Residual(_conv(128, 128))),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    return prefix, suffix


def small32() -> tuple[nn.Sequential, nn.Sequential]:
    """Prefix and suffix of the student: 128 features, an eighth of the teacher's parameters."""
    prefix = _named(
        stem=_conv(3, 16, stride=2),
        stage1=_separable(16, 32),
        stage2=nn.Sequential(_separable(32, 64, stride=2), Residual(_separable(64, 64))),
    )
    suffix = _named(
        stage3=nn.Sequential(_separable(64, 128, stride=2), Residual(_separable(128, 128))),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    return prefix, suffix


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _conv(
    in_channels: int, out_channels: int, *, stride: int = 1, kernel: int = 3, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _separable(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_channels, in_channels, stride=stride, groups=in_channels),
        _conv(in_channels, out_channels, kernel=1),
    )
