"""Banks in a device's memory, against those in the process's; the CPU is a device here as well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from export.bundle import AdapterEntry
from serve import adapted, bank, devices
from serve.adapted import AdaptedGraph, AdapterError, Family
from serve.bank import Bank, BankArrays
from serve.device_arrays import DeviceArrays
from serve.engine import LiveHead
from serve.onnx_session import Device, open_session
from serve.paging import AdapterMemory, PagedAdapter
from serve.residency import AdaptersTooLargeError
from tests.serve.stepped import HEAD

CHANNELS = 3
SHAPES = {"site/scale": (CHANNELS,), "site/shift": (CHANNELS,)}
MAPS = np.random.default_rng(0).normal(size=(4, CHANNELS, 2, 2)).astype(np.float32)
NUM_SLOTS = 5
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not devices._num_gpus(), reason="NVIDIA's driver shows no GPU here"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    """Where the arrays are that are tested."""
    return devices.choose_device(request.param)


def adapted_graph() -> bytes:
    """Two families at one site: means of maps, changed by the row's own slot."""

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def node(operator: str, inputs: str, output: str) -> Any:
        return helper.make_node(operator, inputs.split(), [output])

    rows = [
        node(f"{kind}", f"{name} {of}", f"row {name}".replace(" ", "_"))
        for kind, name, of in (
            ("Gather", "prefix", "image_of"),
            *(("Gather", name, "slot_of") for name in (*SHAPES, "site/down", "site/up", "slope")),
        )
    ]
    nodes = [
        *rows,
        node("ReduceMean", "row_prefix axes", "mean"),
        node("Mul", "mean row_site/scale", "scaled"),
        node("Add", "scaled row_site/shift", "scale_shift"),
        node("Unsqueeze", "mean last", "column"),
        node("MatMul", "row_site/down column", "hidden"),
        node("MatMul", "row_site/up hidden", "change"),
        node("Squeeze", "change last", "flat"),
        node("Mul", "flat row_slope", "sloped"),
        node("Add", "mean sloped", "low_rank"),
    ]
    floats, ints = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "adapted",
        [
            value("prefix", floats, "batch", CHANNELS, 2, 2),
            value("image_of", ints, "rows"),
            value("slot_of", ints, "rows"),
            *(value(name, floats, "slots", *shape) for name, shape in SHAPES.items()),
            value("site/down", floats, "slots", "width", CHANNELS),
            value("site/up", floats, "slots", CHANNELS, "width"),
            value("slope", floats, "slots", 1),
        ],
        [value(name, floats, "rows", CHANNELS) for name in ("scale_shift", "low_rank")],
        [
            numpy_helper.from_array(np.array([2, 3]), "axes"),
            numpy_helper.from_array(np.array([2]), "last"),
        ],
    )
    # ReduceMean keeps its axes unless told otherwise.
    next(n for n in graph.node if n.op_type == "ReduceMean").attribute.append(
        helper.make_attribute("keepdims", 0)
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def slot(seed: int) -> dict[str, NDArray[np.float32]]:
    """Some adapter."""
    chance = np.random.default_rng(seed)
    return {name: chance.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def bank_on(device: Device) -> Bank:
    """An empty bank whose arrays are a device's, also if that is the CPU."""
    made = Bank(AdaptedGraph(adapted_graph(), "scale_shift", device), 0, max_slots=NUM_SLOTS)
    made._arrays = DeviceArrays(SHAPES, 1 + NUM_SLOTS, device)
    made.write(bank.IDENTITY, made.graph.identity(0))
    return made


Write = tuple[int, int]
WRITES = st.lists(st.tuples(st.integers(1, NUM_SLOTS), st.integers(0, 99)), min_size=1, max_size=12)
READS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, NUM_SLOTS)), min_size=1, max_size=12)


