"""Objects under one URL: a folder, or a bucket on S3, Google Cloud Storage or Azure.

Whatever a store does wrong becomes a `StoreError` of one line that names the URL, within seconds.
Credentials, endpoint and region come from the clouds' own variables, which obstore reads.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from serve.store_calls import StoreCalls

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLOUDS = frozenset({"s3", "gcs", "azure"})
PROBE = "put-if-absent"
RETRY_S = 0.5
NUM_READERS = 64  # a bucket answers each in tens of milliseconds, however many ask

# One try within a hold, whose caller asks again as long as it may: a replica that settles a swap
# makes at most two calls past the end of its hold, and has to be heard of after `SILENCE_S`.
QUICK_S = 2.0
# Enough for the largest object, a graph of tens of megabytes; a store that says nothing for
# `SILENT_S` is given up earlier. (That is counted while a part of 5 MB is sent, too.)
PATIENT_S = 30.0
SILENT_S = 10.0
CONNECT_S = 2.0
NUM_RETRIES = 3
RETRIES_END_S = 8.0

# What every library of obstore may raise beside its own errors.
_ERRORS = (BaseError, OSError, ValueError, NotImplementedError)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
# Without credentials, a machine of a cloud is asked for its own, which exists nowhere else.
_NO_CREDENTIALS = (
    "Missing AccessKeyId",
    "/latest/api/token",
    "/latest/meta-data",
    "/computeMetadata/",
    "/metadata/identity",
)
_AWAY = re.compile(r"error (sending|following|decoding|reading)|timed out|status code: (5\d\d|429)")


class StoreError(Exception):
    """The store cannot be used, or gave back something else than was put there."""


class UnreachableError(StoreError):
    """The store does not answer now; asked again later, it may."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as the store lists it.

    Args:
        written_at: By the store's own clock.
    """

    name: str
    size_bytes: int
    written_at: datetime


class Store:
    """Objects under one URL.

    Every method takes the object's name, and what it is in words for the error.

    Args:
        url: A folder, its `file://` URL, or the `s3://`, `gs://` or `az://` URL of a bucket or of
            a prefix in it. A folder is made if it is missing, a bucket is not.

    Raises:
        UnreachableError: the store does not answer.
        StoreError: it cannot be used, or does not refuse to create what is there already.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.calls = StoreCalls()
        self.is_folder = "://" not in url or url.startswith("file://")
        try:
            if self.is_folder:
                folder = Path(url.removeprefix("file://")).absolute()
                self._quick = self._patient = LocalStore(folder, mkdir=True)
            else:
                self._quick = _open(url, limit_s=QUICK_S, num_retries=0)
                self._patient = _open(url, limit_s=PATIENT_S, num_retries=NUM_RETRIES)
        except _ERRORS as error:
            raise StoreError(f"The store {url!r} cannot be opened: {_reason(error)}") from error
        self.num_readers = 1 if self.is_folder else NUM_READERS
        if not self.is_folder:
            self._check_creation()

    def get(self, name: str, what: str, *, is_quick: bool = False) -> bytes | None:
        """An object's bytes; None if there is none.

        Args:
            is_quick: One short try, for a caller who asks again by itself.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self.calls.timed("get"):
                store = self._quick if is_quick else self._patient
                return obstore.get(store, name).bytes().to_bytes()
        except _ERRORS as error:
            if _is_absent(error):
                return None
            raise self._error(f"{what} cannot be read from", error) from error

    def put(self, name: str, data: bytes, what: str) -> None:
        """Write an object, in the place of one that is there; readers see the one or the other.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            with self.calls.timed("put"):
                obstore.put(self._patient, name, data)
        except _ERRORS as error:
            raise self._error(f"{what} cannot be written to", error) from error

    def create(self, name: str, data: bytes, what: str, *, is_quick: bool = False) -> bool:
        """Write an object unless there is one; False if there is, which may be by this very call.

        Args:
            is_quick: See `get`.

        Raises:
            StoreError: there was no reply; the object may have been written.
        """
        try:
            with self.calls.timed("create"):
                if is_quick:
                    obstore.put(self._quick, name, data, mode="create")
                else:
                    _unbroken(lambda: obstore.put(self._patient, name, data, mode="create"))
        except AlreadyExistsError:
            return False
        except _ERRORS as error:
            raise self._error(f"{what} cannot be written to", error) from error
        return True

    def list(self, folder: str, *, after: str = "") -> list[Stored]:
        """The objects of a folder, by name; from the one after `after` on.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self.calls.timed("list"):
                found = _unbroken(
                    lambda: obstore.list(self._patient, folder, offset=after or None).collect()
                )
        except _ERRORS as error:
            raise self._error(f"The folder {folder} cannot be listed in", error) from error
        stored = [Stored(meta["path"], meta["size"], meta["last_modified"]) for meta in found]
        return sorted(stored, key=lambda one: one.name)

    def look(self, name: str, what: str) -> Stored | None:
        """Size and age of an object; None if there is none.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            with self.calls.timed("look"):
                meta = obstore.head(self._patient, name)
        except _ERRORS as error:
            if _is_absent(error):
                return None
            raise self._error(f"{what} cannot be read from", error) from error
        return Stored(meta["path"], meta["size"], meta["last_modified"])

    def delete(self, name: str, what: str) -> None:
        """Remove an object; one that is not there is as good as removed.

        Raises:
            StoreError: it cannot be removed.
        """
        try:
            with self.calls.timed("delete"):
                obstore.delete(self._patient, name)
        except _ERRORS as error:
            if not _is_absent(error):
                raise self._error(f"{what} cannot be removed from", error) from error

    def _check_creation(self) -> None:
        """See that an object is not created twice: the whole log stands on it.

        Raises:
            StoreError: it is, or the store cannot be used.
        """
        what = f"The object {PROBE}"
        if self.create(PROBE, b"Who creates this again has to be refused.\n", what) and self.create(
            PROBE, b"It was created again.\n", what
        ):
            raise StoreError(
                f"The store {self.url} cannot hold a head log: it writes an object that is there "
                "already though it was asked not to (If-None-Match: *)."
            )

    def _error(self, what: str, error: Exception) -> StoreError:
        kind = UnreachableError if _AWAY.search(_text(error)) else StoreError
        return kind(f"{what} {self.url}: {_reason(error)}")


