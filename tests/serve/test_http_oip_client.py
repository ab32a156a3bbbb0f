"""NVIDIA's own clients, synchronous and asynchronous, drive the service through a socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from tritonclient import http as triton
from tritonclient.http import aio as triton_aio
from tritonclient.utils import InferenceServerException

from export.bundle import Bundle
from serve.http.routes import http_app
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads, expected_scores, some_picture
from tests.serve.test_http import png_of
from tests.serve.test_http_oip import LABELS, features_of

COMPRESSIONS = [None, "gzip", "deflate"]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[LocalFleet]:
    """One replica with two versions of a task, and one task to unload."""
    heads = Heads(make_bundle)
    with LocalFleet(tmp_path_factory.mktemp("store"), trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2))
        fleet.must_push(heads(3, "shapes"))
        yield fleet


@pytest.fixture(scope="module")
def door(fleet: LocalFleet) -> Iterator[str]:
    """Where it answers: a port of loopback."""
    app = http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as front:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [front]})
        thread.start()
        until(lambda: server.started)
        yield f"127.0.0.1:{front.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def client(door: str) -> Iterator[Any]:
    """The synchronous client."""
    with triton.InferenceServerClient(door) as client:
        yield client


def image_input(*seeds: int, is_raw: bool = True) -> Any:
    """Encoded pictures as the client's tensor."""
    given = triton.InferInput("image", [len(seeds)], "BYTES")
    pictures = np.array([png_of(seed) for seed in seeds], dtype=object)
    given.set_data_from_numpy(pictures, binary_data=is_raw)
    return given


def array_input(name: str, datatype: str, array: np.ndarray, *, is_raw: bool = True) -> Any:
    """An array as the client's tensor."""
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=is_raw)
    return given


def truth(*seeds: int, head: int = 2) -> np.ndarray:
    """The scores of the oracle's noise."""
    return np.stack([expected_scores(some_picture(seed), head) for seed in seeds])


def test_health_and_metadata_are_read(client: Any) -> None:
    """Every question that the client has about server and models."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("color")
    assert not client.is_model_ready("colours", "3")
    assert client.get_server_metadata()["name"] == "headstock"
    assert client.get_model_metadata("colours")["versions"] == ["1", "2"]
    assert client.get_model_metadata("colours", "1")["inputs"][0]["name"] == "image"
    assert client.get_model_config("colours.pixels")["max_batch_size"] == 64


@pytest.mark.parametrize("request_by", COMPRESSIONS)
@pytest.mark.parametrize("response_by", COMPRESSIONS)
def test_pictures_are_answered(
    client: Any, request_by: str | None, response_by: str | None
) -> None:
    """Raw in both directions, which is what the client does by itself; compressed or not."""
    found = client.infer(
        "colours",
        [image_input(0, 1)],
        request_id="r",
        request_compression_algorithm=request_by,
        response_compression_algorithm=response_by,
    )

    np.testing.assert_allclose(found.as_numpy("scores"), truth(0, 1), atol=1e-5)
    assert [text.decode() for text in found.as_numpy("label")] == [
        LABELS[place] for place in truth(0, 1).argmax(axis=1)
    ]
    response = found.get_response()
    assert (response["model_name"], response["model_version"]) == ("colours", "2")
    assert response["id"] == "r"


@pytest.mark.parametrize("is_raw", [True, False])
def test_arrays_are_answered(client: Any, *, is_raw: bool) -> None:
    """Pixels and features, raw and as JSON."""
    pixels = array_input("pixels", "UINT8", np.stack([some_picture(0)]), is_raw=is_raw)
    features = features_of(0)[None].astype(np.float32)
    sent = {
        "colours.pixels": pixels,
        "colours.features": array_input("features", "FP32", features, is_raw=is_raw),
    }
    for model, given in sent.items():
        found = client.infer(model, [given])
        np.testing.assert_allclose(found.as_numpy("scores"), truth(0), atol=1e-5)


@pytest.mark.parametrize("is_raw", [True, False])
def test_outputs_are_picked(client: Any, *, is_raw: bool) -> None:
    """By name, raw or not, and as classes."""
    wanted = [
        triton.InferRequestedOutput("label", binary_data=is_raw),
        triton.InferRequestedOutput("scores", binary_data=is_raw, class_count=2),
    ]
    found = client.infer("colours", [image_input(0)], outputs=wanted)
    order = np.argsort(-truth(0)[0])

    label = found.as_numpy("label")[0]
    assert (label.decode() if is_raw else label) == LABELS[order[0]]
    classes = [c.decode() if is_raw else c for c in found.as_numpy("scores")[0]]
    assert [text.split(":")[2] for text in classes] == [LABELS[place] for place in order[:2]]


def test_versions_are_answered(client: Any) -> None:
    """Each by its own head."""
    for version in (1, 2):
        found = client.infer("colours", [image_input(0)], model_version=str(version))
        np.testing.assert_allclose(found.as_numpy("scores"), truth(0, head=version), atol=1e-5)


def test_many_requests_at_once_are_answered(client: Any, door: str) -> None:
    """The client's own way to ask asynchronously."""
    del client
    with triton.InferenceServerClient(door, concurrency=4) as many:
        asked = [many.async_infer("colours", [image_input(seed)]) for seed in range(8)]
        found = [request.get_result().as_numpy("scores") for request in asked]

    np.testing.assert_allclose(np.concatenate(found), truth(*range(8)), atol=1e-5)