def test_features_are_those_of_a_bank_in_the_processs_memory(device: Device) -> None:
    """Bit for bit on the CPU, whatever was written, released and read between."""
    on_device = bank_on(device)

    @settings(max_examples=50, deadline=None)  # the machine may be busy
    @given(steps=st.lists(st.one_of(WRITES, READS.map(tuple)), min_size=1, max_size=8))
    def check(steps: list[list[Write] | tuple[Write, ...]]) -> None:
        in_memory = Bank(AdaptedGraph(adapted_graph(), "scale_shift"), 0, max_slots=NUM_SLOTS)
        for place in range(1, NUM_SLOTS + 1):
            for each in (in_memory, on_device):
                each.write(place, slot(place))
        for step in steps:
            if isinstance(step, list):
                for place, seed in step:
                    in_memory.write(place, slot(seed))
                    on_device.write(place, slot(seed))
                continue
            images = np.array([image for image, _ in step])
            slots = np.array([place for _, place in step])
            got, expected = (b.features(MAPS, images, slots) for b in (on_device, in_memory))
            if device == "cpu":
                np.testing.assert_array_equal(got, expected)
            np.testing.assert_allclose(got, expected, atol=1e-5)

    check()


def test_a_write_changes_one_slot_where_it_is(device: Device) -> None:
    """The tensors stay where they are, and every other slot what it is."""
    arrays = DeviceArrays(SHAPES, NUM_SLOTS, device)
    for place in range(NUM_SLOTS):
        arrays.write(place, slot(place))
    addresses = {name: array.data_ptr() for name, array in arrays.arrays.items()}
    arrays.write(2, slot(99))

    assert addresses == {name: array.data_ptr() for name, array in arrays.arrays.items()}
    for name, array in arrays.arrays.items():
        expected = [slot(99 if place == 2 else place)[name] for place in range(NUM_SLOTS)]
        np.testing.assert_array_equal(array.numpy(), np.stack(expected))


def test_a_write_takes_as_long_in_a_bank_of_any_size(device: Device) -> None:
    """To copy a bank of 64 MiB takes hundreds of times as long as to write its slot of 64 KiB."""
    width = 2**14
    values = {"site/scale": np.ones(width, np.float32)}

    def seconds(num_slots: int) -> float:
        arrays = DeviceArrays({"site/scale": (width,)}, num_slots, device)
        times = []
        for _ in range(30):
            began_s = time.perf_counter()
            arrays.write(num_slots - 1, values)
            times.append(time.perf_counter() - began_s)
        return min(times)

    assert seconds(2**10) < 10 * seconds(2)


def test_a_bank_on_the_cpu_is_the_processs_own_memory() -> None:
    """Which grows slot by slot, where a device's is taken at once."""
    in_memory = Bank(AdaptedGraph(adapted_graph(), "scale_shift"), 0, max_slots=NUM_SLOTS)

    assert isinstance(in_memory._arrays, BankArrays)
    assert in_memory.used_bytes == 0
    assert bank_on("cpu").used_bytes == NUM_SLOTS * in_memory.slot_bytes == NUM_SLOTS * 24


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, device: Device) -> Iterator[AdapterMemory]:
    """Adapters of a process on a GPU: 480 bytes, where one of rank 1 takes 28 and of rank 2, 52.

    Without a GPU its sessions and its tensors are the CPU's, everything else is as on one.
    """
    if device == "cpu":
        monkeypatch.setattr(adapted, "open_session", _open_on_cpu)
        monkeypatch.setattr(bank, "DeviceArrays", _arrays_on_cpu)
    families: tuple[Family, ...] = ("low_rank", "scale_shift")
    made = AdapterMemory(
        {family: AdaptedGraph(adapted_graph(), family, "cuda") for family in families},
        budget_bytes=480,
    )
    yield made
    made.close()


def _open_on_cpu(graph: bytes, _: Device) -> InferenceSession:
    return open_session(graph)


def _arrays_on_cpu(
    shapes: Mapping[str, tuple[int, ...]], num_slots: int, _: Device
) -> DeviceArrays:
    return DeviceArrays(shapes, num_slots, "cpu")


def add(memory: AdapterMemory, rank: int, seed: int) -> PagedAdapter:
    """An adapter of a task of its own."""
    chance = np.random.default_rng(seed)
    weights = {
        "site/down": chance.normal(size=(rank, CHANNELS)).astype(np.float32),
        "site/up": chance.normal(size=(CHANNELS, rank)).astype(np.float32),
    }
    return memory.add(f"task-{seed}", AdapterEntry(kind="lora", width=rank), weights)


