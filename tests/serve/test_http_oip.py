"""The Open Inference Protocol in JSON: what there is to ask, and asking it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle import Bundle, TrunkManifest
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import SIZE_PX, Heads, expected_scores, some_picture
from tests.serve.specialised import SpecialisedTrunk
from tests.serve.test_http import MAX_BODY, encoded, plain, png_header, png_of

INFER = "/v2/models/colours/infer"
LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[HttpClient]:
    """One replica with two tasks: colours with seed 1, shapes with seed 2."""
    heads = Heads(make_bundle)
    settings = {"max_body_bytes": MAX_BODY, "max_pictures": 3, "max_picture_pixels": 1_000_000}
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, **settings) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield HttpClient(fleet, "replica-1")


def error(response: httpx.Response, status: int) -> str:
    """The text of an error, which every one within /v2 has to have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def base64_of(data: bytes) -> str:
    """A picture as JSON carries it."""
    return base64.b64encode(data).decode()


def image(*pictures: bytes, **fields: Any) -> dict[str, Any]:
    """A request about encoded pictures."""
    data = [base64_of(picture) for picture in pictures]
    tensor = {"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}
    return {"inputs": [tensor], **fields}


def tensor(name: str, datatype: str, array: np.ndarray, **fields: Any) -> dict[str, Any]:
    """A request about an array."""
    given = {"name": name, "datatype": datatype, "shape": list(array.shape)}
    return {"inputs": [{**given, "data": array.tolist()}], **fields}


def features_of(seed: int) -> np.ndarray:
    """What the tiny trunk makes of a picture: the mean of each channel, by numpy."""
    return some_picture(seed).reshape(-1, 3).mean(axis=0, dtype=np.float64) / 255


def outputs(response: httpx.Response) -> dict[str, dict[str, Any]]:
    """The outputs of an answer by name."""
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def test_health_says_so(client: HttpClient) -> None:
    """200 with a body that reads as JSON."""
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_the_server_names_its_extensions(client: HttpClient) -> None:
    """All three fields that the protocol requires."""
    about = client.get("/v2").json()

    assert about["name"] == "headstock"
    assert about["version"]
    assert {
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "model_repository(unload_dependents)",
        "statistics",
    } == set(about["extensions"])


INPUTS = {
    "colours": {"name": "image", "datatype": "BYTES", "shape": [-1]},
    "colours.pixels": {"name": "pixels", "datatype": "UINT8", "shape": [-1, SIZE_PX, SIZE_PX, 3]},
    "colours.features": {"name": "features", "datatype": "FP32", "shape": [-1, 3]},
}


@pytest.mark.parametrize("model", INPUTS)
def test_metadata_names_what_a_model_takes_and_gives(
    client: HttpClient, model: str, heads: Heads, trunk_manifest: TrunkManifest
) -> None:
    """One input, two outputs, and which bundle is behind them."""
    assert client.get(f"/v2/models/{model}").json() == {
        "name": model,
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [INPUTS[model]],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ],
        "properties": {"bundle": heads(1).digest, "trunk": trunk_manifest.digest},
    }


@pytest.mark.parametrize("model", INPUTS)
def test_the_configuration_says_how_large_a_batch_may_be(client: HttpClient, model: str) -> None:
    """Which load generators read; its shapes are the metadata's without the batch."""
    config = client.get(f"/v2/models/{model}/versions/1/config").json()
    about = client.get(f"/v2/models/{model}/versions/1").json()

    assert config["name"] == model
    assert config["max_batch_size"] == 3
    for config_side, side in (("input", "inputs"), ("output", "outputs")):
        for configured, described in zip(config[config_side], about[side], strict=True):
            assert configured["name"] == described["name"]
            assert configured["dims"] == described["shape"][1:]
            assert configured["data_type"] in {"TYPE_STRING", "TYPE_UINT8", "TYPE_FP32"}


@pytest.mark.parametrize("model", INPUTS)
def test_a_model_that_answers_is_ready(client: HttpClient, model: str) -> None:
    """By its name alone, and by its version."""
    for path in (f"/v2/models/{model}/ready", f"/v2/models/{model}/versions/1/ready"):
        response = client.get(path)
        assert response.status_code == 200
        assert response.json() == {"name": model, "ready": True}


