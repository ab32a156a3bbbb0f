"""How much of the machine's own speed is left over HTTP, and what does Ray cost?

Pictures per second of the service with 2 replicas, as a share of what is reached by

- two bare processes that only decode the same picture with the same function and run the same
  graph, each with one thread;
- two bare uvicorn processes that give the same answer without Ray (see `bare_server.py`), each
  with half of the connections.

The load generator shares the machine with the service and with uvicorn, not with the former.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, running, serving
from benchmarks.load import Load, run_spread_load
from benchmarks.report import arguments, finish, median_of, note
from export.bundle import TRUNK_GRAPH, read_trunk_folder
from models.pictures import load_picture
from serve.client import Client
from serve.engine import Engine

CONNECTIONS = 8
PROCESSES = 2
TASK = "photos"


def main() -> None:
    """Alternate between the bare processes, uvicorn and the service."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (5, 3.0) if chosen.quick else (9, 8.0)
    jpeg = photograph()
    bare_rates: list[float] = []
    uvicorn_loads: list[Load] = []
    loads: list[Load] = []
    with tempfile.TemporaryDirectory() as name:
        trunk, store = Path(name) / "trunk", Path(name) / "store"
        make_trunk(trunk)
        with Bare(trunk, jpeg) as bare, serving(store, trunk=trunk) as service:
            with Client(service["url"]) as client:
                client.push(make_bundle(trunk, task=TASK, seed=0))
            uvicorn = ("-m", "benchmarks.bare_server", str(store), TASK)
            with running(*uvicorn) as first, running(*uvicorn) as second:
                for number in range(rounds):
                    bare_rates.append(bare.rate(seconds))
                    uvicorn_loads.append(_load([first["url"], second["url"]], jpeg, seconds))
                    loads.append(_load([f"{service['url']}/predict/{TASK}"], jpeg, seconds))
                    note(
                        f"round {number + 1} of {rounds}: bare {bare_rates[-1]:.0f}/s, "
                        f"uvicorn {uvicorn_loads[-1].rate:.0f}/s, HTTP {loads[-1].rate:.0f}/s"
                    )
    rates = [load.rate for load in loads]
    uvicorn_rates = [load.rate for load in uvicorn_loads]
    p50s, p99s = ([load.latency_ms(share) for load in loads] for share in (0.5, 0.99))
    figures = [
        median_of("HTTP / bare processes", _ratios(rates, bare_rates), unit="ratio", aim=">= 0.68"),
        median_of("HTTP / uvicorn", _ratios(rates, uvicorn_rates), unit="ratio", aim=">= 0.95"),
        median_of("HTTP, 2 replicas", rates, unit="pictures/s"),
        median_of("2 bare processes", bare_rates, unit="pictures/s"),
        median_of("2 bare uvicorn processes", uvicorn_rates, unit="pictures/s"),
        median_of(f"latency p50, {CONNECTIONS} connections", p50s, unit="ms"),
        median_of(f"latency p99, {CONNECTIONS} connections", p99s, unit="ms"),
    ]
    finish("http_throughput", figures, chosen)


def _load(urls: list[str], jpeg: bytes, seconds: float) -> Load:
    load = asyncio.run(run_spread_load(urls, jpeg, connections=CONNECTIONS, seconds=seconds))
    assert not load.num_failed, f"{load.num_failed} requests failed"
    return load


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [own / other for own, other in zip(ours, theirs, strict=True)]


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
