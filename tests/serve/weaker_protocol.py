"""The product's protocol and its world with one rule less: what a proof of them has to notice.

Each weakens one transition of `serve.protocol`, or one rule of what surrounds it, and names the
promise that a shortest way breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import pytest

from serve import protocol

# Imported by name, these stay what they are while a mutant stands in for them in the module.
from serve.protocol import (
    NO_ACK,
    Ack,
    ConductorState,
    Level,
    Phase,
    ReplicaState,
    advance,
    caught_up,
    flip,
    give_up,
    missing,
    release,
    stage,
)
from tests.serve.fleet_world import World

CALM = World(crashes=0, losses=0, starts=0)
CRASH, JOIN = replace(CALM, crashes=1), World(crashes=0)
HARSHER_WORLDS = {
    "rows go on during a hold": (replace(CALM, drains_before_ack=False), "1s clean cut"),
    "records are overwritten": (replace(CALM, puts_if_absent=False), "5 truth"),
    "no reply is a failure": (replace(CALM, pushes=1, rereads_lost_puts=False), "5 truth"),
    "holds never run out": (replace(CRASH, holds_run_out=False), "4 agreement"),
    "a hold that runs out asks nobody": (replace(CALM, asks_log=False), "1 order"),
    "a new conductor writes no abort": (replace(CRASH, fences=False), "1 order"),
    "a new conductor knows nobody": (replace(CRASH, counts_all=False), "2 read your push"),
    "a silent replica is dropped alive": (replace(CALM, confirms_deaths=False), "2 read your push"),
    "a new replica answers at once": (replace(JOIN, joiners_wait=False), "2 read your push"),
    "a replacement has the old name": (replace(JOIN, fresh_ids=False), "1 order"),
    "a push that is asked for again is another push": (
        replace(CRASH, asks_again=True, keeps_keys=False),
        "5 truth",
    ),
}


class Admit(Protocol):
    """The signature of `admit`."""

    def __call__(
        self, state: ConductorState, replica: str, /, *, at: int, live: int
    ) -> tuple[ConductorState, bool]:
        """Take the step."""
        ...


class Follow(Protocol):
    """The signature of `stage` and `caught_up`."""

    def __call__(self, state: ReplicaState, number: int, /, *, at: int) -> ReplicaState:
        """Take the step."""
        ...


class Settle(Protocol):
    """The signature of `settle`."""

    def __call__(self, state: ReplicaState, number: int, /, *, is_committed: bool) -> ReplicaState:
        """Take the step."""
        ...


class Decided(Protocol):
    """The signature of `decided`."""

    def __call__(self, state: ConductorState, /, *, is_own_commit: bool) -> ConductorState:
        """Take the step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Weaker:
    """Transitions that stand in for the product's of the same name."""

    takes_stage: Callable[[ReplicaState, int], bool] | None = None
    caught_up: Follow | None = None
    stage: Follow | None = None
    hold: Callable[[ReplicaState, int], ReplicaState] | None = None
    flip: Callable[[ReplicaState, int], ReplicaState] | None = None
    release: Callable[[ReplicaState, int], ReplicaState] | None = None
    settle: Settle | None = None
    acknowledge: Callable[[ConductorState, str, Ack], ConductorState] | None = None
    missing: Callable[[ConductorState], frozenset[str]] | None = None
    advance: Callable[[ConductorState], ConductorState] | None = None
    decided: Decided | None = None
    give_up: Callable[[ConductorState], ConductorState] | None = None
    admit: Admit | None = None


def admit_if(is_open: Callable[[ConductorState, bool], bool], *, is_counted: bool = True) -> Admit:
    """An `admit` with a condition of its own, given the conductor and whether `at` is live."""

    def admit(
        state: ConductorState, replica: str, /, *, at: int, live: int
    ) -> tuple[ConductorState, bool]:
        if not is_open(state, at == live):
            return state, False
        ack = NO_ACK if state.phase is Phase.IDLE else Ack(state.number, Level.FLIPPED)
        newcomer = {replica: ack} if is_counted else {}
        return replace(state, members={**newcomer, **state.members}), True

    return admit


def use_number_again(state: ConductorState) -> ConductorState:
    return replace(state, phase=Phase.IDLE, number=state.number - 1)


def advance_without_hold(state: ConductorState) -> ConductorState:
    if state.phase is Phase.STAGE and not missing(state):
        return replace(state, phase=Phase.COMMIT)
    return advance(state)


def flip_to(state: ReplicaState, number: int) -> ReplicaState:
    return replace(state, at=number, hold=0, ack=max(state.ack, Ack(number, Level.FLIPPED)))


def count_any_ack(state: ConductorState, replica: str, ack: Ack) -> ConductorState:
    ack = max(state.members.get(replica, NO_ACK), Ack(state.number, ack.level))
    return replace(state, members={**state.members, replica: ack})


