"""A line of JSON for each request, written by a thread of its own."""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import orjson

logger = logging.getLogger(__name__)

WRITE_S = 0.2
MAX_LINES = 20_000  # that wait for the writer; a disk that hangs must not fill the memory
STDERR = "-"


class AccessLog:
    """Lines on their way to a file, which all replicas append to; use `close` at the end.

    Args:
        file: Its path, or "-" for standard error.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._lines: deque[dict[str, object]] = deque()
        self._num_dropped = 0
        self._is_over = threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="access log", daemon=True)
        self._writer.start()

    def note(self, line: dict[str, object]) -> None:
        """Have a line written soon; what is None is left out."""
        if len(self._lines) >= MAX_LINES:
            self._num_dropped += 1
            return
        self._lines.append({"time": datetime.now(UTC), **line})

    def close(self) -> None:
        """Write what is left."""
        self._is_over.set()
        self._writer.join(timeout=5)

    def _write_all(self) -> None:
        while not self._is_over.wait(WRITE_S):
            self._write()
        self._write()

    def _write(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if self._num_dropped:
            lines.append({"time": datetime.now(UTC), "dropped_lines": self._num_dropped})
            self._num_dropped = 0
        text = b"".join(
            orjson.dumps(
                {name: value for name, value in line.items() if value is not None},
                option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z,
            )
            for line in lines
        )
        if not text:
            return
        try:
            if self._file == STDERR:
                sys.stderr.buffer.write(text)
                sys.stderr.buffer.flush()
            else:
                # One write a time, so that lines of several replicas do not tear each other.
                with Path(self._file).open("ab", buffering=0) as file:
                    file.write(text)
        except OSError as error:  # the next lines may go through
            logger.warning("%d lines of the access log are lost: %s", len(lines), error)
