"""Which blobs the records of a log refer to, directly or through manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from export.bundle import (
    HELDOUT,
    MANIFEST,
    PRECISION_GRAPHS,
    SIGNATURE,
    TRUNK_ADAPTED,
    TRUNK_MANIFEST,
    BundleError,
    Digest,
    FileEntry,
    TrunkManifest,
    read_manifest,
    read_trunk_manifest,
)
from serve.record import Record
from serve.store import StoreError

Read = Callable[[Sequence[Digest]], Sequence[bytes | None]]


def referenced(records: Iterable[Record], read: Read) -> dict[Digest, str]:
    """Every blob that the log needs, for what is live and for its history, and what it is.

    Args:
        read: Reads manifests; None for one that is to be passed over, with the files that it names.

    Raises:
        StoreError: a manifest is none, or what `read` raises.
    """
    bundles: dict[Digest, str] = {}
    trunks: dict[Digest, str] = {}
    blobs: dict[Digest, str] = {}
    for record in records:
        for change in record.changes:
            whose = f"version {change.version} of {change.task}"
            for side in filter(None, (change, change.candidate)):
                if side.bundle is not None:
                    bundles.setdefault(side.bundle, whose)
                if side.signed is not None:
                    blobs[side.signed.envelope] = f"{SIGNATURE} of {whose}"
        for sample in record.heldout:
            blobs[sample.heldout] = f"{HELDOUT} of {sample.task}"
        if record.trunk is not None:
            trunks[record.trunk.manifest] = "the trunk"
    blobs |= {digest: f"{MANIFEST} of {whose}" for digest, whose in bundles.items()}
    blobs |= {digest: f"{TRUNK_MANIFEST} of {whose}" for digest, whose in trunks.items()}
    return blobs | _listed(bundles, read, _bundle_files) | _listed(trunks, read, _trunk_files)


def stored_files(manifest: TrunkManifest) -> dict[str, FileEntry]:
    """The files of a trunk that serving needs, and that are stored."""
    graphs = (*(PRECISION_GRAPHS[precision] for precision in manifest.precisions), TRUNK_ADAPTED)
    return {name: manifest.files[name] for name in graphs if name in manifest.files}


def _bundle_files(manifest: bytes) -> Mapping[str, FileEntry]:
    return read_manifest(manifest).files


def _trunk_files(manifest: bytes) -> Mapping[str, FileEntry]:
    return stored_files(read_trunk_manifest(manifest))


def _listed(
    manifests: Mapping[Digest, str],
    read: Read,
    files_of: Callable[[bytes], Mapping[str, FileEntry]],
) -> dict[Digest, str]:
    """The files that manifests list."""
    blobs: dict[Digest, str] = {}
    for (digest, whose), data in zip(manifests.items(), read(list(manifests)), strict=True):
        if data is not None:
            blobs |= _described(_parsed(digest, data, files_of), whose)
    return blobs


def _parsed(
    digest: Digest, data: bytes, files_of: Callable[[bytes], Mapping[str, FileEntry]]
) -> Mapping[str, FileEntry]:
    try:
        return files_of(data)
    except BundleError as error:
        raise StoreError(f"Blob {digest} is no manifest: {error}") from error


def _described(files: Mapping[str, FileEntry], whose: str) -> dict[Digest, str]:
    return {f"sha256:{entry.sha256}": f"{name} of {whose}" for name, entry in files.items()}
