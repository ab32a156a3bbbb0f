"""Does the simulator say of a fleet what a live one does?

The same arrivals go to the simulator of `autoscale` and to a Ray cluster on this machine, whose
controller asks the same policy through the same class as the service's. A live replica sleeps for
as long as a batch takes and asks for a quarter of a GPU, of which the cluster is told that it has
two; so nothing but Ray, its routing and its starts is measured. The start-up delay that the
simulator is given is the one that the live policy measured.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.autoscale import our_policy
from benchmarks.autoscale_world import World, simulate
from benchmarks.report import arguments, finish, median_of, note
from serve import runtime
from serve.autoscale import Aim, Decision, ServiceTime

SERVICE = ServiceTime(fixed_s=0.25, row_s=0.25, batch=4)
DEADLINE_S = 3.0
KEEP_S = 30.0
MAX_REPLICAS = 6
CALM_S, BUSY_S = 40.0, 60.0
CALM_RATE, BUSY_RATE = 1.0, 8.0  # rows a second; a replica does 3.2
NAMES = ["conductor", "headstock"]


@dataclass(frozen=True)
class Ran:
    """What one fleet did with the arrivals.

    Args:
        throughput: Answers a second, until the last one.
        most: Replicas at most.
    """

    p99_s: float
    throughput: float
    most: int


class Sleeper:
    """A replica that does nothing for as long as a batch would take."""

    async def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._arrived = 0
        self._news = asyncio.Event()
        self._worker = asyncio.create_task(self._work())

    async def __call__(self) -> None:
        """Wait for a batch, and until it is done."""
        self._arrived += 1
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append(answered)
        self._news.set()
        await answered

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """As `serve/demand.py` tells it."""
        return {
            "arrived": float(self._arrived),
            "waiting": float(len(self._waiting)),
            "row_s": 1 / SERVICE.rate,
            "batch": float(SERVICE.batch),
        }

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._news.clear()
                await self._news.wait()
            num = min(SERVICE.batch, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(num)]
            await asyncio.sleep(SERVICE.fixed_s + SERVICE.row_s * num)
            for answered in batch:
                if not answered.done():
                    answered.set_result(None)


class Listener:
    """Takes the place of the conductor: hears of every decision."""

    def __init__(self) -> None:
        self._decisions: list[Decision] = []

    def scaled(self, decision: Decision) -> None:
        """Note a decision."""
        self._decisions.append(decision)

    def decisions(self) -> list[Decision]:
        """All of them."""
        return self._decisions


def main() -> None:
    """Run rounds of both, and compare."""
    chosen = arguments(__doc__ or "")
    ratios: list[tuple[float, float, float]] = []
    for seed in range(1 if chosen.quick else 3):
        arrivals_s = arrivals(seed)
        live, startup_s = run_live(arrivals_s)
        simulated = run_simulated(arrivals_s, startup_s)
        note(f"seed {seed}: a start takes {startup_s:.1f} s; live {live}, simulated {simulated}")
        ratios.append(
            (
                live.p99_s / simulated.p99_s,
                live.throughput / simulated.throughput,
                live.most / simulated.most,
            )
        )
    p99s, throughputs, mosts = zip(*ratios, strict=True)
    figures = [
        median_of("p99, live / simulated", p99s, unit="ratio", aim="<= 1.5"),
        median_of("p99, simulated / live", [1 / p99 for p99 in p99s], unit="ratio", aim="<= 1.5"),
        median_of("throughput, live / simulated", throughputs, unit="ratio", aim=">= 0.9"),
        median_of("most replicas, live / simulated", mosts, unit="ratio"),
    ]
    finish("autoscale_twin", figures, chosen)


def arrivals(seed: int) -> list[float]:
    """A calm while and a busy one, at Poisson times."""
    chance = np.random.default_rng(seed)
    calm = np.sort(chance.uniform(0, CALM_S, round(CALM_RATE * CALM_S)))
    busy = np.sort(chance.uniform(CALM_S, CALM_S + BUSY_S, round(BUSY_RATE * BUSY_S)))
    return [*calm.tolist(), *busy.tolist()]


def run_simulated(arrivals_s: list[float], startup_s: float) -> Ran:
    """The simulator's fleet, under the same policy."""
    aim = Aim(deadline_s=DEADLINE_S, startup_s=startup_s, max_replicas=MAX_REPLICAS, hold_s=KEEP_S)
    world = World(SERVICE, DEADLINE_S, startup_s, 1, MAX_REPLICAS, 1)
    run = simulate(arrivals_s, our_policy(aim, SERVICE), world)
    return _ran(arrivals_s, run.latency_s.tolist(), max(run.replicas))


def run_live(arrivals_s: list[float]) -> tuple[Ran, float]:
    """A fleet on Ray; also what its policy took a start to take."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets need it short
        runtime.prepare(
            Path(folder), host="127.0.0.1", max_body_bytes=2**20, timeout_s=30.0, proxy="python"
        )
        import ray  # noqa: PLC0415 (reads the variables set above)

        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            namespace=NAMES[1],
            _temp_dir=f"{folder}/ray",
        )
        try:
            listener: Any = ray.remote(Listener).options(name=NAMES[0], num_cpus=0).remote()
            latency_s = asyncio.run(_ask_all(_deployed(), arrivals_s))
            decisions: list[Decision] = ray.get(listener.decisions.remote())
        finally:
            ray.shutdown()
    most = max(decision.replicas for decision in decisions)
    return _ran(arrivals_s, latency_s, most), decisions[-1].startup_s


def _deployed() -> Any:
    """A handle to the replicas, whose number follows the load."""
    from ray import serve as ray_serve  # noqa: PLC0415 (see above)

    from serve.app import autoscaled  # noqa: PLC0415 (imports Ray)

    ray_serve.start(proxy_location="Disabled")
    config = autoscaled(
        least=1, most=MAX_REPLICAS, deadline_s=DEADLINE_S, max_queued=4096, keep_s=KEEP_S
    )
    deployment = ray_serve.deployment(
        name="sleeper",
        autoscaling_config=config,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "num_gpus": 0.25},
    )(Sleeper)
    return ray_serve.run(deployment.bind(), name="twin", route_prefix=None)


async def _ask_all(handle: Any, arrivals_s: list[float]) -> list[float]:
    """Seconds until the answer of each, asked when it arrives."""
    await handle.remote()  # the router has to know the replicas
    began_s = time.monotonic()

    async def ask(due_s: float) -> float:
        await asyncio.sleep(began_s + due_s - time.monotonic())
        await handle.remote()
        return time.monotonic() - began_s - due_s

    return list(await asyncio.gather(*map(ask, arrivals_s)))


def _ran(arrivals_s: list[float], latency_s: list[float], most: int) -> Ran:
    ended_s = max(np.add(arrivals_s, latency_s))
    return Ran(float(np.quantile(latency_s, 0.99)), float(len(latency_s) / ended_s), most)


if __name__ == "__main__":
    main()
