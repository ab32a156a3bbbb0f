"""Callers that ask a service all the time over HTTP, and the judge of what they saw."""

from __future__ import annotations

import io
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from benchmarks.background import Background
from export.bundle import Bundle
from serve.answers import Swapped
from serve.client import Client, ClientError
from serve.engine import Head, LiveHead
from serve.jobs import Answer
from serve.record import LogView
from tests.end_to_end.program import Program
from tests.serve.harness import until
from tests.serve.oracle import Heads, Pushed, Seen, judge, some_picture

NUM_PICTURES = 32
LIMIT_S = 60.0
RETRY_S = 0.5


def png(picture: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Callers:
    """Clients in threads, each asking one request after the other.

    Args:
        heads: The bundles that may answer.
        questions: The task lists to ask; each request takes one of them.
        tries: How often a request is sent whose connection breaks, or whose answer is to ask
            again. Where a process is killed, that happens to requests in flight on it, and
            predictions are safe to send again, as the product's own client does; elsewhere it is a
            failure.
    """

    service: Program
    heads: Heads
    questions: tuple[tuple[str, ...], ...]
    clients: int = 8
    tries: int = 1
    pause_s: float = 0.002
    seen: list[Seen] = field(default_factory=list)
    pushed: list[Pushed] = field(default_factory=list)
    num_again: int = 0

    def __enter__(self) -> Self:
        self._pictures = [some_picture(seed) for seed in range(NUM_PICTURES)]
        self._files = [png(picture) for picture in self._pictures]
        # An answer of the oracle's has a loaded head; nothing asks it over HTTP.
        self._head = Head.of_bundle(self.heads(0))
        self._chances = [np.random.default_rng(seed) for seed in range(self.clients)]
        self._clients = [
            httpx.Client(base_url=self.service.url, timeout=LIMIT_S) for _ in self._chances
        ]
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
        for client in self._clients:
            client.close()

    def wait_for(self, num_more: int) -> None:
        """Until so many more requests have been answered."""
        goal = len(self.seen) + num_more
        until(lambda: len(self.seen) >= goal, limit_s=LIMIT_S)

    def push(
        self, seed: int, task: str, *, through: psutil.Process | None = None, tries: int = 1
    ) -> Swapped:
        """Push the task's head of that seed, which has to succeed, and note when it was live.

        Args:
            through: The replica that takes the push; else any.
            tries: How often to ask, with the same key, while it is not available.
        """
        return self.push_bundle(self.heads(seed, task), through=through, tries=tries)

    def push_bundle(
        self, bundle: Bundle, *, through: psutil.Process | None = None, tries: int = 1
    ) -> Swapped:
        """Push a bundle as `push` does."""
        asked_s = time.monotonic()
        with self.service.client(through) as client:
            answer = push_patiently(client, bundle, tries=tries)
        live = Pushed(bundle.manifest.task, answer["version"], asked_s, time.monotonic())
        self.pushed.append(live)
        return answer

    def judge(self) -> list[str]:
        """Every promise that the answers break, by the log as it is now."""
        return judge_from_outside(self.seen, self.service.view(), self.heads.seeds, self.pushed)

    def _client(self, seed: int) -> None:
        chance = self._chances[seed]
        place = int(chance.integers(NUM_PICTURES))
        question = self.questions[chance.integers(len(self.questions))]
        self.seen.append(self._ask(self._clients[seed], place, question))
        time.sleep(self.pause_s)

    def _ask(self, client: httpx.Client, place: int, tasks: tuple[str, ...]) -> Seen:
        for attempt in range(self.tries):
            picture, sent_s = self._pictures[place], time.monotonic()
            try:
                response = _post(client, tasks, self._files[place])
            except httpx.TransportError as broken:
                if attempt < self.tries - 1:
                    self.num_again += 1
                    continue
                return Seen(tasks, picture, sent_s, time.monotonic(), (), repr(broken))
            given_s = time.monotonic()
            if response.is_success:
                return Seen(tasks, picture, sent_s, given_s, self._answers(response, tasks))
            if response.status_code == 503 and attempt < self.tries - 1:
                self.num_again += 1
                time.sleep(float(response.headers["retry-after"]))
                continue
            error = f"{response.status_code} {response.text[:200]}"
            return Seen(tasks, picture, sent_s, given_s, (), error)
        raise AssertionError

    def _answers(self, response: httpx.Response, tasks: tuple[str, ...]) -> tuple[Answer, ...]:
        body = response.json()
        results = body["results"] if len(tasks) > 1 else [body]
        assert tuple(result["task"] for result in results) == tasks
        if len(tasks) == 1:
            assert response.headers["x-headstock-version"] == str(body["version"])
            assert response.headers["x-headstock-bundle"] == body["bundle"]
        return tuple(
            Answer(
                LiveHead(result["task"], result["version"], result["bundle"], self._head),
                np.array(list(result["scores"].values()), np.float32),
            )
            for result in results
        )


def push_patiently(client: Client, bundle: Bundle, *, tries: int) -> Swapped:
    """Push, and again with the same key while the service says that it cannot for the moment."""
    key = uuid.uuid4().hex
    for _ in range(tries - 1):
        try:
            return client.push(bundle, key=key)
        except ClientError as error:
            if error.status != 503:
                raise
            time.sleep(RETRY_S)
    return client.push(bundle, key=key)


def judge_from_outside(
    seen: list[Seen], log: LogView, seeds: dict[str, int], pushed: list[Pushed]
) -> list[str]:
    """Every promise that the answers break, judged by when requests were sent and answers came."""
    # The oracle's own rule for the order needs the moment at which the replica gave its answer.
    others = [p for p in judge(seen, log, seeds, pushed) if not p.startswith("order:")]
    return [*others, *_out_of_order([s for s in seen if not s.error])]


def _out_of_order(seen: list[Seen]) -> list[str]:
    """Whoever asks after anyone has had an answer by a version gets none by an older one."""
    problems: list[str] = []
    for task in {task for s in seen for task in s.tasks}:
        mine = [s for s in seen if task in s.tasks]
        had = sorted((s.given_s, s.version(task)) for s in mine)
        newest, place = 0, 0
        for s in sorted(mine, key=lambda s: s.sent_s):
            while had[place][0] < s.sent_s:
                newest, place = max(newest, had[place][1]), place + 1
            if s.version(task) < newest:
                problems.append(f"order: {task} v{s.version(task)} was sent for after v{newest}")
    return problems


def _post(client: httpx.Client, tasks: tuple[str, ...], picture: bytes) -> httpx.Response:
    if len(tasks) == 1:
        return client.post(f"/predict/{tasks[0]}", content=picture)
    return client.post("/predict", params={"tasks": ",".join(tasks)}, content=picture)