def test_an_answer_is_that_of_predict(client: HttpClient) -> None:
    """The same scores to the last bit, by the same version and bundle."""
    direct = client.post("/predict/colours", content=png_of(0))
    response = client.post(INFER, json=image(png_of(0)))
    body, found = response.json(), outputs(response)

    assert (body["model_name"], body["model_version"]) == ("colours", "1")
    assert body["parameters"] == {"bundle": direct.json()["bundle"]}
    assert found["scores"]["shape"] == [1, 3]
    assert found["scores"]["datatype"] == "FP32"
    assert dict(zip(LABELS, found["scores"]["data"], strict=True)) == direct.json()["scores"]
    assert found["label"] == {
        "name": "label",
        "shape": [1],
        "datatype": "BYTES",
        "data": [direct.json()["label"]],
    }
    for header in ("x-headstock-version", "x-headstock-bundle"):
        assert response.headers[header] == direct.headers[header]


def test_rows_are_answered_in_their_order(client: HttpClient) -> None:
    """As if each were asked alone, flat and row by row."""
    found = outputs(client.post(INFER, json=image(png_of(3), png_of(1), png_of(2))))
    expected = [expected_scores(some_picture(seed), 1) for seed in (3, 1, 2)]

    assert found["scores"]["shape"] == [3, 3]
    np.testing.assert_allclose(found["scores"]["data"], np.ravel(expected), atol=1e-5)
    assert found["label"]["data"] == [LABELS[int(np.argmax(row))] for row in expected]


def test_a_column_of_pictures_is_taken_too(client: HttpClient) -> None:
    """Shape [rows, 1], nested or flat, as some clients send texts."""
    column = image(png_of(0), png_of(1))
    column["inputs"][0]["shape"] = [2, 1]
    nested = json.loads(json.dumps(column))
    nested["inputs"][0]["data"] = [[text] for text in column["inputs"][0]["data"]]
    plain_row = outputs(client.post(INFER, json=image(png_of(0), png_of(1))))

    assert outputs(client.post(INFER, json=column)) == plain_row
    assert outputs(client.post(INFER, json=nested)) == plain_row


@pytest.mark.parametrize("is_flat", [True, False])
def test_pixels_and_features_skip_what_came_before_them(
    client: HttpClient, *, is_flat: bool
) -> None:
    """The picture as the trunk takes it, and what the trunk makes of it, give its scores."""
    pixels = tensor("pixels", "UINT8", np.stack([some_picture(0), some_picture(1)]))
    features = tensor("features", "FP32", np.stack([features_of(0), features_of(1)]))
    expected = [expected_scores(some_picture(seed), 1) for seed in (0, 1)]
    for kind, request in (("pixels", pixels), ("features", features)):
        if is_flat:
            given = request["inputs"][0]
            given["data"] = np.ravel(given["data"]).tolist()
        response = client.post(f"/v2/models/colours.{kind}/infer", json=request)
        found = outputs(response)["scores"]

        assert response.json()["model_name"] == f"colours.{kind}"
        np.testing.assert_allclose(found["data"], np.ravel(expected), atol=1e-5)


def test_the_id_comes_back(client: HttpClient) -> None:
    """And none comes if none was given."""
    assert client.post(INFER, json=image(png_of(0), id="a-1")).json()["id"] == "a-1"
    assert "id" not in client.post(INFER, json=image(png_of(0))).json()


@pytest.mark.parametrize("names", [["label"], ["scores"], ["label", "scores"]])
def test_outputs_that_are_named_come_in_that_order(client: HttpClient, names: list[str]) -> None:
    """And no others."""
    request = image(png_of(0), outputs=[{"name": name} for name in names])

    assert list(outputs(client.post(INFER, json=request))) == names


@pytest.mark.parametrize("most", [1, 2, 3, 99])
def test_classification_gives_the_best_classes(client: HttpClient, most: int) -> None:
    """`score:index:label`, best first; more than there are is all of them."""
    wanted = [{"name": "scores", "parameters": {"classification": most}}]
    found = outputs(client.post(INFER, json=image(png_of(0), png_of(1), outputs=wanted)))
    rows = [expected_scores(some_picture(seed), 1) for seed in (0, 1)]
    order = [sorted(range(3), key=lambda place, row=row: -row[place])[:most] for row in rows]

    assert found["scores"]["datatype"] == "BYTES"
    assert found["scores"]["shape"] == [2, min(most, 3)]
    told = [text.split(":") for text in found["scores"]["data"]]
    assert [(int(place), label) for _, place, label in told] == [
        (place, LABELS[place]) for places in order for place in places
    ]
    np.testing.assert_allclose(
        [float(value) for value, _, _ in told],
        [row[place] for row, places in zip(rows, order, strict=True) for place in places],
        atol=2e-6,  # six decimals are written
    )


