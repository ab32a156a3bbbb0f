"""The head log on a store: content-addressed blobs and numbered records, written if absent.

Knows object storage, and nothing of engines, HTTP or Ray. A record is never changed; whoever is
first to write a number has decided it for everybody.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import ValidationError

from export.bundle import (
    CARD,
    GOLDEN,
    HELDOUT,
    Bundle,
    BundleError,
    Digest,
    FileEntry,
    check_files,
    digest_of,
    read_manifest,
)
from serve.record import HeadLogError, LogView, Record, fold
from serve.store import Store, StoreError

A = TypeVar("A")
B = TypeVar("B")

PUT_RETRY_S = 0.05
NUM_NEAR = 8  # records that are asked for one by one before it is asked which there are


class HeadLog:
    """Blobs and records under one URL.

    Args:
        url: See `Store`.

    Raises:
        StoreError: the store cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.url, self.store = url, Store(url)

    def put_blob(self, data: bytes) -> Digest:
        """Store bytes under their own digest; storing them again mends and renews them.

        Raises:
            StoreError: the store cannot be written.
        """
        # Never "if absent". What stands there may be damaged, and is mended by the same bytes;
        # readers see the old object or the new one, which are equal unless the old one is bad. And
        # it may be old and about to be collected: the write makes it young, and the collector
        # looks at its age again right before it deletes. If it deletes between that look and this
        # write, the write stands; if it looked before and deletes after it, which takes
        # milliseconds, the blob is missing when the replicas stage the bundle, a phase before its
        # record is written: the push is refused, and the next one stores the blob again.
        digest = digest_of(data)
        self.store.put(blob_name(digest), data, f"Blob {digest}")
        return digest

    def get_blob(self, digest: Digest) -> bytes:
        """Read bytes back and check that they are what their name says.

        Raises:
            StoreError: missing, unreadable or damaged.
        """
        data = self.store.get(blob_name(digest), f"Blob {digest}")
        if data is None:
            raise StoreError(
                f"Blob {digest} is missing in {self.url}; push the bundle that it belongs to again."
            )
        if digest_of(data) != digest:
            raise StoreError(
                f"Blob {digest} in {self.url} is damaged: its bytes hash otherwise. Push the "
                "bundle that it belongs to again."
            )
        return data

    def get_blobs(self, digests: Iterable[Digest]) -> list[bytes]:
        """Read many, side by side where each takes a while.

        Raises:
            StoreError: one is missing, unreadable or damaged.
        """
        return self.of_each(self.get_blob, digests)

    def put_bundle(self, bundle: Bundle) -> Digest:
        """Store every file of a bundle; its manifest comes last.

        Raises:
            StoreError: the store cannot be written.
        """
        signature = [] if bundle.signature is None else [bundle.signature]
        self.of_each(self.put_blob, [*bundle.files.values(), *signature])
        return self.put_blob(bundle.manifest_bytes)

    def get_bundle(self, digest: Digest, *, signature: Digest | None = None) -> Bundle:
        """Read a bundle back, every byte checked, but for its held-out sample.

        That is the task's affair, megabytes, and read where a push is compared.

        Args:
            signature: Of the blob that holds the signature which it is to carry.

        Raises:
            StoreError: a blob is missing, unreadable or damaged, or it is no bundle.
        """
        return self._get(digest, frozenset({HELDOUT}), signature)

    def get_served(self, digest: Digest) -> Bundle:
        """Read back what answers are made of, every byte of it checked.

        Golden samples are for the gates and the card is for people; with thousands of heads they
        would be most of what a start reads.

        Raises:
            StoreError: a blob is missing, unreadable or damaged, or it is no bundle.
        """
        return self._get(digest, frozenset({GOLDEN, CARD, HELDOUT}))

    def _get(
        self, digest: Digest, without: frozenset[str], signature: Digest | None = None
    ) -> Bundle:
        manifest_bytes = self.get_blob(digest)
        try:
            manifest = read_manifest(manifest_bytes)
            served = {n: e for n, e in manifest.files.items() if n not in without}
            blobs = self._get_files(served)
            check_files(blobs, served)
            envelope = None if signature is None else self.get_blob(signature)
        except BundleError as error:
            raise StoreError(f"Blob {digest} in {self.url} is no bundle: {error}") from error
        return Bundle(manifest, manifest_bytes, blobs, envelope)

    def put_record(self, record: Record, *, timeout_s: float = 10.0) -> Record:
        """Write a record if its number is free, and say what stands there now.

        A put without a reply is not a failure: the record is read back, and put again while it is
        absent. "Exists" is not a failure either: a client's own retry meets its own write.

        Returns:
            The record that stands: this one, or whoever was first.

        Raises:
            StoreError: nothing could be written or read within `timeout_s`. Each call to the store
                ends within `QUICK_S`, so this may come by two of them later.
        """
        name, what = _record_name(record.number), f"Record {record.number}"
        deadline = time.monotonic() + timeout_s
        while True:
            failure = None
            try:
                if self.store.create(name, record.to_bytes(), what, is_quick=True):
                    return record
            except StoreError as error:
                failure = error
            is_late = time.monotonic() > deadline
            try:
                standing = self.get_record(record.number, is_quick=True)
            except StoreError:
                if is_late:
                    raise
                standing = None
            if standing is not None:
                return standing
            if is_late:
                raise failure or StoreError(
                    f"{what} cannot be written to {self.url}: it is absent after being written."
                )
            time.sleep(PUT_RETRY_S)

    def get_record(self, number: int, *, is_quick: bool = False) -> Record | None:
        """Read a record; None if its number is still free.

        Args:
            is_quick: See `Store.get`.

        Raises:
            StoreError: the store cannot be read.
            HeadLogError: what is there is no record of that number.
        """
        data = self.store.get(_record_name(number), f"Record {number}", is_quick=is_quick)
        if data is None:
            return None
        try:
            record = Record.model_validate_json(data)
        except ValidationError as error:
            raise HeadLogError(f"Record {number} in {self.url} is not readable: {error}") from error
        if record.number != number or record.to_bytes() != data:
            raise HeadLogError(f"Record {number} in {self.url} is not as it was written.")
        return record

    def follow(self, view: LogView, *, until: int | None = None) -> LogView:
        """Fold what has been written since, up to and including record `until` if that is given.

        Raises:
            StoreError: the store cannot be read.
            HeadLogError: the log contradicts itself, or one of its records is missing.
        """
        records = self.read_records(view.number, until=until)
        return fold(view, records) if records else view

    def read_records(self, after: int, *, until: int | None = None) -> list[Record]:
        """The records that come after a number, in their order.

        Raises:
            StoreError: the store cannot be read.
            HeadLogError: one is missing though there are later ones, or is not readable.
        """
        # From the start there may be thousands, later mostly none or one: only many are listed.
        records: list[Record] = [] if after else self._read_many(0, until)
        while until is None or after + len(records) < until:
            if len(records) == NUM_NEAR and (far := self._read_many(after + NUM_NEAR, until)):
                records += far
                continue
            # What was written while the others were read, and the end of the log.
            record = self.get_record(after + len(records) + 1)
            if record is None:
                break
            records.append(record)
        return records

    def _read_many(self, after: int, until: int | None) -> list[Record]:
        """As `read_records`, side by side; those that are written meanwhile may be left out."""
        listed = self.store.list("log/", after=_record_name(after))
        numbers = [number for stored in listed if (number := record_number(stored.name))]
        wanted = [number for number in numbers if until is None or number <= until]
        # A folder is listed while others write to it, so a gap is believed when it is read.
        expected = range(after + 1, after + 1 + len(wanted))
        records = self.of_each(self.get_record, expected)
        for number, record in zip(expected, records, strict=True):
            if record is None:
                raise HeadLogError(
                    f"Record {number} is missing in {self.url}, though record {numbers[-1]} is "
                    "there: it was removed. Put it back from a copy of the log."
                )
        return [record for record in records if record is not None]

    def _get_files(self, entries: Mapping[str, FileEntry]) -> dict[str, bytes]:
        digests: list[Digest] = [f"sha256:{entry.sha256}" for entry in entries.values()]
        return dict(zip(entries, self.get_blobs(digests), strict=True))

    def of_each(self, ask: Callable[[A], B], questions: Iterable[A]) -> list[B]:
        """Ask the store many things, side by side where each answer takes a while."""
        asked = list(questions)
        num_threads = min(len(asked), self.store.num_readers)
        if num_threads <= 1:
            return [ask(question) for question in asked]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(ask, asked))


def blob_name(digest: Digest) -> str:
    """Where a blob lies."""
    return f"blobs/{digest.replace(':', '/')}"


def blob_digest(name: str) -> Digest | None:
    """The digest of the blob that lies there; None if that is no blob's place."""
    found = re.fullmatch(r"blobs/sha256/([0-9a-f]{64})", name)
    return f"sha256:{found[1]}" if found else None


def record_number(name: str) -> int | None:
    """The number of the record that lies there; None if that is no record's place."""
    found = re.fullmatch(r"log/([0-9]{20})\.json", name)
    return int(found[1]) or None if found else None


def _record_name(number: int) -> str:
    return f"log/{number:020d}.json"
