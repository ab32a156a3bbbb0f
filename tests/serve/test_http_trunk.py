"""`POST /trunks` and the way back, over HTTP, from Python and from the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from export.bundle import TRUNK_GRAPH, TRUNK_MANIFEST, Bundle, digest_of
from serve import memory
from serve.client import Client
from serve.http.routes import http_app
from serve.paging import AdapterMemory
from serve.record import LogView, Record, Verdict
from serve.running import RunningTrunk
from serve.trunks import ServedTrunk
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet, stored_trunk, until
from tests.serve.oracle import some_picture
from tests.serve.test_http import problem
from tests.serve.test_http_push import blobs, says
from tests.serve.tiny import TinyTrunk, png_of

TASKS = ("colours", "shapes")
GATES = ["signature", "trunk", "graph", "golden", "labels", "heldout", "accuracy", "latency"]


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyTrunk]:
    """The one that is served, one of the same pictures, and one that takes larger ones."""
    folder = tmp_path_factory.mktemp("trunks")
    return {
        "old": TinyTrunk(folder / "old", size_px=8, roll=0, scale=0.01),
        "same size": TinyTrunk(folder / "same", size_px=8, roll=1, scale=0.02),
        "larger": TinyTrunk(folder / "larger", size_px=12, roll=1, scale=0.02),
    }


@pytest.fixture
def old(trunks: dict[str, TinyTrunk]) -> TinyTrunk:
    """The trunk that is served first."""
    return trunks["old"]


@pytest.fixture
def new(trunks: dict[str, TinyTrunk]) -> TinyTrunk:
    """The one that takes its place."""
    return trunks["larger"]


@pytest.fixture
def fleet(tmp_path: Path, old: TinyTrunk) -> Iterator[LocalFleet]:
    """Two replicas with both tasks live."""
    with LocalFleet(tmp_path / "store", old.folder, replicas=2) as fleet:
        fleet.push_together(*heads_of(old))
        yield fleet


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trunks that were closed, on any replica."""
    digests: list[str] = []
    close = RunningTrunk.close

    def noted(trunk: RunningTrunk) -> None:
        digests.append(trunk.digest)
        close(trunk)

    monkeypatch.setattr(RunningTrunk, "close", noted)
    return digests


def heads_of(trunk: TinyTrunk, seed: int = 0) -> list[Bundle]:
    """A bundle of each task."""
    return [trunk.bundle(task, seed + place) for place, task in enumerate(TASKS)]


def exam(size_px: int, *, num: int = 60) -> bytes:
    """A held-out sample of pictures of one size, whose right answers a head may know."""
    chance = np.random.default_rng(7)
    pictures = chance.integers(0, 200, (num, size_px, size_px, 3), dtype=np.uint8)
    labels = chance.integers(0, 3, num)
    pictures[np.arange(num), :, :, labels] += np.uint8(55)
    return save({"pictures": pictures, "labels": labels})


def send(
    http: HttpClient, trunk: TinyTrunk, bundles: list[Bundle], query: str = "", **options: Any
) -> httpx.Response:
    """Push a trunk with bundles."""
    files = [
        ("trunk", (name, (trunk.folder / name).read_bytes()))
        for name in (TRUNK_GRAPH, TRUNK_MANIFEST)
    ]
    files += [("bundle", (f"{b.manifest.task}.zip", b.to_zip())) for b in bundles]
    return http.post(f"/trunks?{query}", files=files, **options)


