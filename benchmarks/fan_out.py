"""What does it cost to ask several tasks of one picture instead of one?

The service over HTTP: `POST /predict?tasks=...` with 8 tasks against the same request with one, for
heads alone and for heads with LoRA adapters. The picture is decoded once and goes through the
trunk, or its prefix, once, however many tasks ask; each answer carries the scores of every task
asked. Latency is that of one connection, throughput that of eight.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import Load, run_load
from benchmarks.report import Figure, arguments, finish, median_of, note
from serve.client import Client

CONNECTIONS = 8
NUM_TASKS = 8


def main() -> None:
    """Alternate between one task and all of them, alone and under load."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (5, 2.0) if chosen.quick else (9, 6.0)
    jpeg = photograph()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        trunk = Path(name) / "trunk"
        make_trunk(trunk)
        with serving(Path(name) / "store", trunk=trunk) as service:
            with Client(service["url"]) as client:
                for number in range(NUM_TASKS):
                    client.push(make_bundle(trunk, task=f"head{number}", seed=number))
                    client.push(
                        make_bundle(trunk, task=f"lora{number}", seed=number, has_adapter=True)
                    )
            for kind, aim in (("head", "<= 1.1"), ("lora", "<= 5")):
                asked = [f"{kind}{number}" for number in range(NUM_TASKS)]
                figures += _compare(
                    service["url"], jpeg, kind, asked, rounds=rounds, seconds=seconds, aim=aim
                )
    finish("fan_out", figures, chosen)


def _compare(
    url: str,
    jpeg: bytes,
    kind: str,
    names: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    aim: str,
) -> list[Figure]:
    """One of these tasks against all of them, in turn."""
    p50s: dict[int, list[float]] = {1: [], NUM_TASKS: []}
    rates: dict[int, list[float]] = {1: [], NUM_TASKS: []}
    for number in range(rounds):
        for num_tasks in (1, NUM_TASKS):
            asked = f"{url}/predict?tasks={','.join(names[:num_tasks])}"
            alone = _load(asked, jpeg, connections=1, seconds=seconds)
            p50s[num_tasks].append(alone.latency_ms(0.5))
            crowd = _load(asked, jpeg, connections=CONNECTIONS, seconds=seconds)
            rates[num_tasks].append(crowd.rate)
        note(
            f"{kind}, round {number + 1} of {rounds}: 1 task {p50s[1][-1]:.2f} ms, "
            f"{rates[1][-1]:.0f}/s; {NUM_TASKS} tasks {p50s[NUM_TASKS][-1]:.2f} ms, "
            f"{rates[NUM_TASKS][-1]:.0f}/s"
        )
    slower = [many / one for one, many in zip(p50s[1], p50s[NUM_TASKS], strict=True)]
    fewer = [one / many for one, many in zip(rates[1], rates[NUM_TASKS], strict=True)]
    return [
        median_of(f"time a picture, {NUM_TASKS} {kind} tasks / 1", fewer, unit="ratio", aim=aim),
        median_of(f"latency alone, {NUM_TASKS} {kind} tasks / 1", slower, unit="ratio", aim=aim),
        median_of(f"latency p50 alone, 1 {kind} task", p50s[1], unit="ms"),
        median_of(f"latency p50 alone, {NUM_TASKS} {kind} tasks", p50s[NUM_TASKS], unit="ms"),
        median_of(f"1 {kind} task", rates[1], unit="pictures/s"),
        median_of(f"{NUM_TASKS} {kind} tasks", rates[NUM_TASKS], unit="pictures/s"),
    ]


def _load(url: str, jpeg: bytes, *, connections: int, seconds: float) -> Load:
    load = asyncio.run(run_load(url, jpeg, connections=connections, seconds=seconds))
    assert not load.num_failed, f"{load.num_failed} requests failed"
    return load


if __name__ == "__main__":
    main()
