"""`trunk_adapted.onnx`: the suffix with every adapter site open, for rows of many tasks.

Each row brings the number of its adapter's slot, and every site reads that slot of a bank which is
an input of the graph. So a batch mixes adapters freely, and a new one needs no new graph.

A row's features are the same bits whatever rows are beside it, as long as that holds for the
suffix's own operations in ONNX Runtime. It does for convolutions, activations and pooling; a mean
over a middle axis, as over the tokens of a transformer, is rounded otherwise in a batch of one.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from export.onnx_file import EXAMPLE_ROWS, dynamic, graph_of
from models.adapters import Site, fold, sites_of
from models.backbones import Backbone

EXAMPLE_SLOTS = 3
EXAMPLE_WIDTH = 5
LOW_RANK, SCALE_SHIFT = "low_rank", "scale_shift"


def adapted_graph(backbone: Backbone) -> bytes | None:
    """Prefix maps to features, once for each family of adapters.

    Inputs are `prefix` float32 [batch, ...], `image_of` int64 [rows] (which map
    a row reads), `slot_of` int64 [rows] (which slot of the banks) and the banks, float32:
    "SITE/down" [slots, width, in], "SITE/up" [slots, out, width] and `slope` [slots, 1] (1 where
    the bottleneck is linear, 0 where it is a ReLU) for low rank; "SITE/scale" and "SITE/shift"
    [slots, out]. Outputs `low_rank` and `scale_shift` float32 [rows, num_features] depend on the
    banks of their own family only, and hold the same weights once.

    Args:
        backbone: In evaluation mode, on the CPU.

    Returns:
        The file's bytes; None if the suffix has no layer that an adapter could change.
    """
    sites = sites_of(backbone)
    if not sites:
        return None
    families: Families = {SCALE_SHIFT: _ScaleShiftSite}
    if any(site.is_pointwise for site in sites.values()):
        families = {LOW_RANK: _LowRankSite, **families}
    module = _AdaptedGraph(backbone, sites, families).eval()
    maps = backbone.prefix(backbone.normalise(_picture(backbone)))
    # Two tensors: tracing takes one tensor for one input, however often it is given.
    image_of, slot_of = (torch.zeros(EXAMPLE_ROWS, dtype=torch.int64) for _ in range(2))
    banks = module.example_banks
    slots, width = dynamic("slots"), dynamic("width")
    return graph_of(
        module,
        (maps.detach(), image_of, slot_of, *banks.values()),
        axes=(
            {0: dynamic("batch")},
            {0: dynamic("rows")},
            {0: dynamic("rows")},
            tuple(_axes(name, slots, width) for name in banks),
        ),
        input_names=("prefix", "image_of", "slot_of", *banks),
        output_names=tuple(families),
    )


class _Banks:
    """The banks of the batch that is traced, and which slot each of its rows reads."""

    def __init__(self) -> None:
        self.slot_of = torch.zeros(0, dtype=torch.int64)
        self.tensors: dict[str, Tensor] = {}

    def rows(self, name: str) -> Tensor:
        return self.tensors[name].index_select(0, self.slot_of)


class _LowRankSite(nn.Module):
    """A pointwise layer plus each row's own up @ act(down @ x)."""

    def __init__(self, layer: nn.Module, name: str, banks: _Banks) -> None:
        super().__init__()
        self.layer, self._name, self._banks = layer, name, banks

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        down, up = self._banks.rows(f"{self._name}/down"), self._banks.rows(f"{self._name}/up")
        is_linear = isinstance(self.layer, _RowLinear)
        columns = _channels_first(inputs) if is_linear else inputs.flatten(2)
        hidden = torch.matmul(down, columns)
        # Slope 1 leaves it as it is, slope 0 makes it a ReLU: one graph for both kinds.
        hidden = torch.maximum(hidden, hidden * self._banks.rows("slope")[:, :, None])
        change = torch.matmul(up, hidden)
        if is_linear:
            return outputs + change.transpose(1, 2).reshape(outputs.shape)
        return outputs + change.reshape(outputs.shape)