def heads_of(adapters: Sequence[PagedAdapter]) -> list[LiveHead]:
    """Rows' heads that need these adapters."""
    return [LiveHead(a.task, 1, f"sha256:{64 * '0'}", HEAD, adapter=a) for a in adapters]


def truth_of(adapter: PagedAdapter, rank: int, seed: int) -> NDArray[np.float32]:
    """What the graph makes of the first map, by its formula."""
    assert adapter.entry.width == rank
    chance = np.random.default_rng(seed)
    down = chance.normal(size=(rank, CHANNELS)).astype(np.float32)
    up = chance.normal(size=(CHANNELS, rank)).astype(np.float32)
    mean = MAPS[0].mean(axis=(1, 2))
    return mean + up @ (down @ mean)


def test_each_new_bank_takes_half_of_what_is_left(memory: AdapterMemory) -> None:
    """So that ranks that come later have room too: 480 -> 8 slots of 28, then 2 of 52 of 256."""
    first = add(memory, 1, seed=0)
    assert (first.bank.max_slots, memory.used_bytes) == (8, 8 * 28)
    second = add(memory, 2, seed=1)

    assert (second.bank.max_slots, memory.used_bytes) == (2, 8 * 28 + 2 * 52)


def test_a_full_bank_pages_out_its_own_and_no_other(memory: AdapterMemory) -> None:
    """Another bank's memory cannot become this one's."""
    others = [add(memory, 1, seed) for seed in range(3)]
    mine = [add(memory, 2, seed) for seed in range(3, 6)]
    assert [a.slot for a in mine] == [1, 2, None]
    wanted = heads_of(mine[2:])
    deadline_s = time.monotonic() + 10
    while not memory.pin(wanted) and time.monotonic() < deadline_s:
        time.sleep(0.001)

    assert [a.slot for a in mine] == [None, 2, 1]
    assert [a.slot for a in others] == [1, 2, 3]
    for seed, adapter in enumerate([*others, *mine]):
        if adapter.slot is not None:
            row = np.array([0])
            got = adapter.bank.features(MAPS[:1], row, np.array([adapter.slot]))[0]
            truth = truth_of(adapter, 1 if seed < 3 else 2, seed)
            np.testing.assert_allclose(got, truth, atol=1e-5)


def test_a_full_bank_whose_adapters_are_in_use_waits(memory: AdapterMemory) -> None:
    """To page out those of other banks would not help."""
    others = [add(memory, 1, seed) for seed in range(3)]
    mine = [add(memory, 2, seed) for seed in range(3, 6)]
    assert memory.pin(heads_of(mine[:2]))

    assert memory._take_slot(mine[2], may_evict=True) is None
    assert [a.slot for a in others] == [1, 2, 3]


def test_a_slot_that_a_bank_has_needs_no_memory_that_is_left(memory: AdapterMemory) -> None:
    """All banks together have taken all but 28 bytes; the second of 52 has had its place before."""
    adapters = [add(memory, rank, seed=rank) for rank in (1, 2, 4)]
    ssf = {name: np.ones(CHANNELS, np.float32) for name in SHAPES}
    adapters.append(memory.add("ssf", AdapterEntry(kind="ssf"), ssf))
    assert memory.used_bytes == 480 - 28
    adapters.append(add(memory, 2, seed=9))

    assert [a.slot for a in adapters] == [1, 1, 1, 1, 2]


def test_more_at_once_than_a_bank_holds_is_refused(memory: AdapterMemory) -> None:
    """It would wait for ever; two of them are there."""
    adapters = [add(memory, 1, seed=9), *(add(memory, 2, seed) for seed in range(3))]

    with pytest.raises(AdaptersTooLargeError, match=r"need 156 bytes .* keeps 104 "):
        memory.pin(heads_of(adapters[1:]))
    assert memory.pin(heads_of(adapters[:3]))


def test_a_rank_for_which_nothing_is_left_is_refused_with_what_to_do(
    memory: AdapterMemory,
) -> None:
    """At the push, not in front of a caller."""
    for rank in (1, 2, 4):
        add(memory, rank, seed=rank)

    with pytest.raises(AdapterError, match=r"bytes are left.*Raise adapter_memory_bytes"):
        add(memory, 8, seed=8)
