"""How much faster is one trunk with many heads than a whole model for every task?

The same 10,000 tasks are served by the engine, and as whole models: trunk and head in one ONNX
graph, optimised ahead of time, one session a task, the least recently used closed when as many are
open as fit into the memory that all heads of the engine take. Requests come in one random order,
tasks uniform or by Zipf's law; both sides see windows of 32. The baseline runs its window one by
one or grouped by task, whichever is faster.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import compose
from threadpoolctl import threadpool_limits

from benchmarks.bank import BATCH, Bank, make_bank, open_bank, resident_bytes
from benchmarks.report import arguments, finish, median_of, note
from export.bundle import TRUNK_GRAPH

# Whole models of all tasks would take 40 GB of disk: so many files stand for them, always in the
# disk cache, which is in the baseline's favour.
NUM_FILES = 64
NUM_MEASURED = 24
WARM_UP_REQUESTS = 20_000


def main() -> None:
    """Find how many sessions fit, then alternate."""
    chosen = arguments(__doc__ or "")
    rounds, windows = (5, 2) if chosen.quick else (9, 5)
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        make_bank(Path(name))
        bank = open_bank(Path(name))
        paths = _whole_models(Path(name), bank)
        session_bytes = _session_bytes(paths, bank)
        capacity = int(bank.resident_bytes / session_bytes)
        note(f"a session takes {session_bytes / 2**20:.1f} MiB; {capacity} fit")
        figures = [
            median_of("resident memory of one session", [session_bytes / 2**20], unit="MiB"),
            median_of("sessions that fit", [float(capacity)], unit="sessions"),
        ]
        for law, exponent, aim in (("uniform", 0.0, ">= 50"), ("Zipf(1.0)", 1.0, ">= 10")):
            requests = _Requests(len(bank.heads), exponent)
            ratios: list[float] = []
            rates: list[float] = []
            for number in range(rounds):
                window = [requests.take(BATCH) for _ in range(windows)]
                mine_s = _engine_s(bank, window)
                theirs_s = min(
                    _sessions_s(paths, bank, requests, window, capacity, is_grouped=is_grouped)
                    for is_grouped in (False, True)
                )
                ratios.append(theirs_s / mine_s)
                rates.append(BATCH * windows / theirs_s)
                note(f"{law}, round {number + 1} of {rounds}: {ratios[-1]:.1f}")
            figures += [
                median_of(f"engine / whole models, {law}", ratios, unit="ratio", aim=aim),
                median_of(f"whole models, {law}", rates, unit="rows/s"),
            ]
    finish("per_task_sessions", figures, chosen)


class _Requests:
    """Tasks in the order in which they are asked for."""

    def __init__(self, num_tasks: int, exponent: float) -> None:
        shares = np.arange(1, num_tasks + 1) ** -exponent
        self._weights = np.cumsum(shares).tolist()
        self._tasks = range(num_tasks)
        self._chance = random.Random(0)  # noqa: S311 (a benchmark's draw)

    def take(self, number: int) -> list[int]:
        """The next requests."""
        return self._chance.choices(self._tasks, cum_weights=self._weights, k=number)


class _Sessions:
    """One session a task, the least recently used closed when there are too many."""

    def __init__(self, paths: Sequence[Path], capacity: int) -> None:
        self._paths, self._capacity = paths, capacity
        self._open: OrderedDict[int, onnxruntime.InferenceSession] = OrderedDict()

    def get(self, task: int) -> onnxruntime.InferenceSession:
        """Open, from disk if it is not."""
        session = self._open.pop(task, None) or _load(self._paths[task % len(self._paths)])
        self._open[task] = session
        while len(self._open) > self._capacity:
            self._open.popitem(last=False)
        return session


def _engine_s(bank: Bank, windows: Sequence[Sequence[int]]) -> float:
    began_s = time.perf_counter()
    for window in windows:
        bank.run(window)
    return time.perf_counter() - began_s


def _sessions_s(
    paths: Sequence[Path],
    bank: Bank,
    requests: _Requests,
    windows: Sequence[Sequence[int]],
    capacity: int,
    *,
    is_grouped: bool,
) -> float:
    """Seconds of the windows, by sessions that have served requests of this kind before."""
    sessions = _Sessions(paths, capacity)
    recent = list(dict.fromkeys(reversed(requests.take(WARM_UP_REQUESTS))))[:capacity]
    for task in reversed(recent):
        sessions.get(task)
    began_s = time.perf_counter()
    for window in windows:
        rows = range(len(window))
        tasks = dict.fromkeys(window) if is_grouped else window
        for place, task in enumerate(tasks):
            mine = [row for row in rows if window[row] == task] if is_grouped else [place]
            sessions.get(task).run(["logits"], {"images": bank.pictures[mine]})
    return time.perf_counter() - began_s


def _whole_models(folder: Path, bank: Bank) -> list[Path]:
    """Trunk and head of some tasks as one graph each, optimised for this machine."""
    trunk = onnx.load(folder / "trunk" / TRUNK_GRAPH)
    paths = []
    for place in range(NUM_FILES):
        head = onnx.load_model_from_string(bank.head_graph(place))
        head.ir_version = trunk.ir_version
        head.opset_import[0].version = trunk.opset_import[0].version
        whole = compose.merge_models(
            trunk, compose.add_prefix(head, "head_", rename_inputs=False, rename_outputs=False),
            io_map=[("features", "features")], outputs=["logits"],
        )  # fmt: skip
        path = folder / f"whole{place}.onnx"
        options = _options(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            whole.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        paths.append(path)
    return paths


def _load(path: Path) -> onnxruntime.InferenceSession:
    options = _options(onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = level
    return options


def _session_bytes(paths: Sequence[Path], bank: Bank) -> float:
    """How much the process grows with each session that is open and has run."""
    before = resident_bytes()
    sessions = [_load(path) for path in paths[:NUM_MEASURED]]
    for session in sessions:
        session.run(["logits"], {"images": bank.pictures[:1]})
    return (resident_bytes() - before) / len(sessions)


if __name__ == "__main__":
    main()
