"""A new trunk with all heads, swapped under load: what callers, replicas and log see of it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from serve import memory, roll_call
from serve.engine import Snapshot
from serve.jobs import Answer, Job, OtherTrunkError
from serve.loading import HeadLoader
from serve.messages import Directive, Outcome, Swapped
from serve.protocol import Phase
from serve.record import LogView, Record, TrunkChange
from serve.store import StoreError
from serve.trunks import ServedTrunk
from tests.serve.harness import LocalFleet, stored_trunk, until
from tests.serve.oracle import Crowd, Seen, behind, some_picture
from tests.serve.test_swap_faults import crash_at, heal, refusal
from tests.serve.tiny import TinyTrunk, png_of

TASKS = ("colours", "shapes")
QUESTIONS = (TASKS, ("shapes",), ("colours",))


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyTrunk, TinyTrunk]:
    """Two trunks: pictures of 8 and of 12 px, features in another order and of another size."""
    folder = tmp_path_factory.mktemp("trunks")
    return (
        TinyTrunk(folder / "old", size_px=8, roll=0, scale=1 / 100),
        TinyTrunk(folder / "new", size_px=12, roll=1, scale=1 / 50),
    )


@pytest.fixture
def old(trunks: tuple[TinyTrunk, TinyTrunk]) -> TinyTrunk:
    """The trunk that is served first."""
    return trunks[0]


@pytest.fixture
def new(trunks: tuple[TinyTrunk, TinyTrunk]) -> TinyTrunk:
    """The one that takes its place."""
    return trunks[1]


def heads_of(trunk: TinyTrunk, seed: int = 0) -> list[Bundle]:
    """A bundle of each task."""
    return [trunk.bundle(task, seed + place) for place, task in enumerate(TASKS)]


def served(fleet: LocalFleet) -> set[str]:
    """The trunks that the living replicas answer by."""
    return {fleet.replicas[name].engine.manifest.digest for name in fleet.living()}


def made(outcome: Outcome) -> dict[str, int]:
    """The versions that went live, by task."""
    assert isinstance(outcome, Swapped), outcome
    return {change.task: change.version for change in outcome.changes}


class Truth:
    """What each bundle says of a picture that came as a file, on the trunk that it was made for."""

    def __init__(self, *trunks: TinyTrunk) -> None:
        self._of = {
            trunk.bundle(task, seed).digest: (trunk, seed)
            for trunk in trunks
            for task in TASKS
            for seed in range(12)
        }

    def wrong(self, seen: list[Seen]) -> list[str]:
        """Answers that mix trunks, or are not what their bundle says."""
        problems: list[str] = []
        for one in seen:
            of = [self._of[answer.live.bundle] for answer in one.answers]
            if len({trunk.manifest.digest for trunk, _ in of}) > 1:
                problems.append(f"two trunks answered {one.tasks}")
            for answer, (trunk, seed) in zip(one.answers, of, strict=True):
                off = np.abs(answer.scores - trunk.scores(one.picture, seed)).max()
                if off > 1e-4:
                    problems.append(f"{answer.live.task} v{answer.live.version} is off by {off}")
        return problems


def complaints(seen: list[Seen], log: LogView, *trunks: TinyTrunk) -> list[str]:
    """Everything that is wrong with answers."""
    return [
        *(f"failed: {one.error}" for one in seen if one.error),
        *behind(seen, log),
        *Truth(*trunks).wrong([one for one in seen if not one.error]),
    ]


def test_a_trunk_changes_under_load_and_drops_nothing(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """There, back and there again: no request fails, each is answered by one trunk and rightly."""
    with LocalFleet(tmp_path, old.folder, replicas=2) as fleet:
        fleet.push_together(*heads_of(old))
        with Crowd(fleet, QUESTIONS, clients=6, encode=png_of) as crowd:
            crowd.wait_for(20)
            there = made(fleet.push_together(*heads_of(new), trunk=new.folder))
            on_new = served(fleet)
            crowd.wait_for(20)
            single = fleet.must_push(new.bundle("colours", 5))
            crowd.wait_for(20)
            back = made(fleet.roll_trunk_back())
            on_old = served(fleet)
            crowd.wait_for(20)
            again = made(fleet.roll_trunk_back())
            crowd.wait_for(20)
        log = fleet.view()

        assert served(fleet) == on_new == {new.manifest.digest}
        assert all(fleet.replicas[name].is_healthy for name in fleet.living())
        assert on_old == {old.manifest.digest}
    assert there == dict.fromkeys(TASKS, 2)
    assert single == 3
    assert back == {"colours": 4, "shapes": 3}
    assert again == {"colours": 5, "shapes": 4}
    assert log.tasks["colours"][-1].change.bundle == new.bundle("colours", 5).digest
    assert complaints(crowd.seen, log, old, new) == []
    seen = {one.version("colours") for one in crowd.seen if "colours" in one.tasks}
    assert seen == {1, 2, 3, 4, 5}


def test_every_task_waits_until_the_last_replica_holds_and_flips(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """One replica is late to flip: what it has not begun it answers by the new trunk only."""
    with LocalFleet(tmp_path, old.folder, replicas=2, hold_s=5.0) as fleet:
        fleet.push_together(*heads_of(old))

        def come_late(directive: Directive) -> None:
            if directive.phase is Phase.FLIP:
                time.sleep(1.0)

        fleet.links["replica-2"].on_directive = come_late
        # Of each task its own clients: those who wait for one would not ask for the other.
        with (
            Crowd(fleet, (("colours",),), clients=3, encode=png_of) as some,
            Crowd(fleet, (("shapes",),), clients=3, encode=png_of) as others,
        ):
            some.wait_for(20)
            fleet.push_together(*heads_of(new), trunk=new.folder)
            others.wait_for(20)
        log = fleet.view()

    assert complaints([*some.seen, *others.seen], log, old, new) == []


def test_rows_that_wait_are_decoded_for_the_trunk_that_answers_them(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Queued before the flip as pictures of 8 px, answered after it by a trunk of 12."""
    with LocalFleet(tmp_path, old.folder, replicas=1, hold_s=5.0) as fleet:
        fleet.push_together(*heads_of(old))
        replica, waiting = fleet.replicas["replica-1"], list[Future[list[list[Answer]]]]()
        picture = some_picture(3)

        def ask_while_held(record: Record) -> None:
            if record.kind == "commit":
                deadline_s = time.monotonic() + 10
                waiting.extend(
                    replica.ask([png_of(picture), png_of(picture)], TASKS, deadline_s)
                    for _ in range(5)
                )
                until(lambda: len(replica.batcher._waiting) == 5)

        fleet.log.before_put = ask_while_held
        fleet.push_together(*heads_of(new), trunk=new.folder)
        answers = [answer.result(10) for answer in waiting]

    assert len(answers) == 5
    for pictures in answers:
        for task_answers in pictures:
            assert [answer.live.version for answer in task_answers] == [2, 2]
            for seed, answer in enumerate(task_answers):
                np.testing.assert_allclose(answer.scores, new.scores(picture, seed), atol=1e-5)


