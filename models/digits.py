"""scikit-learn's handwritten digits, as four tasks on the same pictures, or three labels of each.

1,797 digits of 8 x 8 grey values, part of UCI's "Optical Recognition of Handwritten Digits"
(Alpaydin & Kaynak 1998, doi:10.24432/C50P49). They come with scikit-learn: no download.
"""

import hashlib
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from models.data import Picture, PictureData, Split, fingerprint
from models.multilabel import MultiLabelData, MultiLabelSplit
from models.splits import three_splits

SIZE_PX = 32
DigitTask = Literal["digits", "parity", "loop", "at_least_five"]
DIGIT_TASKS: tuple[DigitTask, ...] = get_args(DigitTask)

# A digit with a closed line. 4 is not among them: many writers leave it open at the top, so whether
# it has a loop depends on the hand and not on the digit.
LOOPED = (0, 6, 8, 9)
_DIGITS = range(10)
DIGIT_TRAITS = "digit_traits"
# The label of a trait and the task whose second label it is.
TRAITS: dict[str, DigitTask] = {
    "odd": "parity",
    "loop": "loop",
    "at_least_five": "at_least_five",
}
_LABELS: dict[DigitTask, tuple[tuple[str, ...], list[int]]] = {
    "digits": (tuple(str(digit) for digit in _DIGITS), list(_DIGITS)),
    "parity": (("even", "odd"), [digit % 2 for digit in _DIGITS]),
    "loop": (("no_loop", "loop"), [int(digit in LOOPED) for digit in _DIGITS]),
    "at_least_five": (("below_five", "at_least_five"), [int(digit >= 5) for digit in _DIGITS]),  # noqa: PLR2004
}


def load_digit_task(task: DigitTask, *, seed: int) -> PictureData:
    """The digits with one task's labels.

    The split is by digit and the same for every task, so no task tests on what another learned.
    """
    rows, targets = load_digits(return_X_y=True)
    digits: list[list[Picture]] = [[] for _ in _DIGITS]
    for row, digit in zip(rows, targets, strict=True):
        digits[digit].append(_to_picture(row.reshape(8, 8)))
    names = [str(digit) for digit in _DIGITS]
    labels, label_of = _LABELS[task]
    to_label = torch.tensor(label_of)
    train, validation, test = (
        Split(split.pictures, to_label[split.labels])
        for split in three_splits(digits, labels=names, seed=seed)
    )
    entries = [
        (labels[label_of[digit]], picture.key)
        for digit, pictures in enumerate(digits)
        for picture in pictures
    ]
    return PictureData(task, labels, train, validation, test, fingerprint(entries))


def load_digit_traits(*, seed: int) -> MultiLabelData:
    """The same pictures, in the same splits, with all that is true of each: `TRAITS`."""
    told = [load_digit_task(task, seed=seed) for task in TRAITS.values()]
    splits = {
        name: MultiLabelSplit(
            split.pictures, torch.stack([data.splits[name].labels for data in told], dim=1)
        )
        for name, split in told[0].splits.items()
    }
    entries = [
        (f"{name}:{row.tolist()}", picture.key)
        for name, split in splits.items()
        for picture, row in zip(split.pictures, split.labels, strict=True)
    ]
    return MultiLabelData(
        DIGIT_TRAITS,
        tuple(TRAITS),
        splits["train"],
        splits["validation"],
        splits["test"],
        fingerprint(entries),
    )


def _to_picture(grey: NDArray[np.float64]) -> Picture:
    """8 x 8 values from 0 to 16 to a 32 px RGB picture."""
    small = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    large = small.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR).convert("RGB")
    pixels = np.asarray(large)
    return Picture(pixels, hashlib.sha256(pixels.tobytes()).hexdigest())
