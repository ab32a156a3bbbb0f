"""The head log on a folder and on S3: what is decided once stays so, and damage is not served."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError

from export.bundle import CARD, GOLDEN, HEAD, Bundle, digest_of
from serve.headlog import NUM_NEAR, HeadLog
from serve.record import HeadLogError, LogView, Record
from serve.store import Stored, StoreError

NUM_RECORDS = 60

# One of several processes: it writes the next record again and again, and prints for each of its
# puts the number and whose record stands.
RIVAL = f"""
import sys
from serve.headlog import NUM_NEAR, HeadLog
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


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a folder, or in a bucket."""
    return (
        str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url")
    )


@pytest.fixture
def log(url: str) -> HeadLog:
    """An empty log on each kind of store."""
    return HeadLog(url)


@pytest.fixture
def folder_log(tmp_path: Path) -> HeadLog:
    """An empty log on a folder."""
    return HeadLog(str(tmp_path / "store"))


def record_name(number: int) -> str:
    """Where a record lies."""
    return f"log/{number:020d}.json"


def blob_name(digest: str) -> str:
    """Where a blob lies."""
    return f"blobs/{digest.replace(':', '/')}"


def stored(log: HeadLog, name: str) -> bytes:
    """The bytes that lie there."""
    return bytes(obstore.get(log.store._patient, name).bytes())


def store(log: HeadLog, name: str, data: bytes) -> None:
    """Put other bytes there, past all that the log takes care of."""
    obstore.put(log.store._patient, name, data)


def remove(log: HeadLog, name: str) -> None:
    """Take it away."""
    obstore.delete(log.store._patient, name)


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
    before = stored(log, record_name(1))

    assert log.put_record(abort(LogView(), "second")) == first
    assert stored(log, record_name(1)) == before


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
    unreliable(monkeypatch, has_landed=True, num_failures=1)
    mine = abort(LogView())

    assert log.put_record(mine) == mine
    assert not list(failures)


def test_a_put_gives_up_in_the_end(log: HeadLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the record, the store and the cause."""
    unreliable(monkeypatch, has_landed=False, num_failures=1000)

    with pytest.raises(StoreError) as caught:
        log.put_record(abort(LogView()), timeout_s=0.1)

    assert str(caught.value) == f"Record 1 cannot be written to {log.url}: connection reset"


def test_a_record_that_stays_absent_ends_in_an_error_too(folder_log: HeadLog) -> None:
    """A folder under the record's name: neither is it free nor can it be read."""
    (Path(folder_log.url) / record_name(1)).mkdir(parents=True)

    with pytest.raises(StoreError, match=r"Record 1 .* absent after being written"):
        folder_log.put_record(abort(LogView()), timeout_s=0.1)


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


def test_two_logs_in_one_place_see_the_same(log: HeadLog) -> None:
    """Nothing is kept in the process."""
    end = write(log, 3)

    assert HeadLog(log.url).follow(LogView()) == end


def test_a_folder_and_its_url_are_one_place(folder_log: HeadLog) -> None:
    """`file://` and the path after it."""
    end = write(folder_log, 3)

    assert HeadLog(f"file://{folder_log.url}").follow(LogView()) == end


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"number": 2}'])
def test_a_record_that_is_no_record_is_named(log: HeadLog, damage: bytes) -> None:
    """Nobody goes on past a record that cannot be read."""
    write(log, 3)
    store(log, record_name(2), damage)

    with pytest.raises(HeadLogError, match=f"Record 2 in {log.url} is not readable"):
        log.follow(LogView())


def test_a_record_with_other_bytes_is_named(log: HeadLog) -> None:
    """One more space, or another record's bytes: it is not what was written under this number."""
    write(log, 3)
    written = stored(log, record_name(2))
    for damage in (written.replace(b",", b", ", 1), stored(log, record_name(1))):
        store(log, record_name(2), damage)

        with pytest.raises(HeadLogError, match=r"Record 2 .* is not as it was written"):
            log.follow(LogView())


def test_an_edited_record_is_noticed_through_the_one_after_it(log: HeadLog) -> None:
    """It is a valid record of its number, yet not the one that the log went on from."""
    write(log, 3)
    store(log, record_name(2), stored(log, record_name(2)).replace(b'"w"', b'"x"'))

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
    name = blob_name(log.put_blob(b"weights"))
    data = bytearray(stored(log, name))
    data[place] ^= 1
    store(log, name, bytes(data))

    with pytest.raises(StoreError, match=f"{digest_of(b'weights')} in {log.url} is damaged"):
        log.get_blob(digest_of(b"weights"))


