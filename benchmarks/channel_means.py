"""A trunk whose features are the mean of each channel, and heads: numpy knows every answer."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
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

SIZE_PX = 32
LABELS = ("red", "green", "blue", "grey")
PREPROCESSING = Preprocessing(SIZE_PX, SIZE_PX, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
VERSIONS: dict[str, str] = {}
PROVENANCE = {"command": "benchmark", "created_at": "", "seed": 0, "versions": VERSIONS}


def make_trunk(folder: Path) -> TrunkManifest:
    """Write the trunk's folder."""
    graph = _graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "scale"], ["features"]),
        ],
        {"axes": np.array([1, 2], np.int64), "scale": np.array(1 / 255, np.float32)},
        ("images", TensorProto.UINT8, ["batch", SIZE_PX, SIZE_PX, 3]),
        ("features", TensorProto.FLOAT, ["batch", 3]),
    )
    manifest = TrunkManifest.model_validate(
        {
            "backbone": "channel_means",
            "cut": "none",
            "num_features": 3,
            "preprocessing": PREPROCESSING,
            "golden_tolerance": {"fp32": 1e-4},
            "provenance": PROVENANCE,
            "files": {TRUNK_GRAPH: entry_of(graph)},
        }
    )
    folder.mkdir(parents=True)
    (folder / TRUNK_GRAPH).write_bytes(graph)
    (folder / TRUNK_MANIFEST).write_text(manifest.model_dump_json())
    return manifest


def make_bundle(
    manifest: TrunkManifest, task: str, seed: int, *, is_poisoned: bool = False
) -> Bundle:
    """A linear head of that seed; a poisoned one does not give its golden logits."""
    weight = _weight(seed)
    served = weight + (0.5 if is_poisoned else 0.0) * np.eye(3, len(LABELS), dtype=np.float32)
    head = _graph(
        [helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"])],
        {"weight": served, "bias": np.zeros(len(LABELS), np.float32)},
        ("features", TensorProto.FLOAT, ["rows", 3]),
        ("logits", TensorProto.FLOAT, ["rows", len(LABELS)]),
    )
    pictures = np.stack([some_picture(seed), some_picture(seed + 1)])
    logits = (pictures.mean(axis=(1, 2)) / 255).astype(np.float32) @ weight
    return Bundle.pack(
        {
            HEAD: head,
            GOLDEN: save({"pictures": pictures, "logits": logits}),
            CARD: f"# {task} {seed}\n".encode(),
        },
        task=task,
        labels=LABELS,
        trunk=manifest.digest,
        num_features=3,
        preprocessing=PREPROCESSING,
        data={"name": "none", "sha256": "0" * 64, "num_pictures": {}},
        metrics={},
        provenance=PROVENANCE,
    )


def expected_scores(picture: NDArray[np.uint8], seed: int) -> NDArray[np.float64]:
    """What the head of that seed says of a picture, float64 [labels]."""
    logits = picture.astype(np.float64).mean(axis=(0, 1)) / 255 @ _weight(seed)
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def some_picture(seed: int) -> NDArray[np.uint8]:
    """One colour and a little noise, uint8 [size, size, 3]."""
    chance = np.random.default_rng(seed)
    noise = chance.integers(-20, 21, (SIZE_PX, SIZE_PX, 3))
    return np.clip(chance.integers(0, 256, 3) + noise, 0, 255).astype(np.uint8)


def png_of(picture: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _weight(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(3, len(LABELS))).astype(np.float32) * 3


def _graph(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
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
