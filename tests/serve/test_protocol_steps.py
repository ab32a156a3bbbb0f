"""The transitions of `serve.protocol` one at a time, as examples."""

from __future__ import annotations

from itertools import permutations

import pytest

from serve import protocol
from serve.protocol import NO_ACK, Ack, ConductorState, Level, Phase, ReplicaState

STAGED = ReplicaState(at=3, staged=4, ack=Ack(4, Level.STAGED))
HELD = ReplicaState(at=3, staged=4, hold=4, ack=Ack(4, Level.HELD))
FLIPPED = ReplicaState(at=4, staged=4, ack=Ack(4, Level.FLIPPED))


def test_a_replica_is_led_through_a_swap() -> None:
    """Stage, hold, drain, flip; each acknowledged under the swap's number."""
    staged = protocol.stage(ReplicaState(at=3), 4, at=3)
    held = protocol.hold(staged, 4)

    assert staged == STAGED
    assert held == ReplicaState(at=3, staged=4, hold=4, ack=staged.ack)  # rows are still in flight
    assert protocol.drained(held) == HELD
    assert protocol.flip(HELD, 4) == FLIPPED


def test_a_conductor_is_led_through_a_swap() -> None:
    """It goes on when the last member has acknowledged; the record decides the rest."""
    state = protocol.begin(protocol.restart(3, frozenset("ab")), 4)
    phases = []
    for level in (Level.STAGED, Level.HELD, Level.FLIPPED):
        state = protocol.acknowledge(state, "a", Ack(4, level))
        assert protocol.missing(state) == {"b"}
        assert protocol.advance(state) == state
        state = protocol.advance(protocol.acknowledge(state, "b", Ack(4, level)))
        phases.append(state.phase)
        if state.phase is Phase.COMMIT:
            state = protocol.decided(state, is_own_commit=True)

    assert phases == [Phase.HOLD, Phase.COMMIT, Phase.IDLE]


def test_a_swap_without_replicas_waits_for_nobody() -> None:
    """With no replica running, a push is live at once."""
    state = protocol.begin(ConductorState(), 1)

    state = protocol.advance(protocol.advance(state))

    assert state.phase is Phase.COMMIT


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_stage_message_that_is_no_news_is_not_taken(number: int) -> None:
    """Not of what is staged already, nor of what the pointer has passed."""
    assert not protocol.takes_stage(STAGED, number)
    assert not protocol.takes_stage(ReplicaState(at=4), number)
    assert protocol.takes_stage(STAGED, 5)


def test_staging_catches_up_with_what_was_missed() -> None:
    """A replica that held swap 4 when its conductor died finds out when swap 6 is staged."""
    staged = protocol.stage(HELD, 6, at=4)

    assert staged == ReplicaState(at=4, staged=6, hold=0, ack=Ack(6, Level.STAGED))


def test_catching_up_ends_only_holds_that_are_decided() -> None:
    """Record 4 is the one that decides the hold of swap 4."""
    assert protocol.caught_up(HELD, 3, at=3).hold == 4
    assert protocol.caught_up(HELD, 4, at=4).hold == 0


def test_a_flip_that_comes_late_does_not_turn_back_who_has_caught_up_past_it() -> None:
    """It joined while swap 4 held, missed its end, and loaded what swap 5 made live.

    Whoever kept the hold of 4 would go back to 4 by that flip, or wait for one that nobody sends.
    """
    joined = protocol.caught_up(HELD, 5, at=5)

    assert protocol.flip(joined, 4).at == 5
    assert protocol.release(joined, 4).at == 5
    assert joined.hold == 0


@pytest.mark.parametrize(
    "state",
    [ReplicaState(at=3), FLIPPED, HELD, ReplicaState(at=3, staged=5), ReplicaState(at=5, staged=4)],
    ids=["never staged", "flipped already", "held already", "staged a later one", "beyond it"],
)
def test_a_hold_that_comes_late_or_astray_is_ignored(state: ReplicaState) -> None:
    """Rows stop only for the swap that is staged, and once."""
    assert protocol.hold(state, 4) == state


@pytest.mark.parametrize("state", [ReplicaState(at=3), STAGED], ids=["not staged", "not held"])
def test_a_flip_without_a_hold_is_ignored(state: ReplicaState) -> None:
    """Without the hold nobody knows that the others have stopped."""
    assert protocol.flip(state, 4) == state


