"""The head log on a folder: what is decided once stays so, and damage is not served."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError

from export.bundle import CARD, GOLDEN, HEAD, Bundle, digest_of
from serve.headlog import HeadLog, StoreError
from serve.record import HeadLogError, LogView, Record

NUM_RECORDS = 60

# One of several processes: it writes the next record again and again, and prints for each of its
# puts the number and whose record stands.
RIVAL = f"""
import sys
from serve.headlog import HeadLog
from serve.record import LogView, Record

log, view, writer = HeadLog(sys.argv[1]), LogView(), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
while view.number < {NUM_RECORDS}:
    number = view.number + 1
    mine = Record(
        number=number, kind="abort", previous=view.tip, writer=writer, written_at="now"
    )
    print(number, log.put_record(mine).writer, flush=True)
    view = log.follow(view)
"""


def abort(after: LogView, writer: str = "w") -> Record:
    """The shortest record that may follow a view."""
    return Record(
        number=after.number + 1,
        kind="abort",
        previous=after.tip,
        writer=writer,
        written_at="2026-01-01T00:00:00+00:00",
    )


def write(log: HeadLog, num_records: int) -> LogView:
    """Append records to a log."""
    view = log.follow(LogView())
    for _ in range(num_records):
        log.put_record(abort(view))
        view = log.follow(view)
    return view


@pytest.fixture
def log(tmp_path: Path) -> HeadLog:
    """An empty log."""
    return HeadLog(str(tmp_path / "store"))


def record_path(log: HeadLog, number: int) -> Path:
    """Where a record lies."""
    return Path(log.url) / "log" / f"{number:020d}.json"


def blob_path(log: HeadLog, digest: str) -> Path:
    """Where a blob lies."""
    return Path(log.url) / "blobs" / digest.replace(":", "/")


def test_of_many_threads_one_decides_a_number_for_all(log: HeadLog) -> None:
    """Every thread is told the same record, and it is the one that stands."""
    view, num_rivals = LogView(), 8
    for _ in range(20):
        gate = threading.Barrier(num_rivals)

        def put(writer: int, view: LogView = view, gate: threading.Barrier = gate) -> Record:
            gate.wait()
            return log.put_record(abort(view, f"thread {writer}"))

        with ThreadPoolExecutor(num_rivals) as rivals:
            told = set(rivals.map(put, range(num_rivals)))

        assert told == {log.get_record(view.number + 1)}
        view = log.follow(view)
    assert view.number == 20


def test_of_several_processes_one_decides_a_number_for_all(log: HeadLog) -> None:
    """What any process was told of a number is what the log says, without a gap or a repeat."""
    names = ["a", "b", "c"]
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, log.url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("go\n")
        rival.stdin.flush()
    told = {name: rival.communicate()[0].split() for name, rival in zip(names, rivals, strict=True)}
    standing = [log.get_record(number) for number in range(1, NUM_RECORDS + 1)]

    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    assert log.follow(LogView()).number == NUM_RECORDS
    for words in told.values():
        for number, writer in zip(words[::2], words[1::2], strict=True):
            record = standing[int(number) - 1]
            assert record is not None
            assert record.writer == writer
    assert sum(len(words) // 2 for words in told.values()) > NUM_RECORDS  # they did meet


def test_a_record_is_never_changed(log: HeadLog) -> None:
    """Who comes second is told who was first, and nothing is written."""
    first = log.put_record(abort(LogView(), "first"))
    stored = record_path(log, 1).read_bytes()

    assert log.put_record(abort(LogView(), "second")) == first
    assert record_path(log, 1).read_bytes() == stored


def test_a_retry_that_meets_its_own_write_has_succeeded(log: HeadLog) -> None:
    """That a record exists is no failure when it is one's own."""
    mine = abort(LogView())

    assert log.put_record(mine) == mine
    assert log.put_record(mine) == mine


Put = Callable[..., object]


def unreliable(
    monkeypatch: pytest.MonkeyPatch, *, has_landed: bool, num_failures: int
) -> list[object]:
    """Let the first puts end in an error, after or instead of writing; returns their calls."""
    real_put: Put = obstore.put
    calls: list[object] = []

    def put(store: object, path: str, data: bytes, **options: object) -> object:
        calls.append(path)
        is_lost = len(calls) <= num_failures
        result = real_put(store, path, data, **options) if has_landed or not is_lost else None
        if is_lost:
            raise GenericError("connection reset")
        return result

    monkeypatch.setattr(obstore, "put", put)
    return calls


