"""Retiring a task is a swap like any other: atomic, in the log, and undone at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.jobs import Job, RetiredTaskError
from serve.messages import Change, Outcome, Swapped
from serve.record import Record
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet, LocalLink
from tests.serve.oracle import Crowd, Heads, judge, some_picture
from tests.serve.test_http import png_of, problem

PREDICT = "/predict/colours"


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas and two tasks."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield fleet


def retire(fleet: LocalFleet, *, key: str = "retire") -> Outcome:
    """Retire the colours."""
    change = Change("colours", key, retires=True)
    return fleet.ask(lambda conductor: conductor.change(change)).result(30)


def live_tasks(fleet: LocalFleet) -> list[set[str]]:
    """The tasks that each living replica answers."""
    return [set(fleet.replicas[name].batcher.snapshot.heads) for name in sorted(fleet.living())]


def test_a_retired_task_answers_nowhere_from_one_moment_on(fleet: LocalFleet, heads: Heads) -> None:
    """Before it every request is answered, after it none; the other task never notices."""
    with Crowd(fleet, (("colours",), ("shapes",))) as crowd:
        crowd.wait_for(20)
        outcome = retire(fleet)
        crowd.wait_for(20)
        log = fleet.view()
    refused = [s for s in crowd.seen if s.error]
    answered = [s for s in crowd.seen if not s.error]

    assert isinstance(outcome, Swapped)
    assert outcome.replicas == 2
    assert live_tasks(fleet) == [{"shapes"}, {"shapes"}]
    assert {s.tasks for s in refused} == {("colours",)}
    assert all("was retired by its version 2" in s.error for s in refused)
    last_s = max(s.given_s for s in answered if s.tasks == ("colours",))
    assert last_s <= min(s.given_s for s in refused)
    assert judge(answered, log, heads.seeds) == []


def test_what_waits_while_a_task_is_retired_is_told_so(fleet: LocalFleet) -> None:
    """It queues during the hold, and hears of the retirement after it."""
    waiting: list[Job] = []

    def ask(record: Record) -> None:
        if record.kind == "commit":
            job = Job([some_picture(0)], ("colours",))
            fleet.replicas["replica-1"].batcher.submit(job)
            waiting.append(job)

    fleet.log.before_put = ask
    retire(fleet)

    with pytest.raises(RetiredTaskError, match="retired by its version 2, on 20"):
        waiting[0].done.result(5)


def test_a_retirement_outlives_restarts(fleet: LocalFleet) -> None:
    """A replica that starts later loads nothing of the task, and says the same."""
    retire(fleet)
    late = fleet.start_replica()
    fleet.wait_admitted(late)

    detail = problem(HttpClient(fleet, late).post(PREDICT, content=png_of(0)), 404)
    assert "was retired by its version 2" in detail
    assert live_tasks(fleet) == [{"shapes"}] * 3


def test_a_replica_that_joins_late_catches_up_with_a_retirement(fleet: LocalFleet) -> None:
    """It loaded the task when it was live, and takes it away before it answers anything."""
    link = LocalLink(fleet)
    link.is_cut = True
    late = fleet.start_replica(link)
    before = set(fleet.replicas[late].batcher.snapshot.heads)
    retire(fleet)
    link.is_cut = False
    fleet.wait_admitted(late)

    assert before == {"colours", "shapes"}
    assert live_tasks(fleet) == [{"shapes"}] * 3


def test_a_push_and_a_rollback_bring_a_task_back(fleet: LocalFleet, heads: Heads) -> None:
    """As its next versions, answered by every replica."""
    retire(fleet)
    back = fleet.roll_back("colours", key="back")
    bundle = fleet.view().tasks["colours"][-1].change.bundle
    retire(fleet, key="again")
    pushed = fleet.must_push(heads(3))

    assert isinstance(back, Swapped)
    assert bundle == heads(1).digest
    assert pushed == 5
    assert fleet.live_versions("colours") == {5}
    versions = [v.change.action for v in fleet.view().tasks["colours"]]
    assert versions == ["push", "retire", "rollback", "retire", "push"]


def test_a_task_is_retired_over_http(fleet: LocalFleet, http: HttpClient) -> None:
    """The answer is a swap's; what is read of the task says it, and its card is gone."""
    answer = http.request("DELETE", "/tasks/colours?message=over&expected=1")
    other = HttpClient(fleet, "replica-2")
    described = other.get("/tasks/colours").json()
    all_of_them = other.post("/predict?tasks=*", content=png_of(0)).json()["results"]

    assert answer.status_code == 200
    assert {**answer.json(), "swap": None} == {
        "task": "colours", "version": 2, "bundle": None, "repeated": False, "swap": None,
    }  # fmt: skip
    assert (described["action"], described["bundle"], described["message"]) == (
        "retire", None, "over",
    )  # fmt: skip
    assert [result["task"] for result in all_of_them] == ["shapes"]
    assert "was retired by its version 2" in problem(other.get("/tasks/colours/card"), 404)
    series = http.get("/metrics").text
    assert 'headstock_live_version{task="shapes"}' in series
    assert 'headstock_live_version{task="colours"}' not in series


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/tasks/colours?expected=2", 409, "at version 1; expected version 2"),
        ("/tasks/colours?expected=0", 400, "expected is 0; expected at least 1"),
        ("/tasks/colours?expected=one", 400, "expected is 'one'; expected a whole number"),
        ("/tasks/colours?why=so", 400, "Parameter 'why' is unknown"),
        ("/tasks/textures", 404, "never pushed"),
    ],
)
def test_a_retirement_that_cannot_be_says_why(
    fleet: LocalFleet, http: HttpClient, path: str, status: int, reason: str
) -> None:
    """And retires nothing."""
    assert reason in problem(http.request("DELETE", path), status)
    assert live_tasks(fleet) == [{"colours", "shapes"}] * 2


def test_a_command_retires_and_others_show_it(run: Run) -> None:
    """Status and history have a row without a bundle; a second time is an error."""
    done = run("retire", "colours", "--message", "over")
    again = run("retire", "colours")
    status, history = run("status"), run("history", "colours")

    assert done.code == 0
    assert "colours version 2 is retired on 2 replicas" in done.out
    assert (again.code, again.out) == (1, "")
    assert again.err == "headstock: Task colours is retired already, since version 2.\n"
    assert "retire" in status.out
    assert "over" in history.out


def test_no_answer_is_given_while_a_retirement_is_decided(fleet: LocalFleet) -> None:
    """Atomic: between the hold and the flip no replica starts a row of the task."""
    started: list[bool] = []

    def look(record: Record) -> None:
        if record.kind == "commit":
            jobs = [Job([some_picture(0)], ("colours",)) for _ in fleet.replicas]
            for job, replica in zip(jobs, fleet.replicas.values(), strict=True):
                replica.batcher.submit(job)
            threading.Event().wait(0.05)
            started.extend(job.done.done() for job in jobs)

    fleet.log.before_put = look
    retire(fleet)

    assert started == [False, False]
