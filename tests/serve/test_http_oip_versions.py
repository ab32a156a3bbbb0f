"""Versions by number: the last five of a task answer, whatever is live, and nothing is mixed up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.jobs import Job
from serve.messages import Change
from serve.record import Record, TaskChange
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Crowd, Heads, expected_scores, judge, some_picture
from tests.serve.specialised import SpecialisedTrunk, some_pictures
from tests.serve.test_http import png_of, problem
from tests.serve.test_http_oip import error, image, outputs, tensor

MODEL = "/v2/models/colours"


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas, and seven versions of a task: the heads of seeds 1 to 7."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2) as fleet:
        for seed in range(1, 8):
            assert fleet.must_push(heads(seed)) == seed
        yield fleet


@pytest.fixture
def client(fleet: LocalFleet) -> HttpClient:
    """The replica that is asked."""
    return HttpClient(fleet, "replica-1")


def ask(client: HttpClient, version: int | None, seed: int = 0) -> Any:
    """Ask a version, or what is live."""
    path = MODEL if version is None else f"{MODEL}/versions/{version}"
    return client.post(f"{path}/infer", json=image(png_of(seed)))


def scores(response: Any) -> NDArray[np.float64]:
    """The scores of the one row."""
    return np.array(outputs(response)["scores"]["data"])


def retire(fleet: LocalFleet, key: str = "end") -> None:
    """Retire the task."""
    change = Change("colours", key, retires=True)
    fleet.ask(lambda conductor: conductor.change(change)).result(10)


@pytest.mark.parametrize("name", ["replica-1", "replica-2"])
def test_the_last_five_versions_answer_as_they_did(fleet: LocalFleet, name: str) -> None:
    """Each by its own head, and each says which it is."""
    client = HttpClient(fleet, name)
    for version in (3, 4, 5, 6, 7):
        response = ask(client, version)
        assert response.json()["model_version"] == str(version)
        assert response.headers["x-headstock-version"] == str(version)
        np.testing.assert_allclose(
            scores(response), expected_scores(some_picture(0), version), atol=1e-5
        )
    assert ask(client, None).json()["model_version"] == "7"


def test_older_and_later_versions_are_not_found(client: HttpClient) -> None:
    """With those that there are."""
    for version in (1, 2, 8, 0):
        detail = error(ask(client, version), 404)
        assert f"'colours' has no version {version} that answers; it has 3, 4, 5, 6, 7" in detail
    for path in ("", "/ready", "/config"):
        error(client.get(f"{MODEL}/versions/2{path}"), 404)
        assert client.get(f"{MODEL}/versions/3{path}").status_code == 200


@pytest.mark.parametrize("version", ["x", "-1", "1.0", "9" * 5000, "٣"])
def test_a_version_that_is_no_number_is_malformed(client: HttpClient, version: str) -> None:
    """400, whatever is asked about it."""
    assert "versions are whole numbers" in error(client.get(f"{MODEL}/versions/{version}"), 400)
    response = client.post(f"{MODEL}/versions/{version}/infer", json=image(png_of(0)))
    assert "versions are whole numbers" in error(response, 400)


def test_metadata_lists_the_versions_and_describes_each(client: HttpClient, heads: Heads) -> None:
    """Whose bundle it is."""
    assert client.get(MODEL).json()["versions"] == ["3", "4", "5", "6", "7"]
    for version in (3, 7):
        about = client.get(f"{MODEL}/versions/{version}").json()
        assert about["properties"]["bundle"] == heads(version).digest
    assert client.get(f"{MODEL}.features").json()["versions"] == ["7"]


def test_pixels_have_the_versions_too_and_features_the_live_one(client: HttpClient) -> None:
    """What an older version takes is not in the log, so of features only the live one answers."""
    pixels = tensor("pixels", "UINT8", some_picture(0)[None])
    features = tensor("features", "FP32", np.zeros((1, 3)))
    found = client.post(f"{MODEL}.pixels/versions/4/infer", json=pixels)

    np.testing.assert_allclose(scores(found), expected_scores(some_picture(0), 4), atol=1e-5)
    old = client.post(f"{MODEL}.features/versions/4/infer", json=features)
    assert "'colours.features' has no version 4" in error(old, 404)
    live = client.post(f"{MODEL}.features/versions/7/infer", json=features)
    assert live.json()["model_version"] == "7"


def test_a_rollback_is_a_version_of_its_own(client: HttpClient, fleet: LocalFleet) -> None:
    """With the older one's head, which answers as itself too."""
    fleet.roll_back("colours", key="back", to=5)

    assert client.get(MODEL).json()["versions"] == ["4", "5", "6", "7", "8"]
    for version, seed in ((8, 5), (5, 5), (7, 7)):
        response = ask(client, version)
        assert response.json()["model_version"] == str(version)
        np.testing.assert_allclose(
            scores(response), expected_scores(some_picture(0), seed), atol=1e-5
        )


