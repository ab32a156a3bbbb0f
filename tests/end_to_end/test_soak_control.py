"""The soak benchmark can fail: with the hold of swaps switched off it sees answers go back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import swap_soak
from benchmarks.channel_means import make_trunk
from benchmarks.fixtures import serving
from serve.client import Client
from serve.headlog import HeadLog
from tests.end_to_end.sabotage import sabotage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]  # two services, one after the other

SLOW_REPLICAS = """
import os

quick_flip = Watcher._flip

def flip(self, number, record):
    time.sleep(os.getpid() % 7 * 0.03)  # some replicas later than others
    quick_flip(self, number, record)

Watcher._flip = flip
"""
NO_HOLD = """
Batcher.hold = lambda self, tasks: None
Batcher.wait_drained = lambda self, timeout_s: True
"""


def segment(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> swap_soak.Segment:
    """One segment of the soak against replicas that flip at different moments."""
    changes = {"serve.watcher": SLOW_REPLICAS, "serve.batcher": more}
    sabotage(folder / "site", monkeypatch, changes)
    monkeypatch.setattr(swap_soak, "PHASE_S", 4.0)
    manifest = make_trunk(folder / "trunk")
    with (
        serving(folder / "store", trunk=folder / "trunk", replicas=3) as service,
        Client(service["url"]) as client,
    ):
        soak = swap_soak.Soak(service["url"], client, HeadLog(str(folder / "store")), manifest)
        soak.prepare()
        return soak.segment(seed=0)


def test_without_the_hold_answers_go_back_and_with_it_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replicas are as slow in both; nothing fails in either, and nothing is torn."""
    held = segment(tmp_path / "held", monkeypatch)
    loose = segment(tmp_path / "loose", monkeypatch, NO_HOLD)

    assert held.problems == {}
    assert held.swaps > 5
    assert loose.problems.pop("back") > 0
    assert loose.problems.pop("unread", 0) == 0
    assert loose.problems == {}
