"""How many parts a graph has, counted from its bytes, against the parsed message."""

from __future__ import annotations

import itertools
import resource
import time

import numpy as np
import onnx
import pytest
from google.protobuf.message import Message
from onnx import helper

from serve.graph_parts import NoGraphError, count_parts
from tests.serve.graphs import (
    biased,
    constant_head,
    constant_node,
    doubling,
    head_model,
    mixing_head,
    node,
)
from tests.serve.test_gates import HOSTILE

MANY = 10**9


def parts_of(message: Message) -> int:
    """The same number from the parsed message: every field, and what is in it."""
    total = 0
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated else [value]
        if field.message_type is not None:
            total += sum(1 + parts_of(one) for one in values)
        elif field.is_repeated and field.is_packed:
            is_float = field.cpp_type == field.CPPTYPE_FLOAT
            total += 1 + (0 if is_float else sum(_varint_size(one) for one in values))
        elif field.is_repeated and field.cpp_type == field.CPPTYPE_FLOAT:
            total += 1  # a row
        else:
            total += len(values)
    return total


def _varint_size(number: int) -> int:
    return max(1, -(-(number % 2**64).bit_length() // 7))


MODELS = {
    "a head": onnx.load_model_from_string(constant_head([1, 2, 3])),
    "another": onnx.load_model_from_string(mixing_head()),
    "a constant node": biased(constant_node(np.zeros(3, np.float32))),
    "some width": doubling(5),
    "rows of numbers": head_model(
        [
            node("SVMRegressor", "features", "y", domain="ai.onnx.ml", coefficients=[0.5] * 100),
            node("Constant", "", "c", value_ints=[1, -1, 300, 2**40]),
            node("Constant", "", "d", value_strings=["a", "b", ""]),
        ]
    ),
    "packed integers": helper.make_model(
        helper.make_graph([], "g", [], [], [helper.make_tensor("w", 7, [4], [1, -1, 300, 2**40])])
    ),
    **{name: model for name, (model, _) in HOSTILE.items() if name != "NaN in a node's list"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_counted_as_the_message_would_be(name: str) -> None:
    """Field by field, at any depth."""
    data = MODELS[name].SerializeToString()

    assert count_parts(data, most=MANY) == parts_of(onnx.load_model_from_string(data))


def bomb(num_weights: int) -> bytes:
    """A model of so many empty weights, two bytes each."""
    return field(7, b"\x2a\x00" * num_weights)


def field(number: int, data: bytes) -> bytes:
    """A field that holds bytes."""
    size, rest = b"", len(data)
    while rest >= 128:
        size, rest = size + bytes([rest % 128 + 128]), rest // 128
    return bytes([number << 3 | 2]) + size + bytes([rest]) + data


def test_counting_ends_soon_after_the_bound() -> None:
    """Whatever stands behind it, and wherever the parts are hidden."""
    weights, texts = bomb(10**6), field(7, field(5, b"\x32\x00" * 10**6))

    assert count_parts(bomb(999), most=1000) == 1000
    assert count_parts(weights, most=1000) == 1001
    assert count_parts(texts, most=1000) == 1001
    assert count_parts(field(7, field(5, field(7, bytes(10**6)))), most=1000) > 1000


def test_a_bomb_is_counted_in_little_time_and_memory() -> None:
    """Parsed, these 32 MB would take 2.6 GB."""
    data = bomb(16 * 2**20)
    before, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    num_parts = count_parts(data, most=1000)

    assert num_parts == 1001
    assert time.monotonic() - began_s < 1  # a millisecond, and the parser takes seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_a_long_row_of_numbers_is_one_part() -> None:
    """A support vector machine has millions of them; each takes its own five bytes only."""
    row = field(7, field(1, field(5, b"\x3d\x00\x00\x80\x3f" * 10**6)))
    began_s = time.monotonic()

    assert count_parts(row, most=100) == 4
    assert time.monotonic() - began_s < 1


@pytest.mark.parametrize(
    "data",
    [b"\x3a", b"\x3a\x05\x00", b"\x08", b"\x08" + b"\xff" * 11, b"\x3b", b"\x3d\x00", b"\x39\x00"],
    ids=["no size", "too short", "no number", "no end", "a group", "four bytes", "eight bytes"],
)
def test_what_cannot_be_followed_is_no_graph(data: bytes) -> None:
    """It is not left to the parser."""
    with pytest.raises(NoGraphError):
        count_parts(data, most=MANY)


def test_a_text_that_is_none_is_no_graph() -> None:
    """ONNX's checker would fail to tell what is wrong with it."""
    model = MODELS["a head"].SerializeToString().replace(b"features", b"feat\xffres")

    with pytest.raises(NoGraphError, match=r"the text b'feat.xffres' is not UTF-8"):
        count_parts(model, most=MANY)


def test_every_way_to_cut_a_graph_short_is_seen_or_harmless() -> None:
    """Never another error than its own."""
    data = MODELS["some width"].SerializeToString()
    outcomes = set()
    for end, flip in itertools.product(range(len(data)), (0, 1, 128)):
        changed = bytearray(data[: end + 1])
        changed[-1] ^= flip
        try:
            outcomes.add(count_parts(bytes(changed), most=MANY) > 0)
        except NoGraphError:
            outcomes.add(False)

    assert outcomes == {True, False}
