"""A task's held-out sample: the pictures that its heads are compared on, which no pusher chooses.

The file is `heldout.safetensors`: `pictures` uint8 [n, size, size, 3], decoded as the trunk takes
them, and `labels` int64 [n], each an index into the task's labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from export.bundle import HELDOUT, MAX_HELDOUT_BYTES, MAX_HELDOUT_PICTURES


class HeldoutError(ValueError):
    """A held-out sample that is none, or not one for this trunk and these labels."""


@dataclass(frozen=True, eq=False)
class Heldout:
    """Pictures uint8 [n, size, size, 3], and the index of each one's label, int64 [n]."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]


def read_heldout(data: bytes, *, size_px: int, num_labels: int) -> Heldout:
    """Read and check a held-out sample.

    Args:
        size_px: Of the pictures that the trunk takes.

    Raises:
        HeldoutError: unreadable, too large, or not of this trunk and so many labels.
    """
    if len(data) > MAX_HELDOUT_BYTES:
        raise HeldoutError(
            f"{HELDOUT} has {len(data)} bytes; at most {MAX_HELDOUT_BYTES} are accepted."
        )
    try:
        tensors = load(data)
    # safetensors raises an error class of its own that is no public name.
    except Exception as error:
        raise HeldoutError(f"{HELDOUT} cannot be read: {error}.") from error
    if set(tensors) != {"pictures", "labels"}:
        raise HeldoutError(f"{HELDOUT} holds {sorted(tensors)}; expected labels and pictures.")
    pictures, labels = tensors["pictures"], tensors["labels"]
    num = len(pictures) if pictures.ndim else 0
    shapes = ((num, size_px, size_px, 3), (num,))
    types = (pictures.dtype, labels.dtype)
    if (pictures.shape, labels.shape) != shapes or types != (np.uint8, np.int64):
        raise HeldoutError(
            f"{HELDOUT} holds {pictures.dtype} {pictures.shape} and {labels.dtype} {labels.shape}; "
            f"expected pictures uint8 {shapes[0]} and labels int64 {shapes[1]}."
        )
    if not 1 <= num <= MAX_HELDOUT_PICTURES:
        raise HeldoutError(f"{HELDOUT} holds {num} pictures; expected 1 to {MAX_HELDOUT_PICTURES}.")
    if labels.min() < 0 or labels.max() >= num_labels:
        raise HeldoutError(
            f"{HELDOUT} holds labels from {labels.min()} to {labels.max()}; expected 0 to "
            f"{num_labels - 1}, an index into the task's labels each."
        )
    return Heldout(pictures, labels)
