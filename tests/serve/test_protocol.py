"""What the swap promises, against every order of events; see `fleet_world` for promises and world.

The negative controls (`weaker_protocol`) have to be caught; so a promise that holds is not one that
the search cannot see broken.
"""

from __future__ import annotations

import pytest

from tests.serve.fleet_search import explore
from tests.serve.fleet_world import World
from tests.serve.weaker_protocol import HARSHER_WORLDS, MUTANTS, weaken


def test_no_order_of_events_breaks_a_promise() -> None:
    """Two replicas, two pushes; a conductor and a replica may die, a process may start."""
    result = explore(World())

    assert not result.broken, result.trace
    assert result.num_states > 50_000  # fewer: the world has lost some of its events


LARGER = {
    "a fourth process": World(empty_places=1, crashes=0),
    "two conductors die": World(crashes=2, losses=0, starts=0),
    "three replicas": World(replicas=3, starts=0),
    "three pushes": World(pushes=3, losses=0, starts=0),
    "old acknowledgements are kept": World(starts=0, forgets=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_no_order_of_events_breaks_a_promise_in_a_larger_world(name: str) -> None:
    """More of one thing at a time."""
    result = explore(LARGER[name])

    assert not result.broken, result.trace


@pytest.mark.parametrize("name", HARSHER_WORLDS)
def test_a_world_with_one_rule_less_breaks_a_promise(name: str) -> None:
    """Negative control: what the protocol asks of its surroundings it does need."""
    world, promise = HARSHER_WORLDS[name]

    result = explore(world)

    assert result.broken == promise, result.trace


@pytest.mark.parametrize("name", MUTANTS)
def test_a_weaker_transition_breaks_a_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: every rule of the transitions is needed, and the search would tell."""
    weaker, world, promise = MUTANTS[name]
    weaken(weaker, monkeypatch)

    result = explore(world)

    assert result.broken == promise, result.trace
