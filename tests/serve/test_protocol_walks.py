"""The swap's promises on random ways through larger fleets; see `fleet_walk`.

The ordinary run takes the same ways every time; `--hypothesis-profile=long` takes new ones for
hours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.serve.fleet_walk import CALM_KINDS, BrokenPromiseError, Kind, Walk
from tests.serve.fleet_world import World, forget_steps
from tests.serve.weaker_protocol import HARSHER_WORLDS, MUTANTS, weaken

IS_LONG = settings.get_current_profile_name() == "long"
ORDINARY = settings(max_examples=500, derandomize=True, deadline=None, database=None)
CONTROL = settings(ORDINARY, phases=[Phase.generate])
PATIENT = settings(CONTROL, max_examples=10_000)
# Several things have to come together for these, such as a put that lands two conductors later.
RARE = {
    "a new conductor writes no abort",
    "a replacement has the old name",
    "catching up keeps a hold that is decided",
    "a flip needs no hold",
}
CHOICES = st.binary(min_size=200, max_size=1000)
MOSTLY = (*6 * (Kind.CALM,), *2 * (Kind.CONDUCTOR,))
HABITS = st.lists(st.sampled_from(Kind), max_size=8)
SLOW = st.sets(st.sampled_from([kind for kind in CALM_KINDS if kind is not Kind.ARRIVAL]))


def worlds(like: World) -> SearchStrategy[World]:
    """Larger worlds by the same rules."""
    return st.builds(
        replace,
        st.just(like),
        replicas=st.integers(3, 6),
        empty_places=st.integers(0, 2),
        pushes=st.integers(1, 6),
        crashes=st.integers(0, 4),
        losses=st.integers(0, 4),
        starts=st.integers(0, 4),
        asks_again=st.just(True),
    )


def walk(world: World, choices: bytes, habits: list[Kind], slow: set[Kind]) -> None:
    """A walk with faults, and its end without any."""
    way = Walk(world, slow)
    way.go(choices, [*MOSTLY, *habits])
    way.rest()


@settings(settings.get_profile("long") if IS_LONG else ORDINARY)
@given(world=worlds(World()), choices=CHOICES, habits=HABITS, slow=SLOW)
def test_no_random_way_breaks_a_promise(
    world: World, choices: bytes, habits: list[Kind], slow: set[Kind]
) -> None:
    """Three to six replicas, up to six swaps, four deaths of each kind, pushers that ask again."""
    walk(world, choices, habits, slow)


def promise_broken_in(world: World, effort: settings) -> str:
    """The first promise that a random way breaks in worlds like this one."""

    @effort
    @given(world=worlds(world), choices=CHOICES, habits=HABITS, slow=SLOW)
    def go(world: World, choices: bytes, habits: list[Kind], slow: set[Kind]) -> None:
        walk(world, choices, habits, slow)

    forget_steps()
    try:
        go()
    except BrokenPromiseError as error:
        return error.promise
    finally:
        forget_steps()
    return ""


def caught(names: Iterable[str]) -> list[object]:
    """Parameters; what takes minutes to be noticed is left to long runs."""
    later = pytest.mark.skipif(not IS_LONG, reason="takes --hypothesis-profile=long")
    return [pytest.param(name, marks=later if name in RARE else ()) for name in names]


@pytest.mark.parametrize("name", caught(HARSHER_WORLDS))
def test_a_random_way_notices_a_world_with_one_rule_less(name: str) -> None:
    """Negative control; which promise breaks first is chance."""
    world, _ = HARSHER_WORLDS[name]

    assert promise_broken_in(world, PATIENT if name in RARE else CONTROL)


@pytest.mark.parametrize("name", caught(MUTANTS))
def test_a_random_way_notices_a_weaker_transition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the product's transitions."""
    weaker, world, _ = MUTANTS[name]
    weaken(weaker, monkeypatch)

    assert promise_broken_in(world, PATIENT if name in RARE else CONTROL)
