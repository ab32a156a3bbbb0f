"""Trunks of other families are served with heads, adapters and tails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.backbones import Backbone
from serve import contender, gates
from serve.engine import LiveHead, Row
from serve.paging import AdapterMemory
from tests.families import small_vgg, small_vit
from tests.serve.specialised import SpecialisedTrunk, some_pictures

PICTURES = some_pictures(3, seed=2)


@pytest.mark.parametrize(("build", "map_shape"), [(small_vit, (17, 16)), (small_vgg, (16, 2, 2))])
def test_heads_adapters_and_tails_are_served_as_pytorch_computes_them(
    build: Callable[[], Backbone], map_shape: tuple[int, ...], tmp_path: Path
) -> None:
    """In one batch; the gates admit each, and a tail takes tokens as well as maps."""
    trunk = SpecialisedTrunk(tmp_path, build())
    engine = trunk.engine()
    memory = AdapterMemory(engine.families, budget_bytes=2**22)
    tasks = {
        "head": trunk.with_head("head", 1),
        "ssf": trunk.with_adapter("ssf", "ssf", 2),
        "bias": trunk.with_adapter("bias", "bias", 3),
        "tail": trunk.with_tail("tail", 4),
    }
    if "low_rank" in engine.families:
        tasks["lora"] = trunk.with_adapter("lora", "lora", 5)
    live: list[LiveHead] = []
    for name, task in tasks.items():
        verdicts = gates.admit(task.bundle, engine, max_head_bytes=2**24)
        assert [verdict.reason for verdict in verdicts if not verdict.passed] == []
        entry = task.bundle.manifest.adapter
        adapter = memory.add(name, entry, contender.read_adapter(task.bundle)) if entry else None
        head = contender.load_head(task.bundle)
        live.append(LiveHead(name, 1, task.bundle.digest, head, adapter=adapter))
    assert memory.pin(live)

    rows = [Row(picture, head) for picture in range(len(PICTURES)) for head in live]
    answers = engine.run(PICTURES, rows)

    assert engine.prefix_shape == map_shape
    for row, answer in zip(rows, answers, strict=True):
        truth = tasks[row.head.task].truth(PICTURES)[row.image_of]
        assert isinstance(answer, np.ndarray), answer
        np.testing.assert_allclose(answer, truth, atol=1e-5)
        (alone,) = engine.run(PICTURES[[row.image_of]], [Row(0, row.head)])
        assert isinstance(alone, np.ndarray), alone
        np.testing.assert_allclose(answer, alone, atol=1e-6)
    memory.close()
