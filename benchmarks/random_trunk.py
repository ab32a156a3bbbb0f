"""A trunk of random features, and linear heads for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from benchmarks import tiny_trunk
from export.bundle import Bundle
from serve.engine import Engine

SIZE_PX, NUM_FEATURES = 8, 576  # as many features as MobileNetV3-small has
LABELS = tuple(f"label{number}" for number in range(10))


def write_trunk(folder: Path) -> None:
    """Pixels times a random matrix, and a ReLU."""
    weight = np.random.default_rng(0).normal(size=(3 * SIZE_PX**2, NUM_FEATURES)) / SIZE_PX
    tiny_trunk.write_trunk(
        folder,
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("Div", ["flat", "white"], ["pixels"]),
            helper.make_node("MatMul", ["pixels", "weight"], ["product"]),
            helper.make_node("Relu", ["product"], ["features"]),
        ],
        {"white": np.array(255, np.float32), "weight": weight.astype(np.float32)},
        backbone="random features",
        size_px=SIZE_PX,
        num_features=NUM_FEATURES,
    )


def linear_bundle(engine: Engine, task: str, chance: np.random.Generator) -> Bundle:
    """A linear head with random weights and one golden sample."""
    weight = chance.normal(size=(NUM_FEATURES, len(LABELS))).astype(np.float32)
    bias = chance.normal(size=len(LABELS)).astype(np.float32)
    pictures = chance.integers(0, 256, (1, SIZE_PX, SIZE_PX, 3), np.uint8)
    return tiny_trunk.linear_bundle(
        engine.manifest,
        weight,
        bias,
        task=task,
        labels=LABELS,
        card=f"# {task} {chance.integers(10**9)}\n",
        pictures=pictures,
        logits=engine.features(pictures) @ weight + bias,
    )
