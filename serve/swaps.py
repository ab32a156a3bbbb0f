"""One swap after another: stage, hold, commit, flip, or the way back from them.

The transitions are `protocol.py`'s; here they are driven: records are written, replicas told, their
acknowledgements awaited, the silent ones killed. Which record is to be written is the conductor's
affair.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from datetime import UTC, datetime
from itertools import pairwise

from serve import protocol
from serve.headlog import HeadLog
from serve.messages import Directive, Poll, Swapped
from serve.protocol import Phase, ReplicaId
from serve.record import LogView, Record, fold
from serve.roll_call import RollCall
from serve.store import StoreError
from serve.swap_metrics import SwapMetrics

logger = logging.getLogger(__name__)

POLL_S = 1.0  # an unanswered poll comes back after this, so that silence means something
JOIN_RETRY_S = 0.05
PROBE_S = 0.1  # how often the members that are missing are looked for among the living


class SwapUndoneError(Exception):
    """A swap was given up before its commit; everything is as it was."""

    def __init__(self, reason: str, *, is_veto: bool) -> None:
        super().__init__(reason)
        self.is_veto = is_veto


class OvertakenError(Exception):
    """Another service's commit stands under the number of a swap, which changed nothing."""

    def __init__(self, foreign: tuple[Record, ...]) -> None:
        super().__init__(", ".join(f"record {r.number} is {r.writer}'s" for r in foreign))
        self.foreign = foreign


