"""A swap in which something dies, freezes, refuses or arrives late: what callers and log see."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from serve import roll_call
from serve.engine import LiveHead
from serve.headlog import HeadLog
from serve.jobs import Job, UndecidedError
from serve.link import LinkError
from serve.messages import Directive, Outcome, Poll, Refused, Swapped
from serve.protocol import Level, Phase
from serve.record import LogView, Record, TaskChange
from serve.watcher import StageError
from tests.serve.harness import LocalFleet, until
from tests.serve.oracle import Crowd, Heads, judge, some_picture


def kinds(log: LogView, fleet: LocalFleet) -> list[str]:
    """Commit or abort, for each record after the conductor's first abort, trunk and first push."""
    records = [fleet.log.get_record(number) for number in range(4, log.number + 1)]
    return [record.kind for record in records if record is not None]


def refusal(outcome: Outcome) -> tuple[str, str]:
    """Kind and reason of a change that was refused."""
    assert isinstance(outcome, Refused), outcome
    return outcome.kind, outcome.reason


def test_a_replica_that_cannot_stage_vetoes_the_swap(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The pusher gets its reason, an abort is logged, nothing changes; the next push works."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3) as fleet:
        fleet.must_push(heads(1))
        watcher = fleet.replicas["replica-2"].watcher
        load = watcher._load_checked

        def refuse(change: TaskChange) -> LiveHead:
            raise StageError(f"no room for version {change.version}")

        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            watcher._load_checked = refuse
            refused = fleet.push(heads(2), key="k")
            live = fleet.live_versions("colours")
            watcher._load_checked = load
            crowd.wait_for(5)
            version = fleet.must_push(heads(2), key="k")
            crowd.wait_for(5)
        log = fleet.view()

        assert refusal(refused) == ("gate", "no room for version 2 (says replica replica-2)")
        assert live == {1}
        assert version == 2
        assert kinds(log, fleet) == ["abort", "commit"]
    assert judge(crowd.seen, log, heads.seeds) == []


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.HOLD, Phase.FLIP])
def test_a_replica_that_dies_in_a_swap_does_not_stop_it(
    tmp_path: Path, trunk_folder: Path, heads: Heads, phase: Phase
) -> None:
    """The others go on once its death is confirmed; its replacement joins at the new version."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3) as fleet:
        fleet.must_push(heads(1))

        def die(directive: Directive) -> None:
            if directive.phase is phase:
                fleet.kill("replica-3")
                raise LinkError("this process is gone")

        fleet.links["replica-3"].on_directive = die
        with Crowd(fleet, (("colours",),)) as crowd:
            outcome = fleet.push(heads(2))
            fleet.wait_admitted(fleet.start_replica())
            crowd.wait_for(20)
        log = fleet.view()

        assert isinstance(outcome, Swapped), outcome
        assert outcome.replicas == 2
        assert fleet.live_versions("colours") == {2}
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_silent_replica_is_killed_and_the_swap_goes_on(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives but is not heard of: nobody can know what it answers, so it has to end."""
    monkeypatch.setattr(roll_call, "SILENCE_S", 0.2)
    with LocalFleet(tmp_path, trunk_folder, replicas=2, swap_stage_s=0.3) as fleet:
        fleet.must_push(heads(1))
        fleet.links["replica-2"].is_cut = True
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            outcome = fleet.push(heads(2))
            crowd.wait_for(5)
        log = fleet.view()

        assert isinstance(outcome, Swapped), outcome
        assert fleet.killed == ["replica-2"]
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_push_is_refused_when_a_silent_replica_cannot_be_ended(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or nothing: three swaps are given up, nothing changes; when it is back, a push works."""
    monkeypatch.setattr(roll_call, "SILENCE_S", 0.1)
    with LocalFleet(tmp_path, trunk_folder, replicas=2, swap_stage_s=0.4) as fleet:
        fleet.must_push(heads(1))
        monkeypatch.setattr(fleet, "kill", print)
        fleet.links["replica-2"].is_cut = True
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            refused = fleet.push(heads(2), key="k")
            live = fleet.live_versions("colours")
            fleet.links["replica-2"].is_cut = False
            version = fleet.must_push(heads(2), key="k")
            crowd.wait_for(5)
        log = fleet.view()

        assert refusal(refused)[0] == "unavailable"
        assert "replica-2 did not acknowledge stage within 0.40 s" in refusal(refused)[1]
        assert live == {1}
        assert kinds(log, fleet)[:3] == ["abort", "abort", "abort"]
    assert version == 2
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_replica_that_loads_for_long_is_not_taken_for_silent(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large bundle must not end every replica of the fleet."""
    monkeypatch.setattr(roll_call, "SILENCE_S", 0.1)
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        for replica in fleet.replicas.values():
            load = replica.watcher._load_checked
            replica.watcher._load_checked = lambda change, load=load: (
                time.sleep(0.5),
                load(change),
            )[1]
        version = fleet.must_push(heads(2))

        assert fleet.killed == []
    assert version == 2


def crash_at(fleet: LocalFleet, moment: str) -> None:
    """Have the conductor's process end at a moment of the swap that comes next."""
    level = {"staged": Level.STAGED, "held": Level.HELD, "flipped": Level.FLIPPED}
    number = fleet.view().number + 1

    def on_poll(poll: Poll) -> None:
        if poll.ack == (number, level[moment]):
            fleet.crash_conductor()
            raise LinkError("the conductor is gone")

    def on_put(record: Record) -> None:
        if record.kind == "commit":
            fleet.crash_conductor()

    if moment == "after the commit":
        fleet.log.after_put = on_put
    else:
        fleet.links["replica-1"].on_poll = on_poll


def nothing(_: object) -> None:
    """Let it pass."""


def heal(fleet: LocalFleet) -> None:
    """No more faults."""
    fleet.log.before_put = fleet.log.after_put = nothing
    for link in fleet.links.values():
        link.on_poll = link.on_directive = nothing


@pytest.mark.parametrize(
    ("moment", "live"),
    [("staged", 1), ("held", 1), ("after the commit", 2), ("flipped", 2)],
)
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_conductor_may_crash_at_any_step(
    tmp_path: Path, trunk_folder: Path, heads: Heads, moment: str, live: int, *, is_replaced: bool
) -> None:
    """With or without a new one, replicas go on answering and get to exactly what the log says."""
    with LocalFleet(tmp_path, trunk_folder, replicas=3, hold_s=0.4) as fleet:
        fleet.must_push(heads(1))
        crash_at(fleet, moment)
        with Crowd(fleet, (("colours",),)) as crowd:
            push = fleet.start_push(heads(2), key="k")
            until(lambda: fleet.conductor is None)
            heal(fleet)
            if is_replaced:
                fleet.start_conductor()
            until(lambda: fleet.live_versions("colours") == {live})
            crowd.wait_for(20)
            if not is_replaced:
                fleet.start_conductor()
            after = fleet.must_push(heads(3))
            again = fleet.must_push(heads(2), key="k")
            crowd.wait_for(20)
        log = fleet.view()

        assert push.cancelled()
        assert fleet.killed == []
        assert fleet.live_versions("colours") == {log.tasks["colours"][-1].change.version}
    assert after == live + 1
    # The pusher asks again with its key: made before the crash, or made now.
    assert again == (2 if live == 2 else 3)
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_commit_of_a_dead_conductor_lands_too_late(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The next conductor's abort has taken the number, so the late commit is never read."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        is_fenced = threading.Event()

        def crash_and_dawdle(record: Record) -> None:
            if record.kind == "commit":
                fleet.crash_conductor()
                is_fenced.wait(5)

        fleet.log.before_put = crash_and_dawdle
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            fleet.start_push(heads(2))
            until(lambda: fleet.conductor is None)
            fleet.start_conductor()
            heal(fleet)
            is_fenced.set()
            version = fleet.must_push(heads(3))
            crowd.wait_for(10)
        log = fleet.view()

        assert kinds(log, fleet) == ["abort", "commit"]
    assert version == 2
    assert log.tasks["colours"][-1].change.bundle == heads(3).digest
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_replica_without_its_store_still_hears_the_conductor(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Its hold ran out while the line was cut; the commit reaches it by the line alone."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.3) as fleet:
        fleet.must_push(heads(1))
        link, watcher = fleet.links["replica-1"], fleet.replicas["replica-1"].watcher
        (tmp_path / "away").mkdir()
        (tmp_path / "away" / "log").touch()

        def lose(record: Record) -> None:
            if record.kind == "commit":
                link.is_cut = True
                watcher._log = HeadLog(str(tmp_path / "away"))

        fleet.log.after_put = lose
        push = fleet.start_push(heads(2))
        until(lambda: isinstance(ask(fleet, "replica-1", "colours"), UndecidedError))
        link.is_cut = False

        assert isinstance(push.result(3), Swapped)
        assert fleet.live_versions("colours") == {2}


def test_a_hold_that_runs_out_before_the_commit_undoes_the_swap(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """A replica's abort is first: the conductor's commit does not stand, and it tries once more."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.2) as fleet:
        fleet.must_push(heads(1))
        delays = [0.4]

        def be_slow(record: Record) -> None:
            if record.kind == "commit" and delays:
                time.sleep(delays.pop())

        fleet.log.before_put = be_slow
        with Crowd(fleet, (("colours",),)) as crowd:
            version = fleet.must_push(heads(2))
            crowd.wait_for(10)
        log = fleet.view()
        abort = fleet.log.get_record(4)

        assert kinds(log, fleet) == ["abort", "commit"]
        assert abort is not None
        assert abort.writer in fleet.replicas
    assert version == 2
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_joiner_waits_until_the_swap_is_settled(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """It is not admitted while a record is undecided, and then answers by the new version only."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=3.0) as fleet:
        fleet.must_push(heads(1))
        may_go_on = threading.Event()

        def dawdle(_: Record) -> None:
            may_go_on.wait(5)

        fleet.log.before_put = dawdle
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            push = fleet.start_push(heads(2))
            until(lambda: fleet.replicas["replica-1"].batcher._held == {"colours"})
            name = fleet.start_replica()
            joiner = fleet.replicas[name]
            time.sleep(0.2)
            was_admitted, version = joiner.watcher.is_admitted, fleet.view().live_number
            may_go_on.set()
            push.result(10)
            fleet.wait_admitted(name)
            crowd.wait_for(20)
        log = fleet.view()

        assert not was_admitted
        assert version == 3
        assert fleet.live_versions("colours") == {2}
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_joiner_is_not_dropped_by_an_older_list_of_the_living(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who joins while the runtime is asked is not in its answer; it is a member all the same."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        is_asked, may_answer = threading.Event(), threading.Event()

        def slowly() -> frozenset[str]:
            living = LocalFleet.living(fleet)
            is_asked.set()
            may_answer.wait(5)
            return living

        monkeypatch.setattr(fleet, "living", slowly)
        asking = fleet.ask(lambda conductor: conductor.metrics())
        is_asked.wait(5)
        name = fleet.start_replica()
        fleet.wait_admitted(name)
        may_answer.set()
        asking.result(5)

        assert fleet.ask(lambda conductor: conductor.members()).result(5) == ["replica-1", name]


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.HOLD, Phase.FLIP])
def test_a_runtime_that_fails_to_say_who_lives_ends_no_swap_half_way(
    tmp_path: Path, trunk_folder: Path, heads: Heads, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is no death: the swap waits, and the conductor is fit for the next one."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=2.0) as fleet:
        fleet.must_push(heads(1))
        num_asked: list[int] = []

        def fail() -> frozenset[str]:
            num_asked.append(1)
            raise RuntimeError("the cluster's store is away")

        def be_slow(directive: Directive) -> None:
            if directive.phase is phase:
                time.sleep(0.3)

        monkeypatch.setattr(fleet, "living", fail)
        fleet.links["replica-2"].on_directive = be_slow
        first = fleet.must_push(heads(2))
        heal(fleet)
        second = fleet.must_push(heads(3))
        monkeypatch.undo()

    assert num_asked
    assert (first, second) == (2, 3)


def test_a_store_that_fails_right_after_the_commit_does_not_stop_the_conductor(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """The record has been read back once, which decides; nothing needs to be read again."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))

        def break_once(_: Record) -> None:
            fleet.log.after_put = nothing
            fleet.break_store()

        fleet.log.after_put = break_once
        first = fleet.must_push(heads(2))
        fleet.mend_store()
        second = fleet.must_push(heads(3))

    assert (first, second) == (2, 3)


def ask(fleet: LocalFleet, name: str, *tasks: str) -> Exception | None:
    """What a request to one replica fails with; None if it is answered."""
    try:
        fleet.replicas[name].batcher.submit(Job([some_picture(0)], tasks)).result(5)
    # Whatever it is, the tests below look at it.
    except Exception as error:  # noqa: BLE001
        return error
    return None


def test_without_conductor_and_store_only_the_held_task_is_refused(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """503 for the task whose swap nobody can decide; with the store back, it goes on by itself."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.3) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(5, "shapes"))
        crash_at(fleet, "held")
        fleet.start_push(heads(2))
        until(lambda: fleet.conductor is None)
        fleet.break_store()
        waited = ask(fleet, "replica-1", "colours")
        at_once = ask(fleet, "replica-1", "shapes", "colours")
        other = ask(fleet, "replica-1", "shapes")
        fleet.mend_store()
        until(lambda: ask(fleet, "replica-1", "colours") is None)
        until(lambda: ask(fleet, "replica-2", "colours") is None)
        heal(fleet)
        fleet.start_conductor()
        version = fleet.must_push(heads(3))

        assert fleet.live_versions("colours") == {2}
    assert isinstance(waited, UndecidedError)
    assert isinstance(at_once, UndecidedError)
    assert other is None
    assert version == 2


def test_a_store_that_is_away_for_long_costs_no_replica_its_life(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held replicas still report to the conductor, which ends none when the store is back."""
    monkeypatch.setattr(roll_call, "SILENCE_S", 0.4)
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.2) as fleet:
        fleet.must_push(heads(1))

        def break_once(record: Record) -> None:
            if record.kind == "commit":
                fleet.log.before_put = nothing
                fleet.break_store()

        fleet.log.before_put = break_once
        push = fleet.start_push(heads(2))
        until(lambda: isinstance(ask(fleet, "replica-1", "colours"), UndecidedError))
        time.sleep(1.0)
        fleet.mend_store()
        outcome = push.result(10)
        until(lambda: ask(fleet, "replica-1", "colours") is None)

        assert isinstance(outcome, Swapped), outcome
        assert fleet.killed == []
        assert fleet.live_versions("colours") == {2}


def test_late_and_repeated_directives_touch_nothing(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Every directive ever sent is obeyed once more, in any order; what is live stays live."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        heard: list[Directive] = []
        fleet.links["replica-1"].on_directive = heard.append
        for seed in range(4):
            fleet.must_push(heads(seed))
        heal(fleet)
        watcher = fleet.replicas["replica-1"].watcher
        for directive in [*heard, *reversed(heard)]:
            watcher._obey(directive)
        state = watcher._state

        assert (state.at, state.hold) == (fleet.view().live_number, 0)
        assert fleet.live_versions("colours") == {4}
        assert fleet.must_push(heads(7)) == 5
