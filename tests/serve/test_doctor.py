"""`headstock doctor` and `headstock gc`: what is wrong is found, named, and its mending works."""

from __future__ import annotations

import importlib.util
import json
import resource
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from export.bundle import Bundle, digest_of
from serve import doctor_machine
from serve.cli import app
from serve.cli_store import GraceError, check_log, open_existing, parse_grace
from serve.doctor import Finding, is_healthy
from serve.headlog import HeadLog, blob_name
from serve.record import HeadLogError, LogView
from serve.store import Store, StoreError
from tests.serve.faulty import FaultyServer
from tests.serve.s3 import S3Server
from tests.serve.test_garbage import age, push
from tests.serve.test_headlog import record_name


@pytest.fixture
def full(trunk_log: HeadLog, make_bundle: Callable[..., Bundle]) -> HeadLog:
    """A log with a trunk and four pushes."""
    for version in range(1, 5):
        push(trunk_log, make_bundle(seed=version), version)
    return trunk_log


def examine(log: HeadLog, *, is_deep: bool = False) -> dict[str, list[Finding]]:
    """The findings of each check."""
    found: dict[str, list[Finding]] = {}
    for finding in check_log(log.url, is_deep=is_deep):
        found.setdefault(finding.check, []).append(finding)
    return found


def problems(log: HeadLog, *, is_deep: bool = False) -> list[str]:
    """What is said of each problem."""
    found = examine(log, is_deep=is_deep)
    return [f.says for some in found.values() for f in some if f.level == "problem"]


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_log_that_is_whole_is_said_to_be(full: HeadLog, *, is_deep: bool) -> None:
    """One line a check, and nothing is left behind."""
    before = full.store.list("")
    found = examine(full, is_deep=is_deep)

    assert list(found) == ["store", "records", "blobs", "garbage", "strangers"]
    assert all(f.level == "ok" for some in found.values() for f in some)
    assert found["records"][0].says == "5 records, each naming the one before it."
    assert ("whole" in found["blobs"][0].says) == is_deep
    assert full.store.list("") == before


def test_lost_records_are_named_each(full: HeadLog) -> None:
    """And are what a start fails with."""
    for number in (2, 4):
        full.store.delete(record_name(number), "it")
    with pytest.raises(HeadLogError, match="Record 2 is missing"):
        full.follow(LogView())

    assert problems(full) == [
        "Record 2 is missing, though record 5 is there.",
        "Record 4 is missing, though record 5 is there.",
    ]


def test_an_unreadable_record_is_named_and_so_is_what_it_hides(full: HeadLog) -> None:
    """Its bytes are none of a record, or not those that were written."""
    full.store.put(record_name(3), b"{", "it")
    spaced = full.store.get(record_name(5), "it")
    assert spaced is not None
    full.store.put(record_name(5), spaced + b" ", "it")
    said = problems(full)

    assert len(said) == 2
    assert said[0].startswith(f"Record 3 in {full.url} is not readable")
    assert said[1] == f"Record 5 in {full.url} is not as it was written."


def test_a_replaced_record_is_noticed(full: HeadLog) -> None:
    """It is a record of its number, but the one after it was written after another."""
    edited = full.store.get(record_name(3), "it")
    assert edited is not None
    full.store.put(record_name(3), edited.replace(b'"test"', b'"fool"'), "it")

    assert problems(full) == [
        "Record 4 does not name record 3 as it is: one was replaced.",
    ]


