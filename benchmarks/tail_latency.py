"""How long does an unlucky request wait on a service that is busy, but not too busy?

Requests come at Poisson times at 70 % of what the service was just measured to answer with all its
connections busy, and are timed from when they were due. Their p99 is put in relation to the service
time: the median latency of one client that asks again when it is answered.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import run_load
from benchmarks.open_load import run_open_load
from benchmarks.report import arguments, finish, median_of, note
from serve.client import Client

CONNECTIONS = 8
UTILISATION = 0.7


def main() -> None:
    """Alternate between one client, full load, and Poisson arrivals."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (3, 3.0) if chosen.quick else (9, 10.0)
    jpeg = photograph()
    ratios: list[float] = []
    services_ms: list[float] = []
    rates: list[float] = []
    p50s_ms: list[float] = []
    p99s_ms: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        trunk = Path(name) / "trunk"
        make_trunk(trunk)
        bundle = make_bundle(trunk, task="photos", seed=0)
        with serving(Path(name) / "store", trunk=trunk) as service:
            with Client(service["url"]) as client:
                client.push(bundle)
            url = f"{service['url']}/predict/photos"
            # Not counted: HAProxy is reloaded soon after the start, and closes connections then.
            asyncio.run(run_load(url, jpeg, connections=CONNECTIONS, seconds=2.0))
            for number in range(rounds):
                alone = asyncio.run(run_load(url, jpeg, connections=1, seconds=seconds / 2))
                full = asyncio.run(run_load(url, jpeg, connections=CONNECTIONS, seconds=seconds))
                open_load = asyncio.run(
                    run_open_load(
                        url, jpeg, rate=UTILISATION * full.rate, seconds=2 * seconds, seed=number
                    )
                )
                for load in (alone, full, open_load):
                    assert not load.num_failed, f"{load.num_failed} requests failed"
                services_ms.append(alone.latency_ms(0.5))
                rates.append(full.rate)
                p50s_ms.append(open_load.latency_ms(0.5))
                p99s_ms.append(open_load.latency_ms(0.99))
                ratios.append(p99s_ms[-1] / services_ms[-1])
                note(
                    f"round {number + 1} of {rounds}: alone {services_ms[-1]:.1f} ms, "
                    f"capacity {rates[-1]:.0f}/s, p99 {p99s_ms[-1]:.1f} ms"
                )
    figures = [
        median_of("p99 / service time", ratios, unit="ratio", aim="<= 6"),
        median_of("service time: one client, p50", services_ms, unit="ms"),
        median_of(f"capacity, {CONNECTIONS} connections", rates, unit="pictures/s"),
        median_of("p50 at 70 % of capacity", p50s_ms, unit="ms"),
        median_of("p99 at 70 % of capacity", p99s_ms, unit="ms"),
    ]
    finish("tail_latency", figures, chosen)


if __name__ == "__main__":
    main()
