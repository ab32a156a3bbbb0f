"""Trunks and heads written node by node, without torch, in a millisecond."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from export.bundle import (
    CARD,
    GOLDEN,
    HEAD,
    TRUNK_GRAPH,
    TRUNK_MANIFEST,
    Bundle,
    TrunkManifest,
    entry_of,
)
from models.pictures import Preprocessing

VERSIONS: dict[str, str] = {}
PROVENANCE = {
    "command": "benchmark",
    "created_at": "2026-01-01T00:00:00Z",
    "seed": 0,
    "versions": VERSIONS,
}

Arrays = dict[str, NDArray[np.generic]]


def write_trunk(
    folder: Path,
    nodes: list[onnx.NodeProto],
    weights: Arrays,
    *,
    backbone: str,
    size_px: int,
    num_features: int,
) -> TrunkManifest:
    """Write the folder of a trunk whose nodes make `features` of `images`."""
    graph = _graph(
        nodes,
        weights,
        ("images", TensorProto.UINT8, ["batch", size_px, size_px, 3]),
        ("features", TensorProto.FLOAT, ["batch", num_features]),
    )
    manifest = TrunkManifest.model_validate(
        {
            "backbone": backbone,
            "cut": "none",
            "num_features": num_features,
            "preprocessing": Preprocessing(size_px, size_px, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
            "golden_tolerance": {"fp32": 1e-4},
            "provenance": PROVENANCE,
            "files": {TRUNK_GRAPH: entry_of(graph)},
        }
    )
    folder.mkdir(parents=True)
    (folder / TRUNK_GRAPH).write_bytes(graph)
    (folder / TRUNK_MANIFEST).write_text(manifest.model_dump_json())
    return manifest


def linear_bundle(
    trunk: TrunkManifest,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    *,
    task: str,
    labels: tuple[str, ...],
    card: str,
    pictures: NDArray[np.uint8],
    logits: NDArray[np.float32],
) -> Bundle:
    """A linear head, weight float32 [features, labels], with these golden samples."""
    gemm = helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"])
    head = _graph(
        [gemm],
        {"weight": weight, "bias": bias},
        ("features", TensorProto.FLOAT, ["rows", trunk.num_features]),
        ("logits", TensorProto.FLOAT, ["rows", len(labels)]),
    )
    return Bundle.pack(
        {
            HEAD: head,
            GOLDEN: save({"pictures": pictures, "logits": logits}),
            CARD: card.encode(),
        },
        task=task,
        labels=labels,
        trunk=trunk.digest,
        num_features=trunk.num_features,
        preprocessing=trunk.preprocessing,
        data={"name": "none", "sha256": "0" * 64, "num_pictures": {}},
        metrics={},
        provenance=PROVENANCE,
    )


def _graph(
    nodes: list[onnx.NodeProto],
    weights: Arrays,
    given: tuple[str, int, list[str | int]],
    wanted: tuple[str, int, list[str | int]],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info(*wanted)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()