def test_a_trunk_is_live_with_all_heads_when_its_push_returns(
    fleet: LocalFleet, http: HttpClient, old: TinyTrunk, new: TinyTrunk, closed: list[str]
) -> None:
    """On every replica; the answer says what single pushes say, and one swap."""
    bundles = heads_of(new)
    told = send(http, new, bundles, "message=larger+pictures").json()
    other, picture = HttpClient(fleet, "replica-2"), some_picture(0)
    answer = other.post("/predict/shapes", content=png_of(picture)).json()
    listed = other.get("/tasks").json()
    version = other.get("/tasks/shapes/versions").json()["versions"][1]
    until(lambda: closed == 2 * [old.manifest.digest])

    assert told["trunk"] == listed["trunk"] == new.manifest.digest
    assert told["versions"] == [
        {"task": b.manifest.task, "version": 2, "bundle": b.digest} for b in bundles
    ]
    assert told["swap"]["replicas"] == 2
    assert (answer["version"], answer["bundle"]) == (2, bundles[1].digest)
    assert list(answer["scores"].values()) == pytest.approx(new.scores(picture, 1), abs=1e-5)
    assert says(version["gates"]) == {
        **dict.fromkeys(GATES, "yes"), "heldout": "skipped", "accuracy": "skipped",
    }  # fmt: skip
    assert version["message"] == "larger pictures"


