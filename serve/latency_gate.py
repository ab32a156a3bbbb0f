"""The gate that compares how long a bundle's answers take with those of what is live."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.affine import AffineMap
from serve.contender import Contender, Source
from serve.engine import Engine
from serve.graph_gate import GateError

ONE, SEVERAL = 1, 8  # pictures in a batch
SLOW_S = 0.005  # of one picture; beyond it several at a time would take the gate too long
LEAST_ROUNDS, MOST_ROUNDS = 3, 31
# Of a batch size, in each attempt. Of 15 ratios of MobileNetV3-small's heads to each other the
# standard deviation was 0.006, of LoRA to a head 0.056; with 0.05 s they were 0.005 and 0.046 (AMD
# EPYC, busy machine, 2026-11-21).
ROUNDS_S = 0.02
ATTEMPTS = 3
# A quarter of what decoding and HTTP take of a request whatever its head is (2 ms on an AMD EPYC,
# benchmarks/README.md). On a tiny trunk (0.06 ms) an adapter takes 2.2 x as long and adds 0.1 ms.
NEGLIGIBLE_S = 0.0005


@dataclass(frozen=True)
class Way:
    """How an answer is made: what the trunk gives, and what comes of it."""

    source: Source
    finish: Callable[[NDArray[np.float32]], object]


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
    bundle: Contender, live: Contender | None, *, task: str, max_slowdown: float
) -> str:
    """Answers do not take much longer than those of what is live.

    Each is made by its own trunk, of pictures as that takes them. Where nothing is live, the time
    is told in times of a plain head and nothing is refused: a task has no settings before its first
    push that could allow more, and what a graph may cost is bounded.

    Raises:
        GateError: they take more than `max_slowdown` times as long, in every attempt.
    """
    mine = _way(bundle)
    if live is None:
        plain = _plain(bundle.source.engine, len(bundle.head.labels))
        found = _text(_measure_sizes(mine, plain))
        return f"answers take {found} the time of a plain head; nothing is live to be slower than"
    slowdowns: list[Slowdown] = []
    for _ in range(ATTEMPTS):
        slowdowns = _measure_sizes(mine, _way(live))
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


def _measure_sizes(first: Way, second: Way) -> list[Slowdown]:
    alone = measure(first, second, batch=ONE)
    if alone.second_s > SLOW_S:
        return [alone]
    return [alone, measure(first, second, batch=SEVERAL)]


def _text(slowdowns: list[Slowdown]) -> str:
    return ", ".join(f"{s.ratio:.2f} x in batches of {s.batch}" for s in slowdowns)


def measure(first: Way, second: Way, *, batch: int) -> Slowdown:
    """Run both in turn, so that what else the machine does meets both.

    Where they start from the same, the trunk runs once for both of them in each round: what it
    took is the same for both, so that it blurs neither the ratio nor what is added.
    """
    engines = {way.source.engine for way in (first, second)}
    pictures = {engine: _some_pictures(engine, batch) for engine in engines}
    # Sessions run in the thread that calls them, so its CPU time is theirs, whoever else waits for
    # a core. Of a GPU it tells nothing.
    clock = time.thread_time if first.source.engine.device == "cpu" else time.perf_counter
    _round((first, second), pictures, clock)  # the first run of a size allocates
    rounds: list[tuple[float, float]] = []
    spent_s = 0.0
    while len(rounds) < LEAST_ROUNDS or (spent_s < ROUNDS_S and len(rounds) < MOST_ROUNDS):
        began_s = clock()
        # Each comes first in every other round, when what the trunk gave is still in the cache.
        if len(rounds) % 2:
            theirs, mine = _round((second, first), pictures, clock)
        else:
            mine, theirs = _round((first, second), pictures, clock)
        rounds.append((mine, theirs))
        spent_s += clock() - began_s
    ratio = statistics.median(mine / max(theirs, 1e-9) for mine, theirs in rounds)
    second_s = statistics.median(theirs for _, theirs in rounds)
    added_s = statistics.median(mine - theirs for mine, theirs in rounds)
    return Slowdown(batch, ratio, second_s / batch, added_s / batch)


def _round(
    ways: tuple[Way, Way], pictures: Mapping[Engine, NDArray[np.uint8]], clock: Callable[[], float]
) -> tuple[float, float]:
    """What each takes for pictures as its trunk takes them, in seconds."""
    started: dict[Source, tuple[NDArray[np.float32], float]] = {}
    seconds: list[float] = []
    for way in ways:
        if way.source not in started:
            began_s = clock()
            given = way.source.give(pictures[way.source.engine])
            started[way.source] = given, clock() - began_s
        given, start_s = started[way.source]
        began_s = clock()
        way.finish(given)
        seconds.append(start_s + clock() - began_s)
    return seconds[0], seconds[1]


def _some_pictures(engine: Engine, batch: int) -> NDArray[np.uint8]:
    size_px = engine.manifest.preprocessing.size_px
    shape = (batch, size_px, size_px, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _way(contender: Contender) -> Way:
    return Way(contender.source, contender.logits)


def _plain(engine: Engine, num_labels: int) -> Way:
    """The trunk and a packed affine head: the least that an answer can take."""
    weight = np.zeros((num_labels, engine.manifest.num_features), np.float32)
    head = AffineMap(weight, np.zeros(num_labels, np.float32))
    return Way(Source(engine, "features"), head)
