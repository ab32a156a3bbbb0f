"""Training batches: each picture decoded once, augmented once, fitted to every network."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.augment import Augmentation, augment, fit_crop
from models.data import MAX_CACHE_BYTES, Picture, Split
from models.pictures import Preprocessing, stack

UNKNOWN = -1


@dataclass(frozen=True)
class Batch:
    """Some training pictures, as each network takes them.

    Args:
        rows: Which pictures these are.
        images: The same pictures for each preprocessing, uint8 [batch, size, size, 3].
    """

    rows: Int[Tensor, " batch"]
    images: dict[Preprocessing, Tensor]


class TrainingPictures:
    """Pictures in shuffled batches, the same for the same seed and epoch.

    Args:
        preprocessings: What each network takes; all see the same crop of a picture.
        augmentation: None gives the pictures exactly as serving would decode them.
        batch_size: About how many pictures; batches are of even size, so that none is so small
            that batch statistics would be noise.
        chances: How likely each picture is to be drawn; they sum to 1. None takes each once in an
            epoch.
        num_views: Fixed views of each picture, which epochs show in turn; None draws a new one in
            every epoch.
        blended: Blend each picture's view with that of another one. So there are new pictures
            without end; they have no one label.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        preprocessings: Sequence[Preprocessing],
        *,
        augmentation: Augmentation | None,
        batch_size: int,
        seed: int,
        chances: NDArray[np.float64] | None = None,
        num_views: int | None = None,
        blended: bool = False,
    ) -> None:
        self._pictures = pictures
        self._preprocessings = tuple(dict.fromkeys(preprocessings))
        self._augmentation = augmentation
        self._seed = seed
        self._chances = chances
        self._num_views = num_views
        self._blended = blended
        self._opened: dict[int, Image.Image] = {}
        self._opened_bytes = 0
        self.num_batches = max(1, round(len(pictures) / batch_size))

    def epoch(self, number: int) -> Iterator[Batch]:
        """As many pictures as there are."""
        view = number if self._num_views is None else number % self._num_views
        seen: Counter[int] = Counter()
        for rows in np.array_split(self._order(number), self.num_batches):
            fitted: list[list[UInt8[np.ndarray, "size size 3"]]] = []
            for row in rows.tolist():
                fitted.append(self._view(row, view, copy=seen[row]))
                seen[row] += 1
            images = {
                preprocessing: torch.from_numpy(stack([views[at] for views in fitted]))
                for at, preprocessing in enumerate(self._preprocessings)
            }
            yield Batch(torch.from_numpy(rows), images)

    def _order(self, number: int) -> Int[np.ndarray, " pictures"]:
        random, num = np.random.default_rng([self._seed, number]), len(self._pictures)
        if self._chances is None:
            return random.permutation(num)
        return random.choice(num, size=num, p=self._chances)

    @property
    def come_again(self) -> bool:
        """Whether epochs show the same pixels again."""
        is_plain = self._augmentation is None and not self._blended
        return is_plain or self._num_views is not None

    def _view(self, row: int, view: int, *, copy: int) -> list[UInt8[np.ndarray, "size size 3"]]:
        if not self._blended:
            return self._fitted(row, view, copy=copy)
        # Not the generator of `_fitted`, whose first draws would be the same.
        random = np.random.default_rng([self._seed, view, row, copy, 1])
        share, partner = random.random(), int(random.integers(len(self._pictures)))
        pairs = zip(
            self._fitted(row, view, copy=copy), self._fitted(partner, view, copy=0), strict=True
        )
        return [blend(one, other, share) for one, other in pairs]

    def _fitted(self, row: int, view: int, *, copy: int) -> list[UInt8[np.ndarray, "size size 3"]]:
        if self._augmentation is None:
            return [self._pictures[row].pixels(p) for p in self._preprocessings]
        # One generator a picture and view: the crop does not depend on what was drawn before. A
        # picture that is drawn again looks different.
        random = np.random.default_rng([self._seed, view, row] + [copy] * (copy > 0))
        crop = augment(self._open(row), self._augmentation, random)
        return [fit_crop(crop, preprocessing) for preprocessing in self._preprocessings]

    def _open(self, row: int) -> Image.Image:
        """Decode a picture once, no larger than the largest network can use."""
        if row in self._opened:
            return self._opened[row]
        shorter = max(preprocessing.resize_px for preprocessing in self._preprocessings)
        picture = self._pictures[row].open(shorter)
        scale = shorter / min(picture.size)
        if scale < 1:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        num_bytes = 3 * picture.width * picture.height
        if self._opened_bytes + num_bytes <= MAX_CACHE_BYTES:
            self._opened[row] = picture
            self._opened_bytes += num_bytes
        return picture


def blend(
    one: UInt8[np.ndarray, "size size 3"], other: UInt8[np.ndarray, "size size 3"], share: float
) -> UInt8[np.ndarray, "size size 3"]:
    """Two pictures laid over each other.

    Args:
        share: Of the first one, from 0 to 1.

    Source: mixup, Zhang et al. 2018, arXiv:1710.09412, section 2, equation for the inputs.
    """
    return (share * one + (1 - share) * other).round().astype(np.uint8)


def pool(
    train: Sequence[Split], held_out: Sequence[Split], *, unlabelled: Sequence[Picture] = ()
) -> tuple[list[Picture], Int[Tensor, "pictures tasks"]]:
    """Put the training pictures of several tasks together.

    A picture that several tasks share appears once, with all its labels. A picture that any task
    holds out for validation or test is left out, whoever else trains on it: a student that sees it
    would be tested on what it has learned from.

    Args:
        unlabelled: More pictures, of which no task knows a label.

    Returns:
        Pictures, and each one's label in every task; `UNKNOWN` where a task has none for it.
    """
    kept_out = {picture.key for split in held_out for picture in split.pictures}
    pictures: dict[str, Picture] = {}
    labels: dict[str, list[int]] = {}
    for task, split in enumerate(train):
        for picture, label in zip(split.pictures, split.labels.tolist(), strict=True):
            if picture.key not in kept_out:
                pictures[picture.key] = picture
                labels.setdefault(picture.key, [UNKNOWN] * len(train))[task] = label
    for picture in unlabelled:
        if picture.key not in kept_out:
            pictures.setdefault(picture.key, picture)
            labels.setdefault(picture.key, [UNKNOWN] * len(train))
    table = torch.tensor(list(labels.values()), dtype=torch.int64)
    return list(pictures.values()), table.reshape(len(pictures), len(train))
