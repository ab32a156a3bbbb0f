"""One replica: the engine, its batcher and its watcher, started in the order that is safe.

Knows neither HTTP nor Ray: a replica can be run in a test, or in a program of one's own.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.bundle import (
    PRECISION_GRAPHS,
    TRUNK_ADAPTED,
    Bundle,
    Digest,
    Precision,
    TrunkManifest,
    read_trunk_manifest,
)
from models.pictures import load_picture
from serve import gates, signature_gate
from serve.access_log import AccessLog
from serve.adapted import AdapterError
from serve.batcher import Batcher
from serve.devices import choose_device
from serve.engine import Engine, LiveHead
from serve.grounds import Grounds
from serve.headlog import HeadLog
from serve.jobs import Answer, Job, OverloadedError, any_task
from serve.link import Link
from serve.live_gates import compare
from serve.loading import HeadLoader
from serve.metrics import Metrics
from serve.onnx_session import Device
from serve.precision import choose_precision
from serve.rates import Rates
from serve.record import LogView, TaskChange, TrunkChange, Verdict
from serve.references import stored_files
from serve.settings import ServeSettings
from serve.sizing import largest_batch
from serve.store import StoreError, ask_until_answered
from serve.timeline import CURRENT
from serve.trust import SignedBy
from serve.watcher import StageError, Watcher

logger = logging.getLogger(__name__)

BATCH_TRIALS = 5
NICER = 5


class NoTrunkError(Exception):
    """The head log names no trunk yet, so nothing can be served."""


class Replica:
    """Everything that answers in one process.

    Args:
        name: Unique to this process; a restarted one has another.

    Raises:
        NoTrunkError: the log has no trunk.
        PrecisionError: the trunk has no variant of the precision in the settings.
        DeviceError: the device in the settings cannot be used.
        StoreError: the log or what it names cannot be read.
    """

    def __init__(self, name: str, log: HeadLog, link: Link, settings: ServeSettings) -> None:
        self.log, self.settings, self.metrics = log, settings, Metrics()
        # A replica that ended now would only be started again and again.
        view = ask_until_answered(lambda: log.follow(LogView()))
        if view.trunk is None:
            raise NoTrunkError(f"The store {log.url} has no trunk; start with --trunk FOLDER.")
        device = choose_device(settings.device)
        self.engine = load_engine(log, view.trunk, precision=settings.precision, device=device)
        batch_size, picture_s = self._batch_size()
        self._loader = HeadLoader(
            log,
            self.engine,
            adapter_memory_bytes=settings.adapter_memory_bytes,
            picture_s=picture_s,
        )
        self.batcher = Batcher(
            self.engine,
            self._loader.snapshot(view),
            self.metrics,
            max_pictures=batch_size,
            max_queued=settings.max_queued,
            picture_s=picture_s,
            decode_threads=settings.decode_threads,
            residency=self._loader.adapters,
        )
        self._loader.adapters.connect(self.batcher.wake, self._is_pinned)
        self.decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.tracing = _tracing(name)
        self.access_log = AccessLog(settings.access_log) if settings.access_log else None
        # One push at a time is examined, so that a burst of them leaves the cores to answers.
        self.examiner = ThreadPoolExecutor(
            1, thread_name_prefix="gates", initializer=_let_answers_go_first
        )
        self._history, self.rates = view, Rates(name)
        self.watcher = Watcher(
            name,
            log,
            view,
            link,
            self.batcher,
            self.stage,
            self.load,
            metrics=self.metrics,
            rates=self.rates,
            hold_s=settings.swap_hold_s,
        )
        self.watcher.start()

    def history(self) -> LogView:
        """What the log says now, read anew: never older than any answer given anywhere.

        Raises:
            StoreError: the log cannot be read.
        """
        self._history = self.log.follow(self._history)
        return self._history

    def ask(
        self,
        pictures: Sequence[bytes],
        tasks: tuple[str, ...] | None,
        deadline_s: float,
        caller: str = "",
        may_ask: Callable[[str], bool] = any_task,
    ) -> Future[list[list[Answer]]]:
        """Decode pictures in a thread, which then queues the request itself.

        On a small machine each hand-over between threads costs about as much as a head's run, so a
        request goes from its caller to one decoder, to the engine, and back. One decoder takes all
        its pictures: a request of many would otherwise keep the others from single ones.

        Args:
            deadline_s: See `Job`.
            caller: See `Job`.
            may_ask: See `Job`.

        Returns:
            Answers as [picture][task], or what `decode` and `Batcher` raise.
        """
        done: Future[list[list[Answer]]] = Future()
        job = Job([], tasks, deadline_s, done, caller=caller, may_ask=may_ask)
        job.timeline = CURRENT.get()
        try:
            self.batcher.expect(job, len(pictures))
        except OverloadedError as error:
            job.fail(error)
        else:
            self.decoders.submit(self._decode_and_queue, pictures, job)
        return done

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """A picture as the trunk takes it, uint8 [size, size, 3].

        Raises:
            PictureError: not a picture, damaged, or too large.
        """
        began_s = time.monotonic()
        picture = load_picture(
            data,
            self.engine.manifest.preprocessing,
            max_pixels=self.settings.max_picture_pixels,
        )
        seconds = time.monotonic() - began_s
        self.metrics.decode_seconds.observe(seconds)
        self.batcher.admission.see_decoding(seconds)
        return picture

    def load(self, change: TaskChange) -> LiveHead:
        """Fetch the bundle of a change that is live, and load its head.

        It passed every gate when it was pushed, and is not asked again.

        Raises:
            StoreError: the bundle cannot be read.
        """
        return self._loader.load(change)

    def stage(self, change: TaskChange) -> LiveHead:
        """Fetch what a change pushes, run the gates on it here, load its head.

        What was live before has passed its gates, and is mostly still loaded.

        Raises:
            StageError: a gate said no, or there is no memory for its adapter.
            StoreError: the log or a bundle cannot be read.
        """
        live = self.batcher.snapshot.heads.get(change.task)
        if live is not None:
            self._loader.keep(live)
        new = _pushed(change, live)
        checked = self._checked(change, new) if new else None
        try:
            return self._loader.load(change, checked)
        except AdapterError as error:  # there is no memory for it here
            raise StageError(str(error)) from error

    def admit(self, bundle: Bundle, task: str) -> tuple[tuple[Verdict, ...], SignedBy | None]:
        """The verdicts of the gates that look at a push alone, and who signed it.

        Raises:
            StoreError: the log cannot be read.
        """
        keys = self.history().signing_keys
        verdict, signed = signature_gate.admit_signature(bundle, task, keys, datetime.now(UTC))
        return (verdict, *(self._admit(bundle) if verdict.passed else ())), signed

    def _checked(self, change: TaskChange, digest: Digest) -> Bundle:
        """A pushed bundle that has passed the gates here too, its signature among them."""
        signed = change.signature_of(digest)
        bundle = self.log.get_bundle(digest, signature=signed.envelope if signed else None)
        keys = self.history().signing_keys
        try:
            signature_gate.check_staged(change, bundle, keys, datetime.now(UTC))
        except gates.GateError as error:
            raise StageError(str(error)) from error
        refused = [verdict for verdict in self._admit(bundle) if not verdict.passed]
        if refused:
            raise StageError(refused[0].reason)
        return bundle

    def _admit(self, bundle: Bundle) -> tuple[Verdict, ...]:
        return gates.admit(bundle, self.engine, max_head_bytes=self.settings.max_head_bytes)

    def compare(
        self, bundle: Bundle, task: str, grounds: Grounds, *, allow_new_labels: bool
    ) -> tuple[Verdict, ...]:
        """The verdicts of the gates that compare an admitted bundle with what is live.

        Raises:
            StoreError: what is live, or the task's held-out sample, cannot be read.
        """
        return compare(
            bundle,
            self.log.get_served(grounds.live) if grounds.live else None,
            self.log.get_blob(grounds.heldout) if grounds.heldout else None,
            grounds,
            self.engine,
            task=task,
            allow_new_labels=allow_new_labels,
        )

    @property
    def is_healthy(self) -> bool:
        """Whether its threads live; a replica that is not is replaced."""
        threads = (self.batcher, self.watcher, self._loader.adapters)
        return all(thread.is_alive for thread in threads)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self.watcher.stop()
        self.batcher.close()
        self._loader.adapters.close()
        if self.access_log:
            self.access_log.close()
        if self.tracing:
            self.tracing.close()
        self.decoders.shutdown(wait=False)
        self.examiner.shutdown(wait=False)

    def _is_pinned(self, task: str) -> bool:
        return self.batcher.snapshot.settings_of(task).pinned

    def _decode_and_queue(
        self,
        pictures: Sequence[bytes],
        job: Job,
    ) -> None:
        if job.done.cancelled():  # the caller has gone
            return
        began_s = time.monotonic()
        try:
            job.inputs = [self.decode(data) for data in pictures]
            job.queued_at = time.monotonic()
            if job.timeline:
                job.timeline.steps.append(("decode", began_s, job.queued_at))
            self.batcher.submit(job)
        # Whatever it is, it is this request's answer; a thread of a pool has nobody to tell.
        except Exception as error:  # noqa: BLE001
            job.fail(error)

    def _batch_size(self) -> tuple[int, float]:
        """Pictures in a batch, and seconds for each, as measured on this device now."""
        target_s = self.settings.batch_target_s
        size, picture_s = largest_batch(
            self._seconds_of, target_s=target_s, most=self.settings.max_batch_pictures
        )
        logger.info(
            "batches of up to %d pictures at %.2f ms each, for a target of %.0f ms",
            size,
            1000 * picture_s,
            1000 * target_s,
        )
        return size, picture_s

    def _seconds_of(self, num_pictures: int) -> float:
        size_px = self.engine.manifest.preprocessing.size_px
        pictures = np.zeros((num_pictures, size_px, size_px, 3), np.uint8)
        self.engine.features(pictures)  # the first run of a size allocates
        seconds = []
        for _ in range(BATCH_TRIALS):
            began_s = time.perf_counter()
            self.engine.features(pictures)
            seconds.append(time.perf_counter() - began_s)
        return statistics.median(seconds)


def _tracing(name: str) -> Any:
    """Spans, where OpenTelemetry's variables say where to send them."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not any(os.environ.get(endpoint) for endpoint in endpoints):
        return None
    from serve.tracing import Tracing  # noqa: PLC0415 (imports the SDK)

    return Tracing(name)


