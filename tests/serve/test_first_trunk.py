"""A trunk folder goes into the store once; whoever needs a trunk waits until the log names one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from export.bundle import TRUNK_GRAPH, TRUNK_MANIFEST, TrunkManifest, entry_of
from serve import first_trunk
from serve.first_trunk import OtherTrunkError, store_folder, wait_for_trunk
from serve.headlog import HeadLog
from serve.record import LogView, Record
from serve.trunks import load_trunk_manifest
from tests.serve.conftest import trunk_graph


def write_record(log: HeadLog, folder: Path) -> None:
    """What a conductor writes when a trunk is installed."""
    log.put_record(
        Record(
            number=1,
            kind="commit",
            previous=LogView().tip,
            writer="test",
            written_at="",
            trunk=store_folder(log, folder),
        )
    )


def test_a_folder_that_is_stored_changes_nothing_until_a_record_names_it(
    tmp_path: Path, trunk_folder: Path, trunk_manifest: TrunkManifest
) -> None:
    """Its files are there to be loaded; the log is the conductor's to write."""
    log = HeadLog(str(tmp_path / "store"))
    stored = store_folder(log, trunk_folder)

    assert log.follow(LogView()) == LogView()
    assert load_trunk_manifest(log, stored) == trunk_manifest


def test_another_trunk_than_the_logs_is_refused_with_both_names(
    trunk_log: HeadLog, tmp_path: Path, trunk_manifest: TrunkManifest
) -> None:
    """Nothing of it is stored."""
    other = tmp_path / "other"
    other.mkdir()
    files = {TRUNK_GRAPH: entry_of(trunk_graph(scale=1.0))}
    manifest = trunk_manifest.model_copy(update={"files": files})
    (other / TRUNK_GRAPH).write_bytes(trunk_graph(scale=1.0))
    (other / TRUNK_MANIFEST).write_text(manifest.model_dump_json())
    before = sorted((tmp_path / "store").rglob("*"))

    with pytest.raises(OtherTrunkError) as error:
        store_folder(trunk_log, other)
    assert trunk_manifest.digest in str(error.value)
    assert manifest.digest in str(error.value)
    assert sorted((tmp_path / "store").rglob("*")) == before


def test_who_needs_a_trunk_waits_until_the_log_names_one(
    tmp_path: Path, trunk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for its files, which may be there without a record; and what it waits for is logged."""
    monkeypatch.setattr(first_trunk, "CHECK_S", 0.01)
    looked = threading.Event()

    def look(*_: object) -> None:
        looked.set()

    monkeypatch.setattr(first_trunk.logger, "warning", look)
    log = HeadLog(str(tmp_path / "store"))
    store_folder(log, trunk_folder)
    waiting = threading.Thread(target=wait_for_trunk, args=(log.url,))
    waiting.start()
    has_looked = looked.wait(10)
    is_waiting = waiting.is_alive()
    write_record(log, trunk_folder)
    waiting.join(10)

    assert has_looked
    assert is_waiting
    assert not waiting.is_alive()
