"""Random walks through a `fleet_world`: longer histories of larger fleets than a search can reach.

A walk is a string of bytes, two for each event: what happens, and to whom. What is impossible then
is left out, so that every string is a walk. Each walk has habits of its own, the kinds of events
that it has more of and those that are slow in it: with the same mixture for all, some mutants were
caught 20 times later.

When it ends, the faults end. From then on what was sent before is lost, limits are reached only
when nothing else can happen, and the fleet has to agree; then every push that was never asked for
or never answered is, one after the other, and each has to be made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from enum import IntEnum
from itertools import chain

from serve.protocol import Level, Phase
from tests.serve.fleet_world import (
    FAILED,
    FLIP,
    GONE,
    HOLD,
    JOINED,
    NO_ROW,
    RELEASE,
    STAGE,
    STRANGER,
    SUCCESS,
    Place,
    State,
    Step,
    World,
    failure_steps,
    is_agreed,
    join_steps,
    row_steps,
    with_truth,
)

LONGEST_WAY = 2000  # events until a fleet without faults agrees; some 150 are usual
SAID: dict[str, tuple[int, Level]] = {  # in each phase, until it is acknowledged
    Phase.STAGE: (STAGE, Level.STAGED),
    Phase.HOLD: (HOLD, Level.HELD),
    Phase.FLIP: (FLIP, Level.FLIPPED),
    Phase.IDLE: (RELEASE, Level.FLIPPED),
}
NOTHING_SAID = (-1, Level.NOTHING)


class Kind(IntEnum):
    """Kinds of events; CALM is any that needs no fault and no limit, the others are of one sort."""

    CALM = 0
    ROW = 1
    ARRIVAL = 2
    CONDUCTOR = 3
    STORE = 4
    EXPIRY = 5
    JOIN = 6
    FAILURE = 7
    LIFE = 8


CALM_KINDS = (Kind.ARRIVAL, Kind.JOIN, Kind.ROW, Kind.CONDUCTOR, Kind.STORE, Kind.LIFE)


class BrokenPromiseError(Exception):
    """A promise does not hold, and the way there."""

    def __init__(self, promise: str, way: list[str]) -> None:
        super().__init__("\n".join([promise, *way]))
        self.promise = promise


class Walk:
    """One history of a fleet.

    Args:
        slow: Kinds that a calm event is of only when it can be of no other.
    """

    def __init__(self, world: World, slow: Collection[Kind]) -> None:
        self._world = world
        self._quick = [kind for kind in CALM_KINDS if kind not in slow]
        self._slow = [kind for kind in CALM_KINDS if kind in slow]
        self._state: State = world.start()
        self._way: list[str] = []

    def go(self, choices: bytes, habits: Sequence[Kind]) -> None:
        """Whatever may happen, as the bytes choose.

        Args:
            habits: The kinds to choose from, the frequent ones several times.

        Raises:
            BrokenPromiseError: a promise other than agreement does not hold.
        """
        for what, whom in zip(choices[::2], choices[1::2], strict=False):
            option, place = divmod(whom, len(self._state.places))
            options = list(self._options(habits[what % len(habits)], place))
            if options:
                self._take(options[option % len(options)])

    def rest(self) -> None:
        """The faults end: the fleet agrees, first by itself, then on what is asked for again.

        Raises:
            BrokenPromiseError: a promise does not hold, agreement among them.
        """
        self._settle()
        num_failed = self._state.told.count(FAILED)
        while any(told not in {SUCCESS, FAILED} for told in self._state.told):
            self._take(next(self._world.conductor_steps(self._state)))
            self._settle()
        if self._state.told.count(FAILED) > num_failed:
            raise BrokenPromiseError("4 agreement", [*self._way, "a push fails without a fault"])
        for i, place in enumerate(self._state.places):
            if place.life == JOINED:
                self._take(next(row_steps(self._state, i, place)))

    def _settle(self) -> None:
        for turn in range(LONGEST_WAY):
            step = next(chain(self._calm(turn), self._patience_ends(turn)), None)
            if step is None:
                break
            self._take(step)
        if not is_agreed(self._state):
            raise BrokenPromiseError("4 agreement", [*self._way, str(self._state)])

    def _take(self, step: Step) -> None:
        step = with_truth(step)
        self._way.append(step.label)
        if step.broken:
            raise BrokenPromiseError(step.broken, self._way)
        self._state = step.state

    def _options(self, kind: Kind, i: int) -> Iterator[Step]:
        """What may come next, of one kind; the places are begun with one, or it is the only one."""
        world, s = self._world, self._state
        if kind is Kind.CALM:
            return self._calm(i)
        if kind is Kind.CONDUCTOR:
            return world.conductor_steps(s)
        if kind is Kind.FAILURE:
            return failure_steps(s)
        if kind is Kind.STORE:
            return world.store_steps(s)
        return self._options_at(kind, i, s.places[i])

    def _options_at(self, kind: Kind, i: int, p: Place) -> Iterator[Step]:
        world, s = self._world, self._state
        if kind is Kind.LIFE:
            yield from world.life_steps(s, i, p)
        elif p.life == GONE:
            return
        elif kind is Kind.ROW:
            yield from row_steps(s, i, p)
        elif kind is Kind.ARRIVAL:
            yield from world.message_steps(s, i, p)
        elif kind is Kind.JOIN:
            yield from join_steps(s, i, p)
        elif p.hold and world.holds_run_out:
            yield from world.expiry_steps(s, i, p)

    def _calm(self, first: int) -> Iterator[Step]:
        """What comes next without a fault; what is slow only if there is nothing else."""
        for kinds in (self._quick, self._slow):
            steps = [step for kind in kinds for step in self._calm_options(kind, first)]
            if steps:
                yield from steps
                return

    def _calm_options(self, kind: Kind, first: int) -> Iterator[Step]:
        s, num = self._state, len(self._state.places)
        if kind is Kind.STORE:
            yield from self._world.store_steps(s)
        elif kind is not Kind.CONDUCTOR:
            for i in range(first, first + num):
                yield from self._calm_at(kind, i % num, s.places[i % num])
        elif s.phase != Phase.IDLE:
            yield from self._world.conductor_steps(s)

    def _calm_at(self, kind: Kind, i: int, p: Place) -> Iterator[Step]:
        world, s = self._world, self._state
        if kind is Kind.LIFE:
            if p.life == GONE and p.noted != STRANGER:
                yield next(world.life_steps(s, i, p))  # its death is confirmed
        elif p.life == GONE:
            return
        elif kind is Kind.JOIN:
            yield from join_steps(s, i, p)
        elif kind is Kind.ROW and p.in_flight != NO_ROW:
            yield from row_steps(s, i, p)
        elif kind is Kind.ARRIVAL:
            message, level = SAID.get(s.phase, NOTHING_SAID)
            if (message, s.number) in s.sent and p.ack < (s.number, level):
                yield from world.arrival(s, i, p, message, s.number)

    def _patience_ends(self, first: int) -> Iterator[Step]:
        """What comes next when nothing else can: somebody has waited for long enough."""
        world, s, num = self._world, self._state, len(self._state.places)
        for i in range(first, first + num):
            p = s.places[i % num]
            if p.hold and world.holds_run_out:
                yield from world.expiry_steps(s, i % num, p)
        if s.phase in {Phase.STAGE, Phase.HOLD}:
            yield next(failure_steps(s))
