"""Adapters in memory and on disk: who leaves, who never does, and that nobody reads another's."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.bundle import AdapterEntry
from serve.adapted import AdaptedGraph, AdapterError, Family, families_in, family_of
from serve.bank import Bank, BankArrays, PagedAdapter
from serve.engine import LiveHead
from serve.heads import Head
from serve.onnx_session import open_session
from serve.paging import AdapterMemory
from serve.residency import AdaptersTooLargeError
from tests.serve.graphs import LABELS, constant_head
from tests.serve.harness import until
from tests.serve.specialised import SpecialisedTrunk

HEAD = Head(open_session(constant_head([0, 0, 0])), LABELS, "softmax", 1.0)
SSF = AdapterEntry(kind="ssf")
NUM_MAPS = 2

Families = dict[Family, AdaptedGraph]
Weights = dict[str, NDArray[np.float32]]
Make = Callable[..., AdapterMemory]


@pytest.fixture(scope="module")
def families(small_trunk: SpecialisedTrunk) -> Families:
    """The graph's two families."""
    return families_in(small_trunk.files["trunk_adapted.onnx"])


@pytest.fixture
def make_memory(families: Families) -> Iterator[Make]:
    """Makes memories with room for so many scale-and-shift adapters."""
    made: list[AdapterMemory] = []

    def make(
        num_slots: int, *pinned: str, wake: Callable[[], None] = lambda: None
    ) -> AdapterMemory:
        memory = AdapterMemory(families, budget_bytes=num_slots * slot_bytes(families, SSF))
        memory.connect(wake, lambda task: task in pinned)
        made.append(memory)
        return memory

    yield make
    for memory in made:
        memory.close()


def slot_bytes(families: Families, entry: AdapterEntry) -> int:
    """What one adapter takes."""
    shapes = families[family_of(entry)].slot_shapes(entry.width).values()
    return sum(4 * int(np.prod(shape)) for shape in shapes)


def weights_of(families: Families, entry: AdapterEntry, value: float) -> Weights:
    """An adapter whose weights are all one number, by which it is known again."""
    shapes = families[family_of(entry)].slot_shapes(entry.width)
    return {n: np.full(s, value, np.float32) for n, s in shapes.items() if n != "slope"}


def live(task: str, adapter: PagedAdapter | None) -> LiveHead:
    """A head with an adapter."""
    return LiveHead(task, 1, "sha256:" + 64 * "0", HEAD, adapter=adapter)


class Tasks:
    """Tasks a, b, c, ... with an adapter each, whose weights are 1, 2, 3, ..."""

    def __init__(
        self, memory: AdapterMemory, families: Families, number: int, entry: AdapterEntry = SSF
    ) -> None:
        self.memory = memory
        self.heads: list[LiveHead] = []
        for place in range(number):
            task = chr(ord("a") + place)
            adapter = memory.add(task, entry, weights_of(families, entry, place + 1.0))
            self.heads.append(live(task, adapter))

    def __getitem__(self, names: str) -> list[LiveHead]:
        return [head for head in self.heads if head.task in names]

    @property
    def resident(self) -> str:
        """Names of those in memory."""
        return "".join(h.task for h in self.heads if h.adapter and h.adapter.slot is not None)

    def use(self, names: str) -> None:
        """Pin and unpin, waiting until they are there."""
        until(lambda: self.memory.pin(self[names]))
        self.memory.unpin(self[names])


def in_bank(adapter: PagedAdapter) -> Weights:
    """What the bank holds for an adapter."""
    assert adapter.slot is not None
    arrays = adapter.bank._arrays
    assert isinstance(arrays, BankArrays)
    return {name: array[adapter.slot] for name, array in arrays.arrays.items()}


def test_the_least_recently_used_leaves(make_memory: Make, families: Families) -> None:
    """Room for three of five."""
    tasks = Tasks(make_memory(3), families, 5)
    assert tasks.resident == "abc"
    tasks.use("a")
    tasks.use("d")  # b is the oldest
    assert tasks.resident == "acd"
    tasks.use("be")  # both come back together, and c and a leave
    assert tasks.resident == "bde"


