"""Rollouts through a fleet: two sides of a version, widened, promoted, undone, by hand or rule."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from export.bundle import CARD, Bundle
from serve.headlog import HeadLog
from serve.jobs import Job
from serve.messages import Outcome, Refused, Swapped
from serve.replica import Replica
from serve.rollout import Trial
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Crowd, Heads, judge, some_picture


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas with version 1 of colours live: seed 1."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        yield fleet


def made(outcome: Outcome) -> int:
    """The version that a change made."""
    assert isinstance(outcome, Swapped), outcome
    assert outcome.change is not None
    return outcome.change.version


def refusal(outcome: Outcome) -> str:
    assert isinstance(outcome, Refused), outcome
    return f"{outcome.kind}: {outcome.reason}"


def bundles(fleet: LocalFleet, *, callers: int = 40) -> list[set[str]]:
    """For each replica the bundles that answer some callers."""
    found = []
    for replica in fleet.replicas.values():
        jobs = [Job([some_picture(0)], ("colours",), caller=str(n)) for n in range(callers)]
        answers = [replica.batcher.submit(job) for job in jobs]
        found.append({answer.result(5)[0][0].live.bundle for answer in answers})
    return found


def seen(replica: Replica) -> Trial:
    """What one replica counted of the rollout of colours."""
    return replica.batcher.comparisons.trials.get("colours", (0, Trial()))[1]


def test_a_rollout_from_shadow_to_live_drops_nothing(fleet: LocalFleet, heads: Heads) -> None:
    """Under traffic each step is a version of its own, with the bundles that the log says."""
    old, new = heads(1).digest, heads(2).digest
    with Crowd(fleet, (("colours",),)) as crowd:
        assert made(fleet.push(heads(2), key="a", share=0.0)) == 2
        assert bundles(fleet) == [{old}, {old}]
        crowd.wait_for(20)
        assert made(fleet.promote("colours", key="b", share=0.5)) == 3
        assert bundles(fleet) == [{old, new}, {old, new}]
        crowd.wait_for(20)
        assert made(fleet.promote("colours", key="c")) == 4
        assert bundles(fleet) == [{new}, {new}]
        crowd.wait_for(20)

    assert judge(crowd.seen, fleet.view(), heads.seeds) == []
    actions = [version.change.action for version in fleet.view().tasks["colours"]]
    assert actions == ["push", "shadow", "canary", "promote"]


def test_a_caller_gets_the_same_side_from_every_replica(fleet: LocalFleet, heads: Heads) -> None:
    """Whoever it asks."""
    fleet.must_push(heads(2), share=0.5)
    sides = [
        [
            replica.batcher.submit(Job([some_picture(n)], ("colours",), caller=str(n)))
            .result(5)[0][0]
            .live.bundle
            for n in range(30)
        ]
        for replica in fleet.replicas.values()
    ]

    assert sides[0] == sides[1]
    assert len(set(sides[0])) == 2


def test_the_way_back_reads_no_bundle(
    fleet: LocalFleet, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a canary, from a promotion, from a push: what was live before is still loaded."""
    fleet.must_push(heads(2), key="canary", share=0.3)

    def no_blob(log: HeadLog, digest: str) -> bytes:
        raise AssertionError(f"{log.url} was asked for {digest}")

    with monkeypatch.context() as blocked:
        blocked.setattr(HeadLog, "get_blob", no_blob)
        assert made(fleet.promote("colours", key="up")) == 3
        assert made(fleet.roll_back("colours", key="down")) == 4
        assert made(fleet.roll_back("colours", key="up again", to=3)) == 5
    fleet.must_push(heads(3), key="other")
    monkeypatch.setattr(HeadLog, "get_blob", no_blob)
    assert made(fleet.roll_back("colours", key="back")) == 7

    history = fleet.view().tasks["colours"]
    assert [v.change.rolled_back_to for v in history] == [None, None, None, 1, 3, None, 5]
    assert bundles(fleet) == [{heads(2).digest}] * 2


