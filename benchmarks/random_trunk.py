"""A trunk of random features, made without torch in a millisecond, and heads for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
from serve.engine import Engine

SIZE_PX, NUM_FEATURES = 8, 576  # as many features as MobileNetV3-small has
LABELS = tuple(f"label{number}" for number in range(10))
VERSIONS: dict[str, str] = {}
PROVENANCE = {
    "command": "benchmark",
    "created_at": "2026-01-01T00:00:00Z",
    "seed": 0,
    "versions": VERSIONS,
}


def write_trunk(folder: Path) -> None:
    """Pixels times a random matrix, and a ReLU."""
    weight = np.random.default_rng(0).normal(size=(3 * SIZE_PX**2, NUM_FEATURES)) / SIZE_PX
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("Div", ["flat", "white"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "weight"], ["product"]),
        helper.make_node("Relu", ["product"], ["features"]),
    ]
    weights = [
        numpy_helper.from_array(np.array(255, np.float32), "white"),
        numpy_helper.from_array(weight.astype(np.float32), "weight"),
    ]
    images = ["batch", SIZE_PX, SIZE_PX, 3]
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, images)
    wanted = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", NUM_FEATURES])
    graph = helper.make_graph(nodes, "trunk", [given], [wanted], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data = model.SerializeToString()
    manifest = TrunkManifest.model_validate(
        {
            "backbone": "random features",
            "cut": "none",
            "num_features": NUM_FEATURES,
            "preprocessing": Preprocessing(SIZE_PX, SIZE_PX, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
            "golden_tolerance": {"fp32": 1e-4},
            "provenance": PROVENANCE,
            "files": {TRUNK_GRAPH: entry_of(data)},
        }
    )
    folder.mkdir()
    (folder / TRUNK_GRAPH).write_bytes(data)
    (folder / TRUNK_MANIFEST).write_text(manifest.model_dump_json())


def linear_bundle(engine: Engine, task: str, chance: np.random.Generator) -> Bundle:
    """A linear head with random weights and one golden sample."""
    weight = chance.normal(size=(NUM_FEATURES, len(LABELS))).astype(np.float32)
    bias = chance.normal(size=len(LABELS)).astype(np.float32)
    pictures = chance.integers(0, 256, (1, SIZE_PX, SIZE_PX, 3), np.uint8)
    return Bundle.pack(
        {
            HEAD: _linear_graph(weight, bias),
            GOLDEN: save(
                {"pictures": pictures, "logits": engine.features(pictures) @ weight + bias}
            ),
            CARD: f"# {task} {chance.integers(10**9)}\n".encode(),
        },
        task=task,
        labels=LABELS,
        trunk=engine.manifest.digest,
        num_features=NUM_FEATURES,
        preprocessing=engine.manifest.preprocessing,
        data={"name": "none", "sha256": "0" * 64, "num_pictures": {}},
        metrics={},
        provenance=PROVENANCE,
    )


def _linear_graph(weight: np.ndarray, bias: np.ndarray) -> bytes:
    given, wanted = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("features", NUM_FEATURES), ("logits", len(LABELS)))
    )
    gemm = helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"])
    weights = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph([gemm], "head", [given], [wanted], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()
