"""The whole log, where bundles came from, and what changed, over HTTP and by commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export.bundle import digest_of
from serve.client import Client, ClientError
from serve.http import audit
from serve.messages import Change
from serve.record import ORIGIN, LogView, Record, fold
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas and a history: two pushes, a setting, a rollback, a retirement."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1), message="first")
        fleet.must_push(heads(2), message="more [b]pictures[/b]")
        fleet.set_task("colours", weight=2)
        fleet.roll_back("colours", key="back")
        fleet.must_push(heads(3, "shapes"))
        end = Change("shapes", "end", retires=True)
        fleet.ask(lambda conductor: conductor.change(end)).result(10)
        yield fleet


def lines(http: HttpClient, path: str = "/log") -> list[bytes]:
    """What the log's stream says."""
    response = http.get(path)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert not response.content or response.content.endswith(b"\n")
    return response.content.splitlines()


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_the_log_is_told_as_it_is_stored(
    fleet: LocalFleet, http: HttpClient, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Each line names the sha256 of the one before it, and all together fold to what is live."""
    monkeypatch.setattr(audit, "RECORDS_AT_ONCE", at_once)
    told = lines(http)
    records = [Record.model_validate_json(line) for line in told]

    assert [record.previous for record in records] == [ORIGIN, *map(digest_of, told[:-1])]
    assert fold(LogView(), records) == fleet.view()


def test_the_log_is_told_from_where_one_left_off(http: HttpClient) -> None:
    """After its end there is nothing."""
    every = lines(http)

    assert lines(http, "/log?after=3") == every[3:]
    assert lines(http, f"/log?after={len(every)}") == []
    assert "after is 'one'" in problem(http.get("/log?after=one"), 400)
    assert "Parameter 'from' is unknown" in problem(http.get("/log?from=1"), 400)


def test_a_log_that_cannot_be_read_is_an_error_and_no_empty_answer(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """503, before anything was said."""
    fleet.break_store()
    response = http.get("/log")
    fleet.mend_store()

    assert response.status_code == 503


def test_a_live_answer_leads_back_to_data_and_command(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """By the digest that it names, whole or shortened; every version that had it is listed."""
    digest = http.post("/predict/colours", content=png_of(0)).headers["x-headstock-bundle"]
    told = http.get(f"/bundles/{digest}").json()
    short = http.get(f"/bundles/{digest.removeprefix('sha256:')[:12]}").json()
    manifest = heads(1).manifest.model_dump(mode="json")

    assert digest == heads(1).digest
    assert short == told
    assert told["manifest"] == manifest
    assert (manifest["data"]["sha256"], manifest["provenance"]["command"]) == ("0" * 64, "test")
    assert [(u["task"], u["version"], u["action"], u["is_live"]) for u in told["used"]] == [
        ("colours", 1, "push", False),
        ("colours", 3, "rollback", True),
    ]
    numbers = [version.number for version in fleet.view().tasks["colours"]]
    assert [u["record"] for u in told["used"]] == [numbers[0], numbers[2]]


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        (f"/bundles/sha256:{'a' * 64}", 404, "was ever live here"),
        ("/bundles/sha256:", 400, "too short; expected 8 digits or more"),
        ("/bundles/abc", 400, "too short"),
        ("/tasks/colours/diff", 400, "a is missing; expected a version, as in ?a=1&b=2"),
        ("/tasks/colours/diff?a=1&b=x", 400, "b is 'x'; expected a whole number"),
        ("/tasks/colours/diff?a=1&b=9", 404, "has no version 9; it has 1 to 3"),
        ("/tasks/colours/diff?a=1&b=2&c=3", 400, "Parameter 'c' is unknown"),
        ("/tasks/shapes/diff?a=1&b=2", 404, "Version 2 of task shapes retired it"),
        ("/tasks/color/diff?a=1&b=2", 404, "There is no task 'color'"),
    ],
)
def test_what_is_not_there_is_said(http: HttpClient, path: str, status: int, reason: str) -> None:
    """With what was expected."""
    assert reason in problem(http.get(path), status)


def test_blobs_that_are_no_bundles_are_not_shown(fleet: LocalFleet, http: HttpClient) -> None:
    """Neither a file of one, nor one that was stored and never live."""
    digest = fleet.log.put_blob(b"something else")

    problem(http.get(f"/bundles/{digest}"), 404)


def test_a_diff_names_both_versions_and_what_changed(http: HttpClient, heads: Heads) -> None:
    """Who and when and why are the log's, the rest the bundles'."""
    told = http.get("/tasks/colours/diff?a=1&b=2").json()
    same = http.get("/tasks/colours/diff?a=1&b=3").json()

    assert (told["task"], told["a"]["version"], told["b"]["version"]) == ("colours", 1, 2)
    assert (told["a"]["bundle"], told["b"]["bundle"]) == (heads(1).digest, heads(2).digest)
    assert told["a"]["message"] == "first"
    assert told["a"]["data"]["sha256"] == "0" * 64
    assert told["weights"]["distance"] > 0
    assert same["weights"]["distance"] == 0
    assert same["b"]["action"] == "rollback"
    assert same["golden"]["agreement"] == 1


def test_a_diff_with_a_rollout_is_with_what_it_tries(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """The live side of it is the version before."""
    fleet.must_push(heads(5), share=0.25)
    told = http.get("/tasks/colours/diff?a=3&b=4").json()
    used = http.get(f"/bundles/{heads(5).digest}").json()["used"]

    assert (told["a"]["bundle"], told["b"]["bundle"]) == (heads(1).digest, heads(5).digest)
    assert [(u["version"], u["action"]) for u in used] == [(4, "canary")]


def test_the_client_tells_the_same(connect: Callable[..., Client], http: HttpClient) -> None:
    """Records as they come; errors as everywhere."""
    client = connect()

    assert list(client.log(after=2)) == [json.loads(line) for line in lines(http)[2:]]
    assert client.diff("colours", 1, 2) == http.get("/tasks/colours/diff?a=1&b=2").json()
    with pytest.raises(ClientError, match="after is '-1'"):
        list(client.log(after=-1))


def test_commands_show_log_diff_and_origin(
    fleet: LocalFleet, http: HttpClient, run: Run, heads: Heads
) -> None:
    """Tables for people, one value or one record a line for machines."""
    log, as_lines = run("history"), run("history", "--json")
    diff = run("diff", "colours", "1", "2")
    diff_json = run("diff", "colours", "1", "2", "--json")
    shown = run("show", heads(1).digest[7:19])
    unknown = run("show", "a" * 12)

    assert [done.code for done in (log, as_lines, diff, diff_json, shown)] == [0] * 5
    for what in ("writes from here on", "trunk", "push colours 1", "settings of colours",
                 "rollback colours 3", "retire shapes 2", "more [b]pictures[/b]"):  # fmt: skip
        assert what in log.out
    assert as_lines.out.encode().splitlines() == lines(http)
    assert "weights: moved by" in diff.out
    assert "golden pictures:" in diff.out
    assert "version 1" in diff.out
    assert json.loads(diff_json.out)["task"] == "colours"
    for what in (heads(1).digest, "0" * 64, "colours version 1 (push", "live now"):
        assert what in shown.out
    assert unknown.code == 1
    assert "was ever live here" in unknown.err
    assert fleet.view().number == len(lines(http))


def test_a_retired_task_is_in_the_status(run: Run) -> None:
    """With its last version and no bundle."""
    told: dict[str, Any] = json.loads(run("status", "--json").out)
    shapes = next(task for task in told["tasks"] if task["task"] == "shapes")

    assert (shapes["version"], shapes["action"], shapes["bundle"]) == (2, "retire", None)
    assert "retire" in run("status").out
