"""Blocks: the parts of a backbone that learn together, from the pictures up to the features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor, nn

from models.backbones import Backbone


@dataclass(frozen=True)
class Block:
    """Layers that follow each other and work on maps of one size.

    Args:
        name: Of its first layer that learns, as in the backbone's state dict.
    """

    name: str
    layers: nn.ModuleList

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All its learned tensors."""
        return list(self.layers.parameters())


def blocks_of(backbone: Backbone) -> tuple[Block, ...]:
    """Cut prefix and suffix wherever the map changes its size, and between the two.

    So a ResNet has its stem and four stages, a MobileNet the five stages of halving. A part that is
    not made of `nn.Sequential` cannot be looked into and is one block.
    """
    backbone.eval()
    with torch.no_grad():
        steps = list(_run(backbone))
    blocks = []
    for _, together in groupby(steps, key=lambda step: step.place):
        layers = list(together)
        learning = [step.name for step in layers if any(True for _ in step.layer.parameters())]
        # Layers without anything to learn, such as the last pooling, are no block.
        if learning:
            blocks.append(Block(learning[0], nn.ModuleList(step.layer for step in layers)))
    return tuple(blocks)


def relative_gradient_norms(
    blocks: Sequence[Block], losses: Callable[[], Iterator[tuple[Tensor, float]]]
) -> list[float]:
    """How large a block's gradient is for its size: |gradient| / |weights| of all its tensors.

    Args:
        losses: Parts of the loss with their shares, which sum to 1; gradients are of the sum.

    Source: Lee et al. 2022, arXiv:2210.11466, section 4.1 (Auto-RGN, there for each layer).
    """
    totals = [[torch.zeros_like(tensor) for tensor in block.parameters] for block in blocks]
    tensors = [tensor for block in blocks for tensor in block.parameters]
    for loss, share in losses():
        gradients = iter(torch.autograd.grad(loss, tensors))
        for total in chain.from_iterable(totals):
            total.add_(next(gradients), alpha=share)
    return [
        float(_norm(total) / _norm(block.parameters))
        for total, block in zip(totals, blocks, strict=True)
    ]


@dataclass(frozen=True)
class _Step:
    """One layer, and where it stands: its part and the size of the map that it makes."""

    name: str
    layer: nn.Module
    place: tuple[str, tuple[int, ...]]


def _run(backbone: Backbone) -> Iterator[_Step]:
    size_px = backbone.preprocessing.size_px
    maps = torch.zeros(1, 3, size_px, size_px, device=backbone.mean.device)
    for part in ("prefix", "suffix"):
        for name, layer in _chain(part, getattr(backbone, part)):
            maps = layer(maps)
            yield _Step(name, layer, (part, tuple(maps.shape[2:])))


def _chain(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for key, layer in module.named_children():
            yield from _chain(f"{name}.{key}", layer)
    else:
        yield name, module


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().double().square().sum() for tensor in tensors]).sum().sqrt()