@pytest.mark.parametrize("kind", ["features", "pixels"])
def test_what_cannot_be_made_anew_is_refused_and_never_answered_by_the_other_trunk(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, kind: str
) -> None:
    """Features and ready pixels were made for the trunk before; the caller is told so."""
    given: dict[str, NDArray[np.uint8] | NDArray[np.float32]] = {
        "features": np.ones(3, np.float32),
        "pixels": some_picture(0),
    }
    with LocalFleet(tmp_path, old.folder, replicas=1, hold_s=5.0) as fleet:
        fleet.push_together(*heads_of(old))
        replica, waiting = fleet.replicas["replica-1"], list[Future[list[list[Answer]]]]()

        def ask_while_held(record: Record) -> None:
            if record.kind == "commit":
                job = Job([given[kind]], TASKS, made_for=old.manifest)
                waiting.append(replica.batcher.submit(job))

        fleet.log.before_put = ask_while_held
        fleet.push_together(*heads_of(new), trunk=new.folder)
        heal(fleet)
        late = Job([given[kind]], TASKS, made_for=old.manifest)

        with pytest.raises(OtherTrunkError, match="The trunk was changed"):
            waiting[0].result(10)
        with pytest.raises(OtherTrunkError):
            replica.batcher.submit(late).result(10)
        assert replica.batcher._waiting == {}


