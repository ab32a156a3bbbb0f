"""Specification of models/pictures.py: what becomes of encoded pictures."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from models.pictures import (
    PictureError,
    PictureTooLargeError,
    Preprocessing,
    decode,
    fit,
    load_picture,
    stack,
    to_pixels,
)

AS_IS = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
# The same examples in every run, and no deadline: the machine may be busy.
REPEATABLE = settings(derandomize=True, deadline=None)
SMALL = Preprocessing(8, 8, *AS_IS)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: every corner is another colour."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.meshgrid(across, down)
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


def png(width: int, height: int, *, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written chunk by chunk, for headers and depths that no encoder would write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    """All eight orientations give what Pillow's own transposition gives."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(24, 16), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")

    decoded = decode(data, shorter_side_px=16)

    assert decoded.size == ((24, 16) if orientation < 5 else (16, 24))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(upright))


def test_damaged_exif_counts_as_none() -> None:
    """Pixels that are fine are used, whatever the bytes beside them say."""
    data = encoded(gradient(16, 16), "JPEG", exif=b"Exif\0\0this is no TIFF header")

    assert decode(data, shorter_side_px=16).size == (16, 16)


def test_cmyk_becomes_the_colours_that_it_means() -> None:
    """Pure cyan ink shows as cyan, not as its negative."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)

    pixel = load_picture(data, SMALL)[4, 4].astype(int)

    # JPEG rounds colours by a few steps.
    np.testing.assert_allclose(pixel, [0, 255, 255], atol=4)


def test_a_palette_is_looked_up() -> None:
    """A palette picture gives the palette's colours."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])

    assert load_picture(encoded(image), SMALL)[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_see_through_is_shown_on_white(mode: str) -> None:
    """A fully transparent black picture is white."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    data = encoded(image.convert(mode) if mode != "PA" else image.quantize())

    assert load_picture(data, SMALL).tolist() == np.full((8, 8, 3), 255).tolist()


def test_half_transparent_mixes_with_white() -> None:
    """Alpha is a share: half of black on white is mid-grey."""
    data = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))

    assert load_picture(data, SMALL)[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_greyscale_has_three_equal_channels(form: str) -> None:
    """Grey is copied to red, green and blue."""
    pixels = load_picture(encoded(Image.new("L", (8, 8), 90), form), SMALL)

    assert np.ptp(pixels, axis=-1).max() == 0
    assert abs(int(pixels[0, 0, 0]) - 90) <= 2


def test_sixteen_bit_grey_keeps_its_range() -> None:
    """65,535 is white and half of it mid-grey; clipping would make both white."""
    row = b"\0" + struct.pack(">8H", *[0, 0, 128 * 256, 128 * 256, 65535, 65535, 256, 256])

    pixels = load_picture(png(8, 8, bits=16, colour=0, rows=row * 8), SMALL)

    assert pixels[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255, 1, 1]


def test_a_huge_png_is_refused_from_its_header() -> None:
    """900 million pixels are refused before one is decoded: there is no pixel data in this file."""
    bomb = png(30_000, 30_000, bits=8, colour=2, rows=b"")

    with pytest.raises(PictureTooLargeError, match="30000 x 30000 pixels; at most 50000000"):
        load_picture(bomb, SMALL)


def test_the_limit_of_pixels_is_the_callers() -> None:
    """Exactly the limit passes, one pixel more does not."""
    data = encoded(Image.new("RGB", (10, 10)))

    load_picture(data, SMALL, max_pixels=100)
    with pytest.raises(PictureTooLargeError):
        load_picture(data, SMALL, max_pixels=99)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_named_as_such(form: str) -> None:
    """Half a file is an error, not a picture that is grey below."""
    data = encoded(noise(64, 64), form)

    with pytest.raises(PictureError, match="truncated or damaged"):
        load_picture(data[: len(data) // 2], SMALL)


def test_an_empty_body_says_what_was_expected() -> None:
    """Zero bytes are their own message."""
    with pytest.raises(PictureError, match=r"empty \(0 bytes\); expected a JPEG, PNG or WebP"):
        load_picture(b"", SMALL)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(form: str) -> None:
    """Each decoder that is not reachable is one that cannot be attacked."""
    with pytest.raises(PictureError, match="accepted format"):
        load_picture(encoded(Image.new("RGB", (8, 8)), form), SMALL)


@REPEATABLE
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_picture_error(data: bytes) -> None:
    """Whatever is sent, the caller meets one class of error."""
    with pytest.raises(PictureError):
        load_picture(data, SMALL)


@REPEATABLE
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
def test_damaged_files_raise_nothing_but_a_picture_error(at: int, patch: bytes) -> None:
    """Bytes changed within a real file either still decode or raise `PictureError`."""
    for form in ("JPEG", "PNG", "WEBP"):
        data = bytearray(encoded(noise(16, 16), form))
        place = at % len(data)
        data[place : place + len(patch)] = patch
        try:
            pixels = load_picture(bytes(data), SMALL, max_pixels=10_000)
        except PictureError:
            continue
        assert pixels.shape == (8, 8, 3)


@REPEATABLE
@given(
    width=st.integers(16, 1500),
    height=st.integers(16, 1500),
    shorter=st.integers(1, 300),
    orientation=st.sampled_from([1, 6]),
)
def test_a_scaled_decode_is_never_smaller_than_asked(
    width: int, height: int, shorter: int, orientation: int
) -> None:
    """JPEGs decode at a fraction of their size only where enough pixels are left."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("L", (width, height)), "JPEG", exif=exif)

    decoded = decode(data, shorter_side_px=shorter)

    assert min(decoded.size) >= min(shorter, width, height)


def test_a_large_jpeg_is_decoded_at_a_fraction() -> None:
    """Without it a 12-megapixel photo would cost eight times as much."""
    data = encoded(Image.new("RGB", (2048, 2048)), "JPEG")

    assert decode(data, shorter_side_px=256).size == (256, 256)


def test_fit_is_resizing_and_then_cropping() -> None:
    """Where sizes divide evenly, the one step equals the two that it replaces."""
    picture = noise(384, 256)
    two_steps = picture.resize((192, 128), Image.Resampling.BILINEAR).crop((40, 8, 152, 120))

    one_step = fit(picture, Preprocessing(112, 128, *AS_IS))

    # Both round once a pass; the order of rounding may differ by one step.
    np.testing.assert_allclose(one_step.astype(int), np.asarray(two_steps).astype(int), atol=1)


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    """No resampling where none is needed, so 32 px pictures stay as they are."""
    picture = noise(40, 32)

    np.testing.assert_array_equal(
        fit(picture, Preprocessing(32, 32, *AS_IS)), np.asarray(picture)[:, 4:36]
    )


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1), (3, 2)])
def test_any_proportion_gives_the_square(size: tuple[int, int]) -> None:
    """A sliver costs no more than the square that is cut from it."""
    pixels = load_picture(encoded(Image.new("RGB", size, "red")), Preprocessing(224, 256, *AS_IS))

    assert pixels.shape == (224, 224, 3)
    assert pixels.reshape(-1, 3).tolist() == [[255, 0, 0]] * 224**2