def test_equal_classes_come_in_the_order_of_the_labels(client: HttpClient) -> None:
    """Features of nothing have the same score for each, as these heads have no bias."""
    wanted = [{"name": "scores", "parameters": {"classification": 2}}]
    nothing = tensor("features", "FP32", np.zeros((1, 3)), outputs=wanted)
    best = outputs(client.post("/v2/models/colours.features/infer", json=nothing))["scores"]

    assert best["data"] == ["0.333333:0:red", "0.333333:1:green"]


def test_what_a_client_leaves_empty_counts_as_not_said(client: HttpClient) -> None:
    """Null for every optional field, parameters of extensions, and names nobody knows."""
    request = image(png_of(0), id=None, parameters=None, outputs=None, model_name="colours")
    request["inputs"][0]["parameters"] = {"content_type": "base64", "headers": None}
    more = image(png_of(0), parameters={"sequence_id": 0, "priority": 1, "mine": "x"})

    assert list(outputs(client.post(INFER, json=request))) == ["scores", "label"]
    assert list(outputs(client.post(INFER, json=more))) == ["scores", "label"]


def changed(**fields: Any) -> dict[str, Any]:
    """A good request with other fields in its input."""
    request = image(png_of(0))
    request["inputs"][0].update(fields)
    return {**request, "inputs": [{k: v for k, v in request["inputs"][0].items() if v != "gone"}]}


