"""Tensors on the wire: what is written is read again, and nothing else is."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from serve.http.oip.tensors import TensorError, from_list, from_raw, split, to_raw

ANY_TIME = settings(deadline=None)  # a machine may be busy
SHAPES = array_shapes(min_dims=1, max_dims=4, max_side=4)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ELEMENTS = st.lists(st.binary(max_size=20), min_size=1, max_size=6)


@ANY_TIME
@given(arrays(np.float32, SHAPES, elements=FLOATS))
def test_floats_are_little_endian_and_row_major(array: NDArray[np.float32]) -> None:
    """As `struct` writes them one by one, and back."""
    raw = struct.pack(f"<{array.size}f", *array.ravel().tolist())

    assert to_raw(array) == raw
    np.testing.assert_array_equal(from_raw(raw, "FP32", array.shape), array)


@ANY_TIME
@given(arrays(np.uint8, SHAPES))
def test_bytes_of_pixels_are_themselves(array: NDArray[np.uint8]) -> None:
    """One each, row-major."""
    assert to_raw(array) == bytes(array.ravel().tolist())
    np.testing.assert_array_equal(from_raw(to_raw(array), "UINT8", array.shape), array)


@ANY_TIME
@given(ELEMENTS)
def test_texts_are_framed_as_the_standard_client_frames_them(elements: list[bytes]) -> None:
    """In both directions."""
    theirs = serialize_byte_tensor(np.array(elements, dtype=object)).item()
    raw = to_raw(elements)

    assert raw == theirs
    assert split(theirs, len(elements)) == elements
    assert list(deserialize_bytes_tensor(raw)) == elements


@ANY_TIME
@given(elements=ELEMENTS, data=st.data())
def test_a_cut_or_longer_tensor_is_refused(elements: list[bytes], data: st.DataObject) -> None:
    """Wherever it is cut, and whatever follows it."""
    raw = to_raw(elements)
    end = data.draw(st.integers(0, len(raw) - 1))
    more = data.draw(st.binary(min_size=1, max_size=9))

    for wrong in (raw[:end], raw + more):
        with pytest.raises(TensorError):
            split(wrong, len(elements))


@ANY_TIME
@given(data=st.binary(max_size=40), num=st.integers(1, 6))
def test_any_bytes_are_read_whole_or_refused(data: bytes, num: int) -> None:
    """What is read writes the same bytes again."""
    try:
        elements = split(data, num)
    except TensorError:
        return

    assert len(elements) == num
    assert to_raw(elements) == data


def test_a_length_that_lies_takes_no_memory() -> None:
    """Four gigabytes are announced, and two bytes are there."""
    with pytest.raises(TensorError, match="has 4294967295 bytes by its length, and 2 are there"):
        split(b"\xff\xff\xff\xffab", 1)


@pytest.mark.parametrize("datatype", ["FP32", "UINT8", "BYTES"])
@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**16, 2**16, 2**16, 2**16], [2**64]])
def test_a_shape_whose_product_overflows_is_not_an_empty_tensor(
    datatype: Any, shape: list[int]
) -> None:
    """In 64 bits each of these has no element."""
    with pytest.raises(TensorError):
        from_raw(b"", datatype, shape)
    with pytest.raises(TensorError):
        from_list([], datatype, shape)


@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
@pytest.mark.parametrize("more", [-1, 1])
def test_an_array_of_another_length_is_refused(datatype: Any, more: int) -> None:
    """One byte less or more."""
    size = 6 * (4 if datatype == "FP32" else 1)

    with pytest.raises(TensorError, match=rf"shape \[2, 3\] of {datatype} takes {size}"):
        from_raw(bytes(size + more), datatype, [2, 3])


@ANY_TIME
@given(arrays(np.float32, SHAPES, elements=FLOATS))
def test_a_list_may_be_nested_or_flat(array: NDArray[np.float32]) -> None:
    """Both are the same tensor."""
    for values in (array.tolist(), array.ravel().tolist()):
        np.testing.assert_array_equal(from_list(values, "FP32", array.shape), array)


MALFORMED: dict[str, tuple[list[Any], Any, list[int], str]] = {
    "ragged": ([[1, 2], [3]], "FP32", [2, 2], "not nested as its shape"),
    "partly flat": ([[1, 2], 3, 4], "FP32", [2, 2], "parts"),
    "half flat": ([1, [2, 3, 4]], "FP32", [2, 2], "not nested as its shape"),
    "transposed": ([[1, 2, 3], [4, 5, 6]], "FP32", [3, 2], "parts"),
    "too deep": ([[[1], [2]], [[3], [4]]], "FP32", [2, 2], "values of JSON type list"),
    "not deep enough": ([[1, 2], [3, 4]], "FP32", [2, 2, 1], "not nested as its shape"),
    "too few": ([1, 2, 3], "FP32", [2, 2], "has 3 values; shape [2, 2] takes 4"),
    "too many": ([1, 2, 3, 4, 5], "FP32", [2, 2], "has 5 values"),
    "nothing": ([], "FP32", [1], "has 0 values"),
    "truth": ([True, False], "FP32", [2], "JSON type bool; expected numbers"),
    "texts": (["1"], "FP32", [1], "JSON type str; expected numbers"),
    "null": ([None], "FP32", [1], "JSON type NoneType; expected numbers"),
    "fractions": ([1.0], "UINT8", [1], "JSON type float; expected whole numbers"),
    "negative": ([-1], "UINT8", [1], "values from -1 to -1; expected 0 to 255"),
    "large": ([0, 256], "UINT8", [2], "values from 0 to 256; expected 0 to 255"),
    "numbers": ([1], "BYTES", [1], "JSON type int; expected texts"),
    "an object": ([{"b64": ""}], "BYTES", [1], "JSON type dict; expected texts"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_list_of_something_else_is_refused(kind: str) -> None:
    """With what was found and what was expected."""
    values, datatype, shape, reason = MALFORMED[kind]

    with pytest.raises(TensorError) as refused:
        from_list(values, datatype, shape)
    assert reason in str(refused.value)
