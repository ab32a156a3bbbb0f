"""How many parts a serialised graph has, counted before it is parsed.

Two bytes of a file can become an object of 165 (measured: an empty weight, protobuf 7.36): a head
of 64 MB, which a zip of 64 kB holds, would take 5 GB of memory before any gate has looked at it.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from numpy.typing import NDArray

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
_INTEGERS = frozenset(
    {
        FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_BOOL,
    }
)  # fmt: skip


class NoGraphError(ValueError):
    """The bytes are not those of a model."""


def count_parts(data: bytes, *, most: int) -> int:
    """Messages, texts and integers in a serialised model; counting ends soon after `most`.

    Numbers with a fixed size take no more memory than bytes in the file, so a row of them is one.

    Raises:
        NoGraphError: it cannot be followed to its end.
    """
    numbers = np.frombuffer(data, np.uint8)
    num_parts, waiting = 0, [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
    while waiting:
        place, end, message = waiting.pop()
        messages, integers, texts = _fields(message)
        while place < end and num_parts <= most:
            num_parts += 1
            tag, begin = _varint(data, place, end)
            field = tag >> 3
            begin, place = _extent(numbers, data, place, begin, end, kind=tag & 7)
            if place > end:
                raise NoGraphError(f"a field ends at byte {place}, beyond its message")
            if field in messages and tag & 7 == BYTES:
                waiting.append((begin, place, messages[field]))
            elif field in integers and tag & 7 == BYTES:
                num_parts += place - begin
            elif field in texts and tag & 7 == BYTES:
                _check_text(data[begin:place])
    return num_parts


def _check_text(text: bytes) -> None:
    """Protobuf takes any bytes for a text, and ONNX's checker then fails to say what is wrong."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise NoGraphError(f"the text {text[:40]!r} is not UTF-8") from error


def _extent(
    numbers: NDArray[np.uint8], data: bytes, place: int, begin: int, end: int, *, kind: int
) -> tuple[int, int]:
    """Where the value of a field begins, behind its tag, and where it ends."""
    if kind == VARINT:
        return begin, _varint(data, begin, end)[1]
    if kind == FIXED64:
        return begin, begin + 8
    if kind == FIXED32:
        return begin, _end_of_row(numbers, place, begin + 4, end)
    if kind == BYTES:
        size, begin = _varint(data, begin, end)
        return begin, begin + size
    raise NoGraphError(f"byte {place} begins a field of the unknown kind {kind}")


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for shift in range(MAX_VARINT_BYTES):
        if place >= end:
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:  # noqa: PLR2004 (the bit that says that more follows)
            return value, place
    raise NoGraphError(f"byte {place} is within a number that does not end")


def _end_of_row(numbers: NDArray[np.uint8], place: int, after: int, end: int) -> int:
    """Where a row of fields with one tag of one byte ends, each a number of four bytes."""
    if after - place != 5:  # noqa: PLR2004 (a longer tag: one at a time)
        return after
    tag, size = numbers[place], 16
    while True:
        stop = min(end, place + 5 * size)
        differs = numbers[place:stop:5] != tag
        if differs.any():
            return place + 5 * int(differs.argmax())
        place += 5 * len(differs)
        size *= 16
        if place >= end:
            return place


_Fields = tuple[dict[int, Descriptor], frozenset[int], frozenset[int]]


@cache
def _fields(message: Descriptor) -> _Fields:
    """Fields that hold messages, that may hold many integers in a row, and that hold texts."""
    fields = message.fields
    messages = {f.number: f.message_type for f in fields if f.message_type is not None}
    integers = frozenset(f.number for f in fields if f.type in _INTEGERS)
    return (
        messages,
        integers,
        frozenset(f.number for f in fields if f.type == FieldDescriptor.TYPE_STRING),
    )