def test_a_rollouts_two_sides_are_one_version(
    client: HttpClient, fleet: LocalFleet, heads: Heads
) -> None:
    """While it runs both answer as it; once it is over, the one that stood beside the candidate."""
    fleet.must_push(heads(9), share=0.5)
    seen = {}
    for seed in range(12):
        response = ask(client, 8, seed)
        body = response.json()
        assert body["model_version"] == "8"
        seen.setdefault(body["parameters"]["bundle"], []).append((seed, scores(response)))
    fleet.promote("colours", key="go")
    after = [ask(client, 8, seed).json()["parameters"]["bundle"] for seed in range(12)]

    assert set(seen) == {heads(7).digest, heads(9).digest}
    for digest, side in ((heads(7).digest, 7), (heads(9).digest, 9)):
        for seed, found in seen[digest]:
            np.testing.assert_allclose(found, expected_scores(some_picture(seed), side), atol=1e-5)
    assert set(after) == {heads(7).digest}
    assert ask(client, None).json()["parameters"]["bundle"] == heads(9).digest


def test_a_retired_task_answers_as_no_version(client: HttpClient, fleet: LocalFleet) -> None:
    """Until a push brings it back, with the versions that it had before."""
    retire(fleet)
    for version in (None, 6, 7, 8):
        assert "was retired by its version 8" in error(ask(client, version), 404)
    assert client.get(f"{MODEL}/ready").status_code == 404
    fleet.roll_back("colours", key="back")

    assert client.get(MODEL).json()["versions"] == ["4", "5", "6", "7", "9"]
    for version, seed in ((9, 7), (6, 6)):
        np.testing.assert_allclose(
            scores(ask(client, version)), expected_scores(some_picture(0), seed), atol=1e-5
        )
    assert "has no version 8" in error(ask(client, 8), 404)


def test_what_waits_for_an_older_version_hears_of_the_retirement(fleet: LocalFleet) -> None:
    """No answer is given after it, by any version."""
    replica = fleet.replicas["replica-1"]
    log = fleet.view()
    assert log.trunk is not None
    older = replica.older(log.tasks["colours"][4], log.trunk).result(10)
    replica.batcher.hold(frozenset({"colours"}))
    waiting = Job([some_picture(0)], ("colours",), version=older)
    replica.batcher.submit(waiting)
    retire(fleet)

    with pytest.raises(Exception, match="was retired by its version 8"):
        waiting.done.result(5)


def test_a_number_that_becomes_old_meanwhile_is_still_answered_by_its_head(
    fleet: LocalFleet, client: HttpClient, heads: Heads
) -> None:
    """Asked for as the live version, queued, and overtaken by a push."""
    found: list[Any] = []
    batcher = fleet.replicas["replica-1"].batcher
    batcher.hold(frozenset({"colours"}))
    asking = threading.Thread(target=lambda: found.append(ask(client, 7)))
    asking.start()
    until(lambda: len(batcher._waiting) == 1)
    fleet.must_push(heads(8))
    asking.join(10)

    assert found[0].json()["model_version"] == "7"
    np.testing.assert_allclose(scores(found[0]), expected_scores(some_picture(0), 7), atol=1e-5)


def test_a_version_that_another_replica_answers_by_is_known_to_all(
    fleet: LocalFleet, heads: Heads
) -> None:
    """A caller who has seen it gets it from a replica that is about to follow."""
    late, quick = (HttpClient(fleet, name) for name in ("replica-1", "replica-2"))
    replica, pause = fleet.replicas["replica-1"], threading.Event()
    flip = replica.watcher._flip

    def flip_later(number: int, record: Record) -> None:
        assert pause.wait(10)
        flip(number, record)

    replica.watcher._flip = flip_later  # pyrefly: ignore
    pushing = fleet.start_push(heads(8))
    until(lambda: fleet.replicas["replica-2"].batcher.snapshot.heads["colours"].version == 8)
    assert ask(quick, 8).json()["model_version"] == "8"
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, late, 8)
        until(lambda: asking.done() or len(replica.batcher._waiting) == 1)
        assert replica.watcher.view.tasks["colours"][-1].change.version == 7
        pause.set()
    answer = asking.result()
    pushing.result(10)

    assert answer.json()["model_version"] == "8"
    np.testing.assert_allclose(scores(answer), expected_scores(some_picture(0), 8), atol=1e-5)