@pytest.mark.parametrize(
    ("moment", "is_new"),
    [("staged", False), ("held", False), ("after the commit", True), ("flipped", True)],
)
def test_a_conductor_may_crash_at_any_step_of_a_trunk(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, moment: str, *, is_new: bool
) -> None:
    """The fleet is at the trunk that the log says; what was staged in vain is let go."""
    with LocalFleet(tmp_path, old.folder, replicas=2, hold_s=0.6) as fleet:
        fleet.push_together(*heads_of(old))
        crash_at(fleet, moment)
        with Crowd(fleet, QUESTIONS, encode=png_of) as crowd:
            fleet.start_pushes(*heads_of(new), trunk=new.folder, key="k")
            until(lambda: fleet.conductor is None)
            heal(fleet)
            live = (new if is_new else old).manifest.digest
            until(lambda: served(fleet) == {live})
            if moment != "staged":  # who holds settles it alone, and what was staged is done with
                until(lambda: all(r.trunks._beside is None for r in fleet.replicas.values()))
            crowd.wait_for(10)
            fleet.start_conductor()
            until(lambda: all(r.trunks._beside is None for r in fleet.replicas.values()))
            again = fleet.push_together(*heads_of(new), trunk=new.folder, key="k")
            crowd.wait_for(10)
        log = fleet.view()

        assert served(fleet) == {new.manifest.digest}
    assert isinstance(again, Swapped)
    assert again.is_repeat == is_new
    assert made(again) == dict.fromkeys(TASKS, 2)
    assert complaints(crowd.seen, log, old, new) == []


