"""An open load: requests are sent at Poisson times, whether or not those before were answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from http import HTTPStatus
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import CONTENT_LENGTH, END_OF_HEAD, Load, request_of


async def run_open_load(
    url: str,
    body: bytes,
    *,
    rate: float,
    seconds: float,
    seed: int,
    warm_up_s: float = 0.5,
    headers: Sequence[str] = (),
    give_up_s: float = 60.0,
) -> Load:
    """POST `body` to `url`, `rate` times a second, on as many connections as it takes.

    A latency counts from when the request was due, so a sender that is late hides nothing. A caller
    who has waited for `give_up_s`, or cannot connect, hangs up and has failed.
    """
    request = request_of(url, body, headers=headers)
    load, idle = Load(seconds), list[Connection]()
    began_s = time.monotonic() + warm_up_s

    async def send(due_s: float) -> None:
        connection, status = idle.pop() if idle else Connection(url), 0
        try:
            async with asyncio.timeout(give_up_s):
                status, _ = await connection.post(request)
            idle.append(connection)
        except (OSError, asyncio.IncompleteReadError):  # a TimeoutError is an OSError
            connection.close()
        is_answered = status == HTTPStatus.OK
        if due_s >= began_s and is_answered:
            load.latencies_s.append(time.monotonic() - due_s)
        if due_s >= began_s and status == HTTPStatus.SERVICE_UNAVAILABLE:
            load.refusals_s.append(time.monotonic() - due_s)
        load.num_failed += not is_answered

    async with asyncio.TaskGroup() as sending:
        for due_s in poisson_times(rate, warm_up_s + seconds, seed) + began_s - warm_up_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            sending.create_task(send(due_s))
    for connection in idle:
        connection.close()
    return load


class Connection:
    """One keep-alive connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        is_used = self._streams is not None
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        try:
            # One write: a body that trails its head is held back by Nagle's algorithm.
            writer.write(request)
            return await _read_answer(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            # A proxy may close a connection that was idle; a client sends again.
            self.close()
            if not is_used:
                raise
            return await self.post(request)

    def close(self) -> None:
        """A later request opens it anew."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(END_OF_HEAD)
    length = CONTENT_LENGTH.search(head)
    assert length is not None, "an answer without content-length"
    body = await reader.readexactly(int(length[1]))
    return int(head.split(b" ", 2)[1]), body


def poisson_times(rate: float, seconds: float, seed: int) -> NDArray[np.float64]:
    """Arrivals in [0, seconds), rising."""
    chance = np.random.default_rng(seed)
    return np.sort(chance.uniform(0, seconds, chance.poisson(rate * seconds)))
