"""A replica's side of a swap: one thread that asks the conductor and does what it says.

It runs beside the requests and not among them, so a swap is quick even when thousands wait. What it
may do is decided by `protocol.py`; here the bundle is loaded, the batcher told, the log read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from serve import protocol
from serve.access import TokenChange
from serve.batcher import Batcher
from serve.engine import LiveHead, Retired, Snapshot
from serve.headlog import HeadLog
from serve.link import Link, LinkError
from serve.messages import Directive, Poll
from serve.metrics import Metrics
from serve.protocol import Phase, ReplicaState
from serve.rates import Rates
from serve.record import HeadLogError, LogView, Record, TaskChange, TrunkChange, fold
from serve.store import StoreError
from serve.trunks import ServedTrunk, Trunks

logger = logging.getLogger(__name__)

RETRY_S = 0.1
POLL_TIMEOUT_S = 5.0


class StageError(Exception):
    """A bundle cannot go live on this replica, with the reason for the pusher."""


@dataclass(frozen=True)
class StagedTrunk:
    """A trunk that is held beside the one that is served, and the heads that go live with it."""

    trunk: ServedTrunk
    heads: list[LiveHead]


class Watcher:
    """Follows the conductor and the log, and moves the batcher's pointers.

    Args:
        view: The log as it was when the batcher's snapshot was loaded.
        stage: Fetches, checks and loads the head of a change; raises StageError if it cannot.
        load: Fetches and loads a head that is live already: a gate that became stricter since
            must not keep a replica from what all others answer with.
        stage_trunk: As `stage`, for a trunk and all its heads.
        load_trunk: As `load`, for the trunk that a log names and all that is live.
        hold_s: Longest pause of a task before the replica settles the swap by itself.
    """

    def __init__(
        self,
        replica: protocol.ReplicaId,
        log: HeadLog,
        view: LogView,
        link: Link,
        batcher: Batcher,
        trunks: Trunks,
        stage: Callable[[TaskChange], LiveHead],
        load: Callable[[TaskChange], LiveHead],
        stage_trunk: Callable[[TrunkChange, Sequence[TaskChange]], StagedTrunk],
        load_trunk: Callable[[LogView], tuple[ServedTrunk, Snapshot]],
        *,
        metrics: Metrics,
        rates: Rates,
        hold_s: float,
    ) -> None:
        self._replica, self._log, self._view, self._link = replica, log, view, link
        self._batcher, self._trunks, self._metrics, self._rates = batcher, trunks, metrics, rates
        self._tokens = view.token_history, view.tokens
        self._load_checked, self._load = stage, load
        self._stage_trunk, self._load_trunk = stage_trunk, load_trunk
        self._hold_s = hold_s
        self._state = ReplicaState(at=view.live_number)
        self._staged: list[LiveHead | Retired] = []
        self._staged_trunk: ServedTrunk | None = None
        self._proposed: Record | None = None  # what was staged for
        self._veto: tuple[int, str] = (0, "")
        self._held_since_s = 0.0
        self._heard = 0
        self._reported_at_s = 0.0
        self._has_news_of_all = False
        self._admitted = threading.Event()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def is_admitted(self) -> bool:
        """Whether the conductor has let this replica answer."""
        return self._admitted.is_set()

    @property
    def tokens(self) -> Mapping[str, TokenChange]:
        """Every access token, by its id; what was revoked is so before its revocation returns."""
        history, tokens = self._tokens
        if history is not self._view.token_history:
            history = self._view.token_history
            tokens = self._view.tokens
            self._tokens = history, tokens
        return tokens

    @property
    def view(self) -> LogView:
        """The log as far as what is live here goes."""
        return self._view

    def wait_admitted(self) -> None:
        """Wait until the conductor lets this replica answer; without a conductor, for ever."""
        self._admitted.wait()

    def start(self) -> None:
        """Begin to ask; the batcher opens once the conductor has admitted this replica."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. The process is about to go; until then it stays a member."""
        self._is_stopping.set()

    def _watch(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self._step()
            # The thread is the replica's only way to hear of swaps: it must outlive any error.
            except Exception:
                logger.exception("the watcher stumbled and goes on")
                self._is_stopping.wait(RETRY_S)

    def _step(self) -> None:
        if self._state.hold and self._hold_left_s() <= 0:
            self._settle()
        if not self._admitted.is_set():
            self._catch_up(until=None)
        try:
            directive = self._link.poll(self._report(), self._patience_s())
        except LinkError:
            self._has_news_of_all = True  # who knows which reports were heard
            self._heard = 0  # a restarted conductor counts its directives anew
            self._is_stopping.wait(min(RETRY_S, self._patience_s()))
            return
        self._heard = directive.sequence
        self._rates.hear(directive.spent)
        self._obey(directive)
        if directive.is_admitted != self._admitted.is_set():
            self._join(is_admitted=directive.is_admitted)

    def _join(self, *, is_admitted: bool) -> None:
        """Answer from now on; or answer nothing, if the conductor does not know this replica."""
        if is_admitted:
            self._admitted.set()
        else:
            self._admitted.clear()
        self._batcher.set_open(is_open=is_admitted)

    def _obey(self, directive: Directive) -> None:
        number, record = directive.number, directive.record
        if directive.undone:
            self._release(directive.undone)
        if directive.phase is Phase.STAGE and record is not None:
            self._stage(number, record)
        elif directive.phase is Phase.HOLD and record is not None:
            self._hold(number, record)
        elif directive.phase is Phase.FLIP and record is not None:
            self._flip(number, record)
        elif directive.phase is Phase.IDLE and not self._state.hold:
            self._drop_staged()

    def _stage(self, number: int, record: Record) -> None:
        if self._veto[0] == number or not protocol.takes_stage(self._state, number):
            return
        try:
            self._catch_up(until=number - 1)
            if self._view.number != number - 1:
                raise StoreError(f"Record {number - 1} is not in the log yet.")
            self._drop_staged()
            self._staged, self._proposed = self._stage_all(record), record
        except StageError as error:
            self._veto = (number, str(error))
            return
        except StoreError as error:
            # No verdict on the bundle: ask again until it can be read or the swap is given up.
            logger.warning("cannot stage swap %d yet: %s", number, error)
            self._heard = 0
            self._is_stopping.wait(RETRY_S)
            return
        self._state = protocol.stage(self._state, number, at=self._view.live_number)

    def _stage_all(self, record: Record) -> list[LiveHead | Retired]:
        if record.trunk is not None and not self._is_served(record.trunk):
            with_trunk = self._stage_trunk(record.trunk, record.changes)
            self._staged_trunk = with_trunk.trunk
            return [*with_trunk.heads]
        staged: list[LiveHead | Retired] = []
        for change in record.changes:
            try:
                staged.append(_loaded(change, record.written_at, self._load_checked))
            except StageError as error:
                if len(record.changes) == 1:
                    raise
                raise StageError(f"{change.task}: {error}") from error
        return staged

    def _hold(self, number: int, record: Record) -> None:
        state = protocol.hold(self._state, number)
        if state.hold == number and self._state.hold != number:
            self._batcher.hold(frozenset(change.task for change in record.changes))
            self._held_since_s = time.monotonic()
        self._state = state
        if state.hold == number and self._batcher.wait_drained(self._hold_left_s()):
            self._state = protocol.drained(state)

    def _flip(self, number: int, record: Record) -> None:
        state = protocol.flip(self._state, number)
        if state.at != self._state.at:
            self._move_to(record)
        self._state = state

    def _release(self, number: int) -> None:
        state = protocol.release(self._state, number)
        if state.hold != self._state.hold:
            self._batcher.release()
            self._observe_hold()
        self._state = state

    def _settle(self) -> None:
        """The hold ran out: put an abort under its number, and do what the record there says."""
        number = self._state.hold
        abort = Record(
            number=number,
            kind="abort",
            previous=self._view.tip,
            writer=self._replica,
            written_at=datetime.now(UTC).isoformat(),
        )
        try:
            standing = self._log.put_record(abort, timeout_s=self._hold_s)
            is_committed = standing == self._proposed
            if standing.kind == "commit" and not is_committed:
                # Another service's: what it made live is loaded like anything else in the log.
                self._catch_up(until=number)
                return
        except (StoreError, HeadLogError) as error:
            # The conductor may still know; it is asked next, and the store again after that.
            logger.warning("swap %d is undecided: %s", number, error)
            self._batcher.refuse_held()
            return
        if is_committed:
            self._move_to(standing)
        else:
            self._view = fold(self._view, [standing])
            self._batcher.release()
            self._drop_staged()
            self._observe_hold()
        self._state = protocol.settle(self._state, number, is_committed=is_committed)

    def _move_to(self, record: Record) -> None:
        """Point at what the record made live; it is the one that was staged."""
        self._view = fold(self._view, [record])
        snapshot = self._batcher.snapshot
        snapshot = snapshot.with_heads(record.number, self._staged, self._view.settings)
        self._flip_to(snapshot, self._staged_trunk)
        self._drop_staged()
        self._observe_hold()

    def _flip_to(self, snapshot: Snapshot, trunk: ServedTrunk | None) -> None:
        if trunk is None:
            self._batcher.flip(snapshot)
        else:
            self._trunks.move_to(trunk)
            self._batcher.flip(snapshot, trunk.running)

    def _drop_staged(self) -> None:
        """Keep nothing of a swap that is over."""
        self._staged = []
        if self._staged_trunk is not None:
            self._staged_trunk = None
            self._trunks.let_go()

    def _is_served(self, trunk: TrunkChange) -> bool:
        return trunk.trunk == self._batcher.trunk.digest

    def _catch_up(self, *, until: int | None) -> None:
        """Fold the log and load what it made live; this ends any older hold."""
        view = self._log.follow(self._view, until=until)
        snapshot = self._batcher.snapshot
        if view.trunk is not None and not self._is_served(view.trunk):
            if self._staged_trunk is not None and self._staged_trunk.change != view.trunk:
                self._drop_staged()
            trunk, snapshot = self._load_trunk(view)
            self._flip_to(snapshot, trunk)
            self._trunks.let_go()
        elif view.live_number != self._view.live_number:
            changed = [
                history[-1]
                for task, history in view.tasks.items()
                if history != self._view.tasks.get(task)
            ]
            heads = [_loaded(last.change, last.written_at, self._load) for last in changed]
            snapshot = snapshot.with_heads(view.live_number, heads, view.settings)
        if snapshot is not self._batcher.snapshot or 0 < self._state.hold <= view.number:
            self._batcher.flip(snapshot)
            self._observe_hold()
        self._view = view
        self._state = protocol.caught_up(self._state, view.number, at=view.live_number)

    def _report(self) -> Poll:
        now, metrics, trials, models = time.monotonic(), None, None, None
        if now - self._reported_at_s > 1.0:
            self._reported_at_s = now
            metrics = [*self._metrics.report(self._view.tasks), *self._log.store.calls.report()]
            trials = self._batcher.comparisons.trials
            models = self._metrics.models.report(everything=self._has_news_of_all)
            self._has_news_of_all = False
        return Poll(
            self._replica,
            self._state.at,
            self._admitted.is_set(),
            self._state.ack,
            *self._veto,
            self._heard,
            metrics,
            trials,
            self._rates.spent(),
            models,
        )

    def _hold_left_s(self) -> float:
        return self._held_since_s + self._hold_s - time.monotonic()

    def _patience_s(self) -> float:
        """Longest wait for an answer: never past the end of a hold, and short after it."""
        if not self._state.hold:
            return POLL_TIMEOUT_S
        left_s = self._hold_left_s()
        return left_s if left_s > 0 else RETRY_S

    def _observe_hold(self) -> None:
        if self._state.hold:
            self._metrics.hold_seconds.observe(time.monotonic() - self._held_since_s)


def _loaded(
    change: TaskChange, written_at: str, load: Callable[[TaskChange], LiveHead]
) -> LiveHead | Retired:
    """What a change makes of its task."""
    if change.bundle is None:
        return Retired(change.task, change.version, written_at)
    return load(change)
