"""A load generator: keep-alive connections that each send the next request when one is answered.

Plain asyncio streams, because an HTTP client library would cost more than the service that it is
meant to load, and both share the machine.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Load:
    """What the connections saw; times from `time.monotonic`, in seconds."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    num_failed: int = 0

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return len(self.latencies_s) / self.seconds


async def run_load(
    url: str, body: bytes, *, connections: int, seconds: float, warm_up_s: float = 0.5
) -> Load:
    """POST `body` to `url` over and over; what is answered in the warm-up is not counted."""
    parts = urlsplit(url)
    head = f"POST {parts.path}{'?' + parts.query if parts.query else ''} HTTP/1.1\r\n"
    request = f"{head}Host: {parts.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    load, began_s = Load(seconds), time.monotonic() + warm_up_s

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        while (sent_s := time.monotonic()) < began_s + seconds:
            # One write: a body that trails its head is held back by Nagle's algorithm.
            writer.write(request)
            is_answered = await _read_answer(reader)
            if sent_s >= began_s and is_answered:
                load.latencies_s.append(time.monotonic() - sent_s)
            load.num_failed += not is_answered
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return load


async def _read_answer(reader: asyncio.StreamReader) -> bool:
    """Whether the answer's status is 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    await reader.readexactly(length)
    return head.split(b" ", 2)[1] == b"200"