class _ScaleShiftSite(nn.Module):
    """A layer, then each row's own scale and shift of its channels."""

    def __init__(self, layer: nn.Module, name: str, banks: _Banks) -> None:
        super().__init__()
        self.layer, self._name, self._banks = layer, name, banks

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        scale = self._banks.rows(f"{self._name}/scale")
        shift = self._banks.rows(f"{self._name}/shift")
        if isinstance(self.layer, _RowLinear):
            middle = [1] * (outputs.ndim - 2)
            shape = (scale.shape[0], *middle, scale.shape[1])
            return outputs * scale.view(shape) + shift.view(shape)
        # As the batch norm of one row with rows x channels channels: one pass over the maps, where
        # Mul and Add broadcast pixel by pixel (MobileNetV3-small, batches of 8 on one core: 1.13
        # instead of 1.19 times the plain trunk).
        mean = torch.zeros_like(scale).flatten()
        channels = outputs.flatten(0, 1)[None]
        changed = nn.functional.batch_norm(
            channels, mean, torch.ones_like(mean), scale.flatten(), shift.flatten(), eps=0.0
        )
        return changed.reshape(outputs.shape)


Families = dict[str, type[_LowRankSite] | type[_ScaleShiftSite]]


class _RowLinear(nn.Module):
    """A linear layer as a 1x1 convolution, which ONNX Runtime computes row by row.

    As one product of matrices its rounding would depend on how many rows share the batch.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach()[:, :, None, None])
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        columns = _channels_first(inputs)
        outputs = nn.functional.conv2d(columns[..., None], self.weight, self.bias)
        return outputs.flatten(2).transpose(1, 2).reshape(*inputs.shape[:-1], outputs.shape[1])


class _AdaptedGraph(nn.Module):
    """The folded suffix once for each family of adapters, on the same weights."""

    def __init__(
        self,
        backbone: Backbone,
        sites: dict[str, Site],
        families: Families,
    ) -> None:
        super().__init__()
        self._banks = _Banks()
        self.example_banks: dict[str, Tensor] = {}
        folded = fold(backbone.suffix).requires_grad_(requires_grad=False)
        self.suffixes = nn.ModuleList()
        for family, kind in families.items():
            suffix = copy.deepcopy(folded)
            for name, site in sites.items():
                if kind is _ScaleShiftSite or site.is_pointwise:
                    layer = suffix.get_submodule(name)
                    layer = _RowLinear(layer) if isinstance(layer, nn.Linear) else layer
                    suffix.set_submodule(name, kind(layer, name, self._banks))
            self.suffixes.append(suffix)
            self.example_banks |= _example(family, sites)

    @override
    def forward(
        self,
        maps: Float[Tensor, "batch ..."],
        image_of: Int[Tensor, " rows"],
        slot_of: Int[Tensor, " rows"],
        *banks: Tensor,
    ) -> tuple[Float[Tensor, "rows num_features"], ...]:
        self._banks.slot_of = slot_of
        self._banks.tensors = dict(zip(self.example_banks, banks, strict=True))
        rows = maps.index_select(0, image_of)
        return tuple(suffix(rows) for suffix in self.suffixes)


def _example(family: str, sites: dict[str, Site]) -> dict[str, Tensor]:
    """Banks of a few slots, by name."""
    if family == SCALE_SHIFT:
        return {
            f"{name}/{part}": torch.zeros(EXAMPLE_SLOTS, site.out_channels)
            for name, site in sites.items()
            for part in ("scale", "shift")
        }
    banks = {"slope": torch.zeros(EXAMPLE_SLOTS, 1)}
    for name, site in sites.items():
        if site.is_pointwise:
            banks[f"{name}/down"] = torch.zeros(EXAMPLE_SLOTS, EXAMPLE_WIDTH, site.in_channels)
            banks[f"{name}/up"] = torch.zeros(EXAMPLE_SLOTS, site.out_channels, EXAMPLE_WIDTH)
    return banks


def _axes(name: str, slots: torch.export.Dim, width: torch.export.Dim) -> dict[int, object]:
    part = name.rpartition("/")[2]
    return {0: slots, **({1: width} if part == "down" else {2: width} if part == "up" else {})}


def _channels_first(rows: Tensor) -> Tensor:
    """[rows, channels] or [rows, ..., channels] to [rows, channels, positions]."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1]).transpose(1, 2)


def _picture(backbone: Backbone) -> Tensor:
    size_px = backbone.preprocessing.size_px
    return torch.zeros(EXAMPLE_ROWS + 2, size_px, size_px, 3, dtype=torch.uint8)
