"""From a trunk in the head log to one that answers, and to the next one beside it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from export.bundle import (
    PRECISION_GRAPHS,
    TRUNK_ADAPTED,
    Digest,
    Precision,
    TrunkManifest,
    read_trunk_manifest,
)
from serve import memory
from serve.devices import choose_device
from serve.engine import Engine
from serve.exam import Kept
from serve.headlog import HeadLog
from serve.loading import HeadLoader
from serve.onnx_session import Device
from serve.precision import choose_precision
from serve.record import TrunkChange
from serve.references import stored_files
from serve.running import RunningTrunk, measured
from serve.settings import ServeSettings
from serve.store import StoreError
from serve.versions import OlderVersions

logger = logging.getLogger(__name__)

GetBlob = Callable[[Digest], bytes]


class TrunkBusyError(Exception):
    """A trunk is being tried beside the one that is served, and there is room for one only."""


@dataclass(frozen=True, eq=False)
class ServedTrunk:
    """A trunk of the head log in memory, and what loads its heads."""

    change: TrunkChange
    running: RunningTrunk
    loader: HeadLoader
    older: OlderVersions


class Trunks:
    """The trunk that is served, and at most one beside it: for the gates, or for a swap.

    What the gates keep of held-out samples goes with its trunk.

    Args:
        first: What the head log names now.

    Raises:
        PrecisionError: the trunk has no variant of the precision in the settings.
        DeviceError: the device in the settings cannot be used.
        StoreError: a blob is missing or damaged.
    """

    def __init__(self, log: HeadLog, settings: ServeSettings, first: TrunkChange) -> None:
        self._log, self._settings = log, settings
        self._device = choose_device(settings.device)
        self._on_load: Callable[[], None] = lambda: None
        self._is_pinned: Callable[[str], bool] = lambda _: False
        self._lock = threading.Lock()
        self._beside: ServedTrunk | None = None
        self._num_holders = 0
        self.served = self._load(first, log.get_blob)
        self.exams = Kept(first.trunk)

    def connect(self, on_load: Callable[[], None], is_pinned: Callable[[str], bool]) -> None:
        """See `AdapterMemory.connect`; for this trunk and those to come."""
        self._on_load, self._is_pinned = on_load, is_pinned
        self.served.loader.adapters.connect(on_load, is_pinned)

    def hold(
        self,
        change: TrunkChange,
        files: Mapping[Digest, bytes] | None = None,
        *,
        must_fit: bool = True,
    ) -> ServedTrunk:
        """Load a trunk beside the one that is served, or join those who hold it already.

        Args:
            files: Its files by their digest, if they are not in the store yet.
            must_fit: Whether it is refused for want of memory; what the log says has to be served.

        Raises:
            MemoryShortError: it does not fit beside the trunk that is served.
            TrunkBusyError: another one is held.
            PrecisionError: it has no variant of the precision in the settings.
            StoreError: a blob is missing or damaged.
        """
        with self._lock:
            if self._beside is None:
                get_blob = self._log.get_blob if files is None else files.__getitem__
                load = self._load_beside if must_fit else self._load
                self._beside = load(change, get_blob)
                self.exams.only(self.served.change.trunk, change.trunk)
            elif self._beside.change != change:
                raise TrunkBusyError(
                    f"Trunk {self._beside.change.trunk} is being tried beside the one that is "
                    "served; try again when that is decided."
                )
            self._num_holders += 1
            return self._beside

    def let_go(self) -> None:
        """One of the holders has done; the last one closes it, unless it is served by now."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders:
                return
            beside, self._beside = self._beside, None
            self.exams.only(self.served.change.trunk)
            if beside is not None and beside is not self.served:
                beside.running.close()

    def move_to(self, trunk: ServedTrunk) -> None:
        """Serve one that is held; the batcher closes the other after its last batch."""
        self.served = trunk

    def close(self) -> None:
        """Nothing is served any more."""
        with self._lock:
            if self._beside is not None and self._beside is not self.served:
                self._beside.running.residency.close()
            self.served.running.residency.close()

    def _load_beside(self, change: TrunkChange, get_blob: GetBlob) -> ServedTrunk:
        manifest = _read_manifest(change, get_blob)
        settings = self._settings
        limit_bytes = settings.memory_bytes or memory.replica_bytes(settings.most_replicas)
        needed_bytes = memory.trunk_bytes(
            manifest,
            choose_precision(manifest, settings.precision),
            adapters_bytes=self.served.loader.adapters.used_bytes,
        )
        memory.check_room(needed_bytes, limit_bytes)
        before_bytes = memory.used_bytes()
        loaded = self._load(change, get_blob)
        took_bytes = memory.used_bytes() - before_bytes
        logger.info("trunk %s takes %.1f MiB", change.trunk, took_bytes / 2**20)
        try:
            memory.check_room(0, limit_bytes)  # what it really took
        except memory.MemoryShortError:
            loaded.running.close()
            raise
        return loaded

    def _load(self, change: TrunkChange, get_blob: GetBlob) -> ServedTrunk:
        settings = self._settings
        engine = _open_engine(change, get_blob, precision=settings.precision, device=self._device)
        max_pictures, picture_s = measured(
            engine, target_s=settings.batch_target_s, most=settings.max_batch_pictures
        )
        loader = HeadLoader(
            self._log,
            engine,
            adapter_memory_bytes=settings.adapter_memory_bytes,
            picture_s=picture_s,
        )
        loader.adapters.connect(self._on_load, self._is_pinned)
        running = RunningTrunk(engine, max_pictures, picture_s, loader.adapters)
        return ServedTrunk(change, running, loader, OlderVersions(loader.load_older))


