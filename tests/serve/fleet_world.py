"""`serve.protocol` in a world where everything that can happen does, in every order.

The product's transitions are pure, so all histories of a small fleet can be tried (`fleet_search`),
and long ones of a larger fleet by chance (`fleet_walk`). What surrounds them is written here: a
log, messages, processes that start and die. The world is as unkind as the design allows. A message,
an acknowledgement and a put that was once sent may arrive at any time, in any order, again and
again, or never; a process may die between any two steps; a hold may run out at any moment, for
there are no clocks. What must never break:

  1 order: once version v was answered, no row that starts later is answered by an older one;
  1s clean cut: after an answer by v none older is given, not even one that was begun before;
  2 read your push: like 1, from the moment that a push was told it is live;
  3 all or nothing: nobody answers from a version whose record is not a commit;
  4 agreement: from everywhere, without more faults, one gets to where the conductor is idle, nobody
    holds or joins, and every replica is where the log folds to;
  5 truth: a push is told success only if it was committed, failure only if it never was, and is
    committed once, however often it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from serve import protocol
from serve.protocol import Ack, ConductorState, Level, Phase, ReplicaState

GONE, JOINING, JOINED = range(3)
STAGE, HOLD, FLIP, RELEASE = range(4)
WAITING, BUSY, SUCCESS, FAILED, UNKNOWN = range(5)
ABORT, FENCE = -1, -2  # what a record may say besides the push that it commits
NO_ROW = -1
DOWN, FENCING = "down", "fencing"  # a conductor that is not one yet
NOTHING, STRANGER = (0, 0), (-1, 0)

Note = tuple[int, int]  # an Ack as plain numbers: enums hash slowly, and states are hashed often


class Place(NamedTuple):
    """Room for one replica process: the product's state of it, and the world's."""

    life: int = GONE
    at: int = 0
    staged: int = 0
    hold: int = 0
    ack: Note = NOTHING  # stays deliverable when the replica is dead
    in_flight: int = NO_ROW  # version that a row has started with
    join_ok: bool = False  # on its way from the conductor
    noted: Note = STRANGER  # what the conductor knows of it; a stranger is no member


class State(NamedTuple):
    """Everything that decides what may happen next."""

    log: tuple[int, ...]  # the push that record N commits, or ABORT or FENCE; 0 is there at first
    phase: str
    number: int
    push: int
    places: tuple[Place, ...]
    sent: frozenset[tuple[int, int]]  # message and number
    puts: frozenset[tuple[int, int]]  # number and record, on their way to the store
    told: tuple[int, ...]  # what each push was
    newest: int  # newest version that anyone was answered by
    promised: int  # newest version that a push was told is live
    crashes: int  # of the conductor, still allowed; as are:
    losses: int
    starts: int


class Step(NamedTuple):
    """One event. Faults do not count as a way out of a bad state."""

    label: str
    state: State
    broken: str = ""
    is_fault: bool = False


@dataclass(frozen=True, kw_only=True)
class World:
    """How much may happen, and the rules of what surrounds the product; `False` makes a mutant."""

    replicas: int = 2
    empty_places: int = 0
    pushes: int = 2
    crashes: int = 1
    losses: int = 1
    starts: int = 1
    drains_before_ack: bool = True
    puts_if_absent: bool = True
    rereads_lost_puts: bool = True
    holds_run_out: bool = True
    asks_log: bool = True  # when a hold runs out
    fences: bool = True  # a new conductor takes the next free number with its own abort
    counts_all: bool = True  # and counts every live process
    confirms_deaths: bool = True  # nobody is dropped before it is dead
    joiners_wait: bool = True
    fresh_ids: bool = True  # a replacement is not taken for its predecessor
    asks_again: bool = False  # whoever was not told what became of his push does, by its key
    keeps_keys: bool = True
    forgets: bool = True  # acknowledgements of older swaps, for the product ignores them

    def start(self) -> State:
        """Everyone serves version 0, and the conductor is idle."""
        places = (Place(JOINED, noted=NOTHING),) * self.replicas + (Place(),) * self.empty_places
        told, none = (WAITING,) * self.pushes, frozenset[tuple[int, int]]()
        budget = (self.crashes, self.losses, self.starts)
        return State((0,), Phase.IDLE.value, 0, 0, places, none, none, told, 0, 0, *budget)

    def steps(self, s: State) -> Iterator[Step]:
        """Every event that may come next."""
        yield from (with_truth(step) for step in self.conductor_steps(s))
        yield from (with_truth(step) for step in failure_steps(s))
        yield from (with_truth(step) for step in self.store_steps(s))
        for i, p in enumerate(s.places):
            yield from self.life_steps(s, i, p)
            if p.life != GONE:
                yield from join_steps(s, i, p)
                yield from row_steps(s, i, p)
                yield from self.message_steps(s, i, p)
                if p.hold and self.holds_run_out:
                    yield from self.expiry_steps(s, i, p)

    def conductor_steps(self, s: State) -> Iterator[Step]:
        """Come back after a crash; begin a swap, take it a phase on, read its record."""
        is_decided = len(s.log) > s.number
        if s.phase == DOWN:
            yield self.fence(s, len(s.log)) if self.fences else self.restart(s, len(s.log) - 1)
        elif s.phase == FENCING and is_decided:
            is_own = s.log[s.number] == FENCE
            yield self.restart(s, s.number) if is_own else self.fence(s, s.number + 1)
        elif s.phase == Phase.IDLE:
            # Pushes that wait are alike, so the first may stand for any.
            if WAITING in s.told:
                yield self.begin(s, s.told.index(WAITING) + 1)
            if self.asks_again:
                again = (push for push, t in enumerate(s.told, 1) if t == UNKNOWN)
                yield from (self.begin(s, push) for push in again)
        elif s.phase in {Phase.COMMIT, Phase.ABORT}:
            if is_decided or (s.phase == Phase.COMMIT and not self.rereads_lost_puts):
                is_own = is_decided and s.log[s.number] == s.push
                yield enter(s, conduct(protocol.decided, s, is_own_commit=is_own))
        elif s.phase in {Phase.STAGE, Phase.HOLD, Phase.FLIP}:
            after = conduct(hear_and_advance, s, tuple(p.ack for p in s.places))
            if after.phase != s.phase:
                yield enter(s, after)

    def begin(self, s: State, push: int) -> Step:
        """A push is asked for; one that is in the log already has its answer by its key."""
        if self.keeps_keys and push in s.log:
            after = tell(s._replace(push=push), SUCCESS)._replace(push=0)
            made = after._replace(promised=max(s.promised, s.log.index(push)))
            return Step(f"push {push} was made already", made)
        after = conduct(protocol.begin, s, len(s.log))._replace(push=push)
        return Step(f"stage {after.number}", send(tell(after, BUSY), STAGE, after.number))

    def fence(self, s: State, number: int) -> Step:
        """A new conductor puts an abort under a number that it found free."""
        after = s._replace(phase=FENCING, number=number, puts=s.puts | {(number, FENCE)})
        return Step(f"conductor fences {number}", after)

    def restart(self, s: State, number: int) -> Step:
        """Its own abort stands: it lists the processes."""
        living = (str(i) for i, p in enumerate(s.places) if p.life != GONE and self.counts_all)
        after = with_conductor(s, *as_plain(protocol.restart(number, frozenset(living))))
        return Step("conductor is back", after)

    def store_steps(self, s: State) -> Iterator[Step]:
        """A put lands, whoever sent it and whether or not the sender lives."""
        for number, value in s.puts:
            if number == len(s.log) or not self.puts_if_absent:
                log = (*s.log[:number], value, *s.log[number + 1 :])
                after = s._replace(log=log, puts=s.puts - {(number, value)})
                yield Step(f"{value} lands as record {number}", after)

    def life_steps(self, s: State, i: int, p: Place) -> Iterator[Step]:
        """A process starts, or dies, by itself or killed; its death is confirmed."""
        is_member = p.noted != STRANGER
        if is_member and (p.life == GONE or not self.confirms_deaths):
            yield Step(f"{i} is dropped", conduct(protocol.drop, s, str(i)))
        if p.life == GONE and s.starts and not (is_member and self.fresh_ids):
            fresh = Place(JOINING if self.joiners_wait else JOINED, fold(s.log))
            if is_member:
                fresh = fresh._replace(ack=p.ack, noted=p.noted, join_ok=True)
            after = with_place(s, i, fresh)
            yield Step(f"{i} starts at {fresh.at}", after._replace(starts=s.starts - 1))
        if p.life != GONE and s.losses:
            after = with_place(s, i, Place(ack=p.ack, noted=p.noted))
            yield Step(f"{i} dies", after._replace(losses=s.losses - 1), is_fault=True)

    def message_steps(self, s: State, i: int, p: Place) -> Iterator[Step]:
        """Whatever any conductor ever sent may arrive."""
        for message, number in s.sent:
            yield from self.arrival(s, i, p, message, number)

    def arrival(self, s: State, i: int, p: Place, message: int, number: int) -> Iterator[Step]:
        """A message arrives, if it is news."""
        if message == STAGE:
            after = follow(on_stage, p, number, fold(s.log[:number]))
        elif message == HOLD:
            is_drained = p.in_flight == NO_ROW or not self.drains_before_ack
            after = follow(on_hold, p, number, is_drained)
        else:
            after = follow(protocol.flip if message == FLIP else protocol.release, p, number)
        if after != p:
            name = ("stage", "hold", "flip", "release")[message]
            yield Step(f"{i} receives {name} {number}", with_place(s, i, after))

    def expiry_steps(self, s: State, i: int, p: Place) -> Iterator[Step]:
        """The hold runs out: put an abort, ask what stands. Replies may be late, of older holds."""
        if p.hold >= len(s.log):
            yield Step(f"{i} puts abort {p.hold}", s._replace(puts=s.puts | {(p.hold, ABORT)}))
        numbers = range(1, len(s.log)) if self.asks_log else (p.hold,)
        for number in numbers:
            is_committed = self.asks_log and s.log[number] > 0
            after = follow(protocol.settle, p, number, is_committed=is_committed)
            if after != p:
                yield Step(f"{i} settles {number}", with_place(s, i, after))


def failure_steps(s: State) -> Iterator[Step]:
    """The conductor gives its swap up, or crashes and forgets everything."""
    if s.phase not in {DOWN, FENCING}:
        after = conduct(protocol.give_up, s)
        if after.phase != s.phase:
            yield enter(s, after)
    if s.crashes and s.phase != DOWN:
        told = tuple(UNKNOWN if t == BUSY else t for t in s.told)
        places = tuple(p._replace(noted=STRANGER) for p in s.places)
        puts = frozenset((n, max(value, ABORT)) for n, value in s.puts)  # now nobody's own
        after = s._replace(phase=DOWN, number=0, push=0, places=places, puts=puts, told=told)
        yield Step("conductor dies", after._replace(crashes=s.crashes - 1), is_fault=True)


def enter(s: State, after: State) -> Step:
    """What the conductor does to the world when it comes into a phase."""
    label = f"{s.phase} {s.number} -> {after.phase}"
    if after.phase in {Phase.COMMIT, Phase.ABORT}:
        value = s.push if after.phase == Phase.COMMIT else ABORT
        return Step(label, after._replace(puts=s.puts | {(s.number, value)}))
    if after.phase in {Phase.HOLD, Phase.FLIP}:
        return Step(label, send(after, HOLD if after.phase == Phase.HOLD else FLIP, s.number))
    if s.phase == Phase.FLIP:
        after = tell(after, SUCCESS)._replace(promised=max(s.promised, s.number), push=0)
        return Step(label, after)
    return Step(label, send(tell(after, FAILED), RELEASE, s.number)._replace(push=0))


def row_steps(s: State, i: int, p: Place) -> Iterator[Step]:
    """A row starts with a snapshot of the pointer; later it is answered."""
    if p.in_flight != NO_ROW:
        broken = "1s clean cut" if p.in_flight < s.newest else ""
        after = with_place(s, i, follow(protocol.drained, p)._replace(in_flight=NO_ROW))
        after = after._replace(newest=max(s.newest, p.in_flight))
        yield Step(f"{i} answers by {p.in_flight}", after, broken)
    elif p.life == JOINED and not p.hold:
        broken = ""
        if p.at < s.newest:
            broken = "1 order"
        elif p.at < s.promised:
            broken = "2 read your push"
        elif p.at >= len(s.log) or s.log[p.at] < 0:
            broken = "3 all or nothing"
        after = with_place(s, i, p._replace(in_flight=p.at))
        yield Step(f"{i} starts a row by {p.at}", after, broken)


def join_steps(s: State, i: int, p: Place) -> Iterator[Step]:
    """A new process loads what the log says, asks the conductor, and answers when it may."""
    if p.life == JOINING and p.join_ok:
        yield Step(f"{i} joins", with_place(s, i, p._replace(life=JOINED, join_ok=False)))
    if p.life == JOINING:
        after = follow(protocol.caught_up, p, len(s.log) - 1, at=fold(s.log))
        if after != p:
            yield Step(f"{i} loads {after.at}", with_place(s, i, after))
    is_asking = p.life == JOINING and not p.join_ok
    if s.phase not in {DOWN, FENCING} and (is_asking or p.noted == STRANGER):
        is_read_back = s.phase in {Phase.IDLE, Phase.FLIP}
        live = fold(s.log if is_read_back else s.log[: s.number])
        conductor, is_admitted = protocol.admit(as_conductor(s), str(i), at=p.at, live=live)
        if is_admitted:
            after = with_conductor(s, *as_plain(conductor))
            after = with_place(after, i, after.places[i]._replace(join_ok=is_asking))
            yield Step(f"{i} is admitted at {p.at}", after)


def with_truth(step: Step) -> Step:
    """Promise 5: what each push was told, against the log, which has it once."""
    log, told = step.state.log, step.state.told
    is_true = all(
        log.count(push) <= 1 and t != (FAILED if push in log else SUCCESS)
        for push, t in enumerate(told, 1)
    )
    return step if is_true else step._replace(broken="5 truth")


def on_stage(state: ReplicaState, number: int, at: int) -> ReplicaState:
    """A stage message arrives; the log before it folds to `at`."""
    return protocol.stage(state, number, at=at) if protocol.takes_stage(state, number) else state


def on_hold(state: ReplicaState, number: int, is_drained: bool) -> ReplicaState:  # noqa: FBT001
    """A hold message arrives; perhaps no row is in flight."""
    held = protocol.hold(state, number)
    return protocol.drained(held) if is_drained and held.hold == number else held


def hear_and_advance(state: ConductorState, acks: tuple[Note, ...]) -> ConductorState:
    """Acknowledgements arrive, those of strangers and of other swaps too."""
    for i, (number, level) in enumerate(acks):
        state = protocol.acknowledge(state, str(i), Ack(number, Level(level)))
    return protocol.advance(state)


@cache
def follow(step: Callable[..., ReplicaState], p: Place, *args: object, **more: object) -> Place:
    """Take a replica's step; remembered, because few are different."""
    before = ReplicaState(p.at, p.staged, p.hold, Ack(p.ack[0], Level(p.ack[1])))
    after = step(before, *args, **more)
    ack = (after.ack.number, int(after.ack.level))
    return p._replace(at=after.at, staged=after.staged, hold=after.hold, ack=ack)


