"""The crash benchmark in short, and that it can fail: see `benchmarks/crash_points.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.channel_means import make_trunk
from benchmarks.crash_points import REPLICAS, VICTIMS, Crashes, Point
from benchmarks.fixtures import serving
from benchmarks.judged_load import TASKS, JudgedLoad
from serve.client import Client
from serve.headlog import HeadLog
from tests.end_to_end.sabotage import sabotage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]  # two services, one after the other

# One replica hears half a second late that a commit stands: a conductor that is killed meanwhile
# has told the other one only.
LATE_NEWS = """
quick_poll = Swaps.poll

async def poll(self, poll):
    directive = await quick_poll(self, poll)
    if directive.phase is Phase.FLIP and poll.replica == min(self.members):
        await asyncio.sleep(0.5)
    return directive

Swaps.poll = poll
"""
NO_LOOK_AT_THE_LOG = """
def settle(self):
    number = self._state.hold
    self._batcher.release()
    self._drop_staged()
    self._state = protocol.settle(self._state, number, is_committed=False)

Watcher._settle = settle
"""
NUM_VICTIMS = len(VICTIMS)
ALL = range(2 * NUM_VICTIMS)
CONDUCTORS = range(VICTIMS.index("conductor"), 8 * NUM_VICTIMS, NUM_VICTIMS)


def crashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: Sequence[int], more: str = ""
) -> Iterator[Point]:
    """Points of the benchmark, each by its seed, against a fleet that hears late of a flip."""
    sabotage(folder / "site", monkeypatch, {"serve.swaps": LATE_NEWS, "serve.watcher": more})
    manifest = make_trunk(folder / "trunk")
    with (
        serving(folder / "store", trunk=folder / "trunk", replicas=REPLICAS) as service,
        Client(service["url"]) as client,
    ):
        load = JudgedLoad(service["url"], manifest, tries=3)
        for task in TASKS:
            client.push(load.bundle(task))
        made = Crashes(service, client, HeadLog(str(folder / "store")), load, folder)
        yield from (made.point(seed) for seed in seeds)


def test_a_fleet_heals_whoever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points for each of conductor, replica and pusher."""
    points = list(crashes(tmp_path, monkeypatch, ALL))

    assert {point.victim for point in points} == set(VICTIMS)
    assert [point.problems for point in points] == [{}] * len(points)


def test_a_replica_that_does_not_ask_the_log_goes_back_when_the_conductor_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the hold runs out, and what was committed meanwhile is not looked for."""
    seen = crashes(tmp_path, monkeypatch, CONDUCTORS, NO_LOOK_AT_THE_LOG)

    assert any("back" in point.problems for point in seen)