def store_trunk(log: HeadLog, manifest_bytes: bytes, files: dict[str, bytes]) -> TrunkChange:
    """Put the files that serving needs into the store.

    Raises:
        StoreError: the store cannot be written.
    """
    manifest = read_trunk_manifest(manifest_bytes)
    log.of_each(log.put_blob, [files[name] for name in stored_files(manifest)])
    return trunk_change(manifest, log.put_blob(manifest_bytes))


def trunk_change(manifest: TrunkManifest, stored: Digest) -> TrunkChange:
    """What a record says of a trunk whose manifest is stored under that digest."""
    decoded = manifest.preprocessing
    return TrunkChange(
        trunk=manifest.digest, manifest=stored, pictures=(decoded.size_px, decoded.resize_px)
    )


def load_engine(
    log: HeadLog,
    trunk: TrunkChange,
    *,
    precision: Precision | Literal["auto"] = "auto",
    device: Device = "cpu",
) -> Engine:
    """Fetch a trunk from the store and load it.

    Args:
        precision: "auto" takes the one that was picked when the trunk was exported.

    Raises:
        PrecisionError: the trunk has no such variant.
        DeviceError: a session did not get the device.
        StoreError: a blob is missing or damaged, or the manifest is another trunk's.
    """
    return _open_engine(trunk, log.get_blob, precision=precision, device=device)


def load_trunk_manifest(log: HeadLog, trunk: TrunkChange) -> TrunkManifest:
    """Fetch the manifest of a trunk from the store.

    Raises:
        StoreError: the blob is missing or damaged, or the manifest is another trunk's.
    """
    return _read_manifest(trunk, log.get_blob)


def _open_engine(
    trunk: TrunkChange,
    get_blob: GetBlob,
    *,
    precision: Precision | Literal["auto"],
    device: Device,
) -> Engine:
    manifest = _read_manifest(trunk, get_blob)
    chosen = choose_precision(manifest, precision)
    adapted = manifest.files.get(TRUNK_ADAPTED)
    return Engine(
        get_blob(f"sha256:{manifest.files[PRECISION_GRAPHS[chosen]].sha256}"),
        manifest,
        precision=chosen,
        adapted=get_blob(f"sha256:{adapted.sha256}") if adapted else None,
        device=device,
    )


def _read_manifest(trunk: TrunkChange, get_blob: GetBlob) -> TrunkManifest:
    manifest = read_trunk_manifest(get_blob(trunk.manifest))
    if manifest.digest != trunk.trunk:
        raise StoreError(f"The manifest of trunk {trunk.trunk} is that of {manifest.digest}.")
    return manifest