def test_one_replica_that_cannot_load_it_stops_the_trunk(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It vetoes with the numbers; the others let go of what they loaded; nothing has changed."""
    with LocalFleet(tmp_path, old.folder, replicas=3) as fleet:
        fleet.push_together(*heads_of(old))
        trunks = fleet.replicas["replica-2"].trunks

        def hold(_: TrunkChange) -> ServedTrunk:
            raise memory.MemoryShortError(needed_bytes=2**30, used_bytes=2**29, limit_bytes=2**30)

        monkeypatch.setattr(trunks, "hold", hold)
        with Crowd(fleet, QUESTIONS, encode=png_of) as crowd:
            refused = refusal(fleet.push_together(*heads_of(new), trunk=new.folder))
            crowd.wait_for(10)
            until(lambda: all(r.trunks._beside is None for r in fleet.replicas.values()))
        log = fleet.view()

        assert served(fleet) == {old.manifest.digest}
    assert refused[0] == "gate"
    assert (
        "needs about 1024 MiB beside the one that is served; this replica uses 512 MiB of 1024"
        in (refused[1])
    )
    assert {task: h[-1].change.version for task, h in log.tasks.items()} == dict.fromkeys(TASKS, 1)
    assert complaints(crowd.seen, log, old, new) == []


def test_a_trunk_may_take_longer_to_load_than_a_head(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who says nothing while it loads one is neither given up nor taken for dead."""
    monkeypatch.setattr(roll_call, "SILENCE_S", 1.0)
    with LocalFleet(tmp_path, old.folder, replicas=2) as fleet:
        fleet.push_together(*heads_of(old))
        assert fleet.conductor is not None
        monkeypatch.setattr(fleet.conductor._swaps, "_stage_s", 0.2)  # of a head
        trunks = fleet.replicas["replica-2"].trunks
        load = trunks._load_beside

        def load_slowly(*given: Any) -> ServedTrunk:
            time.sleep(2.0)
            return load(*given)

        monkeypatch.setattr(trunks, "_load_beside", load_slowly)
        versions = made(fleet.push_together(*heads_of(new), trunk=new.folder))

        assert fleet.killed == []
        assert served(fleet) == {new.manifest.digest}
    assert versions == dict.fromkeys(TASKS, 2)


def test_a_head_that_fails_a_gate_on_the_new_trunk_stops_all(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Each replica asks the gates of every bundle on the new trunk; the task is named."""
    with LocalFleet(tmp_path, old.folder, replicas=2) as fleet:
        fleet.push_together(*heads_of(old))
        mixed = [new.bundle("colours", 1), old.bundle("shapes", 2)]
        refused = refusal(fleet.push_together(*mixed, trunk=new.folder))
        until(lambda: all(r.trunks._beside is None for r in fleet.replicas.values()))

        assert served(fleet) == {old.manifest.digest}
    assert refused[0] == "gate"
    assert refused[1].startswith("shapes: The head was trained on trunk")


def test_a_replica_may_die_and_another_join_while_the_trunk_changes(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """One is gone right after the commit; one starts while all are held; both end up right."""
    with LocalFleet(tmp_path, old.folder, replicas=2, hold_s=3.0) as fleet:
        fleet.push_together(*heads_of(old))
        joined: list[str] = []

        def start(record: Record) -> None:
            if record.kind == "commit":
                joined.append(fleet.start_replica())

        def die(record: Record) -> None:
            if record.kind == "commit":
                fleet.kill("replica-2")

        with Crowd(fleet, QUESTIONS, encode=png_of) as crowd:
            fleet.log.before_put, fleet.log.after_put = start, die
            fleet.push_together(*heads_of(new), trunk=new.folder)
            heal(fleet)
            fleet.wait_admitted(joined[0])
            crowd.wait_for(20)
        log = fleet.view()

        assert served(fleet) == {new.manifest.digest}
        assert [fleet.live_versions(task) for task in TASKS] == [{2}, {2}]
    assert complaints(crowd.seen, log, old, new) == []


def test_a_restarted_service_has_the_new_trunk_and_the_way_back(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Everything is read from the log."""
    with LocalFleet(tmp_path, old.folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(old))
        fleet.push_together(*heads_of(new), trunk=new.folder)
        fleet.start_conductor()
        fleet.kill("replica-1")
        fleet.wait_admitted(fleet.start_replica())
        with Crowd(fleet, QUESTIONS, encode=png_of) as crowd:
            crowd.wait_for(5)
            restarted = served(fleet)
            back = made(fleet.roll_trunk_back(expected=new.manifest.digest))
            crowd.wait_for(5)
        log = fleet.view()

        assert served(fleet) == {old.manifest.digest}
    assert restarted == {new.manifest.digest}
    assert back == dict.fromkeys(TASKS, 3)
    assert log.tasks["colours"][-1].change.rolled_back_to == 1
    assert complaints(crowd.seen, log, old, new) == []


def test_another_cluster_follows_to_the_new_trunk(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Under traffic of its own; none of its answers mixes trunks, none fails."""
    with LocalFleet(tmp_path, old.folder, replicas=2, cluster="old") as first:
        first.push_together(*heads_of(old))
        with (
            LocalFleet(tmp_path, old.folder, replicas=1, cluster="new", may_differ=True) as second,
            Crowd(first, QUESTIONS, encode=png_of) as crowd,
        ):
            second.push_together(*heads_of(new), trunk=new.folder)
            until(lambda: served(first) == {new.manifest.digest})
            crowd.wait_for(10)
            second.roll_trunk_back()
            until(lambda: served(first) == {old.manifest.digest})
            crowd.wait_for(10)
        log = first.view()

    assert complaints(crowd.seen, log, old, new) == []


def test_a_replica_that_missed_the_change_loads_it_before_it_answers(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Cut off while another service changed the trunk: it is not admitted until it has it too.

    There is no room for two by its limit, and what the log says has to be served all the same.
    """
    little: dict[str, Any] = {"memory_bytes": 2**20}
    with LocalFleet(tmp_path, old.folder, replicas=1, cluster="both", **little) as one:
        one.push_together(*heads_of(old))
        one.links["replica-1"].is_cut = True
        with LocalFleet(tmp_path, old.folder, replicas=0, cluster="both") as other:
            other.push_together(*heads_of(new), trunk=new.folder)
        one.start_conductor()
        one.links["replica-1"].is_cut = False
        until(lambda: served(one) == {new.manifest.digest})
        until(lambda: one.replicas["replica-1"].watcher.is_admitted)
        with Crowd(one, QUESTIONS, encode=png_of) as crowd:
            crowd.wait_for(5)
        log = one.view()

        assert one.replicas["replica-1"].trunks._beside is None
    assert {one.version("colours") for one in crowd.seen if "colours" in one.tasks} == {2}
    assert complaints(crowd.seen, log, old, new) == []


def test_a_replica_that_cannot_read_all_heads_of_a_trunk_lets_it_go_and_tries_again(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store was away for some of what it has missed; nothing of the attempt is left."""
    with LocalFleet(tmp_path, old.folder, replicas=1, cluster="both") as one:
        one.push_together(*heads_of(old))
        one.links["replica-1"].is_cut = True
        with LocalFleet(tmp_path, old.folder, replicas=0, cluster="both") as other:
            other.push_together(*heads_of(new), trunk=new.folder)
        snapshot, attempts = HeadLoader.snapshot, list[int]()

        def read_at_last(loader: HeadLoader, view: LogView) -> Snapshot:
            attempts.append(view.number)
            if len(attempts) < 3:
                raise StoreError("away")
            return snapshot(loader, view)

        monkeypatch.setattr(HeadLoader, "snapshot", read_at_last)
        one.start_conductor()
        one.links["replica-1"].is_cut = False
        until(lambda: served(one) == {new.manifest.digest})
        until(lambda: one.replicas["replica-1"].trunks._beside is None)

    assert len(attempts) == 3


def test_a_trunk_without_a_bundle_of_every_live_task_is_refused(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """The tasks are named; a retired one needs none, and a new one may come along."""
    with LocalFleet(tmp_path, old.folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(old), old.bundle("sizes", 3))
        missing = refusal(fleet.push_together(new.bundle("shapes", 1), trunk=new.folder))
        fleet.roll_back("sizes", key="retire", retires=True)
        outcome = fleet.push_together(*heads_of(new), new.bundle("moods", 4), trunk=new.folder)
        retired = refusal(fleet.roll_back("sizes", key="back"))

    assert missing[0] == "gate"
    assert missing[1].startswith("There is no bundle for the new trunk of colours, sizes.")
    assert made(outcome) == {"colours": 2, "shapes": 2, "moods": 1}
    assert "Version 1 of task sizes is for trunk" in retired[1]


def test_a_trunk_is_refused_while_a_rollout_runs_or_where_it_is_served(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """Nothing is changed; afterwards it is made."""
    with LocalFleet(tmp_path, old.folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(old))
        same = refusal(fleet.push_together(*heads_of(old), trunk=old.folder))
        fleet.push(old.bundle("shapes", 7), share=0.5)
        running = refusal(fleet.push_together(*heads_of(new), trunk=new.folder))
        nowhere = refusal(fleet.roll_trunk_back())
        fleet.roll_back("shapes", key="end")
        versions = made(fleet.push_together(*heads_of(new), trunk=new.folder))
        elsewhere = refusal(fleet.roll_trunk_back(expected=old.manifest.digest))

    assert same == (
        "conflict",
        f"Trunk {old.manifest.digest} is served already; push bundles alone.",
    )
    assert running[0] == "conflict"
    assert "A rollout is under way of shapes" in running[1]
    assert "No other trunk was served before" in nowhere[1]
    assert f"is served; expected {old.manifest.digest}" in elsewhere[1]
    assert versions == {"colours": 2, "shapes": 4}


def test_a_rollback_of_one_task_stays_on_the_trunk(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """To another trunk's bundle it is refused with the reason; by default it finds its own."""
    with LocalFleet(tmp_path, old.folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(old))
        fleet.push_together(*heads_of(new), trunk=new.folder)
        by_number = refusal(fleet.roll_back("colours", key="a", to=1))
        by_default = refusal(fleet.roll_back("colours", key="b"))
        fleet.must_push(new.bundle("colours", 5))
        back = fleet.roll_back("colours", key="c")
        log = fleet.view()

    assert by_number[0] == by_default[0] == "conflict"
    assert by_number[1].startswith(
        f"Version 1 of task colours is for trunk {old.manifest.digest}, and another is served now"
    )
    assert "headstock rollback --trunk" in by_default[1]
    assert made(back) == {"colours": 4}
    assert log.tasks["colours"][-1].change.rolled_back_to == 2


def test_the_way_back_is_refused_where_a_task_had_no_bundle_then(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """A task that came with the new trunk would answer nothing; it can be retired first."""
    with LocalFleet(tmp_path, old.folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(old))
        fleet.push_together(*heads_of(new), new.bundle("moods", 4), trunk=new.folder)
        refused = refusal(fleet.roll_trunk_back())
        fleet.roll_back("moods", key="retire", retires=True)
        back = made(fleet.roll_trunk_back(key="back"))
        repeated = fleet.roll_trunk_back(key="back")

    assert refused[1].startswith("There was no live bundle of moods on trunk")
    assert back == {"colours": 3, "shapes": 3}
    assert isinstance(repeated, Swapped)
    assert repeated.is_repeat


def test_other_services_changes_and_a_trunk_do_not_pass_each_other(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """A push that another service's trunk overtakes is refused: its head fits no longer."""
    with LocalFleet(tmp_path, old.folder, replicas=1, cluster="both") as one:
        one.push_together(*heads_of(old))
        with LocalFleet(tmp_path, old.folder, replicas=0, cluster="both") as other:

            def overtake(record: Record) -> None:
                if record.kind == "commit":
                    one.log.before_put = lambda _: None
                    other.push_together(*heads_of(new), trunk=new.folder)

            one.log.before_put = overtake
            refused = refusal(one.push(old.bundle("moods", 4)))
        until(lambda: served(one) == {new.manifest.digest})

    assert refused[0] == "conflict"
    assert "one of the two is of the trunk" in refused[1]


@pytest.mark.parametrize("is_cut", [False, True])
def test_of_two_trunks_the_first_that_is_written_wins_and_the_other_is_let_go(
    tmp_path: Path,
    old: TinyTrunk,
    new: TinyTrunk,
    caplog: pytest.LogCaptureFixture,
    *,
    is_cut: bool,
) -> None:
    """One service has staged a trunk and holds; another service's takes its number.

    Its replica hears so from its conductor, or finds out by itself.
    """
    third = TinyTrunk(tmp_path / "third", size_px=8, roll=2, scale=1 / 30)
    store = tmp_path / "store"
    with LocalFleet(store, old.folder, replicas=1, cluster="both", hold_s=1.5) as one:
        one.push_together(*heads_of(old))
        link = one.links["replica-1"]
        with LocalFleet(store, old.folder, replicas=0, cluster="both") as other:
            conductor, number = one.conductor, other.view().number
            until(lambda: conductor is not None and conductor.view.number == number)

            def overtake(record: Record) -> None:
                if record.kind == "commit":
                    link.is_cut = is_cut
                    one.log.before_put = lambda _: None
                    other.push_together(*heads_of(third), trunk=third.folder)

            one.log.before_put = overtake
            # Cut off, it lets callers wait for the end of its hold and for the loading.
            with Crowd(one, QUESTIONS, encode=png_of, limit_s=20) as crowd:
                refused = refusal(one.push_together(*heads_of(new), trunk=new.folder))
                until(lambda: served(one) == {third.manifest.digest})
                link.is_cut = False
                crowd.wait_for(10)
        until(lambda: one.replicas["replica-1"].trunks._beside is None)
        log = one.view()

    assert refused[0] == "conflict"
    assert "one of the two is of the trunk" in refused[1]
    assert complaints(crowd.seen, log, old, third) == []
    assert [line.getMessage() for line in caplog.records if line.levelname == "ERROR"] == []


def test_two_trunks_are_not_tried_at_once(tmp_path: Path, old: TinyTrunk, new: TinyTrunk) -> None:
    """The gates of one replica try another: a push is refused meanwhile, and made afterwards."""
    third = TinyTrunk(tmp_path / "third", size_px=8, roll=2, scale=1 / 30)
    with LocalFleet(tmp_path / "store", old.folder, replicas=2) as fleet:
        fleet.push_together(*heads_of(old))
        trunks = fleet.replicas["replica-2"].trunks
        trunks.hold(stored_trunk(fleet.log, third.folder))
        refused = refusal(fleet.push_together(*heads_of(new), trunk=new.folder))
        until(lambda: fleet.replicas["replica-1"].trunks._beside is None)
        trunks.let_go()
        versions = made(fleet.push_together(*heads_of(new), trunk=new.folder))

    assert refused[0] == "gate"
    assert refused[1].startswith(f"Trunk {third.manifest.digest} is being tried beside the one")
    assert versions == dict.fromkeys(TASKS, 2)


def test_memory_after_the_flip_is_near_to_one_trunks(tmp_path: Path) -> None:
    """Two trunks of 60 MB are in memory while they change, and one is afterwards."""
    folder = tmp_path / "trunks"
    heavy = [
        TinyTrunk(folder / name, size_px=8, roll=roll, scale=0.01, ballast_bytes=60_000_000)
        for roll, name in enumerate(("old", "new"))
    ]
    for trunk in heavy:
        del trunk.engine
    with LocalFleet(tmp_path / "store", heavy[0].folder, replicas=1) as fleet:
        fleet.push_together(*heads_of(heavy[0]))
        memory.give_back()
        before_bytes = memory.used_bytes()
        most_bytes: list[int] = []
        fleet.log.before_put = lambda _: most_bytes.append(memory.used_bytes())
        for _ in range(3):
            fleet.push_together(*heads_of(heavy[1]), trunk=heavy[1].folder)
            fleet.roll_trunk_back()
        memory.give_back()

        until(lambda: memory.used_bytes() < before_bytes + 30_000_000)
        assert max(most_bytes) > before_bytes + 50_000_000
