"""The models of the protocol when the trunk changes: which versions answer, and by which inputs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle import TrunkManifest
from serve.engine import LiveHead
from serve.jobs import Job, OtherTrunkError, VersionHead
from serve.messages import Outcome, Swapped
from serve.record import Record
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import some_picture
from tests.serve.test_http_oip import error, image, outputs, tensor
from tests.serve.tiny import TinyTrunk, png_of

MODEL = "/v2/models/colours"
PICTURE = some_picture(3)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyTrunk]:
    """The one that is served first, one for larger pictures, one for pictures of the same size."""
    folder = tmp_path_factory.mktemp("trunks")
    return {
        "old": TinyTrunk(folder / "old", size_px=8, roll=0, scale=1 / 100),
        "larger": TinyTrunk(folder / "larger", size_px=12, roll=1, scale=1 / 50),
        "alike": TinyTrunk(folder / "alike", size_px=8, roll=1, scale=1 / 70),
    }


@pytest.fixture
def old(trunks: dict[str, TinyTrunk]) -> TinyTrunk:
    """The trunk that is served first, with heads of seeds 1 and 2."""
    return trunks["old"]


@pytest.fixture
def larger(trunks: dict[str, TinyTrunk]) -> TinyTrunk:
    """Another, with pictures of another size."""
    return trunks["larger"]


@pytest.fixture
def fleet(tmp_path: Path, old: TinyTrunk) -> Iterator[LocalFleet]:
    """Two replicas, two versions of a task."""
    with LocalFleet(tmp_path, old.folder, replicas=2, hold_s=5.0) as fleet:
        for seed in (1, 2):
            fleet.must_push(old.bundle("colours", seed))
        yield fleet


@pytest.fixture
def client(fleet: LocalFleet) -> HttpClient:
    """The replica that is asked."""
    return HttpClient(fleet, "replica-1")


def change(fleet: LocalFleet, trunk: TinyTrunk, seed: int = 1) -> None:
    """Serve another trunk."""
    went_live(fleet.push_together(trunk.bundle("colours", seed), trunk=trunk.folder))


def went_live(outcome: Outcome) -> None:
    """Fail if it did not."""
    assert isinstance(outcome, Swapped), outcome


def ask(client: HttpClient, version: int | None = None, kind: str = "", **options: Any) -> Any:
    """Ask a version, or what is live, about the picture, at the old trunk's size."""
    body = {
        "": image(png_of(PICTURE)),
        ".pixels": tensor("pixels", "UINT8", PICTURE[None]),
        ".features": tensor("features", "FP32", np.ones((1, 3))),
    }[kind]
    number = "" if version is None else f"/versions/{version}"
    return client.post(f"{MODEL}{kind}{number}/infer", json=body, **options)


def check(response: Any, version: int, trunk: TinyTrunk, seed: int) -> None:
    """The answer is that of a version, and what numpy makes of that trunk and head."""
    scores = outputs(response)["scores"]["data"]
    assert response.json()["model_version"] == str(version)
    np.testing.assert_allclose(scores, trunk.scores(PICTURE, seed), atol=1e-5)


def states(client: HttpClient, model: str = "colours") -> dict[str, tuple[str, str]]:
    """State and reason of each version that the repository lists of a model."""
    listed = client.post("/v2/repository/index").json()
    return {e["version"]: (e["state"], e["reason"]) for e in listed if e["name"] == model}


def ask_while_held(
    fleet: LocalFleet, asks: list[Callable[[], Any]]
) -> tuple[list[threading.Thread], list[Any]]:
    """Let these be asked of replica-1 while the next change is held, and wait there."""
    found: list[Any] = [None] * len(asks)
    batcher = fleet.replicas["replica-1"].batcher

    def run(place: int) -> None:
        found[place] = asks[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(asks))]

    def start(record: Record) -> None:
        if record.kind == "commit":
            for thread in threads:
                thread.start()
            until(lambda: len(batcher._waiting) == len(asks))

    fleet.log.before_put = start
    return threads, found