def test_a_blob_that_is_cut_short_is_noticed(log: HeadLog) -> None:
    """As a full disk leaves it."""
    store(log, blob_name(log.put_blob(b"weights")), b"")

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
    remove(log, blob_name(head))

    with pytest.raises(StoreError, match=head):
        log.get_bundle(bundle.digest)


def test_what_serving_needs_of_a_bundle_is_read_without_the_rest(
    log: HeadLog, make_bundle: Callable[..., Bundle]
) -> None:
    """Neither golden samples nor card; a graph that is damaged is not handed out."""
    bundle = make_bundle()
    log.put_bundle(bundle)
    for name in (GOLDEN, CARD):
        remove(log, blob_name(digest_of(bundle.files[name])))
    served = log.get_served(bundle.digest)

    assert (served.manifest, served.digest) == (bundle.manifest, bundle.digest)
    assert served.files == {HEAD: bundle.files[HEAD]}
    store(log, blob_name(digest_of(bundle.files[HEAD])), b"other weights")
    with pytest.raises(StoreError, match="is damaged"):
        log.get_served(bundle.digest)


def test_a_blob_that_is_no_bundle_is_said_to_be_none(log: HeadLog) -> None:
    """It is whole, and something else."""
    digest = log.put_blob(b"weights")

    with pytest.raises(StoreError, match=f"{digest} in {log.url} is no bundle"):
        log.get_bundle(digest)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file is in its place, or in the way to it."""
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path / "file"), f"file://{tmp_path}/file/store"):
        with pytest.raises(StoreError, match=f"'{url}' cannot be opened"):
            HeadLog(url)


def test_a_store_that_went_away_is_named_in_one_line(folder_log: HeadLog) -> None:
    """Whatever is asked of it: the URL, and not a page of the library's internals."""
    log = folder_log
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


@pytest.mark.parametrize("lost", [1, 5, 11])
def test_a_lost_record_is_named_at_start(log: HeadLog, lost: int) -> None:
    """The first, one in the middle, or the last but one: nobody takes it for the log's end."""
    write(log, 12)
    remove(log, record_name(lost))

    with pytest.raises(HeadLogError, match=f"Record {lost} is missing in .* record 12 is there"):
        log.follow(LogView())


def test_records_that_a_listing_left_out_are_read_all_the_same(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is listed while others write: one in the middle and the last are not in the list."""
    end = write(log, 12)
    real_list = log.store.list

    def list_some(folder: str, *, after: str = "") -> list[Stored]:
        listed = real_list(folder, after=after)
        return [found for found in listed if found.name not in {record_name(5), record_name(12)}]

    monkeypatch.setattr(log.store, "list", list_some)

    assert log.follow(LogView()) == end


def test_who_is_far_behind_asks_which_records_there_are(
    log: HeadLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first few one by one, all others at once; up to a given one when asked so."""
    end = write(log, 40)
    early = log.follow(LogView(), until=2)
    listed: list[str] = []
    real_list = log.store.list

    def note(folder: str, *, after: str = "") -> list[Stored]:
        listed.append(after)
        return real_list(folder, after=after)

    monkeypatch.setattr(log.store, "list", note)

    assert log.follow(early) == end
    assert listed == [record_name(2 + NUM_NEAR)]
    assert log.follow(early, until=30).number == 30
    assert log.follow(end) is end
    assert len(listed) == 2


def test_what_is_no_record_is_not_taken_for_one(log: HeadLog) -> None:
    """Other names in the folder of the log change nothing."""
    end = write(log, 3)
    for name in ("log/00000000000000000009.json.bak", "log/notes.txt", "log/9.json"):
        store(log, name, b"not a record")

    assert log.follow(LogView()) == end


@pytest.mark.parametrize("damage", [b"weight$", b"", None])
def test_storing_a_blob_again_mends_it(log: HeadLog, damage: bytes | None) -> None:
    """One that was changed, cut short or lost."""
    digest = log.put_blob(b"weights")
    if damage is None:
        remove(log, blob_name(digest))
    else:
        store(log, blob_name(digest), damage)
    log.put_blob(b"weights")

    assert log.get_blob(digest) == b"weights"


def test_storing_a_blob_again_makes_it_young(log: HeadLog) -> None:
    """Whoever collects garbage by age leaves alone what a push has just stored."""
    name = blob_name(log.put_blob(b"weights"))
    before = log.store.look(name, "it")
    time.sleep(1.1)  # S3 counts in seconds
    log.put_blob(b"weights")
    after = log.store.look(name, "it")

    assert before is not None
    assert after is not None
    assert after.written_at > before.written_at
