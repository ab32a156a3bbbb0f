"""Do swaps all day long fail, tear or turn back anything, and what do they cost the others?

Four replicas answer an open load of requests for eight tasks; in every second phase a pusher
pushes, rolls back, and pushes poisoned bundles that have to be refused. Numpy knows what each
bundle says of each picture, and the log which version was which bundle, so every answer is judged.

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
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path

import numpy as np
import orjson

from benchmarks.channel_means import (
    expected_scores,
    make_bundle,
    make_trunk,
    png_of,
    some_picture,
)
from benchmarks.fixtures import serving
from benchmarks.load import request_of, run_load
from benchmarks.open_load import Connection, poisson_times
from benchmarks.report import Figure, arguments, finish, median_of, note, quantile_of
from export.bundle import Bundle, TrunkManifest
from serve.client import Client, ClientError
from serve.headlog import HeadLog
from serve.record import LogView

TASKS = tuple(f"task{number}" for number in range(8))
NUM_PICTURES = 64
REPLICAS = 4
UTILISATION = 0.5
PHASE_S = 10.0
POISONED = 0.1  # of the pushes
ROLLBACKS = 0.15
TOLERANCE = 1e-5
PROGRESS = Path.home() / ".cache" / "headstock-benchmarks" / "swap_soak.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and what came back; times from `time.monotonic`, in seconds."""

    task: str
    caller: int
    due_s: float
    sent_s: float
    given_s: float
    status: int
    version: int
    bundle: str
    is_true: bool  # whether the scores are those of the bundle


