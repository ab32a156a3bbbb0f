"""Compressed bodies, opened piece by piece up to a bound: a kilobyte may hold a gigabyte."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from serve.http.problems import RequestError

# What zlib calls the two formats: RFC 1952, and RFC 1950, which HTTP calls deflate.
WINDOW_BITS: Mapping[str, int] = {"gzip": 31, "deflate": 15}


class Inflater:
    """Opens one compressed body.

    Args:
        encoding: The body's `Content-Encoding`.
        max_bytes: Most that it may hold; no more memory than this is ever taken.

    Raises:
        RequestError: an encoding that is not opened here.
    """

    def __init__(self, encoding: str, *, max_bytes: int) -> None:
        self._encoding, self._max_bytes = encoding.strip().lower(), max_bytes
        if self._encoding not in WINDOW_BITS:
            raise RequestError(
                415,
                f"Content-Encoding is {encoding!r:.40}; expected {' or '.join(WINDOW_BITS)}, once.",
            )
        self._stream = zlib.decompressobj(WINDOW_BITS[self._encoding])
        self._size_bytes = 0

    def feed(self, piece: bytes) -> bytes:
        """What the next piece of the body opens to.

        Raises:
            RequestError: it is not of that format, goes on after its end, or holds too much.
        """
        if self._stream.eof and piece:
            raise RequestError(400, f"The body goes on after the end of its {self._encoding}.")
        try:
            opened = self._stream.decompress(piece, self._max_bytes - self._size_bytes + 1)
        except zlib.error as error:
            raise RequestError(400, f"The body is not {self._encoding}: {error}.") from error
        self._size_bytes += len(opened)
        if self._size_bytes > self._max_bytes:
            raise RequestError(
                413,
                f"The body holds more than {self._max_bytes} bytes once it is opened, the most "
                "accepted here.",
            )
        if self._stream.unused_data:
            raise RequestError(400, f"The body goes on after the end of its {self._encoding}.")
        return opened

    def end(self) -> None:
        """Say that there is no more.

        Raises:
            RequestError: the body should have gone on.
        """
        if not self._stream.eof:
            raise RequestError(400, f"The body ends before its {self._encoding} does.")
