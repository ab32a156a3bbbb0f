"""A student to a trunk: one float graph with normalisation inside, proven equal, in a folder."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import override

from export.adapted import adapted_graph
from export.adapted_parity import adapted_parity
from export.bundle import (
    PRECISION_GRAPHS,
    STUDENT,
    TRUNK_ADAPTED,
    TRUNK_GRAPH,
    TRUNK_MANIFEST,
    Digest,
    Provenance,
    TrunkManifest,
    entry_of,
)
from export.errors import ExportError
from export.onnx_file import EXAMPLE_ROWS, dynamic, graph_of
from export.parity import GOLDEN_TOLERANCE, Parity, trunk_parity
from export.precision import Candidate
from export.variants import Variants
from models.backbones import Backbone
from models.progress import Progress, ProgressCallback, unheard

NUM_ADAPTED = 8  # pictures that every kind of adapter is compared on


@dataclass(frozen=True)
class TrunkReport:
    """A trunk that was written.

    Args:
        parity: Output (`features`, `prefix`), or what an adapter makes of the features -> how
            close it is to PyTorch's.
        graph_bytes: Size of `trunk.onnx`.
        candidates: What was measured of other precisions, the float graph first; none if none was
            asked for.
    """

    manifest: TrunkManifest
    parity: Mapping[str, Parity]
    graph_bytes: int
    candidates: tuple[Candidate, ...] = ()

    @property
    def digest(self) -> Digest:
        """What heads name the trunk by."""
        return self.manifest.digest


def export_trunk(
    backbone: Backbone,
    pictures: UInt8[Tensor, "pictures height width 3"],
    out: Path,
    *,
    provenance: Provenance,
    find: Callable[[bytes], Variants] | None = None,
    progress: ProgressCallback = unheard,
) -> TrunkReport:
    """Export a student, prove that the graph computes the same, and write the trunk's folder.

    Args:
        backbone: On any device and in any mode; it is not changed.
        pictures: Real pictures of the trunk's size, to compare on; a few dozen are enough.
        out: Made if it is missing. An older trunk in it is replaced.
        find: Gives the variants of the float graph in other precisions; what it raises leaves
            nothing written.

    Raises:
        ExportError: pictures of another size, or none.
        ParityError: graph and backbone differ; then nothing is written.
    """
    _check_pictures(pictures, backbone)
    # A copy, because exporting needs evaluation mode on the CPU.
    frozen = copy.deepcopy(backbone).cpu().eval().requires_grad_(requires_grad=False)
    graph = trunk_graph(frozen)
    progress(Progress("export", 1, 1, f"{len(graph) / 1e6:.1f} MB"))
    parity = trunk_parity(frozen, graph, pictures, progress=progress)
    files = {TRUNK_GRAPH: graph, STUDENT: save(_plain_state(frozen))}
    adapted = adapted_graph(frozen)
    if adapted:
        files[TRUNK_ADAPTED] = adapted
        parity |= adapted_parity(frozen, adapted, pictures[:NUM_ADAPTED])
        progress(Progress("adapters", 1, 1, f"{len(adapted) / 1e6:.1f} MB"))
    variants = find(graph) if find else Variants()
    files |= {PRECISION_GRAPHS[name]: data for name, data in variants.graphs.items()}
    manifest = TrunkManifest(
        backbone=backbone.reference,
        cut=backbone.cut,
        num_features=backbone.num_features,
        preprocessing=backbone.preprocessing,
        golden_tolerance={"fp32": GOLDEN_TOLERANCE, **variants.golden_tolerance},
        picked=variants.picked,
        provenance=provenance,
        files={name: entry_of(data) for name, data in files.items()},
    )
    _write(out, files, manifest)
    return TrunkReport(manifest, parity, len(graph), variants.candidates)


def trunk_graph(backbone: Backbone) -> bytes:
    """`trunk.onnx`: `images` uint8 [batch, size, size, 3] -> `features`, `prefix`.

    Args:
        backbone: In evaluation mode, on the CPU.
    """
    size_px = backbone.preprocessing.size_px
    return graph_of(
        _TrunkGraph(backbone).eval(),
        (torch.zeros(EXAMPLE_ROWS, size_px, size_px, 3, dtype=torch.uint8),),
        axes=({0: dynamic("batch")},),
        input_names=("images",),
        output_names=("features", "prefix"),
    )


class _TrunkGraph(nn.Module):
    """The backbone with the map at its cut as a second output."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @override
    def forward(
        self, images: UInt8[Tensor, "batch height width 3"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch ..."]]:
        # Permuted pictures are channels-last in memory, which pooling hands on by `as_strided`: ten
        # gathers in MobileNetV3. In ONNX there are no strides, and the copy costs nothing.
        maps = self.backbone.prefix(self.backbone.normalise(images).contiguous())
        return self.backbone.suffix(maps), maps


def _check_pictures(pictures: Tensor, backbone: Backbone) -> None:
    size_px = backbone.preprocessing.size_px
    if not len(pictures) or pictures.shape[1:] != (size_px, size_px, 3):
        raise ExportError(
            f"Pictures to compare on have shape {list(pictures.shape)}; {backbone.name} needs at "
            f"least one of {size_px} x {size_px} px. Decode them with its own preprocessing."
        )


def _plain_state(backbone: Backbone) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in backbone.state_dict().items()}


def _write(folder: Path, files: Mapping[str, bytes], manifest: TrunkManifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest goes first and comes last: a folder with one is whole.
    (folder / TRUNK_MANIFEST).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / TRUNK_MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
