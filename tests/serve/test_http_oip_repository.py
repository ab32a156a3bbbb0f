"""The model repository: its index, and loading and unloading as changes of the head log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Crowd, Heads
from tests.serve.test_http import png_of
from tests.serve.test_http_oip import error, image

INDEX = "/v2/repository/index"
MODEL = "/v2/repository/models/colours"


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas, two versions of one task and one of another."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2))
        fleet.must_push(heads(3, "shapes"))
        yield fleet


@pytest.fixture
def client(fleet: LocalFleet) -> HttpClient:
    """The replica that is asked."""
    return HttpClient(fleet, "replica-1")


@pytest.fixture
def other(fleet: LocalFleet) -> HttpClient:
    """Another replica."""
    return HttpClient(fleet, "replica-2")


def states(client: HttpClient, **body: Any) -> list[tuple[str, str, str]]:
    """The index without its reasons."""
    entries = client.post(INDEX, json=body).json()
    return [(entry["name"], entry["version"], entry["state"]) for entry in entries]


READY = [
    ("colours", "1", "READY"),
    ("colours", "2", "READY"),
    ("colours.pixels", "1", "READY"),
    ("colours.pixels", "2", "READY"),
    ("colours.features", "2", "READY"),
]
SHAPES = [
    ("shapes", "1", "READY"),
    ("shapes.pixels", "1", "READY"),
    ("shapes.features", "1", "READY"),
]


def test_the_index_lists_every_version_that_answers(client: HttpClient) -> None:
    """Of each of a task's three models; with an empty body as standard clients send it."""
    assert states(client) == READY + SHAPES
    empty = client.post(INDEX)
    assert empty.json() == client.post(INDEX, json={}).json()
    assert {entry["reason"] for entry in empty.json()} == {""}


def test_an_unloaded_task_is_listed_with_its_reason(client: HttpClient, other: HttpClient) -> None:
    """On every replica; and not among those that are ready."""
    assert client.post(f"{MODEL}/unload").status_code == 200
    entries = [e for e in other.post(INDEX).json() if e["name"].startswith("colours")]

    assert [(e["name"], e["version"], e["state"]) for e in entries] == [
        ("colours", "3", "UNAVAILABLE"),
        ("colours.pixels", "3", "UNAVAILABLE"),
        ("colours.features", "3", "UNAVAILABLE"),
    ]
    assert all("was retired by its version 3" in e["reason"] for e in entries)
    assert states(other, ready=True) == SHAPES
    assert states(other, ready=False)[3:] == SHAPES


@pytest.mark.parametrize("ready", ["true", 1, None, []])
def test_whether_only_the_ready_are_wanted_is_yes_or_no(client: HttpClient, ready: Any) -> None:
    """Anything else is refused."""
    assert "expected true or false" in error(client.post(INDEX, json={"ready": ready}), 400)


def test_unloading_and_loading_are_records_of_the_log(
    client: HttpClient, other: HttpClient, fleet: LocalFleet, heads: Heads
) -> None:
    """Retired on every replica when the call returns, and what it was before once it is back."""
    assert client.post(f"{MODEL}/unload", json={}).content == b""
    for replica in (client, other):
        assert replica.get("/v2/models/colours/ready").status_code == 404
        assert replica.post("/predict/colours", content=png_of(0)).status_code == 404
    assert other.post(f"{MODEL}/load", json={"parameters": {}}).content == b""
    for replica in (client, other):
        assert replica.get("/v2/models/colours/ready").status_code == 200
        body = replica.post("/predict/colours", content=png_of(0)).json()
        assert (body["version"], body["bundle"]) == (4, heads(2).digest)
    versions = fleet.view().tasks["colours"][2:]

    assert [v.change.action for v in versions] == ["retire", "rollback"]
    assert [v.message for v in versions] == ["unloaded", "loaded"]


