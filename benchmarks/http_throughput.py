"""How much of the machine's own speed is left over HTTP?

Pictures per second of the service with 2 replicas, as a share of what two bare processes reach that
only decode the same picture with the same function and run the same graph, each with one thread.
The load generator shares the machine with the service and not with the bare processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import run_load
from benchmarks.report import arguments, finish, median_of, note
from export.bundle import TRUNK_GRAPH, read_trunk_folder
from models.pictures import load_picture
from serve.client import Client
from serve.engine import Engine

CONNECTIONS = 8
PROCESSES = 2


def main() -> None:
    """Alternate between the bare processes and the service."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (5, 3.0) if chosen.quick else (9, 8.0)
    jpeg = photograph()
    with tempfile.TemporaryDirectory() as name:
        trunk, store = Path(name) / "trunk", Path(name) / "store"
        make_trunk(trunk)
        bundle = make_bundle(trunk, task="photos", seed=0)
        with Bare(trunk, jpeg) as bare, serving(store, trunk=trunk) as service:
            with Client(service["url"]) as client:
                client.push(bundle)
            bare_rates: list[float] = []
            http_rates: list[float] = []
            p50s: list[float] = []
            p99s: list[float] = []
            for number in range(rounds):
                bare_rates.append(bare.rate(seconds))
                load = asyncio.run(
                    run_load(
                        f"{service['url']}/predict/photos",
                        jpeg,
                        connections=CONNECTIONS,
                        seconds=seconds,
                    )
                )
                assert not load.num_failed, f"{load.num_failed} requests failed"
                ordered = sorted(load.latencies_s)
                http_rates.append(load.rate)
                p50s.append(1000 * ordered[len(ordered) // 2])
                p99s.append(1000 * ordered[int(len(ordered) * 0.99)])
                note(
                    f"round {number + 1} of {rounds}: bare {bare_rates[-1]:.0f}/s, "
                    f"HTTP {http_rates[-1]:.0f}/s"
                )
    ratios = [http / own for http, own in zip(http_rates, bare_rates, strict=True)]
    figures = [
        median_of("HTTP / bare processes", ratios, unit="ratio", aim=">= 0.60"),
        median_of("HTTP, 2 replicas", http_rates, unit="pictures/s"),
        median_of("2 bare processes", bare_rates, unit="pictures/s"),
        median_of(f"latency p50, {CONNECTIONS} connections", p50s, unit="ms"),
        median_of(f"latency p99, {CONNECTIONS} connections", p99s, unit="ms"),
    ]
    finish("http_throughput", figures, chosen)


class Bare:
    """Two processes that decode and run on command; they sleep in between."""

    def __init__(self, trunk: Path, jpeg: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(PROCESSES):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, trunk, jpeg), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Bare:  # noqa: PYI034 (nobody inherits)
        """Wait until both have loaded."""
        for pipe in self._pipes:
            pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        for pipe in self._pipes:
            pipe.send(0.0)
        for process in self._processes:
            process.join()

    def rate(self, seconds: float) -> float:
        """Pictures per second of both together."""
        for pipe in self._pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self._pipes)


def _work(pipe: Connection, trunk: Path, jpeg: bytes) -> None:
    manifest, files = read_trunk_folder(trunk)
    engine = Engine(files[TRUNK_GRAPH], manifest)
    pipe.send(0.0)
    while (seconds := pipe.recv()) > 0:
        number, began_s = 0, time.monotonic()
        while time.monotonic() < began_s + seconds:
            engine.features(load_picture(jpeg, manifest.preprocessing)[None])
            number += 1
        pipe.send(number / (time.monotonic() - began_s))


if __name__ == "__main__":
    main()