def test_a_push_to_a_replica_that_is_about_to_flip_waits_for_its_trunk(
    fleet: LocalFleet, http: HttpClient, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record stands, so a head for the new trunk is no mistake."""
    replica, has_read = fleet.replicas["replica-1"], threading.Event()
    history, answers = replica.history, list[httpx.Response]()

    def read() -> LogView:
        view = history()
        has_read.set()
        return view

    def push() -> None:
        zipped = new.bundle("colours", 5).to_zip()
        answers.append(http.post("/tasks/colours/versions", content=zipped))

    def push_before_the_flip(record: Record) -> None:
        if record.trunk is not None:
            monkeypatch.setattr(replica, "history", read)
            threading.Thread(target=push).start()
            assert has_read.wait(5)
            time.sleep(0.05)  # it would ask the gates now

    fleet.log.after_put = push_before_the_flip
    fleet.push_together(*heads_of(new), trunk=new.folder)
    until(lambda: bool(answers))

    assert answers[0].json()["version"] == 3


def test_a_head_that_a_trunk_overtakes_is_looked_at_by_the_gates_anew(
    fleet: LocalFleet,
    http: HttpClient,
    old: TinyTrunk,
    new: TinyTrunk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was compared on the trunk before; no replica is asked to load it on the new one."""
    replica = fleet.replicas["replica-1"]
    compare = replica.compare

    def compare_meanwhile(*given: Any, **more: Any) -> tuple[Verdict, ...]:
        monkeypatch.setattr(replica, "compare", compare)
        fleet.push_together(*heads_of(new), trunk=new.folder)
        return compare(*given, **more)

    monkeypatch.setattr(replica, "compare", compare_meanwhile)
    pushed = http.post("/tasks/colours/versions", content=old.bundle("colours", 5).to_zip())
    number = fleet.view().number

    assert problem(pushed, 422).startswith("The head was trained on trunk")
    assert says(pushed.json()["gates"]) == {"signature": "yes", "trunk": "no"}
    assert fleet.view().trunks[-1].number == number  # nothing was tried after it


def test_the_way_back_is_one_step(http: HttpClient, old: TinyTrunk, new: TinyTrunk) -> None:
    """To the trunk and the bundles before; one task alone does not go there."""
    send(http, new, heads_of(new))
    alone = http.post("/tasks/shapes/rollback", json={})
    raced = http.post("/trunks/rollback", json={"expected": old.manifest.digest})
    headers = {"idempotency-key": "k"}
    asked: dict[str, Any] = {"json": {"expected": new.manifest.digest}, "headers": headers}
    back = http.post("/trunks/rollback", **asked).json()
    again = http.post("/trunks/rollback", **asked).json()
    unknown = http.post("/trunks/rollback", json={"to": 1})
    malformed = http.post("/trunks/rollback", json={"expected": "old"})

    assert f"is for trunk {old.manifest.digest}" in problem(alone, 409)
    assert "is served; expected" in problem(raced, 409)
    assert back["trunk"] == old.manifest.digest
    assert [(v["task"], v["version"]) for v in back["versions"]] == [("colours", 3), ("shapes", 3)]
    assert back["versions"][0]["bundle"] == heads_of(old)[0].digest
    assert again == {**back, "repeated": True, "swap": again["swap"]}
    assert "Field 'to' is unknown" in problem(unknown, 400)
    assert "expected is 'old'" in problem(malformed, 400)


def test_a_live_task_without_a_bundle_is_named_before_anything_is_loaded(
    fleet: LocalFleet, http: HttpClient, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """422, and nothing is stored."""
    stored = blobs(fleet)
    monkeypatch.setattr(fleet.replicas["replica-1"].trunks, "hold", None)
    refused = send(http, new, heads_of(new)[:1])

    assert problem(refused, 422).startswith("There is no bundle for the new trunk of shapes.")
    assert blobs(fleet) == stored


def test_a_bundle_of_another_trunk_is_refused_with_the_verdicts_of_all(
    fleet: LocalFleet, http: HttpClient, old: TinyTrunk, new: TinyTrunk, closed: list[str]
) -> None:
    """The gates look at each bundle on the new trunk, which is let go again."""
    mixed = [heads_of(new)[0], heads_of(old)[1]]
    refused = send(http, new, mixed)
    gates = refused.json()["gates"]

    assert problem(refused, 422).startswith("shapes: The head was trained on trunk")
    assert says([g for g in gates if g["task"] == "colours"])["latency"] == "yes"
    assert says([g for g in gates if g["task"] == "shapes"]) == {"signature": "yes", "trunk": "no"}
    assert fleet.replicas["replica-1"].trunks._beside is None
    assert closed == [new.manifest.digest]


def test_a_trunk_that_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk
) -> None:
    """By what is likely before it is loaded, and by what it took afterwards."""
    limit = memory.used_bytes() + 10 * 2**20
    with LocalFleet(tmp_path / "store", old.folder, replicas=1, memory_bytes=limit) as fleet:
        fleet.push_together(*heads_of(old))
        http = HttpClient(fleet, "replica-1")
        estimated = problem(send(http, new, heads_of(new)), 422)

    assert "The new trunk needs about 16 MiB beside the one that is served" in estimated
    assert f"of {limit / 2**20:.0f} (memory_bytes)" in estimated


def test_the_adapters_that_are_in_memory_count_twice(
    tmp_path: Path, old: TinyTrunk, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the new trunk's heads are likely to take as much as those of the heads before."""
    monkeypatch.setattr(AdapterMemory, "used_bytes", 100 * 2**20)
    limit = memory.used_bytes() + 50 * 2**20
    with LocalFleet(tmp_path / "store", old.folder, replicas=1, memory_bytes=limit) as fleet:
        fleet.push_together(*heads_of(old))
        told = problem(send(HttpClient(fleet, "replica-1"), new, heads_of(new)), 422)

    assert "The new trunk needs about 116 MiB beside" in told


def nothing_needed(*_: object, **__: object) -> int:
    """An estimate that lets everything in."""
    return -(2**40)


def test_a_trunk_stays_while_somebody_holds_it(
    fleet: LocalFleet, new: TinyTrunk, closed: list[str]
) -> None:
    """The gates of a push, and the swap that it asks for, have one between them."""
    trunks, change = fleet.replicas["replica-1"].trunks, stored_trunk(fleet.log, new.folder)
    held = [trunks.hold(change), trunks.hold(change)]
    trunks.let_go()
    while_held = trunks._beside, [*closed]
    trunks.let_go()

    assert held[0] is held[1]
    assert while_held == (held[0], [])
    assert (trunks._beside, closed) == (None, [new.manifest.digest])


def test_what_a_trunk_really_takes_counts_too(
    tmp_path: Path,
    old: TinyTrunk,
    new: TinyTrunk,
    closed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An estimate that is too low lets it be loaded, and it is let go again."""
    monkeypatch.setattr(memory, "trunk_bytes", nothing_needed)
    with LocalFleet(tmp_path / "store", old.folder, replicas=1, memory_bytes=2**20) as fleet:
        fleet.push_together(*heads_of(old))
        told = problem(send(HttpClient(fleet, "replica-1"), new, heads_of(new)), 422)

        assert "needs about 0 MiB beside" in told
        assert fleet.replicas["replica-1"].trunks._beside is None
        assert closed == [new.manifest.digest]


def test_a_dry_run_of_a_trunk_stores_nothing(
    fleet: LocalFleet, http: HttpClient, new: TinyTrunk
) -> None:
    """It is loaded from the request, its bundles are tried on it, and it is let go."""
    stored = blobs(fleet)
    told = send(http, new, heads_of(new), "dry_run=true").json()

    assert told["dry_run"] is True
    assert told["trunk"] == new.manifest.digest
    assert [v["would_make"]["version"] for v in told["versions"]] == [2, 2]
    assert blobs(fleet) == stored
    assert fleet.replicas["replica-1"].trunks._beside is None


def test_a_trunk_that_is_sent_again_is_one_change(http: HttpClient, new: TinyTrunk) -> None:
    """Though it is served by then; another request with that key is a conflict."""
    headers = {"idempotency-key": "k"}
    first = send(http, new, heads_of(new), headers=headers).json()
    again = send(http, new, heads_of(new), headers=headers).json()
    other = send(http, new, heads_of(new, seed=5), headers=headers)
    without_key = send(http, new, heads_of(new))

    assert again == {**first, "repeated": True, "swap": again["swap"]}
    assert f"already brought trunk {new.manifest.digest}" in problem(other, 409)
    assert "is served already" in problem(without_key, 409)


def test_a_caller_who_goes_while_the_trunk_is_loaded_leaves_nothing_behind(
    fleet: LocalFleet, new: TinyTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His request is cancelled; the trunk that was being loaded for it is let go."""
    replica = fleet.replicas["replica-1"]
    is_loading, may_load = threading.Event(), threading.Event()
    load = replica.trunks._load_beside

    def load_later(*given: Any) -> ServedTrunk:
        is_loading.set()
        assert may_load.wait(10)
        return load(*given)

    monkeypatch.setattr(replica.trunks, "_load_beside", load_later)

    async def go_away() -> None:
        asking = asyncio.ensure_future(asyncio.to_thread(is_loading.wait, 10))
        files = [
            ("trunk", (name, (new.folder / name).read_bytes()))
            for name in (TRUNK_GRAPH, TRUNK_MANIFEST)
        ]
        files += [("bundle", ("b.zip", bundle.to_zip())) for bundle in heads_of(new)]
        transport = httpx.ASGITransport(http_app(replica, fleet.links["replica-1"]))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            request = asyncio.ensure_future(client.post("/trunks", files=files))
            await asking
            request.cancel()
            asyncio.get_running_loop().call_later(0.1, may_load.set)
            with contextlib.suppress(asyncio.CancelledError):
                await request

    asyncio.run(go_away())

    until(lambda: replica.trunks._num_holders == 0)
    assert replica.trunks._beside is None
    assert replica.engine.manifest.digest != new.manifest.digest


@pytest.mark.parametrize(
    ("files", "status", "reason"),
    [
        ([("trunk", ("trunk.onnx", b"x"))], 422, "There is no trunk.json"),
        ([("trunk", ("trunk.json", b"{}"))], 422, "trunk.json is invalid"),
        ([("head", ("x.zip", b""))], 400, "files named trunk and bundle"),
    ],
)
def test_what_is_no_trunk_says_what_was_expected(
    http: HttpClient, files: list[Any], status: int, reason: str
) -> None:
    """One line."""
    assert reason in problem(http.post("/trunks", files=files), status)


def test_a_damaged_trunk_is_refused(http: HttpClient, new: TinyTrunk) -> None:
    """Its files are compared with its manifest before anything is made of them."""
    manifest = (new.folder / TRUNK_MANIFEST).read_bytes()
    files = [("trunk", (TRUNK_MANIFEST, manifest)), ("trunk", (TRUNK_GRAPH, b"damaged"))]
    missing = http.post("/trunks", files=files[:1])

    assert "trunk.onnx is damaged" in problem(http.post("/trunks", files=files), 422)
    assert "trunk.onnx is listed in the manifest but missing" in problem(missing, 422)


def perfect(trunk: TinyTrunk, *, sign: int = 1, heldout: bytes | None = None) -> Bundle:
    """A head of colours that knows the exam, or with -1 gets it all wrong."""
    weight = sign * np.roll(np.eye(3, dtype=np.float32), trunk.roll, axis=0)
    return trunk.bundle("colours", 0, heldout, weight=weight)


def kept(fleet: LocalFleet) -> set[str]:
    """The trunks of which the replica that takes pushes keeps what they made of samples."""
    return {key[0] for key in fleet.replicas["replica-1"].trunks.exams._arrays}


def test_a_trunk_of_the_same_pictures_has_to_pass_the_tasks_exam(
    fleet: LocalFleet, http: HttpClient, trunks: dict[str, TinyTrunk]
) -> None:
    """What is live answers on its own trunk, the bundle on the new one, and both the same exam.

    What was kept of a trunk goes with it, whichever of the two it is.
    """
    old, new = trunks["old"], trunks["same size"]
    http.request("PUT", "/tasks/colours/heldout", content=exam(8))
    http.post("/versions", files=[("bundle", ("c.zip", perfect(old).to_zip()))])
    worse = send(http, new, [perfect(new, sign=-1), heads_of(new)[1]])
    until(lambda: kept(fleet) == {old.manifest.digest})
    good = send(http, new, [perfect(new), heads_of(new)[1]])
    until(lambda: kept(fleet) == {new.manifest.digest})
    gates = http.get("/tasks/colours").json()["gates"]

    assert problem(worse, 422).startswith("colours: The head is worse than what is live")
    assert good.status_code == 200
    assert says(gates)["accuracy"] == "yes"
    assert "accuracy 1.000 against 1.000" in gates[-2]["reason"]
    assert http.get("/tasks/colours").json()["heldout"] == digest_of(exam(8))


def test_an_exam_of_other_pictures_is_passed_over_and_says_so(
    http: HttpClient, old: TinyTrunk, new: TinyTrunk
) -> None:
    """The bundle's own sample becomes the task's for that trunk; on the way back the old one is."""
    http.request("PUT", "/tasks/colours/heldout", content=exam(8))
    http.post("/versions", files=[("bundle", ("c.zip", perfect(old).to_zip()))])
    bundles = [perfect(new, sign=-1, heldout=exam(12)), heads_of(new)[1]]
    send(http, new, bundles)
    gates = http.get("/tasks/colours").json()["gates"]
    on_new = http.get("/tasks/colours").json()["heldout"]
    better = http.post("/versions", files=[("bundle", ("c.zip", perfect(new).to_zip()))])
    worse = http.post("/versions", files=[("bundle", ("c.zip", perfect(new, sign=-1).to_zip()))])
    http.post("/trunks/rollback", json={})
    on_old = http.get("/tasks/colours").json()["heldout"]
    still = http.post("/versions", files=[("bundle", ("c.zip", perfect(old, sign=-1).to_zip()))])

    assert says(gates)["accuracy"] == "skipped"
    assert "the new trunk takes pictures of 12 px" in gates[-2]["reason"]
    assert "its 60 held-out pictures are the task's from now on" in gates[-3]["reason"]
    assert on_new == digest_of(exam(12))
    assert better.status_code == 200
    assert "The head is worse than what is live" in problem(worse, 422)
    assert on_old == digest_of(exam(8))
    assert "The head is worse than what is live" in problem(still, 422)


def test_a_sample_that_a_trunk_overtakes_is_taken_if_it_fits_that_trunk(
    fleet: LocalFleet,
    http: HttpClient,
    trunks: dict[str, TinyTrunk],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was checked for the trunk before; what its key has made stays made."""
    log = fleet.replicas["replica-1"].log
    put_blob = log.put_blob

    def send_while_it_goes_live(trunk: TinyTrunk, sample: bytes, key: str) -> httpx.Response:
        def put(data: bytes) -> str:
            fleet.push_together(*heads_of(trunk), trunk=trunk.folder)
            return put_blob(data)

        monkeypatch.setattr(log, "put_blob", put)
        answer = set_exam(sample, key)
        monkeypatch.setattr(log, "put_blob", put_blob)
        return answer

    def set_exam(sample: bytes, key: str) -> httpx.Response:
        headers = {"idempotency-key": key}
        return http.request("PUT", "/tasks/colours/heldout", content=sample, headers=headers)

    alike = send_while_it_goes_live(trunks["same size"], exam(8), "a")
    refused = send_while_it_goes_live(trunks["larger"], exam(8, num=50), "b")
    again = set_exam(exam(8), "a")
    decoded_anew = set_exam(exam(12), "c")
    history = http.get("/tasks/colours/versions").json()["heldout"]

    assert alike.json()["heldout"] == digest_of(exam(8))
    assert problem(refused, 409).endswith("Decode the sample for that trunk and send it again.")
    assert f"Trunk {trunks['larger'].manifest.digest} went live" in problem(refused, 409)
    assert again.json() == alike.json()
    assert decoded_anew.json()["heldout"] == digest_of(exam(12))
    assert [one["heldout"] for one in history] == [digest_of(exam(8)), digest_of(exam(12))]


def test_versions_of_two_trunks_are_compared_without_their_answers(
    http: HttpClient, new: TinyTrunk
) -> None:
    """They cannot be run on one trunk; labels, weights and origin are told."""
    send(http, new, heads_of(new, seed=5))
    told = http.get("/tasks/colours/diff?a=1&b=2").json()

    assert told["golden"] is None
    assert told["b"]["trunk"] == new.manifest.digest != told["a"]["trunk"]
    assert told["weights"]["distance"] > 0


def test_commands_push_a_trunk_and_take_it_back(
    run: Run, tmp_path: Path, old: TinyTrunk, new: TinyTrunk, connect: Callable[..., Client]
) -> None:
    """TRUNK, then bundles; the log tells of it; options for one task are refused."""
    for bundle in heads_of(new):
        bundle.write(tmp_path / bundle.manifest.task)
    all_of = [str(new.folder), *(str(tmp_path / task) for task in TASKS)]
    missing = run("push", *all_of[:2])
    tasked = run("push", *all_of, "--task", "colours")
    dry = run("push", *all_of, "--dry-run")
    pushed = run("push", *all_of, "--message", "larger")
    diff = run("diff", "colours", "1", "2")
    back = run("rollback", "--trunk", "--json")
    both = run("rollback", "colours", "--trunk")
    neither = run("rollback")
    history = run("history")

    assert "There is no bundle for the new trunk of shapes" in missing.err
    assert "--task is for one bundle" in tasked.err
    assert "colours would be at version 2" in dry.out
    assert f"trunk {new.manifest.digest[7:19]} is live on 2 replicas" in pushed.out
    assert "shapes version 2 is live on 2 replicas" in pushed.out
    assert "golden pictures: not compared" in diff.out
    assert json.loads(back.out)["trunk"] == old.manifest.digest
    assert both.code == neither.code == 1
    assert "Expected one of: a task" in neither.err
    assert history.out.count("trunk ") >= 3
    assert connect().tasks()["trunk"] == old.manifest.digest
    assert connect().rollback_trunk()["trunk"] == new.manifest.digest
