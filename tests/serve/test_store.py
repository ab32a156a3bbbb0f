"""A store that misbehaves: every call ends soon, with one line that says what is wrong."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from export.bundle import digest_of
from serve.headlog import HeadLog
from serve.record import LogView
from serve.roll_call import SILENCE_S
from serve.store import Store, StoreError, UnreachableError, ask_until_answered
from tests.serve.faulty import Fault, FaultyServer
from tests.serve.test_headlog import abort, write


def is_put(method: str, _: str) -> bool:
    """Whether a request writes."""
    return method == "PUT"


def is_get(method: str, _: str) -> bool:
    """Whether a request reads."""
    return method == "GET"


@pytest.fixture
def log(faulty: FaultyServer, s3_url: str) -> HeadLog:
    """An empty log behind it."""
    del faulty
    return HeadLog(s3_url)


@pytest.mark.parametrize("fault", ["refuse", "forget", "tear", "500", "503", "slow"])
def test_a_record_is_written_whatever_happens_once(
    log: HeadLog, faulty: FaultyServer, fault: Fault
) -> None:
    """The put fails before or after the server has acted; what stands is said, and is ours."""
    view = write(log, 3)
    mine = abort(view, "mine")
    faulty.plan(fault, only=is_put)
    faulty.plan(fault, only=is_get)

    assert log.put_record(mine) == mine
    assert log.get_record(4) == mine


@pytest.mark.parametrize("fault", ["refuse", "forget", "tear", "500", "503"])
def test_who_was_first_is_told_whatever_happens_to_the_second(
    log: HeadLog, faulty: FaultyServer, fault: Fault
) -> None:
    """Neither an error nor a lost answer makes a loser believe that it won."""
    first = log.put_record(abort(LogView(), "first"))
    faulty.plan(fault, only=is_put)
    faulty.plan(fault, only=is_get)

    assert log.put_record(abort(LogView(), "second")) == first


@pytest.mark.parametrize("fault", ["refuse", "forget", "tear", "500", "503", "slow"])
def test_blobs_and_the_log_are_read_in_spite_of_faults_that_pass(
    log: HeadLog, faulty: FaultyServer, fault: Fault
) -> None:
    """What is torn is read again, and nothing that is half of a blob is handed out."""
    end = write(log, 12)
    digest = log.put_blob(b"weights" * 1000)
    faulty.plan(fault, times=2)

    assert log.get_blob(digest) == b"weights" * 1000
    faulty.plan(fault, times=2, only=is_get)
    assert log.follow(LogView()) == end


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("refuse", "it cannot be reached, or broke the connection."),
        ("forget", "it cannot be reached, or broke the connection."),
        ("silent", "it did not answer in time."),
        ("500", "it answered 500 Internal Server Error (InternalError: We encountered"),
        ("503", "it answered 503 Service Unavailable (SlowDown: Please reduce your request"),
    ],
)
def test_a_store_that_is_away_is_said_to_be_so_within_its_limits(
    faulty: FaultyServer, s3_url: str, fault: Fault, reason: str
) -> None:
    """Each call ends, names the URL and the reason in one line, and may be made again later."""
    log = HeadLog(s3_url)
    digest = log.put_blob(b"weights")
    faulty.plan(fault, times=1e6)
    for call in (
        lambda: log.get_blob(digest),
        lambda: log.put_blob(b"more"),
        lambda: log.get_record(1),
        lambda: log.follow(LogView()),
        lambda: log.put_record(abort(LogView()), timeout_s=0.1),
        lambda: HeadLog(s3_url),
    ):
        began_s = time.monotonic()
        with pytest.raises(UnreachableError) as caught:
            call()

        assert time.monotonic() - began_s < 8
        assert f" {s3_url}: {reason}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_settled_hold_waits_for_a_silent_store_no_longer_than_two_tries(
    log: HeadLog, faulty: FaultyServer
) -> None:
    """With the limits of a service: a replica that settles must be heard of within 5 seconds."""
    faulty.plan("silent", times=1e6)
    began_s = time.monotonic()
    with pytest.raises(UnreachableError):
        log.put_record(abort(LogView()), timeout_s=0.2)

    assert time.monotonic() - began_s < SILENCE_S


def test_wrong_credentials_are_named(faulty: FaultyServer, s3_url: str) -> None:
    """With what the server says of them; nobody waits for that to pass."""
    faulty.plan("denied", times=1e6)
    with pytest.raises(StoreError) as caught:
        HeadLog(s3_url)

    assert not isinstance(caught.value, UnreachableError)
    assert str(caught.value) == (
        f"The object put-if-absent cannot be written to {s3_url}: access is denied; check the "
        "credentials and what they allow (InvalidAccessKeyId: The access key does not exist in "
        "our records)."
    )


@pytest.mark.parametrize("num_missing", [1, 2])
def test_missing_credentials_are_named(
    s3_url: str, num_missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And which variables they are read from; no machine of a cloud has any for us here."""
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")[:num_missing]:
        monkeypatch.delenv(name)

    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        HeadLog(s3_url)


