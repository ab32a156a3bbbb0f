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
# Against a plain head, for a task that has no settings yet: nothing that is trained here takes more
# than 1.34 x where the rest counts (MobileNetV2 and V3, ResNet-18, SqueezeNet), nor an RBF machine
# of 2,000 vectors more than 1.6 x (one core of an AMD EPYC, 2026-11-21).
FIRST = 2.0

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
    """Answers do not take much longer than those of what is live, or of a plain head if none is.

    Args:
        max_slowdown: The task's setting; without a live one, `FIRST` times as much is accepted.

    Raises:
        GateError: they take longer than that, in every attempt.
    """
    other = _answers(live) if live else _plain(engine, len(bundle.head.labels))
    what = "what is live" if live else "a plain head, since nothing is live"
    most = max_slowdown if live else FIRST * max_slowdown
    slowdowns: list[Slowdown] = []
    for _ in range(ATTEMPTS):
        slowdowns = _measure_sizes(_answers(bundle), other, engine)
        if not any(s.ratio > most and s.added_s > NEGLIGIBLE_S for s in slowdowns):
            return f"answers take {_text(slowdowns)} the time of {what}; at most {most:g} x"
    advice = "Push a smaller one"
    if live:
        worst = max(slowdown.ratio for slowdown in slowdowns)
        enough = math.ceil(10 * worst + 1) / 10
        advice += f", or allow it: headstock task set {task} max_slowdown={enough:g}"
    raise GateError(
        f"Answers take {_text(slowdowns)} the time of {what}, measured {ATTEMPTS} times; at most "
        f"{most:g} x is accepted. {advice}."
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
    size_px = engine.manifest.preprocessing.size_px
    pictures = np.random.default_rng(0).integers(
        0, 256, (batch, size_px, size_px, 3), dtype=np.uint8
    )
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


def _answers(contender: Contender) -> Answerer:
    return lambda pictures: contender.logits(contender.start(pictures))


def _plain(engine: Engine, num_labels: int) -> Answerer:
    """The trunk and a packed affine head: the least that an answer can take."""
    weight = np.zeros((num_labels, engine.manifest.num_features), np.float32)
    head = AffineMap(weight, np.zeros(num_labels, np.float32))
    return lambda pictures: head(engine.features(pictures))
