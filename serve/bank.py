"""Banks: the adapters that are in memory, side by side as the adapted graph reads them.

A bank is written while batches read it: a batch reads only the slots of its own rows, which nobody
writes until the last job that has them is done.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bundle import AdapterEntry
from serve.adapted import AdaptedGraph
from serve.device_arrays import DeviceArrays
from serve.onnx_session import Device

IDENTITY = 0


class BankArrays:
    """Room for slots in the process's memory, which the system gives as slots are first written.

    Args:
        shapes: What one slot holds, by the graph's input.
        num_slots: At most; so much address space is reserved, and no memory.
    """

    grows = True  # in memory, slot by slot

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], num_slots: int) -> None:
        self._memory: dict[str, mmap.mmap] = {}
        self.arrays: dict[str, NDArray[np.float32]] = {}
        for name, shape in shapes.items():
            num_bytes = num_slots * _bytes_of(shape)
            self._memory[name] = mmap.mmap(
                -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            flat = np.frombuffer(self._memory[name], np.float32)
            self.arrays[name] = flat.reshape(num_slots, *shape)

    def write(self, slot: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Fill one slot; no other is touched."""
        for name, array in self.arrays.items():
            array[slot] = values[name]

    def release_from(self, slot: int) -> None:
        """Give the memory of this slot and all after it back to the system."""
        for name, memory in self._memory.items():
            first = slot * _bytes_of(self.arrays[name].shape[1:])
            first += -first % mmap.PAGESIZE
            if first < len(memory):
                memory.madvise(mmap.MADV_DONTNEED, first)


class Bank:
    """The slots of one family and one width.

    Args:
        max_slots: Besides the identity.
    """

    def __init__(self, graph: AdaptedGraph, width: int, *, max_slots: int) -> None:
        self.graph, self.width = graph, width
        shapes = graph.slot_shapes(width)
        self.slot_bytes = sum(map(_bytes_of, shapes.values()))
        self.max_slots = max_slots
        self._arrays = _arrays_on(graph.device, shapes, 1 + max_slots)
        self._arrays.write(IDENTITY, graph.identity(width))
        # Who is in each slot; an adapter that nobody refers to any more has left.
        self._owners: list[weakref.ref[object] | None] = []

    @property
    def used_bytes(self) -> int:
        """Memory that was given to slots, the free ones between others included."""
        num_slots = len(self._owners) if self._arrays.grows else self.max_slots
        return num_slots * self.slot_bytes

    @property
    def growth_bytes(self) -> int:
        """Memory that one slot more takes."""
        return self.slot_bytes if self._arrays.grows else 0

    @property
    def is_full(self) -> bool:
        """Whether it has no place for one slot more, whatever memory there is."""
        return len(self._owners) == self.max_slots

    @property
    def owners(self) -> list[object]:
        """The adapters in the bank, in the order of their slots."""
        return [owner for ref in self._owners if ref and (owner := ref()) is not None]

    def free_slot(self) -> int | None:
        """A slot that memory was given to already and nobody is in."""
        for place, ref in enumerate(self._owners):
            if ref is None or ref() is None:
                return place + 1
        return None

    def add_slot(self) -> int:
        """One slot more."""
        self._owners.append(None)
        return len(self._owners)

    def reserve(self, slot: int, owner: object) -> None:
        """Keep a free slot for an adapter."""
        self._owners[slot - 1] = weakref.ref(owner)

    def vacate(self, slot: int) -> None:
        """Nobody is in this slot any more."""
        self._owners[slot - 1] = None

    def trim(self) -> None:
        """Give the memory of free slots at the end back."""
        num_owners = len(self._owners)
        while self._owners and ((ref := self._owners[-1]) is None or ref() is None):
            self._owners.pop()
        if len(self._owners) < num_owners:
            self._arrays.release_from(len(self._owners) + 1)

    def write(self, slot: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Fill a reserved slot."""
        self._arrays.write(slot, values)

    def features(
        self,
        maps: NDArray[np.float32],
        image_of: NDArray[np.int64],
        slot_of: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Features of rows, float32 [rows, num_features], bit-equal whatever rows are beside them.

        Args:
            maps: Prefix maps, float32 [batch, channels, height, width].
            image_of: Which map each row reads, [rows].
            slot_of: Which slot each row reads, [rows].
        """
        # What is on the device already is read there, whichever of the two kinds a feed is.
        feeds = {"prefix": maps, "image_of": image_of, "slot_of": slot_of, **self._arrays.arrays}
        return np.asarray(self.graph.session.run([self.graph.family], feeds)[0])


class PagedAdapter:
    """An adapter that is in a slot, or on disk.

    Its slot is its own as long as somebody refers to it and it is not paged out.
    """

    def __init__(self, task: str, entry: AdapterEntry, bank: Bank, file: Path) -> None:
        self.task, self.entry, self.bank, self.file = task, entry, bank, file
        self.slot: int | None = None
        self.num_pins = 0
        self.used_at = 0
        self.is_wanted = False  # by a job that waits for it


def _arrays_on(
    device: Device, shapes: Mapping[str, tuple[int, ...]], num_slots: int
) -> BankArrays | DeviceArrays:
    if device == "cpu":
        return BankArrays(shapes, num_slots)
    return DeviceArrays(shapes, num_slots, device)


def _bytes_of(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape))