def _let_answers_go_first() -> None:
    """Make this thread nicer than those that answer.

    Answers of MobileNetV3-small beside a comparison on 200 pictures, on a busy AMD EPYC of 2 cores:
    p50 up from 3.3-3.7 to 4.3-8.2 ms as it was, and 2.9-3.6 against 3.0-3.1 ms alone like this; the
    comparison took 1.2 s instead of 1.0 to 3.5 s.
    """
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + NICER)


def _pushed(change: TaskChange, live: LiveHead | None) -> Digest | None:
    """The bundle that a change brings; None where it goes back, or on with a candidate."""
    if change.action == "push":
        return change.bundle
    known = live.candidate.bundle if live and live.candidate else None
    if change.candidate and change.candidate.bundle != known:
        return change.candidate.bundle
    return None


def store_trunk(log: HeadLog, manifest_bytes: bytes, files: dict[str, bytes]) -> TrunkChange:
    """Put the files that serving needs into the store.

    Raises:
        StoreError: the store cannot be written.
    """
    manifest = read_trunk_manifest(manifest_bytes)
    log.of_each(log.put_blob, [files[name] for name in stored_files(manifest)])
    return TrunkChange(trunk=manifest.digest, manifest=log.put_blob(manifest_bytes))


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
    manifest = load_trunk_manifest(log, trunk)
    chosen = choose_precision(manifest, precision)
    graph: Digest = f"sha256:{manifest.files[PRECISION_GRAPHS[chosen]].sha256}"
    adapted = manifest.files.get(TRUNK_ADAPTED)
    return Engine(
        log.get_blob(graph),
        manifest,
        precision=chosen,
        adapted=log.get_blob(f"sha256:{adapted.sha256}") if adapted else None,
        device=device,
    )


def load_trunk_manifest(log: HeadLog, trunk: TrunkChange) -> TrunkManifest:
    """Fetch the manifest of a trunk from the store.

    Raises:
        StoreError: the blob is missing or damaged, or the manifest is another trunk's.
    """
    manifest = read_trunk_manifest(log.get_blob(trunk.manifest))
    if manifest.digest != trunk.trunk:
        raise StoreError(f"The trunk in {log.url} is {manifest.digest}, not {trunk.trunk}.")
    return manifest