def test_a_missing_blob_is_named_with_what_it_is_and_pushing_again_mends_it(
    full: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """A historic one too: a rollback would need it."""
    bundle = make_bundle(seed=2)
    full.store.delete(blob_name(digest_of(bundle.files["head.onnx"])), "it")
    full.store.delete(blob_name(make_bundle(seed=3).digest), "it")
    said = problems(full)

    assert len(said) == 2
    assert any(s.startswith("head.onnx of version 2 of colours: Blob ") for s in said)
    assert any(s.startswith("manifest.json of version 3 of colours: Blob ") for s in said)
    full.put_bundle(bundle)
    full.put_bundle(make_bundle(seed=3))
    assert problems(full, is_deep=True) == []


def test_a_damaged_blob_is_found_by_a_deep_look_and_pushing_again_mends_it(
    full: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Its name is all that the other look goes by."""
    bundle = make_bundle(seed=2)
    name = blob_name(digest_of(bundle.files["card.md"]))
    full.store.put(name, b"not the card", "it")
    deep = problems(full, is_deep=True)

    assert problems(full) == []
    assert len(deep) == 1
    assert deep[0].startswith("card.md of version 2 of colours: Blob ")
    assert "is damaged" in deep[0]
    full.put_bundle(bundle)
    assert problems(full, is_deep=True) == []


def test_what_is_neither_record_nor_blob_is_a_warning(full: HeadLog) -> None:
    """The first twenty by name."""
    for number in range(30):
        full.store.put(f"log/notes-{number:02d}.txt", b"", "it")
    found = examine(full)["strangers"]

    assert {f.level for f in found} == {"warning"}
    assert "log/notes-00.txt is neither a record nor a blob." in found[0].says
    assert len(found) == 21
    assert "10 more" in found[-1].says
    assert is_healthy(found)


def test_garbage_is_counted_and_no_problem(full: HeadLog) -> None:
    """With the command that removes it."""
    full.put_blob(b"x" * 1_500_000)
    (found,) = examine(full)["garbage"]

    assert found.level == "ok"
    assert found.says == "1 blobs of 1.5 MB belong to no record."
    assert "headstock gc" in found.mend


def test_a_bucket_is_examined_like_a_folder(
    s3_url: str, make_bundle: Callable[..., Bundle]
) -> None:
    """Its probe is no stranger."""
    log = HeadLog(s3_url)
    push(log, make_bundle(seed=1), 1)

    assert problems(log, is_deep=True) == []
    assert examine(log)["strangers"][0].level == "ok"


def test_a_store_that_cannot_be_used_is_one_problem(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong credentials, or no such folder, which is not made either."""
    with FaultyServer(s3_server.port) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        faulty.plan("denied", times=1e6)
        (denied,) = check_log(s3_url, is_deep=False)
    (missing,) = check_log(str(tmp_path / "none"), is_deep=False)

    assert (denied.level, missing.level) == ("problem", "problem")
    assert "access is denied" in denied.says
    assert missing.says == f"There is no folder {tmp_path / 'none'}."
    assert not (tmp_path / "none").exists()


def test_a_store_that_creates_things_twice_is_a_problem(
    full: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a folder on a file system without hard links would."""

    def overwrite(store: Store, name: str, data: bytes, what: str) -> bool:
        store.put(name, data, what)
        return True

    monkeypatch.setattr(Store, "create", overwrite)

    assert "creates an object that is there already" in problems(full)[0]


def test_the_installation_is_examined_without_a_store() -> None:
    """One line for each check, as JSON with nothing beside it."""
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(ended.stdout)

    assert [one["check"] for one in told] == [
        "versions",
        "haproxy",
        "device",
        "ports",
        "learning",
        "open files",
    ]
    assert ended.exit_code == 0


def test_a_problem_is_said_with_how_to_mend_it_and_by_the_exit_code(full: HeadLog) -> None:
    """For people a line each."""
    full.store.delete(record_name(3), "it")
    ended = CliRunner().invoke(app, ["doctor", "--store", full.url])

    assert ended.exit_code == 1
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("problem")]
    assert line == (
        "problem records    Record 3 is missing, though record 5 is there. → Put it back from a "
        "copy of the log, byte for byte; no service starts without it."
    )


def test_what_is_missing_on_a_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PyTorch, HAProxy, a free port or enough open files most still works."""

    def no(*_: object) -> None:
        return None

    def few(_: int) -> tuple[int, int]:
        return 1024, 65536

    monkeypatch.setattr(importlib.util, "find_spec", no)
    monkeypatch.setattr(doctor_machine, "is_port_free", no)
    monkeypatch.setattr(resource, "getrlimit", few)

    assert doctor_machine.check_learning().level == "warning"
    assert "teach, distil, export and head" in doctor_machine.check_learning().says
    assert doctor_machine.check_ports().level == "warning"
    assert doctor_machine.check_open_files().mend == "ulimit -n 4096"


def test_two_builds_of_onnx_runtime_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """They overwrite each other's files."""

    def version(package: str) -> str:
        return "1" if "onnx" in package else ""

    monkeypatch.setattr(doctor_machine, "_version", version)

    assert doctor_machine.check_versions().level == "problem"


def test_gc_shows_first_and_then_removes(full: HeadLog) -> None:
    """A dry run removes nothing; both say the same."""
    orphan = blob_name(full.put_blob(b"nobody's"))
    age(full)
    runner = CliRunner()
    dry = runner.invoke(app, ["gc", "--store", full.url, "--dry-run", "--json"])
    there = full.store.look(orphan, "it")
    real = runner.invoke(app, ["gc", "--store", full.url, "--json"])

    assert (dry.exit_code, real.exit_code) == (0, 0)
    assert json.loads(dry.stdout)["removed"] == []
    assert [one["name"] for one in json.loads(dry.stdout)["found"]] == [orphan]
    assert there is not None
    assert [one["name"] for one in json.loads(real.stdout)["removed"]] == [orphan]
    assert full.store.look(orphan, "it") is None
    assert problems(full, is_deep=True) == []


def test_gc_shows_a_table(full: HeadLog) -> None:
    """What, bytes, and age."""
    full.put_blob(b"nobody's")
    age(full)
    ended = CliRunner().invoke(app, ["gc", "--store", full.url], env={"COLUMNS": "120"})

    assert ended.exit_code == 0
    assert blob_name(digest_of(b"nobody's"))[:40] in ended.stdout
    assert "8.0" in ended.stdout
    assert "1 blobs, 8 bytes: removed" in ended.stdout


@pytest.mark.parametrize(
    ("text", "span"), [("7d", timedelta(7)), ("12h", timedelta(hours=12)), ("2w", timedelta(14))]
)
def test_a_time_of_grace_is_a_number_and_a_unit(text: str, span: timedelta) -> None:
    """As people write it."""
    assert parse_grace(text) == span


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5d", "7 d", "59m", "0d", "1y"])
def test_another_time_of_grace_is_refused(text: str) -> None:
    """Less than an hour too: a push that is on its way may take that long."""
    with pytest.raises(GraceError, match=r"--grace is .*; expected"):
        parse_grace(text)


def test_a_folder_that_is_missing_is_not_made(tmp_path: Path) -> None:
    """A service makes one; a command that looks at a log does not."""
    with pytest.raises(StoreError, match="There is no folder"):
        open_existing(str(tmp_path / "none"))

    assert not list(tmp_path.iterdir())
