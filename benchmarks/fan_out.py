"""What does it cost to ask several tasks of one picture instead of one?

The service over HTTP: `POST /predict?tasks=...` with 8 tasks against the same request with one. The
picture is decoded and goes through the trunk once, however many tasks ask; each answer carries the
scores of every task asked. Latency is that of one connection, throughput that of eight.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import Load, run_load
from benchmarks.report import arguments, finish, median_of, note
from serve.client import Client

CONNECTIONS = 8
NUM_TASKS = 8


def main() -> None:
    """Alternate between one task and all of them, alone and under load."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (5, 2.0) if chosen.quick else (9, 6.0)
    jpeg = photograph()
    names = [f"task{number}" for number in range(NUM_TASKS)]
    p50s: dict[int, list[float]] = {1: [], NUM_TASKS: []}
    rates: dict[int, list[float]] = {1: [], NUM_TASKS: []}
    with tempfile.TemporaryDirectory() as name:
        trunk = Path(name) / "trunk"
        make_trunk(trunk)
        with serving(Path(name) / "store", trunk=trunk) as service:
            with Client(service["url"]) as client:
                for number, task in enumerate(names):
                    client.push(make_bundle(trunk, task=task, seed=number))
            for number in range(rounds):
                for num_tasks in (1, NUM_TASKS):
                    url = f"{service['url']}/predict?tasks={','.join(names[:num_tasks])}"
                    alone = _load(url, jpeg, connections=1, seconds=seconds)
                    p50s[num_tasks].append(alone.latency_ms(0.5))
                    crowd = _load(url, jpeg, connections=CONNECTIONS, seconds=seconds)
                    rates[num_tasks].append(crowd.rate)
                note(
                    f"round {number + 1} of {rounds}: 1 task {p50s[1][-1]:.2f} ms, "
                    f"{rates[1][-1]:.0f}/s; {NUM_TASKS} tasks {p50s[NUM_TASKS][-1]:.2f} ms, "
                    f"{rates[NUM_TASKS][-1]:.0f}/s"
                )
    slower = [many / one for one, many in zip(p50s[1], p50s[NUM_TASKS], strict=True)]
    fewer = [one / many for one, many in zip(rates[1], rates[NUM_TASKS], strict=True)]
    figures = [
        median_of(f"time a picture, {NUM_TASKS} heads / 1", fewer, unit="ratio", aim="<= 1.1"),
        median_of(f"latency alone, {NUM_TASKS} heads / 1", slower, unit="ratio", aim="<= 1.1"),
        median_of("latency p50 alone, 1 head", p50s[1], unit="ms"),
        median_of(f"latency p50 alone, {NUM_TASKS} heads", p50s[NUM_TASKS], unit="ms"),
        median_of("1 head", rates[1], unit="pictures/s"),
        median_of(f"{NUM_TASKS} heads", rates[NUM_TASKS], unit="pictures/s"),
    ]
    finish("fan_out", figures, chosen)


def _load(url: str, jpeg: bytes, *, connections: int, seconds: float) -> Load:
    load = asyncio.run(run_load(url, jpeg, connections=connections, seconds=seconds))
    assert not load.num_failed, f"{load.num_failed} requests failed"
    return load


if __name__ == "__main__":
    main()
