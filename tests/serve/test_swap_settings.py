"""A change of settings goes through the fleet like a push, and stops no task on its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.batcher import Job
from serve.messages import Outcome, Refused, Swapped
from serve.record import Record
from serve.task_settings import TaskSettings
from tests.serve.harness import LocalFleet, LocalLink, until
from tests.serve.oracle import Crowd, Heads, judge, some_picture
from tests.serve.test_swap_faults import crash_at, heal


def everywhere(fleet: LocalFleet, task: str = "colours") -> list[TaskSettings]:
    """The settings that each living replica goes by, without repetition."""
    found: list[TaskSettings] = []
    for name in sorted(fleet.living()):
        settings = fleet.replicas[name].batcher.snapshot.settings_of(task)
        found += [settings] if settings not in found else []
    return found


def must_set(fleet: LocalFleet, *, key: str = "", **settings: object) -> Swapped:
    """Set what has to succeed."""
    outcome = fleet.set_task("colours", key=key, **settings)
    assert isinstance(outcome, Swapped), outcome
    return outcome


def test_settings_are_everywhere_when_the_call_returns_and_nothing_is_dropped(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Ten changes under traffic: every replica goes by each, no request fails, no version is made.

    No bundle is read either: there is nothing to load.
    """
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        before = fleet.view()
        for bundle in (tmp_path / "blobs").rglob("*"):
            if bundle.is_file():
                bundle.unlink()
        with Crowd(fleet, (("colours",),)) as crowd:
            seen: list[list[TaskSettings]] = []
            for weight in range(2, 12):
                assert must_set(fleet, weight=weight).replicas == 2
                seen.append(everywhere(fleet))
                crowd.wait_for(5)
        log = fleet.view()

    assert seen == [[TaskSettings(weight=weight)] for weight in range(2, 12)]
    assert judge(crowd.seen, log, heads.seeds) == []
    assert log.tasks == before.tasks
    assert log.number == before.number + 10


def test_no_row_waits_for_a_change_of_settings(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """While the record is written, which is when a push holds its task, every replica answers."""
    answered: list[str] = []
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))

        def ask_all(_: Record) -> None:
            for name, replica in fleet.replicas.items():
                replica.batcher.submit(Job([some_picture(0)], ("colours",))).result(0.5)
                answered.append(name)

        fleet.log.before_put = ask_all
        must_set(fleet, pinned=True)

    assert sorted(answered) == ["replica-1", "replica-2"]


def test_settings_outlive_pushes_rollbacks_and_restarts(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """They are the task's and not a version's; whoever starts later reads them in the log."""
    wanted = TaskSettings(weight=2, pinned=True)
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        must_set(fleet, weight=2)
        fleet.must_push(heads(2))
        must_set(fleet, pinned=True)
        fleet.roll_back("colours", key="back")
        kept = everywhere(fleet)
        fleet.start_conductor()
        fleet.kill("replica-1")
        fleet.wait_admitted(fleet.start_replica())
        restarted = everywhere(fleet)
        log = fleet.view()

    assert kept == restarted == [wanted]
    assert log.settings == {"colours": wanted}
    assert [version.change.version for version in log.tasks["colours"]] == [1, 2, 3]


def test_a_replica_that_joins_late_catches_up_with_the_settings(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """It loaded the log before they were set, and is admitted only when it has them."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        link = LocalLink(fleet)
        link.is_cut = True
        name = fleet.start_replica(link)
        must_set(fleet, deadline_s=0.25)
        link.is_cut = False
        fleet.wait_admitted(name)

        assert everywhere(fleet) == [TaskSettings(deadline_s=0.25)]


@pytest.mark.parametrize(
    ("moment", "weight"),
    [("staged", 1), ("held", 1), ("after the commit", 2), ("flipped", 2)],
)
def test_a_conductor_that_crashes_leaves_old_or_new_settings_everywhere(
    tmp_path: Path, trunk_folder: Path, heads: Heads, moment: str, weight: int
) -> None:
    """The record decides; the same request again makes them, and makes them once."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.4) as fleet:
        fleet.must_push(heads(1))
        crash_at(fleet, moment)
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            fleet.start_setting("colours", key="k", weight=2)
            until(lambda: fleet.conductor is None)
            heal(fleet)
            fleet.start_conductor()
            until(lambda: everywhere(fleet) == [TaskSettings(weight=weight)])
            crowd.wait_for(5)
            again = must_set(fleet, key="k", weight=2)
            after = everywhere(fleet)
        log = fleet.view()

    assert again.is_repeat == (weight == 2)
    assert after == [TaskSettings(weight=2)]
    assert len(log.set_tasks["colours"]) == 1
    assert judge(crowd.seen, log, heads.seeds) == []


def test_changes_at_once_lose_nothing(tmp_path: Path, trunk_folder: Path, heads: Heads) -> None:
    """Each changes what it names, whichever is first."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        asked: list[dict[str, object]] = [{"weight": 5}, {"pinned": True}, {"deadline_s": 1}]
        started = [
            fleet.start_setting("colours", key=f"k{place}", **settings)
            for place, settings in enumerate(asked)
        ]
        outcomes: list[Outcome] = [future.result(10) for future in started]

        assert all(isinstance(outcome, Swapped) for outcome in outcomes)
        assert everywhere(fleet) == [TaskSettings(weight=5, pinned=True, deadline_s=1)]


def test_one_key_for_two_settings_at_once_makes_only_one(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The second is not told that its own is live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        first = fleet.start_setting("colours", key="k", weight=1)
        second = fleet.start_setting("colours", key="k", pinned=True)
        done, refused = first.result(10), second.result(10)

    assert isinstance(done, Swapped)
    assert isinstance(refused, Refused)
    assert refused.kind == "conflict"