GOOD = image(png_of(0))
MALFORMED: dict[str, tuple[Any, str]] = {
    "no object": ([], "the request is []"),
    "no inputs": ({}, "inputs is {}: Field required"),
    "empty inputs": ({"inputs": []}, "The inputs are []; expected one, 'image'"),
    "two inputs": ({"inputs": GOOD["inputs"] * 2}, "expected one, 'image'"),
    "another input": (changed(name="picture"), "expected one, 'image'"),
    "another datatype": (changed(datatype="UINT8"), "'UINT8'; expected BYTES"),
    "no data": (changed(data="gone"), "needs either data or the parameter binary_data_size"),
    "data twice": (changed(parameters={"binary_data_size": 0}), "needs either data"),
    "raw but not there": (
        changed(data="gone", parameters={"binary_data_size": 4}),
        "0 bytes follow the JSON of the request; expected 4",
    ),
    "a size that is none": (
        changed(data="gone", parameters={"binary_data_size": -1}),
        "binary_data_size of input 'image' is -1",
    ),
    "a size that is truth": (
        changed(data="gone", parameters={"binary_data_size": True}),
        "binary_data_size of input 'image' is True",
    ),
    "shared memory": (
        changed(data="gone", parameters={"shared_memory_region": "r"}),
        "Shared memory is not offered",
    ),
    "nested parameters": (changed(parameters={"a": {"b": 1}}), "parameters.a"),
    "no shape": (changed(shape="gone"), "inputs.0.shape"),
    "a scalar": (changed(shape=[]), "has shape []; expected [-1]"),
    "no rows": (changed(shape=[0], data=[]), "has shape [0]; expected [-1]"),
    "negative rows": (changed(shape=[-1]), "has shape [-1]; expected [-1]"),
    "wide rows": (changed(shape=[1, 2]), "has shape [1, 2]; expected [-1]"),
    "rows in fractions": (changed(shape=[1.5]), "inputs.0.shape.0 is 1.5"),
    "rows as truth": (changed(shape=[True]), "inputs.0.shape.0 is True"),
    "many rows": (changed(shape=[4]), "has 4 rows; at most 3 are accepted"),
    "rows beyond 64 bits": (changed(shape=[2**62, 2**62]), "has shape"),
    "fewer rows": (changed(shape=[2]), "has 1 values; shape [2] takes 2"),
    "no base64": (changed(data=["&&&&"]), "is not base64"),
    "no text": (changed(data=[1]), "JSON type int; expected texts"),
    "an id that is no text": ({**GOOD, "id": 7}, "id is 7"),
    "an unknown output": ({**GOOD, "outputs": [{"name": "logits"}]}, "'logits' is unknown"),
    "an output twice": (
        {**GOOD, "outputs": [{"name": "label"}, {"name": "label"}]},
        "named twice",
    ),
    "classes of labels": (
        {**GOOD, "outputs": [{"name": "label", "parameters": {"classification": 1}}]},
        "Output 'label' has no classes",
    ),
    "no classes": (
        {**GOOD, "outputs": [{"name": "scores", "parameters": {"classification": 0}}]},
        "classification is 0",
    ),
    "raw in words": (
        {**GOOD, "parameters": {"binary_data_output": "yes"}},
        "binary_data_output is 'yes'",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_named_as_such(client: HttpClient, kind: str) -> None:
    """400 with what was expected."""
    body, reason = MALFORMED[kind]

    assert reason in error(client.post(INFER, json=body), 400)


NOT_JSON = {
    "nothing": (b"", "The body is empty"),
    "half JSON": (b'{"inputs": [', "not JSON"),
    "no text": (b"\xff\xfe", "not JSON"),
    "deep JSON": (b"[" * 50_000, "nested deeper than 16 levels"),
    "no number": (b'{"inputs": NaN}', "not JSON"),
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_what_is_not_json_is_refused(client: HttpClient, kind: str) -> None:
    """Whatever is wrong with it."""
    body, reason = NOT_JSON[kind]

    assert reason in error(client.post(INFER, content=body), 400)


def test_json_by_any_other_content_type_is_json(client: HttpClient) -> None:
    """Standard clients send `application/octet-stream`, or nothing."""
    body = json.dumps(GOOD).encode()
    for kind in ("application/octet-stream", "x/y", ""):
        assert outputs(client.post(INFER, content=body, headers={"content-type": kind}))["label"]
    assert outputs(client.post(INFER, content=body))["label"]


def test_what_a_picture_may_not_be_is_refused_like_elsewhere(client: HttpClient) -> None:
    """One that is none, one that is too large, and a body that is."""
    assert "not a picture" in error(client.post(INFER, json=image(b"no picture")), 415)
    assert "at most 1000000" in error(
        client.post(INFER, json=image(png_header(30_000, 30_000))), 413
    )
    assert f"larger than {MAX_BODY}" in error(client.post(INFER, content=bytes(MAX_BODY + 1)), 413)


def test_any_accepted_picture_is_decoded_as_for_predict(client: HttpClient) -> None:
    """Upright, scaled, cropped: a JPEG of another size."""
    data = encoded(plain((33, 20)), "JPEG", quality=95)
    direct = client.post("/predict/colours", content=data).json()["scores"]

    assert outputs(client.post(INFER, json=image(data)))["scores"]["data"] == [*direct.values()]


@pytest.mark.parametrize("value", [float("1e39"), -1e300])
def test_features_that_are_no_numbers_are_refused(client: HttpClient, value: float) -> None:
    """They fit into JSON and not into 32 bits."""
    request = tensor("features", "FP32", np.array([[value, 0.0, 0.0]]))
    response = client.post("/v2/models/colours.features/infer", json=request)

    assert "Input 'features' has values that are not finite numbers" in error(response, 400)


def test_features_without_scores_are_the_callers_mistake(client: HttpClient) -> None:
    """Numbers so large that the head's sums overflow: not an error of the service."""
    request = tensor("features", "FP32", np.full((1, 3), 3e38))
    response = client.post("/v2/models/colours.features/infer", json=request)

    assert "These features have no scores" in error(response, 400)


@pytest.mark.parametrize("shape", [(1, SIZE_PX, SIZE_PX), (1, 9, SIZE_PX, 3), (1, 0, 0, 3)])
def test_pixels_have_to_be_as_the_trunk_takes_them(
    client: HttpClient, shape: tuple[int, ...]
) -> None:
    """Nothing is scaled there."""
    request = tensor("pixels", "UINT8", np.zeros(shape, np.uint8))
    response = client.post("/v2/models/colours.pixels/infer", json=request)

    assert f"expected [-1, {SIZE_PX}, {SIZE_PX}, 3]" in error(response, 400)


UNKNOWN = ["color", "colours.pixel", "colours.", "colours.pixels.pixels", ".pixels", "COLOURS"]


@pytest.mark.parametrize("model", UNKNOWN)
def test_an_unknown_model_is_not_found(client: HttpClient, model: str) -> None:
    """On every path, by the standard's words."""
    for path in ("", "/ready", "/config"):
        detail = error(client.get(f"/v2/models/{model}{path}"), 404)
        assert detail.startswith("Request for unknown model")
    infer = error(client.post(f"/v2/models/{model}/infer", json=GOOD), 404)

    assert infer.startswith("Request for unknown model")


def test_the_closest_names_are_told(client: HttpClient) -> None:
    """As everywhere."""
    assert "closest names are: colours" in error(client.get("/v2/models/color"), 404)


@pytest.mark.parametrize(
    "path", ["/v2/nothing", "/v2/models", "/v2/logging", "/v2/systemsharedmemory/status", "/v2/a/b"]
)
def test_an_unknown_path_is_an_error_of_the_protocol(client: HttpClient, path: str) -> None:
    """Its clients can read no other; outside of it, problems stay problems."""
    assert path in error(client.get(path), 404)
    assert client.get("/v2x").headers["content-type"] == "application/problem+json"


def test_a_wrong_method_is_an_error_of_the_protocol(client: HttpClient) -> None:
    """With those that are right."""
    response = client.get(INFER)

    assert "does not take GET" in error(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_failure_of_ours_is_an_error_of_the_protocol(
    tmp_path: Path, trunk_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500, and nothing of our insides."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        monkeypatch.setattr(fleet.replicas["replica-1"].engine, "run", None)
        response = HttpClient(fleet, "replica-1").post(INFER, json=GOOD)

    assert "its log has the reason" in error(response, 500)


def test_without_an_answer_in_time_the_error_says_when_to_come_back(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """By the service's limit, by the header, and by the request's own `timeout` in microseconds."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1, request_timeout_s=0.5) as fleet:
        fleet.must_push(heads(1))
        client = HttpClient(fleet, "replica-1")
        batcher = fleet.replicas["replica-1"].batcher
        batcher.hold(frozenset({"colours"}))
        late = [
            client.post(INFER, json=GOOD),
            client.post(INFER, json=GOOD, headers={"x-headstock-timeout-ms": "200"}),
            client.post(INFER, json={**GOOD, "parameters": {"timeout": 100_000}}),
        ]
        batcher.release()
        in_time = client.post(INFER, json={**GOOD, "parameters": {"timeout": 400_000}})

    for answer, allowed in zip(late, ("0.5", "0.2", "0.1"), strict=True):
        assert f"No answer within {allowed} s" in error(answer, 503)
        assert answer.headers["retry-after"] == "1"
    assert in_time.status_code == 200


@pytest.mark.parametrize("model", [*INPUTS, "colours/versions/1"])
def test_a_full_queue_says_when_to_come_back(
    tmp_path: Path, trunk_folder: Path, heads: Heads, model: str
) -> None:
    """503 at once with Retry-After, whatever is asked by whatever input."""
    body = {
        "colours.pixels": tensor("pixels", "UINT8", some_picture(0)[None]),
        "colours.features": tensor("features", "FP32", features_of(0)[None]),
    }.get(model, GOOD)
    path = f"/v2/models/{model}/infer"
    with LocalFleet(tmp_path, trunk_folder, replicas=1, max_queued=1) as fleet:
        fleet.must_push(heads(1))
        client, batcher = HttpClient(fleet, "replica-1"), fleet.replicas["replica-1"].batcher
        batcher.hold(frozenset({"colours"}))
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(client.post, path, json=body)
            until(lambda: len(batcher._waiting) == 1)
            refused = client.post(path, json=body)
            batcher.release()

    assert "1 requests wait already" in error(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert waits.result().status_code == 200


def test_features_of_a_task_that_needs_the_picture_are_refused(
    tmp_path: Path, small_trunk: SpecialisedTrunk
) -> None:
    """Its model says so when it is asked whether it is ready, and in the index."""
    with LocalFleet(tmp_path, small_trunk.folder, replicas=1) as fleet:
        fleet.must_push(small_trunk.with_adapter("hats", "ssf", 1).bundle)
        client = HttpClient(fleet, "replica-1")
        features = np.zeros((1, small_trunk.manifest.num_features))
        asked = client.post(
            "/v2/models/hats.features/infer", json=tensor("features", "FP32", features)
        )
        ready = [client.get(f"/v2/models/{name}/ready") for name in ("hats", "hats.features")]
        index = client.post("/v2/repository/index").json()

    assert "send it the picture" in error(asked, 400)
    assert ready[0].status_code == 200
    assert "send it the picture" in error(ready[1], 400)
    assert [(e["name"], e["state"]) for e in index] == [
        ("hats", "READY"),
        ("hats.pixels", "READY"),
        ("hats.features", "UNAVAILABLE"),
    ]
    assert "send it the picture" in index[-1]["reason"]
