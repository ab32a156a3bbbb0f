"""Pushes that are compared with what is live, dry runs, and held-out samples, over HTTP."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from export.bundle import HELDOUT, digest_of
from serve.client import Client
from serve.http.push import COMPARE_TRIES
from serve.messages import Change, Swapped
from tests.serve.commands import Run
from tests.serve.conftest import BundleMaker
from tests.serve.exams import PERFECT, heldout, partial
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.test_http import png_of, problem

PUSH = "/tasks/colours/versions"
GATES = ["signature", "trunk", "graph", "golden", "labels", "heldout", "accuracy", "latency"]


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path) -> Iterator[LocalFleet]:
    """Two replicas and nothing pushed yet."""
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=2) as fleet:
        yield fleet


@pytest.fixture
def push(http: HttpClient, make_bundle: BundleMaker) -> Callable[..., httpx.Response]:
    """Pushes a head with these weights, by default with the sample that becomes the task's."""

    def push(weight: Any = PERFECT, query: str = "", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        bundle = make_bundle(weight=weight, **{"heldout": heldout(), **options})
        return http.post(f"{PUSH}?{query}", content=bundle.to_zip(), headers=headers)

    return push


Push = Callable[..., httpx.Response]


def says(gates: list[dict[str, Any]]) -> dict[str, str]:
    """yes, no or skipped, by gate."""
    return {
        gate["gate"]: "skipped" if gate["skipped"] else "yes" if gate["passed"] else "no"
        for gate in gates
    }


def blobs(fleet: LocalFleet) -> set[Path]:
    """Everything that is stored."""
    return {path for path in Path(fleet.settings.store).rglob("*") if path.is_file()}


def test_the_first_push_brings_the_sample_and_the_next_is_compared_on_it(
    push: Push, http: HttpClient
) -> None:
    """A sample of its own helps a worse head nothing; the verdicts are in the history."""
    first = push(PERFECT)
    worse = push(partial(0.3), heldout=heldout(seed=1))
    better = push(2 * PERFECT, heldout=heldout(seed=1))
    versions = http.get(PUSH).json()["versions"]

    assert (first.status_code, better.status_code) == (200, 200)
    assert "The head is worse than what is live: accuracy 0.905" in problem(worse, 422)
    assert says(worse.json()["gates"]) == {
        **dict.fromkeys(GATES[:-2], "yes"), "accuracy": "no",
    }  # fmt: skip
    assert says(versions[0]["gates"]) == {**dict.fromkeys(GATES, "yes"), "accuracy": "skipped"}
    assert says(versions[1]["gates"]) == dict.fromkeys(GATES, "yes")
    assert "is not used: the task has its own" in versions[1]["gates"][-3]["reason"]
    assert "accuracy 1.000 against 1.000" in versions[1]["gates"][-2]["reason"]
    assert http.get("/tasks/colours").json()["heldout"] == digest_of(heldout())


def test_a_wider_margin_lets_a_worse_head_pass(push: Push, http: HttpClient) -> None:
    """The setting that the refusal names."""
    push(PERFECT)
    before = push(partial(0.3)).status_code
    http.request("PATCH", "/tasks/colours", json={"margin": 0.2})

    assert (before, push(partial(0.3)).status_code) == (422, 200)


def test_a_retired_task_has_nothing_to_compare_with(push: Push, http: HttpClient) -> None:
    """Its sample stays, and is used again after that push."""
    push(PERFECT)
    http.request("DELETE", "/tasks/colours")
    again = push(2 * PERFECT, heldout=heldout(seed=1))
    worse = push(partial(0.3))
    versions = http.get(PUSH).json()["versions"]

    assert again.json()["version"] == 3
    assert versions[2]["gates"][-2]["reason"] == "nothing is live to compare with"
    assert worse.status_code == 422


def test_a_dry_run_says_what_a_push_would_make_and_stores_nothing(
    push: Push, fleet: LocalFleet, make_bundle: BundleMaker
) -> None:
    """Record, blobs and answers are as they were; the same push afterwards makes it so."""
    empty = blobs(fleet)
    first = push(PERFECT, "dry_run=true").json()
    assert blobs(fleet) == empty
    push(PERFECT)
    stored, log = blobs(fleet), fleet.view()
    told = push(2 * PERFECT, "dry_run=true")
    after, log_after = blobs(fleet), fleet.view()
    made = push(2 * PERFECT).json()
    bundle = make_bundle(weight=2 * PERFECT, heldout=heldout())

    assert first["would_make"]["heldout"] == digest_of(heldout())
    assert told.json()["would_make"] == {
        "version": 2,
        "action": "push",
        "bundle": bundle.digest,
        "labels": ["red", "green", "blue"],
        "heldout": None,
    }
    assert told.json()["dry_run"] is True
    assert says(told.json()["gates"]) == dict.fromkeys(GATES, "yes")
    assert (after, log_after) == (stored, log)
    assert (made["version"], made["bundle"]) == (2, bundle.digest)


@pytest.mark.parametrize(
    ("options", "gate", "reason"),
    [
        ({"weight": partial(0.3)}, "accuracy", "The head is worse"),
        ({"labels": ("blue", "green", "red")}, "labels", "the order differs"),
        ({"trunk": "sha256:" + 64 * "a"}, "trunk", "was trained on trunk"),
        ({"heldout": b"none"}, "heldout", "cannot be read"),
    ],
)
def test_a_dry_run_of_what_would_be_refused_has_the_form_of_a_refusal(
    push: Push, fleet: LocalFleet, options: dict[str, Any], gate: str, reason: str
) -> None:
    """The same status, detail and gates as the push."""
    push(PERFECT)
    stored = blobs(fleet)
    dry = push(query="dry_run=true", **options)
    real = push(**options)

    assert reason in problem(dry, 422)
    assert dry.json()["gates"][-1]["gate"] == gate
    assert dry.json() == real.json()
    assert blobs(fleet) == stored


def test_a_dry_run_tells_of_conflicts(push: Push) -> None:
    """A key that was used, and what it made."""
    push(PERFECT, headers={"idempotency-key": "k"})
    used = push(2 * PERFECT, "dry_run=true", headers={"idempotency-key": "k"})
    same = push(PERFECT, "dry_run=true", headers={"idempotency-key": "k"})
    malformed = push(PERFECT, "dry_run=yes")

    assert "'k' already made version 1" in problem(used, 409)
    assert (same.json()["version"], same.json()["repeated"]) == (1, True)
    assert "dry_run is 'yes'; expected true or false" in problem(malformed, 400)


def between(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]
) -> list[Change]:
    """Acts before each change of replica-1 reaches the conductor; returns those changes."""
    link, seen = fleet.links["replica-1"], list[Change]()
    change = link.change

    async def first_act(asked: Change) -> Any:
        seen.append(asked)
        act(len(seen))
        return await change(asked)

    monkeypatch.setattr(link, "change", first_act)
    return seen


