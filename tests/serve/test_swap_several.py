"""Pushes of several tasks in one record: all go live in one moment, or none does."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from export.bundle import Bundle
from export.sign import sign
from serve.engine import LiveHead
from serve.messages import Outcome, Pushes, Swapped
from serve.record import LogView, Record, TaskChange
from serve.watcher import StageError
from tests.serve.harness import LocalFleet, until
from tests.serve.oracle import Crowd, Heads, behind, judge
from tests.serve.signers import key_of, trusting
from tests.serve.test_swap_faults import crash_at, heal, kinds, refusal
from tests.serve.test_swap_rivals import overtake

TASKS = ("colours", "shapes", "sizes")
QUESTIONS = (TASKS, ("shapes", "colours"), ("colours",), ("shapes",), ("sizes",))


def set_of(heads: Heads, number: int, tasks: tuple[str, ...] = TASKS) -> list[Bundle]:
    """A bundle of each task, another for each number."""
    return [heads(100 * number + place, task) for place, task in enumerate(tasks)]


def made(outcome: Outcome) -> dict[str, int]:
    """The versions that went live, by task."""
    assert isinstance(outcome, Swapped), outcome
    return {change.task: change.version for change in outcome.changes}


def at(log: LogView) -> dict[str, int]:
    """The version that each task is at."""
    return {task: history[-1].change.version for task, history in log.tasks.items()}


@pytest.mark.parametrize("replicas", [2, 3])
def test_tasks_that_are_pushed_together_change_in_one_moment(
    tmp_path: Path, trunk_folder: Path, heads: Heads, replicas: int
) -> None:
    """Under load no request fails; no new head answers beside or before an old one, anywhere."""
    with LocalFleet(tmp_path, trunk_folder, replicas=replicas) as fleet:
        assert made(fleet.push_together(*set_of(heads, 0))) == dict.fromkeys(TASKS, 1)
        with Crowd(fleet, QUESTIONS, clients=6) as crowd:
            for number in range(1, 13):
                pushed = made(fleet.push_together(*set_of(heads, number)))
                assert pushed == dict.fromkeys(TASKS, number + 1)
                crowd.wait_for(10)
        log = fleet.view()

    assert judge(crowd.seen, log, heads.seeds) == []
    assert behind(crowd.seen, log) == []
    assert {s.version("colours") for s in crowd.seen if s.tasks == TASKS} >= set(range(3, 13))
    numbers = [[v.number for v in log.tasks[task]] for task in TASKS]
    assert numbers[0] == numbers[1] == numbers[2]


def test_a_task_that_is_pushed_alone_moves_alone(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Two of three together; the third goes on as it was, and its numbers are its own."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1, "sizes"))
        fleet.must_push(heads(2, "sizes"))
        with Crowd(fleet, (("sizes",),)) as crowd:
            first = made(fleet.push_together(*set_of(heads, 1, TASKS[:2])))
            second = made(fleet.push_together(*set_of(heads, 2, ("shapes", "sizes"))))
            crowd.wait_for(5)
        log = fleet.view()

    assert (first, second) == ({"colours": 1, "shapes": 1}, {"shapes": 2, "sizes": 3})
    assert at(log) == {"colours": 1, "shapes": 2, "sizes": 3}
    assert judge(crowd.seen, log, heads.seeds) == []


def test_one_veto_stops_all_and_names_its_task(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """A replica that cannot load one of them: nothing of any goes live, and the next push works."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3) as fleet:
        fleet.push_together(*set_of(heads, 0))
        watcher = fleet.replicas["replica-2"].watcher
        load = watcher._load_checked

        def refuse(change: TaskChange) -> LiveHead:
            if change.task == "shapes":
                raise StageError("no room")
            return load(change)

        with Crowd(fleet, QUESTIONS) as crowd:
            watcher._load_checked = refuse
            refused = refusal(fleet.push_together(*set_of(heads, 1), key="k"))
            live = [fleet.live_versions(task) for task in TASKS]
            watcher._load_checked = load
            crowd.wait_for(5)
            again = made(fleet.push_together(*set_of(heads, 1), key="k"))
            crowd.wait_for(5)
        log = fleet.view()

        assert kinds(log, fleet) == ["abort", "commit"]
    assert refused == ("gate", "shapes: no room (says replica replica-2)")
    assert live == [{1}] * 3
    assert again == dict.fromkeys(TASKS, 2)
    assert judge(crowd.seen, log, heads.seeds) == []
    assert behind(crowd.seen, log) == []


