"""What may be wrong with a head log and its store; each check looks at one thing.

Unlike a start, which ends at the first error, this goes on and names everything that it finds.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from export.bundle import Digest
from serve.doctor import Finding
from serve.garbage import is_garbage
from serve.headlog import HeadLog, blob_digest, blob_name, record_number
from serve.presence import FOLDER as CLUSTERS
from serve.record import ORIGIN, HeadLogError, Record
from serve.references import referenced
from serve.store import PROBE, Store, Stored, StoreError

NUM_NAMED = 20  # of one kind; a log that lost thousands of blobs needs no line for each

MEND_RECORD = "Put it back from a copy of the log, byte for byte; no service starts without it."
MEND_BLOB = (
    "Push the bundle that it belongs to again, or start with --trunk if it is the trunk's; or put "
    "it back from a copy."
)


@dataclass(frozen=True)
class Contents:
    """What a store holds, read once for all checks.

    Args:
        records: By number; those that cannot be read are in `unreadable`, with the reason.
    """

    objects: Sequence[Stored]
    records: dict[int, Record]
    unreadable: dict[int, str]

    @property
    def last(self) -> int:
        """The highest number of a record, 0 without any."""
        return max([*self.records, *self.unreadable], default=0)


def read_contents(log: HeadLog) -> Contents:
    """List everything and read every record.

    Raises:
        StoreError: the store cannot be read.
    """
    objects = log.store.list("")
    numbers = [number for stored in objects if (number := record_number(stored.name))]
    read: list[Record | str] = log.of_each(lambda number: _read(log, number), numbers)
    answers = dict(zip(numbers, read, strict=True))
    return Contents(
        objects,
        {number: record for number, record in answers.items() if isinstance(record, Record)},
        {number: reason for number, reason in answers.items() if isinstance(reason, str)},
    )


def check_writable(store: Store) -> Iterable[Finding]:
    """It can be written, and creates nothing twice."""
    name, what = f"doctor-{secrets.token_hex(8)}", "A test object"
    try:
        is_first, is_second = (store.create(name, b"test", what) for _ in range(2))
        data = store.get(name, what)
        store.delete(name, what)
    except StoreError as error:
        yield Finding("store", "problem", str(error), "Services need to write, read and remove.")
        return
    if not is_first or is_second or data != b"test":
        yield Finding(
            "store",
            "problem",
            f"{store.url} creates an object that is there already, or does not give it back.",
            "Use a store that honours If-None-Match: *; on this one two pushes may both win.",
        )
        return
    yield Finding("store", "ok", f"{store.url} is written and read, and creates nothing twice.")


def check_records(contents: Contents) -> Iterable[Finding]:
    """Every number has one readable record that names the one before."""
    found = [*_gaps(contents), *_unreadable(contents), *_breaks(contents)]
    yield from found
    if not contents.last:
        yield Finding("records", "warning", "The log is empty.", "Start with --trunk FOLDER.")
    elif not found:
        yield Finding("records", "ok", f"{contents.last} records, each naming the one before it.")


def check_blobs(log: HeadLog, contents: Contents, *, is_deep: bool) -> Iterable[Finding]:
    """What the records refer to is there; looked into if `is_deep`, else by name."""
    problems: dict[Digest, str] = {}

    def look_into(digests: Sequence[Digest]) -> list[bytes | None]:
        return log.of_each(lambda digest: _get(log, digest, problems), digests)

    records = [contents.records[number] for number in sorted(contents.records)]
    try:
        needed = referenced(records, look_into)
    except StoreError as error:
        yield Finding("blobs", "problem", str(error), MEND_BLOB)
        return
    there = {stored.name for stored in contents.objects}
    for digest in needed:
        if blob_name(digest) not in there:
            problems[digest] = f"Blob {digest} is missing."
    if is_deep:
        look_into([digest for digest in needed if digest not in problems])
    named = [
        Finding("blobs", "problem", f"{needed[digest]}: {reason}", MEND_BLOB)
        for digest, reason in sorted(problems.items())
    ]
    yield from _first(named)
    if not named:
        how = "present and whole" if is_deep else "present (--deep looks into them)"
        yield Finding("blobs", "ok", f"{len(needed)} blobs that records refer to are {how}.")
    yield _garbage(contents, needed)


def check_strangers(contents: Contents) -> Iterable[Finding]:
    """Nothing else lies there."""
    strangers = [
        stored.name
        for stored in contents.objects
        if not (
            record_number(stored.name)
            or blob_digest(stored.name)
            or stored.name == PROBE
            or stored.name.startswith(CLUSTERS)
        )
    ]
    yield from _first(
        [
            Finding(
                "strangers",
                "warning",
                f"{name} is neither a record nor a blob.",
                "Remove it if nobody knows it: an interrupted write or command may have left it.",
            )
            for name in strangers
        ]
    )
    if not strangers:
        yield Finding("strangers", "ok", "Records and blobs, and nothing else.")


def _gaps(contents: Contents) -> list[Finding]:
    there = contents.records.keys() | contents.unreadable.keys()
    if contents.last > len(there) + NUM_NAMED:
        says = f"{contents.last - len(there)} of {contents.last} records are missing."
        return [Finding("records", "problem", says, MEND_RECORD)]
    return [
        Finding(
            "records",
            "problem",
            f"Record {number} is missing, though record {contents.last} is there.",
            MEND_RECORD,
        )
        for number in range(1, contents.last)
        if number not in there
    ]


def _unreadable(contents: Contents) -> list[Finding]:
    return [
        Finding("records", "problem", reason, MEND_RECORD)
        for _, reason in sorted(contents.unreadable.items())
    ]


def _breaks(contents: Contents) -> list[Finding]:
    """Records that name another one before them than the one that is there."""
    found = []
    for number, record in sorted(contents.records.items()):
        before = contents.records.get(number - 1)
        expected = ORIGIN if number == 1 else before and before.digest
        if expected is not None and record.previous != expected:
            says = f"Record {number} does not name record {number - 1} as it is: one was replaced."
            found.append(Finding("records", "problem", says, MEND_RECORD))
    return found


def _garbage(contents: Contents, needed: Iterable[Digest]) -> Finding:
    kept = frozenset(needed)
    sizes = [stored.size_bytes for stored in contents.objects if is_garbage(stored.name, kept)]
    if not sizes:
        return Finding("garbage", "ok", "Every blob belongs to a record.")
    says = f"{len(sizes)} blobs of {sum(sizes) / 1e6:.1f} MB belong to no record."
    return Finding("garbage", "ok", says, "headstock gc removes those that are old.")


def _read(log: HeadLog, number: int) -> Record | str:
    try:
        return log.get_record(number) or f"Record {number} was removed just now."
    except HeadLogError as error:
        return " ".join(str(error).split())


def _get(log: HeadLog, digest: Digest, problems: dict[Digest, str]) -> bytes | None:
    """A blob; if it is missing or damaged that is noted instead."""
    try:
        return log.get_blob(digest)
    except StoreError as error:
        problems[digest] = str(error)
        return None


def _first(findings: Sequence[Finding]) -> Iterable[Finding]:
    yield from findings[:NUM_NAMED]
    more = len(findings) - NUM_NAMED
    if more > 0:
        last = findings[-1]
        yield Finding(last.check, last.level, f"… and {more} more of this kind.", last.mend)