class Swaps:
    """The swap in progress, its members, and the log as far as they were taken.

    Args:
        view: The log up to the conductor's own abort, so that nothing before it is undecided.
        members: Every replica process that may live, joined or not.
        writer: What its records name as their writer.
        hold_s: The replicas' longest hold; the swap is given up a little earlier.
        stage_s: Longest wait for all replicas to load a bundle.
        trunk_stage_s: Longest wait for all replicas to load a trunk with its heads.
    """

    def __init__(
        self,
        log: HeadLog,
        view: LogView,
        roll: RollCall,
        members: frozenset[ReplicaId],
        *,
        writer: str,
        hold_s: float,
        stage_s: float,
        trunk_stage_s: float,
    ) -> None:
        self._log, self._view, self._roll, self._writer = log, view, roll, writer
        self._hold_s, self._stage_s, self._trunk_stage_s = hold_s, stage_s, trunk_stage_s
        self._state = protocol.restart(view.number, members)
        self._record: Record | None = None
        self._undone = 0
        # The last commit that no swap of this conductor made; members have to have loaded it.
        self._foreign = view.live_number
        self._sequence = secrets.randbits(40)
        self._vetoes: dict[ReplicaId, str] = {}
        self.metrics = SwapMetrics()
        self._news = asyncio.Event()
        self._acks = asyncio.Event()

    @property
    def view(self) -> LogView:
        """The log as far as it is folded here."""
        return self._view

    @property
    def members(self) -> frozenset[ReplicaId]:
        """The replicas that answer."""
        return frozenset(self._state.members)

    async def poll(self, poll: Poll) -> Directive:
        """Take a replica's report; answer when there is news for it, or after a while."""
        self._take_report(poll)
        is_admitted = self._admit(poll)
        # That it is admitted, or no longer, is news to the replica.
        if poll.heard == self._sequence and is_admitted == poll.is_joined:
            patience_s = POLL_S if is_admitted else JOIN_RETRY_S
            await _wait(self._news, patience_s)
            is_admitted = is_admitted or self._admit(poll)
        elif not is_admitted:
            await asyncio.sleep(JOIN_RETRY_S)
        return Directive(
            self._sequence,
            self._state.phase,
            self._state.number,
            self._record,
            self._undone,
            is_admitted,
            self._roll.spent(),
        )

    def draft(self, **fields: object) -> Record:
        """A commit for the next free number, checked here: once held, it has to be writable."""
        abort = dict(abort_after(self._view, self._writer))
        return Record.model_validate({**abort, "kind": "commit", **fields})

    async def make(self, record: Record) -> Swapped:
        """Stage, hold, commit, flip.

        Raises:
            SwapUndoneError: given up, and an abort stands in the log.
            OvertakenError: another service's commit stands under the number.
        """
        try:
            times_s = await self._make(record)
        except SwapUndoneError as error:
            self.metrics.swaps.labels("vetoed" if error.is_veto else "undone").inc()
            raise
        except OvertakenError:
            self.metrics.swaps.labels("overtaken").inc()
            raise
        self.metrics.made(times_s)
        began_s, held_s, *_, ended_s = times_s
        return Swapped(
            record.changes,
            stage_ms=1000 * (held_s - began_s),
            hold_ms=1000 * (ended_s - held_s),
            replicas=len(self._state.members),
            phases_s=tuple(end_s - start_s for start_s, end_s in pairwise(times_s)),
            trunk=record.trunk,
        )

    async def follow(self, record: Record) -> None:
        """Take the replicas to what another service wrote: it can be late, but not undone."""
        if record.kind == "abort":
            self._view = fold(self._view, [record])
            return
        self._begin(record)
        try:
            await self._all_acknowledge(self._longest_stage_s)
            await self._all_acknowledge(self._hold_s * 0.8)
        except SwapUndoneError as error:
            logger.warning("record %d is loaded one by one: %s", record.number, error)
            self._state = protocol.give_up(self._state)
            self._take(record)  # nobody is released: who held goes on once it has loaded this
            self._state = protocol.decided(self._state, is_own_commit=False)
            self._record = None
            self._tell()
            return
        self._decide(record)
        await self._all_flip()

    async def drop_gone(self) -> None:
        """Drop the members that are confirmed dead."""
        # Who is admitted while the runtime is asked may be missing from its answer, and lives.
        for replica in await self._roll.gone(self.members):
            self._state = protocol.drop(self._state, replica)

    async def _make(self, record: Record) -> list[float]:
        """Returns when the swap began, and when each of its phases ended."""
        self._begin(record)
        times_s = [time.monotonic()]
        try:
            for limit_s in (self._longest_stage_s, self._hold_s * 0.8):
                await self._all_acknowledge(limit_s)
                times_s.append(time.monotonic())
        # Whatever it is, the swap must not stay undecided.
        except Exception:
            await self._undo()
            raise
        await self._commit(record)
        times_s.append(time.monotonic())
        await self._all_flip()
        return [*times_s, time.monotonic()]

    @property
    def _longest_stage_s(self) -> float:
        has_trunk = self._record is not None and self._record.trunk is not None
        return self._trunk_stage_s if has_trunk else self._stage_s

    def _begin(self, record: Record) -> None:
        self._state = protocol.begin(self._state, record.number)
        self._record = record
        self._vetoes.clear()

    async def _all_acknowledge(self, limit_s: float) -> None:
        """Tell every member of this phase, wait until all acknowledge it, then go to the next.

        Raises:
            SwapUndoneError: a veto, or a member is too slow.
        """
        self._tell()
        deadline_s = time.monotonic() + limit_s
        phase = self._state.phase
        while self._state.phase is phase:
            self._state = protocol.advance(self._state)
            if self._state.phase is not phase:
                break
            if self._vetoes:
                replica, reason = next(iter(self._vetoes.items()))
                raise SwapUndoneError(f"{reason} (says replica {replica})", is_veto=True)
            if time.monotonic() > deadline_s:
                slow = ", ".join(sorted(protocol.missing(self._state)))
                raise SwapUndoneError(
                    f"{slow} did not acknowledge {phase} within {limit_s:.2f} s", is_veto=False
                )
            await self._wait_for_acks()

    async def _all_flip(self) -> None:
        """The commit stands, so this only ends when every member has flipped or is dead."""
        while self._state.phase is Phase.FLIP:
            self._state = protocol.advance(self._state)
            if self._state.phase is Phase.FLIP:
                await self._wait_for_acks()
        self._record = None
        self._tell()

    async def _wait_for_acks(self) -> None:
        """Wait for the next report; when none comes, see who is missing because it is dead."""
        if await _wait(self._acks, PROBE_S):
            return
        # It says nothing while it loads a bundle, nor while it waits for its rows in flight.
        busy_s = {Phase.STAGE: self._longest_stage_s, Phase.HOLD: self._hold_s}.get(
            self._state.phase, 0.0
        )
        try:
            await self.drop_gone()
            for replica in protocol.missing(self._state):
                if self._roll.is_silent(replica, busy_s=busy_s):
                    await self._roll.kill(replica)
        # The runtime has error classes of its own; nobody is dead until it says so.
        except Exception:
            logger.exception("the runtime cannot say which replicas live")

    async def _commit(self, record: Record) -> None:
        """Write the record: this is the swap. Whatever stands under the number decides.

        Raises:
            SwapUndoneError: a replica whose hold ran out was first, with an abort.
            OvertakenError: another service was first, with a commit.
        """
        standing = await self._put(record)
        if standing != record:
            await self._give_way(standing)
            raise SwapUndoneError(
                f"{standing.writer} held its rows for too long and aborted", is_veto=False
            )
        self._decide(record)

    def _decide(self, record: Record) -> None:
        """The record stands: every member flips."""
        self._view = fold(self._view, [record])
        self._state = protocol.decided(self._state, is_own_commit=True)
        self._tell()

    async def _undo(self) -> None:
        """Give up; failure is reported only once an abort stands under the number.

        Raises:
            OvertakenError: another service's commit stands there.
        """
        self._state = protocol.give_up(self._state)
        self._record = None
        self._tell()
        await self._give_way(await self._put(abort_after(self._view, self._writer)))

    async def _give_way(self, standing: Record) -> None:
        """Something else than our commit stands under the number: let the replicas go on.

        Raises:
            OvertakenError: another service's commit does, or followed.
        """
        self._take(standing)
        self._state = protocol.decided(self._state, is_own_commit=False)
        self._record, self._undone = None, standing.number
        self._tell()
        foreign = (standing, *await self._read_on())
        if any(record.kind == "commit" for record in foreign):
            raise OvertakenError(foreign)

    async def _read_on(self) -> list[Record]:
        """What others wrote after the record that was met."""
        try:
            records = await asyncio.to_thread(self._log.read_records, self._view.number)
        except StoreError as error:
            logger.warning("what follows record %d is met later: %s", self._view.number, error)
            return []
        for record in records:
            self._take(record)
        self._tell()
        return records

    def _take(self, foreign: Record) -> None:
        """Fold another's record; what it made live has to be loaded before replicas go on."""
        self._view = fold(self._view, [foreign])
        if foreign.kind == "commit":
            self._foreign = foreign.number

    async def _put(self, record: Record) -> Record:
        """Put until the store says what stands: a swap is never left half decided."""
        while True:
            try:
                return await asyncio.to_thread(self._log.put_record, record)
            except StoreError as error:
                logger.warning("not yet: %s", error)

    def _take_report(self, poll: Poll) -> None:
        state = protocol.acknowledge(self._state, poll.replica, poll.ack)
        is_veto = (
            poll.veto_number == state.number
            and state.phase is Phase.STAGE
            and poll.replica in state.members
        )
        if is_veto:
            self._vetoes[poll.replica] = poll.veto
        if is_veto or state is not self._state:
            self._state = state
            self._acks.set()

    def _admit(self, poll: Poll) -> bool:
        is_member = poll.is_joined and poll.replica in self._state.members
        if is_member and poll.at >= self._foreign:
            return True
        self._state, is_admitted = protocol.admit(
            self._state, poll.replica, at=poll.at, live=self._view.live_number
        )
        return is_admitted

    def _tell(self) -> None:
        """Let every waiting poll come back with where things stand now."""
        self._sequence += 1
        self._news.set()
        self._news.clear()


def abort_after(view: LogView, writer: str) -> Record:
    """An abort under the number that follows what is folded."""
    return Record(
        number=view.number + 1,
        kind="abort",
        previous=view.tip,
        writer=writer,
        written_at=datetime.now(UTC).isoformat(),
    )


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for an event, and reset it; False if it did not come."""
    try:
        # Not `wait_for`: in Python 3.11 it begins to wait one turn of the loop too late.
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