@pytest.mark.usefixtures("s3_url")
def test_a_bucket_that_is_not_there_is_named() -> None:
    """It is not taken for an empty one."""
    with pytest.raises(StoreError, match=r"s3://nobody-made-it/log: there is no such bucket\.$"):
        HeadLog("s3://nobody-made-it/log")


@pytest.mark.parametrize("url", ["memory:///", "http://localhost/log", "ftp://host/log"])
def test_a_store_of_another_kind_is_refused(url: str) -> None:
    """The error says what is there and what is expected."""
    expected = f"The store {url!r} cannot be opened: expected a folder or a file://, s3://, gs:// "
    with pytest.raises(StoreError) as caught:
        HeadLog(url)

    assert str(caught.value).startswith(expected)


def test_a_bucket_that_creates_things_twice_is_refused(faulty: FaultyServer, s3_url: str) -> None:
    """Without "only if absent" two pushers would both win."""
    faulty.plan("ignore", times=1e6)

    with pytest.raises(StoreError, match="cannot hold a head log: it writes an object that is the"):
        HeadLog(s3_url)


def test_opening_a_bucket_again_takes_one_request(faulty: FaultyServer, s3_url: str) -> None:
    """Two for the first who ever does."""
    numbers = []
    for _ in range(3):
        faulty.seen.clear()
        HeadLog(s3_url)
        numbers.append(len(faulty.seen))

    assert numbers == [2, 1, 1]


def test_what_a_bucket_is_asked_for_in_a_push_is_counted(
    log: HeadLog, faulty: FaultyServer
) -> None:
    """A record costs one request, asking for news one, a long log as many as it has records."""
    end = write(log, 30)
    faulty.seen.clear()
    log.follow(end)
    log.put_record(abort(end))
    costs = [len(faulty.seen)]
    faulty.seen.clear()
    log.follow(LogView())
    costs.append(len(faulty.seen))

    assert costs == [2, 31 + 2]  # with one that lists, and one that finds the end


def test_a_long_log_is_not_read_one_round_trip_after_another(
    log: HeadLog, faulty: FaultyServer
) -> None:
    """Each answer takes 0.4 s; thirty of them take a few of those together."""
    write(log, 30)
    faulty.plan("slow", times=1e6)
    began_s = time.monotonic()
    log.follow(LogView())

    assert time.monotonic() - began_s < 6 * 0.4


def test_who_asks_until_answered_waits_out_an_outage(log: HeadLog, faulty: FaultyServer) -> None:
    """And hears of anything else at once."""
    end = write(log, 2)
    faulty.plan("500", times=6)  # every try and retry of one call, and some of the next

    assert ask_until_answered(lambda: log.follow(LogView())) == end
    faulty.plan("denied", times=1e6)
    with pytest.raises(StoreError, match="access is denied"):
        ask_until_answered(lambda: log.get_blob(digest_of(b"x")))


def test_rivals_on_a_faulty_line_agree_on_every_number(
    log: HeadLog, faulty: FaultyServer, s3_url: str
) -> None:
    """Every third request fails in one way or another; the log has no gap, all know who won."""
    num_rivals, faults = 4, ("refuse", "forget", "500", "503")
    told: list[tuple[int, str]] = []
    for fault in faults:
        faulty.plan(fault, times=15, only=lambda _, __: len(faulty.seen) % 3 == 0)

    def compete(writer: str) -> None:
        # Now and then every try of a call is one that fails.
        mine, view = ask_until_answered(lambda: HeadLog(s3_url)), LogView()
        while view.number < 12:
            standing = mine.put_record(abort(view, writer))
            told.append((standing.number, standing.writer))
            view = ask_until_answered(lambda before=view: mine.follow(before))

    with ThreadPoolExecutor(num_rivals) as rivals:
        list(rivals.map(compete, [f"rival {number}" for number in range(num_rivals)]))
    faulty.heal()

    assert log.follow(LogView()).number >= 12
    for number, writer in told:
        record = log.get_record(number)
        assert record is not None
        assert record.writer == writer


def test_a_store_keeps_its_prefix_to_itself(s3_url: str) -> None:
    """Two logs in one bucket see nothing of each other."""
    one, other = HeadLog(f"{s3_url}/one"), HeadLog(f"{s3_url}/other")
    write(one, 3)

    assert other.follow(LogView()).number == 0
    assert [stored.name for stored in Store(f"{s3_url}/other").list("log/")] == []
