"""Light augmentation of the decoded picture, before it is fitted to any network's input size.

Teacher and student then see the same crop and flip, however different their sizes: the "consistent"
teaching of Beyer et al. 2022, arXiv:2106.05237.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from models.pictures import Preprocessing, fit

MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class Augmentation:
    """How far a training picture may differ from the picture itself.

    Args:
        min_area: Smallest share of the largest centre square that a crop keeps, above 0 up to 1.
        flip: Mirror half of the pictures. Not for writing: a mirrored digit is no digit.
        max_turn_deg: Largest turn to either side, in degrees; corners are filled with black.
        num_operations: How many of RandAugment's operations (shears, shifts, turns, colours, tones)
            a picture goes through, each drawn anew: Cubuk et al. 2019, arXiv:1909.13719.
        magnitude: How far these go, from 0 to 30.

    Raises:
        ValueError: a value out of range.
    """

    min_area: float
    flip: bool
    max_turn_deg: float = 0.0
    num_operations: int = 0
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.num_operations < 0 or not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(
                f"Augmentation has num_operations={self.num_operations}, "
                f"magnitude={self.magnitude}; expected num_operations of at least 0 and "
                f"0 <= magnitude <= {MAX_MAGNITUDE}."
            )
        if not 0 < self.min_area <= 1 or not 0 <= self.max_turn_deg <= 180:  # noqa: PLR2004
            raise ValueError(
                f"Augmentation has min_area={self.min_area}, max_turn_deg={self.max_turn_deg}; "
                "expected 0 < min_area <= 1 and 0 <= max_turn_deg <= 180."
            )


# A crop of 0.77 shows objects as large as serving does (a 224 px centre of 256 px).
PHOTOS = Augmentation(min_area=0.5, flip=True)
DRAWINGS = Augmentation(min_area=0.8, flip=False, max_turn_deg=10.0)
# Two operations at magnitude 9 of 30 are what the paper takes for a ResNet-50 (table 4).
RANDAUGMENT = replace(PHOTOS, num_operations=2, magnitude=9)


def augment(
    picture: Image.Image, augmentation: Augmentation, random: np.random.Generator
) -> Image.Image:
    """Turn, flip and crop a square at random; the draws do not depend on the picture's size."""
    turn, flip, area, across, down = random.random(5)
    if augmentation.max_turn_deg > 0:
        angle = augmentation.max_turn_deg * (2 * turn - 1)
        picture = picture.rotate(angle, Image.Resampling.BILINEAR)
    if augmentation.flip and flip < 0.5:  # noqa: PLR2004
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = picture.size
    share = augmentation.min_area + (1 - augmentation.min_area) * area
    side = max(1, round(math.sqrt(share) * min(width, height)))
    left, top = round(across * (width - side)), round(down * (height - side))
    crop = picture.crop((left, top, left + side, top + side))
    if augmentation.num_operations == 0:
        return crop
    operations = v2.RandAugment(augmentation.num_operations, augmentation.magnitude)
    # It draws from torch's global generator, which belongs to the network.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random.integers(2**63)))
        return operations(crop)


def fit_crop(crop: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A square crop as a network takes it, uint8 [size_px, size_px, 3]; nothing more is cut off."""
    return fit(crop, replace(preprocessing, resize_px=preprocessing.size_px))
