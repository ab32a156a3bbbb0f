"""Thousands of heads in this process, as a replica loads them; torch stays out of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from export.bundle import HEAD
from serve.engine import Engine, LiveHead, Row
from serve.headlog import HeadLog
from serve.loading import HeadLoader
from serve.record import LogView
from serve.trunks import load_engine

NUM_TASKS = 10_000
BATCH = 32
ADAPTER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Bank:
    """A trunk and its heads, loaded.

    Args:
        resident_bytes: Of the whole process, once all heads were loaded and a batch was run.
    """

    log: HeadLog
    engine: Engine
    heads: Sequence[LiveHead]
    pictures: NDArray[np.uint8]
    resident_bytes: int

    def run(self, places: Sequence[int]) -> None:
        """Answer one picture of each of these tasks, in one batch."""
        rows = [Row(row, self.heads[place]) for row, place in enumerate(places)]
        self.engine.run(self.pictures[: len(rows)], rows)

    def head_graph(self, place: int) -> bytes:
        """The bytes of a task's `head.onnx`."""
        return self.log.get_served(self.heads[place].bundle).files[HEAD]


def make_bank(folder: Path, num_tasks: int = NUM_TASKS) -> None:
    """Write trunk and heads in a process of its own, which loads torch."""
    command = [sys.executable, "-m", "benchmarks.make_bank", str(folder), str(num_tasks)]
    subprocess.run(command, check=True)


def open_bank(folder: Path) -> Bank:
    """Load what `make_bank` wrote."""
    log = HeadLog(str(folder / "store"))
    view = log.follow(LogView())
    assert view.trunk is not None
    engine = load_engine(log, view.trunk)
    loader = HeadLoader(log, engine, adapter_memory_bytes=ADAPTER_BYTES, picture_s=1.0)
    heads = list(loader.load_all(view).values())
    size_px = engine.manifest.preprocessing.size_px
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, size_px, size_px, 3), np.uint8)
    bank = Bank(log, engine, heads, pictures, 0)
    bank.run(range(BATCH))  # the first batch allocates
    return Bank(log, engine, heads, pictures, resident_bytes())


def resident_bytes() -> int:
    """Memory that this process has in RAM."""
    return psutil.Process().memory_info().rss
