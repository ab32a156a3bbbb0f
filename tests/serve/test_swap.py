"""Conductor, replicas and log together: what callers and pushers see of a swap.

Everything is real but Ray: see `harness.py`. The judge of the answers is `oracle.py`; that it can
condemn is shown in `test_swap_oracle.py`.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from serve.messages import Outcome, Refused, Swapped
from serve.record import LogView, Record
from tests.serve.harness import LocalFleet, until
from tests.serve.oracle import Crowd, Heads, Pushed, judge


def version_of(outcome: Outcome) -> int:
    """The version that a successful change made."""
    assert isinstance(outcome, Swapped), outcome
    assert outcome.change is not None
    return outcome.change.version


def refusal(outcome: Outcome) -> tuple[str, str]:
    """Kind and reason of a change that was refused."""
    assert isinstance(outcome, Refused), outcome
    return outcome.kind, outcome.reason


def versions(log: LogView, task: str) -> list[int]:
    """The versions of a task, as the log has them."""
    return [version.change.version for version in log.tasks[task]]


@pytest.mark.parametrize("replicas", [2, 3])
def test_twenty_pushes_under_load_drop_nothing_and_keep_every_promise(
    tmp_path: Path, trunk_folder: Path, heads: Heads, replicas: int
) -> None:
    """No request fails, versions never go back, each push is read, scores are that version's."""
    pushed: list[Pushed] = []
    with LocalFleet(tmp_path, trunk_folder, replicas=replicas) as fleet:
        fleet.must_push(heads(0))
        with Crowd(fleet, (("colours",),)) as crowd:
            for seed in range(1, 21):
                asked_s = time.monotonic()
                version = fleet.must_push(heads(seed))
                pushed.append(Pushed("colours", version, asked_s, time.monotonic()))
                crowd.wait_for(10)
        log = fleet.view()

    assert judge(crowd.seen, log, heads.seeds, pushed) == []
    assert [p.version for p in pushed] == list(range(2, 22))
    assert versions(log, "colours") == list(range(1, 22))
    # All of them were seen, so there was something to judge.
    assert {s.version("colours") for s in crowd.seen} >= set(range(2, 22))