@dataclass(frozen=True, slots=True)
class Swap:
    """One change that was made: of which task, its version, from when till when."""

    task: str
    version: int
    asked_s: float
    live_s: float
    hold_ms: float


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
        self._url, self._client, self._log, self._manifest = url, client, log, manifest
        self._pictures = [some_picture(1000 + n) for n in range(NUM_PICTURES)]
        files = [png_of(picture) for picture in self._pictures]
        self._requests = {
            task: [request_of(f"{url}/predict/{task}", file) for file in files] for task in TASKS
        }
        self._file = files[0]
        self._truths: dict[str, np.ndarray] = {}  # bundle -> scores [pictures, labels]
        self._poisoned: set[str] = set()
        self._idle: list[tuple[int, Connection]] = []
        self._num_callers = self._num_bundles = 0
        self._newest: dict[tuple[str, int], int] = {}  # by task and caller
        self._rate = 0.0

    def prepare(self) -> None:
        """First versions, and how much the service can answer."""
        for task in TASKS:
            self._client.push(self._bundle(task))
        url = f"{self._url}/predict/{TASKS[0]}"
        asyncio.run(run_load(url, self._file, connections=8, seconds=2.0))
        full = asyncio.run(run_load(url, self._file, connections=8, seconds=3.0))
        self._rate = UTILISATION * full.rate
        note(f"capacity {full.rate:.0f}/s; asking {self._rate:.0f}/s")

    def segment(self, seed: int) -> Segment:
        """One steady phase and one with swaps, every answer judged."""
        chance = np.random.default_rng(seed)
        steady = asyncio.run(self._ask(chance))
        swaps: list[Swap] = []
        segment, is_over = Segment(seed), threading.Event()
        pusher = threading.Thread(
            target=self._push, args=(chance.spawn(1)[0], swaps, segment, is_over)
        )
        pusher.start()
        swapping = asyncio.run(self._ask(chance))
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
        segment.problems = self._judge([*steady, *swapping], swaps)
        return segment

    async def _ask(self, chance: np.random.Generator) -> list[Answer]:
        """Requests at Poisson times, each by a caller that is free."""
        answers: list[Answer] = []
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as sending:
            for due_s in began_s + poisson_times(self._rate, PHASE_S, int(chance.integers(2**32))):
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                task, picture = (
                    TASKS[chance.integers(len(TASKS))],
                    int(chance.integers(NUM_PICTURES)),
                )
                sending.create_task(self._send(task, picture, due_s, answers))
        for _, connection in self._idle:
            connection.close()  # it belongs to this loop
        return answers

    async def _send(self, task: str, picture: int, due_s: float, answers: list[Answer]) -> None:
        if self._idle:
            caller, connection = self._idle.pop()
        else:
            caller, connection = self._num_callers, Connection(self._url)
            self._num_callers += 1
        sent_s = time.monotonic()
        try:
            status, body = await connection.post(self._requests[task][picture])
        except (OSError, asyncio.IncompleteReadError):
            connection.close()
            status, body = 0, b"{}"
        given_s = time.monotonic()
        self._idle.append((caller, connection))
        version, bundle, is_true = 0, "", False
        if status == HTTPStatus.OK:
            said = orjson.loads(body)
            version, bundle = said["version"], said["bundle"]
            truth = self._truths.get(bundle)
            scores = list(said["scores"].values())
            is_true = truth is not None and bool(np.abs(truth[picture] - scores).max() < TOLERANCE)
        answers.append(
            Answer(task, caller, due_s, sent_s, given_s, status, version, bundle, is_true)
        )

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
                segment.refused += self._is_refused(self._bundle(task, is_poisoned=True))
                continue
            if kind < POISONED + ROLLBACKS and len(self._client.versions(task)) > 1:
                made = self._client.rollback(task)
            else:
                made = self._client.push(self._bundle(task))
            hold_ms = made["swap"]["hold_ms"]
            swaps.append(Swap(task, made["version"], asked_s, time.monotonic(), hold_ms))

    def _is_refused(self, bundle: Bundle) -> bool:
        try:
            self._client.push(bundle)
        except ClientError as error:
            return error.status == HTTPStatus.UNPROCESSABLE_ENTITY
        return False

    def _bundle(self, task: str, *, is_poisoned: bool = False) -> Bundle:
        """A bundle that was never there before, and its truth."""
        self._num_bundles += 1
        seed = self._num_bundles
        bundle = make_bundle(self._manifest, task, seed, is_poisoned=is_poisoned)
        self._truths[bundle.digest] = np.stack([expected_scores(p, seed) for p in self._pictures])
        if is_poisoned:
            self._poisoned.add(bundle.digest)
        return bundle

    def _judge(self, answers: list[Answer], swaps: list[Swap]) -> dict[str, int]:
        """How often each promise was broken."""
        view = self._log.follow(LogView())
        bundles = {
            (task, v.change.version): v.change.bundle for task, h in view.tasks.items() for v in h
        }
        problems: dict[str, int] = defaultdict(int)
        answered = [a for a in answers if a.status == HTTPStatus.OK]
        problems["failed"] = len(answers) - len(answered)
        for a in answered:
            problems["torn"] += not a.is_true or bundles.get((a.task, a.version)) != a.bundle
            problems["refused"] += a.bundle in self._poisoned
        problems["back"] = self._num_back(answered)
        problems["unread"] = sum(
            a.version < swap.version
            for swap in swaps
            for a in answered
            if a.task == swap.task and a.sent_s > swap.live_s
        )
        return {name: number for name, number in problems.items() if number}

    def _num_back(self, answered: list[Answer]) -> int:
        """Answers older than one that its caller, or anybody before it was sent, has had."""
        back = 0
        for a in sorted(answered, key=lambda a: a.given_s):
            mine = (a.task, a.caller)
            back += a.version < self._newest.get(mine, 0)
            self._newest[mine] = max(a.version, self._newest.get(mine, 0))
        for task in TASKS:
            of_task = [a for a in answered if a.task == task]
            had = sorted((a.given_s, a.version) for a in of_task)
            newest, place = 0, 0
            for a in sorted(of_task, key=lambda a: a.sent_s):
                while had[place][0] < a.sent_s:
                    newest, place = max(newest, had[place][1]), place + 1
                back += a.version < newest
        return back


def _p99_ms(answers: list[Answer]) -> float:
    return 1000 * float(np.quantile([a.given_s - a.due_s for a in answers], 0.99))


def _figures(done: list[Segment], num_requests: int) -> list[Figure]:
    ratios = [segment.swapping_p99_ms / segment.steady_p99_ms for segment in done]
    push_ms = [ms for segment in done for ms in segment.push_ms]
    hold_ms = [ms for segment in done for ms in segment.hold_ms]
    own_ms = [ms for segment in done for ms in segment.swapped_task_ms]
    counts = {
        name: sum(segment.problems.get(name, 0) for segment in done)
        for name in ("failed", "torn", "refused", "back", "unread")
    }
    what = {
        "failed": "failed requests",
        "torn": "answers not as in the log",
        "refused": "answers from a refused bundle",
        "back": "answers older than one before",
        "unread": "answers older than a finished push",
    }
    requests, swaps = sum(s.requests for s in done), sum(s.swaps for s in done)
    return [
        _count("requests", requests, f">= {num_requests}"),
        _count("swaps", swaps, f">= {num_requests // 200}"),
        _count("poisoned bundles refused", sum(s.refused for s in done), ""),
        *(_count(what[name], number, "<= 0") for name, number in counts.items()),
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
