"""`POST /versions`: bundles of several tasks that go live in one moment, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import Bundle
from serve.client import Client
from tests.serve.commands import Run
from tests.serve.conftest import BundleMaker
from tests.serve.exams import PERFECT, heldout, partial
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.test_http import png_of, problem
from tests.serve.test_http_push import GATES, blobs, says

TASKS = ("colours", "shapes")


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path) -> Iterator[LocalFleet]:
    """Two replicas and nothing pushed yet."""
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=2, max_push_bytes=50_000) as fleet:
        yield fleet


@pytest.fixture
def bundles(make_bundle: BundleMaker) -> Callable[..., list[Bundle]]:
    """Makes a bundle of each task with these weights, with a held-out sample."""

    def make(*weights: NDArray[np.float32]) -> list[Bundle]:
        return [
            make_bundle(task, weight=weight, heldout=heldout(40))
            for task, weight in zip(TASKS, weights, strict=True)
        ]

    return make


def send(
    http: HttpClient, bundles: list[Bundle], query: str = "", **options: Any
) -> httpx.Response:
    """Push several."""
    files = [("bundle", (f"{b.manifest.task}.zip", b.to_zip())) for b in bundles]
    return http.post(f"/versions?{query}", files=files, **options)


def of_task(gates: list[dict[str, Any]], task: str) -> dict[str, str]:
    """What each gate said of one task's bundle."""
    return says([gate for gate in gates if gate["task"] == task])


def test_several_are_live_on_every_replica_when_the_push_returns(
    fleet: LocalFleet, http: HttpClient, bundles: Callable[..., list[Bundle]]
) -> None:
    """What single pushes answer in a list, and one swap; each version has its own gates."""
    first = send(http, bundles(PERFECT, PERFECT), "message=both").json()
    pair = bundles(2 * PERFECT, 3 * PERFECT)
    second = send(http, pair).json()
    other = HttpClient(fleet, "replica-2")
    asked = other.post("/predict?tasks=shapes,colours", content=png_of(0)).json()["results"]
    versions = {task: other.get(f"/tasks/{task}/versions").json()["versions"] for task in TASKS}

    assert [v["version"] for v in first["versions"]] == [1, 1]
    assert second["versions"] == [
        {"task": task, "version": 2, "bundle": bundle.digest}
        for task, bundle in zip(TASKS, pair, strict=True)
    ]
    assert second["swap"].keys() == {"stage_ms", "hold_ms", "replicas"}
    assert second["swap"]["replicas"] == 2
    assert second["repeated"] is False
    assert {answer["task"]: answer["bundle"] for answer in asked} == {
        bundle.manifest.task: bundle.digest for bundle in pair
    }
    for task in TASKS:
        assert versions[task][0]["message"] == "both"
        assert [gate["task"] for gate in versions[task][1]["gates"]] == [task] * len(GATES)
        assert says(versions[task][1]["gates"]) == dict.fromkeys(GATES, "yes")
    assert versions["colours"][1]["record"] == versions["shapes"][1]["record"]


def test_one_bundle_that_is_refused_stops_all_and_each_has_its_verdicts(
    fleet: LocalFleet, http: HttpClient, bundles: Callable[..., list[Bundle]]
) -> None:
    """422 with every gate's verdict of every bundle; nothing is stored."""
    send(http, bundles(PERFECT, PERFECT))
    stored = blobs(fleet)
    refused = send(http, bundles(2 * PERFECT, partial(0.9)))

    assert problem(refused, 422).startswith("shapes: The head is worse than what is live")
    assert of_task(refused.json()["gates"], "colours") == dict.fromkeys(GATES, "yes")
    assert of_task(refused.json()["gates"], "shapes") == {
        **dict.fromkeys(GATES[:-2], "yes"), "accuracy": "no",
    }  # fmt: skip
    assert blobs(fleet) == stored
    assert [fleet.live_versions(task) for task in TASKS] == [{1}, {1}]


def test_every_bundle_that_is_refused_has_its_reason(
    http: HttpClient, bundles: Callable[..., list[Bundle]]
) -> None:
    """Also when several are; not only the first is named."""
    send(http, bundles(PERFECT, PERFECT))
    told = problem(send(http, bundles(partial(0.9), partial(0.9))), 422)

    assert "colours: The head is worse" in told
    assert "shapes: The head is worse" in told


