"""Held-out samples for the tiny trunk, and heads that pass them as well as one likes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from export.bundle import digest_of
from serve.exam import Exam, Kept
from tests.serve.oracle import SIZE_PX

PERFECT = np.eye(3, dtype=np.float32)  # the brightest channel


def exam(num: int = 200, *, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise with one channel brighter, uint8 [num, 8, 8, 3], and which one, int64 [num]."""
    chance = np.random.default_rng(seed)
    pictures = chance.integers(0, 200, (num, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    labels = chance.integers(0, 3, num)
    pictures[np.arange(num), :, :, labels] += np.uint8(55)
    return pictures, labels


def heldout(num: int = 200, *, seed: int = 0) -> bytes:
    """The same as `heldout.safetensors`."""
    pictures, labels = exam(num, seed=seed)
    return save({"pictures": pictures, "labels": labels})


def partial(loss: float) -> NDArray[np.float32]:
    """A head that sees so much less of red: all of it at 0, none of it at 1."""
    weight = PERFECT.copy()
    weight[0, 0] = 1 - loss
    return weight


def right(weight: NDArray[np.float32], num: int = 200, *, seed: int = 0) -> NDArray[np.bool_]:
    """Which pictures of an exam a head gets right, by numpy alone."""
    pictures, labels = exam(num, seed=seed)
    means = pictures.astype(np.float64).mean(axis=(1, 2)) / 255
    return (means @ weight.astype(np.float64)).argmax(axis=1) == labels


def exam_of(sample: bytes, kept: Kept | None = None, num_labels: int = 3) -> Exam:
    """The exam that a sample is, with nothing kept of it yet."""
    return Exam(digest_of(sample), lambda _: sample, kept or Kept(), num_labels=num_labels)
