"""Blobs that no record of the log refers to: finding them, and removing those that are old.

It is safe beside pushes: see `HeadLog.put_blob`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from export.bundle import Digest
from serve.headlog import HeadLog, blob_digest
from serve.references import referenced
from serve.store import Store, StoreError

AT_ONCE = 256


@dataclass(frozen=True)
class Garbage:
    """A blob that no record refers to.

    Args:
        age_s: Since it was last stored, by the store's own clock.
    """

    name: str
    size_bytes: int
    age_s: float


def find_garbage(log: HeadLog, *, grace: timedelta) -> list[Garbage]:
    """Blobs that nothing refers to and that are older than a time of grace, the oldest first.

    Raises:
        StoreError: the log is empty, or something that it refers to cannot be read: then nobody
            knows what belongs to it.
        HeadLogError: the log contradicts itself.
    """
    now = _now(log.store)
    blobs = log.store.list("blobs/")
    records = log.read_records(0)
    if not records:
        raise StoreError(f"There is no head log in {log.url}.")
    kept = referenced(records, log.get_blobs)
    garbage = [
        Garbage(blob.name, blob.size_bytes, (now - blob.written_at).total_seconds())
        for blob in blobs
        if now - blob.written_at >= grace and is_garbage(blob.name, kept)
    ]
    return sorted(garbage, key=lambda found: -found.age_s)


def is_garbage(name: str, kept: Container[Digest]) -> bool:
    """Whether it is a blob, and none of those that are referred to."""
    digest = blob_digest(name)
    return digest is not None and digest not in kept


def remove(
    log: HeadLog,
    garbage: Sequence[Garbage],
    *,
    grace: timedelta,
    progress: Callable[[int], None],
) -> list[Garbage]:
    """Remove what `find_garbage` found, unless it was stored again meanwhile.

    Args:
        progress: Told how many have been looked at.

    Returns:
        What was removed.

    Raises:
        StoreError: the store cannot be read or written.
    """
    now = _now(log.store)
    removed: list[Garbage] = []
    for start in range(0, len(garbage), AT_ONCE):
        some = garbage[start : start + AT_ONCE]
        is_gone = log.of_each(lambda found: _remove(log.store, found, now, grace), some)
        removed += [found for found, gone in zip(some, is_gone, strict=True) if gone]
        progress(start + len(some))
    return removed


def _remove(store: Store, garbage: Garbage, now: datetime, grace: timedelta) -> bool:
    """Look at its age once more, and remove it if it is still old."""
    what = f"The object {garbage.name}"
    found = store.look(garbage.name, what)
    if found is None or now - found.written_at < grace:
        return False
    store.delete(garbage.name, what)
    return True


def _now(store: Store) -> datetime:
    """The time by the store's clock, which the ages are counted by; this machine's may be wrong."""
    name, what = f"clock-{secrets.token_hex(8)}", "The time"
    store.put(name, b"", what)
    try:
        found = store.look(name, what)
    finally:
        store.delete(name, what)
    if found is None:
        raise StoreError(f"{store.url} does not give back what was just written to it.")
    return found.written_at
