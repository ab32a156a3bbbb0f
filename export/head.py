"""A trained head, with an adapter or without, to a bundle: graph, golden samples and card."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import save
from torch import Tensor, nn

from export.adapter import Adapter, adapted_features
from export.bundle import (
    ADAPTER,
    CARD,
    GOLDEN,
    HEAD,
    HELDOUT,
    TRUNK_ADAPTED,
    AdapterEntry,
    Bundle,
    Provenance,
    TrunkManifest,
)
from export.card import write_card
from export.errors import ExportError
from export.onnx_file import EXAMPLE_ROWS, dynamic, graph_of
from export.parity import head_parity, open_session, run
from models.evaluate import Estimate
from models.record import DataRecord

# Raw pixels of 224 px take 150 KB a picture, far more than most heads.
NUM_GOLDEN = 8


def export_head(head: nn.Module, *, num_features: int) -> bytes:
    """`head.onnx`: `features` float32 [rows, num_features] -> `logits` float32 [rows, labels].

    An affine head becomes one Gemm, by which serving recognises it.

    Args:
        head: In evaluation mode, on the CPU.
    """
    return graph_of(
        head,
        (torch.zeros(EXAMPLE_ROWS, num_features),),
        axes=({0: dynamic("rows")},),
        input_names=("features",),
        output_names=("logits",),
    )


def bundle_head(
    head: nn.Module,
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
    adapter: Adapter | None = None,
    adapted_graph: bytes | None = None,
    link: Literal["softmax", "sigmoid", "none"] = "softmax",
    temperature: float = 1.0,
    thresholds: tuple[float, ...] | None = None,
    verdict: str = "",
    notes: Sequence[str] = (),
    heldout: bytes | None = None,
) -> Bundle:
    """Export a head, prove that its graph computes the same, and bundle it.

    Args:
        head: Features to logits, on any device and in any mode; it is not changed.
        trunk_graph: The bytes of the trunk's `trunk.onnx`.
        pictures: Test pictures of the trunk's size; a handful become the golden samples.
        picture_labels: Index of each one's label.
        metrics: Accuracies by split; `baseline_NAME` is what `NAME` is compared with.
        adapter: What changes the features that the head reads; then `adapted_graph` is needed, the
            bytes of the trunk's `trunk_adapted.onnx`.
        thresholds: See `Manifest`; for heads that give any number of labels.
        verdict: Whether transfer pays, in words; see `models.rivals.verdict`.
        notes: What else a reader of the card should know.
        heldout: The held-out sample for a task that has none; see `export.heldout.heldout_of`.

    Raises:
        ExportError: the head does not fit the trunk or the labels, or there are no pictures.
        ParityError: graph and head differ.
        BundleError: a field of the manifest is out of range.
    """
    frozen = copy.deepcopy(head).cpu().eval().requires_grad_(requires_grad=False)
    _check_head(frozen, num_features=trunk.num_features, num_labels=len(labels))
    graph = export_head(frozen, num_features=trunk.num_features)
    golden = pictures[spread(picture_labels, NUM_GOLDEN)].cpu().numpy()
    features = _features(trunk_graph, adapted_graph, adapter, golden)
    head_parity(frozen, graph, features)
    logits = run(open_session(graph), ("logits",), features)["logits"]
    files = {HEAD: graph, **({ADAPTER: adapter.to_bytes()} if adapter else {})}
    return pack(
        files, golden, logits, task=task, labels=labels, trunk=trunk, data=data, metrics=metrics,
        provenance=provenance, adapter=adapter.entry if adapter else None, link=link,
        temperature=temperature, thresholds=thresholds, verdict=verdict, notes=notes,
        heldout=heldout,
    )  # fmt: skip


def pack(
    files: Mapping[str, bytes],
    golden: UInt8[np.ndarray, "golden height width 3"],
    logits: Float[np.ndarray, "golden num_labels"],
    *,
    task: str,
    labels: Sequence[str],
    trunk: TrunkManifest,
    data: DataRecord,
    metrics: Mapping[str, Estimate],
    provenance: Provenance,
    kind: Literal["head", "adapter", "tail"] | None = None,
    adapter: AdapterEntry | None = None,
    link: Literal["softmax", "sigmoid", "none"] = "softmax",
    temperature: float = 1.0,
    thresholds: tuple[float, ...] | None = None,
    verdict: str = "",
    notes: Sequence[str] = (),
    heldout: bytes | None = None,
) -> Bundle:
    """Add golden samples and the card to what answers, and name all of it in a manifest.

    Args:
        files: The graph, and the adapter if there is one.
        golden: Pictures of the samples; `logits` are what serving computes of them.
        kind: None says it by the adapter.

    Raises:
        BundleError: a field of the manifest is out of range.
    """
    kind = kind or ("adapter" if adapter else "head")
    card = write_card(
        task=task, labels=labels, link=link, temperature=temperature, trunk=trunk, data=data,
        metrics=metrics, provenance=provenance, kind=kind, adapter=adapter,
        model_bytes=sum(len(content) for content in files.values()), verdict=verdict, notes=notes,
    )  # fmt: skip
    samples = {GOLDEN: save({"pictures": golden, "logits": logits})}
    if heldout is not None:
        samples[HELDOUT] = heldout
    return Bundle.pack(
        {**files, **samples, CARD: card.encode()},
        task=task, kind=kind, adapter=adapter, labels=tuple(labels), link=link,
        temperature=temperature, thresholds=thresholds, trunk=trunk.digest,
        num_features=trunk.num_features, preprocessing=trunk.preprocessing,
        data=data.model_dump(), provenance=provenance,
        metrics={name: dataclasses.asdict(value) for name, value in metrics.items()},
    )  # fmt: skip


def spread(labels: Int[Tensor, " pictures"], num_picked: int) -> list[int]:
    """Places of a few pictures, of as many labels as possible, the same ones every time.

    Raises:
        ExportError: there are no pictures.
    """
    if not len(labels):
        raise ExportError("There are no pictures for golden samples; give a few of the test split.")
    seen: dict[int, int] = {}
    rounds: list[tuple[int, int, int]] = []
    for place, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        rounds.append((seen[label], label, place))
    rounds.sort()
    # With more labels than picks the first round is thinned out evenly, else all of it is taken.
    candidates = rounds[: max(num_picked, len(seen))]
    picks = np.linspace(0, len(candidates) - 1, min(num_picked, len(candidates))).round()
    return [candidates[int(pick)][2] for pick in picks]


def _features(
    trunk_graph: bytes,
    adapted_graph: bytes | None,
    adapter: Adapter | None,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
) -> Float[np.ndarray, "pictures num_features"]:
    """What serving computes, so that golden logits hold no difference between frameworks."""
    if adapter is None:
        return run(open_session(trunk_graph), ("features",), pictures)["features"]
    if adapted_graph is None:
        raise ExportError(
            f"The trunk has no {TRUNK_ADAPTED}, so it serves no adapters. Export it again, or "
            "train a head or a tail."
        )
    return adapted_features(trunk_graph, adapted_graph, adapter, pictures)


def _check_head(head: nn.Module, *, num_features: int, num_labels: int) -> None:
    try:
        with torch.no_grad():
            logits = head(torch.zeros(EXAMPLE_ROWS, num_features))
    # The module is the caller's: it may raise anything.
    except Exception as error:
        raise ExportError(
            f"The head does not take the trunk's {num_features} features: {error}. "
            "Train it on features of this trunk."
        ) from error
    if logits.shape != (EXAMPLE_ROWS, num_labels):
        raise ExportError(
            f"The head gives {list(logits.shape[1:])} logits a row; there are {num_labels} labels. "
            "Give the labels in the order of its outputs."
        )