def test_versions_of_another_trunk_are_unavailable_until_it_is_served_again(
    fleet: LocalFleet, client: HttpClient, old: TinyTrunk, larger: TinyTrunk
) -> None:
    """Listed with the reason, asked for with a clear 404; each answers by its own trunk alone."""
    check(ask(client, 1), 1, old, 1)
    change(fleet, larger)
    reason = f"Version 1 was made for trunk {old.manifest.digest}, and another is served."
    assert states(client) == {
        "1": ("UNAVAILABLE", reason),
        "2": ("UNAVAILABLE", reason.replace("Version 1", "Version 2")),
        "3": ("READY", ""),
    }
    assert client.get(MODEL).json()["versions"] == ["3"]
    for path in ("", "/ready", "/config", "/stats"):
        assert reason in error(client.get(f"{MODEL}/versions/1{path}"), 404)
    assert reason in error(ask(client, 1), 404)
    check(ask(client, 3), 3, larger, 1)
    went_live(fleet.roll_trunk_back())

    assert {version: state for version, (state, _) in states(client).items()} == {
        "1": "READY", "2": "READY", "3": "UNAVAILABLE", "4": "READY",
    }  # fmt: skip
    for version, seed in ((1, 1), (2, 2), (4, 2), (None, 2)):
        check(ask(client, version), version or 4, old, seed)
    assert "Version 3 was made for trunk" in error(ask(client, 3), 404)


@pytest.mark.parametrize("name", ["larger", "alike"])
def test_what_waits_for_a_version_hears_of_the_new_trunk(
    fleet: LocalFleet, client: HttpClient, trunks: dict[str, TinyTrunk], name: str
) -> None:
    """Live or older: no other version answers instead, and no other trunk runs it."""
    asks = [lambda: ask(client, 1), lambda: ask(client, 2), lambda: ask(client, 1, ".pixels")]
    threads, found = ask_while_held(fleet, asks)
    change(fleet, trunks[name])
    for thread in threads:
        thread.join(10)

    for response, version in zip(found, (1, 2, 1), strict=True):
        detail = error(response, 409)
        assert f"version {version} of 'colours' was made for the one before" in detail
    assert fleet.replicas["replica-1"].batcher._waiting == {}


def test_what_waits_for_no_version_is_answered_by_the_new_trunk(
    fleet: LocalFleet, client: HttpClient, larger: TinyTrunk
) -> None:
    """An encoded picture is decoded anew."""
    threads, found = ask_while_held(fleet, [lambda: ask(client)])
    change(fleet, larger)
    threads[0].join(10)

    check(found[0], 3, larger, 1)


def test_pixels_go_on_where_the_new_trunk_takes_their_size(
    fleet: LocalFleet, client: HttpClient, trunks: dict[str, TinyTrunk]
) -> None:
    """They are pictures as both take them."""
    threads, found = ask_while_held(fleet, [lambda: ask(client, kind=".pixels")])
    change(fleet, trunks["alike"])
    threads[0].join(10)

    check(found[0], 3, trunks["alike"], 1)


def test_pixels_of_another_size_are_refused_when_the_trunk_changes(
    fleet: LocalFleet, client: HttpClient, larger: TinyTrunk
) -> None:
    """With what to do: read the metadata again, which says the new size."""
    threads, found = ask_while_held(fleet, [lambda: ask(client, kind=".pixels")])
    change(fleet, larger)
    threads[0].join(10)

    detail = error(found[0], 409)
    assert "what it brings was made for the one before. Ask for the model's metadata" in detail
    assert client.get(f"{MODEL}.pixels").json()["inputs"][0]["shape"] == [-1, 12, 12, 3]


@pytest.mark.parametrize("name", ["larger", "alike"])
def test_features_never_meet_another_trunks_heads(
    fleet: LocalFleet, client: HttpClient, trunks: dict[str, TinyTrunk], name: str
) -> None:
    """Though they are as many numbers."""
    threads, found = ask_while_held(fleet, [lambda: ask(client, kind=".features")])
    change(fleet, trunks[name])
    threads[0].join(10)

    assert "what it brings was made for the one before" in error(found[0], 409)


def test_a_version_runs_beside_the_very_trunk_that_it_was_loaded_with(
    fleet: LocalFleet, old: TinyTrunk
) -> None:
    """A trunk that comes back has another memory for adapters, whatever its digest."""
    live = fleet.replicas["replica-1"].batcher.snapshot.heads["colours"]
    again = TrunkManifest.model_validate_json(old.manifest.model_dump_json())
    job = Job([PICTURE], ("colours",), version=VersionHead(live, old.manifest))

    assert job.fits(old.manifest)
    assert not job.fits(again)