def conduct(step: Callable[..., ConductorState], s: State, *args: object, **more: object) -> State:
    """Take a step of the conductor."""
    notes = tuple(p.noted for p in s.places)
    return with_conductor(s, *_conduct(step, s.phase, s.number, notes, *args, **more))


@cache
def _conduct(
    step: Callable[..., ConductorState],
    phase: str,
    number: int,
    notes: tuple[Note, ...],
    *args: object,
    **more: object,
) -> tuple[str, int, dict[int, Note]]:
    return as_plain(step(_conductor(phase, number, notes), *args, **more))


def as_conductor(s: State) -> ConductorState:
    """The product's state of the conductor."""
    return _conductor(s.phase, s.number, tuple(p.noted for p in s.places))


def _conductor(phase: str, number: int, notes: tuple[Note, ...]) -> ConductorState:
    members = {str(i): Ack(n[0], Level(n[1])) for i, n in enumerate(notes) if n != STRANGER}
    return ConductorState(Phase(phase), number, members)


def as_plain(c: ConductorState) -> tuple[str, int, dict[int, Note]]:
    """Phase, number, and the note on each member's place."""
    notes = {int(i): (ack.number, int(ack.level)) for i, ack in c.members.items()}
    return c.phase.value, c.number, notes


def with_conductor(s: State, phase: str, number: int, notes: dict[int, Note]) -> State:
    places = tuple(p._replace(noted=notes.get(i, STRANGER)) for i, p in enumerate(s.places))
    return s._replace(phase=phase, number=number, places=places)


def with_place(s: State, i: int, p: Place) -> State:
    return s._replace(places=(*s.places[:i], p, *s.places[i + 1 :]))


def send(s: State, message: int, number: int) -> State:
    return s._replace(sent=s.sent | {(message, number)})


def tell(s: State, news: int) -> State:
    return s._replace(told=(*s.told[: s.push - 1], news, *s.told[s.push :]))


@cache
def fold(log: tuple[int, ...]) -> int:
    return max(number for number, value in enumerate(log) if value >= 0)


def is_agreed(s: State) -> bool:
    """The conductor is idle, and every replica answers from where the log folds to."""
    is_quiet = s.phase == Phase.IDLE and all(number < len(s.log) for number, _ in s.puts)
    alive = [p for p in s.places if p.life != GONE]
    return is_quiet and all(p.life == JOINED and not p.hold and p.at == fold(s.log) for p in alive)


def forget_steps() -> None:
    """What is remembered of the product's transitions, of which a mutant may take the place."""
    for remembered in (follow, _conduct):
        remembered.cache_clear()
