"""A replica's start: what it loads, and that it says how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from export.bundle import Bundle
from serve import loading
from serve.engine import Engine
from serve.headlog import HeadLog
from serve.loading import HeadLoader
from serve.record import LogView, Record, TaskChange
from tests.serve.faulty import SLOW_S, FaultyServer

TASKS = ("colours", "forms", "sizes")


def test_every_live_head_is_loaded_with_progress(
    tmp_path: Path,
    make_bundle: Callable[..., Bundle],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
) -> None:
    """Each under its task, version and bundle; a line after every second one and the last."""
    log = HeadLog(str(tmp_path))
    bundles = {task: make_bundle(task, seed=seed) for seed, task in enumerate(TASKS)}
    changes = tuple(
        TaskChange(
            task=task,
            version=1,
            action="push",
            bundle=log.put_bundle(bundle),
            labels=bundle.manifest.labels,
        )
        for task, bundle in bundles.items()
    )
    log.put_record(
        Record(
            number=1,
            kind="commit",
            previous=LogView().tip,
            writer="test",
            written_at="now",
            changes=changes,
        )
    )
    monkeypatch.setattr(loading, "LOG_EVERY_HEADS", 2)
    loader = HeadLoader(log, engine, adapter_memory_bytes=1, picture_s=1.0)
    with caplog.at_level(logging.INFO, logger=loading.__name__):
        heads = loader.load_all(log.follow(LogView()))
    loader.adapters.close()

    assert {task: head.bundle for task, head in heads.items()} == {
        task: bundle.digest for task, bundle in bundles.items()
    }
    assert caplog.messages == ["loaded 2 of 3 heads", "loaded 3 of 3 heads"]


def test_heads_of_a_bucket_are_not_fetched_one_round_trip_after_another(
    faulty: FaultyServer, s3_url: str, make_bundle: Callable[..., Bundle], engine: Engine
) -> None:
    """Each answer takes 0.4 s, and each head needs two; twenty-four take a few of those."""
    log = HeadLog(s3_url)
    changes = tuple(
        TaskChange(
            task=f"task{seed}",
            version=1,
            action="push",
            bundle=log.put_bundle(bundle := make_bundle(f"task{seed}", seed=seed)),
            labels=bundle.manifest.labels,
        )
        for seed in range(24)
    )
    log.put_record(
        Record(
            number=1,
            kind="commit",
            previous=LogView().tip,
            writer="test",
            written_at="now",
            changes=changes,
        )
    )
    view = log.follow(LogView())
    loader = HeadLoader(log, engine, adapter_memory_bytes=1, picture_s=1.0)
    faulty.plan("slow", times=1e6)
    began_s = time.monotonic()
    heads = loader.load_all(view)
    took_s = time.monotonic() - began_s
    loader.adapters.close()

    assert len(heads) == 24
    assert took_s < 5 * SLOW_S  # the 8 threads of a folder would take 6
