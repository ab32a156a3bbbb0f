"""A load generator: keep-alive connections that each send the next request when one is answered.

A bare asyncio protocol, because an HTTP client library would cost more than the service that it is
meant to load, and both share the machine. (Streams took 0.21 to 0.38 ms a request.)
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from typing_extensions import override

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
END_OF_HEAD = b"\r\n\r\n"


@dataclass
class Load:
    """What the connections saw; times from `time.monotonic`, in seconds.

    Args:
        refusals_s: How long it took to be told 503; only an open load notes it.
        num_failed: Requests without an answer, those that were refused among them.
    """

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    refusals_s: list[float] = field(default_factory=list)
    num_failed: int = 0

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return len(self.latencies_s) / self.seconds

    def latency_ms(self, share: float) -> float:
        """A quantile of the latencies, such as 0.99."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[int(len(ordered) * share)]


async def run_load(
    url: str,
    body: bytes,
    *,
    connections: int,
    seconds: float,
    warm_up_s: float = 0.5,
    content_type: str = "image/jpeg",
    method: str = "POST",
) -> Load:
    """Send `body` to `url` over and over; what is answered in the warm-up is not counted."""
    return await run_spread_load(
        [url],
        body,
        connections=connections,
        seconds=seconds,
        warm_up_s=warm_up_s,
        content_type=content_type,
        method=method,
    )


async def run_spread_load(
    urls: list[str],
    body: bytes,
    *,
    connections: int,
    seconds: float,
    warm_up_s: float = 0.5,
    content_type: str = "image/jpeg",
    method: str = "POST",
) -> Load:
    """The same with the connections shared out among several servers."""
    loop = asyncio.get_running_loop()
    load, began_s = Load(seconds), time.monotonic() + warm_up_s
    opened = []
    for number in range(connections):
        url = urls[number % len(urls)]
        host, _, port = urlsplit(url).netloc.partition(":")
        request = request_of(url, body, content_type, method=method)
        connection = _Connection(request, load, began_s)
        await loop.create_connection(lambda opening=connection: opening, host, int(port))
        opened.append(connection)
    await asyncio.gather(*(connection.is_over for connection in opened))
    return load


class _Connection(asyncio.Protocol):
    """One request at a time, until the time is over or the server hangs up."""

    def __init__(self, request: bytes, load: Load, began_s: float) -> None:
        self.is_over = asyncio.get_running_loop().create_future()
        self._request, self._load, self._began_s = request, load, began_s
        self._transport: asyncio.WriteTransport | None = None
        self._received = b""
        self._sent_s = 0.0
        self._is_waiting = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        self._send()

    @override
    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, answer = self._received.partition(END_OF_HEAD)
        if not found:
            return
        length = CONTENT_LENGTH.search(head)
        assert length is not None, "an answer without content-length"
        if len(answer) < int(length[1]):
            return
        is_answered = head.split(b" ", 2)[1] == b"200"
        if self._sent_s >= self._began_s and is_answered:
            self._load.latencies_s.append(time.monotonic() - self._sent_s)
        self._load.num_failed += not is_answered
        self._received, self._is_waiting = b"", False
        self._send()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._load.num_failed += self._is_waiting
        self.is_over.set_result(None)

    def _send(self) -> None:
        assert self._transport is not None
        self._sent_s = time.monotonic()
        if self._sent_s >= self._began_s + self._load.seconds:
            self._transport.close()
            return
        self._is_waiting = True
        # One write: a body that trails its head is held back by Nagle's algorithm.
        self._transport.write(self._request)


def request_of(
    url: str,
    body: bytes,
    content_type: str = "image/jpeg",
    headers: Sequence[str] = (),
    *,
    method: str = "POST",
) -> bytes:
    """A whole request as it goes over the wire."""
    parts = urlsplit(url)
    lines = (
        f"{method} {parts.path}{'?' + parts.query if parts.query else ''} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *headers,
    )
    return "\r\n".join(lines).encode() + END_OF_HEAD + body
