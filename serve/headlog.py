"""The head log on storage: content-addressed blobs and numbered records, written if absent.

Knows object storage, and nothing of engines, HTTP or Ray. A record is never changed; whoever is
first to write a number has decided it for everybody.
"""

from __future__ import annotations

import time
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore
from pydantic import ValidationError

from export.bundle import (
    CARD,
    GOLDEN,
    MANIFEST,
    SIGNATURE,
    Bundle,
    BundleError,
    Digest,
    check_files,
    digest_of,
    read_manifest,
)
from serve.record import HeadLogError, LogView, Record, fold

PUT_RETRY_S = 0.05


class StoreError(Exception):
    """The store cannot be reached, or gave back something else than was put there."""


class HeadLog:
    """Blobs and records under one folder.

    Args:
        url: A folder, or its `file://` URL; made if it is missing.

    Raises:
        StoreError: the folder cannot be made, or the URL names another kind of store.
    """

    def __init__(self, url: str) -> None:
        if "://" in url and not url.startswith("file://"):
            raise StoreError(f"The store is {url!r}; expected a folder or a file:// URL.")
        self.url = url
        try:
            self._store = LocalStore(Path(url.removeprefix("file://")).absolute(), mkdir=True)
        except (BaseError, OSError) as error:
            raise StoreError(f"The store {url!r} cannot be opened: {_reason(error)}") from error

    def put_blob(self, data: bytes) -> Digest:
        """Store bytes under their own digest; storing them again changes nothing.

        Raises:
            StoreError: the store cannot be written.
        """
        digest = digest_of(data)
        try:
            obstore.put(self._store, _blob_path(digest), data, mode="create")
        except AlreadyExistsError:
            pass
        except BaseError as error:
            raise StoreError(
                f"Blob {digest} cannot be written to {self.url}: {_reason(error)}"
            ) from error
        return digest

    def get_blob(self, digest: Digest) -> bytes:
        """Read bytes back and check that they are what their name says.

        Raises:
            StoreError: missing, unreadable or damaged.
        """
        try:
            data = obstore.get(self._store, _blob_path(digest)).bytes().to_bytes()
        except (BaseError, FileNotFoundError) as error:
            raise StoreError(
                f"Blob {digest} cannot be read from {self.url}: {_reason(error)}"
            ) from error
        if digest_of(data) != digest:
            raise StoreError(f"Blob {digest} in {self.url} is damaged: its bytes hash otherwise.")
        return data

    def put_bundle(self, bundle: Bundle) -> Digest:
        """Store every file of a bundle; its manifest comes last.

        Raises:
            StoreError: the store cannot be written.
        """
        for data in bundle.files.values():
            self.put_blob(data)
        if bundle.signature is not None:
            self.put_blob(bundle.signature)
        return self.put_blob(bundle.manifest_bytes)

    def get_bundle(self, digest: Digest, *, signature: Digest | None = None) -> Bundle:
        """Read a bundle back, every byte checked.

        Args:
            signature: Of the blob that holds the signature which it is to carry.

        Raises:
            StoreError: a blob is missing, unreadable or damaged, or it is no bundle.
        """
        manifest_bytes = self.get_blob(digest)
        try:
            entries = read_manifest(manifest_bytes).files
            blobs = {name: self.get_blob(f"sha256:{e.sha256}") for name, e in entries.items()}
            if signature is not None:
                blobs[SIGNATURE] = self.get_blob(signature)
            return Bundle.of_files({MANIFEST: manifest_bytes, **blobs})
        except BundleError as error:
            raise StoreError(f"Blob {digest} in {self.url} is no bundle: {error}") from error

    def get_served(self, digest: Digest) -> Bundle:
        """Read back what answers are made of, every byte of it checked.

        Golden samples are for the gates and the card is for people; with thousands of heads they
        would be most of what a start reads.

        Raises:
            StoreError: a blob is missing, unreadable or damaged, or it is no bundle.
        """
        manifest_bytes = self.get_blob(digest)
        try:
            manifest = read_manifest(manifest_bytes)
            served = {n: e for n, e in manifest.files.items() if n not in {GOLDEN, CARD}}
            blobs = {name: self.get_blob(f"sha256:{e.sha256}") for name, e in served.items()}
            check_files(blobs, served)
        except BundleError as error:
            raise StoreError(f"Blob {digest} in {self.url} is no bundle: {error}") from error
        return Bundle(manifest, manifest_bytes, blobs)

    def put_record(self, record: Record, *, timeout_s: float = 10.0) -> Record:
        """Write a record if its number is free, and say what stands there now.

        A put without a reply is not a failure: the record is read back, and put again while it is
        absent. "Exists" is not a failure either: a client's own retry meets its own write.

        Returns:
            The record that stands: this one, or whoever was first.

        Raises:
            StoreError: nothing could be written or read within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            failure = self._try_put(record)
            is_late = time.monotonic() > deadline
            try:
                standing = self.get_record(record.number)
            except StoreError:
                if is_late:
                    raise
                standing = None
            if standing is not None:
                return standing
            if is_late:
                reason = _reason(failure) if failure else "it is absent after being written."
                raise StoreError(
                    f"Record {record.number} cannot be written to {self.url}: {reason}"
                ) from failure
            time.sleep(PUT_RETRY_S)

    def _try_put(self, record: Record) -> Exception | None:
        """Why there was no reply to a put; None if there was one, "exists" included."""
        try:
            obstore.put(self._store, _record_path(record.number), record.to_bytes(), mode="create")
        except AlreadyExistsError:
            return None
        except BaseError as error:
            return error
        return None

    def get_record(self, number: int) -> Record | None:
        """Read a record; None if its number is still free.

        Raises:
            StoreError: the store cannot be read.
            HeadLogError: what is there is no record of that number.
        """
        try:
            data = obstore.get(self._store, _record_path(number)).bytes().to_bytes()
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise StoreError(
                f"Record {number} cannot be read from {self.url}: {_reason(error)}"
            ) from error
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
            HeadLogError: the log contradicts itself.
        """
        records: list[Record] = []
        number = view.number + 1
        while until is None or number <= until:
            record = self.get_record(number)
            if record is None:
                break
            records.append(record)
            number += 1
        return fold(view, records) if records else view


def _blob_path(digest: Digest) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _record_path(number: int) -> str:
    return f"log/{number:020d}.json"


def _reason(error: Exception) -> str:
    """The first line of an error; obstore puts a page of its internals below it."""
    return str(error).partition("\n")[0]
