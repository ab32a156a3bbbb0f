"""One replica: the engine, its batcher and its watcher, started in the order that is safe.

Knows neither HTTP nor Ray: a replica can be run in a test, or in a program of one's own.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle, Digest, TrunkManifest
from models.pictures import load_picture
from serve import gates, signature_gate
from serve.access_log import AccessLog
from serve.adapted import AdapterError
from serve.batcher import Batcher
from serve.devices import DeviceError
from serve.engine import Engine, LiveHead, Snapshot
from serve.exam import Exam
from serve.grounds import Grounds
from serve.headlog import HeadLog
from serve.jobs import (
    Answer,
    Inputs,
    Job,
    Kind,
    OtherTrunkError,
    OverloadedError,
    TimeSpent,
    VersionHead,
    any_task,
    model_name,
)
from serve.link import Link
from serve.live_gates import compare
from serve.loading import LOAD_THREADS
from serve.memory import MemoryShortError
from serve.metrics import Metrics
from serve.precision import PrecisionError
from serve.rates import Rates
from serve.record import LogView, TaskChange, TaskVersion, TrunkChange, Verdict
from serve.settings import ServeSettings
from serve.store import ask_until_answered
from serve.timeline import CURRENT
from serve.trunks import ServedTrunk, TrunkBusyError, Trunks
from serve.trust import SignedBy
from serve.watcher import StagedTrunk, StageError, Watcher

logger = logging.getLogger(__name__)

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
        self.trunks = Trunks(log, settings, view.trunk)
        self.batcher = Batcher(
            self.trunks.served.running,
            self.trunks.served.loader.snapshot(view),
            self.metrics,
            max_queued=settings.max_queued,
            decode_threads=settings.decode_threads,
            decode_anew=self._decode_anew,
        )
        self.trunks.connect(self.batcher.wake, self._is_pinned)
        self.decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.tracing = _tracing(name)
        self.access_log = AccessLog(settings.access_log) if settings.access_log else None
        # One push at a time is examined, so that a burst of them leaves the cores to answers.
        self.examiner = ThreadPoolExecutor(
            1, thread_name_prefix="gates", initializer=_let_answers_go_first
        )
        self._elders = ThreadPoolExecutor(
            1, thread_name_prefix="older", initializer=_let_answers_go_first
        )
        self._history, self.rates = view, Rates(name)
        self.watcher = Watcher(
            name,
            log,
            view,
            link,
            self.batcher,
            self.trunks,
            self.stage,
            self.load,
            self.stage_trunk,
            self.load_trunk,
            metrics=self.metrics,
            rates=self.rates,
            hold_s=settings.swap_hold_s,
        )
        self.watcher.start()

    @property
    def engine(self) -> Engine:
        """The trunk that answers now."""
        return self.batcher.trunk.engine

    def history(self) -> LogView:
        """What the log says now, read anew: never older than any answer given anywhere.

        Raises:
            StoreError: the log cannot be read.
        """
        self._history = self.log.follow(self._history)
        return self._history

    def ask(
        self,
        inputs: Sequence[bytes] | Inputs,
        tasks: tuple[str, ...] | None,
        deadline_s: float,
        caller: str = "",
        may_ask: Callable[[str], bool] = any_task,
        version: VersionHead | None = None,
        made_for: TrunkManifest | None = None,
    ) -> Future[list[list[Answer]]]:
        """Decode pictures in a thread, which then queues the request itself.

        On a small machine each hand-over between threads costs about as much as a head's run, so a
        request goes from its caller to one decoder, to the engine, and back. One decoder takes all
        its pictures: a request of many would otherwise keep the others from single ones.

        Args:
            inputs: Encoded pictures; or what `Job` takes, which needs no decoding.
            deadline_s: See `Job`.
            caller: See `Job`.
            may_ask: See `Job`.
            version: See `Job`.
            made_for: See `Job`; of encoded pictures this is settled when they are decoded.

        Returns:
            Answers as [input][task], or what `decode` and `Batcher` raise.
        """
        job = Job(
            [array for array in inputs if isinstance(array, np.ndarray)],
            tasks,
            deadline_s,
            caller=caller,
            may_ask=may_ask,
            encoded=[data for data in inputs if isinstance(data, bytes)],
            made_for=made_for,
            kind=_kind_of(inputs),
            version=version,
        )
        job.timeline = CURRENT.get()
        pinned = version.live if version else None
        # Without the job itself, which would be kept by its own future, with its pictures.
        job.done.add_done_callback(partial(self._count, tasks, job.kind, pinned, job.spent))
        try:
            self.batcher.expect(job, len(inputs))
        except OverloadedError as error:
            job.fail(error)
        else:
            self.decoders.submit(self._decode_and_queue, job)
        return job.done

    def older(self, version: TaskVersion, trunk: TrunkChange) -> Future[VersionHead]:
        """What answered in a version that is no longer live, or what reading its bundle raises.

        It is loaded by a thread of its own, which lets those go first that answer.

        Args:
            trunk: What the version was made for; once another is served, `OtherTrunkError` is
                raised.
        """
        return self._elders.submit(self._load_older, version, trunk)

    def decode(self, data: bytes, manifest: TrunkManifest) -> NDArray[np.uint8]:
        """A picture as a trunk takes it, uint8 [size, size, 3].

        Raises:
            PictureError: not a picture, damaged, or too large.
        """
        began_s = time.monotonic()
        picture = load_picture(
            data, manifest.preprocessing, max_pixels=self.settings.max_picture_pixels
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
        return self.trunks.served.loader.load(change)

    def stage(self, change: TaskChange) -> LiveHead:
        """Fetch what a change pushes, run the gates on it here, load its head.

        What was live before has passed its gates, and is mostly still loaded.

        Raises:
            StageError: a gate said no, or there is no memory for its adapter.
            StoreError: the log or a bundle cannot be read.
        """
        live = self.batcher.snapshot.heads.get(change.task)
        if live is not None:
            self.trunks.served.loader.keep(live)
        return self._stage(change, live, self.trunks.served)

    def stage_trunk(self, trunk: TrunkChange, changes: Sequence[TaskChange]) -> StagedTrunk:
        """Load a trunk beside the one that is served, and all heads that go live with it.

        Raises:
            StageError: it does not fit into memory or cannot be loaded, or see `stage`.
            StoreError: the log or a blob cannot be read.
        """
        try:
            held = self.trunks.hold(trunk)
        except (MemoryShortError, TrunkBusyError, PrecisionError, DeviceError) as error:
            raise StageError(str(error)) from error

        def stage(change: TaskChange) -> LiveHead:
            try:
                return self._stage(change, None, held)
            except StageError as error:
                raise StageError(f"{change.task}: {error}") from error

        try:
            with ThreadPoolExecutor(max(LOAD_THREADS, self.log.store.num_readers)) as pool:
                return StagedTrunk(held, list(pool.map(stage, changes)))
        except Exception:
            self.trunks.let_go()
            raise

    def load_trunk(self, view: LogView) -> tuple[ServedTrunk, Snapshot]:
        """Load the trunk that a log names, beside the one that is served, and all that is live.

        Raises:
            StoreError: the log or a blob cannot be read.
        """
        assert view.trunk is not None
        held = self.trunks.hold(view.trunk, must_fit=False)
        try:
            return held, held.loader.snapshot(view)
        except Exception:
            self.trunks.let_go()
            raise

    def admit(
        self, bundle: Bundle, task: str, engine: Engine
    ) -> tuple[tuple[Verdict, ...], SignedBy | None]:
        """The verdicts of the gates that look at a push alone, and who signed it.

        Args:
            engine: The trunk that the bundle is to be served on.

        Raises:
            StoreError: the log cannot be read.
        """
        keys = self.history().signing_keys
        verdict, signed = signature_gate.admit_signature(bundle, task, keys, datetime.now(UTC))
        return (verdict, *(self._admit(bundle, engine) if verdict.passed else ())), signed

    def _stage(self, change: TaskChange, live: LiveHead | None, trunk: ServedTrunk) -> LiveHead:
        new = _pushed(change, live)
        checked = self._checked(change, new, trunk.running.engine) if new else None
        try:
            return trunk.loader.load(change, checked)
        except AdapterError as error:  # there is no memory for it here
            raise StageError(str(error)) from error

    def _checked(self, change: TaskChange, digest: Digest, engine: Engine) -> Bundle:
        """A pushed bundle that has passed the gates here too, its signature among them."""
        signed = change.signature_of(digest)
        bundle = self.log.get_bundle(digest, signature=signed.envelope if signed else None)
        keys = self.history().signing_keys
        try:
            signature_gate.check_staged(change, bundle, keys, datetime.now(UTC))
        except gates.GateError as error:
            raise StageError(str(error)) from error
        refused = [verdict for verdict in self._admit(bundle, engine) if not verdict.passed]
        if refused:
            raise StageError(refused[0].reason)
        return bundle

    def _admit(self, bundle: Bundle, engine: Engine) -> tuple[Verdict, ...]:
        return gates.admit(bundle, engine, max_head_bytes=self.settings.max_head_bytes)

    def compare(
        self,
        bundle: Bundle,
        task: str,
        engine: Engine,
        live_engine: Engine,
        grounds: Grounds,
        *,
        allow_new_labels: bool,
    ) -> tuple[Verdict, ...]:
        """The verdicts of the gates that compare an admitted bundle with what is live.

        Args:
            engine: The trunk that the bundle is to be served on.
            live_engine: The trunk that is served, mostly the same.

        Raises:
            StoreError: what is live, or the task's held-out sample, cannot be read.
        """
        return compare(
            bundle,
            self.log.get_served(grounds.live) if grounds.live else None,
            self._exam(grounds.heldout, bundle) if grounds.heldout else None,
            grounds,
            engine,
            live_engine,
            task=task,
            allow_new_labels=allow_new_labels,
        )

    def _exam(self, heldout: Digest, bundle: Bundle) -> Exam:
        num_labels = len(bundle.manifest.labels)
        return Exam(heldout, self.log.get_blob, self.trunks.exams, num_labels=num_labels)

    @property
    def is_healthy(self) -> bool:
        """Whether its threads live; a replica that is not is replaced."""
        threads = (self.batcher, self.watcher, self.trunks.served.loader.adapters)
        return all(thread.is_alive for thread in threads)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self.watcher.stop()
        self.batcher.close()
        self.trunks.close()
        if self.access_log:
            self.access_log.close()
        if self.tracing:
            self.tracing.close()
        self.decoders.shutdown(wait=False)
        self.examiner.shutdown(wait=False)
        self._elders.shutdown(wait=False)

    def _is_pinned(self, task: str) -> bool:
        return self.batcher.snapshot.settings_of(task).pinned

    def _decode_and_queue(self, job: Job) -> None:
        if job.done.cancelled():  # the caller has gone
            return
        began_s = time.monotonic()
        try:
            self._decode(job)
            job.queued_at = time.monotonic()
            job.spent.decoding_s = job.queued_at - began_s
            if job.timeline:
                job.timeline.steps.append(("decode", began_s, job.queued_at))
            self.batcher.submit(job)
        # Whatever it is, it is this request's answer; a thread of a pool has nobody to tell.
        except Exception as error:  # noqa: BLE001
            job.fail(error)

    def _decode(self, job: Job) -> None:
        if not job.encoded:
            return
        manifest = self.engine.manifest
        pictures = [self.decode(data, manifest) for data in job.encoded]
        job.inputs, job.made_for = pictures, manifest

    def _load_older(self, version: TaskVersion, trunk: TrunkChange) -> VersionHead:
        served = self.trunks.served
        if served.running.digest != trunk.trunk:
            raise OtherTrunkError
        try:
            return VersionHead(served.older.head(version), served.running.engine.manifest)
        except Exception as error:
            if self.trunks.served is not served:  # it was closed meanwhile
                raise OtherTrunkError from error
            raise

    def _count(
        self,
        tasks: tuple[str, ...] | None,
        kind: Kind,
        version: LiveHead | None,
        spent: TimeSpent,
        done: Future[list[list[Answer]]],
    ) -> None:
        """Note of every model that a request asked how that ended."""
        total_s, models = time.monotonic() - spent.asked_at, self.metrics.models
        if not done.cancelled() and done.exception() is None:
            answers = done.result()
            models.answered(
                [(model_name(a.live.task, kind), a.live.version) for a in answers[0]],
                total_s,
                num_rows=len(answers),
                decoding_s=spent.decoding_s,
                running_s=spent.running_s,
            )
            return
        heads = self.batcher.snapshot.heads
        asked = [version] if version else map(heads.get, tasks or ())
        models.failed([(model_name(h.task, kind), h.version) for h in asked if h], total_s)

    def _decode_anew(self, job: Job) -> None:
        """The trunk has changed while a job waited; it goes on when its pictures fit again."""
        if job.version or not job.encoded:
            job.fail_unfit()
            return

        def decode() -> None:
            try:
                self._decode(job)
            except Exception as error:  # noqa: BLE001
                job.fail(error)
            self.batcher.resume(job)

        self.decoders.submit(decode)


def _tracing(name: str) -> Any:
    """Spans, where OpenTelemetry's variables say where to send them."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not any(os.environ.get(endpoint) for endpoint in endpoints):
        return None
    from serve.tracing import Tracing  # noqa: PLC0415 (imports the SDK)

    return Tracing(name)


def _kind_of(inputs: Sequence[bytes] | Inputs) -> Kind:
    first = inputs[0]
    if isinstance(first, bytes):
        return ""
    return "features" if first.ndim == 1 else "pixels"


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
