"""Adapters: few learned values that make a trunk's suffix another one for a single task.

They change the folded suffix, in which batch norms are part of the convolutions before them: that
is the suffix which serving runs, and there every adapter site is one affine layer.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import override

from models.backbones import Backbone
from models.errors import LearningError

AdapterKind = Literal["lora", "adapter", "ssf", "bias"]
AffineLayer = nn.Conv2d | nn.Linear


class AdapterError(LearningError):
    """A suffix has no layer that an adapter of this kind can change."""


@dataclass(frozen=True)
class Site:
    """A layer of the folded suffix that adapters may change.

    Args:
        in_channels: Of a convolution; a linear layer's `in_features`.
        out_channels: Of a convolution; a linear layer's `out_features`.
        is_pointwise: Whether it maps every pixel or token by one matrix, so that low rank is
            possible: `Linear`, or a 1x1 convolution with stride 1, no padding and one group.
    """

    in_channels: int
    out_channels: int
    is_pointwise: bool


def fold(suffix: nn.Module) -> nn.Module:
    """A copy in evaluation mode with batch norms folded into the convolutions before them.

    Layers keep their names. A suffix that torch.fx cannot trace is copied as it is.
    """
    plain = copy.deepcopy(suffix).eval()
    try:
        folded = fx.GraphModule(plain, _Tracer().trace(plain))
    except Exception:  # noqa: BLE001 (a user's network may refuse stand-ins in any way)
        return plain
    for node in list(folded.graph.nodes):
        _fold_into_convolution(node, folded)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded.eval()


def sites_of(backbone: Backbone) -> dict[str, Site]:
    """The sites of `fold(backbone.suffix)` by name, in the order in which they run.

    Left out are convolutions whose output is a single pixel although the suffix starts from a
    larger map: the gates of squeeze-and-excitation, which see no picture but its mean.
    """
    folded, size_px = fold(backbone.suffix).cpu(), backbone.preprocessing.size_px
    images = torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8, device=backbone.mean.device)
    with torch.no_grad():
        prefix = copy.deepcopy(backbone.prefix).eval()
        maps = prefix(backbone.normalise(images)).cpu()
        is_map = math.prod(maps.shape[2:]) > 1
        sites: dict[str, Site] = {}
        for name, layer in folded.named_modules():
            if isinstance(layer, AffineLayer):
                layer.register_forward_hook(_finder(name, sites, is_map=is_map))
        folded(maps)
    return sites


class LowRank(nn.Module):
    """A frozen layer plus a bottleneck beside it, per pixel: y + up @ act(down @ x).

    Source: without activation LoRA, Hu et al. 2021, arXiv:2106.09685; with ReLU the parallel
    adapter of He et al. 2021, arXiv:2110.04366.

    Args:
        layer: Pointwise; see `Site`.
        width: Rank, or channels of the bottleneck, at least 1.
        is_linear: Whether there is no ReLU.
    """

    down: Tensor
    up: Tensor

    def __init__(self, layer: AffineLayer, *, width: int, is_linear: bool) -> None:
        super().__init__()
        self.layer = layer
        self.is_linear = is_linear
        num_out, num_in = layer.weight.shape[:2]
        # As torch draws a linear layer's weights. The zero of `up` makes the start the identity.
        bound = 1 / math.sqrt(num_in)
        self.down = nn.Parameter(torch.empty(width, num_in).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(num_out, width))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] or rows [..., channels] to the layer's outputs."""
        hidden = self._product(inputs, self.down)
        hidden = hidden if self.is_linear else F.relu(hidden)
        return self.layer(inputs) + self._product(hidden, self.up)

    def _product(self, inputs: Tensor, matrix: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(inputs, matrix)
        return F.conv2d(inputs, matrix[:, :, None, None])


class ScaleShift(nn.Module):
    """A frozen layer, then a scale and a shift for every channel: y * scale + shift.

    Source: SSF, Lian et al. 2022, arXiv:2210.08823. With `learns_scale` false only biases change:
    BitFit, Ben Zaken et al. 2021, arXiv:2106.10199.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, layer: AffineLayer, *, learns_scale: bool) -> None:
        super().__init__()
        self.layer = layer
        num_out = layer.weight.shape[0]
        self.shift = nn.Parameter(torch.zeros(num_out))
        if learns_scale:
            self.scale = nn.Parameter(torch.ones(num_out))
        else:
            self.register_buffer("scale", torch.ones(num_out))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Maps [batch, channels, height, width] or rows [..., channels] to the layer's outputs."""
        outputs = self.layer(inputs)
        if isinstance(self.layer, nn.Linear):
            return outputs * self.scale + self.shift
        return outputs * self.scale[:, None, None] + self.shift[:, None, None]


class AdaptedSuffix(nn.Module):
    """The folded suffix with an adapter at every site; only the adapter's values learn."""

    def __init__(self, folded: nn.Module, adapters: Mapping[str, LowRank | ScaleShift]) -> None:
        super().__init__()
        self.suffix = folded.requires_grad_(requires_grad=False)
        self._sites = tuple(adapters)
        for name, adapter in adapters.items():
            folded.set_submodule(name, adapter)
            for own in adapter.parameters(recurse=False):
                own.requires_grad = True
        self.eval()

    @override
    def forward(self, maps: Tensor) -> Float[Tensor, "rows num_features"]:
        """Prefix maps to features."""
        return self.suffix(maps)

    @override
    def train(self, mode: bool = True) -> "AdaptedSuffix":
        """Stay in evaluation mode: batch statistics and dropout belong to the frozen layers."""
        del mode
        return super().train(mode=False)

    def weights(self) -> dict[str, Tensor]:
        """What the adapter is, on the CPU and without gradients.

        Returns:
            Low rank, for every pointwise site: "SITE/down" [width, in] and "SITE/up" [out, width].
            Else, for every site: "SITE/scale" [out] and "SITE/shift" [out].
        """
        return {
            f"{site}/{name}": getattr(adapter, name).detach().cpu().clone()
            for site in self._sites
            for adapter in (self.suffix.get_submodule(site),)
            for name in (("down", "up") if isinstance(adapter, LowRank) else ("scale", "shift"))
        }


def adapt(backbone: Backbone, kind: AdapterKind, *, width: int, seed: int) -> AdaptedSuffix:
    """The backbone's suffix with a fresh adapter, which changes nothing yet.

    Args:
        width: Rank of "lora", channels of the bottleneck of "adapter"; the others have none.
        seed: Of what `down` starts from.

    Raises:
        AdapterError: the suffix has no layer that this kind can change.
    """
    folded = fold(backbone.suffix)
    adapters: dict[str, LowRank | ScaleShift] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, site in sites_of(backbone).items():
            layer = _affine(folded, name)
            if kind in ("ssf", "bias"):
                adapters[name] = ScaleShift(layer, learns_scale=kind == "ssf")
            elif site.is_pointwise:
                adapters[name] = LowRank(layer, width=width, is_linear=kind == "lora")
    if not adapters:
        raise AdapterError(
            f"The suffix of {backbone.name} has no layer for {kind!r}; low rank needs 1x1 "
            "convolutions or linear layers. Use 'ssf', 'bias' or a tail."
        )
    return AdaptedSuffix(folded, adapters)


def merged(backbone: Backbone, kind: AdapterKind, weights: Mapping[str, Tensor]) -> nn.Module:
    """The folded suffix with an adapter written into the weights of its layers.

    Raises:
        ValueError: `kind` is "adapter", whose ReLU no weight matrix can hold.
    """
    if kind == "adapter":
        raise ValueError("A parallel adapter has a ReLU, so it cannot be merged into weights.")
    folded = fold(backbone.suffix).requires_grad_(requires_grad=False)
    for name in dict.fromkeys(key.rpartition("/")[0] for key in weights):
        layer = _affine(folded, name)
        if kind == "lora":
            change = weights[f"{name}/up"] @ weights[f"{name}/down"]
            layer.weight.add_(change.view_as(layer.weight))
            continue
        scale, shift = weights[f"{name}/scale"], weights[f"{name}/shift"]
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        bias = layer.bias * scale if layer.bias is not None else 0
        layer.bias = nn.Parameter(bias + shift, requires_grad=False)
    return folded


class _Tracer(fx.Tracer):
    """Keeps a user's own convolutions whole, so that they stay layers with a name."""

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        return is_leaf or isinstance(m, AffineLayer)


def _fold_into_convolution(node: fx.Node, module: fx.GraphModule) -> None:
    """Take a batch norm out of the graph if nothing else reads the convolution before it."""
    norm, before = _layer(node, module), node.args[0] if node.args else None
    if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, fx.Node):
        return
    convolution = _layer(before, module)
    if not isinstance(convolution, nn.Conv2d) or norm.running_var is None or len(before.users) > 1:
        return
    if sum(other.target == before.target for other in module.graph.nodes) > 1:
        return
    module.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
    node.replace_all_uses_with(before)
    module.graph.erase_node(node)


def _layer(node: fx.Node, module: fx.GraphModule) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _finder(
    name: str, sites: dict[str, Site], *, is_map: bool
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def note(layer: nn.Module, _inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            is_pointwise = type(layer) is nn.Linear
            sites[name] = Site(layer.in_features, layer.out_features, is_pointwise)
        elif isinstance(layer, nn.Conv2d) and not (is_map and math.prod(outputs.shape[2:]) == 1):
            sites[name] = Site(layer.in_channels, layer.out_channels, _is_pointwise(layer))

    return note


def _is_pointwise(layer: nn.Conv2d) -> bool:
    """A subclass may pad or stride by itself, so it never counts as one."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding in ((0, 0), "valid", "same")
        and layer.groups == 1
    )


def _affine(module: nn.Module, name: str) -> AffineLayer:
    layer = module.get_submodule(name)
    assert isinstance(layer, AffineLayer)
    return layer
