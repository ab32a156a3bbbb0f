"""What a process may use, what it uses, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from export.bundle import TrunkManifest
from serve import memory
from tests.serve.specialised import SpecialisedTrunk

GIB = 2**30


def test_a_containers_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1 where there is no version 2; a limit above what the machine has is none."""
    v2, v1 = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(memory, "LIMIT_FILES", (v2, v1))
    physical = psutil.virtual_memory().total
    nothing = memory.limit_bytes()
    v1.write_text("9223372036854771712\n")
    huge = memory.limit_bytes()
    v2.write_text("max\n")
    unlimited = memory.limit_bytes()
    v2.write_text("1073741824\n")

    assert nothing == huge == unlimited == physical
    assert memory.limit_bytes() == GIB
    assert memory.replica_bytes(2) == pytest.approx(0.4 * GIB, abs=2)


def test_what_a_process_uses_is_what_the_system_says() -> None:
    """And it grows by what is allocated."""
    before = memory.used_bytes()
    held = np.ones(50_000_000, np.uint8)
    after = memory.used_bytes()

    assert after == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert after - before == pytest.approx(len(held), rel=0.2)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    """One byte decides."""
    used = memory.used_bytes()
    memory.check_room(GIB, used + 2 * GIB)
    with pytest.raises(memory.MemoryShortError, match="needs about 1024 MiB beside"):
        memory.check_room(GIB, used + GIB // 2)


def test_a_trunk_with_adapter_sites_needs_more(
    small_trunk: SpecialisedTrunk, trunk_manifest: TrunkManifest
) -> None:
    """A second session, and the adapters that are there."""
    plain = memory.trunk_bytes(trunk_manifest, "fp32", adapters_bytes=0)
    adapted = memory.trunk_bytes(small_trunk.manifest, "fp32", adapters_bytes=0)

    assert plain > memory.SESSION_BYTES
    assert adapted > 2 * memory.SESSION_BYTES
    assert memory.trunk_bytes(trunk_manifest, "fp32", adapters_bytes=7) == plain + 7
