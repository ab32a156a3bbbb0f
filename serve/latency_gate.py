"""The gate that compares how long a bundle's answers take with those of what is live."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.affine import AffineMap
from serve.contender import Contender
from serve.engine import Engine
from serve.graph_gate import GateError

ONE, SEVERAL = 1, 8  # pictures in a batch
SLOW_S = 0.005  # of one picture; beyond it several at a time would take the gate too long
LEAST_ROUNDS, MOST_ROUNDS = 3, 31
ROUNDS_S = 0.05  # of a batch size, in each attempt
ATTEMPTS = 3
# A quarter of what decoding and HTTP take of a request whatever its head is (2 ms on an AMD EPYC,
# benchmarks/README.md). On a tiny trunk (0.06 ms) an adapter takes 2.2 x as long and adds 0.1 ms.
NEGLIGIBLE_S = 0.0005

Answerer = Callable[[NDArray[np.uint8]], object]


@dataclass(frozen=True)
class Slowdown:
    """One batch size: the time of the first's answers over the second's, and what it adds.

    Args:
        second_s: What the second takes for a picture.
        added_s: What the first takes more for a picture.
    """

    batch: int
    ratio: float
    second_s: float
    added_s: float


def check_latency(
    bundle: Contender, live: Contender | None, engine: Engine, *, task: str, max_slowdown: float
) -> str:
    """Answers do not take much longer than those of what is live.

    Where nothing is, the time is told in times of a plain head and nothing is refused: a task has
    no settings before its first push that could allow more, and what a graph may cost is bounded.

    Raises:
        GateError: they take more than `max_slowdown` times as long, in every attempt.
    """
    mine = _answers(bundle, engine)
    if live is None:
        found = _text(_measure_sizes(mine, _plain(engine, len(bundle.head.labels)), engine))
        return f"answers take {found} the time of a plain head; nothing is live to be slower than"
    slowdowns: list[Slowdown] = []
    for _ in range(ATTEMPTS):
        slowdowns = _measure_sizes(mine, _answers(live, engine), engine)
        if not any(s.ratio > max_slowdown and s.added_s > NEGLIGIBLE_S for s in slowdowns):
            found = _text(slowdowns)
            return f"answers take {found} the time of what is live; at most {max_slowdown:g} x"
    worst = max(slowdown.ratio for slowdown in slowdowns)
    enough = math.ceil(10 * worst + 1) / 10
    raise GateError(
        f"Answers take {_text(slowdowns)} the time of what is live, measured {ATTEMPTS} times; at "
        f"most {max_slowdown:g} x is accepted. Push a smaller one, or allow it: "
        f"headstock task set {task} max_slowdown={enough:g}."
    )


def _measure_sizes(first: Answerer, second: Answerer, engine: Engine) -> list[Slowdown]:
    alone = measure(first, second, engine, batch=ONE)
    if alone.second_s > SLOW_S:
        return [alone]
    return [alone, measure(first, second, engine, batch=SEVERAL)]


def _text(slowdowns: list[Slowdown]) -> str:
    return ", ".join(f"{s.ratio:.2f} x in batches of {s.batch}" for s in slowdowns)


def measure(first: Answerer, second: Answerer, engine: Engine, *, batch: int) -> Slowdown:
    """Run both in turn, so that what else the machine does meets both."""
    pictures = _some_pictures(engine, batch)
    # Sessions run in the thread that calls them, so its CPU time is theirs, whoever else waits for
    # a core. Of a GPU it tells nothing.
    clock = time.thread_time if engine.device == "cpu" else time.perf_counter
    for answer in (first, second):
        answer(pictures)  # the first run of a size allocates
    rounds: list[tuple[float, float]] = []
    spent_s = 0.0
    while len(rounds) < LEAST_ROUNDS or (spent_s < ROUNDS_S and len(rounds) < MOST_ROUNDS):
        times: list[float] = []
        for answer in (first, second):
            began_s = clock()
            answer(pictures)
            times.append(clock() - began_s)
        rounds.append((times[0], times[1]))
        spent_s += sum(times)
    ratio = statistics.median(mine / max(theirs, 1e-9) for mine, theirs in rounds)
    second_s = statistics.median(theirs for _, theirs in rounds)
    added_s = statistics.median(mine - theirs for mine, theirs in rounds)
    return Slowdown(batch, ratio, second_s / batch, added_s / batch)


def _answers(contender: Contender, engine: Engine) -> Answerer:
    """What answers pictures as that engine takes them, or as many of its own trunk's size."""
    if contender.engine is engine:
        return lambda pictures: contender.logits(contender.start(pictures))
    mine = {batch: _some_pictures(contender.engine, batch) for batch in (ONE, SEVERAL)}
    return lambda pictures: contender.logits(contender.start(mine[len(pictures)]))


def _some_pictures(engine: Engine, batch: int) -> NDArray[np.uint8]:
    size_px = engine.manifest.preprocessing.size_px
    shape = (batch, size_px, size_px, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _plain(engine: Engine, num_labels: int) -> Answerer:
    """The trunk and a packed affine head: the least that an answer can take."""
    weight = np.zeros((num_labels, engine.manifest.num_features), np.float32)
    head = AffineMap(weight, np.zeros(num_labels, np.float32))
    return lambda pictures: head(engine.features(pictures))
