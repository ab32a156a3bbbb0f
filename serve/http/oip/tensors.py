"""Tensors on the wire: raw bytes, and JSON lists, of the datatypes that models here take or give.

Raw tensors are little-endian and row-major, without padding; an element of BYTES is its length as
uint32 and then its bytes.

Source: Open Inference Protocol V2, tensor data, and its binary tensor data extension.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Datatype = Literal["BYTES", "FP32", "UINT8"]
Elements = Sequence[bytes] | NDArray[Any]

DTYPES = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
LENGTH = struct.Struct("<I")


class TensorError(ValueError):
    """The bytes or the list of a tensor are not what its shape and datatype say."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or gives.

    Args:
        shape: The first dimension is that of the batch, -1; others are fixed, or -1 where a
            rollout's two sides differ.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]

    def described(self) -> dict[str, object]:
        """As metadata tells it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


def to_raw(elements: Elements) -> bytes:
    """A whole tensor as it is sent: BYTES elements, or an array of a datatype with a fixed size."""
    if isinstance(elements, np.ndarray):
        return elements.astype(elements.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join(part for data in elements for part in (LENGTH.pack(len(data)), data))


def from_raw(data: bytes, datatype: Datatype, shape: Sequence[int]) -> Elements:
    """The tensor in these bytes, which have to be all of it and nothing else.

    Raises:
        TensorError: too few bytes, or too many.
    """
    size = count_of(shape)
    if datatype == "BYTES":
        return split(data, size)
    dtype = DTYPES[datatype]
    if len(data) != size * dtype.itemsize:
        raise TensorError(
            f"it has {len(data)} bytes; shape {list(shape)} of {datatype} takes "
            f"{size * dtype.itemsize}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def split(data: bytes, num_elements: int) -> list[bytes]:
    """The elements of a BYTES tensor.

    Raises:
        TensorError: there are fewer, or something is left over.
    """
    elements: list[bytes] = []
    place = 0
    while place < len(data) and len(elements) < num_elements:
        start = place + LENGTH.size
        if start > len(data):
            raise TensorError(f"its element {len(elements)} ends within its length")
        (length,) = LENGTH.unpack_from(data, place)
        place = start + length
        if place > len(data):
            raise TensorError(
                f"its element {len(elements)} has {length} bytes by its length, and "
                f"{len(data) - start} are there"
            )
        elements.append(data[start:place])
    if len(elements) < num_elements or place < len(data):
        raise TensorError(
            f"it has {len(elements)} elements and {len(data) - place} bytes more; expected "
            f"{num_elements} elements and nothing else"
        )
    return elements


def from_list(values: list[Any], datatype: Datatype, shape: Sequence[int]) -> Elements:
    """The tensor in a JSON list, nested as its shape is, or flat.

    Text of BYTES is encoded as UTF-8.

    Raises:
        TensorError: another nesting, or a value that the datatype does not have.
    """
    flat = _flat(values, shape)
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        _check_kinds(kinds, {str}, "texts")
        return [text.encode() for text in flat]
    if datatype == "UINT8":
        _check_kinds(kinds, {int}, "whole numbers")
        if flat and not 0 <= min(flat) <= max(flat) <= np.iinfo(np.uint8).max:
            raise TensorError(f"it has values from {min(flat)} to {max(flat)}; expected 0 to 255")
        return np.array(flat, np.uint8).reshape(shape)
    _check_kinds(kinds, {int, float}, "numbers")
    with np.errstate(over="ignore"):
        array = np.array(flat, np.float64).astype(DTYPES[datatype])
    return array.reshape(shape)


def count_of(shape: Iterable[int]) -> int:
    """Elements of a tensor; Python's numbers do not overflow."""
    count = 1
    for size in shape:
        count *= size
    return count


def _flat(values: list[Any], shape: Sequence[int]) -> list[Any]:
    if list in set(map(type, values)):
        if len(values) != shape[0]:
            raise TensorError(f"its list has {len(values)} parts; shape {list(shape)} needs others")
        for size in shape[1:]:
            if set(map(type, values)) - {list} or set(map(len, values)) - {size}:
                raise TensorError(f"its list is not nested as its shape {list(shape)} is")
            values = list(chain.from_iterable(values))
    if len(values) != count_of(shape):
        raise TensorError(
            f"it has {len(values)} values; shape {list(shape)} takes {count_of(shape)}"
        )
    return values


def _check_kinds(kinds: set[type], expected: set[type], words: str) -> None:
    if wrong := sorted(kind.__name__ for kind in kinds - expected):
        raise TensorError(f"it has values of JSON type {wrong[0]}; expected {words}")