def test_decoding_is_deterministic() -> None:
    """The same bytes give the same pixels."""
    data, preprocessing = encoded(noise(300, 200), "JPEG"), Preprocessing(64, 72, *AS_IS)

    np.testing.assert_array_equal(
        load_picture(data, preprocessing), load_picture(data, preprocessing)
    )


def test_pixels_that_are_decoded_already_are_fitted_alike() -> None:
    """A lossless file and its own pixels end as the same picture."""
    picture, preprocessing = noise(50, 40), Preprocessing(16, 20, *AS_IS)

    np.testing.assert_array_equal(
        to_pixels(np.asarray(picture), preprocessing),
        load_picture(encoded(picture), preprocessing),
    )


def test_grey_pixels_may_lack_their_channel_axis() -> None:
    """uint8 [height, width] is a grey picture."""
    assert to_pixels(np.full((9, 9), 7, dtype=np.uint8), SMALL).tolist() == (
        np.full((8, 8, 3), 7).tolist()
    )


def test_pictures_stack_into_a_batch() -> None:
    """Equal pictures become uint8 [batch, height, width, 3]."""
    picture = load_picture(encoded(noise(8, 8)), SMALL)

    assert stack([picture, picture]).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(("size_px", "resize_px", "std"), [(0, 8, 1.0), (9, 8, 1.0), (8, 8, 0.0)])
def test_preprocessing_out_of_range_is_refused(size_px: int, resize_px: int, std: float) -> None:
    """Sizes have to be ordered and divisors positive."""
    with pytest.raises(ValueError, match="expected"):
        Preprocessing(size_px, resize_px, (0.0, 0.0, 0.0), (std, std, std))


