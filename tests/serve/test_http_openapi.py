"""The OpenAPI schema says what the service does: every route, every answer, every error."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from export.bundle import Bundle
from serve.http.openapi import EXAMPLES, openapi
from serve.http.pages import SCRIPT, STATIC
from serve.http.problems import TITLES
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.signers import key_of
from tests.serve.test_http import png_of

SCHEMA = openapi()
METHODS = frozenset({"get", "post", "put", "patch", "delete"})
OPERATIONS = [
    (method, path) for path, item in SCHEMA["paths"].items() for method in METHODS & item.keys()
]


@pytest.fixture(scope="module")
def http(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[HttpClient]:
    """One replica with a task that has a history and a rollout, and one that was retired."""
    heads = Heads(make_bundle)
    settings = {"max_body_bytes": 100_000, "max_picture_pixels": 1_000_000}
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, **settings) as fleet:
        client = HttpClient(fleet, "replica-1")
        fleet.must_push(heads(1))
        fleet.must_push(heads(2))
        fleet.must_push(heads(2, "gone"))
        assert client.request("DELETE", "/tasks/gone").is_success
        assert client.request("PATCH", "/tasks/colours", json={"weight": 2}).is_success
        fleet.must_push(heads(3), share=0.5)
        yield client


def test_it_is_valid() -> None:
    """By the specification's own schema, as another program checks it."""
    OpenAPIV31SpecValidator(SCHEMA).validate()


def test_every_route_is_in_it_and_nothing_else(http: HttpClient) -> None:
    """A route that is added without its description fails here."""
    routes = {
        (method.lower(), route.path)
        for route in http._app.routes
        if isinstance(route, Route)
        for method in set(route.methods or ()) - {"HEAD"}
    }

    assert routes == set(OPERATIONS)


def test_it_is_served(http: HttpClient) -> None:
    """At the place where programs look for it."""
    assert http.get("/openapi.json").json() == SCHEMA


def test_every_error_has_an_example() -> None:
    """Of each status that the service knows."""
    assert EXAMPLES.keys() == TITLES.keys()


@pytest.mark.parametrize("name", SCHEMA["components"]["responses"])
def test_the_examples_of_errors_are_of_their_schema(name: str) -> None:
    """And their status is the one that they are listed under."""
    (content,) = SCHEMA["components"]["responses"][name]["content"].values()
    example = content["example"]

    validator(content["schema"]).validate(example)
    assert example.get("status", int(name[-3:])) == int(name[-3:])


def parameters() -> list[dict[str, Any]]:
    """Every parameter of every operation."""
    return [p for m, path in OPERATIONS for p in SCHEMA["paths"][path][m].get("parameters", [])]


def test_the_examples_of_parameters_are_of_their_schema() -> None:
    """So that what the page fills in works."""
    examples = [p for p in parameters() if "example" in p]

    assert examples
    for parameter in examples:
        validator(parameter["schema"]).validate(parameter["example"])


def test_parameters_in_the_path_are_those_of_the_path() -> None:
    """Each is described once."""
    for method, path in OPERATIONS:
        listed = SCHEMA["paths"][path][method].get("parameters", [])
        names = [p["name"] for p in listed if p["in"] == "path"]

        assert sorted(names) == sorted(re.findall("{(.*?)}", path))