def test_a_rollback_during_a_rollout_ends_it(fleet: LocalFleet, heads: Heads) -> None:
    """All callers get what was live alone before, whatever steps the rollout took."""
    fleet.must_push(heads(2), key="a", share=0.0)
    fleet.promote("colours", key="b", share=0.5)

    assert made(fleet.roll_back("colours", key="c")) == 4
    live = fleet.view().tasks["colours"][-1].change
    assert (live.action, live.rolled_back_to, live.candidate) == ("rollback", 1, None)
    assert bundles(fleet) == [{heads(1).digest}] * 2


def test_a_replica_that_joins_during_a_rollout_has_both_sides(
    fleet: LocalFleet, heads: Heads
) -> None:
    """And gives a caller the side that the others give it."""
    fleet.must_push(heads(2), share=0.5)
    fleet.wait_admitted(fleet.start_replica())

    assert bundles(fleet) == [{heads(1).digest, heads(2).digest}] * 3


def test_what_makes_no_sense_is_refused(fleet: LocalFleet, heads: Heads) -> None:
    """With what to do instead; nothing is written."""
    number = fleet.view().number
    first = refusal(fleet.push(heads(5, task="shapes"), share=0.1))
    same = refusal(fleet.push(heads(1), key="same", share=0.1))
    none = refusal(fleet.promote("colours", key="none"))
    assert fleet.view().number == number
    fleet.must_push(heads(2), key="canary", share=0.1)
    second = refusal(fleet.push(heads(3), key="second", share=0.1))
    at_once = refusal(fleet.push(heads(3), key="at once"))

    assert first == (
        "conflict: Task shapes has no live version to compare with; push the first at once."
    )
    assert same == f"conflict: Bundle {heads(1).digest} is what is live of task colours."
    assert none == "conflict: Task colours has no candidate to promote."
    assert second == at_once
    assert at_once == (
        "conflict: A rollout is under way in version 2 of task colours; promote it or roll it back "
        "first."
    )


