"""Two clusters on one log, as in an upgrade: one writes, the other follows, and both keep order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from serve import conductor, presence
from serve.messages import Outcome, Refused
from serve.record import Record
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Crowd, Heads, judge


@pytest.fixture
def old(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """The cluster that was there first, with version 1 of colours live on two replicas."""
    store = tmp_path / "store"
    with LocalFleet(store, trunk_folder, replicas=2, cluster="old") as fleet:
        fleet.must_push(heads(1))
        yield fleet


@pytest.fixture
def new(old: LocalFleet, trunk_folder: Path) -> Iterator[LocalFleet]:
    """One that takes its place; it may change heads while both answer."""
    store = old.settings.store
    with LocalFleet(store, trunk_folder, replicas=1, cluster="new", may_differ=True) as fleet:
        yield fleet


def refusal(outcome: Outcome) -> str:
    assert isinstance(outcome, Refused), outcome
    return f"{outcome.kind}: {outcome.reason}"


def test_the_newer_cluster_takes_the_pen(old: LocalFleet, new: LocalFleet, heads: Heads) -> None:
    """The older one refuses changes, also over HTTP, and says where to make them."""
    until(lambda: old.conductor is not None and old.conductor.view.pen == "new")
    number = old.view().number
    reason = refusal(old.push(heads(2)))
    answer = HttpClient(old, "replica-1").post("/tasks/colours/versions", content=heads(2).to_zip())

    assert reason == (
        "conflict: Cluster new has taken over this head log; make changes there. This one, old, "
        "follows it."
    )
    assert answer.status_code == 409
    assert old.view().number == number
    assert new.must_push(heads(3)) == 2


def test_the_older_cluster_follows_and_drops_nothing(
    old: LocalFleet, new: LocalFleet, heads: Heads
) -> None:
    """Under traffic of its own, within a second: every answer is of the log, and none goes back."""
    with Crowd(old, (("colours",), ("colours", "shapes"))) as crowd:
        crowd.seen.clear()
        new.must_push(heads(9, "shapes"))
        until(lambda: old.live_versions("shapes") == {1})
        crowd.seen.clear()  # until then nobody knew of shapes
        for version in range(2, 8):
            assert new.must_push(heads(version)) == version
            until(lambda due=version: old.live_versions("colours") == {due}, limit_s=2)
            crowd.wait_for(10)
        new.set_task("colours", weight=3.0)
        until(lambda: all(s == 3.0 for s in weights(old)))
        assert new.roll_back("colours", key="back")
        until(lambda: old.live_versions("colours") == {8})

    assert judge(crowd.seen, old.view(), heads.seeds) == []
    assert {s.version("colours") for s in crowd.seen} >= {3, 7}


def test_nobody_follows_before_everybody_can(
    old: LocalFleet, new: LocalFleet, heads: Heads
) -> None:
    """While one replica is not heard of, none answers by a version that it may not know."""
    link = old.links["replica-2"]
    until(lambda: old.conductor is not None and old.conductor.view.pen == "new")
    link.is_cut = True
    new.must_push(heads(2))
    deadline_s = time.monotonic() + 1.0
    seen = set[int]()
    while time.monotonic() < deadline_s:
        seen |= old.live_versions("colours")
    link.is_cut = False

    until(lambda: old.live_versions("colours") == {2})
    assert seen == {1}


def weights(fleet: LocalFleet) -> list[float]:
    """What each replica goes by for colours."""
    snapshots = [replica.batcher.snapshot for replica in fleet.replicas.values()]
    return [snapshot.settings_of("colours").weight for snapshot in snapshots]


def test_a_replica_that_cannot_follow_in_time_answers_nothing_until_it_has(
    old: LocalFleet, new: LocalFleet, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that is stricter there vetoes; what is live everywhere else is loaded all the same."""
    until(lambda: old.conductor is not None and old.conductor.view.pen == "new")
    replica = old.replicas["replica-1"]
    monkeypatch.setattr(replica.watcher, "_load_checked", _refuse)
    with Crowd(old, (("colours",),)) as crowd:
        new.must_push(heads(2))
        until(lambda: old.live_versions("colours") == {2})
        until(lambda: all(r.watcher.is_admitted for r in old.replicas.values()))
        crowd.wait_for(10)
        new.must_push(heads(3), key="again")
        until(lambda: old.live_versions("colours") == {3})
        crowd.wait_for(10)

    assert [s.error for s in crowd.seen if s.error] == []


def _refuse(_: object) -> object:
    from serve.watcher import StageError  # noqa: PLC0415

    raise StageError("too large for this replica")