SETTLED = {Phase.IDLE, Phase.FLIP}
MUTANTS = {
    "a joiner is let in during the commit": (
        Weaker(admit=admit_if(lambda c, live: live and c.phase in {*SETTLED, Phase.COMMIT})),
        JOIN,
        "2 read your push",
    ),
    "a joiner is let in at any time": (
        Weaker(admit=admit_if(lambda _, live: live)),
        JOIN,
        "2 read your push",
    ),
    "a joiner is let in at any version": (
        Weaker(admit=admit_if(lambda c, _: c.phase in SETTLED)),
        JOIN,
        "2 read your push",
    ),
    "a joiner is let in but not counted": (
        Weaker(admit=admit_if(lambda c, live: live and c.phase in SETTLED, is_counted=False)),
        JOIN,
        "2 read your push",
    ),
    "giving up while staging leaves no record": (
        Weaker(give_up=lambda c: (use_number_again if c.phase is Phase.STAGE else give_up)(c)),
        CALM,
        "1 order",
    ),
    "giving up while holding leaves no record": (
        Weaker(give_up=lambda c: (use_number_again if c.phase is Phase.HOLD else give_up)(c)),
        CALM,
        "1 order",
    ),
    "neither the commit nor the flip needs a hold": (
        Weaker(advance=advance_without_hold, flip=lambda r, n: flip_to(r, n) if n > r.at else r),
        CALM,
        "1 order",
    ),
    "the commit needs no hold": (Weaker(advance=advance_without_hold), CALM, "4 agreement"),
    "one acknowledgement is enough": (
        Weaker(missing=lambda c: missing(c) if len(missing(c)) == len(c.members) else frozenset()),
        CALM,
        "2 read your push",
    ),
    "acknowledgements of other swaps count": (
        Weaker(acknowledge=count_any_ack),
        replace(CALM, forgets=False),
        "1 order",
    ),
    "any record is taken for the own commit": (
        Weaker(decided=lambda c, is_own_commit: replace(c, phase=Phase.FLIP)),  # noqa: ARG005
        CALM,
        "3 all or nothing",
    ),
    "staging does not fold the log first": (
        Weaker(stage=lambda r, n, at: stage(r, n, at=r.at)),  # noqa: ARG005
        CRASH,
        "1 order",
    ),
    "old stage messages are obeyed": (
        Weaker(takes_stage=lambda r, n: True),  # noqa: ARG005
        CALM,
        "1 order",
    ),
    "stage messages older than the pointer are obeyed": (
        Weaker(takes_stage=lambda r, n: n > r.staged),
        CALM,
        "2 read your push",
    ),
    "catching up ends a hold that is undecided": (
        Weaker(caught_up=lambda r, n, at: replace(caught_up(r, n, at=at), hold=0)),
        World(),
        "1 order",
    ),
    "catching up keeps a hold that is decided": (
        Weaker(caught_up=lambda r, n, at: replace(caught_up(r, n, at=at), hold=r.hold)),
        JOIN,
        "2 read your push",
    ),
    "a hold needs no staging": (
        Weaker(hold=lambda r, n: replace(r, hold=n) if n > r.hold else r),
        CRASH,
        "1 order",
    ),
    "a flip needs no hold": (
        Weaker(flip=lambda r, n: flip_to(r, n) if n >= r.at else r),
        CRASH,
        "1 order",
    ),
    "a flip of any number moves a replica that holds": (
        Weaker(flip=lambda r, n: flip_to(r, r.hold) if r.hold else flip(r, n)),
        CRASH,
        "3 all or nothing",
    ),
    "one that flipped by itself does not say so": (
        Weaker(flip=lambda r, n: flip(r, n) if r.hold == n else r),
        CALM,
        "4 agreement",
    ),
    "a release of any number ends a hold": (
        Weaker(release=lambda r, _: release(r, r.hold)),
        CALM,
        "1 order",
    ),
    "any record settles a hold": (
        Weaker(settle=lambda r, n, is_committed: flip_to(r, n) if is_committed else release(r, n)),
        CALM,
        "1 order",
    ),
    "a hold that runs out counts as aborted": (
        Weaker(settle=lambda r, n, is_committed: release(r, n)),  # noqa: ARG005
        CALM,
        "1 order",
    ),
    "a hold that runs out counts as committed": (
        Weaker(settle=lambda r, n, is_committed: flip(r, n)),  # noqa: ARG005
        CALM,
        "3 all or nothing",
    ),
}


def weaken(weaker: Weaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put its transitions in the place of the product's."""
    for transition in fields(weaker):
        if (weak := getattr(weaker, transition.name)) is not None:
            monkeypatch.setattr(protocol, transition.name, weak)
