"""How long does a push take under load, and how long does its task pause?

One task is pushed again and again while 8 connections keep two replicas busy. The hold is measured
by the conductor, from telling the replicas to start no more rows of the task until the last of them
has moved its pointer; the push is measured by the pusher over HTTP.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.background import Background
from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import Load, run_load
from benchmarks.report import arguments, finish, note, quantile_of
from serve.answers import Swap
from serve.client import Client

CONNECTIONS = 8
NUM_BUNDLES = 8
PAUSE_S = 0.1  # between two pushes, so that requests are answered by every version


def main() -> None:
    """Push under load."""
    chosen = arguments(__doc__ or "")
    num_swaps = 60 if chosen.quick else 200
    with tempfile.TemporaryDirectory() as name:
        trunk = Path(name) / "trunk"
        make_trunk(trunk)
        bundles = [make_bundle(trunk, task="photos", seed=seed) for seed in range(NUM_BUNDLES)]
        with (
            serving(Path(name) / "store", trunk=trunk) as service,
            Client(service["url"]) as client,
        ):
            client.push(bundles[-1])
            pushes_ms: list[float] = []
            swaps: list[Swap] = []
            url, jpeg, load = f"{service['url']}/predict/photos", photograph(), Load()
            with Background(lambda _: _ask(url, jpeg, load)):
                for number in range(num_swaps):
                    began_s = time.monotonic()
                    swaps.append(client.push(bundles[number % NUM_BUNDLES])["swap"])
                    pushes_ms.append(1000 * (time.monotonic() - began_s))
                    time.sleep(PAUSE_S)
                    if number % 20 == 19:
                        note(f"{number + 1} of {num_swaps} swaps")
    holds_ms = [swap["hold_ms"] for swap in swaps]
    stages_ms = [swap["stage_ms"] for swap in swaps]
    figures = [
        quantile_of("hold p50", holds_ms, 0.5, unit="ms"),
        quantile_of("hold p99", holds_ms, 0.99, unit="ms", aim="<= 20"),
        quantile_of("stage p50", stages_ms, 0.5, unit="ms"),
        quantile_of("push to live everywhere p50", pushes_ms, 0.5, unit="ms"),
        quantile_of("push to live everywhere p99", pushes_ms, 0.99, unit="ms", aim="<= 250"),
        quantile_of("failed requests", [load.num_failed], 0.5, unit="requests", aim="<= 0"),
        quantile_of("answered requests", [len(load.latencies_s)], 0.5, unit="requests"),
    ]
    finish("swap_latency", figures, chosen)


def _ask(url: str, jpeg: bytes, total: Load) -> None:
    part = asyncio.run(run_load(url, jpeg, connections=CONNECTIONS, seconds=1.0, warm_up_s=0.0))
    total.seconds += part.seconds
    total.latencies_s += part.latencies_s
    total.num_failed += part.num_failed


if __name__ == "__main__":
    main()
