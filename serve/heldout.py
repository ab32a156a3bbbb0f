"""A task's held-out sample: the pictures that its heads are compared on, which no pusher chooses.

The file is `heldout.safetensors`: `pictures` uint8 [n, size, size, 3], decoded as the trunk takes
them, and `labels` int64 [n], each an index into the task's labels; or, of a task that gives any
number of labels, int64 [n, labels] of 0 and 1.
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
    """Pictures uint8 [n, size, size, 3], with the label or the labels of each; see above."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def is_multilabel(self) -> bool:
        """Whether a picture may have any number of labels."""
        return self.labels.ndim > 1


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
    shape, shapes = (num, size_px, size_px, 3), ((num,), (num, num_labels))
    types = (pictures.dtype, labels.dtype)
    if pictures.shape != shape or labels.shape not in shapes or types != (np.uint8, np.int64):
        raise HeldoutError(
            f"{HELDOUT} holds {pictures.dtype} {pictures.shape} and {labels.dtype} {labels.shape}; "
            f"expected pictures uint8 {shape} and labels int64 {shapes[0]}, or {shapes[1]} where a "
            "picture may have any number of labels."
        )
    if not 1 <= num <= MAX_HELDOUT_PICTURES:
        raise HeldoutError(f"{HELDOUT} holds {num} pictures; expected 1 to {MAX_HELDOUT_PICTURES}.")
    most, meaning = num_labels - 1, "an index into the task's labels each"
    if labels.ndim > 1:
        most, meaning = 1, "whether a picture has a label"
    if labels.min() < 0 or labels.max() > most:
        raise HeldoutError(
            f"{HELDOUT} holds labels from {labels.min()} to {labels.max()}; expected 0 to {most}, "
            f"{meaning}."
        )
    return Heldout(pictures, labels)
