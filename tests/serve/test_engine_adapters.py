"""Heads, adapters of every kind, and tails in one batch, against PyTorch and each row alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from serve import contender, gates
from serve.engine import Engine, LiveHead, Row
from serve.paging import AdapterMemory
from tests.serve.specialised import Specialised, SpecialisedTrunk, some_pictures

PICTURES = some_pictures(6, seed=2)


@pytest.fixture(scope="module")
def engine(small_trunk: SpecialisedTrunk) -> Engine:
    """The trunk with its adapted graph."""
    return small_trunk.engine()


@pytest.fixture(scope="module")
def memory(engine: Engine) -> Iterator[AdapterMemory]:
    """Room for all adapters."""
    memory = AdapterMemory(engine.families, budget_bytes=2**24)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def tasks(small_trunk: SpecialisedTrunk) -> dict[str, Specialised]:
    """Every size of specialisation, ranks that share a bank and that do not."""
    return {
        "head": small_trunk.with_head("head", 1),
        "other-head": small_trunk.with_head("other-head", 2),
        "lora": small_trunk.with_adapter("lora", "lora", 3, width=3),
        "lora-rank-4": small_trunk.with_adapter("lora-rank-4", "lora", 4, width=4),
        "lora-rank-8": small_trunk.with_adapter("lora-rank-8", "lora", 5, width=8),
        "adapter": small_trunk.with_adapter("adapter", "adapter", 6, width=4),
        "ssf": small_trunk.with_adapter("ssf", "ssf", 7),
        "bias": small_trunk.with_adapter("bias", "bias", 8),
        "tail": small_trunk.with_tail("tail", 9),
        "other-tail": small_trunk.with_tail("other-tail", 10),
    }


@pytest.fixture(scope="module")
def live(tasks: dict[str, Specialised], memory: AdapterMemory) -> dict[str, LiveHead]:
    """The tasks, loaded and in memory."""
    heads: dict[str, LiveHead] = {}
    for name, task in tasks.items():
        entry = task.bundle.manifest.adapter
        adapter = memory.add(name, entry, contender.read_adapter(task.bundle)) if entry else None
        head = contender.load_head(task.bundle)
        heads[name] = LiveHead(name, 1, task.bundle.digest, head, adapter=adapter)
    assert memory.pin(list(heads.values()))
    return heads


@pytest.mark.parametrize("num_rows", [1, 3, 12, 40])
def test_any_mixture_is_each_row_alone_bit_for_bit_and_pytorch(
    engine: Engine, tasks: dict[str, Specialised], live: dict[str, LiveHead], num_rows: int
) -> None:
    """Random rows over six pictures and ten tasks."""
    chance = np.random.default_rng(num_rows)
    asked = [(int(chance.integers(6)), str(chance.choice(list(live)))) for _ in range(num_rows)]
    together = engine.run(PICTURES, [Row(picture, live[task]) for picture, task in asked])

    for (picture, task), got in zip(asked, together, strict=True):
        (alone,) = engine.run(PICTURES[[picture]], [Row(0, live[task])])
        truth = tasks[task].truth(PICTURES[[picture]])[0]
        assert isinstance(got, np.ndarray), got
        np.testing.assert_array_equal(got, alone)
        np.testing.assert_allclose(got, truth, atol=1e-5)


def test_adapters_and_tails_change_the_answer(tasks: dict[str, Specialised]) -> None:
    """So that the test above cannot pass without them."""
    answers = [task.truth(PICTURES) for task in tasks.values()]

    for one, other in itertools.combinations(answers, 2):
        assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("name", ["head", "lora", "adapter", "ssf", "bias", "tail"])
def test_the_gates_admit_every_size(
    engine: Engine, tasks: dict[str, Specialised], name: str
) -> None:
    """And say what they saw."""
    verdicts = gates.admit(tasks[name].bundle, engine, max_head_bytes=2**24)

    assert [v.reason for v in verdicts if not v.passed] == []
    assert ("adapter" in [v.gate for v in verdicts]) == (name not in {"head", "tail"})
