"""Two services on one log: each number is won by one of them, and the other goes on rightly."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export.bundle import digest_of
from serve.messages import Outcome, Refused, Swapped
from serve.record import Record, TaskChange
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a folder, or in a bucket."""
    return request.getfixturevalue("s3_url") if request.param == "s3" else str(tmp_path / "store")


def write(fleet: LocalFleet, heads: Heads, *, seed: int, task: str, key: str = "theirs") -> None:
    """Have another service make a change under the next number."""
    bundle, view = heads(seed, task), fleet.view()
    live = view.live(task)
    change = TaskChange(
        task=task,
        version=live.change.version + 1 if live else 1,
        action="push",
        bundle=fleet.log.put_bundle(bundle),
        labels=bundle.manifest.labels,
    )
    fleet.log.put_record(
        Record(
            number=view.number + 1,
            kind="commit",
            previous=view.tip,
            writer="conductor-b",
            written_at="",
            changes=(change,),
            idempotency_key=key,
        )
    )


def overtake(
    fleet: LocalFleet, heads: Heads, *, seed: int, task: str, key: str = "theirs", at_kind: str
) -> None:
    """Have another service make a change just before the fleet's own next record is put."""

    def before_put(record: Record) -> None:
        if record.kind == at_kind:
            fleet.log.before_put = lambda _: None
            write(fleet, heads, seed=seed, task=task, key=key)

    fleet.log.before_put = before_put


def all_at(fleet: LocalFleet, task: str, version: int) -> Callable[[], bool]:
    """Whether every replica points at a version and may answer."""
    return lambda: (
        fleet.live_versions(task) == {version}
        and all(fleet.replicas[name].watcher.is_admitted for name in fleet.living())
    )


def test_a_change_of_another_task_goes_on_and_both_are_served(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """The loser of a number takes the next one, and its replicas load what the winner wrote."""
    with LocalFleet(store, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        overtake(fleet, heads, seed=5, task="shapes", at_kind="commit")
        outcome = fleet.push(heads(2))

        assert isinstance(outcome, Swapped)
        assert outcome.change is not None
        assert outcome.change.version == 2
        assert [r.writer == "conductor-b" for r in fleet.log.read_records(0)][-2:] == [True, False]
        until(all_at(fleet, "colours", 2))
        until(all_at(fleet, "shapes", 1))
        assert fleet.must_push(heads(3)) == 3


def test_a_change_of_the_same_task_is_a_conflict_and_the_winner_is_served(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """409 with who won; nothing of the loser is live; the next push works."""
    with LocalFleet(store, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        overtake(fleet, heads, seed=5, task="colours", at_kind="commit")
        response = HttpClient(fleet, "replica-1").post(
            "/tasks/colours/versions", content=heads(2).to_zip()
        )
        until(all_at(fleet, "colours", 2))
        live = {fleet.replicas[n].batcher.snapshot.heads["colours"].bundle for n in fleet.living()}

        assert response.status_code == 409
        assert "conductor-b was first: record 4 made version 2 of task" in response.json()["detail"]
        assert live == {heads(5).digest}
        assert fleet.must_push(heads(3)) == 3


def test_the_same_change_through_two_services_is_made_once(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """The key was used by the winner, so the loser answers with what the winner made."""
    with LocalFleet(store, trunk_folder, replicas=1) as fleet:
        overtake(fleet, heads, seed=1, task="colours", key="k", at_kind="commit")
        outcome = fleet.push(heads(1), key="k")
        until(all_at(fleet, "colours", 1))

    assert isinstance(outcome, Swapped)
    assert outcome.is_repeat


def test_an_abort_that_meets_another_services_commit_gives_way_too(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """A swap that was given up finds its number taken, and what took it is served."""
    with LocalFleet(store, trunk_folder, replicas=2, swap_stage_s=0.3) as fleet:
        fleet.must_push(heads(1))
        link = fleet.links["replica-2"]
        link.on_directive = lambda directive: time.sleep(0.5 if directive.record else 0)
        overtake(fleet, heads, seed=5, task="shapes", at_kind="abort")
        refused: Outcome = fleet.push(heads(2))
        link.on_directive = lambda _: None
        until(all_at(fleet, "shapes", 1))

        assert isinstance(refused, Refused)
        assert fleet.must_push(heads(3)) == 2


def test_a_replica_that_settles_by_itself_does_not_take_anothers_commit_for_its_own(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """Its hold runs out, and under the number stands what it never staged: that is loaded."""
    with LocalFleet(store, trunk_folder, replicas=1, hold_s=0.3) as fleet:
        fleet.must_push(heads(1))
        overtake(fleet, heads, seed=5, task="colours", at_kind="commit")
        overtaking = fleet.log.before_put

        def overtake_and_crash(record: Record) -> None:
            overtaking(record)
            if record.kind == "commit":
                fleet.crash_conductor()

        fleet.log.before_put = overtake_and_crash
        fleet.start_push(heads(2))
        until(lambda: fleet.live_versions("colours") == {2})
        live = fleet.replicas["replica-1"].batcher.snapshot.heads["colours"]

    assert live.bundle == heads(5).digest


def test_two_services_that_push_at_once_agree_on_one_history(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """Each pushes its own task; no push is lost, none is refused, and the log has no gap.

    They go by one name, so that neither knows of the other: what holds is put-if-absent alone.
    """
    with (
        LocalFleet(store, trunk_folder, replicas=1, cluster="both") as one,
        LocalFleet(store, trunk_folder, replicas=1, cluster="both") as other,
        ThreadPoolExecutor(2) as pool,
    ):

        def push(fleet: LocalFleet, task: str) -> list[int]:
            return [fleet.must_push(heads(seed, task), key=f"{task}{seed}") for seed in range(5)]

        pushed = [pool.submit(push, one, "colours"), pool.submit(push, other, "shapes")]
        versions = [push.result(60) for push in pushed]
        log = one.view()

    assert versions == [[1, 2, 3, 4, 5]] * 2
    assert [len(log.tasks[task]) for task in ("colours", "shapes")] == [5, 5]
    assert log.tip != digest_of(b"")


def test_a_replica_that_joins_brings_the_news_of_what_another_service_wrote(
    store: str, trunk_folder: Path, heads: Heads
) -> None:
    """Nobody had asked this service for anything; its other replica follows."""
    with LocalFleet(store, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        write(fleet, heads, seed=5, task="colours")
        fleet.wait_admitted(fleet.start_replica())
        until(all_at(fleet, "colours", 2))

        assert fleet.must_push(heads(3)) == 3