def test_older_versions_are_loaded_once_and_beside_the_live_path(
    fleet: LocalFleet, client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is fetched, what is live answers as if nothing were."""
    replica = fleet.replicas["replica-1"]
    replica.trunks.served.loader._kept.clear()
    loads: list[str] = []
    begun, fetched = threading.Event(), threading.Event()
    fetch = replica.log.get_served

    def fetch_slowly(digest: str) -> Any:
        loads.append(digest)
        begun.set()
        assert fetched.wait(10)
        return fetch(digest)

    monkeypatch.setattr(replica.log, "get_served", fetch_slowly)
    found: list[Any] = []
    asking = [
        threading.Thread(target=lambda: found.append(ask(client, 5).json()["model_version"]))
        for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    assert begun.wait(5)
    live = [ask(client, None).json()["model_version"] for _ in range(5)]
    assert not found
    fetched.set()
    for thread in asking:
        thread.join(10)

    assert live == ["7"] * 5
    assert found == ["5"] * 3
    assert len(loads) == 1


def test_a_version_whose_bundle_takes_too_long_is_late(
    fleet: LocalFleet, client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 at the caller's deadline; the next one that asks finds it loaded."""
    replica = fleet.replicas["replica-1"]
    replica.trunks.served.loader._kept.clear()
    older = replica.trunks.served.older
    load = older._load

    def load_slowly(change: TaskChange) -> Any:
        time.sleep(0.4)
        return load(change)

    monkeypatch.setattr(older, "_load", load_slowly)
    body, soon = image(png_of(0)), {"x-headstock-timeout-ms": "100"}
    late = client.post(f"{MODEL}/versions/4/infer", json=body, headers=soon)

    assert "No answer within 0.1 s" in error(late, 503)
    until(lambda: ("colours", 4) in older._loaded)
    assert ask(client, 4).json()["model_version"] == "4"


def test_swaps_go_on_while_older_versions_are_asked(fleet: LocalFleet, heads: Heads) -> None:
    """Callers of what is live never see an older version, callers of a number only that."""
    clients = [HttpClient(fleet, name) for name in ("replica-1", "replica-2")]
    stop = threading.Event()
    found: list[tuple[str, NDArray[np.float64]]] = []
    failures: list[Any] = []

    def keep_asking(place: int) -> None:
        while not stop.is_set():
            response = ask(clients[place], 7)
            if response.status_code != 200:
                failures.append(response.text)
                return
            found.append((response.json()["model_version"], scores(response)))

    threads = [threading.Thread(target=keep_asking, args=(place,)) for place in (0, 1)]
    with Crowd(fleet, (("colours",),)) as crowd:
        for thread in threads:
            thread.start()
        for seed in (8, 9, 10, 11):
            crowd.wait_for(10)
            fleet.must_push(heads(seed))
        crowd.wait_for(10)
        stop.set()
        for thread in threads:
            thread.join(10)
        log = fleet.view()

    assert failures == []
    assert judge(crowd.seen, log, heads.seeds) == []
    assert {version for version, _ in found} == {"7"}
    truth = expected_scores(some_picture(0), 7)
    for _, mine in found:
        np.testing.assert_allclose(mine, truth, atol=1e-5)


def test_an_older_adapter_of_a_pinned_task_leaves_memory_like_others(
    tmp_path: Path, small_trunk: SpecialisedTrunk
) -> None:
    """It answers, though memory holds but one beside what is pinned; the pinned one stays."""
    shapes = small_trunk.engine().families["scale_shift"].slot_shapes(0).values()
    slot_bytes = sum(4 * int(np.prod(shape)) for shape in shapes)
    made = [small_trunk.with_adapter("hats", "ssf", seed) for seed in (1, 2, 3)]
    pictures = some_pictures(1, seed=5)
    pixels = tensor("pixels", "UINT8", pictures)
    settings = {"adapter_memory_bytes": 2 * slot_bytes}
    with LocalFleet(tmp_path, small_trunk.folder, replicas=1, **settings) as fleet:
        for specialised in made:
            fleet.must_push(specialised.bundle)
        fleet.set_task("hats", pinned=True)
        replica = fleet.replicas["replica-1"]
        replica.trunks.served.loader._kept.clear()
        client = HttpClient(fleet, "replica-1")
        for version in (1, 2, 1, 2, 3):
            path = f"/v2/models/hats.pixels/versions/{version}/infer"
            np.testing.assert_allclose(
                scores(client.post(path, json=pixels)),
                made[version - 1].truth(pictures)[0],
                atol=1e-5,
            )
        live = replica.batcher.snapshot.heads["hats"].adapter
        assert live is not None
        assert live.slot is not None


def test_problems_of_predict_stay_problems(client: HttpClient) -> None:
    """The other surface knows no versions by path."""
    assert "/predict/colours/versions/3" in problem(
        client.post("/predict/colours/versions/3", content=png_of(0)), 404
    )