def test_a_replica_that_flipped_by_itself_acknowledges_the_flip() -> None:
    """Its hold ran out and it found the commit; the conductor still waits to hear of it."""
    settled = protocol.settle(HELD, 4, is_committed=True)

    assert settled == ReplicaState(at=4, staged=4, ack=Ack(4, Level.HELD))
    assert protocol.flip(settled, 4) == FLIPPED


def test_a_hold_that_found_an_abort_goes_on_as_before() -> None:
    """The pointer stays, and the bundle that was staged is forgotten."""
    undone = ReplicaState(at=3, ack=HELD.ack)

    assert protocol.settle(HELD, 4, is_committed=False) == undone
    assert protocol.release(HELD, 4) == undone


@pytest.mark.parametrize("number", [3, 5])
def test_a_message_or_reply_about_another_swap_leaves_a_hold_alone(number: int) -> None:
    """The number is the epoch: what is late touches nothing else."""
    assert protocol.flip(HELD, number).hold == 4
    assert protocol.release(HELD, number) == HELD
    assert protocol.settle(HELD, number, is_committed=True) == HELD
    assert protocol.settle(HELD, number, is_committed=False) == HELD


def test_a_replica_that_holds_nothing_has_drained_for_nobody() -> None:
    """The hold may have ended while the last rows were waited for."""
    for state in (ReplicaState(), STAGED):
        assert protocol.drained(state) == state


def test_acknowledgements_may_come_in_any_order_and_again() -> None:
    """The furthest counts; strangers and other swaps do not."""
    begun = protocol.begin(protocol.restart(3, frozenset("ab")), 4)
    acks = [Ack(4, Level.STAGED), Ack(4, Level.HELD), Ack(3, Level.FLIPPED), Ack(5, Level.FLIPPED)]
    for order in permutations([*acks, acks[0]]):
        state = begun
        for ack in order:
            state = protocol.acknowledge(protocol.acknowledge(state, "a", ack), "stranger", ack)

        assert state.members == {"a": Ack(4, Level.HELD), "b": NO_ACK}


def test_a_confirmed_death_is_waited_for_no_longer() -> None:
    """The member that is gone was the only one missing."""
    state = protocol.begin(protocol.restart(3, frozenset("ab")), 4)
    state = protocol.acknowledge(state, "a", Ack(4, Level.STAGED))

    assert protocol.advance(protocol.drop(state, "b")).phase is Phase.HOLD


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.COMMIT, Phase.FLIP, Phase.ABORT])
def test_a_swap_is_given_up_only_before_its_commit_is_sent(phase: Phase) -> None:
    """Afterwards the log alone decides."""
    state = ConductorState(phase, 4)

    assert protocol.give_up(state) == state


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.HOLD, Phase.COMMIT, Phase.ABORT])
def test_nobody_joins_while_a_record_is_undecided(phase: Phase) -> None:
    """It could be at the old version when the others commit the new one."""
    state = ConductorState(phase, 4)

    assert protocol.admit(state, "new", at=3, live=3) == (state, False)


def test_a_joiner_is_counted_from_its_admission() -> None:
    """Only at the live version; during a flip it has nothing left to acknowledge."""
    idle, flipping = ConductorState(Phase.IDLE, 4), ConductorState(Phase.FLIP, 4)

    assert protocol.admit(idle, "new", at=3, live=4) == (idle, False)
    assert protocol.admit(idle, "new", at=4, live=4)[0].members == {"new": NO_ACK}
    joined, is_admitted = protocol.admit(flipping, "new", at=4, live=4)
    assert is_admitted
    assert protocol.advance(joined).phase is Phase.IDLE


def test_a_number_is_not_used_twice() -> None:
    """Neither while a swap is in progress nor once it is decided."""
    begun = protocol.begin(protocol.restart(3, frozenset()), 4)
    undone = protocol.decided(protocol.give_up(begun), is_own_commit=False)

    with pytest.raises(AssertionError):
        protocol.begin(begun, 5)
    with pytest.raises(AssertionError):
        protocol.begin(undone, 4)


def test_a_swap_in_progress_is_not_decided_early() -> None:
    """Only a commit or an abort that is on its way has a record to be read back."""
    with pytest.raises(AssertionError):
        protocol.decided(ConductorState(Phase.HOLD, 4), is_own_commit=True)