@pytest.mark.parametrize(
    ("moment", "live"),
    [("staged", 1), ("held", 1), ("after the commit", 2), ("flipped", 2)],
)
def test_a_conductor_may_crash_at_any_step_of_several(
    tmp_path: Path, trunk_folder: Path, heads: Heads, moment: str, live: int
) -> None:
    """All tasks are at exactly what the log says, and the same key makes the rest once."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3, hold_s=0.4) as fleet:
        fleet.push_together(*set_of(heads, 0))
        crash_at(fleet, moment)
        with Crowd(fleet, QUESTIONS) as crowd:
            fleet.start_pushes(*set_of(heads, 1), key="k")
            until(lambda: fleet.conductor is None)
            heal(fleet)
            until(lambda: all(fleet.live_versions(task) == {live} for task in TASKS))
            crowd.wait_for(10)
            fleet.start_conductor()
            again = made(fleet.push_together(*set_of(heads, 1), key="k"))
            crowd.wait_for(10)
        log = fleet.view()

    assert again == at(log) == dict.fromkeys(TASKS, 2)
    assert judge(crowd.seen, log, heads.seeds) == []
    assert behind(crowd.seen, log) == []


def test_a_replica_may_die_while_several_go_live(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The others flip without it; who starts later loads all of them."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3) as fleet:
        fleet.push_together(*set_of(heads, 0))

        def die(record: Record) -> None:
            if record.kind == "commit":
                fleet.kill("replica-2")

        with Crowd(fleet, QUESTIONS) as crowd:
            fleet.log.after_put = die
            pushed = made(fleet.push_together(*set_of(heads, 1)))
            heal(fleet)
            fleet.wait_admitted(fleet.start_replica())
            crowd.wait_for(20)
        log = fleet.view()

        assert [fleet.live_versions(task) for task in TASKS] == [{2}] * 3
    assert pushed == dict.fromkeys(TASKS, 2)
    assert judge(crowd.seen, log, heads.seeds) == []
    assert behind(crowd.seen, log) == []


def test_the_same_key_makes_several_once(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """Also in another order and of the next conductor; for fewer or other bundles it is used up."""
    one, two, three = set_of(heads, 1)
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        first = made(fleet.push_together(one, two, key="k"))
        fleet.start_conductor()
        again = fleet.push_together(two, one, key="k")
        others = [
            fleet.push_together(one, key="k"),
            fleet.push_together(one, three, key="k"),
            fleet.push_together(one, heads(7, "shapes"), key="k"),
            fleet.push(one, key="k"),
        ]
        fleet.must_push(three, key="l")
        single = fleet.push_together(one, three, key="l")
        log = fleet.view()

    assert isinstance(again, Swapped)
    assert again.is_repeat
    assert made(again) == first == {"colours": 1, "shapes": 1}
    assert [refusal(other)[0] for other in others] == ["conflict"] * 4
    assert "made version 1 of task colours, made version 1 of task shapes" in refusal(others[0])[1]
    assert refusal(single)[0] == "conflict"
    assert at(log) == {"colours": 1, "shapes": 1, "sizes": 1}


def test_one_that_cannot_be_made_stops_all(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Other labels without a declaration: the reason names the task, the others stay out too."""
    other = heads.make("shapes", seed=2, labels=("red", "green", "violet"))
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.push_together(*set_of(heads, 0))
        refused = refusal(fleet.push_together(heads(5), other, heads(6, "sizes")))
        log = fleet.view()

    assert refused[0] == "gate"
    assert refused[1].startswith("shapes: The labels are not those that are live")
    assert at(log) == dict.fromkeys(TASKS, 1)


def test_several_go_on_after_another_service_changed_another_task(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """They are proposed anew under the next number, all of them."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.push_together(*set_of(heads, 0, TASKS[:2]))
        overtake(fleet, heads, seed=5, task="sizes", at_kind="commit")
        pushed = made(fleet.push_together(*set_of(heads, 1, TASKS[:2])))
        until(lambda: fleet.live_versions("sizes") == {1})
        log = fleet.view()

    assert pushed == {"colours": 2, "shapes": 2}
    assert at(log) == {"colours": 2, "shapes": 2, "sizes": 1}


def test_several_give_way_to_another_service_that_changed_one_of_them(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """409 with who was first and with which task; none of them is live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.push_together(*set_of(heads, 0))
        overtake(fleet, heads, seed=5, task="shapes", at_kind="commit")
        refused = refusal(fleet.push_together(*set_of(heads, 1)))
        until(lambda: fleet.live_versions("shapes") == {2})
        log = fleet.view()

    assert refused[0] == "conflict"
    assert "conductor-b was first: record 4 made version 2 of task shapes" in refused[1]
    assert at(log) == {"colours": 1, "shapes": 2, "sizes": 1}


def test_another_cluster_follows_several_in_one_moment(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Its own callers see them change together too."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, cluster="old") as old:
        old.push_together(*set_of(heads, 0))
        with (
            LocalFleet(tmp_path, trunk_folder, replicas=1, cluster="new", may_differ=True) as new,
            Crowd(old, QUESTIONS) as crowd,
        ):
            for number in (1, 2, 3):
                new.push_together(*set_of(heads, number))
                due = {number + 1}
                until(lambda due=due: all(old.live_versions(task) == due for task in TASKS))
                crowd.wait_for(10)
        log = old.view()

    assert judge(crowd.seen, log, heads.seeds) == []
    assert behind(crowd.seen, log) == []


def test_each_of_several_has_to_be_signed(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """One unsigned bundle stops all; replicas verify each of them again."""
    now = datetime.now(UTC)
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.trust(trusting(1))
        one, two, _ = (
            sign(bundle, key_of(1), task=bundle.manifest.task, signed_at=now)
            for bundle in set_of(heads, 0)
        )
        pushes = (fleet.asked(one), fleet.asked(two, signed=None))
        refused = fleet.ask(lambda c: c.change(Pushes(pushes, "k"))).result(10)
        forged = (fleet.asked(one), fleet.asked(two, signed=fleet.asked(one).signed))
        vetoed = fleet.ask(lambda c: c.change(Pushes(forged, "l"))).result(10)
        pushed = made(fleet.push_together(one, two))

    assert refusal(refused)[0] == "gate"
    assert refusal(refused)[1].startswith("shapes: ")
    assert "shapes: " in refusal(vetoed)[1]
    assert pushed == {"colours": 1, "shapes": 1}
