"""Garbage of a head log: what nothing refers to and is old goes, and nothing else ever does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.bundle import Bundle, digest_of, read_manifest
from serve import garbage as collecting
from serve.garbage import find_garbage, remove
from serve.headlog import HeadLog, blob_name
from serve.messages import Refused
from serve.record import Candidate, HeldoutChange, LogView, Record, TaskChange
from serve.references import referenced
from serve.store import StoreError
from serve.trust import SignedBy
from tests.serve.conftest import trunk_graph
from tests.serve.harness import LocalFleet
from tests.serve.oracle import Heads

GRACE = timedelta(days=7)
OLD = timedelta(days=8)


def _record(log: HeadLog, **fields: object) -> Record:
    view = log.follow(LogView())
    return Record.model_validate(
        {
            "number": view.number + 1,
            "kind": "commit",
            "previous": view.tip,
            "writer": "test",
            "written_at": "",
            **fields,
        }
    )


def push(log: HeadLog, bundle: Bundle, version: int, task: str = "colours") -> None:
    """A push, as the log sees it."""
    change = TaskChange(
        task=task,
        version=version,
        action="push",
        bundle=log.put_bundle(bundle),
        labels=bundle.manifest.labels,
    )
    log.put_record(_record(log, changes=(change,)))


def age(log: HeadLog, by: timedelta = OLD) -> None:
    """Let everything in the store be older."""
    for path in Path(log.url).rglob("*"):
        if path.is_file():
            written_s = path.stat().st_mtime - by.total_seconds()
            os.utime(path, (written_s, written_s))


def blobs(log: HeadLog) -> set[str]:
    """The names of all blobs there are."""
    return {stored.name for stored in log.store.list("blobs/")}


def collect(log: HeadLog, grace: timedelta = GRACE) -> list[str]:
    """Find and remove; the names of what was removed."""
    removed = remove(log, find_garbage(log, grace=grace), grace=grace, progress=lambda _: None)
    return [one.name for one in removed]


def names_of(bundle: Bundle) -> set[str]:
    """Where the blobs of a bundle lie."""
    return {blob_name(digest_of(data)) for data in (bundle.manifest_bytes, *bundle.files.values())}


def test_what_no_record_refers_to_goes_and_all_else_stays(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Live, historic and the trunk's blobs stay; those of a push that never was go."""
    push(trunk_log, make_bundle(seed=1), 1)
    push(trunk_log, make_bundle(seed=2), 2)
    sample = trunk_log.put_blob(b"a held-out sample")
    exam = HeldoutChange(task="colours", labels=("a",), heldout=sample)
    trunk_log.put_record(_record(trunk_log, heldout=(exam,)))
    retirement = TaskChange(task="colours", version=3, action="retire", labels=())
    trunk_log.put_record(_record(trunk_log, changes=(retirement,)))
    kept = blobs(trunk_log)
    trunk_log.put_bundle(make_bundle(seed=3))
    trunk_log.put_blob(b"nobody's")
    age(trunk_log)
    removed = collect(trunk_log)

    assert set(removed) == (names_of(make_bundle(seed=3)) | {blob_name(digest_of(b"nobody's"))})
    assert blobs(trunk_log) == kept
    assert collect(trunk_log) == []


def test_a_candidate_stays(trunk_log: HeadLog, make_bundle: Callable[..., Bundle]) -> None:
    """During a rollout, and after it was undone; its signature too."""
    push(trunk_log, make_bundle(seed=1), 1)
    candidate = make_bundle(seed=2)
    envelope = trunk_log.put_blob(b"its signature")
    signed = SignedBy(key_id="0" * 64, signed_at=datetime.now(UTC), envelope=envelope)
    change = TaskChange(
        task="colours",
        version=2,
        action="canary",
        bundle=make_bundle(seed=1).digest,
        labels=candidate.manifest.labels,
        candidate=Candidate(
            bundle=trunk_log.put_bundle(candidate),
            labels=candidate.manifest.labels,
            share=0.1,
            signed=signed,
        ),
    )
    trunk_log.put_record(_record(trunk_log, changes=(change,)))
    age(trunk_log)

    assert collect(trunk_log) == []


def test_what_is_young_stays(trunk_log: HeadLog) -> None:
    """A push that is on its way has stored what no record refers to yet."""
    age(trunk_log)
    young = blob_name(trunk_log.put_blob(b"nobody's"))

    assert collect(trunk_log) == []
    assert young in blobs(trunk_log)
    assert collect(trunk_log, timedelta(0)) == [young]