def test_who_comes_back_is_who_left(make_memory: Make, families: Families) -> None:
    """Its own weights, from disk, in whatever slot."""
    tasks = Tasks(make_memory(2), families, 6)
    for names in ("f", "a", "cd", "e", "b", "fa"):
        tasks.use(names)
        for head in tasks[names]:
            assert head.adapter is not None
            number = ord(head.task) - ord("a") + 1.0
            assert all((values == number).all() for values in in_bank(head.adapter).values())


def test_one_in_use_never_leaves_and_whoever_waits_comes_in_after_it(
    make_memory: Make, families: Families
) -> None:
    """A job of c waits while a and b run."""
    woken = threading.Event()
    memory = make_memory(2, wake=woken.set)
    tasks = Tasks(memory, families, 3)
    assert memory.pin(tasks["ab"])
    assert not memory.pin(tasks["c"])
    assert not woken.wait(0.2)
    assert tasks.resident == "ab"
    memory.unpin(tasks["ab"])

    assert woken.wait(5)
    assert memory.pin(tasks["c"])
    memory.unpin(tasks["c"])


def test_a_pinned_task_never_leaves(make_memory: Make, families: Families) -> None:
    """However long ago it was used."""
    tasks = Tasks(make_memory(2, "a"), families, 4)
    for names in "bcdbcd":
        tasks.use(names)
        assert "a" in tasks.resident


def test_when_pinned_tasks_fill_the_memory_others_wait(
    make_memory: Make, families: Families
) -> None:
    """Until their callers' deadlines; nothing is thrown out for them."""
    memory = make_memory(2, "a", "b")
    tasks = Tasks(memory, families, 3)
    assert not memory.pin(tasks["c"])
    time.sleep(0.2)

    assert not memory.pin(tasks["c"])
    assert tasks.resident == "ab"


def test_one_that_finds_no_slot_keeps_nobody_behind_it(families: Families) -> None:
    """Its own bank is pinned and the other's last slot in use; there a slot before it is free."""
    lora = AdapterEntry(kind="lora", width=1)
    budget = 2 * slot_bytes(families, lora) + slot_bytes(families, SSF)
    memory = AdapterMemory(families, budget_bytes=budget)
    memory.connect(lambda: None, lambda task: task == "pinned")

    def add(task: str, entry: AdapterEntry) -> list[LiveHead]:
        return [live(task, memory.add(task, entry, weights_of(families, entry, 1.0)))]

    idle, used, pinned = add("idle", lora), add("used", lora), add("pinned", SSF)
    assert memory.pin(used)
    stuck, behind = add("stuck", SSF), add("behind", lora)
    assert not memory.pin(stuck)
    until(lambda: memory.pin(behind))

    assert not memory.pin(stuck)
    for head in (*idle, *pinned):
        assert head.adapter is not None
        assert (head.adapter.slot is None) == (head.task == "idle")
    memory.close()


def test_more_than_memory_ever_holds_is_refused(make_memory: Make, families: Families) -> None:
    """With the numbers, at once."""
    memory = make_memory(2)
    tasks = Tasks(memory, families, 3)

    with pytest.raises(AdaptersTooLargeError, match=str(3 * slot_bytes(families, SSF))):
        memory.pin(tasks["abc"])
    with pytest.raises(AdapterError, match="adapter_memory_bytes"):
        AdapterMemory(families, budget_bytes=10).add("a", SSF, weights_of(families, SSF, 1.0))


def test_a_slot_is_free_once_nobody_refers_to_its_adapter(
    make_memory: Make, families: Families
) -> None:
    """A swap drops the old version; the batch that still reads it keeps it."""
    memory = make_memory(2)
    tasks = Tasks(memory, families, 2)
    old, files = tasks.heads.pop(0), [h.adapter.file for h in tasks.heads if h.adapter]
    assert old.adapter is not None
    old_file = old.adapter.file
    assert memory.pin([old, *tasks.heads])
    new = memory.add("a", SSF, weights_of(families, SSF, 9.0))
    assert new.slot is None
    memory.unpin([old])
    del old
    gc.collect()
    newer = memory.add("a", SSF, weights_of(families, SSF, 10.0))

    assert newer.slot is not None
    assert not old_file.exists()
    assert all(file.exists() for file in files)


