"""The swap protocol as pure state transitions: no clock, no store, no network.

The conductor takes one swap at a time through stage, hold, commit and flip; every replica follows.
A swap is named by its number, which is the number of the log record that decides it, and every
message and every acknowledgement carries it, so that what comes late or twice touches nothing else.
`swaps.py` and `watcher.py` drive these transitions; what they do to the world (load a bundle, write
a record) happens between two transitions, never inside one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

ReplicaId = str


class Phase(StrEnum):
    """How far the swap in progress is."""

    IDLE = "idle"
    STAGE = "stage"
    HOLD = "hold"
    COMMIT = "commit"
    FLIP = "flip"
    ABORT = "abort"  # given up: the abort record is on its way to the log


class Level(IntEnum):
    """What a replica has acknowledged of a swap."""

    NOTHING = 0
    STAGED = 1
    HELD = 2
    FLIPPED = 3


class Ack(NamedTuple):
    """The furthest that a replica got: in which swap, and how far."""

    number: int = 0
    level: Level = Level.NOTHING


NO_ACK = Ack()


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Where a replica stands.

    Args:
        at: Number of the last commit that its pointers follow.
        staged: Number of the swap whose bundle is loaded beside the live one, or 0.
        hold: Number of the swap for which it starts no rows of the task, or 0.
    """

    at: int = 0
    staged: int = 0
    hold: int = 0
    ack: Ack = NO_ACK


def takes_stage(state: ReplicaState, number: int) -> bool:
    """Whether a stage message is news: later than anything staged and than the pointer."""
    return number > state.staged and number > state.at


def caught_up(state: ReplicaState, number: int, *, at: int) -> ReplicaState:
    """The replica has folded the log up to `number`, which put its pointers `at`.

    This settles every hold up to there: the records that decide them have been read.
    """
    return replace(state, at=at, hold=state.hold if state.hold > number else 0)


def stage(state: ReplicaState, number: int, *, at: int) -> ReplicaState:
    """The replica has caught up to `number - 1`, which put it `at`, and loaded the new bundle."""
    state = caught_up(state, number - 1, at=at)
    return replace(state, staged=number, ack=Ack(number, Level.STAGED))


def hold(state: ReplicaState, number: int) -> ReplicaState:
    """Start no more rows of the task; only for the swap that was staged."""
    if number == state.staged and number > state.at and number > state.hold:
        return replace(state, hold=number)
    return state


def drained(state: ReplicaState) -> ReplicaState:
    """The last row in flight has ended while held, so the hold can be acknowledged."""
    if state.hold:
        return replace(state, ack=max(state.ack, Ack(state.hold, Level.HELD)))
    return state


def flip(state: ReplicaState, number: int) -> ReplicaState:
    """The commit of `number` stands: a replica that holds it, and no other, moves its pointer.

    One that got there by itself (its hold ran out) acknowledges too. Flipping also releases:
    every other member holds or has flipped.
    """
    if state.hold == number:
        return replace(state, at=number, hold=0, ack=max(state.ack, Ack(number, Level.FLIPPED)))
    if state.at == number:
        return replace(state, ack=max(state.ack, Ack(number, Level.FLIPPED)))
    return state


def release(state: ReplicaState, number: int) -> ReplicaState:
    """The swap was undone: go on as before. Ends the hold of this number only."""
    if state.hold == number:
        return replace(state, hold=0, staged=0)
    return state


def settle(state: ReplicaState, number: int, *, is_committed: bool) -> ReplicaState:
    """The hold ran out and record `number` has been read: the log decides, not the replica."""
    if state.hold != number:
        return state
    if is_committed:
        return replace(state, at=number, hold=0)
    return replace(state, hold=0, staged=0)


@dataclass(frozen=True, slots=True)
class ConductorState:
    """The swap in progress and who has to acknowledge it.

    Args:
        number: Number of the swap in progress or last done.
        members: Every replica process that may answer, with its furthest acknowledgement.
    """

    phase: Phase = Phase.IDLE
    number: int = 0
    members: Mapping[ReplicaId, Ack] = field(default_factory=dict)


def restart(number: int, replicas: frozenset[ReplicaId]) -> ConductorState:
    """A new conductor, once its own abort stands as record `number`.

    Every live replica process counts, joined or not, until it is confirmed dead.
    """
    return ConductorState(Phase.IDLE, number, dict.fromkeys(replicas, NO_ACK))


def begin(state: ConductorState, number: int) -> ConductorState:
    """Start the swap of the first free number; only when nothing is undecided."""
    assert state.phase is Phase.IDLE
    assert number > state.number
    return replace(state, phase=Phase.STAGE, number=number)


def acknowledge(state: ConductorState, replica: ReplicaId, ack: Ack) -> ConductorState:
    """Note how far a member got; strangers and other numbers are ignored."""
    if replica not in state.members or ack.number != state.number:
        return state
    if ack <= state.members[replica]:
        return state
    return replace(state, members={**state.members, replica: ack})


def missing(state: ConductorState) -> frozenset[ReplicaId]:
    """The members that have not yet acknowledged the phase."""
    level = {Phase.STAGE: Level.STAGED, Phase.HOLD: Level.HELD, Phase.FLIP: Level.FLIPPED}
    if state.phase not in level:
        return frozenset()
    needed = Ack(state.number, level[state.phase])
    return frozenset(replica for replica, ack in state.members.items() if ack < needed)


def advance(state: ConductorState) -> ConductorState:
    """Go to the next phase if every member has acknowledged this one."""
    after = {Phase.STAGE: Phase.HOLD, Phase.HOLD: Phase.COMMIT, Phase.FLIP: Phase.IDLE}
    if state.phase in after and not missing(state):
        return replace(state, phase=after[state.phase])
    return state


def decided(state: ConductorState, *, is_own_commit: bool) -> ConductorState:
    """The record of the swap has been read back: our commit stands, or an abort does."""
    assert state.phase in {Phase.COMMIT, Phase.ABORT}
    return replace(state, phase=Phase.FLIP if is_own_commit else Phase.IDLE)


def give_up(state: ConductorState) -> ConductorState:
    """Undo the swap before its commit is written; the abort record must stand first."""
    if state.phase in {Phase.STAGE, Phase.HOLD}:
        return replace(state, phase=Phase.ABORT)
    return state


def admit(
    state: ConductorState, replica: ReplicaId, *, at: int, live: int
) -> tuple[ConductorState, bool]:
    """Let a replica answer if it is at the live version and no record is undecided.

    It is a member from this moment, not from when it hears so. One that joins while others flip
    loaded the new version already and owes this swap nothing.

    Returns:
        The state, and whether the replica may answer.
    """
    if state.phase not in {Phase.IDLE, Phase.FLIP} or at != live:
        return state, False
    if replica in state.members and state.phase is Phase.IDLE:
        return state, True
    ack = Ack(state.number, Level.FLIPPED) if state.phase is Phase.FLIP else NO_ACK
    return replace(state, members={**state.members, replica: ack}), True


def drop(state: ConductorState, replica: ReplicaId) -> ConductorState:
    """Forget a member whose process is confirmed dead."""
    members = {member: ack for member, ack in state.members.items() if member != replica}
    return replace(state, members=members)