def test_what_is_stored_again_while_garbage_is_collected_stays(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """It was old when it was found; a push of the same bundle has made it young since."""
    bundle = make_bundle(seed=3)
    trunk_log.put_bundle(bundle)
    age(trunk_log)
    found = find_garbage(trunk_log, grace=GRACE)
    push(trunk_log, bundle, 1)
    removed = remove(trunk_log, found, grace=GRACE, progress=lambda _: None)

    assert len(found) == 4
    assert removed == []
    assert trunk_log.get_bundle(bundle.digest) == bundle


def test_a_push_whose_blobs_are_removed_under_it_is_refused_and_works_again(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one moment that the collector's last look leaves: before the bundle is staged."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1, swap_stage_s=0.2) as fleet:
        fleet.must_push(heads(1))
        put_bundle = fleet.log.put_bundle

        def put_and_lose(bundle: Bundle) -> str:
            digest = put_bundle(bundle)
            fleet.log.store.delete(blob_name(digest_of(bundle.files["head.onnx"])), "it")
            return digest

        monkeypatch.setattr(fleet.log, "put_bundle", put_and_lose)
        refused = fleet.push(heads(2))
        monkeypatch.undo()
        live = fleet.live_versions("colours")

        assert isinstance(refused, Refused)
        assert live == {1}
        assert fleet.must_push(heads(2)) == 2


def test_nothing_goes_while_something_cannot_be_read(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """A manifest that is lost or damaged named files that nobody knows any more."""
    bundle = make_bundle(seed=1)
    push(trunk_log, bundle, 1)
    trunk_log.put_blob(b"nobody's")
    age(trunk_log)
    before = blobs(trunk_log)
    trunk_log.store.put(blob_name(bundle.digest), b"damaged", "it")

    with pytest.raises(StoreError, match=f"Blob {bundle.digest} .* is damaged"):
        collect(trunk_log)
    assert blobs(trunk_log) == before


def test_a_place_without_a_log_is_left_alone(tmp_path: Path) -> None:
    """A wrong URL must not make garbage of everything there."""
    log = HeadLog(str(tmp_path))
    log.put_blob(b"somebody's")
    age(log)

    with pytest.raises(StoreError, match="There is no head log in"):
        collect(log)


def test_only_blobs_are_garbage(trunk_log: HeadLog) -> None:
    """Other things in the store are not this command's."""
    for name in ("blobs/sha256/short", "blobs/notes", "log/notes", "else"):
        trunk_log.store.put(name, b"", "it")
    age(trunk_log)

    assert collect(trunk_log) == []


def test_ages_are_the_stores_and_not_this_machines(
    trunk_log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose clock is a year ahead takes nothing for old."""
    trunk_log.put_blob(b"nobody's")
    monkeypatch.setattr(time, "time", lambda: time.monotonic() + 4e9)

    assert find_garbage(trunk_log, grace=GRACE) == []
    (young,) = find_garbage(trunk_log, grace=timedelta(0))
    assert young.age_s < 10


def test_progress_counts_to_the_end(trunk_log: HeadLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps, however much there is."""
    monkeypatch.setattr(collecting, "AT_ONCE", 2)
    for number in range(5):
        trunk_log.put_blob(f"nobody's {number}".encode())
    age(trunk_log)
    counted: list[int] = []
    remove(trunk_log, find_garbage(trunk_log, grace=GRACE), grace=GRACE, progress=counted.append)

    assert counted == [2, 4, 5]


def test_garbage_of_a_bucket_goes_too(s3_url: str, make_bundle: Callable[..., Bundle]) -> None:
    """By the age that S3 says, in seconds."""
    log = HeadLog(s3_url)
    push(log, make_bundle(seed=1), 1)
    kept = blobs(log)
    orphan = blob_name(log.put_blob(b"nobody's"))
    time.sleep(2.1)

    assert collect(log, timedelta(hours=1)) == []
    assert collect(log, timedelta(seconds=1)) == [orphan]
    assert blobs(log) == kept


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.booleans()), max_size=12))
def test_whatever_was_pushed_can_be_read_after_a_collection(
    tmp_path_factory: pytest.TempPathFactory,
    make_bundle: Callable[..., Bundle],
    pushes: list[tuple[str, int, bool]],
) -> None:
    """By brute force: every bundle that a record names comes back whole, all others are gone."""
    log = HeadLog(str(tmp_path_factory.mktemp("log")))
    log.put_record(_record(log))
    committed: list[Bundle] = []
    for task, seed, is_committed in pushes:
        bundle = make_bundle(task, seed=seed)
        log.put_bundle(bundle)
        if is_committed:
            push(log, bundle, 1, task)
            committed.append(bundle)
    age(log)
    collect(log)

    for bundle in committed:
        assert log.get_bundle(bundle.digest) == bundle
    assert blobs(log) == set().union(*map(names_of, committed), set())


def test_a_signature_belongs_to_the_version_that_it_admitted(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """It is no file of the bundle: the record names it."""
    envelope = trunk_log.put_blob(b"an envelope")
    signed = SignedBy(key_id="0" * 64, signed_at=datetime.now(UTC), envelope=envelope)
    bundle = make_bundle(seed=1)
    change = TaskChange(
        task="colours",
        version=1,
        action="push",
        bundle=trunk_log.put_bundle(bundle),
        labels=bundle.manifest.labels,
        signed=signed,
    )
    trunk_log.put_record(_record(trunk_log, changes=(change,)))
    age(trunk_log)

    assert collect(trunk_log) == []
    assert referenced(trunk_log.read_records(0), trunk_log.get_blobs)[envelope] == (
        "signature.json of version 1 of colours"
    )


def test_every_blob_that_is_referred_to_is_named_with_what_it_is(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Manifests and their files, of bundles and of the trunk."""
    bundle = make_bundle(seed=1)
    push(trunk_log, bundle, 1)
    named = referenced(trunk_log.read_records(0), trunk_log.get_blobs)
    files = read_manifest(bundle.manifest_bytes).files

    assert named[bundle.digest] == "manifest.json of version 1 of colours"
    assert {named[f"sha256:{files[name].sha256}"] for name in files} == {
        f"{name} of version 1 of colours" for name in ("head.onnx", "golden.safetensors", "card.md")
    }
    assert named[digest_of(trunk_graph())] == "trunk.onnx of the trunk"
    assert len(named) == 6
