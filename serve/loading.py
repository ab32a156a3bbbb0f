"""From a change in the head log to a head that answers: fetched, loaded, its cost measured."""

from __future__ import annotations

import logging
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle, Digest
from serve.bank import IDENTITY, Bank
from serve.contender import load_head, read_adapter
from serve.engine import Engine, LiveHead, Retired, Snapshot
from serve.headlog import HeadLog
from serve.heads import Head
from serve.paging import AdapterMemory
from serve.record import LogView, TaskChange
from serve.task_settings import DEFAULTS

logger = logging.getLogger(__name__)

LOAD_THREADS = 8
LOG_EVERY_HEADS = 1000
TRIALS = 3
TRIAL_ROWS = 4
MAX_KEPT = 32  # loaded bundles that are no longer live, tails of some megabytes among them


class HeadLoader:
    """Loads the heads, adapters and tails of one replica.

    Args:
        picture_s: Time of a picture through the trunk: what costs of rows are counted in.
        adapter_memory_bytes: Budget of the adapters in memory.
    """

    def __init__(
        self, log: HeadLog, engine: Engine, *, adapter_memory_bytes: int, picture_s: float
    ) -> None:
        self._log, self._engine, self._picture_s = log, engine, picture_s
        self.adapters = AdapterMemory(engine.families, budget_bytes=adapter_memory_bytes)
        self._adapter_costs: dict[Bank, float] = {}
        self._kept: OrderedDict[tuple[str, Digest], LiveHead] = OrderedDict()

    def snapshot(self, view: LogView) -> Snapshot:
        """All that the log says, loaded.

        Raises:
            StoreError: a bundle cannot be read.
        """
        retired = {
            task: Retired(task, history[-1].change.version, history[-1].written_at)
            for task, history in view.tasks.items()
            if view.live(task) is None
        }
        return Snapshot(view.live_number, self.load_all(view), view.settings, retired)

    def load_all(self, view: LogView) -> dict[str, LiveHead]:
        """Every head that is live, by task, with progress in the log.

        Raises:
            StoreError: a bundle cannot be read.
        """
        # Pinned tasks come first, so that memory is theirs.
        tasks = sorted(view.tasks, key=lambda task: not _is_pinned(view, task))
        changes = [live.change for live in map(view.live, tasks) if live]
        heads: dict[str, LiveHead] = {}
        with ThreadPoolExecutor(max(LOAD_THREADS, self._log.store.num_readers)) as pool:
            for head in pool.map(self.load, changes):
                heads[head.task] = head
                if len(heads) % LOG_EVERY_HEADS == 0 or len(heads) == len(changes):
                    logger.info("loaded %d of %d heads", len(heads), len(changes))
        return heads

    def load(self, change: TaskChange, checked: Bundle | None = None) -> LiveHead:
        """Fetch the bundles of a change and load them; those that are kept are there already.

        Args:
            checked: One of them, as it has just passed the gates.

        Raises:
            StoreError: a bundle cannot be read.
        """
        assert change.bundle is not None
        live = self._side(change, change.bundle, checked, change.task)
        if change.candidate is None:
            return live
        candidate = self._side(change, change.candidate.bundle, checked, change.task)
        return replace(live, candidate=candidate, share=change.candidate.share)

    def load_older(self, change: TaskChange) -> LiveHead:
        """What answered in a version that is no longer live; of a rollout, without its candidate.

        Its adapter leaves memory like any other, though its task's be pinned.

        Raises:
            StoreError: its bundle cannot be read.
        """
        assert change.bundle is not None
        owner = f"{change.task}, version {change.version}"  # no task's name
        return self._side(change, change.bundle, None, owner)

    def keep(self, live: LiveHead) -> None:
        """Keep what is live loaded when it no longer is, so that the way back needs no loading."""
        for side in (live, live.candidate):
            if side is not None:
                self._kept[side.task, side.bundle] = replace(side, candidate=None, share=0.0)
                self._kept.move_to_end((side.task, side.bundle))
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def _side(
        self, change: TaskChange, digest: Digest, checked: Bundle | None, owner: str
    ) -> LiveHead:
        if kept := self._kept.get((change.task, digest)):
            return replace(kept, version=change.version)
        if checked is None or checked.digest != digest:
            checked = self._log.get_served(digest)
        return self._live(change, digest, checked, owner)

    def _live(self, change: TaskChange, digest: Digest, bundle: Bundle, owner: str) -> LiveHead:
        head, entry = load_head(bundle, self._engine.device), bundle.manifest.adapter
        adapter = None
        cost = self._tail_cost(head) if head.takes == "prefix" else 0.0
        if entry is not None:
            adapter = self.adapters.add(owner, entry, read_adapter(bundle))
            cost = self._adapter_cost(adapter.bank)
        return LiveHead(change.task, change.version, digest, head, cost, adapter)

    @cached_property
    def _maps(self) -> NDArray[np.float32]:
        """Prefix maps of black pictures; the first run makes the session, before a request does."""
        size_px = self._engine.manifest.preprocessing.size_px
        return self._engine.prefix(np.zeros((TRIAL_ROWS, size_px, size_px, 3), np.uint8))

    def _adapter_cost(self, bank: Bank) -> float:
        """A row of a bank, in pictures; measured once for each bank."""
        if bank not in self._adapter_costs:
            rows = np.arange(TRIAL_ROWS)
            slots = np.full_like(rows, IDENTITY)
            seconds = _median_s(lambda: bank.features(self._maps, rows, slots))
            self._adapter_costs[bank] = seconds / TRIAL_ROWS / self._picture_s
        return self._adapter_costs[bank]

    def _tail_cost(self, tail: Head) -> float:
        return _median_s(lambda: tail.logits(self._maps)) / TRIAL_ROWS / self._picture_s


def _is_pinned(view: LogView, task: str) -> bool:
    return view.settings.get(task, DEFAULTS).pinned


def _median_s(run: Callable[[], object]) -> float:
    run()  # the first run allocates
    seconds = []
    for _ in range(TRIALS):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)