def test_a_push_is_compared_again_when_something_else_went_live_meanwhile(
    push: Push, fleet: LocalFleet, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good enough against the old version and worse than the new one: refused, by the new one."""
    push(partial(0.3))
    better = make_bundle(weight=PERFECT)

    def overtake(num_seen: int) -> None:
        if num_seen == 1:
            fleet.must_push(better, key="overtaking")

    seen = between(fleet, monkeypatch, overtake)
    late = push(partial(0.3), headers={"idempotency-key": "late"})

    assert "accuracy 0.905 against 1.000" in problem(late, 422)
    assert len(seen) == 1
    assert fleet.live_versions("colours") == {2}


def test_a_push_that_is_as_good_as_what_overtook_it_goes_live_after_it(
    push: Push, fleet: LocalFleet, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verdict speaks of the version that it was made after."""
    push(partial(0.3))
    overtaking = make_bundle(weight=PERFECT)
    seen = between(
        fleet, monkeypatch, lambda n: None if n > 1 else void(fleet.must_push(overtaking))
    )
    made = push(2 * PERFECT).json()
    verdict = fleet.view().tasks["colours"][-1].verdicts[-2].reason

    assert made["version"] == 3
    assert [change.grounds.version for change in seen if change.grounds] == [1, 2]
    assert "accuracy 1.000 against 1.000" in verdict


def void(_: object) -> None:
    """Nothing."""


def test_a_push_that_is_overtaken_again_and_again_is_a_conflict(
    push: Push, fleet: LocalFleet, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """409 after a few comparisons, and nothing of it went live."""
    push(PERFECT)

    def overtake(num_seen: int) -> None:
        fleet.must_push(make_bundle(weight=PERFECT), key=f"overtaking {num_seen}")

    seen = between(fleet, monkeypatch, overtake)
    late = push(2 * PERFECT)

    assert "changed while the gates compared" in problem(late, 409)
    assert len(seen) == COMPARE_TRIES
    assert fleet.live_versions("colours") == {1 + COMPARE_TRIES}


def test_a_repeated_push_is_the_same_answer_also_after_a_better_one(push: Push) -> None:
    """It was made, so it is not compared with what came later."""
    push(partial(0.3), headers={"idempotency-key": "k"})
    push(PERFECT)
    again = push(partial(0.3), headers={"idempotency-key": "k"})

    assert (again.status_code, again.json()["version"]) == (200, 1)


def test_the_sample_is_replaced_on_purpose(push: Push, http: HttpClient, fleet: LocalFleet) -> None:
    """A record without a version or a pause; the next push is compared on it."""
    push(PERFECT)
    before = fleet.view()
    told = http.request("PUT", "/tasks/colours/heldout?message=why", content=heldout(60, seed=2))
    push(2 * PERFECT)
    history = http.get(PUSH).json()

    assert told.json()["heldout"] == digest_of(heldout(60, seed=2))
    assert told.json()["version"] == 1
    assert [(h["action"], h["version"], h["message"]) for h in history["heldout"]] == [
        ("heldout", 1, ""),
        ("heldout", 1, "why"),
    ]
    assert "60 held-out pictures" in history["versions"][1]["gates"][-2]["reason"]
    assert fleet.view().number == before.number + 2


@pytest.mark.parametrize(
    ("path", "data", "status", "reason"),
    [
        ("colours/heldout", b"nothing", 422, "heldout.safetensors cannot be read"),
        ("colours/heldout", heldout(501), 422, "holds 501 pictures; expected 1 to 500"),
        ("textures/heldout", heldout(), 404, "There is no task 'textures'"),
        ("colours/heldout?expected=7", heldout(), 409, "at version 1; expected version 7"),
        ("colours/heldout?labels=a", heldout(), 400, "Parameter 'labels' is unknown"),
        ("colours/heldout", bytes(32 * 2**20 + 1), 413, "larger than 33554432 bytes"),
    ],
)
def test_a_sample_that_cannot_be_says_why(
    push: Push, http: HttpClient, path: str, data: bytes, status: int, reason: str
) -> None:
    """And the task keeps its own."""
    push(PERFECT)
    assert reason in problem(http.request("PUT", f"/tasks/{path}", content=data), status)
    assert http.get("/tasks/colours").json()["heldout"] == digest_of(heldout())


def test_replicas_fetch_no_sample_to_stage_or_serve(
    push: Push, fleet: LocalFleet, make_bundle: BundleMaker
) -> None:
    """Its blob may be gone: swaps and starts go on, and only a comparison needs it."""
    push(PERFECT)
    bundle = make_bundle(weight=2 * PERFECT, heldout=heldout())
    fleet.log.put_bundle(bundle)
    digest = digest_of(heldout()).removeprefix("sha256:")
    (Path(fleet.settings.store) / "blobs" / "sha256" / digest).unlink()
    labels = bundle.manifest.labels
    change = Change("colours", "staged", bundle=bundle.digest, labels=labels)
    staged = fleet.ask(lambda conductor: conductor.change(change)).result(10)
    late = fleet.start_replica()
    fleet.wait_admitted(late)
    answer = HttpClient(fleet, late).post("/predict/colours", content=png_of(0))

    assert isinstance(staged, Swapped), staged
    assert answer.json()["version"] == 2
    assert "is missing" in problem(push(PERFECT, heldout=None), 503)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux")
def test_gates_that_compare_run_behind_answers(fleet: LocalFleet) -> None:
    """In a thread of lower priority than the one that runs the engine."""

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    examined = fleet.replicas["replica-1"].examiner.submit(niceness).result(5)
    assert examined == niceness() + 5


def test_commands_try_push_and_replace(
    run: Run, tmp_path: Path, make_bundle: BundleMaker, connect: Callable[..., Client]
) -> None:
    """A dry run has a table of gates, its refusal one line; the history shows the samples."""
    make_bundle(weight=PERFECT, heldout=heldout()).write(tmp_path / "good")
    make_bundle(weight=partial(0.3)).write(tmp_path / "bad")
    (tmp_path / HELDOUT).write_bytes(heldout(60))
    dry = run("push", str(tmp_path / "good"), "--dry-run")
    before = connect().tasks()["tasks"]
    run("push", str(tmp_path / "good"))
    refused = run("push", str(tmp_path / "bad"), "--dry-run")
    refused_json = run("push", str(tmp_path / "bad"), "--dry-run", "--json")
    by_bundle = run("task", "heldout", "colours", str(tmp_path / "good"), "--message", "why")
    by_file = run("task", "heldout", "colours", str(tmp_path / HELDOUT), "--json")
    without = run("task", "heldout", "colours", str(tmp_path / "bad"))
    history = run("history", "colours")

    assert (dry.code, before) == (0, [])
    assert "accuracy" in dry.out
    assert "skipped" in dry.out
    assert "colours would be at version 1" in dry.out
    assert refused.code == 1
    assert "no" in refused.out
    assert refused.err.startswith("headstock: The head is worse than what is live")
    assert json.loads(refused_json.out)["gates"][-1]["passed"] is False
    assert "colours is compared on the sample" in by_bundle.out
    assert json.loads(by_file.out)["heldout"] == digest_of(heldout(60))
    assert "has no heldout.safetensors" in without.err
    assert history.out.count("held-out sample") == 3
    assert "why" in history.out


def test_a_bundle_with_other_labels_is_no_source_of_a_sample(
    run: Run, push: Push, tmp_path: Path, make_bundle: BundleMaker
) -> None:
    """Its label 0 would be another."""
    push(PERFECT)
    make_bundle(labels=("blue", "green", "red"), heldout=heldout()).write(tmp_path / "other")
    done = run("task", "heldout", "colours", str(tmp_path / "other"))

    assert done.code == 1
    assert "has the labels blue, green, red; task colours has red, green, blue" in done.err
