"""An engine that runs one batch for each step that a test allows, and heads that cost nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.engine import Engine, LiveHead, Row, Snapshot
from serve.heads import Head
from serve.jobs import Job
from serve.onnx_session import open_session
from tests.serve.graphs import LABELS, constant_head
from tests.serve.harness import until

HEAD = Head(open_session(constant_head([0, 0, 0])), LABELS, "softmax", 1.0)
TAIL = Head(open_session(constant_head([0, 0, 0])), LABELS, "softmax", 1.0, takes="prefix")
BUNDLE = "sha256:" + 64 * "0"

SeenRow = tuple[str, int, int]


class SteppedEngine:
    """In place of an engine's `run` and `run_features`.

    Args:
        batches: (task, version, number of the picture) of each row, for each batch that started.
    """

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[SeenRow]] = []
        self._steps = threading.Semaphore(0)
        patch.setattr(engine, "run", self._run)
        patch.setattr(engine, "run_features", self._run)

    def _run(self, inputs: NDArray[Any], rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        self.batches.append(seen_rows(inputs, rows))
        assert self._steps.acquire(timeout=5)
        return scores_of(inputs, rows)

    def step(self, num: int = 1) -> None:
        """Let so many batches end, each once it has started."""
        for _ in range(num):
            self._steps.release()

    def wait_for(self, num: int) -> None:
        """Until so many batches have started."""
        until(lambda: len(self.batches) >= num)

    def tasks(self) -> list[list[str]]:
        """The tasks of the rows of each batch."""
        return [[task for task, _, _ in batch] for batch in self.batches]

    def pictures(self) -> list[list[int]]:
        """The numbers of the pictures of each batch."""
        return [list(dict.fromkeys(number for _, _, number in batch)) for batch in self.batches]


def seen_rows(inputs: NDArray[Any], rows: Sequence[Row]) -> list[SeenRow]:
    """What a batch asks."""
    return [(r.head.task, r.head.version, int(inputs[r.image_of].flat[0])) for r in rows]


def scores_of(inputs: NDArray[Any], rows: Sequence[Row]) -> list[NDArray[np.float32]]:
    """Scores that say which version was asked of which picture: float32 [2] each."""
    return [np.array(seen[1:], np.float32) for seen in seen_rows(inputs, rows)]


def live_head(
    task: str, version: int = 1, *, row_cost: float = 0.0, needs_picture: bool = False
) -> LiveHead:
    """A head that is only looked at."""
    head = TAIL if needs_picture else HEAD
    return LiveHead(task, version, BUNDLE, head, row_cost=row_cost)


def snapshot_of(*heads: LiveHead) -> Snapshot:
    """These heads are live."""
    return Snapshot(1, {head.task: head for head in heads})


def ask(tasks: str | None, *numbers: int, deadline_s: float | None = None) -> Job:
    """A request for tasks, named by one letter each, with pictures that are numbers."""
    pictures = [np.full((2, 2, 3), number, np.uint8) for number in numbers]
    job = Job(pictures, None if tasks is None else tuple(tasks))
    if deadline_s is not None:
        job.deadline_s = deadline_s
    return job