def test_an_mpo_file_of_a_phone_is_its_first_picture(tmp_path: Path) -> None:
    """Phones write several JPEGs into one file and still name it .jpg."""
    path = tmp_path / "phone.jpg"
    blue = Image.new("RGB", (16, 16), "blue")
    Image.new("RGB", (16, 16), "red").save(path, "MPO", save_all=True, append_images=[blue])

    assert load_picture(path.read_bytes(), SMALL)[0, 0, 0] > 250


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_counts_in_every_format(form: str, orientation: int) -> None:
    """PNG and WebP carry EXIF too, and phones and editors write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = gradient(24, 16)
    data = encoded(picture, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))

    np.testing.assert_array_equal(
        np.asarray(decode(data, shorter_side_px=16)), turned(np.asarray(picture), orientation)
    )


def turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """What is seen when row 0 and column 0 lie as the orientation says.

    Source: TIFF 6.0, tag 274, "Orientation".
    """
    sides = {
        1: picture,  # top, left
        2: picture[:, ::-1],  # top, right
        3: picture[::-1, ::-1],  # bottom, right
        4: picture[::-1],  # bottom, left
        5: picture.swapaxes(0, 1),  # left, top
        6: picture[::-1].swapaxes(0, 1),  # right, top
        7: picture[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: picture[:, ::-1].swapaxes(0, 1),  # left, bottom
    }
    return sides[orientation]


def adobe(data: bytes, transform: int) -> bytes:
    """A JPEG of four channels that says how they are coded: 0 is CMYK, 2 is YCCK.

    Source: Adobe Technical Note 5116, "Supporting the DCT Filters", section 18.
    """
    place = data.index(b"Adobe")
    return data[: place + 11] + bytes([transform]) + data[place + 12 :]


def sixteen_bits(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel, every channel with its own slope."""
    grid = np.arange(16)[:, None, None] * 16 + np.arange(16)[None, :, None]
    values = (grid * np.arange(1, channels + 1) * 257 % 65536).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png(16, 16, bits=16, colour=colour, rows=rows)


GLASS = noise(16, 16)
GLASS.putalpha(noise(16, 16, seed=1).convert("L"))
RED_THEN_BLUE: dict[str, Any] = {
    "save_all": True,
    "append_images": [Image.new("RGB", (16, 16), "blue")],
}
SEEN = {
    "grey with alpha": encoded(noise(16, 16).convert("LA")),
    "colours with alpha": encoded(GLASS),
    "grey of which one is see-through": encoded(noise(16, 16).convert("L"), transparency=90),
    "black and white": encoded(noise(16, 16).convert("1")),
    "a palette": encoded(noise(16, 16).quantize(64)),
    "a palette with one see-through": encoded(noise(16, 16).quantize(16), transparency=3),
    "a palette with shares": encoded(
        noise(16, 16).quantize(16), transparency=bytes(range(0, 256, 16))
    ),
    "a colour that is see-through": encoded(gradient(16, 16), transparency=(17, 17, 0)),
    "CMYK": encoded(noise(16, 16).convert("CMYK"), "JPEG"),
    "CMYK that is not said to be Adobe's": encoded(noise(16, 16).convert("CMYK"), "JPEG").replace(
        b"Adobe", b"Other"
    ),
    "YCCK": adobe(encoded(noise(16, 16).convert("CMYK"), "JPEG"), 2),
    "16 bit colours": sixteen_bits(2, 3),
    "16 bit colours with alpha": sixteen_bits(6, 4),
    "16 bit grey with alpha": sixteen_bits(4, 2),
    "progressive": encoded(noise(64, 48), "JPEG", progressive=True),
    "animated PNG": encoded(Image.new("RGB", (16, 16), "red"), **RED_THEN_BLUE),
    "animated WebP": encoded(
        Image.new("RGB", (16, 16), "red"), "WEBP", lossless=True, **RED_THEN_BLUE
    ),
    "animated PNG with a still of its own": encoded(
        noise(16, 16), default_image=True, **RED_THEN_BLUE
    ),
    "WebP with alpha": encoded(GLASS, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_picture_is_what_pillow_shows_of_it(kind: str) -> None:
    """The first frame, on white where it is see-through, eight bits a channel."""
    shown = Image.open(io.BytesIO(SEEN[kind])).convert("RGBA")
    share = np.asarray(shown, np.float64)[..., 3:] / 255
    on_white = np.asarray(shown, np.float64)[..., :3] * share + 255 * (1 - share)

    pixels = np.asarray(decode(SEEN[kind], shorter_side_px=1000), np.float64)

    # Pillow mixes in whole numbers.
    np.testing.assert_allclose(pixels, on_white, atol=1.0)
