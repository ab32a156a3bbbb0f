"""Pictures that would take long for their many parts, and those that only look like it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from models.picture_parts import MAX_PARTS, MAX_SCANS, TooManyPartsError, check_parts
from models.pictures import PictureError, decode
from tests.serve import bombs

SOON_S = 1.0  # a picture that is accepted takes a tenth of it


def refused_within(data: bytes, seconds: float = SOON_S) -> str:
    """Why a picture is refused, in that time."""
    began_s = time.perf_counter()
    with pytest.raises(PictureError) as refusal:
        decode(data, shorter_side_px=224)
    assert time.perf_counter() - began_s < seconds
    return str(refusal.value)


@pytest.mark.parametrize(
    ("bomb", "reason"),
    [
        (lambda: bombs.jpeg_of_scans(2000, 3000), f"more than {MAX_SCANS} scans"),
        (lambda: bombs.jpeg_of_segments(2_000_000), f"more than {MAX_PARTS} segments"),
        (lambda: bombs.jpeg_of_segments(2_000_000, 0xFE), f"more than {MAX_PARTS} segments"),
        (lambda: bombs.png_of_chunks(600_000), f"more than {MAX_PARTS} chunks"),
        (lambda: bombs.png_of_chunks(600_000, b"abCd", b""), f"more than {MAX_PARTS} chunks"),
        (lambda: bombs.png_of_text("iCCP", 2**20 - 10, times=1500), "more than 1 colour profiles"),
    ],
    ids=["scans", "APP1", "comments", "texts", "unknown chunks", "profiles"],
)
def test_a_picture_of_too_many_parts_is_refused_at_once(
    bomb: Callable[[], bytes], reason: str
) -> None:
    """Decoding any of these takes several seconds; the same in 16 MB up to an hour."""
    assert f"would take long to decode: it has {reason}" in refused_within(bomb())


def test_scans_are_counted_up_to_the_picture_s_end() -> None:
    """What phones put behind a picture, a film say, is full of bytes that look like scans."""
    whole = bombs.jpeg(64, progressive=True)

    check_parts(whole + b"\xff\xda" * 1000)
    check_parts(whole[:2] + b"\xff\xfe\xff\xff" + b"\xff\xda" * 32766 + b"\0" + whole[2:])


def test_an_end_that_is_hidden_in_a_segment_is_none() -> None:
    """A comment may hold anything, and the decoder goes on behind it."""
    bomb = bombs.jpeg_of_scans(64, MAX_SCANS + 1)
    assert bomb.index(b"\xff\xda") < len(bomb)
    hidden = bomb[:2] + b"\xff\xfe\0\x04\xff\xd9" + bomb[2:]

    with pytest.raises(TooManyPartsError, match="scans"):
        check_parts(hidden)


@pytest.mark.parametrize("quality", [30, 75, 95, 100])
@pytest.mark.parametrize("progressive", [True, False])
def test_pictures_that_people_take_are_accepted(quality: int, *, progressive: bool) -> None:
    """Noise, which fills the picture data with every byte that there is."""
    noise = np.random.default_rng(quality).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=quality, progressive=progressive)

    check_parts(buffer.getvalue())
    assert decode(buffer.getvalue(), shorter_side_px=600).size == (800, 600)


def test_the_bounds_are_what_they_say() -> None:
    """As many as that are accepted."""
    check_parts(bombs.jpeg_of_scans(64, MAX_SCANS))
    # Three chunks are the picture's own.
    check_parts(bombs.png_of_chunks(MAX_PARTS - 3))
    with pytest.raises(TooManyPartsError):
        check_parts(bombs.jpeg_of_scans(64, MAX_SCANS + 1))
    with pytest.raises(TooManyPartsError):
        check_parts(bombs.png_of_chunks(MAX_PARTS - 2))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]
)
def test_what_is_cut_is_left_to_the_decoder(data: bytes) -> None:
    """It says what is wrong better."""
    check_parts(data)
    check_parts(data + b"\xff" * 1000)