def test_loaded_versions_are_dropped_with_their_trunk(
    fleet: LocalFleet, client: HttpClient, larger: TinyTrunk
) -> None:
    """What was loaded beside it is of no use to another, nor to the same one when it comes back."""
    replica = fleet.replicas["replica-1"]
    replica.trunks.served.loader._kept.clear()
    ask(client, 1)
    first = replica.trunks.served.older
    assert list(first._loaded) == [("colours", 1)]
    change(fleet, larger)
    went_live(fleet.roll_trunk_back())

    assert replica.trunks.served.older is not first
    assert not replica.trunks.served.older._loaded


@pytest.mark.parametrize("fails", [False, True])
def test_a_version_that_is_loaded_while_its_trunk_goes_is_of_the_one_before(
    fleet: LocalFleet,
    client: HttpClient,
    larger: TinyTrunk,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fails: bool,
) -> None:
    """Whether its loading ends well or breaks off as memory and files go."""
    replica = fleet.replicas["replica-1"]
    older, begun, goes_on = replica.trunks.served.older, threading.Event(), threading.Event()
    load = older._load

    def load_slowly(change: Any) -> LiveHead:
        begun.set()
        assert goes_on.wait(10)
        if fails:
            raise FileNotFoundError("the folder is gone")
        return load(change)

    monkeypatch.setattr(older, "_load", load_slowly)
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(ask(client, 1)))
    asking.start()
    assert begun.wait(5)
    change(fleet, larger)
    goes_on.set()
    asking.join(10)

    assert "made for the one before" in error(found[0], 409)


def test_a_version_for_a_trunk_that_is_not_served_is_not_loaded(
    fleet: LocalFleet, larger: TinyTrunk
) -> None:
    """The log was read before the change, and the version is asked for after it."""
    before = fleet.view()
    assert before.trunk is not None
    change(fleet, larger)
    asked = fleet.replicas["replica-1"].older(before.tasks["colours"][0], before.trunk)

    with pytest.raises(OtherTrunkError):
        asked.result(10)


def late_flip(fleet: LocalFleet, name: str) -> tuple[threading.Event, threading.Event]:
    """Let a replica flip only when it is told to, and say when it is about to."""
    replica, pause, arrived = fleet.replicas[name], threading.Event(), threading.Event()
    flip = replica.batcher.flip

    def flip_later(*now: Any) -> None:
        arrived.set()
        pause.wait(5)
        flip(*now)

    replica.batcher.flip = flip_later  # pyrefly: ignore
    return pause, arrived


def test_a_replica_that_is_about_to_change_answers_by_what_it_will_serve(
    fleet: LocalFleet, client: HttpClient, larger: TinyTrunk
) -> None:
    """A caller who has seen the new trunk elsewhere gets its metadata and its version here too."""
    pause, arrived = late_flip(fleet, "replica-1")
    pushing = fleet.start_pushes(larger.bundle("colours", 1), trunk=larger.folder)
    assert arrived.wait(10)
    other = HttpClient(fleet, "replica-2")
    until(lambda: other.get(MODEL).json()["versions"] == ["3"])
    check(ask(other, 3), 3, larger, 1)
    with ThreadPoolExecutor(2) as pool:
        described = pool.submit(client.get, f"{MODEL}.pixels")
        answered = pool.submit(ask, client, 3)
        time.sleep(0.3)
        assert not described.done()
        assert not answered.done()
        pause.set()
    about, answer = described.result().json(), answered.result()
    pushing.result(10)

    assert about["inputs"][0]["shape"] == [-1, 12, 12, 3]
    assert about["properties"]["trunk"] == larger.manifest.digest
    assert about["properties"]["bundle"] == larger.bundle("colours", 1).digest
    check(answer, 3, larger, 1)


def test_a_replica_that_does_not_come_to_the_trunk_of_the_log_says_so(
    tmp_path: Path, old: TinyTrunk, larger: TinyTrunk
) -> None:
    """503 at the caller's deadline, which a load generator and a client read as: later."""
    with LocalFleet(tmp_path, old.folder, replicas=2, request_timeout_s=0.3) as fleet:
        fleet.must_push(old.bundle("colours", 1))
        client = HttpClient(fleet, "replica-1")
        pause, arrived = late_flip(fleet, "replica-1")
        pushing = fleet.start_pushes(larger.bundle("colours", 1), trunk=larger.folder)
        assert arrived.wait(10)
        other = HttpClient(fleet, "replica-2")
        until(lambda: other.get(MODEL).json().get("versions") == ["2"])
        about, answer = client.get(MODEL), ask(client, 2)
        pause.set()
        pushing.result(10)

        for response in (about, answer):
            assert "No answer within 0.3 s" in error(response, 503)
            assert response.headers["retry-after"] == "1"
