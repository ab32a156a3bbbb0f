"""A fleet that grows and shrinks under load, with a push in the middle: nothing is dropped."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.background import Background
from tests.end_to_end.callers import Callers, png
from tests.end_to_end.program import Program
from tests.end_to_end.sabotage import sabotage
from tests.serve.harness import until
from tests.serve.oracle import Heads

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Takes long to decode large pictures, without taking a processor for it: the test needs more load
# than a replica can do, on a machine that may be busy with other things.
SLOW_DECODER = """
import time

quick_load = load_picture

def load_picture(data, *args, **options):
    if len(data) > 50_000:
        time.sleep(0.25)
    return quick_load(data, *args, **options)
"""
KEEP_S = 30  # longer than a start on a busy machine, and what follows
CALM_S = 33  # half a minute is what a jump is told from
LOAD = 6.0  # large pictures a second; a replica decodes four
BUSY_S = 10.0
CLIENTS = 48
GROWS_IN_S, SHRINKS_IN_S = 120.0, 240.0


def large_png() -> bytes:
    """A picture that `SLOW_DECODER` takes for large."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    return png(noise)


class Load:
    """Requests at even times, however long each takes; notes every status."""

    def __init__(self, url: str, picture: bytes, *, rate: float) -> None:
        self._url, self._picture = url, picture
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        self._client = httpx.Client(timeout=60, limits=limits)
        began_s = time.monotonic()
        self._ticks = (began_s + place / rate for place in itertools.count())
        self._lock = threading.Lock()
        self.statuses: list[object] = []

    def ask(self, _: int) -> None:
        """Send the next one when it is due."""
        with self._lock:
            due_s = next(self._ticks)
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            answer = self._client.post(self._url, content=self._picture)
        except httpx.TransportError as error:
            self.statuses.append(repr(error))
        else:
            self.statuses.append(answer.status_code)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


@pytest.mark.timeout(900)
def test_replicas_follow_the_load_and_nothing_is_dropped(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica, more under load, and one again; pushes while it grows, and after."""
    sabotage(tmp_path / "site", monkeypatch, {"models.pictures": SLOW_DECODER})
    settings = {"decode_threads": 1, "keep_replicas_s": KEEP_S}
    flags = ("--min-replicas", "1", "--max-replicas", "3")
    with Program(tmp_path, trunk_folder, replicas=flags, **settings) as program:
        with program.client() as client:
            client.push(heads(9, "large"))
            client.push(heads(0, "colours"))
        with Callers(program, heads, (("colours",),), clients=1, pause_s=1.0) as callers:
            time.sleep(CALM_S)
            before = len(program.replicas())
            load = Load(f"{program.url}/predict/large", large_png(), rate=LOAD)
            with Background(load.ask, threads=CLIENTS):
                until(lambda: program.counts("headstock_replicas")[""] > 1, limit_s=GROWS_IN_S)
                callers.push(1, "colours")
                time.sleep(BUSY_S)
                grown = int(program.counts("headstock_replicas")[""])
            load.close()
            until(lambda: program.is_whole(1), limit_s=SHRINKS_IN_S)
            callers.push(2, "colours")
            callers.wait_for(5)
            broken = callers.judge()
            with program.client() as client:
                told = client.tasks()["replicas"]

    assert told is not None
    assert before == 1, told
    assert grown > 1, told
    assert set(load.statuses) == {200}
    assert broken == []
    changes = [(change["before"], change["replicas"]) for change in told["changes"]]
    assert changes[-1][0] == changes[0][1] == 1
    assert told["answering"] == told["wanted"] == 1