def test_while_both_answer_changes_are_refused_by_default(
    old: LocalFleet, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the older cluster has been silent for a while."""
    monkeypatch.setattr(conductor, "SHOW_EVERY_S", 0.1)
    monkeypatch.setattr(presence, "GONE_AFTER", timedelta(seconds=1.5))
    store = old.settings.store
    until(lambda: bool(list(Path(store, "clusters").iterdir())))
    with LocalFleet(store, trunk_folder, replicas=1, cluster="new") as new:
        both = refusal(new.push(heads(2)))
        until(lambda: old.conductor is not None and old.conductor.view.pen == "new")
        new.start_conductor()
        still = refusal(new.push(heads(2)))
        old.crash_conductor()
        until(lambda: not isinstance(new.push(heads(2)), Refused))

    assert both.startswith(
        "conflict: Cluster old answers from this head log too, and its callers would see the "
        "change later than yours."
    )
    assert still == both


def test_a_restarted_conductor_of_the_older_cluster_does_not_take_the_pen_back(
    old: LocalFleet, new: LocalFleet, heads: Heads
) -> None:
    """It goes on following; the newer one's, restarted, goes on writing."""
    until(lambda: old.conductor is not None and old.conductor.view.pen == "new")
    old.start_conductor()
    assert "Cluster new has taken over" in refusal(old.push(heads(2)))
    new.start_conductor()
    assert new.must_push(heads(3)) == 2
    until(lambda: old.live_versions("colours") == {2})
    assert old.view().epochs == ("old", "new")


def test_a_swap_that_the_takeover_meets_is_refused_or_made_and_never_half(
    old: LocalFleet, trunk_folder: Path, heads: Heads
) -> None:
    """The epoch record takes the number of the commit: the older cluster's rows go on."""
    fleets: list[LocalFleet] = []

    def take_over(_: object) -> None:
        old.log.before_put = lambda _: None
        fleets.append(
            LocalFleet(old.settings.store, trunk_folder, replicas=0, cluster="new", may_differ=True)
        )
        fleets[0].start_conductor()

    with Crowd(old, (("colours",),)) as crowd:
        old.log.before_put = take_over
        reason = refusal(old.push(heads(2)))
        crowd.wait_for(20)
    fleets[0].crash_conductor()

    assert "Cluster new has taken over" in reason
    assert judge(crowd.seen, old.view(), heads.seeds) == []
    assert old.live_versions("colours") == {1}


def test_what_keeps_it_from_following_is_told_once_and_so_is_its_end(
    old: LocalFleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away and a damaged record last for hours; each of many looks finds them."""
    monkeypatch.setattr(conductor, "FOLLOW_S", 0.005)
    caplog.set_level(logging.INFO, logger="serve.conductor")
    looks = count_looks(old, monkeypatch)
    record = Path(old.settings.store) / f"log/{old.view().number + 1:020d}.json"

    def told_after(num_looks: int) -> list[str]:
        caplog.clear()
        before = len(looks)
        until(lambda: len(looks) > before + num_looks)
        lines = [line for line in caplog.records if line.name == "serve.conductor"]
        assert not any(line.exc_info for line in lines)  # its message is all
        return [line.getMessage() for line in lines]

    told_after(1)
    assert told_after(20) == []
    record.write_text("{}")
    damaged = told_after(20)
    assert told_after(20) == []
    record.unlink()
    mended = told_after(20)
    old.break_store()
    away = told_after(20)
    old.mend_store()
    back = told_after(20)

    assert len(damaged) == len(away) == 1
    assert damaged[0].startswith(f"cannot see what others write: Record {int(record.stem)} in ")
    assert "cannot see what others write: " in away[0]
    assert mended == back == ["what others write can be seen again"]


def test_following_goes_on_after_what_nobody_foresaw_and_shows_where_it_was(
    old: LocalFleet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kind of error comes with its frames, once too."""
    monkeypatch.setattr(conductor, "FOLLOW_S", 0.005)
    looks = count_looks(old, monkeypatch, error=RuntimeError("odd"))
    until(lambda: len(looks) > 20)
    told = [line for line in caplog.records if line.name == "serve.conductor"]

    assert [line.getMessage() for line in told] == ["cannot see what others write: odd"]
    assert told[0].exc_info  # its frames


def count_looks(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, *, error: Exception | None = None
) -> list[int]:
    """The numbers of the records that the conductor looks for; each look may raise an error."""
    looks: list[int] = []
    get_record = fleet.log.get_record

    def noted(number: int, **options: bool) -> Record | None:
        looks.append(number)
        if error is not None:
            raise error
        return get_record(number, **options)

    monkeypatch.setattr(fleet.log, "get_record", noted)
    return looks
