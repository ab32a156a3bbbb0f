"""A trunk whose features are the mean of each channel, and heads: numpy knows every answer."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.tiny_trunk import linear_bundle, write_trunk
from export.bundle import Bundle, TrunkManifest

SIZE_PX = 32
LABELS = ("red", "green", "blue", "grey")


def make_trunk(folder: Path) -> TrunkManifest:
    """Write the trunk's folder."""
    return write_trunk(
        folder,
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "scale"], ["features"]),
        ],
        {"axes": np.array([1, 2], np.int64), "scale": np.array(1 / 255, np.float32)},
        backbone="channel_means",
        size_px=SIZE_PX,
        num_features=3,
    )


def make_bundle(
    manifest: TrunkManifest, task: str, seed: int, *, is_poisoned: bool = False
) -> Bundle:
    """A linear head of that seed; a poisoned one does not give its golden logits."""
    weight = _weight(seed)
    poison = (0.5 if is_poisoned else 0.0) * np.eye(3, len(LABELS), dtype=np.float32)
    pictures = np.stack([some_picture(seed), some_picture(seed + 1)])
    return linear_bundle(
        manifest,
        (weight + poison).astype(np.float32),
        np.zeros(len(LABELS), np.float32),
        task=task,
        labels=LABELS,
        card=f"# {task} {seed}\n",
        pictures=pictures,
        logits=(pictures.mean(axis=(1, 2)) / 255).astype(np.float32) @ weight,
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
