"""Do swaps all day long fail, tear or turn back anything, and what do they cost the others?

Four replicas answer an open load of requests for eight tasks; in every second phase a pusher
pushes, rolls back, retires, and pushes poisoned bundles that have to be refused.

A run is made of segments, each with its seed. Finished ones are kept in a file, and a run that was
stopped goes on after them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path

import numpy as np

from benchmarks.channel_means import make_trunk
from benchmarks.fixtures import serving
from benchmarks.judged_load import PROMISES, TASKS, Answer, JudgedLoad, Swap
from benchmarks.load import run_load
from benchmarks.report import Figure, arguments, finish, median_of, note, quantile_of
from export.bundle import Bundle, TrunkManifest
from serve.client import Client, ClientError
from serve.headlog import HeadLog
from serve.record import LogView

REPLICAS = 4
UTILISATION = 0.5
PHASE_S = 10.0
POISONED = 0.1  # of the pushes
ROLLBACKS = 0.15
RETIRES = 0.05
RETIRED = "retired"  # a task that nobody asks: asked while it is retired it has no answer
PROGRESS = Path.home() / ".cache" / "headstock-benchmarks" / "swap_soak.jsonl"


@dataclass
class Segment:
    """What one segment showed; kept in the progress file."""

    seed: int
    requests: int = 0
    swaps: int = 0
    refused: int = 0
    problems: dict[str, int] = field(default_factory=dict)
    steady_p99_ms: float = 0.0
    swapping_p99_ms: float = 0.0
    swapped_task_ms: list[float] = field(default_factory=list)
    push_ms: list[float] = field(default_factory=list)
    hold_ms: list[float] = field(default_factory=list)


def main() -> None:
    """Segments until there are enough requests and swaps."""
    chosen, num_requests = _arguments()
    num_swaps = num_requests // 200
    done = _finished(num_requests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make_trunk(folder / "trunk")
        with (
            serving(folder / "store", trunk=folder / "trunk", replicas=REPLICAS) as service,
            Client(service["url"]) as client,
        ):
            soak = Soak(service["url"], client, HeadLog(str(folder / "store")), manifest)
            soak.prepare()
            while sum(s.requests for s in done) < num_requests or (
                sum(s.swaps for s in done) < num_swaps
            ):
                segment = soak.segment(seed=len(done))
                done.append(segment)
                _keep(segment, num_requests)
                note(
                    f"{sum(s.requests for s in done)} of {num_requests} requests, "
                    f"{sum(s.swaps for s in done)} of {num_swaps} swaps; "
                    f"p99 {segment.steady_p99_ms:.1f} ms steady, "
                    f"{segment.swapping_p99_ms:.1f} ms while swapping; {segment.problems or 'fine'}"
                )
    _progress_file(num_requests).unlink()
    finish("swap_soak", _figures(done, num_requests), chosen)


class Soak:
    """One service under load."""

    def __init__(self, url: str, client: Client, log: HeadLog, manifest: TrunkManifest) -> None:
        self._url, self._client, self._log = url, client, log
        self._load = JudgedLoad(url, manifest)
        self._rate = 0.0

    def prepare(self) -> None:
        """First versions, and how much the service can answer."""
        for task in TASKS:
            self._client.push(self._load.bundle(task))
        url, file = f"{self._url}/predict/{TASKS[0]}", self._load.files[0]
        asyncio.run(run_load(url, file, connections=8, seconds=2.0))
        full = asyncio.run(run_load(url, file, connections=8, seconds=3.0))
        self._rate = UTILISATION * full.rate
        note(f"capacity {full.rate:.0f}/s; asking {self._rate:.0f}/s")

    def segment(self, seed: int) -> Segment:
        """One steady phase and one with swaps, every answer judged."""
        chance = np.random.default_rng(seed)
        swaps: list[Swap] = []
        segment, is_over = Segment(seed), threading.Event()
        steady = self._ask(chance)
        pusher = threading.Thread(
            target=self._push, args=(chance.spawn(1)[0], swaps, segment, is_over)
        )
        pusher.start()
        swapping = self._ask(chance)
        is_over.set()
        pusher.join()
        segment.requests, segment.swaps = len(steady) + len(swapping), len(swaps)
        segment.steady_p99_ms, segment.swapping_p99_ms = _p99_ms(steady), _p99_ms(swapping)
        segment.swapped_task_ms = [
            1000 * (a.given_s - a.due_s)
            for swap in swaps
            for a in swapping
            if a.task == swap.task and swap.asked_s <= a.due_s <= swap.live_s
        ]
        segment.push_ms = [1000 * (swap.live_s - swap.asked_s) for swap in swaps]
        segment.hold_ms = [swap.hold_ms for swap in swaps]
        view = self._log.follow(LogView())
        segment.problems = self._load.judge([*steady, *swapping], swaps, view)
        return segment

    def _ask(self, chance: np.random.Generator) -> list[Answer]:
        return asyncio.run(self._load.ask(chance, rate=self._rate, seconds=PHASE_S))

    def _push(
        self,
        chance: np.random.Generator,
        swaps: list[Swap],
        segment: Segment,
        is_over: threading.Event,
    ) -> None:
        """Change one task after the other, until the phase is over."""
        while not is_over.is_set():
            task, kind = TASKS[chance.integers(len(TASKS))], chance.random()
            asked_s = time.monotonic()
            if kind < POISONED:
                segment.refused += self._is_refused(self._load.bundle(task, is_poisoned=True))
                continue
            if kind > 1 - RETIRES:
                self._client.push(self._load.bundle(RETIRED))
                asked_s, task = time.monotonic(), RETIRED
                made = self._client.retire(RETIRED)
            elif kind < POISONED + ROLLBACKS and len(self._client.versions(task)) > 1:
                made = self._client.rollback(task)
            else:
                made = self._client.push(self._load.bundle(task))
            hold_ms = made["swap"]["hold_ms"]
            swaps.append(Swap(task, made["version"], asked_s, time.monotonic(), hold_ms))

    def _is_refused(self, bundle: Bundle) -> bool:
        try:
            self._client.push(bundle)
        except ClientError as error:
            return error.status == HTTPStatus.UNPROCESSABLE_ENTITY
        return False


def _p99_ms(answers: list[Answer]) -> float:
    return 1000 * float(np.quantile([a.given_s - a.due_s for a in answers], 0.99))


def _figures(done: list[Segment], num_requests: int) -> list[Figure]:
    ratios = [segment.swapping_p99_ms / segment.steady_p99_ms for segment in done]
    push_ms = [ms for segment in done for ms in segment.push_ms]
    hold_ms = [ms for segment in done for ms in segment.hold_ms]
    own_ms = [ms for segment in done for ms in segment.swapped_task_ms]
    counts = {name: sum(segment.problems.get(name, 0) for segment in done) for name in PROMISES}
    requests, swaps = sum(s.requests for s in done), sum(s.swaps for s in done)
    return [
        _count("requests", requests, f">= {num_requests}"),
        _count("swaps", swaps, f">= {num_requests // 200}"),
        _count("poisoned bundles refused", sum(s.refused for s in done), ""),
        *(_count(PROMISES[name], number, "<= 0") for name, number in counts.items()),
        median_of("p99 while swapping / steady", ratios, unit="ratio", aim="<= 1.25"),
        median_of("p99 steady", [s.steady_p99_ms for s in done], unit="ms"),
        quantile_of("swapped task alone, p99", own_ms, 0.99, unit="ms"),
        quantile_of("push to live p50", push_ms, 0.5, unit="ms"),
        quantile_of("push to live p99", push_ms, 0.99, unit="ms"),
        _count("longest hold", max(hold_ms), "", unit="ms"),
    ]


def _count(name: str, value: float, aim: str, *, unit: str = "") -> Figure:
    return Figure(name, value, value, value, unit, aim)


def _arguments() -> tuple[argparse.Namespace, int]:
    """`--requests N` beside what every benchmark takes."""
    num_requests = 200_000
    if "--requests" in sys.argv:
        place = sys.argv.index("--requests")
        num_requests = int(sys.argv[place + 1])
        del sys.argv[place : place + 2]
    chosen = arguments(__doc__ or "")
    return chosen, 4000 if chosen.quick else num_requests


def _progress_file(num_requests: int) -> Path:
    return PROGRESS.with_stem(f"{PROGRESS.stem}-{num_requests}")


def _finished(num_requests: int) -> list[Segment]:
    """The segments of a run that was stopped."""
    file = _progress_file(num_requests)
    if not file.exists():
        return []
    done = [Segment(**json.loads(line)) for line in file.read_text().splitlines()]
    note(f"going on after {len(done)} segments in {file}")
    return done


def _keep(segment: Segment, num_requests: int) -> None:
    file = _progress_file(num_requests)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(segment)) + "\n")


if __name__ == "__main__":
    main()
