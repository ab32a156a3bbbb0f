"""The one that writes to the log: which changes are made, in which order, and by which cluster.

It holds nothing that the head log does not: after a crash it puts an abort under the next free
number, so that nothing an earlier conductor said can be decided any more, counts every live replica
as a member, and goes on. What a change means is `proposal.py`'s; how the fleet is taken to it
`swaps.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from datetime import UTC, datetime

from serve.headlog import HeadLog
from serve.messages import AnyChange, Directive, Outcome, Poll, Refused
from serve.metrics import Report, fleet_text
from serve.presence import GONE_AFTER, SHOW_EVERY_S, Presence
from serve.proposal import Proposal, overtaken, propose
from serve.protocol import ReplicaId
from serve.record import HeadLogError, LogView, TrunkChange
from serve.roll_call import Fleet, RollCall
from serve.store import StoreError
from serve.swaps import OvertakenError, Swaps, SwapUndoneError, abort_after

logger = logging.getLogger(__name__)

ATTEMPTS = 3
FOLLOW_S = 0.4  # how often it is looked for what other clusters wrote


class Conductor:
    """One change after another.

    Two clusters may answer from one log, while one takes the place of the other. The conductor that
    started last holds the pen: its epoch record says so. The other refuses changes, and takes its
    own replicas to each record of the first as soon as it sees it. Should both write a number all
    the same, one of them wins it; the loser's replicas stop answering until they have loaded what
    was written, and its change goes on if it was about another task.

    Args:
        cluster: The same for every conductor of this cluster, and no other's.
        hold_s: The replicas' longest hold; the swap is given up a little earlier.
        stage_s: Longest wait for all replicas to load a bundle.
        trunk_stage_s: Longest wait for all replicas to load a trunk with its heads.
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
        trunk_stage_s: float,
        may_differ: bool = False,
    ) -> None:
        self._log, self._cluster = log, cluster
        self._presence, self._may_differ = Presence(log.store, cluster), may_differ
        self._presence.show()
        self._shown_s = time.monotonic()
        self._others = self._presence.others()
        self._following: asyncio.Task[None] | None = None
        self._name = f"conductor-{secrets.token_hex(4)}"
        self._roll = RollCall(fleet)
        view = self._fence(log.follow(LogView()))
        self._swaps = Swaps(
            log,
            view,
            self._roll,
            fleet.living(),
            writer=self._name,
            hold_s=hold_s,
            stage_s=stage_s,
            trunk_stage_s=trunk_stage_s,
        )
        self._one_at_a_time = asyncio.Lock()
        self._under_way: dict[AnyChange, asyncio.Task[Outcome]] = {}

    async def poll(self, poll: Poll) -> Directive:
        """Take a replica's report; answer when there is news for it, or after a while."""
        if self._following is None:
            self._following = asyncio.ensure_future(self._follow_others())
        self._roll.hear(poll)
        return await self._swaps.poll(poll)

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
            while (live := self.view.trunk) is None or (
                live.trunk == trunk.trunk and live != trunk
            ):
                message = "the trunk's variants" if live else "first trunk"
                # Another service that starts now may be first, with this trunk or another.
                with contextlib.suppress(OvertakenError):
                    await self._swaps.make(self._swaps.draft(trunk=trunk, message=message))
            return live.trunk

    @property
    def view(self) -> LogView:
        """The log as far as it is folded here."""
        return self._swaps.view

    async def metrics(self, *more: Report) -> bytes:
        """Prometheus text of the whole fleet, and of what stands beside it."""
        await self._swaps.drop_gone()
        live = {task: self.view.live(task) for task in self.view.tasks}
        versions = {task: version.change.version for task, version in live.items() if version}
        mine = (self._swaps.metrics.report(), self._log.store.calls.report())
        reports = [*self._roll.metrics(), *mine, *more]
        return fleet_text(reports, versions, len(self._swaps.members))

    async def members(self) -> list[ReplicaId]:
        """The replicas that answer."""
        return sorted(self._swaps.members)

    async def _change(self, change: AnyChange) -> Outcome:
        async with self._one_at_a_time:
            undone: list[str] = []
            while len(undone) < ATTEMPTS:
                if refused := self._without_pen():
                    return refused
                proposed = propose(self.view, change, datetime.now(UTC))
                if not isinstance(proposed, Proposal):
                    return proposed
                record = self._swaps.draft(
                    changes=proposed.changes,
                    settings=proposed.settings,
                    signing_keys=proposed.signing_keys,
                    tokens=proposed.tokens,
                    heldout=proposed.heldout,
                    trunk=proposed.trunk,
                    idempotency_key=change.key,
                    message=change.message,
                    who=change.who,
                    verdicts=proposed.verdicts,
                )
                try:
                    return await self._swaps.make(record)
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
        if self.view.pen != self._cluster:
            return Refused(
                "conflict",
                f"Cluster {self.view.pen} has taken over this head log; make changes there. This "
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
        trouble = ""
        while True:
            await asyncio.sleep(FOLLOW_S)
            wrong = ""
            try:
                await self._look_for_others()
            # It must outlive any error: it is the only way to hear of others.
            except Exception as error:
                wrong = repr(error)
                # It may last for hours, and is told of once.
                if wrong != trouble:
                    is_foreseen = isinstance(error, StoreError | HeadLogError)
                    logger.warning(
                        "cannot see what others write: %s", error, exc_info=not is_foreseen
                    )
            if trouble and not wrong:
                logger.warning("what others write can be seen again")
            trouble = wrong

    async def _look_for_others(self) -> None:
        if await asyncio.to_thread(self._log.get_record, self.view.number + 1):
            await self._follow()
        if self._swaps.members and time.monotonic() > self._shown_s + SHOW_EVERY_S:
            self._shown_s = time.monotonic()
            await asyncio.to_thread(self._presence.show)
            self._others = await asyncio.to_thread(self._presence.others)

    async def _follow(self) -> None:
        """Take the fleet to the records that others have written."""
        async with self._one_at_a_time:
            # A record of one's own is folded by now.
            for record in await asyncio.to_thread(self._log.read_records, self.view.number):
                await self._swaps.follow(record)

    def _fence(self, view: LogView) -> LogView:
        """Take the next free number with an abort, until one's own stands.

        It takes the pen too, unless another cluster has taken it over from this one.
        """
        while True:
            is_superseded = self._cluster in view.epochs and view.pen != self._cluster
            abort = abort_after(view, self._name)
            if not is_superseded:
                abort = abort.model_copy(update={"epoch": self._cluster})
            standing = self._log.put_record(abort)
            view = self._log.follow(view)
            if standing == abort:
                return view
