"""The batcher when the trunk changes under it, with and without a drain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.pictures import load_picture
from serve.batcher import Batcher
from serve.engine import Engine, Head, LiveHead, Row, Snapshot
from serve.jobs import Job, OverloadedError
from serve.metrics import Metrics
from serve.running import RunningTrunk
from tests.serve.harness import until
from tests.serve.oracle import some_picture
from tests.serve.tiny import TinyTrunk, png_of

TASK = ("colours",)


class Residents:
    """Everything is in memory; who used it, and whether it was closed while it was used."""

    def __init__(self) -> None:
        self.num_used = 0
        self.is_closed = False

    def pin(self, heads: Sequence[LiveHead]) -> bool:
        """A job begins."""
        assert heads
        assert not self.is_closed
        self.num_used += 1
        return True

    def unpin(self, heads: Sequence[LiveHead]) -> None:
        """It ends."""
        assert heads
        self.num_used -= 1

    def close(self) -> None:
        """Nobody may use it any more."""
        assert not self.num_used
        self.is_closed = True


@pytest.fixture
def trunks(tmp_path: Path) -> tuple[TinyTrunk, TinyTrunk]:
    """Of 8 and of 12 px."""
    return (
        TinyTrunk(tmp_path / "old", size_px=8, roll=0, scale=0.01),
        TinyTrunk(tmp_path / "new", size_px=12, roll=1, scale=0.02),
    )


@pytest.fixture
def running(trunks: tuple[TinyTrunk, TinyTrunk]) -> list[RunningTrunk]:
    """Both, in batches of two pictures."""
    return [RunningTrunk(trunk.engine, 2, residency=Residents()) for trunk in trunks]


def live(trunk: TinyTrunk, version: int) -> Snapshot:
    """One task with a head for that trunk."""
    bundle = trunk.bundle("colours", 1)
    head = LiveHead("colours", version, bundle.digest, Head.of_bundle(bundle))
    return Snapshot(version, {"colours": head})


@pytest.fixture
def batcher(trunks: tuple[TinyTrunk, TinyTrunk], running: list[RunningTrunk]) -> Iterator[Batcher]:
    """On the first of the two; decodes anew in a thread."""

    def decode_anew(job: Job) -> None:
        def decode() -> None:
            manifest = batcher.trunk.engine.manifest
            job.inputs = [
                load_picture(data, manifest.preprocessing, max_pixels=10**6) for data in job.encoded
            ]
            job.made_for = manifest
            batcher.resume(job)

        threading.Thread(target=decode, daemon=True).start()

    batcher = Batcher(
        running[0], live(trunks[0], 1), Metrics(), max_queued=64, decode_anew=decode_anew
    )
    batcher.set_open(is_open=True)
    yield batcher
    batcher.close()


def test_a_job_that_is_half_done_starts_anew_on_the_new_trunk(
    batcher: Batcher,
    trunks: tuple[TinyTrunk, TinyTrunk],
    running: list[RunningTrunk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a drain: no answer has parts of two trunks; the old one closes when it is free."""
    old, new = trunks
    is_running, may_end = threading.Event(), threading.Event()

    def run(pictures: NDArray[np.uint8], rows: Sequence[Row]) -> Any:
        is_running.set()
        assert may_end.wait(5)
        return Engine.run(old.engine, pictures, rows)

    monkeypatch.setattr(old.engine, "run", run)
    pictures = [some_picture(seed) for seed in range(5)]
    job = Job(
        pictures, TASK, encoded=[png_of(picture) for picture in pictures], made_for=old.manifest
    )
    answered = batcher.submit(job)
    assert is_running.wait(5)
    batcher.flip(live(new, 2), running[1])
    may_end.set()
    answers = answered.result(5)
    residents = running[0].residency
    assert isinstance(residents, Residents)
    until(lambda: residents.is_closed)

    assert {answer.live.version for row in answers for answer in row} == {2}
    for picture, (answer,) in zip(pictures, answers, strict=True):
        np.testing.assert_allclose(answer.scores, new.scores(picture, 1), atol=1e-5)


def test_a_job_that_comes_late_with_old_pictures_is_decoded_anew(
    batcher: Batcher, trunks: tuple[TinyTrunk, TinyTrunk], running: list[RunningTrunk]
) -> None:
    """Decoded before the flip and queued after it."""
    old, new = trunks
    picture = some_picture(0)
    job = Job([picture], TASK, encoded=[png_of(picture)], made_for=old.manifest)
    batcher.flip(live(new, 2), running[1])
    ((answer,),) = batcher.submit(job).result(5)

    np.testing.assert_allclose(answer.scores, new.scores(picture, 1), atol=1e-5)


def test_pictures_that_fit_both_trunks_are_not_decoded_anew(
    tmp_path: Path, batcher: Batcher, trunks: tuple[TinyTrunk, TinyTrunk]
) -> None:
    """The same size out of the same resizing."""
    other = TinyTrunk(tmp_path / "other", size_px=8, roll=2, scale=0.03)
    picture = some_picture(0)
    job = Job([picture], TASK, made_for=trunks[0].manifest)  # without files it could not be
    batcher.flip(live(other, 2), RunningTrunk(other.engine, 2))
    ((answer,),) = batcher.submit(job).result(5)

    np.testing.assert_allclose(answer.scores, other.scores(picture, 1), atol=1e-5)


def test_what_waits_to_be_compared_is_forgotten(
    batcher: Batcher, trunks: tuple[TinyTrunk, TinyTrunk], running: list[RunningTrunk]
) -> None:
    """It was of the trunk before."""
    batcher.set_open(is_open=False)
    head = live(trunks[0], 1).heads["colours"]
    batcher.comparisons.offer(some_picture(0), head, max_slowdown=1.5)
    batcher.flip(live(trunks[1], 2), running[1])

    until(lambda: batcher.comparisons.due_in_s(is_idle=True) is None)


def test_times_are_told_by_the_trunk_that_runs(
    batcher: Batcher, trunks: tuple[TinyTrunk, TinyTrunk]
) -> None:
    """The old one took none; a picture takes the new one 100 s, so nobody waits behind it."""
    slow = RunningTrunk(trunks[1].engine, 2, picture_s=100.0)
    picture = np.zeros((12, 12, 3), np.uint8)
    batcher.set_open(is_open=False)
    batcher.flip(live(trunks[1], 2), slow)
    until(lambda: batcher._running is slow)
    batcher.submit(Job([picture], TASK, made_for=trunks[1].manifest))
    late = Job([picture], TASK, time.monotonic() + 50, made_for=trunks[1].manifest)

    with pytest.raises(OverloadedError, match=r"takes about 2e\+02 s, and this request has 50 s"):
        batcher.submit(late)
    assert batcher._schedule.picture_s == 100.0