def test_ranks_and_families_share_one_budget(make_memory: Make, families: Families) -> None:
    """A bank that shrinks gives its memory to another; the sum stays within the budget."""
    lora = AdapterEntry(kind="lora", width=2)
    num_slots = 2 + slot_bytes(families, lora) // slot_bytes(families, SSF)
    memory = make_memory(num_slots)
    tasks = Tasks(memory, families, num_slots)
    assert len(tasks.resident) == num_slots
    adapter = memory.add("wide", lora, weights_of(families, lora, 0.5))
    assert adapter.slot is None
    until(lambda: memory.pin([live("wide", adapter)]))

    assert memory.used_bytes <= num_slots * slot_bytes(families, SSF)
    assert 0 < len(tasks.resident) < num_slots
    for head in tasks[tasks.resident]:
        assert head.adapter is not None
        number = ord(head.task) - ord("a") + 1.0
        assert all((values == number).all() for values in in_bank(head.adapter).values())
    memory.unpin([live("wide", adapter)])
    tasks.use("a")  # and back again
    assert memory.used_bytes <= num_slots * slot_bytes(families, SSF)


def test_memory_that_is_given_back_is_that_of_the_last_slots() -> None:
    """Those before keep what they hold; those after are empty, and the process is smaller."""
    num_slots, values = 4000, np.arange(2500, dtype=np.float32)
    arrays = BankArrays({"site/scale": values.shape}, num_slots)
    for slot in range(num_slots):
        arrays.write(slot, {"site/scale": values + slot})
    resident = psutil.Process().memory_info().rss
    arrays.release_from(1001)
    released = resident - psutil.Process().memory_info().rss

    held = arrays.arrays["site/scale"]
    for slot in (0, 1, 500, 1000):
        np.testing.assert_array_equal(held[slot], values + slot)
    assert not held[1003:].any()
    assert released > 0.9 * 4 * len(values) * 2998


def test_a_damaged_file_fails_its_own_task_only(make_memory: Make, families: Families) -> None:
    """The thread goes on, and the slot is not lost."""
    memory = make_memory(1)
    tasks = Tasks(memory, families, 3)
    (broken,) = tasks["b"]
    assert broken.adapter is not None
    broken.adapter.file.write_bytes(b"nothing")
    assert not memory.pin([broken])
    tasks.use("c")

    assert memory.is_alive
    assert tasks.resident == "c"


def test_batches_read_their_own_slots_while_others_are_written(
    make_memory: Make, families: Families
) -> None:
    """One job pinned throughout; the rest of the bank is paged in and out beside it."""
    memory = make_memory(3)
    tasks = Tasks(memory, families, 8)
    assert memory.pin(tasks["a"])
    (head,) = tasks["a"]
    assert head.adapter is not None
    bank: Bank = head.adapter.bank
    maps = np.random.default_rng(0).normal(size=(NUM_MAPS, 64, 8, 8)).astype(np.float32)
    images, slots = np.arange(NUM_MAPS), np.full(NUM_MAPS, head.adapter.slot)
    before = bank.features(maps, images, slots)
    stop = threading.Event()

    def page() -> None:
        for number in range(400):
            tasks.use("bcdefgh"[number % 7])
        stop.set()

    pager = threading.Thread(target=page)
    pager.start()
    runs = 0
    while not stop.is_set() or runs == 0:
        np.testing.assert_array_equal(bank.features(maps, images, slots), before)
        runs += 1
    pager.join()


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from("pu"), st.text("abcdefg", min_size=1, max_size=3))))
def test_any_order_of_jobs_keeps_the_budget_and_the_weights(
    families: Families, steps: Sequence[tuple[str, str]]
) -> None:
    """Pinned adapters are in memory with their own weights; memory never exceeds the budget."""
    budget = 4 * slot_bytes(families, SSF)
    memory = AdapterMemory(families, budget_bytes=budget)
    try:
        tasks = Tasks(memory, families, 7)
        pinned: list[list[LiveHead]] = []
        for step, names in steps:
            if step == "u" and pinned:
                memory.unpin(pinned.pop(0))
            elif memory.pin(tasks[names]):
                pinned.append(tasks[names])
            assert memory.used_bytes <= budget
            for head in (head for job in pinned for head in job):
                assert head.adapter is not None
                number = ord(head.task) - ord("a") + 1.0
                assert all((values == number).all() for values in in_bank(head.adapter).values())
    finally:
        memory.close()
