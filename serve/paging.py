"""Which adapters are in memory: least recently used ones leave, and come back from disk.

Every adapter that is live has a file in a folder of this process. The batcher pins what a job needs
before it starts; what is missing is brought in by a thread of its own, and the job tries again.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from export.bundle import AdapterEntry
from serve.adapted import AdaptedGraph, AdapterError, Family, family_of
from serve.bank import Bank, PagedAdapter
from serve.engine import LiveHead
from serve.residency import AdaptersTooLargeError

logger = logging.getLogger(__name__)

RETRY_S = 0.05


class AdapterMemory:
    """All adapters of a process, as many of them in memory as the budget allows.

    Args:
        families: Of the trunk's adapted graph; none if it has no adapters.
        budget_bytes: For the slots of all banks together.
    """

    def __init__(self, families: Mapping[Family, AdaptedGraph], *, budget_bytes: int) -> None:
        self._families, self._budget_bytes = families, budget_bytes
        self._is_pinned: Callable[[str], bool] = lambda _: False
        self._on_load: Callable[[], None] = lambda: None
        self._folder = tempfile.TemporaryDirectory(prefix="headstock-adapters-")
        self._lock = threading.Condition()
        self._banks: dict[tuple[Family, int], Bank] = {}
        self._missing: deque[weakref.ref[PagedAdapter]] = deque()
        self._clock = self._num_added = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._load_missing, name="adapters", daemon=True)
        self._thread.start()

    def connect(self, on_load: Callable[[], None], is_pinned: Callable[[str], bool]) -> None:
        """Say who waits for adapters, and which tasks' adapters never leave."""
        with self._lock:
            self._on_load, self._is_pinned = on_load, is_pinned

    @property
    def is_alive(self) -> bool:
        """Whether missing adapters are still brought in."""
        return self._thread.is_alive()

    @property
    def used_bytes(self) -> int:
        """Memory of all slots."""
        with self._lock:
            return sum(bank.used_bytes for bank in self._banks.values())

    def add(
        self, task: str, entry: AdapterEntry, weights: Mapping[str, NDArray[np.float32]]
    ) -> PagedAdapter:
        """Take a new adapter: onto disk, and into memory if others need not leave for it.

        Raises:
            AdapterError: it does not fit the trunk's adapted graph, or one slot of it the budget.
        """
        graph = self._families.get(family_of(entry))
        if graph is None:
            raise AdapterError(f"This trunk has no sites for adapters of kind {entry.kind!r}.")
        width = _bucket(entry.width)
        slot = graph.slot_of(entry, weights, width)
        with self._lock:
            bank = self._bank(graph, width)
            self._num_added += 1
            file = Path(self._folder.name) / f"{self._num_added}.safetensors"
        save_file(slot, file)
        adapter = PagedAdapter(task, entry, bank, file)
        weakref.finalize(adapter, file.unlink, missing_ok=True)
        with self._lock:
            place = self._take_slot(adapter, may_evict=self._is_pinned(task))
        if place is not None:
            self._fill(adapter, place, slot)
        return adapter

    def pin(self, heads: Sequence[LiveHead]) -> bool:
        """See `Residency.pin`.

        Raises:
            AdaptersTooLargeError: the budget does not hold so many at once.
        """
        adapters = {id(head.adapter): head.adapter for head in heads if head.adapter}.values()
        if not adapters:
            return True
        with self._lock:
            needed = sum(adapter.bank.slot_bytes for adapter in adapters)
            if needed > self._budget_bytes:
                raise AdaptersTooLargeError(needed, self._budget_bytes)
            for bank, num_slots in Counter(adapter.bank for adapter in adapters).items():
                if num_slots > bank.max_slots:
                    room = bank.max_slots * bank.slot_bytes
                    raise AdaptersTooLargeError(num_slots * bank.slot_bytes, room)
            self._clock += 1
            for adapter in adapters:
                adapter.used_at = self._clock
            missing = [adapter for adapter in adapters if adapter.slot is None]
            for adapter in missing:
                if not adapter.is_wanted:
                    adapter.is_wanted = True
                    self._missing.append(weakref.ref(adapter))
            if missing:
                self._lock.notify_all()
                return False
            for adapter in adapters:
                adapter.num_pins += 1
                adapter.is_wanted = False
        return True

    def unpin(self, heads: Sequence[LiveHead]) -> None:
        """See `Residency.unpin`."""
        adapters = {id(head.adapter): head.adapter for head in heads if head.adapter}.values()
        if adapters:
            with self._lock:
                for adapter in adapters:
                    adapter.num_pins -= 1
                self._lock.notify_all()

    def close(self) -> None:
        """Stop the thread and remove the files."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        self._thread.join()
        self._folder.cleanup()

    def _bank(self, graph: AdaptedGraph, width: int) -> Bank:
        key = (graph.family, width)
        if key not in self._banks:
            slot_bytes = 4 * sum(int(np.prod(s)) for s in graph.slot_shapes(width).values())
            if slot_bytes > self._budget_bytes:
                raise AdapterError(
                    f"One adapter of rank {width} takes {slot_bytes} bytes; adapter_memory_bytes "
                    f"is {self._budget_bytes}."
                )
            max_slots = self._budget_bytes // slot_bytes
            if graph.device != "cpu":
                max_slots = self._share_of_device(slot_bytes)
            self._banks[key] = Bank(graph, width, max_slots=max_slots)
        return self._banks[key]

    def _share_of_device(self, slot_bytes: int) -> int:
        """Slots of a new bank on a device, which takes its memory at once and never more.

        Half of what other banks have left, so that something is left for later ones.

        Raises:
            AdapterError: nothing is left.
        """
        left = self._budget_bytes - sum(bank.used_bytes for bank in self._banks.values())
        if left < slot_bytes:
            raise AdapterError(
                f"Adapters of other ranks and kinds have taken the device's memory: {left} bytes "
                f"are left, and one of these takes {slot_bytes}. Raise adapter_memory_bytes."
            )
        return max(1, left // 2 // slot_bytes)

    def _load_missing(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._missing or self._is_closed)
                if self._is_closed:
                    return
                found = self._next_missing()
                if found is None:  # all slots are in use; the end of some job makes room
                    self._lock.wait(RETRY_S)
                    continue
            self._bring_in(*found)

    def _next_missing(self) -> tuple[PagedAdapter, int] | None:
        """The first that waits and finds a slot: one that finds none keeps nobody behind it."""
        for ref in list(self._missing):
            adapter = ref()
            if adapter is None or adapter.slot is not None:
                self._missing.remove(ref)
            elif (place := self._take_slot(adapter, may_evict=True)) is not None:
                self._missing.remove(ref)
                return adapter, place
        return None

    def _bring_in(self, adapter: PagedAdapter, place: int) -> None:
        try:
            values = load_file(adapter.file)
        # The thread is the only way back into memory: it must outlive a damaged file.
        except Exception:
            logger.exception("the adapter of %s cannot be read", adapter.task)
            with self._lock:
                adapter.bank.vacate(place)
                adapter.is_wanted = False  # the next request for it tries again
            return
        self._fill(adapter, place, values)
        self._on_load()

    def _fill(
        self, adapter: PagedAdapter, place: int, values: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Write the slot, then let others see it: nobody reads it in between."""
        adapter.bank.write(place, values)
        with self._lock:
            adapter.slot = place

    def _take_slot(self, adapter: PagedAdapter, *, may_evict: bool) -> int | None:
        """Reserve a slot of the adapter's bank; None if there is no room now."""
        bank = adapter.bank
        place = bank.free_slot()
        if place is None and self._has_room(bank):
            place = bank.add_slot()
        if place is None and may_evict:
            place = self._evict(bank)
        if place is not None:
            bank.reserve(place, adapter)
        return place

    def _has_room(self, bank: Bank) -> bool:
        used = sum(other.used_bytes for other in self._banks.values())
        return not bank.is_full and used + bank.growth_bytes <= self._budget_bytes

    def _evict(self, bank: Bank) -> int | None:
        """Page out the least recently used of this bank; if it has none, make room in others."""
        if victims := self._victims(bank):
            victim = victims[0]
            place = victim.slot
            assert place is not None
            self._page_out(victim)
            return place
        if bank.is_full:
            return None
        for other in sorted(self._banks.values(), key=lambda b: b.used_bytes, reverse=True):
            other.trim()
            while not self._has_room(bank) and other is not bank:
                last = max(self._residents(other), key=lambda a: a.slot or 0, default=None)
                if last is None or not self._may_leave(last):
                    break
                self._page_out(last)
                other.trim()
        return bank.add_slot() if self._has_room(bank) else None

    def _page_out(self, adapter: PagedAdapter) -> None:
        assert adapter.slot is not None
        adapter.bank.vacate(adapter.slot)
        adapter.slot = None
        adapter.is_wanted = False

    def _victims(self, bank: Bank) -> list[PagedAdapter]:
        """Who may leave: those that no waiting job wants first, the least recently used of them."""
        leaving = [adapter for adapter in self._residents(bank) if self._may_leave(adapter)]
        return sorted(leaving, key=lambda adapter: (adapter.is_wanted, adapter.used_at))

    def _residents(self, bank: Bank) -> list[PagedAdapter]:
        return [a for a in bank.owners if isinstance(a, PagedAdapter) and a.slot is not None]

    def _may_leave(self, adapter: PagedAdapter) -> bool:
        return not adapter.num_pins and not self._is_pinned(adapter.task)


def _bucket(width: int) -> int:
    """Ranks share banks of the next power of two, so that few banks serve all of them."""
    return 1 << (width - 1).bit_length() if width else 0