def test_one_key_makes_one_step(fleet: LocalFleet, heads: Heads) -> None:
    """Asked again, the same step answers; another step with that key is a conflict."""
    for _ in range(2):
        assert made(fleet.push(heads(2), key="canary", share=0.25)) == 2
    assert "already made version 2" in refusal(fleet.push(heads(2), key="canary", share=0.5))
    assert "already made version 2" in refusal(fleet.push(heads(2), key="canary"))
    for _ in range(2):
        assert made(fleet.promote("colours", key="promote")) == 3
    assert "already made version 3" in refusal(fleet.roll_back("colours", key="promote"))


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server's address, and what was posted to it; its first answer is an error."""
    events: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            events.append(json.loads(body))
            self.send_response(500 if len(events) == 1 else 200)
            self.end_headers()

        @override
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", events
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_worse_candidate_is_rolled_back_by_rule_and_announced(
    tmp_path: Path,
    trunk_folder: Path,
    heads: Heads,
    webhook: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seed 4 gives all noise another label than seed 1; both replicas' counts decide together."""
    monkeypatch.setattr("serve.announce.RETRY_S", 0.01)
    url, events = webhook
    with LocalFleet(tmp_path, trunk_folder, replicas=2, webhook_url=url) as fleet:
        fleet.must_push(heads(1))
        fleet.set_task("colours", min_compared=20, max_disagreement=0.05)
        with Crowd(fleet, (("colours",),)) as crowd:
            fleet.must_push(heads(4), key="canary", share=0.2)
            until(lambda: len(fleet.view().tasks["colours"]) == 3, limit_s=30)
            until(lambda: fleet.live_versions("colours") == {3})
            crowd.wait_for(10)
        until(lambda: len(events) == 2)
        view = fleet.view()
        assert fleet.rollouts is not None
        decided = fleet.rollouts.metrics()
        text = fleet.ask(lambda conductor: conductor.metrics(decided)).result(5)

    undone = view.tasks["colours"][-1]
    assert judge(crowd.seen, view, heads.seeds) == []
    assert (undone.change.action, undone.change.rolled_back_to) == ("rollback", 1)
    assert undone.message.startswith("by rule: ")
    assert undone.message.endswith("got another label; at most 5.00% may")
    assert undone.idempotency_key == "rollout-colours-2"
    assert events[0] == events[1]
    assert events[1]["event"] == "rollback"
    assert (events[1]["task"], events[1]["version"]) == ("colours", 3)
    assert events[1]["reason"] == undone.message
    assert b'headstock_rollout_decisions_total{action="rollback"} 1.0' in text


def test_a_good_candidate_goes_live_by_rule_where_the_task_says_so(
    fleet: LocalFleet, heads: Heads
) -> None:
    """The same weights in another bundle: promoted once there is evidence for every rule."""
    original = heads(1)
    twin = Bundle.pack(
        {**original.files, CARD: b"# twin\n"},
        **original.manifest.model_dump(exclude={"files", "schema_version"}),
    )
    heads.seeds[twin.digest] = 1
    fleet.set_task("colours", min_compared=20, max_failures=0.2, promote_good=True)
    with Crowd(fleet, (("colours",),)) as crowd:
        fleet.must_push(twin, key="shadow", share=0.0)
        until(lambda: len(fleet.view().tasks["colours"]) == 3, limit_s=30)
        crowd.wait_for(10)

    live = fleet.view().tasks["colours"][-1]
    assert judge(crowd.seen, fleet.view(), heads.seeds) == []
    assert (live.change.action, live.change.bundle) == ("promote", twin.digest)


def test_a_restarted_conductor_goes_on_with_what_replicas_saw(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Replicas report all that they saw since they started, so nothing is lost with it."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2), key="shadow", share=0.0)
        replica = fleet.replicas["replica-1"]
        for n in range(5):
            replica.batcher.submit(Job([some_picture(n)], ("colours",))).result(5)
            until(lambda due=n: seen(replica).compared > due)
        fleet.start_conductor()
        live = fleet.view().tasks["colours"][-1].change
        until(lambda: fleet.rollouts is not None and fleet.rollouts.trial(live).compared == 5)


def test_counts_of_an_earlier_rollout_are_not_those_of_this_one(
    fleet: LocalFleet, heads: Heads
) -> None:
    """A replica that saw nothing of this one yet still reports the last that it saw."""
    fleet.must_push(heads(2), key="shadow", share=0.0)
    watch, live = fleet.rollouts, fleet.view().tasks["colours"][-1].change
    assert watch is not None
    watch.take("one", {"colours": (1, Trial(compared=5))})
    watch.take("two", {"colours": (2, Trial(compared=7, disagreed=1))})

    assert watch.trial(live) == Trial(compared=7, disagreed=1)


def test_the_rollout_is_shown_over_http(fleet: LocalFleet, heads: Heads) -> None:
    """Pushed with a share, seen with its counts, widened and promoted; headers decide the side."""
    client = HttpClient(fleet, "replica-1")
    pushed = client.post("/tasks/colours/versions?canary=0.5", content=heads(2).to_zip())
    shown = client.get("/tasks/colours").json()
    wider = client.post("/tasks/colours/promote", json={"share": 0.9, "expected": 2})
    live = client.post("/tasks/colours/promote", json={})

    assert pushed.json()["version"] == 2
    rollout = shown["rollout"]
    assert (rollout["mode"], rollout["share"], rollout["verdict"]) == ("canary", 0.5, "undecided")
    assert rollout["bundle"] == heads(2).digest
    assert rollout["reason"] == "0 of at least 100 pictures compared"
    assert (wider.json()["version"], live.json()["version"]) == (3, 4)
    assert "rollout" not in client.get("/tasks/colours").json()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("canary=1", "The share is 1.0; expected one above 0 and below 1."),
        ("canary=0", "The share is 0.0; expected one above 0 and below 1."),
        ("canary=nan", "The share is nan; expected one above 0 and below 1."),
        ("canary=ten", "The share is 'ten'; expected one above 0 and below 1."),
        ("canary=0.1&shadow=true", "A push is either a canary or a shadow; name one of the two."),
    ],
)
def test_a_share_that_is_none_is_refused(
    fleet: LocalFleet, heads: Heads, query: str, reason: str
) -> None:
    """400, and nothing is pushed."""
    answer = HttpClient(fleet, "replica-1").post(
        f"/tasks/colours/versions?{query}", content=heads(2).to_zip()
    )

    assert (answer.status_code, answer.json()["detail"]) == (400, reason)
    assert len(fleet.view().tasks["colours"]) == 1