def test_what_is_so_already_is_left_as_it_is(client: HttpClient, fleet: LocalFleet) -> None:
    """Loading what answers, and unloading what does not, write nothing."""
    before = fleet.view().number
    assert client.post(f"{MODEL}/load").status_code == 200
    assert fleet.view().number == before
    for _ in range(2):
        unload = client.post(f"{MODEL}/unload", json={"parameters": {"unload_dependents": True}})
        assert unload.status_code == 200

    assert fleet.view().number == before + 1


@pytest.mark.parametrize("header", ["idempotency-key", "x-request-id"])
def test_a_repeated_request_is_one_change(
    client: HttpClient, other: HttpClient, fleet: LocalFleet, header: str
) -> None:
    """A late copy of it gets the same answer and undoes nothing that was done since."""
    before = fleet.view().number
    key = {header: "k"}
    for replica in (client, other):
        assert replica.post(f"{MODEL}/unload", headers=key).status_code == 200
    assert fleet.view().number == before + 1
    client.post(f"{MODEL}/load")
    again = other.post(f"{MODEL}/unload", headers=key)

    assert again.status_code == 200
    assert fleet.view().live("colours") is not None


def test_many_who_unload_at_once_all_succeed(fleet: LocalFleet, client: HttpClient) -> None:
    """One of them makes the change; the others find it made."""
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(client.post(f"{MODEL}/unload").status_code))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert found == [200] * 6
    assert [v.change.action for v in fleet.view().tasks["colours"]] == ["push", "push", "retire"]


def test_another_task_never_notices(fleet: LocalFleet, client: HttpClient) -> None:
    """Its requests go on while one is unloaded and loaded."""
    with Crowd(fleet, (("shapes",),)) as crowd:
        for _ in range(3):
            crowd.wait_for(5)
            assert client.post(f"{MODEL}/unload").status_code == 200
            assert client.post(f"{MODEL}/load").status_code == 200
        crowd.wait_for(5)

    assert [seen.error for seen in crowd.seen if seen.error] == []


@pytest.mark.parametrize("name", ["file:1/model.onnx", "config", "anything"])
def test_nothing_is_written_by_loading(client: HttpClient, fleet: LocalFleet, name: str) -> None:
    """Files and configuration would pass no gate; they are refused, also of an unloaded task."""
    client.post(f"{MODEL}/unload")
    before = fleet.view().number
    response = client.post(f"{MODEL}/load", json={"parameters": {name: "e30="}})

    assert f"{name!r} is not accepted" in error(response, 400)
    assert "push one" in error(response, 400)
    assert fleet.view().number == before


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize(
    ("model", "body", "status", "reason"),
    [
        ("color", {}, 404, "Request for unknown model"),
        ("colours.pixels", {}, 400, "with its task, 'colours'"),
        ("colours.features", {}, 400, "with its task, 'colours'"),
        ("colours", {"parameters": []}, 400, "expected an object"),
        ("colours", {"parameters": {"x": 1}}, 400, "'x'"),
        ("colours", [], 400, "expected an object"),
    ],
)
def test_what_cannot_be_done_is_refused(
    client: HttpClient, action: str, model: str, body: Any, status: int, reason: str
) -> None:
    """With the reason."""
    response = client.post(f"/v2/repository/models/{model}/{action}", json=body)

    assert reason in error(response, status)


def test_a_body_that_is_no_json_is_refused(client: HttpClient) -> None:
    """Where JSON may stand."""
    for path in (INDEX, f"{MODEL}/load", f"{MODEL}/unload"):
        assert "not JSON" in error(client.post(path, content=b"{"), 400)


def test_without_a_conductor_nothing_is_changed(fleet: LocalFleet, client: HttpClient) -> None:
    """503, and what answers goes on."""
    fleet.crash_conductor()
    response = client.post(f"{MODEL}/unload")

    assert error(response, 503)
    assert response.headers["retry-after"] == "1"
    assert client.post("/v2/models/colours/infer", json=image(png_of(0))).status_code == 200