def ask_until_answered(question: Callable[[], T]) -> T:
    """Ask a store that is away again and again, and pass on what it says once it answers."""
    while True:
        try:
            return question()
        except UnreachableError as error:
            logger.warning("waiting for the store: %s", error)
            time.sleep(RETRY_S)


def _open(url: str, *, limit_s: float, num_retries: int) -> Any:
    """A bucket whose every call ends: each try within `limit_s`, and few of them.

    Raises:
        ValueError: no such kind of store, or one that would not hold a log.
    """
    if _scheme(url) not in CLOUDS:
        raise ValueError("expected a folder or a file://, s3://, gs:// or az:// URL.")
    return from_url(
        url,
        client_options={
            "timeout": timedelta(seconds=limit_s),
            "read_timeout": timedelta(seconds=SILENT_S),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            # obstore reads these by itself, but not beside options that are given here.
            "allow_http": any(_is_set(f"{cloud}_ALLOW_HTTP") for cloud in ("AWS", "AZURE")),
        },
        retry_config={
            "max_retries": num_retries,
            "retry_timeout": timedelta(seconds=RETRIES_END_S),
            "backoff": {"max_backoff": timedelta(seconds=1)},
        },
    )


def _unbroken(call: Callable[[], T]) -> T:
    """Call again if the connection broke where obstore gives up: in a creation or a listing."""
    for _ in range(NUM_RETRIES):
        try:
            return call()
        except BaseError as error:
            is_tried_again = "retries, max_retries" in _text(error)
            if is_tried_again or "kind: Interrupted" not in str(error):
                raise
    return call()


def _scheme(url: str) -> str:
    try:
        return obstore.parse_scheme(url)
    except _ERRORS:
        return "unknown"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes"}


def _is_absent(error: Exception) -> bool:
    """Whether the object is missing, and not all of its bucket."""
    return isinstance(error, FileNotFoundError) and not _lacks_bucket(error)


def _lacks_bucket(error: Exception) -> bool:
    return any(sign in str(error) for sign in _NO_BUCKET)


def _reason(error: Exception) -> str:
    """What is wrong, in one line and without the URL of the request, which may hold a signature."""
    text = _text(error)
    if _lacks_bucket(error):
        return "there is no such bucket."
    said = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)
    details = f" ({said[1]}: {said[2].rstrip('.')})" if said else ""
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return f"access is denied; check the credentials and what they allow{details}."
    if any(sign in text for sign in _NO_CREDENTIALS):
        return (
            "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what "
            "else its cloud reads."
        )
    if "kind: Timeout" in str(error):
        return "it did not answer in time."
    if "error sending request" in text:
        return "it cannot be reached, or broke the connection."
    if status := re.search(r"status code: (\d+[^:<]*)", text):
        return f"it answered {status[1].strip()}{details}."
    return re.sub(r"\?\S+", "?…", " ".join(text.partition("\n")[0].split()))


def _text(error: Exception) -> str:
    """What obstore says, without the page of its internals below it."""
    return str(error).partition("\n\nDebug source")[0]
