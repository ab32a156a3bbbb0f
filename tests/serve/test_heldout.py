"""A held-out sample is checked before anything is compared on it."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from export.bundle import MAX_HELDOUT_BYTES
from serve.heldout import HeldoutError, read_heldout
from tests.serve.exams import exam, heldout


def test_a_sample_is_read_as_it_was_written() -> None:
    """Pictures and labels."""
    pictures, labels = exam(20)
    sample = read_heldout(heldout(20), size_px=8, num_labels=3)

    np.testing.assert_array_equal(sample.pictures, pictures)
    np.testing.assert_array_equal(sample.labels, labels)


def file(num: int = 4, **tensors: np.ndarray | None) -> bytes:
    """A good sample with some tensors replaced, or left out."""
    pictures, labels = exam(num)
    every = {"pictures": pictures, "labels": labels, **tensors}
    return save({name: tensor for name, tensor in every.items() if tensor is not None})


ONE = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "heldout.safetensors cannot be read"),
        (b"no tensors at all", "heldout.safetensors cannot be read"),
        (heldout(4)[:-1], "heldout.safetensors cannot be read"),
        (file(labels=None), r"holds \['pictures'\]; expected labels and pictures"),
        (file(more=ONE), "expected labels and pictures"),
        (file(labels=ONE[:3]), r"int64 \(3,\); expected pictures uint8 .* int64 \(4,\)"),
        (file(labels=ONE.astype(np.int32)), r"int32 \(4,\); expected"),
        (file(labels=np.ones(4)), "float64"),
        (file(labels=ONE[:, None]), r"int64 \(4, 1\); expected"),
        (file(pictures=np.zeros((4, 9, 8, 3), np.uint8)), r"\(4, 9, 8, 3\).*expected"),
        (file(pictures=np.zeros((4, 8, 8, 3), np.float32)), "float32"),
        (file(pictures=np.zeros((), np.uint8)), r"uint8 \(\)"),
        (file(0), "holds 0 pictures; expected 1 to 500"),
        (heldout(501), "holds 501 pictures; expected 1 to 500"),
        (file(labels=ONE + 3), "labels from 3 to 3; expected 0 to 2"),
        (file(labels=ONE - 1), "labels from -1 to -1; expected 0 to 2"),
        (bytes(MAX_HELDOUT_BYTES + 1), "at most 33554432 are accepted"),
    ],
)
def test_what_is_no_sample_of_the_task_is_refused(data: bytes, reason: str) -> None:
    """With what it holds and what was expected."""
    with pytest.raises(HeldoutError, match=reason):
        read_heldout(data, size_px=8, num_labels=3)
