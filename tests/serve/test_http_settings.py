"""Settings of a task over HTTP, from Python and by commands, on two replicas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.client import Client, ClientError
from serve.task_settings import DEFAULTS, TaskSettings
from tests.serve.commands import Done, Run
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem

PATH = "/tasks/colours"
PLAIN = TaskSettings().model_dump()


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas and one task."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        yield fleet


def live_settings(fleet: LocalFleet) -> set[TaskSettings]:
    """What the replicas go by."""
    replicas = fleet.replicas.values()
    return {replica.batcher.snapshot.settings_of("colours") for replica in replicas}


def test_settings_are_changed_by_name_and_the_answer_describes_the_task(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """Every replica says and does the same when the answer comes; the version is as it was."""
    first = http.request("PATCH", PATH, json={"weight": 2, "deadline_s": 0.5})
    second = http.request("PATCH", PATH, json={"pinned": True, "deadline_s": None})
    described = HttpClient(fleet, "replica-2").get(PATH).json()

    assert first.json()["settings"] == {**PLAIN, "weight": 2.0, "deadline_s": 0.5}
    assert second.json() == described
    assert described["settings"] == {**PLAIN, "weight": 2.0, "pinned": True}
    assert (described["version"], described["action"]) == (1, "push")
    assert live_settings(fleet) == {TaskSettings(weight=2, pinned=True)}


def test_a_deadline_that_is_set_counts_for_the_next_request_on_every_replica(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """Nothing answers in time here, so each says how long it was allowed to wait."""
    http.request("PATCH", PATH, json={"deadline_s": 0.0625})
    for name, replica in fleet.replicas.items():
        replica.batcher.hold(frozenset({"colours"}))
        late = HttpClient(fleet, name).post("/predict/colours", content=png_of(0))

        assert "0.0625 s" in problem(late, 503)


def test_a_task_for_which_nothing_was_set_shows_the_defaults(http: HttpClient) -> None:
    """Alone and in the list."""
    assert http.get(PATH).json()["settings"] == PLAIN
    assert [task["settings"] for task in http.get("/tasks").json()["tasks"]] == [PLAIN]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"weight": -1}', "weight is -1: Input should be greater than or equal to 0.001."),
        ('{"weight": NaN}', "weight is nan: Input should be a finite number."),
        ('{"pinned": "maybe"}', "pinned is 'maybe': Input should be a valid boolean."),
        ('{"colour": 0.1}', "colour is 0.1: there is no such setting; expected weight,"),
        ('{"weight": 2, "pinned": 3}', "pinned is 3"),
        ("{}", "No setting is named; expected one or more of weight, pinned, deadline_s, "),
        ("", "No setting is named"),
        ("[1]", "JSON list; expected an object"),
        ("weight=2", "not JSON"),
    ],
)
def test_what_cannot_be_set_says_why_and_sets_nothing(
    fleet: LocalFleet, http: HttpClient, body: str, reason: str
) -> None:
    """400; nothing of the request is done, and nothing is written to the log."""
    before = fleet.view()

    assert reason in problem(http.request("PATCH", PATH, content=body), 400)
    assert fleet.view() == before
    assert live_settings(fleet) == {DEFAULTS}


def test_a_parameter_that_is_not_understood_is_refused(http: HttpClient) -> None:
    """Settings belong into the body."""
    response = http.request("PATCH", f"{PATH}?weight=2", json={"pinned": True})

    assert "Parameter 'weight' is unknown" in problem(response, 400)


def test_an_unknown_task_has_no_settings(http: HttpClient) -> None:
    """404 with the closest names."""
    response = http.request("PATCH", "/tasks/color", json={"weight": 2})

    assert "The closest names are: colours" in problem(response, 404)


def test_a_repeated_request_is_one_change_with_the_same_answer(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """Also on another replica, and when settings and version have moved on since."""
    other = HttpClient(fleet, "replica-2")
    keyed: dict[str, Any] = {"json": {"weight": 2}, "headers": {"idempotency-key": "k"}}
    first = http.request("PATCH", PATH, **keyed).json()
    http.request("PATCH", PATH, json={"weight": 3})
    fleet.must_push(heads(2))
    again = other.request("PATCH", PATH, **keyed).json()
    conflict = http.request("PATCH", PATH, json={"weight": 9}, headers={"idempotency-key": "k"})

    assert again == first
    assert live_settings(fleet) == {TaskSettings(weight=3)}
    assert "'k' already changed the settings of task colours" in problem(conflict, 409)


def test_the_history_tells_what_was_set_when_and_why(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """Beside the versions, each with all settings and those that changed."""
    http.request("PATCH", f"{PATH}?message=busy", json={"weight": 2}, headers={"x-request-id": "k"})
    fleet.must_push(heads(2))
    http.request("PATCH", PATH, json={"weight": 1, "pinned": True})
    told = http.get(f"{PATH}/versions").json()
    first, second = told["settings"]

    assert [version["version"] for version in told["versions"]] == [1, 2]
    assert (first["version"], first["action"], first["message"]) == (1, "settings", "busy")
    assert (first["changed"], first["idempotency_key"]) == ({"weight": 2.0}, "k")
    assert first["settings"] == {**PLAIN, "weight": 2.0}
    assert (second["version"], second["changed"]) == (2, {"weight": 1.0, "pinned": True})
    assert first["record"] < told["versions"][1]["record"] < second["record"]
    assert first["written_at"] <= second["written_at"]


def test_the_client_sets_and_tells_the_history(
    fleet: LocalFleet, connect: Callable[..., Client]
) -> None:
    """As the commands do; the key makes two calls one change."""
    client = connect()
    described = client.set_task("colours", {"weight": 2}, key="k", message="busy")
    again = client.set_task("colours", {"weight": 2}, key="k")

    assert described == again
    assert described["settings"]["weight"] == 2
    assert live_settings(fleet) == {TaskSettings(weight=2)}
    assert [(e["action"], e["message"]) for e in client.history("colours")] == [
        ("push", ""),
        ("settings", "busy"),
    ]
    with pytest.raises(ClientError, match="weight is nan"):
        client.set_task("colours", {"weight": float("nan")})


def test_a_command_sets_and_others_show_it(fleet: LocalFleet, run: Run) -> None:
    """Status shows what is not the default, history what changed and why."""
    before = run("status")
    done = run("task", "set", "colours", "weight=2", "pinned=TRUE", "--message", "busy week")
    run("task", "set", "colours", "weight=1", "deadline_s=0.25")
    status, history = run("status"), run("history", "colours")
    last = history.out.splitlines()[-2]

    assert done == Done(0, "colours is set on every replica: weight=2 pinned=true\n", "")
    assert live_settings(fleet) == {TaskSettings(pinned=True, deadline_s=0.25)}
    assert "=" not in before.out
    assert status.out.splitlines()[-1] == "colours: pinned=true deadline_s=0.25"
    assert "set weight=2 pinned=true" in history.out
    assert "busy week" in history.out
    assert "set weight=1 deadline_s=0.25" in last


def test_commands_print_one_json_value(fleet: LocalFleet, run: Run) -> None:
    """The description of the task; in the history each change of settings is an entry."""
    done = run("task", "set", "colours", "pinned=true", "--json")
    run("task", "set", "colours", "pinned=false", "weight=5", "deadline_s=none")
    entries = json.loads(run("history", "colours", "--json").out)

    assert json.loads(done.out)["settings"] == {**PLAIN, "pinned": True}
    assert [(e["version"], e["action"], e.get("changed")) for e in entries] == [
        (1, "push", None),
        (1, "settings", {"pinned": True}),
        (1, "settings", {"weight": 5.0, "pinned": False}),
    ]
    assert live_settings(fleet) == {TaskSettings(weight=5)}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("colours", "weight=-1"), "weight is -1: Input should be greater than or equal to 0.001."),
        (("colours", "weight=nan"), "weight is 'nan': Input should be a valid number."),
        (("colours", "weight=NaN"), "weight is nan: Input should be a finite number."),
        (("colours", "pinned=maybe"), "pinned is 'maybe': Input should be a valid boolean."),
        (("colours", "color=red"), "color is 'red': there is no such setting; expected weight,"),
        (("colours", "key=k"), "key is 'k': there is no such setting"),
        (("colours", "weight"), "'weight' sets nothing; expected key=value, as in weight=2."),
        (("colours", "weight="), "'weight=' sets nothing"),
        (("colours", "weight=1", "weight=2"), "weight is set twice"),
        (("color", "weight=2"), "There is no task 'color'. The closest names are: colours."),
    ],
)
def test_a_command_that_sets_nothing_says_why_in_one_line(
    fleet: LocalFleet, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    """Exit code 1, nothing on the standard output."""
    done = run("task", "set", *arguments)

    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"headstock: {reason}")
    assert done.err.count("\n") == 1
    assert live_settings(fleet) == {DEFAULTS}
