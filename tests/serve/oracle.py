"""Clients that ask a fleet all the time, and the judge of what they were told."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.background import Background
from export.bundle import Bundle
from serve.jobs import Answer, Job
from serve.record import LogView
from tests.serve.harness import LocalFleet, until

SIZE_PX = 8
# float32 sums in another order.
TOLERANCE = 1e-5


def expected_scores(
    picture: NDArray[np.uint8], seed: int, num_labels: int = 3
) -> NDArray[np.float64]:
    """What `make_bundle(seed=seed)` says of a picture, by numpy alone, float64 [num_labels]."""
    weight = np.random.default_rng(seed).normal(size=(3, num_labels))
    logits = picture.reshape(-1, 3).astype(np.float64).mean(axis=0) / 255 @ weight
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def some_picture(seed: int) -> NDArray[np.uint8]:
    """Noise, uint8 [size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


@dataclass
class Heads:
    """Bundles by task and seed, and which seed is behind each digest."""

    make: Callable[..., Bundle]
    seeds: dict[str, int] = field(default_factory=dict)

    def __call__(self, seed: int, task: str = "colours") -> Bundle:
        """The task's head of that seed."""
        bundle = self.make(task, seed=seed)
        self.seeds[bundle.digest] = seed
        return bundle


@dataclass(frozen=True)
class Seen:
    """One request and its answers.

    Args:
        given_s: When the replica gave the answer, taken in the thread that gave it.
        error: Why there is no answer, or nothing.
    """

    tasks: tuple[str, ...]
    picture: NDArray[np.uint8]
    sent_s: float
    given_s: float
    answers: tuple[Answer, ...]
    error: str = ""

    def version(self, task: str) -> int:
        """The version that answered for one of the tasks."""
        return next(a.live.version for a in self.answers if a.live.task == task)


@dataclass
class Crowd:
    """Clients in threads, each asking random replicas one request after the other.

    Args:
        questions: The task lists to ask; each request takes one of them.
        is_sticky: Whether each client stays with one replica; else it asks any.
        limit_s: Who waits longer has no answer.
        encode: Makes files of the pictures, which replicas then decode as the trunk takes them.
    """

    fleet: LocalFleet
    questions: tuple[tuple[str, ...], ...]
    clients: int = 4
    is_sticky: bool = False
    pause_s: float = 0.001
    limit_s: float = 5.0
    encode: Callable[[NDArray[np.uint8]], bytes] | None = None
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._chances = [np.random.default_rng(seed) for seed in range(self.clients)]
        self._threads = Background(self._client, threads=self.clients)
        self._threads.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.__exit__(kind, error, trace)

    def wait_for(self, num_more: int) -> None:
        """Until so many more requests have been answered."""
        goal, deadline_s = len(self.seen) + num_more, time.monotonic() + 4 * self.limit_s
        while len(self.seen) < goal:
            assert time.monotonic() < deadline_s, "the clients get no answers"
            time.sleep(0.002)

    def _client(self, seed: int) -> None:
        chance = self._chances[seed]
        picture = chance.integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
        question = self.questions[chance.integers(len(self.questions))]

        def pick() -> int:
            return seed if self.is_sticky else int(chance.integers(2**31))

        self.seen.append(self._ask(pick, picture, question))
        time.sleep(self.pause_s)

    def _ask(
        self, pick: Callable[[], int], picture: NDArray[np.uint8], tasks: tuple[str, ...]
    ) -> Seen:
        """Ask one replica; one that dies meanwhile is replaced by another, as the proxy does it."""
        sent_s = time.monotonic()
        while True:
            names = self.fleet.routed()
            name = names[pick() % len(names)]
            given_s: list[float] = []
            encoded = [self.encode(picture)] if self.encode else []
            job = Job([] if encoded else [picture], tasks, encoded=encoded)

            def note(_: Future[list[list[Answer]]], given: list[float] = given_s) -> None:
                given.append(time.monotonic())

            job.done.add_done_callback(note)
            try:
                replica = self.fleet.replicas[name]
                if encoded:
                    replica.decoders.submit(replica._decode_and_queue, job)
                else:
                    replica.batcher.submit(job)
                answers = job.done.result(self.limit_s)
            # Whatever it is, the client was not answered.
            except Exception as error:  # noqa: BLE001
                if name in self.fleet.killed:
                    continue
                return Seen(tasks, picture, sent_s, time.monotonic(), (), repr(error))
            until(lambda given=given_s: bool(given))  # noted just after the answer is set
            if name not in self.fleet.killed:
                return Seen(tasks, picture, sent_s, given_s[0], tuple(answers[0]))


@dataclass(frozen=True)
class Pushed:
    """A push that was reported live."""

    task: str
    version: int
    asked_s: float
    live_s: float


def judge(
    seen: list[Seen], log: LogView, seeds: dict[str, int], pushed: list[Pushed] | None = None
) -> list[str]:
    """Every promise that the answers break.

    Args:
        log: What the log says in the end.
        seeds: Bundle digest -> the seed it was made with.
        pushed: What pushers were told.
    """
    answered = [s for s in seen if not s.error]
    return [
        *(f"failed: {s.error}" for s in seen if s.error),
        *_out_of_order(answered),
        *_unread_pushes(answered, pushed or []),
        *_mixed(answered, log),
        *_wrong(answered, log, seeds),
    ]


def _out_of_order(seen: list[Seen]) -> list[str]:
    """After the first answer by a version, nobody gives one by an older version."""
    problems: list[str] = []
    for task in {task for s in seen for task in s.tasks}:
        newest = 0
        for s in sorted((s for s in seen if task in s.tasks), key=lambda s: s.given_s):
            version = s.version(task)
            if version < newest:
                problems.append(f"order: {task} v{version} was given after v{newest}")
            newest = max(newest, version)
    return problems


def _unread_pushes(seen: list[Seen], pushed: list[Pushed]) -> list[str]:
    """Once a push has returned, later requests are answered by it; never before it was asked."""
    return [
        f"push: {p.task} v{p.version} and an answer by v{s.version(p.task)}"
        for p in pushed
        for s in seen
        if p.task in s.tasks
        and (
            (s.sent_s >= p.live_s and s.version(p.task) < p.version)
            or (s.given_s < p.asked_s and s.version(p.task) >= p.version)
        )
    ]


def _mixed(seen: list[Seen], log: LogView) -> list[str]:
    """The versions of one request were live together."""
    problems: list[str] = []
    for s in seen:
        spans = [_span(log, a) for a in s.answers]
        if max(first for first, _ in spans) >= min(last for _, last in spans):
            versions = [(a.live.task, a.live.version) for a in s.answers]
            problems.append(f"mixed: {versions} were never live together")
    return problems


def behind(seen: list[Seen], log: LogView) -> list[str]:
    """Answers by a version that was over when another answer, of any task, was given before.

    Stricter than the order within a task: what one record makes live of several tasks goes live of
    all of them in one moment.
    """
    problems: list[str] = []
    newest = 0.0
    for s in sorted((s for s in seen if not s.error), key=lambda s: s.given_s):
        spans = [_span(log, answer) for answer in s.answers]
        problems += [
            f"behind: {answer.live.task} v{answer.live.version} was given after record {newest}"
            for answer, (_, last) in zip(s.answers, spans, strict=True)
            if last <= newest
        ]
        newest = max(newest, *(first for first, _ in spans))
    return problems


def _span(log: LogView, answer: Answer) -> tuple[float, float]:
    """Numbers of the records between which a version was live."""
    history = log.tasks.get(answer.live.task, ())
    numbers = [v.number for v in history if v.change.version >= answer.live.version]
    first = numbers[0] if numbers else float("inf")
    return first, (numbers[1] if len(numbers) > 1 else float("inf"))


def _wrong(seen: list[Seen], log: LogView, seeds: dict[str, int]) -> list[str]:
    """An answer names a version of the log, with its bundle, and has that bundle's scores."""
    bundles = {
        (task, v.change.version): {
            v.change.bundle,
            *([v.change.candidate.bundle] if v.change.candidate else []),
        }
        for task, h in log.tasks.items()
        for v in h
    }
    problems: list[str] = []
    for s in seen:
        for a in s.answers:
            if a.live.bundle not in bundles.get((a.live.task, a.live.version), ()):
                problems.append(f"log: {a.live.task} v{a.live.version} is not as in the log")
                continue
            truth = expected_scores(s.picture, seeds[a.live.bundle], len(a.scores))
            if np.abs(a.scores - truth).max() > TOLERANCE:
                problems.append(f"scores: not those of {a.live.task} v{a.live.version}")
    return problems
