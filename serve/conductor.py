"""Takes the fleet from one log version to the next, one swap at a time.

It holds nothing that the head log does not: after a crash it puts an abort under the next free
number, so that nothing an earlier conductor said can be decided any more, counts every live replica
as a member, and goes on. The transitions are `protocol.py`'s; here they are driven: records are
written, replicas told, the silent ones killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import Protocol, runtime_checkable

from serve import protocol
from serve.headlog import HeadLog
from serve.messages import AnyChange, Directive, Outcome, Poll, Refused, Swapped
from serve.metrics import Report, fleet_text, merge
from serve.presence import GONE_AFTER, SHOW_EVERY_S, Presence
from serve.proposal import Proposal, overtaken, propose
from serve.protocol import Phase, ReplicaId
from serve.record import LogView, Record, TrunkChange, fold
from serve.store import StoreError

logger = logging.getLogger(__name__)

POLL_S = 1.0  # an unanswered poll comes back after this, so that silence means something
JOIN_RETRY_S = 0.05
PROBE_S = 0.1  # how often the members that are missing are looked for among the living
SILENCE_S = 5.0  # a member that is alive but not heard of for so long has to be killed
START_S = 60.0  # one that has never been heard of may still be starting
ATTEMPTS = 3
FOLLOW_S = 0.4  # how often it is looked for what other clusters wrote


@runtime_checkable
class Fleet(Protocol):
    """The replica processes, as the runtime sees them."""

    def living(self) -> frozenset[ReplicaId]:
        """Every replica process that is not confirmed dead."""
        ...

    def kill(self, replica: ReplicaId) -> None:
        """End a replica's process; `living` no longer names it once its death is confirmed."""
        ...


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


