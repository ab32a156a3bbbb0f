"""What does the service spend on a request, beside decoding the picture and running the trunk?

Processor time (user and system) of everything that `headstock serve` started, while connections
ask over and over, less what it spends while nobody asks, and less what decoding that picture and
running that graph cost by themselves: measured in the same rounds by the same functions, for
batches of the size that the service formed. What is left is HTTP, the queue, the head, the answer
and the proxy.

A route that does nothing shows what of it is Ray Serve, uvicorn and HAProxy alone. The
trunk is as small as one can be, so that little has to be taken away. The load generator is not
counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.channel_means import make_bundle, make_trunk, png_of, some_picture
from benchmarks.fixtures import serving
from benchmarks.load import run_load
from benchmarks.report import Figure, arguments, finish, median_of, note
from export.bundle import TRUNK_GRAPH, TrunkManifest
from models.pictures import load_picture
from serve.client import Client
from serve.engine import Engine

TASK = "colours"
CONNECTIONS = {8: "<= 0.4", 1: ""}  # how many at once, with what is asked of the overhead
PROCESSES = {"haproxy": "the proxy", "ray::ServeReplica:headstock": "the replica"}
REST = "the rest"  # Ray's own processes, the controller and the conductor
WHO = (*PROCESSES.values(), REST)
CALLS = 1000


def main() -> None:
    """Alternate between nobody who asks, eight connections, and one."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (3, 3.0) if chosen.quick else (9, 8.0)
    samples: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make_trunk(folder / "trunk")
        picture = png_of(some_picture(0))
        engine = Engine((folder / "trunk" / TRUNK_GRAPH).read_bytes(), manifest)
        with serving(folder / "store", trunk=folder / "trunk", replicas=1) as started:
            with Client(started["url"]) as client:
                client.push(make_bundle(manifest, TASK, seed=0))
            service = Service(started, picture)
            service.predict(8, 2.0, service.idle(1.0))  # not counted: HAProxy is reloaded soon
            for number in range(rounds):
                idle = service.idle(seconds)
                for connections in CONNECTIONS:
                    ms, batch = service.predict(connections, seconds, idle)
                    ms["decoding and trunk"] = _alone_ms(engine, picture, manifest, batch)
                    ms["overhead"] = sum(ms[who] for who in WHO) - ms["decoding and trunk"]
                    ms["a route that does nothing"] = service.do_nothing(connections, seconds, idle)
                    for what, value in ms.items():
                        samples[connections, what].append(value)
                    told = ", ".join(f"{what} {value:.3f}" for what, value in ms.items())
                    note(f"{number + 1} of {rounds}, {connections} connections, ms: {told}")
    finish("overhead", [_figure(*key, values) for key, values in samples.items()], chosen)


class Service:
    """What `headstock serve` started, and its processor time."""

    def __init__(self, started: Mapping[str, Any], picture: bytes) -> None:
        self._root, self._url = psutil.Process(started["pid"]), started["url"]
        self._picture = picture

    def idle(self, seconds: float) -> dict[str, float]:
        """What its processes spend while nobody asks, in shares of a core."""
        before = self._spent_s()
        time.sleep(seconds)
        return {who: (spent - before[who]) / seconds for who, spent in self._spent_s().items()}

    def predict(
        self, connections: int, seconds: float, idle: Mapping[str, float]
    ) -> tuple[dict[str, float], float]:
        """Milliseconds a picture, by process, and how many were in a batch on average."""
        before = self._batches()
        spent_ms = self._asked("POST", f"/predict/{TASK}", connections, seconds, idle)
        after = self._batches()
        return spent_ms, (after[0] - before[0]) / (after[1] - before[1])

    def do_nothing(self, connections: int, seconds: float, idle: Mapping[str, float]) -> float:
        """Milliseconds a request to a route that answers at once."""
        spent_ms = self._asked("GET", "/v2/health/live", connections, seconds, idle)
        return sum(spent_ms.values())

    def _asked(
        self, method: str, path: str, connections: int, seconds: float, idle: Mapping[str, float]
    ) -> dict[str, float]:
        before, began_s = self._spent_s(), time.monotonic()
        load = asyncio.run(
            run_load(
                f"{self._url}{path}",
                self._picture if method == "POST" else b"",
                connections=connections,
                seconds=seconds,
                warm_up_s=0,
                content_type="image/png",
                method=method,
            )
        )
        assert not load.num_failed, f"{load.num_failed} requests failed"
        elapsed_s, number = time.monotonic() - began_s, len(load.latencies_s)
        return {
            who: 1000 * (spent - before[who] - idle[who] * elapsed_s) / number
            for who, spent in self._spent_s().items()
        }

    def _spent_s(self) -> dict[str, float]:
        spent = dict.fromkeys(WHO, 0.0)
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times, line = process.cpu_times(), " ".join(process.cmdline())
                who = next((who for part, who in PROCESSES.items() if part in line), REST)
                spent[who] += times.user + times.system
        return spent

    def _batches(self) -> tuple[float, float]:
        """Pictures and batches so far."""
        text = httpx.get(f"{self._url}/metrics").text
        found = re.findall(r"^headstock_batch_pictures_(sum|count) (\S+)$", text, re.MULTILINE)
        values = {name: float(value) for name, value in found}
        return values["sum"], values["count"]


def _alone_ms(engine: Engine, picture: bytes, manifest: TrunkManifest, batch: float) -> float:
    """Processor time of decoding a picture and of its share of a batch."""
    decoded = load_picture(picture, manifest.preprocessing)
    pictures = np.stack([decoded] * round(batch))
    decode_s = _processor_s(lambda: load_picture(picture, manifest.preprocessing))
    return 1000 * (decode_s + _processor_s(lambda: engine.features(pictures)) / len(pictures))


def _processor_s(call: Callable[[], object]) -> float:
    began_s = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - began_s) / CALLS


def _figure(connections: int, what: str, values: list[float]) -> Figure:
    aim = CONNECTIONS[connections] if what == "overhead" else ""
    return median_of(f"{connections} connections: {what}", values, unit="ms a request", aim=aim)


if __name__ == "__main__":
    main()
