"""Statistics of models over HTTP: the fleet's, of every way to ask, by model and version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads, some_picture
from tests.serve.test_http import png_of
from tests.serve.test_http_oip import error, features_of, image, tensor

STATS = "/v2/models/colours/stats"
TIMED = (
    "success",
    "fail",
    "queue",
    "compute_input",
    "compute_infer",
    "compute_output",
    "cache_hit",
    "cache_miss",
)


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas, two versions of a task, and another task."""
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


def infer(client: HttpClient, *seeds: int, model: str = "colours") -> None:
    """Ask about pictures."""
    body = image(*map(png_of, seeds))
    assert client.post(f"/v2/models/{model}/infer", json=body).status_code == 200


def stats(client: HttpClient, path: str = STATS) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries by model and version."""
    response = client.get(path)
    assert response.status_code == 200, response.text
    return {(entry["name"], entry["version"]): entry for entry in response.json()["model_stats"]}


def wait_for(told: Callable[[], object], expected: object) -> None:
    """Replicas report every second."""
    until(lambda: told() == expected)


def test_an_entry_has_every_field_of_the_extension(client: HttpClient) -> None:
    """Versions that nobody asked are listed with zeros."""
    entries = stats(client)

    assert list(entries) == [("colours", "1"), ("colours", "2")]
    for entry in entries.values():
        assert set(entry) == {
            "name", "version", "last_inference", "inference_count", "execution_count",
            "inference_stats", "response_stats", "batch_stats", "memory_usage",
        }  # fmt: skip
        assert entry["inference_stats"] == {name: {"count": 0, "ns": 0} for name in TIMED}
        assert (entry["inference_count"], entry["execution_count"]) == (0, 0)


def test_requests_to_all_replicas_are_counted_together(
    client: HttpClient, other: HttpClient, fleet: LocalFleet
) -> None:
    """Whichever replica is asked, and when one of them is gone."""
    infer(client, 0)
    infer(other, 0, 1, 2)
    infer(other, 0)
    for asked in (client, other):
        wait_for(lambda asked=asked: stats(asked)["colours", "2"]["inference_count"], 5)
    fleet.kill("replica-2")
    entry = stats(client)["colours", "2"]

    assert entry["inference_stats"]["success"]["count"] == 3
    assert entry["inference_count"] == 5
    assert 3 <= entry["execution_count"] <= 5
    assert entry["last_inference"] > 1_600_000_000_000


def test_times_add_up(client: HttpClient) -> None:
    """Waiting, decoding and running are the whole time of the answered requests."""
    for seed in range(4):
        infer(client, seed)
    wait_for(lambda: stats(client)["colours", "2"]["inference_stats"]["success"]["count"], 4)
    times = stats(client)["colours", "2"]["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")

    assert sum(times[part]["ns"] for part in parts) == times["success"]["ns"]
    assert all(times[part]["count"] == 4 for part in parts)
    assert times["compute_input"]["ns"] > 0
    assert times["compute_infer"]["ns"] > 0


def test_batches_are_counted_by_their_rows(client: HttpClient, fleet: LocalFleet) -> None:
    """Six requests that waited together are fewer runs than rows, which proves that they batch."""
    replica = fleet.replicas["replica-1"]
    replica.batcher.hold(frozenset({"colours"}))
    asked = [replica.ask([png_of(seed)], ("colours",), 1e9) for seed in range(6)]
    until(lambda: len(replica.batcher._waiting) == 6)
    replica.batcher.release()
    for future in asked:
        future.result(10)
    wait_for(lambda: stats(client)["colours", "2"]["inference_count"], 6)
    entry = stats(client)["colours", "2"]

    assert entry["execution_count"] < 6
    batches = {b["batch_size"]: b["compute_infer"]["count"] for b in entry["batch_stats"]}
    assert sum(size * count for size, count in batches.items()) == 6
    assert sum(batches.values()) == entry["execution_count"]


def test_rows_that_run_twice_count_once(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that starts anew between its batches: three were run, two rows were answered."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1, max_batch_pictures=1) as fleet:
        fleet.must_push(heads(1))
        client, replica = HttpClient(fleet, "replica-1"), fleet.replicas["replica-1"]
        run, runs = replica.engine.run, list[int]()

        def run_and_close(*given: Any) -> Any:
            runs.append(len(runs))
            if len(runs) == 1:
                replica.batcher.set_open(is_open=False)
                replica.batcher.set_open(is_open=True)
            return run(*given)

        monkeypatch.setattr(replica.engine, "run", run_and_close)
        infer(client, 0, 1)
        wait_for(lambda: stats(client)["colours", "1"]["inference_count"], 2)

        assert len(runs) == 3
        assert stats(client)["colours", "1"]["execution_count"] == 3


def test_every_way_to_ask_counts(client: HttpClient) -> None:
    """Its own model by what was sent, its own version by who answered, and several tasks each."""
    infer(client, 0)
    client.post("/predict/colours", content=png_of(0))
    client.post("/predict?tasks=colours,shapes", content=png_of(0))
    infer(client, 0, model="colours/versions/1")
    pixels = tensor("pixels", "UINT8", some_picture(0)[None])
    features = tensor("features", "FP32", features_of(0)[None])
    client.post("/v2/models/colours.pixels/infer", json=pixels)
    client.post("/v2/models/colours.features/infer", json=features)
    expected = {
        ("colours", "1"): 1,
        ("colours", "2"): 3,
        ("colours.features", "2"): 1,
        ("colours.pixels", "2"): 1,
        ("shapes", "1"): 1,
    }

    def rows() -> dict[tuple[str, str], int]:
        return {key: e["inference_count"] for key, e in stats(client, "/v2/models/stats").items()}

    wait_for(rows, expected)
    one = stats(client, "/v2/models/colours.pixels/versions/2/stats")
    assert list(one) == [("colours.pixels", "2")]
    assert one["colours.pixels", "2"]["inference_count"] == 1


def test_requests_without_an_answer_are_failures(client: HttpClient) -> None:
    """Of the version that would have answered; they count no rows."""
    client.post("/v2/models/colours/infer", json=image(b"no picture"))
    client.post("/predict/colours", content=b"no picture")
    wait_for(lambda: stats(client)["colours", "2"]["inference_stats"]["fail"]["count"], 2)
    entry = stats(client)["colours", "2"]

    assert entry["inference_stats"]["success"]["count"] == 0
    assert entry["inference_count"] == 0


def test_a_restarted_conductor_learns_all_counts_again(
    client: HttpClient, fleet: LocalFleet
) -> None:
    """Of the replicas that live, also of models that nobody asks any more."""
    infer(client, 0)
    wait_for(lambda: stats(client)["colours", "2"]["inference_count"], 1)
    fleet.start_conductor()

    wait_for(lambda: stats(client)["colours", "2"]["inference_count"], 1)


def test_what_is_unknown_has_no_statistics(client: HttpClient) -> None:
    """Models and versions."""
    assert error(client.get("/v2/models/color/stats"), 404).startswith("Request for unknown model")
    assert "no version 3" in error(client.get("/v2/models/colours/versions/3/stats"), 404)


def test_without_a_conductor_there_are_none_now(client: HttpClient, fleet: LocalFleet) -> None:
    """503; they are the fleet's or nothing."""
    fleet.crash_conductor()
    for path in (STATS, "/v2/models/stats"):
        response = client.get(path)
        assert error(response, 503)
        assert response.headers["retry-after"] == "1"


def test_candidates_are_not_blamed_for_features_that_no_head_can_take(
    client: HttpClient, fleet: LocalFleet, heads: Heads
) -> None:
    """Else any caller could end a rollout."""
    fleet.must_push(heads(9), share=0.999)
    huge = tensor("features", "FP32", np.full((1, 3), 3e38))
    for _ in range(3):
        assert client.post("/v2/models/colours.features/infer", json=huge).status_code == 400

    trials = fleet.replicas["replica-1"].batcher.comparisons.trials
    assert all(trial.failed == 0 for _, trial in trials.values())
