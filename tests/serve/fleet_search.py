"""Every state of a `fleet_world`, breadth first: shortest ways to break a promise."""

from __future__ import annotations

import gc
from typing import NamedTuple

from serve.protocol import Phase
from tests.serve.fleet_world import (
    ABORT,
    DOWN,
    FENCING,
    NOTHING,
    Place,
    State,
    World,
    forget_steps,
    is_agreed,
)


class Result(NamedTuple):
    """Of a search: the promise that is broken, if any, and a shortest way to break it."""

    broken: str
    num_states: int
    trace: str


def explore(world: World) -> Result:
    """Search breadth first, through every state that the world can come into."""
    forget_steps()
    gc.disable()  # there are no cycles, but millions of tuples to look through
    try:
        return _explore(world)
    finally:
        gc.enable()


def _explore(world: World) -> Result:
    order, came = [canonical(world.start(), world)], [(0, "")]
    index, befores = {order[0]: 0}, [list[int]()]
    for here, before in enumerate(order):
        for label, step_state, broken, is_fault in world.steps(before):
            if broken:
                return Result(broken, len(order), trace(came, here, label))
            after = canonical(step_state, world)
            there = index.setdefault(after, len(order))
            if there == len(order):
                order.append(after)
                came.append((here, label))
                befores.append([])
            if not is_fault:
                befores[there].append(here)
    todo = [j for j, state in enumerate(order) if is_agreed(state)]
    can_agree = set(todo)
    while todo:
        news = set(befores[todo.pop()]) - can_agree
        can_agree |= news
        todo.extend(news)
    stuck = next((j for j in range(len(order)) if j not in can_agree), None)
    if stuck is None:
        return Result("", len(order), "")
    return Result("4 agreement", len(order), trace(came, stuck, "agreement is out of reach"))


def trace(came: list[tuple[int, str]], end: int, last: str) -> str:
    """The way to a state, one event a line; places are numbered anew in every state."""
    labels = [last]
    while end:
        end, label = came[end]
        labels.append(label)
    return "\n".join(reversed(labels))


def canonical(s: State, world: World) -> State:
    """One state for all that behave alike: places have no order, and what is over is forgotten."""
    is_open = s.phase not in {DOWN, FENCING, Phase.IDLE}
    number = s.number if is_open else len(s.log)
    places = [forget(p, number) if world.forgets else p for p in s.places]
    places.sort()
    log = s.log if s.phase == FENCING else tuple([max(value, ABORT) for value in s.log])
    puts = s.puts
    if puts and world.puts_if_absent:
        puts = frozenset([put for put in puts if put[0] >= len(log)])
    promised = s.promised if s.promised > s.newest else 0
    return s._replace(log=log, places=tuple(places), puts=puts, promised=promised)


def forget(p: Place, number: int) -> Place:
    """Acknowledgements of swaps before this one say nothing any more."""
    if 0 < p.ack[0] < number:
        p = p._replace(ack=NOTHING)
    return p._replace(noted=NOTHING) if 0 < p.noted[0] < number else p
