"""Pictures with labels, in three splits, decoded by `models.pictures` alone."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.errors import LearningError
from models.pictures import Preprocessing, decode, load_picture, stack, to_pixels
from models.record import DataRecord

# Decoded pictures are kept up to this size and decoded again beyond it.
MAX_CACHE_BYTES = 2 * 2**30


class DataError(LearningError):
    """Pictures cannot be read, or are too few to learn from."""


@dataclass(frozen=True)
class Picture:
    """One picture, on disk or already decoded.

    Args:
        source: An encoded file, or uint8 [height, width, 3].
        key: sha256 of the content, in hexadecimal.
    """

    source: Path | NDArray[np.uint8]
    key: str

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """Bit for bit what serving makes of the same picture.

        Raises:
            DataError: the file cannot be read any more.
        """
        if not isinstance(self.source, Path):
            return to_pixels(self.source, preprocessing)
        return load_picture(self._read(self.source), preprocessing)

    def open(self, shorter_side_px: int) -> Image.Image:
        """The upright picture, its shorter side at least about `shorter_side_px` or as it is.

        Raises:
            DataError: the file cannot be read any more.
        """
        if not isinstance(self.source, Path):
            return Image.fromarray(self.source)
        return decode(self._read(self.source), shorter_side_px=shorter_side_px)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} was there and cannot be read now: {error}.") from error


@dataclass(frozen=True)
class Split:
    """Pictures and the index of each one's label."""

    pictures: tuple[Picture, ...]
    labels: Int[Tensor, " pictures"]
    _cache: dict[Preprocessing, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(
        self, preprocessing: Preprocessing, *, batch_size: int
    ) -> Iterator[UInt8[Tensor, "batch height width 3"]]:
        """Every picture in order, as serving would decode it; kept if that takes little memory."""
        num_bytes = len(self) * preprocessing.size_px**2 * 3
        if num_bytes > MAX_CACHE_BYTES:
            for start in range(0, len(self), batch_size):
                yield to_batch(self.pictures[start : start + batch_size], preprocessing)
            return
        if preprocessing not in self._cache and len(self):
            self._cache[preprocessing] = to_batch(self.pictures, preprocessing)
        if len(self):
            yield from self._cache[preprocessing].split(batch_size)


@dataclass(frozen=True)
class Skipped:
    """A file that is not learned from, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class PictureData:
    """One task's pictures.

    Args:
        name: Short name, such as the folder's.
        labels: Class names; a picture's label is an index into them.
        fingerprint: sha256 over the content and label of every picture, whatever their order.
        skipped: Files left out, with reasons.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def splits(self) -> dict[str, Split]:
        """Name -> split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Split -> label -> number of pictures."""
        return {name: self._count(split) for name, split in self.splits.items()}

    def record(self) -> DataRecord:
        """What a checkpoint or a bundle says of this data."""
        return DataRecord(name=self.name, sha256=self.fingerprint, num_pictures=self.counts)

    def _count(self, split: Split) -> dict[str, int]:
        numbers = split.labels.bincount(minlength=len(self.labels)).tolist()
        return dict(zip(self.labels, numbers, strict=True))


def to_batch(
    pictures: Sequence[Picture], preprocessing: Preprocessing
) -> UInt8[Tensor, "batch height width 3"]:
    """Decode pictures for one network."""
    return torch.from_numpy(stack([picture.pixels(preprocessing) for picture in pictures]))


def join(*splits: Split) -> Split:
    """Splits one after another."""
    return Split(
        tuple(picture for split in splits for picture in split.pictures),
        torch.cat([split.labels for split in splits]),
    )


def fingerprint(entries: Iterable[tuple[str, str]]) -> str:
    """Sha256 over (label, content key) pairs, whatever their order."""
    lines = sorted(f"{key} {label}\n" for label, key in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