def test_a_dry_run_of_several_says_what_each_would_make(
    fleet: LocalFleet, http: HttpClient, bundles: Callable[..., list[Bundle]]
) -> None:
    """And stores nothing."""
    send(http, bundles(PERFECT, PERFECT)[:1])
    stored = blobs(fleet)
    told = send(http, bundles(2 * PERFECT, PERFECT), "dry_run=true").json()

    assert told["dry_run"] is True
    assert [(v["task"], v["would_make"]["version"]) for v in told["versions"]] == [
        ("colours", 2),
        ("shapes", 1),
    ]
    assert [v["would_make"]["heldout"] is None for v in told["versions"]] == [True, False]
    assert says(told["versions"][0]["gates"]) == dict.fromkeys(GATES, "yes")
    assert blobs(fleet) == stored


def test_several_that_are_sent_again_are_one_change(
    http: HttpClient, bundles: Callable[..., list[Bundle]]
) -> None:
    """The same key; also after better ones went live, which they are not compared with."""
    headers = {"idempotency-key": "k"}
    weak = bundles(partial(0.9), PERFECT)
    first = send(http, weak, headers=headers).json()
    send(http, bundles(PERFECT, PERFECT))
    again = send(http, weak, headers=headers).json()
    other = send(http, weak[:1], headers=headers)

    assert again == {**first, "repeated": True, "swap": again["swap"]}
    assert "'k' already made version 1 of task colours, made version 1 of task shapes" in (
        problem(other, 409)
    )


def zipped(name: str) -> list[tuple[str, tuple[str, bytes]]]:
    """A field that holds no bundle."""
    return [(name, ("x.zip", b"nothing"))]


@pytest.mark.parametrize(
    ("query", "options", "status", "reason"),
    [
        ("canary=0.1", {"files": zipped("bundle")}, 400, "A canary is begun with one bundle"),
        ("shadow=true", {"files": zipped("bundle")}, 400, "A shadow is begun with one bundle"),
        ("share=1", {"files": zipped("bundle")}, 400, "Parameter 'share' is unknown"),
        ("", {"files": zipped("bundle")}, 422, "Bundle 1 (x.zip): The zip file is damaged"),
        ("", {"files": zipped("image")}, 400, "Field 'image' is unknown; expected multipart"),
        ("", {"content": b"PK"}, 400, "The body is of no type; expected multipart/form-data"),
        ("", {"data": {"bundle": "text"}, "files": []}, 400, "expected multipart/form-data"),
        ("", {"files": [("bundle", ("x", bytes(60_000)))]}, 413, "larger than 50000 bytes"),
        (
            "",
            {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
            400,
            "The multipart body cannot be read",
        ),
    ],
)
def test_a_request_for_several_that_cannot_be_says_why(
    http: HttpClient, query: str, options: dict[str, Any], status: int, reason: str
) -> None:
    """One line that says what was expected."""
    assert reason in problem(http.post(f"/versions?{query}", **options), status)


def test_two_bundles_of_one_task_are_no_push(http: HttpClient, make_bundle: BundleMaker) -> None:
    """One of them would be lost."""
    told = send(http, [make_bundle(seed=1), make_bundle(seed=2)])

    assert "Two bundles are of task colours" in problem(told, 400)


def test_a_client_pushes_a_list(
    connect: Callable[..., Client], bundles: Callable[..., list[Bundle]], tmp_path: Path
) -> None:
    """Bundles and paths."""
    one, two = bundles(PERFECT, PERFECT)
    two.write(tmp_path / "two")
    told = connect().push_together([one, tmp_path / "two"], message="both")

    assert [(v["task"], v["version"]) for v in told["versions"]] == [("colours", 1), ("shapes", 1)]


def test_the_command_pushes_several(
    run: Run, tmp_path: Path, bundles: Callable[..., list[Bundle]]
) -> None:
    """A line for each task; a dry run has one table that names the tasks; errors are one line."""
    for bundle in bundles(PERFECT, PERFECT):
        bundle.write(tmp_path / bundle.manifest.task)
    both = [str(tmp_path / task) for task in TASKS]
    dry = run("push", *both, "--dry-run")
    pushed = run("push", *both)
    as_json = run("push", *both, "--json")
    tasked = run("push", *both, "--task", "colours")
    history = run("history")

    assert "colours would be at version 1" in dry.out
    assert "shapes would be at version 1" in dry.out
    assert "task" in dry.out.splitlines()[1]
    assert "colours version 1 is live on 2 replicas" in pushed.out
    assert "shapes version 1 is live on 2 replicas" in pushed.out
    assert [v["version"] for v in json.loads(as_json.out)["versions"]] == [2, 2]
    assert tasked.code == 1
    assert "go to the tasks that they were made for" in tasked.err
    assert "push colours 1" in history.out
    assert "push shapes 1" in history.out