class Conductor:
    """The one that writes to the log.

    Two clusters may answer from one log, while one takes the place of the other. The conductor that
    started last holds the pen: its epoch record says so. The other refuses changes, and takes its
    own replicas to each record of the first as soon as it sees it. Should both write a number all
    the same, one of them wins it; the loser's replicas stop answering until they have loaded what
    was written, and its change goes on if it was about another task.

    Args:
        cluster: The same for every conductor of this cluster, and no other's.
        hold_s: The replicas' longest hold; the swap is given up a little earlier.
        stage_s: Longest wait for all replicas to load a bundle.
        may_differ: Whether changes are made though another cluster answers too; it then follows
            within a second, and until then its callers get older answers.
    """

    def __init__(
        self,
        log: HeadLog,
        fleet: Fleet,
        *,
        cluster: str,
        hold_s: float,
        stage_s: float,
        may_differ: bool = False,
    ) -> None:
        self._log, self._fleet, self._cluster = log, fleet, cluster
        self._presence, self._may_differ = Presence(log.store, cluster), may_differ
        self._presence.show()
        self._others = self._presence.others()
        self._following: asyncio.Task[None] | None = None
        self._hold_s, self._stage_s = hold_s, stage_s
        self._name = f"conductor-{secrets.token_hex(4)}"
        self._view = self._fence(log.follow(LogView()))
        self._state = protocol.restart(self._view.number, fleet.living())
        self._record: Record | None = None
        self._undone = 0
        self._foreign = 0  # the last commit of another service; members have to have loaded it
        self._sequence = secrets.randbits(40)
        self._vetoes: dict[ReplicaId, str] = {}
        self._heard_at_s: dict[ReplicaId, float] = {}
        self._started_at_s = time.monotonic()
        self._metrics: dict[ReplicaId, Report] = {}
        self._gone_metrics: Report = []
        self._news = asyncio.Event()
        self._acks = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._under_way: dict[AnyChange, asyncio.Task[Outcome]] = {}

    async def poll(self, poll: Poll) -> Directive:
        """Take a replica's report; answer when there is news for it, or after a while."""
        if self._following is None:
            self._following = asyncio.ensure_future(self._follow_others())
        self._heard_at_s[poll.replica] = time.monotonic()
        if poll.metrics is not None:
            self._metrics[poll.replica] = poll.metrics
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
        )

    async def change(self, change: AnyChange) -> Outcome:
        """Make a change live on every replica, or say why not. One key makes one change."""
        if change not in self._under_way:
            task = asyncio.ensure_future(self._change(change))
            self._under_way[change] = task
            task.add_done_callback(lambda _: self._under_way.pop(change, None))
        # A pusher that goes away does not stop a swap half-way.
        return await asyncio.shield(self._under_way[change])

    async def install_trunk(self, trunk: TrunkChange) -> str:
        """Make a trunk live in a log that has none yet, or other variants of the one it has.

        Replicas read the variants when they start; those that run keep what they have.

        Returns:
            The digest of the trunk that the log names afterwards.
        """
        async with self._one_at_a_time:
            while (live := self._view.trunk) is None or (
                live.trunk == trunk.trunk and live != trunk
            ):
                message = "the trunk's variants" if live else "first trunk"
                # Another service that starts now may be first, with this trunk or another.
                with contextlib.suppress(OvertakenError):
                    await self._swap(self._draft(trunk=trunk, message=message))
            return live.trunk

    @property
    def view(self) -> LogView:
        """The log as far as it is folded here."""
        return self._view

    async def metrics(self, *more: Report) -> bytes:
        """Prometheus text of the whole fleet, and of what stands beside it."""
        await self._look_for_dead()
        live = {task: self._view.live(task) for task in self._view.tasks}
        versions = {task: version.change.version for task, version in live.items() if version}
        reports = [self._gone_metrics, *self._metrics.values(), *more]
        return fleet_text(reports, versions, len(self._state.members))

    async def members(self) -> list[ReplicaId]:
        """The replicas that answer."""
        return sorted(self._state.members)

    async def _change(self, change: AnyChange) -> Outcome:
        async with self._one_at_a_time:
            undone: list[str] = []
            while len(undone) < ATTEMPTS:
                if refused := self._without_pen():
                    return refused
                proposed = propose(self._view, change, datetime.now(UTC))
                if not isinstance(proposed, Proposal):
                    return proposed
                record = self._draft(
                    changes=proposed.changes,
                    settings=proposed.settings,
                    signing_keys=proposed.signing_keys,
                    heldout=proposed.heldout,
                    idempotency_key=change.key,
                    message=change.message,
                    verdicts=proposed.verdicts,
                )
                try:
                    return await self._swap(record)
                except SwapUndoneError as error:
                    logger.warning("swap %d was undone: %s", record.number, error)
                    if error.is_veto:
                        return Refused("gate", str(error))
                    undone.append(str(error))
                except OvertakenError as error:
                    logger.warning("swap %d was overtaken: %s", record.number, error)
                    if refused := overtaken(change, error.foreign):
                        return refused
            return Refused("unavailable", f"The swap was undone {ATTEMPTS} times: {undone[-1]}.")

    def _without_pen(self) -> Refused | None:
        """Why this conductor makes no changes now, if it makes none."""
        if self._view.pen != self._cluster:
            return Refused(
                "conflict",
                f"Cluster {self._view.pen} has taken over this head log; make changes there. This "
                f"one, {self._cluster}, follows it.",
            )
        if self._others and not self._may_differ:
            return Refused(
                "conflict",
                f"Cluster {self._others[0]} answers from this head log too, and its callers would "
                f"see the change later than yours. Wait until it has stopped (it is forgotten "
                f"after {GONE_AFTER.seconds} s), or start this one with HEADSTOCK_MAY_DIFFER=true.",
            )
        return None

    async def _follow_others(self) -> None:
        """Keep up with what another cluster's conductor writes."""
        shown_s = time.monotonic()
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                if await asyncio.to_thread(self._log.get_record, self._view.number + 1):
                    await self._follow()
                if self._state.members and time.monotonic() > shown_s + SHOW_EVERY_S:
                    shown_s = time.monotonic()
                    await asyncio.to_thread(self._presence.show)
                    self._others = await asyncio.to_thread(self._presence.others)
            except StoreError as error:
                logger.warning("cannot see what others write: %s", error)
            # It must outlive any error: it is the only way to hear of others.
            except Exception:
                logger.exception("following the log stumbled and goes on")

    async def _follow(self) -> None:
        """Take the fleet to the records that others have written."""
        async with self._one_at_a_time:
            # A record of one's own is folded by now.
            for record in await asyncio.to_thread(self._log.read_records, self._view.number):
                if record.kind == "commit":
                    await self._follow_commit(record)
                else:
                    self._view = fold(self._view, [record])

    async def _follow_commit(self, record: Record) -> None:
        """A swap whose commit stands already: it can be late, but not undone."""
        self._state = protocol.begin(self._state, record.number)
        self._record = record
        self._vetoes.clear()
        try:
            await self._all_acknowledge(self._stage_s)
            await self._all_acknowledge(self._hold_s * 0.8)
        except SwapUndoneError as error:
            logger.warning("record %d is loaded one by one: %s", record.number, error)
            self._state = protocol.give_up(self._state)
            self._take(record)  # nobody is released: who held goes on once it has loaded this
            self._state = protocol.decided(self._state, is_own_commit=False)
            self._record = None
            self._tell()
            return
        self._view = fold(self._view, [record])
        self._state = protocol.decided(self._state, is_own_commit=True)
        self._tell()
        await self._all_flip()
        self._record = None
        self._tell()

    async def _swap(self, record: Record) -> Swapped:
        """Stage, hold, commit, flip.

        Raises:
            SwapUndoneError: given up, and an abort stands in the log.
            OvertakenError: another service's commit stands under the number.
        """
        self._state = protocol.begin(self._state, record.number)
        self._record = record
        self._vetoes.clear()
        try:
            began_s = time.monotonic()
            await self._all_acknowledge(self._stage_s)
            held_s = time.monotonic()
            await self._all_acknowledge(self._hold_s * 0.8)
        # Whatever it is, the swap must not stay undecided.
        except Exception:
            await self._undo()
            raise
        await self._commit(record)
        await self._all_flip()
        self._record = None
        self._tell()
        change = record.changes[0] if record.changes else None
        return Swapped(
            change,
            stage_ms=1000 * (held_s - began_s),
            hold_ms=1000 * (time.monotonic() - held_s),
            replicas=len(self._state.members),
        )

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

    async def _wait_for_acks(self) -> None:
        """Wait for the next report; when none comes, see who is missing because it is dead."""
        if await _wait(self._acks, PROBE_S):
            return
        try:
            await self._look_for_dead()
            for replica in protocol.missing(self._state):
                if self._is_silent(replica):
                    logger.error("replica %s is silent and is killed", replica)
                    await asyncio.to_thread(self._fleet.kill, replica)
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
        await self._give_way(await self._put(self._abort(self._view)))

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

    def _fence(self, view: LogView) -> LogView:
        """Take the next free number with an abort, until one's own stands.

        It takes the pen too, unless another cluster has taken it over from this one.
        """
        while True:
            is_superseded = self._cluster in view.epochs and view.pen != self._cluster
            abort = self._abort(view)
            if not is_superseded:
                abort = abort.model_copy(update={"epoch": self._cluster})
            standing = self._log.put_record(abort)
            view = self._log.follow(view)
            if standing == abort:
                return view

    def _abort(self, view: LogView) -> Record:
        return Record(
            number=view.number + 1,
            kind="abort",
            previous=view.tip,
            writer=self._name,
            written_at=datetime.now(UTC).isoformat(),
        )

    def _draft(self, **fields: object) -> Record:
        """A commit for the next free number, checked here: once held, it has to be writable."""
        return Record.model_validate({**dict(self._abort(self._view)), "kind": "commit", **fields})

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

    async def _look_for_dead(self) -> None:
        """Drop the members that are confirmed dead."""
        # Who is admitted while the runtime is asked may be missing from its answer, and lives.
        asked_about = frozenset(self._state.members)
        for replica in asked_about - await asyncio.to_thread(self._fleet.living):
            logger.warning("replica %s is gone", replica)
            self._state = protocol.drop(self._state, replica)
            if replica in self._metrics:
                gone = self._metrics.pop(replica)
                self._gone_metrics = merge([self._gone_metrics, gone])

    def _is_silent(self, replica: ReplicaId) -> bool:
        """Whether a replica would have been heard of, whatever the swap makes it do."""
        now = time.monotonic()
        if replica not in self._heard_at_s:
            return now - self._started_at_s > START_S
        # It says nothing while it loads a bundle, nor while it waits for its rows in flight.
        busy_s = {Phase.STAGE: self._stage_s, Phase.HOLD: self._hold_s}
        silence_s = SILENCE_S + busy_s.get(self._state.phase, 0.0)
        return now - self._heard_at_s[replica] > silence_s

    def _tell(self) -> None:
        """Let every waiting poll come back with where things stand now."""
        self._sequence += 1
        self._news.set()
        self._news.clear()


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