def test_a_put_that_landed_without_a_reply_has_succeeded(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is read back instead of being taken for a failure."""
    calls = unreliable(monkeypatch, has_landed=True, num_failures=1)
    mine = abort(LogView())

    assert log.put_record(mine) == mine
    assert len(calls) == 1


def test_a_put_that_did_not_land_is_put_again(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the number is free it is tried."""
    calls = unreliable(monkeypatch, has_landed=False, num_failures=2)
    mine = abort(LogView())

    assert log.put_record(mine) == mine
    assert len(calls) == 3


def test_a_lost_put_does_not_hide_who_was_first(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's record stands, so it decides."""
    first = log.put_record(abort(LogView(), "first"))
    unreliable(monkeypatch, has_landed=False, num_failures=1)

    assert log.put_record(abort(LogView(), "second")) == first


def test_a_store_that_cannot_be_read_for_a_moment_is_asked_again(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put may have landed, so one failed read must not end the question."""
    real_get: Put = obstore.get
    failures = iter([GenericError("connection reset")])

    def get(*given: object) -> object:
        for failure in failures:
            raise failure
        return real_get(*given)

    monkeypatch.setattr(obstore, "get", get)
    mine = abort(LogView())

    assert log.put_record(mine) == mine


def test_a_put_gives_up_in_the_end(log: HeadLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the record, the store and the cause."""
    unreliable(monkeypatch, has_landed=False, num_failures=1000)

    with pytest.raises(StoreError) as caught:
        log.put_record(abort(LogView()), timeout_s=0.1)

    assert str(caught.value) == f"Record 1 cannot be written to {log.url}: connection reset"


def test_a_record_that_stays_absent_ends_in_an_error_too(log: HeadLog) -> None:
    """A folder under the record's name: neither is it free nor can it be read."""
    record_path(log, 1).mkdir(parents=True)

    with pytest.raises(StoreError, match=r"Record 1 .* absent after being written"):
        log.put_record(abort(LogView()), timeout_s=0.1)


def test_following_reads_only_what_is_new(log: HeadLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view goes on from where it is, to the end or up to a given record."""
    end = write(log, 5)
    middle = log.follow(LogView(), until=3)
    read: list[int] = []
    real_get_record = log.get_record

    def get_record(number: int) -> Record | None:
        read.append(number)
        return real_get_record(number)

    monkeypatch.setattr(log, "get_record", get_record)

    assert middle.number == 3
    assert log.follow(middle) == end
    assert read == [4, 5, 6]
    assert log.follow(middle, until=2) is middle
    assert log.follow(end) is end
    assert log.follow(end, until=9) is end


def test_two_logs_on_one_folder_see_the_same(log: HeadLog) -> None:
    """Nothing is kept in the process; a folder and its file:// URL are one place."""
    end = write(log, 3)

    assert HeadLog(log.url).follow(LogView()) == end
    assert HeadLog(f"file://{log.url}").follow(LogView()) == end


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"number": 2}'])
def test_a_record_that_is_no_record_is_named(log: HeadLog, damage: bytes) -> None:
    """Nobody goes on past a record that cannot be read."""
    write(log, 3)
    record_path(log, 2).write_bytes(damage)

    with pytest.raises(HeadLogError, match=f"Record 2 in {log.url} is not readable"):
        log.follow(LogView())


def test_a_record_with_other_bytes_is_named(log: HeadLog) -> None:
    """One more space, or another record's bytes: it is not what was written under this number."""
    write(log, 3)
    stored = record_path(log, 2).read_bytes()
    for damage in (stored.replace(b",", b", ", 1), record_path(log, 1).read_bytes()):
        record_path(log, 2).write_bytes(damage)

        with pytest.raises(HeadLogError, match=r"Record 2 .* is not as it was written"):
            log.follow(LogView())


def test_an_edited_record_is_noticed_through_the_one_after_it(log: HeadLog) -> None:
    """It is a valid record of its number, yet not the one that the log went on from."""
    write(log, 3)
    edited = record_path(log, 2).read_bytes().replace(b'"w"', b'"x"')
    record_path(log, 2).write_bytes(edited)

    with pytest.raises(HeadLogError, match="Record 3 names"):
        log.follow(LogView())


def test_a_blob_is_found_under_its_own_digest(log: HeadLog) -> None:
    """Storing it twice is storing it once; nothing is as good a content as any."""
    for data in (b"weights", b""):
        assert log.put_blob(data) == log.put_blob(data) == digest_of(data)
        assert log.get_blob(digest_of(data)) == data


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_in_a_blob_is_noticed(log: HeadLog, place: int) -> None:
    """Its bytes hash to something else than its name."""
    path = blob_path(log, log.put_blob(b"weights"))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)

    with pytest.raises(StoreError, match=f"{digest_of(b'weights')} in {log.url} is damaged"):
        log.get_blob(digest_of(b"weights"))


def test_a_blob_that_is_cut_short_is_noticed(log: HeadLog) -> None:
    """As a full disk leaves it."""
    path = blob_path(log, log.put_blob(b"weights"))
    path.write_bytes(b"")

    with pytest.raises(StoreError, match="is damaged"):
        log.get_blob(digest_of(b"weights"))


def test_a_missing_blob_is_named(log: HeadLog) -> None:
    """With the digest and the store, in one line."""
    with pytest.raises(StoreError) as caught:
        log.get_blob(digest_of(b"nobody stored this"))

    assert digest_of(b"nobody stored this") in str(caught.value)
    assert log.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_comes_back_as_it_was_stored(
    log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Under the bundle's digest, every file of it."""
    bundle = make_bundle()

    assert log.put_bundle(bundle) == bundle.digest
    assert log.get_bundle(bundle.digest) == bundle


def test_a_bundle_that_lacks_a_file_is_not_handed_out(
    log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """The error names the blob that is missing."""
    bundle = make_bundle()
    log.put_bundle(bundle)
    head = digest_of(bundle.files["head.onnx"])
    blob_path(log, head).unlink()

    with pytest.raises(StoreError, match=head):
        log.get_bundle(bundle.digest)


def test_what_serving_needs_of_a_bundle_is_read_without_the_rest(
    log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Neither golden samples nor card; a graph that is damaged is not handed out."""
    bundle = make_bundle()
    log.put_bundle(bundle)
    for name in (GOLDEN, CARD):
        blob_path(log, digest_of(bundle.files[name])).unlink()
    served = log.get_served(bundle.digest)

    assert (served.manifest, served.digest) == (bundle.manifest, bundle.digest)
    assert served.files == {HEAD: bundle.files[HEAD]}
    blob_path(log, digest_of(bundle.files[HEAD])).write_bytes(b"other weights")
    with pytest.raises(StoreError, match="is damaged"):
        log.get_served(bundle.digest)


def test_a_blob_that_is_no_bundle_is_said_to_be_none(log: HeadLog) -> None:
    """It is whole, and something else."""
    digest = log.put_blob(b"weights")

    with pytest.raises(StoreError, match=f"{digest} in {log.url} is no bundle"):
        log.get_bundle(digest)


@pytest.mark.parametrize("url", ["s3://bucket/log", "gs://bucket", "http://localhost/log"])
def test_a_store_of_another_kind_is_refused(url: str) -> None:
    """The error says what is there and what is expected."""
    expected = f"The store is {url!r}; expected a folder or a file:// URL."

    with pytest.raises(StoreError, match=f"^{re.escape(expected)}$"):
        HeadLog(url)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file is in its place, or in the way to it."""
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path / "file"), f"file://{tmp_path}/file/store"):
        with pytest.raises(StoreError, match=f"'{url}' cannot be opened"):
            HeadLog(url)


def test_a_store_that_went_away_is_named_in_one_line(log: HeadLog) -> None:
    """Whatever is asked of it: the URL, and not a page of the library's internals."""
    digest = log.put_blob(b"weights")
    shutil.rmtree(log.url)
    Path(log.url).write_text("no folder any more")
    questions: list[Callable[[], object]] = [
        lambda: log.put_blob(b"more"),
        lambda: log.get_blob(digest),
        lambda: log.get_record(1),
        lambda: log.follow(LogView()),
        lambda: log.put_record(abort(LogView()), timeout_s=0.0),
    ]
    for question in questions:
        with pytest.raises(StoreError) as caught:
            question()

        assert log.url in str(caught.value)
        assert "\n" not in str(caught.value)
