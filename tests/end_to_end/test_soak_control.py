"""The soak benchmark can fail: with the hold of swaps switched off it sees answers go back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import swap_soak
from benchmarks.channel_means import make_trunk
from benchmarks.fixtures import serving
from serve.client import Client
from serve.headlog import HeadLog

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]  # two services, one after the other

# Run by every Python process that finds it on its path, the replicas among them.
SLOW_REPLICAS = """
import importlib.abc, importlib.util, os, sys, time

class After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name != "serve.watcher":
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(name)
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.spec.loader.exec_module(module)
        change(module)

def change(watcher):
    flip = watcher.Watcher._flip
    def slow_flip(self, number, record):
        time.sleep(os.getpid() % 7 * 0.03)  # some replicas later than others
        flip(self, number, record)
    watcher.Watcher._flip = slow_flip
    {and_then}

sys.meta_path.insert(0, After())
"""
NO_HOLD = """
    from serve.batcher import Batcher
    Batcher.hold = lambda self, tasks: None
    Batcher.wait_drained = lambda self, timeout_s: True
"""


def segment(folder: Path, monkeypatch: pytest.MonkeyPatch, and_then: str) -> swap_soak.Segment:
    """One segment of the soak against replicas that flip at different moments."""
    site = folder / "site"
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(SLOW_REPLICAS.format(and_then=and_then))
    monkeypatch.setenv("PYTHONPATH", str(site))
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
    held = segment(tmp_path / "held", monkeypatch, "pass")
    loose = segment(tmp_path / "loose", monkeypatch, NO_HOLD.strip())

    assert held.problems == {}
    assert held.swaps > 5
    assert loose.problems.pop("back") > 0
    assert loose.problems.pop("unread", 0) == 0
    assert loose.problems == {}