def test_a_request_for_several_tasks_never_mixes_moments(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Two tasks are pushed in turn; every pair of versions in an answer was live together."""
    questions = (("colours", "shapes"), ("shapes", "colours"), ("shapes",), ("colours",))
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(100))
        fleet.must_push(heads(101, "shapes"))
        with Crowd(fleet, questions) as crowd:
            for seed in range(12):
                fleet.must_push(heads(seed, ("colours", "shapes")[seed % 2]))
                crowd.wait_for(8)
        log = fleet.view()

    assert judge(crowd.seen, log, heads.seeds) == []
    assert len({tuple(a.live.version for a in s.answers) for s in crowd.seen}) > 10


def test_pushes_at_once_are_put_in_an_order_without_gap_or_duplicate(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Six pushers at the same moment get six versions, and the log has just these."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(0))
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            started = {seed: fleet.start_push(heads(seed)) for seed in range(1, 7)}
            got = {seed: version_of(push.result(30)) for seed, push in started.items()}
            crowd.wait_for(5)
        log = fleet.view()

    assert sorted(got.values()) == list(range(2, 8))
    assert versions(log, "colours") == list(range(1, 8))
    assert {v.change.version: v.change.bundle for v in log.tasks["colours"]} == {
        1: heads(0).digest,
        **{version: heads(seed).digest for seed, version in got.items()},
    }
    assert judge(crowd.seen, log, heads.seeds) == []


def test_the_same_key_makes_one_change(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """Asked again in turn, at once, or of the next conductor: the answer is the same."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        first = version_of(fleet.push(heads(1), key="k"))
        again = [version_of(fleet.push(heads(1), key="k"))]
        at_once = [fleet.start_push(heads(2), key="l") for _ in range(4)]
        twins = [version_of(push.result(30)) for push in at_once]
        fleet.start_conductor()
        again.append(version_of(fleet.push(heads(1), key="k")))
        log = fleet.view()

    assert (first, again) == (1, [1, 1])
    assert twins == [2, 2, 2, 2]
    assert versions(log, "colours") == [1, 2]


def test_a_key_that_made_another_change_is_a_conflict(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """A used key never answers for another bundle, another task or a rollback."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1), key="k")
        others = [
            fleet.push(heads(2), key="k"),
            fleet.push(heads(1), key="k", task="shapes"),
            fleet.roll_back("colours", key="k"),
        ]
        log = fleet.view()

    assert [refusal(other)[0] for other in others] == ["conflict"] * 3
    assert "'k' already made version 1 of task colours" in refusal(others[0])[1]
    assert versions(log, "colours") == [1]
    assert "shapes" not in log.tasks


def test_a_key_used_twice_at_once_for_different_changes_makes_only_one(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The second pusher is not told that its bundle is live when the first one's is."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        one, other = fleet.start_push(heads(1), key="k"), fleet.start_push(heads(2), key="k")
        first, second = one.result(30), other.result(30)
        log = fleet.view()

    assert version_of(first) == 1
    assert refusal(second)[0] == "conflict"
    assert [v.change.bundle for v in log.tasks["colours"]] == [heads(1).digest]


def test_a_rollback_is_a_new_version_with_an_older_bundle(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """By default the bundle before the live one; by number any; the answers are that bundle's."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        for seed in (1, 2, 3):
            fleet.must_push(heads(seed))
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            crowd.wait_for(5)
            back = version_of(fleet.roll_back("colours", key="a"))
            crowd.wait_for(5)
            forth = version_of(fleet.roll_back("colours", key="b"))
            first = version_of(fleet.roll_back("colours", key="c", to=1, expected=5))
            crowd.wait_for(5)
        log = fleet.view()

    assert (back, forth, first) == (4, 5, 6)
    bundles = [v.change.bundle for v in log.tasks["colours"]]
    assert bundles[3:] == [heads(2).digest, heads(3).digest, heads(1).digest]
    assert [v.change.rolled_back_to for v in log.tasks["colours"]][3:] == [2, 3, 1]
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_rollback_that_makes_no_sense_says_why(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """No such task, no such version, nothing before, or another version than expected is live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        nothing = fleet.roll_back("colours", key="a")
        fleet.must_push(heads(1))
        alone = fleet.roll_back("colours", key="b")
        missing = fleet.roll_back("colours", key="c", to=7)
        raced = fleet.roll_back("colours", key="d", to=1, expected=2)
        log = fleet.view()

    assert refusal(nothing) == ("unknown", "Task 'colours' was never pushed.")
    assert refusal(alone)[0] == "conflict"
    assert "no earlier bundle" in refusal(alone)[1]
    assert "no version 7" in refusal(missing)[1]
    assert refusal(raced) == ("conflict", "Task colours is at version 1; expected version 2.")
    assert versions(log, "colours") == [1]


def test_other_labels_need_a_declaration(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """Callers would see other names, so the pusher has to say that it is meant."""
    other = heads.make("colours", seed=2, labels=("red", "green", "violet"))
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        refused = fleet.push(other)
        declared = version_of(fleet.push(other, allow_new_labels=True))

    assert refusal(refused)[0] == "gate"
    assert "gone: ['blue'], new: ['violet']" in refusal(refused)[1]
    assert declared == 2


def test_without_replicas_a_push_is_live_at_once_and_later_replicas_serve_it(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The log decides what is live, not who is running."""
    with LocalFleet(tmp_path, trunk_folder, replicas=0) as fleet:
        outcome = fleet.push(heads(1))
        fleet.wait_admitted(fleet.start_replica())
        with Crowd(fleet, (("colours",),), clients=1) as crowd:
            crowd.wait_for(3)
        log = fleet.view()

    assert isinstance(outcome, Swapped)
    assert outcome.replicas == 0
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_pusher_that_goes_away_does_not_stop_a_swap(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The swap ends as it would have, and the key still answers for it."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        is_held, may_go_on = threading.Event(), threading.Event()

        def dawdle(_: Record) -> None:
            is_held.set()
            may_go_on.wait(0.5)

        fleet.log.before_put = dawdle
        push = fleet.start_push(heads(1), key="k")
        is_held.wait(5)
        push.cancel()
        may_go_on.set()
        until(lambda: fleet.live_versions("colours") == {1})
        again = version_of(fleet.push(heads(1), key="k"))
        log = fleet.view()

    assert again == 1
    assert versions(log, "colours") == [1]


def test_the_next_conductor_goes_on_where_the_log_ends(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Replicas answer without a conductor, and follow the next one; versions go on counting."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            fleet.crash_conductor()
            crowd.wait_for(5)
            fleet.start_conductor()
            after = fleet.must_push(heads(2))
            crowd.wait_for(5)
        log = fleet.view()

    assert after == 2
    assert judge(crowd.seen, log, heads.seeds) == []
