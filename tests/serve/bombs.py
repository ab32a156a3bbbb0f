"""Small files that would take much memory or time, of every kind that is accepted."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib

from PIL import Image


def jpeg(side_px: int, *, progressive: bool = False) -> bytes:
    """A square of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), "red").save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def jpeg_of_scans(side_px: int, num_scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan: each is a pass over all of its pixels."""
    whole = jpeg(side_px, progressive=True)
    starts = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    last = whole[starts[-1] : -2]
    return whole[:-2] + last * (num_scans - len(starts)) + b"\xff\xd9"


def claiming_jpeg(side_px: int) -> bytes:
    """A small JPEG whose header says that it is large."""
    whole = bytearray(jpeg(16))
    frame = whole.index(b"\xff\xc0")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", side_px, side_px)
    return bytes(whole)


def png(side_px: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A whole PNG of white pixels, one bit each, with more chunks before its pixels."""
    packer = zlib.compressobj(9)
    line = b"\0" + b"\xff" * ((side_px + 7) // 8)
    rows = b"".join(packer.compress(line) for _ in range(side_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def png_of_text(kind: str, num_bytes: int, *, times: int = 1) -> bytes:
    """A small PNG with compressed text, or a colour profile, that opens to so many bytes."""
    packed = zlib.compress(bytes(num_bytes), 9)
    text = {
        "zTXt": b"k\0\0" + packed,
        "iTXt": b"k\0\1\0en\0k\0" + packed,
        "iCCP": b"k\0\0" + packed,
    }[kind]
    return png(8, *((kind.encode(), text),) * times)


def webp(side_px: int) -> bytes:
    """A lossless WebP of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), "red").save(buffer, "WEBP", lossless=True, quality=0)
    return buffer.getvalue()


def claiming_webp(side_px: int) -> bytes:
    """A small WebP whose canvas is said to be large."""
    small = webp(16)[12:]
    size = struct.pack("<I", side_px - 1)[:3]
    parts = _riff(b"VP8X", b"\0\0\0\0" + size + size) + small
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def zeros(encoding: str, num_bytes: int) -> bytes:
    """So many zeros, as a compressed body."""
    return (
        gzip.compress(bytes(num_bytes)) if encoding == "gzip" else zlib.compress(bytes(num_bytes))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def jpeg_of_segments(num_segments: int, kind: int = 0xE1) -> bytes:
    """A small JPEG with so many empty segments before its picture."""
    whole = jpeg(16)
    return whole[:2] + bytes((0xFF, kind, 0, 2)) * num_segments + whole[2:]


def png_of_chunks(num_chunks: int, kind: bytes = b"tEXt", data: bytes = b"k\0") -> bytes:
    """A small PNG with so many chunks before its picture."""
    return png(8, *((kind, data),) * num_chunks)
