"""What does a batch cost whose every row is of another task, one of ten thousand?

The engine runs the same 32 pictures with rows of one task, and with rows of tasks drawn uniformly
from 10,000 linear heads of 2 to 100 labels (log-uniform). All of it is one process with one thread,
whose resident memory is measured too; answers are compared with ONNX Runtime sessions of the same
heads.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.bank import BATCH, NUM_TASKS, Bank, make_bank, open_bank
from benchmarks.report import arguments, finish, median_of, note, quantile_of
from serve.heads import logits_of
from serve.onnx_session import open_session

NUM_COMPARED = 2048


def main() -> None:
    """Load, compare, then alternate between one task and all."""
    chosen = arguments(__doc__ or "")
    rounds, runs = (5, 4) if chosen.quick else (9, 20)
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        make_bank(Path(name))
        began_s = time.monotonic()
        bank = open_bank(Path(name))
        load_s = time.monotonic() - began_s
        resident_gib = bank.resident_bytes / 2**30
        note(f"{len(bank.heads)} heads loaded in {load_s:.1f} s, {resident_gib:.2f} GiB resident")
        chance = np.random.default_rng(1)
        differences, equal = _compare(bank, chance)
        ratios: list[float] = []
        mixed_rates: list[float] = []
        for number in range(rounds):
            one_s, mixed_s = _round(bank, chance, runs)
            ratios.append(one_s / mixed_s)
            mixed_rates.append(BATCH / mixed_s)
            note(f"round {number + 1} of {rounds}: {ratios[-1]:.3f}")
    ratio = f"throughput, {NUM_TASKS} tasks mixed / one task"
    figures = [
        median_of(ratio, ratios, unit="ratio", aim=">= 0.985"),
        median_of(f"throughput, {NUM_TASKS} tasks mixed", mixed_rates, unit="rows/s"),
        median_of("resident memory of the process", [resident_gib], unit="GiB", aim="<= 1"),
        median_of("loading all heads", [load_s], unit="s"),
        quantile_of(
            f"largest difference of {NUM_COMPARED} rows", differences, 1.0,
            unit="of the largest logit", aim="<= 1e-5",
        ),
        median_of("rows with the same label", [float(np.mean(equal))], unit="share", aim=">= 1"),
    ]  # fmt: skip
    finish("many_heads", figures, chosen)


def _compare(bank: Bank, chance: np.random.Generator) -> tuple[Sequence[float], Sequence[bool]]:
    """Rows of random tasks against sessions of their own: differences, and whether labels agree."""
    differences: list[float] = []
    equal: list[bool] = []
    features = bank.engine.features(bank.pictures)
    for _ in range(NUM_COMPARED // BATCH):
        places = chance.integers(len(bank.heads), size=BATCH).tolist()
        answers = logits_of(features, [bank.heads[place].head for place in places])
        for row, (place, got) in enumerate(zip(places, answers, strict=True)):
            session = open_session(bank.head_graph(place))
            (expected,) = np.asarray(session.run(["logits"], {"features": features[[row]]})[0])
            assert isinstance(got, np.ndarray), got
            differences.append(float(np.abs(got - expected).max() / np.abs(expected).max()))
            equal.append(bool(got.argmax() == expected.argmax()))
    return differences, equal


def _round(bank: Bank, chance: np.random.Generator, runs: int) -> tuple[float, float]:
    """Median seconds of a batch of one task and of one of random tasks, run in turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs):
        one = [int(chance.integers(len(bank.heads)))] * BATCH
        batches = (one, chance.integers(len(bank.heads), size=BATCH).tolist())
        for which in (0, 1) if run % 2 else (1, 0):
            began_s = time.perf_counter()
            bank.run(batches[which])
            seconds[which].append(time.perf_counter() - began_s)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
