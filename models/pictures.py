"""Encoded picture to pixels: the one decoder that training and serving share.

Both sides call the same function with the same preprocessing, so the trunk sees bit-equal pictures
in training, in parity checks and in traffic. Pillow and numpy only: serving has no torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from models.picture_parts import TooManyPartsError, check_parts

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # about 7,000 x 7,000; 150 MB once decoded

# The bound is ours (`max_pixels`, checked before any pixel is decoded); Pillow's would warn first.
Image.MAX_IMAGE_PIXELS = None

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """The bytes are no picture that can be read."""


class PictureTooLargeError(PictureError):
    """The picture has more pixels than are accepted."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a decoded picture becomes what a trunk takes.

    Args:
        size_px: Side of the square that the trunk takes.
        resize_px: Length of the shorter side before the centre crop, at least `size_px`.
        mean: Subtracted from each channel (RGB), in units of 0..255.
        std: Divides each channel after that, in units of 0..255.

    Raises:
        ValueError: a size or a divisor out of range.
    """

    size_px: int
    resize_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.size_px <= self.resize_px:
            raise ValueError(
                f"Preprocessing has size_px={self.size_px}, resize_px={self.resize_px}; "
                "expected 1 <= size_px <= resize_px."
            )
        if min(self.std) <= 0:
            raise ValueError(f"Preprocessing has std={self.std}; expected every value above 0.")


def load_picture(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode, turn upright, resize the shorter side, crop the centre.

    Args:
        data: A JPEG, PNG or WebP file.
        max_pixels: Largest width x height accepted, checked before anything is decoded.

    Returns:
        RGB uint8 [size_px, size_px, 3].

    Raises:
        PictureError: not a picture of an accepted format, or it is truncated or damaged.
        PictureTooLargeError: more than `max_pixels`.
    """
    picture = decode(data, shorter_side_px=preprocessing.resize_px, max_pixels=max_pixels)
    return fit(picture, preprocessing)


def decode(data: bytes, *, shorter_side_px: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an upright RGB picture whose shorter side is at least about `shorter_side_px`.

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size (the scaled inverse
    DCT of libjpeg), which costs a fraction of a full decode.

    Raises:
        PictureError: see `load_picture`.
        PictureTooLargeError: see `load_picture`.
    """
    if not data:
        raise PictureError("The picture is empty (0 bytes); expected a JPEG, PNG or WebP file.")
    try:
        check_parts(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise PictureTooLargeError(
                    f"The picture has {width} x {height} pixels; "
                    f"at most {max_pixels} are accepted. Scale it down before sending it."
                )
            scale = shorter_side_px / min(width, height)
            # Does nothing unless the file is a JPEG; never goes below the size asked for.
            image.draft("RGB", (max(1, round(width * scale)), max(1, round(height * scale))))
            return _to_rgb(_upright(image))
    except PictureError:
        raise
    except TooManyPartsError as error:
        raise PictureError(f"The picture would take long to decode: {error}.") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            "The bytes are not a picture in an accepted format (JPEG, PNG, WebP)."
        ) from error
    # Decoders raise a wide set for damaged files: OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        raise PictureError(f"The picture is truncated or damaged: {error}.") from error


def fit(picture: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side to `resize_px` (bilinear, antialiased), crop the centre square.

    Both in one step: only the square is resampled. A picture of 1 x 30,000 pixels would otherwise
    grow to 256 x 7,680,000 before its centre is cut out.

    Returns:
        RGB uint8 [size_px, size_px, 3].
    """
    width, height = picture.size
    side = min(width, height) * preprocessing.size_px / preprocessing.resize_px
    left, top = (width - side) / 2, (height - side) / 2
    size = (preprocessing.size_px, preprocessing.size_px)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box=box), dtype=np.uint8)


def to_pixels(array: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Fit a picture that is already decoded, uint8 [height, width] or [height, width, 3]."""
    return fit(_to_rgb(Image.fromarray(array)), preprocessing)


def stack(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One batch uint8 [batch, height, width, 3] of pictures that all have one size."""
    return np.stack(pictures)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF orientation says; damaged EXIF counts as none."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Its parser raises whatever the damaged bytes lead to; the pixels may still be fine.
    except Exception:  # noqa: BLE001
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey (mode I;16, or I from older files): keep the high byte; Pillow would clip.
        high_byte = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        # What is see-through is shown on white, as a browser would.
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
