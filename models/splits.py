"""Stratified train, validation and test splits by seed."""

from collections.abc import Sequence

import numpy as np
import torch

from models.data import DataError, Picture, Split

VALIDATION_SHARE = 0.2
TEST_SHARE = 0.2


def three_splits(
    classes: Sequence[Sequence[Picture]], *, labels: Sequence[str], seed: int
) -> tuple[Split, Split, Split]:
    """Split every class alike into train, validation and test.

    Args:
        classes: Pictures of each class.
        labels: Names of the classes, for errors.

    Raises:
        DataError: a class has fewer than 2 pictures, so it cannot be both learned and tested.
    """
    for label, pictures in zip(labels, classes, strict=True):
        if len(pictures) < 2:  # noqa: PLR2004
            raise DataError(
                f"Class {label!r} has {len(pictures)} readable pictures; expected at least 2, one "
                "to learn from and one to test on. Add pictures, or give a test/ folder."
            )
    return _deal(classes, test_share=TEST_SHARE, seed=seed)


def two_splits(
    classes: Sequence[Sequence[Picture]], *, labels: Sequence[str], seed: int
) -> tuple[Split, Split]:
    """Split every class alike into train and validation, where test pictures are given.

    A class with a single picture keeps it for training.

    Raises:
        DataError: a class has no picture.
    """
    for label, pictures in zip(labels, classes, strict=True):
        if not pictures:
            raise DataError(
                f"Class {label!r} has no readable picture in train/; expected at least 1."
            )
    train, validation, _ = _deal(classes, test_share=0.0, seed=seed)
    return train, validation


def to_split(classes: Sequence[Sequence[Picture]]) -> Split:
    """All pictures of all classes as one split."""
    return Split(
        tuple(picture for pictures in classes for picture in pictures),
        torch.tensor(
            [label for label, pictures in enumerate(classes) for _ in pictures], dtype=torch.int64
        ),
    )


def _deal(
    classes: Sequence[Sequence[Picture]], *, test_share: float, seed: int
) -> tuple[Split, Split, Split]:
    random = np.random.default_rng(seed)
    dealt: tuple[list[list[Picture]], ...] = ([], [], [])
    for pictures in classes:
        # Sorted by content, so that neither names nor the order of files decide.
        ordered = sorted(pictures, key=lambda picture: picture.key)
        shuffled = [ordered[index] for index in random.permutation(len(ordered))]
        num_test = max(1, round(test_share * len(shuffled))) if test_share else 0
        num_left = len(shuffled) - num_test
        num_validation = max(1, round(VALIDATION_SHARE * num_left)) if num_left > 1 else 0
        end = num_test + num_validation
        parts = (shuffled[end:], shuffled[num_test:end], shuffled[:num_test])
        for part, split in zip(parts, dealt, strict=True):
            split.append(part)
    train, validation, test = (to_split(split) for split in dealt)
    return train, validation, test
