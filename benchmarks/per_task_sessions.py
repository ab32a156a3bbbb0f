"""How much faster is one trunk with many heads than a whole model for every task?

The same 10,000 tasks are served by the engine, and as whole models: trunk and head in one ONNX
graph, one session a task, the least recently used closed when as many are open as fit into the
memory that all heads of the engine take. Requests come in one random order, tasks uniform or by
Zipf's law; both sides see windows of 32. The baseline's graphs are optimised ahead of time, and it
runs its window one by one or grouped by task, whichever is faster; for comparison, the same with
graphs as they are exported, which ONNX Runtime optimises each time it loads one.
"""

from __future__ import annotations

import functools
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
    rounds, windows = (5, 1) if chosen.quick else (9, 5)
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        make_bank(Path(name))
        bank = open_bank(Path(name))
        exported, optimised = _whole_models(Path(name), bank)
        session_bytes = _session_bytes(optimised, bank)
        capacity = int(bank.resident_bytes / session_bytes)
        note(f"a session takes {session_bytes / 2**20:.1f} MiB; {capacity} fit")
        figures = [
            median_of("resident memory of one session", [session_bytes / 2**20], unit="MiB"),
            median_of("sessions that fit", [float(capacity)], unit="sessions"),
        ]
        for law, exponent, aim in (("uniform", 0.0, ">= 50"), ("Zipf(1.0)", 1.0, ">= 10")):
            requests = _Requests(len(bank.heads), exponent)
            rivals = [_Sessions(optimised, capacity), _Sessions(optimised, capacity)]
            rivals.append(_Sessions(exported, capacity))
            for rival in rivals:
                rival.warm_up(requests.take(WARM_UP_REQUESTS))
            seconds: list[list[float]] = []
            for number in range(rounds):
                window = [requests.take(BATCH) for _ in range(windows)]
                one_by_one, grouped, plain = (
                    _sessions_s(rival, bank, window, is_grouped=is_grouped)
                    for rival, is_grouped in zip(rivals, (False, True, True), strict=True)
                )
                seconds.append([_engine_s(bank, window), one_by_one, grouped, plain])
                note(f"{law}, round {number + 1} of {rounds}: {min(seconds[-1][1:3]):.2f} s")
            mine_s, one_by_one_s, grouped_s, plain_s = np.transpose(seconds)
            best_s = min(one_by_one_s, grouped_s, key=np.median)
            rows = BATCH * windows
            figures += [
                median_of(f"engine / whole models, {law}", best_s / mine_s, unit="ratio", aim=aim),
                median_of(f"engine / whole models as exported, {law}", plain_s / mine_s,
                          unit="ratio"),
                median_of(f"engine, {law}", rows / mine_s, unit="rows/s"),
                median_of(f"whole models, {law}", rows / best_s, unit="rows/s"),
            ]  # fmt: skip
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

    def __init__(self, loaders: _Loaders, capacity: int) -> None:
        self._loaders, self._capacity = loaders, capacity
        self._open: OrderedDict[int, onnxruntime.InferenceSession] = OrderedDict()

    def warm_up(self, tasks: Sequence[int]) -> None:
        """Open what would be open after these requests."""
        recent = list(dict.fromkeys(reversed(tasks)))[: self._capacity]
        for task in reversed(recent):
            self.get(task)

    def get(self, task: int) -> onnxruntime.InferenceSession:
        """Open, from disk if it is not."""
        session = self._open.pop(task, None) or self._loaders[task % len(self._loaders)]()
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
    sessions: _Sessions, bank: Bank, windows: Sequence[Sequence[int]], *, is_grouped: bool
) -> float:
    """Seconds of the windows, one row after the other or the rows of each task together."""
    began_s = time.perf_counter()
    for window in windows:
        rows = range(len(window))
        tasks = dict.fromkeys(window) if is_grouped else window
        for place, task in enumerate(tasks):
            mine = [row for row in rows if window[row] == task] if is_grouped else [place]
            sessions.get(task).run(["logits"], {"images": bank.pictures[mine]})
    return time.perf_counter() - began_s


def _whole_models(folder: Path, bank: Bank) -> tuple[_Loaders, _Loaders]:
    """Trunk and head of some tasks as one graph each, as exported and optimised here."""
    trunk = onnx.load(folder / "trunk" / TRUNK_GRAPH)
    exported: list[_Loader] = []
    optimised: list[_Loader] = []
    for place in range(NUM_FILES):
        head = onnx.load_model_from_string(bank.head_graph(place))
        head.ir_version = trunk.ir_version
        head.opset_import[0].version = trunk.opset_import[0].version
        whole = compose.merge_models(
            trunk, compose.add_prefix(head, "head_", rename_inputs=False, rename_outputs=False),
            io_map=[("features", "features")], outputs=["logits"],
        )  # fmt: skip
        plain, path = folder / f"plain{place}.onnx", folder / f"whole{place}.onnx"
        onnx.save(whole, plain)
        _open(plain, _ALL, optimised=path)
        exported.append(functools.partial(_open, plain, _ALL))
        optimised.append(functools.partial(_open, path, _NONE))
    return exported, optimised


_ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
_NONE = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
_Loader = Callable[[], onnxruntime.InferenceSession]
_Loaders = Sequence[_Loader]


def _open(
    path: Path, level: onnxruntime.GraphOptimizationLevel, *, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = level
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _session_bytes(loaders: _Loaders, bank: Bank) -> float:
    """How much the process grows with each session that is open and has run."""
    before = resident_bytes()
    sessions = [load() for load in loaders[:NUM_MEASURED]]
    for session in sessions:
        session.run(["logits"], {"images": bank.pictures[:1]})
    return (resident_bytes() - before) / len(sessions)


if __name__ == "__main__":
    main()
