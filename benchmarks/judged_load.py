"""An open load of requests for several tasks, every answer of which is judged.

Numpy knows what each bundle says of each picture, and the head log which version was which bundle.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.channel_means import expected_scores, make_bundle, png_of, some_picture
from benchmarks.load import request_of
from benchmarks.open_load import Connection, poisson_times
from benchmarks.report import note
from export.bundle import Bundle, TrunkManifest
from serve.record import LogView

TASKS = tuple(f"task{number}" for number in range(8))
NUM_PICTURES = 64
TOLERANCE = 1e-5
PROMISES = {
    "failed": "failed requests",
    "torn": "answers not as in the log",
    "refused": "answers from a refused bundle",
    "back": "answers older than one before",
    "unread": "answers older than a finished push",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and what came back; times from `time.monotonic`, in seconds.

    Args:
        caller: One connection; it sends a request when the one before is answered.
        version: 0 if there was no answer.
        is_true: Whether the scores are those of the bundle.
        error: Why there was no answer.
    """

    task: str
    caller: int
    due_s: float
    sent_s: float
    given_s: float
    version: int = 0
    bundle: str = ""
    is_true: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Swap:
    """One change that was made: of which task, its version, from when till when."""

    task: str
    version: int
    asked_s: float
    live_s: float
    hold_ms: float


class JudgedLoad:
    """The callers of one service, and what they were ever told.

    Args:
        tries: How often a request is sent whose connection breaks, as the product's client does.
    """

    def __init__(self, url: str, manifest: TrunkManifest, *, tries: int = 1) -> None:
        self._url, self._manifest, self._tries = url, manifest, tries
        self._pictures = [some_picture(1000 + number) for number in range(NUM_PICTURES)]
        self.files = [png_of(picture) for picture in self._pictures]
        self._requests = {
            task: [request_of(f"{url}/predict/{task}", file) for file in self.files]
            for task in TASKS
        }
        self._truths: dict[str, NDArray[np.float64]] = {}  # bundle -> scores [pictures, labels]
        self._poisoned: set[str] = set()
        self._newest: dict[tuple[str, int], int] = {}  # version, by task and caller
        self._idle: list[tuple[int, Connection]] = []
        self._num_callers = 0

    def bundle(self, task: str, *, is_poisoned: bool = False) -> Bundle:
        """A bundle that was never there before."""
        seed = len(self._truths)
        bundle = make_bundle(self._manifest, task, seed, is_poisoned=is_poisoned)
        self._truths[bundle.digest] = np.stack([expected_scores(p, seed) for p in self._pictures])
        if is_poisoned:
            self._poisoned.add(bundle.digest)
        return bundle

    async def ask(
        self, chance: np.random.Generator, *, rate: float, seconds: float
    ) -> list[Answer]:
        """Requests at Poisson times, each by a caller that is free."""
        answers: list[Answer] = []
        times_s = poisson_times(rate, seconds, int(chance.integers(2**32)))
        async with asyncio.TaskGroup() as sending:
            for due_s in time.monotonic() + times_s:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                task = TASKS[chance.integers(len(TASKS))]
                picture = int(chance.integers(NUM_PICTURES))
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
        status, body = await self._post(connection, self._requests[task][picture])
        moments = (task, caller, due_s, sent_s, time.monotonic())
        self._idle.append((caller, connection))
        if status != HTTPStatus.OK:
            said = body[:200].decode(errors="replace")
            answers.append(Answer(*moments, error=f"{status} {said}"))
            return
        said = orjson.loads(body)
        truth, scores = self._truths.get(said["bundle"]), list(said["scores"].values())
        is_true = truth is not None and bool(np.abs(truth[picture] - scores).max() < TOLERANCE)
        answers.append(Answer(*moments, said["version"], said["bundle"], is_true))

    async def _post(self, connection: Connection, request: bytes) -> tuple[int, bytes]:
        for _ in range(self._tries):
            try:
                return await connection.post(request)
            except (OSError, asyncio.IncompleteReadError):
                connection.close()
        return 0, b"its connection broke"

    def judge(
        self, answers: Sequence[Answer], swaps: Sequence[Swap], view: LogView
    ) -> dict[str, int]:
        """How often each of `PROMISES` was broken, by the log as it was read afterwards."""
        bundles = {
            (task, v.change.version): v.change.bundle for task, h in view.tasks.items() for v in h
        }
        answered = [a for a in answers if a.version]
        failed = [a for a in answers if not a.version]
        for a in failed:
            note(f"failed: {a.task}, {a.given_s - a.sent_s:.2f} s after it was sent: {a.error}")
        problems: dict[str, int] = defaultdict(int, failed=len(failed))
        for a in answered:
            problems["torn"] += not a.is_true or bundles.get((a.task, a.version)) != a.bundle
            problems["refused"] += a.bundle in self._poisoned
        for task in TASKS:
            of_task = [a for a in answered if a.task == task]
            problems["back"] += self._num_back(of_task)
            problems["unread"] += sum(
                a.version < swap.version
                for swap in swaps
                for a in of_task
                if swap.task == task and a.sent_s > swap.live_s
            )
        return {name: number for name, number in problems.items() if number}

    def _num_back(self, of_task: Sequence[Answer]) -> int:
        """Answers older than one that its caller, or anybody before it was sent, has had."""
        back = 0
        for a in sorted(of_task, key=lambda a: a.given_s):
            mine = (a.task, a.caller)
            back += a.version < self._newest.get(mine, 0)
            self._newest[mine] = max(a.version, self._newest.get(mine, 0))
        had = sorted((a.given_s, a.version) for a in of_task)
        newest = place = 0
        for a in sorted(of_task, key=lambda a: a.sent_s):
            while had[place][0] < a.sent_s:
                newest, place = max(newest, had[place][1]), place + 1
            back += a.version < newest
        return back
