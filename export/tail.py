"""A task's own suffix with its head to a bundle: one graph from the prefix map to logits."""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from export.bundle import TAIL, Bundle, Provenance, TrunkManifest
from export.errors import ExportError
from export.head import NUM_GOLDEN, pack, spread
from export.onnx_file import EXAMPLE_ROWS, dynamic, graph_of
from export.parity import PARITY_TOLERANCE, compare, open_session, run
from models.evaluate import Estimate
from models.record import DataRecord


def export_tail(tail: nn.Module, maps: Float[Tensor, "rows ..."]) -> bytes:
    """`tail.onnx`: `prefix` float32 [rows, ...] -> `logits` [rows, labels].

    Args:
        tail: In evaluation mode, on the CPU.
        maps: An example of what it takes.
    """
    example = torch.zeros(EXAMPLE_ROWS, *maps.shape[1:])
    return graph_of(
        tail,
        (example,),
        axes=({0: dynamic("rows")},),
        input_names=("prefix",),
        output_names=("logits",),
    )


def bundle_tail(
    tail: nn.Module,
    *,
    task: str,
    labels: Sequence[str],
    trunk: TrunkManifest,
    trunk_graph: bytes,
    pictures: UInt8[Tensor, "pictures height width 3"],
    picture_labels: Int[Tensor, " pictures"],
    data: DataRecord,
    metrics: Mapping[str, Estimate],
    provenance: Provenance,
    link: Literal["softmax", "sigmoid", "none"] = "softmax",
    temperature: float = 1.0,
    verdict: str = "",
    notes: Sequence[str] = (),
    heldout: bytes | None = None,
) -> Bundle:
    """Export a tail, prove that its graph computes the same, and bundle it.

    Args:
        tail: Prefix maps to logits, on any device and in any mode; it is not changed.

    The others are those of `export.head.bundle_head`.

    Raises:
        ExportError: the tail does not fit the trunk or the labels, or there are no pictures.
        ParityError: graph and tail differ.
        BundleError: a field of the manifest is out of range.
    """
    frozen = copy.deepcopy(tail).cpu().eval().requires_grad_(requires_grad=False)
    golden = pictures[spread(picture_labels, NUM_GOLDEN)].cpu().numpy()
    maps = run(open_session(trunk_graph), ("prefix",), golden)["prefix"]
    expected = _logits(frozen, maps, num_labels=len(labels))
    graph = export_tail(frozen, torch.from_numpy(maps))
    logits = run(open_session(graph), ("logits",), maps)["logits"]
    compare("logits", expected, logits, tolerance=PARITY_TOLERANCE)
    return pack(
        {TAIL: graph}, golden, logits, kind="tail", task=task, labels=labels, trunk=trunk,
        data=data, metrics=metrics, provenance=provenance, link=link, temperature=temperature,
        verdict=verdict, notes=notes, heldout=heldout,
    )  # fmt: skip


def _logits(
    tail: nn.Module, maps: Float[np.ndarray, "rows ..."], *, num_labels: int
) -> Float[np.ndarray, "rows labels"]:
    try:
        with torch.no_grad():
            logits = tail(torch.from_numpy(maps))
    # The module is the caller's: it may raise anything.
    except Exception as error:
        raise ExportError(
            f"The tail does not take the trunk's prefix maps {list(maps.shape[1:])}: {error}. "
            "Train it on maps of this trunk."
        ) from error
    if logits.shape != (len(maps), num_labels):
        raise ExportError(
            f"The tail gives {list(logits.shape[1:])} logits a row; there are {num_labels} labels. "
            "Give the labels in the order of its outputs."
        )
    return logits.numpy()