FEATURES = {"name": "features", "shape": [1, 3], "datatype": "FP32", "data": [0.1, 0.2, 0.3]}
ANSWERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "one picture": ("post", "/predict/{task}", "/predict/colours", {"content": png_of(0)}),
    "two pictures": (
        "post",
        "/predict/{task}",
        "/predict/colours?top=1",
        {"files": [("image", png_of(s)) for s in (0, 1)]},
    ),
    "several tasks": ("post", "/predict", "/predict?tasks=*", {"content": png_of(0)}),
    "several of several": (
        "post",
        "/predict",
        "/predict?tasks=colours",
        {"files": [("image", png_of(s)) for s in (0, 1)]},
    ),
    "tasks": ("get", "/tasks", "/tasks", {}),
    "a task with a rollout": ("get", "/tasks/{task}", "/tasks/colours", {}),
    "a task that was retired": ("get", "/tasks/{task}", "/tasks/gone", {}),
    "versions": ("get", "/tasks/{task}/versions", "/tasks/colours/versions", {}),
    "a card": ("get", "/tasks/{task}/card", "/tasks/colours/card", {}),
    "a diff": ("get", "/tasks/{task}/diff", "/tasks/colours/diff?a=1&b=2", {}),
    "settings": ("patch", "/tasks/{task}", "/tasks/colours", {"json": {"weight": 3}}),
    "a promotion": (
        "post",
        "/tasks/{task}/promote",
        "/tasks/colours/promote",
        {"json": {"share": 0.7}},
    ),
    "a rollback": ("post", "/tasks/{task}/rollback", "/tasks/colours/rollback", {"json": {}}),
    "keys": ("get", "/keys", "/keys", {}),
    "the log": ("get", "/log", "/log", {}),
    "metrics": ("get", "/metrics", "/metrics", {}),
    "live": ("get", "/v2/health/live", "/v2/health/live", {}),
    "ready": ("get", "/v2/health/ready", "/v2/health/ready", {}),
    "the server": ("get", "/v2", "/v2", {}),
    "a model": ("get", "/v2/models/{model}", "/v2/models/colours", {}),
    "a version of a model": (
        "get",
        "/v2/models/{model}/versions/{version}",
        "/v2/models/colours.pixels/versions/2",
        {},
    ),
    "a model that is ready": ("get", "/v2/models/{model}/ready", "/v2/models/colours/ready", {}),
    "a configuration": ("get", "/v2/models/{model}/config", "/v2/models/colours/config", {}),
    "statistics": ("get", "/v2/models/{model}/stats", "/v2/models/colours/stats", {}),
    "all statistics": ("get", "/v2/models/stats", "/v2/models/stats", {}),
    "an index": ("post", "/v2/repository/index", "/v2/repository/index", {"json": {}}),
    "loading what is loaded": (
        "post",
        "/v2/repository/models/{model}/load",
        "/v2/repository/models/colours/load",
        {"json": {}},
    ),
    "an inference": (
        "post",
        "/v2/models/{model}/infer",
        "/v2/models/colours.features/infer",
        {"json": {"inputs": [FEATURES]}},
    ),
    "a raw inference": (
        "post",
        "/v2/models/{model}/infer",
        "/v2/models/colours.features/infer",
        {"json": {"inputs": [FEATURES], "parameters": {"binary_data_output": True}}},
    ),
    "no model": ("get", "/v2/models/{model}", "/v2/models/pets", {}),
    "no inputs": ("post", "/v2/models/{model}/infer", "/v2/models/colours/infer", {"json": {}}),
    "the page": ("get", "/docs", "/docs", {}),
    "its script": ("get", "/docs/rapidoc-min.js", "/docs/rapidoc-min.js", {}),
    "no top": ("post", "/predict/{task}", "/predict/colours?top=0", {"content": png_of(0)}),
    "no task": ("get", "/tasks/{task}", "/tasks/pets", {}),
    "another version": (
        "post",
        "/tasks/{task}/rollback",
        "/tasks/colours/rollback",
        {"json": {"expected": 1}},
    ),
    "a large body": ("post", "/predict/{task}", "/predict/colours", {"content": bytes(100_001)}),
    "no picture": ("post", "/predict/{task}", "/predict/colours", {"content": b"text"}),
    "no bundle": ("post", "/tasks/{task}/versions", "/tasks/colours/versions", {"content": b"z"}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_what_the_schema_says(http: HttpClient, kind: str) -> None:
    """Its status is listed, its media type too, and its JSON has the fields named and no other."""
    method, path, place, options = ANSWERS[kind]
    response = http.request(method.upper(), place, **options)

    check(SCHEMA["paths"][path][method], response)


def test_a_push_a_dry_run_and_a_key_are_what_the_schema_says(
    http: HttpClient, make_bundle: Callable[..., Bundle]
) -> None:
    """As are the bundle and the keys that are there then."""
    bundle, signer = Heads(make_bundle)(4, "new"), key_of(1)
    pem = signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    push, paths = "/tasks/new/versions", SCHEMA["paths"]
    asked = http.post(push, content=bundle.to_zip(), params={"dry_run": "true"})
    pushed = http.post(push, content=bundle.to_zip())
    trusted = http.post("/keys", json={"public_key": pem.decode(), "name": "ci"})
    told = http.get(f"/bundles/{bundle.digest}")
    keys = http.get("/keys")
    revoked = http.request("DELETE", f"/keys/{trusted.json()['key_id']}")

    for method, path, response in [
        ("post", "/tasks/{task}/versions", asked),
        ("post", "/tasks/{task}/versions", pushed),
        ("post", "/keys", trusted),
        ("get", "/bundles/{digest}", told),
        ("get", "/keys", keys),
        ("delete", "/keys/{key_id}", revoked),
    ]:
        assert response.status_code == 200, response.text
        check(paths[path][method], response)


def check(operation: dict[str, Any], response: httpx.Response) -> None:
    """Compare an answer with what its operation says."""
    said = operation["responses"][str(response.status_code)]
    if "$ref" in said:
        said = SCHEMA["components"]["responses"][said["$ref"].rpartition("/")[2]]
    media_type = response.headers.get("content-type", "").partition(";")[0]
    assert media_type in said.get("content", {"": {}})
    if media_type in {"application/json", "application/problem+json"}:
        validator(said["content"][media_type]["schema"]).validate(response.json())


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    """Checks JSON by a schema of the document, and takes no field that has no description."""
    components = json.loads(json.dumps(SCHEMA["components"]))
    for shape in components["schemas"].values():
        if "properties" in shape:
            shape["additionalProperties"] = False
    return Draft202012Validator({**schema, "components": components})


def test_the_page_names_nothing_that_is_elsewhere(http: HttpClient) -> None:
    """It works without a way out, and the browser is told to allow none."""
    response = http.get("/docs")

    assert "//" not in re.sub("<!.*?>", "", response.text)
    allowed = response.headers["content-security-policy"]
    assert "default-src 'none'" in allowed
    assert "http" not in allowed


def test_the_script_is_the_one_that_was_published(http: HttpClient) -> None:
    """`rapidoc-min.js` of the npm package rapidoc 9.3.8, with its licences beside it."""
    told = http.get("/docs/rapidoc-min.js")

    assert told.content == gzip.decompress(SCRIPT.read_bytes())
    assert (
        hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
        == "b083f080f1727f019ccf551228392e0fc39a0be450ba19bca451ea31d6be2ec9"
    )
    assert "MIT License" in (STATIC / "rapidoc.LICENSE.txt").read_text()
