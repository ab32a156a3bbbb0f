"""Compressed bodies: opened as they were, and never further than the bound."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http.inflate import Inflater
from serve.http.problems import RequestError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
ENCODINGS = pytest.mark.parametrize("encoding", COMPRESS)


def opened(body: bytes, encoding: str, *, max_bytes: int = 10_000, piece: int = 7) -> bytes:
    """A whole body, fed in pieces."""
    inflater = Inflater(encoding, max_bytes=max_bytes)
    pieces = (body[start : start + piece] for start in range(0, len(body), piece))
    data = b"".join(map(inflater.feed, pieces))
    inflater.end()
    return data


@given(
    data=st.binary(max_size=3000), piece=st.integers(1, 5000), encoding=st.sampled_from([*COMPRESS])
)
def test_what_was_compressed_comes_back(data: bytes, piece: int, encoding: str) -> None:
    """By the standard library's own compressors, in pieces of any size."""
    assert opened(COMPRESS[encoding](data), encoding, piece=piece) == data


@ENCODINGS
def test_a_body_may_hold_as_much_as_the_bound_and_no_more(encoding: str) -> None:
    """One byte more is too large."""
    body = COMPRESS[encoding](bytes(10_001))

    assert len(opened(body, encoding, max_bytes=10_001)) == 10_001
    with pytest.raises(RequestError, match="more than 10000 bytes once it is opened") as refused:
        opened(body, encoding)
    assert refused.value.status == 413


@ENCODINGS
def test_a_bomb_takes_no_more_memory_than_the_bound(encoding: str) -> None:
    """Of 200 MB in 200 kB, a megabyte is opened."""
    bomb = COMPRESS[encoding](bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="holds more than"):
            opened(bomb, encoding, max_bytes=1_000_000, piece=len(bomb))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most_bytes < 4_000_000


@ENCODINGS
@pytest.mark.parametrize("piece", [1, 1000])
def test_a_body_that_is_cut_or_goes_on_is_malformed(encoding: str, piece: int) -> None:
    """So is one inside another, or none of the format at all."""
    body = COMPRESS[encoding](b"some text")

    for wrong, reason in [
        (body[:-1], "ends before its"),
        (b"", "ends before its"),
        (body + b"x", "goes on after the end"),
        (body + body, "goes on after the end"),
        (b"plain text", f"is not {encoding}"),
        (body[:-4] + bytes(4), f"is not {encoding}"),
    ]:
        with pytest.raises(RequestError, match=reason) as refused:
            opened(wrong, encoding, piece=piece)
        assert refused.value.status == 400


@pytest.mark.parametrize("encoding", ["br", "gzip, deflate", "gzip, gzip", "", "identity"])
def test_other_encodings_are_not_opened(encoding: str) -> None:
    """Two at once neither: nothing has to be opened twice."""
    with pytest.raises(RequestError, match="expected gzip or deflate, once") as refused:
        Inflater(encoding, max_bytes=1)

    assert refused.value.status == 415
