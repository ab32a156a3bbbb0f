"""The judge of the swap tests can condemn: each protection that is taken away is missed.

Every scenario here is judged twice: with the product as it is, and with one part of it broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.batcher import Batcher
from serve.headlog import HeadLog
from serve.messages import Directive
from serve.protocol import Phase
from serve.record import Record
from serve.watcher import Watcher
from tests.serve.harness import LocalFleet, until
from tests.serve.oracle import Crowd, Heads, Pushed, Seen, judge

Scenario = Callable[[LocalFleet, Heads], list[str]]


def slow_rows(fleet: LocalFleet, heads: Heads) -> list[str]:
    """One replica's batches take long, so some are in flight whenever a swap comes."""
    engine = fleet.replicas["replica-1"].engine
    features = engine.features

    def slowly(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        time.sleep(0.12)
        return features(pictures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "features", slowly)
        return swap_under_load(fleet, heads, num_pushes=2, is_sticky=True)


def late_flip(fleet: LocalFleet, heads: Heads) -> list[str]:
    """One replica hears of the commit later than the other."""

    def dawdle(directive: Directive) -> None:
        if directive.phase is Phase.FLIP:
            time.sleep(0.1)

    fleet.links["replica-1"].on_directive = dawdle
    return swap_under_load(fleet, heads, num_pushes=2)


def late_commit(fleet: LocalFleet, heads: Heads) -> list[str]:
    """The commit is put when one replica's hold has run out already and the other's has not."""
    hold_s = fleet.settings.swap_hold_s
    fleet.replicas["replica-2"].watcher._hold_s = 10 * hold_s
    delays = [2 * hold_s]

    def dawdle(record: Record) -> None:
        if record.kind == "commit" and delays:
            time.sleep(delays.pop())

    fleet.log.before_put = dawdle
    with Crowd(fleet, (("colours",),)) as crowd:
        push = fleet.start_push(heads(2))
        until(lambda: 2 in fleet.live_versions("colours"))
        crowd.wait_for(40)
        push.cancel()
    return judge(crowd.seen, fleet.view(), heads.seeds)


def lost_line(fleet: LocalFleet, heads: Heads) -> list[str]:
    """One replica is cut off before the commit, until its hold has run out."""
    link = fleet.links["replica-1"]

    def cut(record: Record) -> None:
        if record.kind == "commit":
            link.is_cut = True

    fleet.log.before_put = cut
    with Crowd(fleet, (("colours",),)) as crowd:
        push = fleet.start_push(heads(2))
        until(lambda: link.is_cut)
        crowd.wait_for(60)
        time.sleep(2 * fleet.settings.swap_hold_s)
        crowd.wait_for(20)
        link.is_cut = False
        push.cancel()
    return judge(crowd.seen, fleet.view(), heads.seeds)


def swap_under_load(
    fleet: LocalFleet, heads: Heads, *, num_pushes: int, is_sticky: bool = False
) -> list[str]:
    """Push some heads; what the judge says of the answers."""
    pushed: list[Pushed] = []
    with Crowd(fleet, (("colours",),), is_sticky=is_sticky) as crowd:
        crowd.wait_for(10)
        for seed in range(2, 2 + num_pushes):
            asked_s = time.monotonic()
            version = fleet.must_push(heads(seed))
            pushed.append(Pushed("colours", version, asked_s, time.monotonic()))
            crowd.wait_for(20)
    return judge(crowd.seen, fleet.view(), heads.seeds, pushed)


def overwrite(log: HeadLog, record: Record, **_: float) -> Record:
    """A store that does not know "only if absent"."""
    path = Path(log.url) / "log" / f"{record.number:020d}.json"
    path.write_bytes(record.to_bytes())
    return record


def just_release(watcher: Watcher) -> None:
    """A hold that runs out and asks nobody."""
    watcher._release(watcher._state.hold)


def drained_at_once(_: Batcher, __: float) -> bool:
    """A drain that waits for nothing."""
    return True


def hold_nothing(_: Batcher, __: frozenset[str]) -> None:
    """A hold that holds nothing."""


@pytest.mark.parametrize(
    ("scenario", "owner", "name", "mutant"),
    [
        (slow_rows, Batcher, "wait_drained", drained_at_once),
        (late_flip, Batcher, "hold", hold_nothing),
        (late_commit, HeadLog, "put_record", overwrite),
        (lost_line, Watcher, "_settle", just_release),
    ],
    ids=["no drain", "no hold", "no put-if-absent", "no question when a hold runs out"],
)
@pytest.mark.parametrize("is_broken", [False, True])
def test_the_oracle_catches_a_missing_protection(
    tmp_path: Path,
    trunk_folder: Path,
    heads: Heads,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Scenario,
    owner: type,
    name: str,
    mutant: Callable[..., object],
    *,
    is_broken: bool,
) -> None:
    """The same events are fine as the product is, and condemned without the protection."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, hold_s=0.3) as fleet:
        fleet.must_push(heads(1))
        if is_broken:
            monkeypatch.setattr(owner, name, mutant)
        problems = scenario(fleet, heads)

    assert any(problem.startswith("order") for problem in problems) == is_broken, problems[:5]
    assert bool(problems) == is_broken, problems[:5]


def wrong_scores(seen: list[Seen]) -> list[Seen]:
    """One answer has the scores of another picture."""
    first, other = seen[0], seen[1]
    answers = tuple(
        replace(mine, scores=theirs.scores)
        for mine, theirs in zip(first.answers, other.answers, strict=True)
    )
    return [replace(first, answers=answers), *seen[1:]]


def mixed_moments(seen: list[Seen]) -> list[Seen]:
    """One request is answered for one task before both pushes and for the other after them."""
    first, last = seen[0], seen[-1]
    return [*seen[:-1], replace(first, answers=(first.answers[0], last.answers[1]))]


def read_before_it_was_pushed(seen: list[Seen]) -> list[Seen]:
    """The last answer was given before anything was pushed."""
    return [*seen[:-1], replace(seen[-1], given_s=0.0)]


def old_after_the_push(seen: list[Seen]) -> list[Seen]:
    """The first answer belongs to a request that was sent after everything."""
    late_s = time.monotonic()
    return [replace(seen[0], sent_s=late_s, given_s=late_s), *seen[1:]]


def unknown_version(seen: list[Seen]) -> list[Seen]:
    """An answer names a version that no record made."""
    answers = tuple(replace(a, live=replace(a.live, version=9)) for a in seen[-1].answers)
    return [*seen[:-1], replace(seen[-1], answers=answers)]


def failed_request(seen: list[Seen]) -> list[Seen]:
    """A client got no answer."""
    return [replace(seen[0], answers=(), error="503"), *seen[1:]]


def test_the_oracle_catches_answers_that_were_tampered_with(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Every kind of broken promise has its own complaint; the answers as they were have none."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(1, "shapes"))
        with Crowd(fleet, (("colours", "shapes"),), clients=1) as crowd:
            crowd.wait_for(3)
            asked_s = time.monotonic()
            fleet.must_push(heads(2))
            fleet.must_push(heads(2, "shapes"))
            pushed = [Pushed("colours", 2, asked_s, time.monotonic())]
            crowd.wait_for(3)
        log = fleet.view()

    def complaints(answers: list[Seen]) -> set[str]:
        problems = judge(answers, log, heads.seeds, pushed)
        return {problem.partition(":")[0] for problem in problems}

    assert complaints(crowd.seen) == set()
    assert complaints(wrong_scores(crowd.seen)) == {"scores"}
    assert "mixed" in complaints(mixed_moments(crowd.seen))
    assert "push" in complaints(read_before_it_was_pushed(crowd.seen))
    assert {"order", "push"} <= complaints(old_after_the_push(crowd.seen))
    assert "log" in complaints(unknown_version(crowd.seen))
    assert complaints(failed_request(crowd.seen)) == {"failed"}
