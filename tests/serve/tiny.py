"""Tiny trunks that take pictures of different sizes and give different features; their truth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.numpy import save

from export.bundle import (
    CARD,
    GOLDEN,
    HEAD,
    HELDOUT,
    TRUNK_GRAPH,
    TRUNK_MANIFEST,
    Bundle,
    TrunkManifest,
    entry_of,
)
from models.pictures import Preprocessing, load_picture
from serve.engine import Engine
from tests.serve.graphs import head_model, node

LABELS = ("red", "green", "blue")
PROVENANCE = {
    "command": "test",
    "created_at": "2026-01-01T00:00:00Z",
    "seed": 0,
    "versions": dict[str, str](),
}


def png_of(picture: NDArray[np.uint8]) -> bytes:
    """A picture as a file that loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


class TinyTrunk:
    """The means of the channels in another order, times a factor, of pictures of one size.

    Args:
        folder: Where it is written.
        roll: By how many places the channels are moved.
        ballast_bytes: Weights that do nothing but lie in memory.
    """

    def __init__(
        self, folder: Path, *, size_px: int, roll: int, scale: float, ballast_bytes: int = 0
    ) -> None:
        self.folder, self.roll, self.scale = folder, roll, scale
        self.preprocessing = Preprocessing(size_px, size_px, (0.0,) * 3, (1.0,) * 3)
        graph = self._graph(size_px, ballast_bytes)
        self.manifest = TrunkManifest.model_validate(
            {
                "backbone": "channel_means",
                "cut": "none",
                "num_features": 3,
                "preprocessing": self.preprocessing,
                "golden_tolerance": {"fp32": 1e-4},
                "provenance": PROVENANCE,
                "files": {TRUNK_GRAPH: entry_of(graph)},
            }
        )
        self.engine = Engine(graph, self.manifest)
        folder.mkdir(parents=True)
        (folder / TRUNK_GRAPH).write_bytes(graph)
        (folder / TRUNK_MANIFEST).write_text(self.manifest.model_dump_json())

    def bundle(
        self,
        task: str,
        seed: int,
        heldout: bytes | None = None,
        *,
        weight: NDArray[np.float32] | None = None,
    ) -> Bundle:
        """A head for this trunk; the same seed makes the same weights on every trunk."""
        chance = np.random.default_rng(seed)
        weight = self.weight(seed) if weight is None else weight
        size_px = self.preprocessing.size_px
        pictures = chance.integers(0, 256, (2, size_px, size_px, 3), dtype=np.uint8)
        return Bundle.pack(
            {
                HEAD: head_model(
                    [node("MatMul", "features weight", "logits")], {"weight": weight}
                ).SerializeToString(),
                GOLDEN: save({"pictures": pictures, "logits": self._features(pictures) @ weight}),
                CARD: f"# {task} {seed}\n".encode(),
                **({HELDOUT: heldout} if heldout else {}),
            },
            task=task,
            labels=LABELS,
            trunk=self.manifest.digest,
            num_features=3,
            preprocessing=self.preprocessing,
            data={"name": "none", "sha256": "0" * 64, "num_pictures": {}},
            metrics={},
            provenance=PROVENANCE,
        )

    def weight(self, seed: int) -> NDArray[np.float32]:
        """Of the head with that seed, float32 [3, labels]."""
        return np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32)

    def scores(self, picture: NDArray[np.uint8], seed: int) -> NDArray[np.float32]:
        """What a head says of a picture that came as a file, by numpy alone."""
        decoded = load_picture(png_of(picture), self.preprocessing, max_pixels=10**6)
        logits = self._features(decoded[None])[0] @ self.weight(seed)
        exponentials = np.exp(logits - logits.max())
        return exponentials / exponentials.sum()

    def _features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        means = pictures.astype(np.float64).mean(axis=(1, 2))
        return (self.scale * np.roll(means, self.roll, axis=1)).astype(np.float32)

    def _graph(self, size_px: int, ballast_bytes: int) -> bytes:
        order = np.roll(np.arange(3), self.roll)
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("Gather", ["mean", "order"], ["rolled"], axis=1),
            helper.make_node("Mul", ["rolled", "scale"], ["scaled"]),
            # All of the ballast is zeros, but the session cannot know that before it runs.
            helper.make_node("MatMul", ["scaled", "ballast"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros", "last"], ["nothing"], keepdims=1),
            helper.make_node("Add", ["scaled", "nothing"], ["features"]),
        ]
        ballast = np.zeros((3, max(1, ballast_bytes // 12)), np.float32)
        weights = {
            "axes": np.array([1, 2], np.int64),
            "last": np.array([1], np.int64),
            "order": order.astype(np.int64),
            "scale": np.array(self.scale, np.float32),
            "ballast": ballast,
        }
        shape = ["batch", size_px, size_px, 3]
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        opset = [helper.make_opsetid("", 18)]
        return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
