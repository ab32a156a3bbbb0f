"""Pictures that have any number of labels each, in three splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from models.data import DataError, Picture, Skipped, fingerprint
from models.iterative_split import iterative_split
from models.label_table import LABELS, LabelRow, read_label_table
from models.picture_files import PictureReader
from models.progress import Progress, ProgressCallback, unheard
from models.record import DataRecord
from models.splits import TEST_SHARE, VALIDATION_SHARE

# One with and one without it in train, validation and test.
MIN_PICTURES = 3


@dataclass(frozen=True)
class MultiLabelSplit:
    """Pictures, and which labels each has: 0 or 1."""

    pictures: tuple[Picture, ...]
    labels: Int[Tensor, "pictures labels"]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def combinations(self) -> Int[Tensor, " pictures"]:
        """A number for each picture, the same for the same set of labels."""
        return torch.unique(self.labels, dim=0, return_inverse=True)[1]


@dataclass(frozen=True)
class MultiLabelData:
    """One task's pictures; see `models.data.PictureData`."""

    name: str
    labels: tuple[str, ...]
    train: MultiLabelSplit
    validation: MultiLabelSplit
    test: MultiLabelSplit
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def splits(self) -> dict[str, MultiLabelSplit]:
        """Name -> split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> label -> number of pictures that have it."""
        return {
            name: dict(zip(self.labels, split.labels.sum(dim=0).tolist(), strict=True))
            for name, split in self.splits.items()
        }

    def record(self) -> DataRecord:
        """What a bundle says of this data."""
        return DataRecord(name=self.name, sha256=self.fingerprint, num_pictures=self.counts)


@dataclass(frozen=True)
class Tagged:
    """A picture and its labels."""

    picture: Picture
    labels: frozenset[str]


def load_label_folder(
    folder: Path, *, seed: int, progress: ProgressCallback = unheard
) -> MultiLabelData:
    """Read a folder with a `labels.csv`, or with train/labels.csv and perhaps test/labels.csv.

    Split as `models.folders.load_folder` does, every label alike as well as can be. Files that
    cannot be read, are there twice or stand in no table are left out and listed in `skipped`.

    Raises:
        DataError: a table is wrong, a picture that it names is missing, or a label has too few
            pictures with it, or without it.
    """
    train_folder = folder / "train" if (folder / "train" / LABELS).is_file() else folder
    test_folder = folder / "test" if train_folder != folder else None
    reader = PictureReader(folder)
    has_test = test_folder is not None and (test_folder / LABELS).is_file()
    # Test first: of a picture that lies in both, the copy in train/ is left out.
    test = _read(reader, folder / "test", progress) if has_test else None
    known = _read(reader, train_folder, progress)
    names = tuple(sorted({label for one in known for label in one.labels}))
    if test is not None and (unknown := {n for one in test for n in one.labels} - set(names)):
        raise DataError(
            f"{folder / 'test' / LABELS} has the label {min(unknown)!r}, which no picture in "
            "train/ has; expected the same labels in both."
        )
    try:
        splits = _split(names, known, test, seed=seed)
    except DataError as error:
        raise DataError(f"{folder}: {error}{reader.hint()}") from error
    entries = [(_text(one), one.picture.key) for one in known]
    # Which pictures are for the test is part of what the data is.
    entries += [(f"test/{_text(one)}", one.picture.key) for one in test or ()]
    return MultiLabelData(
        folder.resolve().name, names, *splits, fingerprint(entries), tuple(reader.skipped)
    )


def multilabel_split(names: Sequence[str], members: Sequence[Tagged]) -> MultiLabelSplit:
    """Pictures with a column a label."""
    rows = [[int(name in one.labels) for name in names] for one in members]
    labels = torch.tensor(rows, dtype=torch.int64).view(len(members), len(names))
    return MultiLabelSplit(tuple(one.picture for one in members), labels)


def _read(reader: PictureReader, folder: Path, progress: ProgressCallback) -> list[Tagged]:
    rows = read_label_table(folder)
    found: list[Tagged] = []
    for done, row in enumerate(rows, start=1):
        picture = reader.read(_path(folder, row))
        if picture:
            found.append(Tagged(picture, row.labels))
        progress(Progress(f"read {folder.name}", done, len(rows)))
    return found


def _path(folder: Path, row: LabelRow) -> Path:
    path = folder / row.picture
    if not path.is_file():
        raise DataError(f"{folder / LABELS}, line {row.line}: there is no picture {path}.")
    return path


def _split(
    names: tuple[str, ...], known: list[Tagged], test: list[Tagged] | None, *, seed: int
) -> tuple[MultiLabelSplit, MultiLabelSplit, MultiLabelSplit]:
    _check(names, known)
    # Sorted by content, so that neither names nor the order of lines decide.
    ordered = sorted(known, key=lambda one: one.picture.key)
    every = multilabel_split(names, ordered)
    test_share = TEST_SHARE if test is None else 0.0
    validation_share = VALIDATION_SHARE * (1 - test_share)
    shares = (1 - test_share - validation_share, validation_share, test_share)
    part_of = iterative_split(every.labels, shares, seed=seed)
    train, validation, drawn = (
        multilabel_split(names, [ordered[row] for row in np.flatnonzero(part_of == part)])
        for part in range(3)
    )
    given = drawn if test is None else multilabel_split(names, test)
    if not len(given):
        raise DataError("test/ has no readable picture; add some, or remove its labels.csv.")
    return train, validation, given


def _check(names: tuple[str, ...], known: list[Tagged]) -> None:
    if len(names) < 2:  # noqa: PLR2004
        raise DataError(
            f"The pictures have {len(names)} different labels in all; expected at least 2. To tell "
            "whether pictures have one thing or not, put them into two folders."
        )
    for name in names:
        with_it = sum(name in one.labels for one in known)
        for num, which in ((with_it, "with"), (len(known) - with_it, "without")):
            if num < MIN_PICTURES:
                raise DataError(
                    f"There are {num} readable pictures {which} the label {name!r}; expected at "
                    f"least {MIN_PICTURES}. Add pictures, or remove the label."
                )


def _text(one: Tagged) -> str:
    return ";".join(sorted(one.labels))
