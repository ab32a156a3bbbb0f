"""What a replica says of the work that comes to it, and of what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from serve import demand
from serve.batcher import Batcher
from serve.demand import Demand
from serve.engine import Engine, Snapshot
from serve.metrics import Metrics
from serve.running import RunningTrunk
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of


def test_rows_that_came_are_counted_and_none_waits_when_all_are_answered(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """A picture of two tasks is hardly more than one of one: the trunk runs once."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        replica = fleet.replicas["replica-1"]
        told = Demand(replica.batcher, decode_threads=2)
        client = HttpClient(fleet, "replica-1")
        client.post("/predict/colours", content=png_of(0))
        client.post("/predict?tasks=*", content=png_of(1))
        stats = told.stats()
        trunk = replica.batcher.trunk

    assert stats["arrived"] == pytest.approx(2.0, abs=0.5)
    assert stats["waiting"] == 0.0
    assert stats["batch"] == trunk.max_pictures
    assert stats["row_s"] > 0.0


class Clock:
    """The time that the thread has worked, which stands still unless it is told."""

    def __init__(self) -> None:
        self.worked_s = 0.0

    def thread_time(self) -> float:
        """See `time.thread_time`."""
        return self.worked_s


def test_a_row_takes_as_long_as_the_slowest_part_of_a_replica(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that answers HTTP is one; what it does beside few rows is not theirs."""
    batcher = Batcher(RunningTrunk(engine, 4, picture_s=0.001), Snapshot(), Metrics(), max_queued=6)
    clock, told = Clock(), Demand(batcher, decode_threads=4)
    monkeypatch.setattr(demand, "time", clock)

    def row_s(*, rows: float, worked_s: float = 0.0, decoded_s: Sequence[float] = ()) -> float:
        batcher.admission.arrived += rows
        clock.worked_s += worked_s
        for seconds in decoded_s:
            batcher.admission.see_decoding(seconds)
        return told.stats()["row_s"]

    try:
        assert row_s(rows=0) == 0.001
        assert row_s(rows=2, worked_s=0.1) == 0.001
        assert row_s(rows=100, worked_s=0.2) == pytest.approx(0.002)
        assert row_s(rows=0, worked_s=5.0) == pytest.approx(0.002)
        # Of four decoders each takes a quarter.
        assert row_s(rows=3, decoded_s=[0.001, 0.001, 0.238]) == pytest.approx(0.02)
        for _ in range(400):
            row_s(rows=100, worked_s=0.05, decoded_s=[0.001] * 100)
        assert row_s(rows=100, worked_s=0.05) == pytest.approx(0.001)
    finally:
        batcher.close()