def test_errors_are_read(client: Any) -> None:
    """The client shows our sentence and not that it could not read it."""
    with pytest.raises(InferenceServerException, match="Request for unknown model: There is no"):
        client.infer("color", [image_input(0)])
    with pytest.raises(InferenceServerException, match="expected one, 'image'"):
        client.infer("colours", [array_input("x", "FP32", np.zeros((1, 1), np.float32))])
    with pytest.raises(InferenceServerException, match="There is nothing at /v2/logging"):
        client.get_log_settings()
    with pytest.raises(InferenceServerException, match="'config' is not accepted"):
        client.load_model("shapes", config="{}")


def test_the_repository_is_driven(client: Any) -> None:
    """Listed, unloaded and loaded again."""
    names = {entry["name"] for entry in client.get_model_repository_index()}
    assert {"colours", "colours.pixels", "colours.features", "shapes"} <= names
    client.unload_model("shapes")
    assert not client.is_model_ready("shapes")
    client.load_model("shapes")
    assert client.is_model_ready("shapes")


def test_a_load_generator_finds_what_it_measures_by(client: Any) -> None:
    """The largest batch in the configuration, and statistics before and after its window."""

    def counted() -> dict[str, Any]:
        (entry,) = client.get_inference_statistics("colours.pixels", "1")["model_stats"]
        return {**entry, **entry["inference_stats"]}

    most = client.get_model_config("colours.pixels")["max_batch_size"]
    shape = client.get_model_metadata("colours.pixels")["inputs"][0]["shape"]
    before = counted()  # no other test asks this version, whose counts could come late
    batch = np.zeros((most, *shape[1:]), np.uint8)
    for _ in range(3):
        given = array_input("pixels", "UINT8", batch)
        client.infer("colours.pixels", [given], model_version="1")
    until(lambda: counted()["success"]["count"] == before["success"]["count"] + 3)
    until(lambda: counted()["inference_count"] == before["inference_count"] + 3 * most)
    after = counted()

    assert after["execution_count"] > before["execution_count"]
    for part in ("success", "queue", "compute_infer"):
        assert after[part]["ns"] > before[part]["ns"]
    every = client.get_inference_statistics()["model_stats"]
    assert ("colours.pixels", "1") in {(entry["name"], entry["version"]) for entry in every}


def test_the_asynchronous_client_does_the_same(door: str) -> None:
    """It says that it takes gzip and brotli, and reads all but inference as it is."""

    async def drive() -> None:
        async with triton_aio.InferenceServerClient(door) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("colours", "1")
            assert (await client.get_server_metadata())["extensions"]
            assert (await client.get_model_metadata("colours"))["name"] == "colours"
            assert (await client.get_model_config("colours"))["name"] == "colours"
            assert await client.get_model_repository_index()
            for by in COMPRESSIONS:
                found = await client.infer(
                    "colours",
                    [image_input(0)],
                    request_compression_algorithm=by,
                    response_compression_algorithm=by,
                )
                np.testing.assert_allclose(found.as_numpy("scores"), truth(0), atol=1e-5)
            await client.unload_model("shapes")
            assert not await client.is_model_ready("shapes")
            await client.load_model("shapes")
            with pytest.raises(InferenceServerException, match="Request for unknown model"):
                await client.infer("color", [image_input(0)])

    asyncio.run(drive())


def test_the_socket_says_what_the_client_in_memory_reads(fleet: LocalFleet, client: Any) -> None:
    """Nothing is lost on the way."""
    told = HttpClient(fleet, "replica-1").get("/v2/models/colours").json()

    assert client.get_model_metadata("colours") == told
