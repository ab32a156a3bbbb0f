"""The OpenAPI schema: the operations, with every type that they name.

Source: OpenAPI 3.1.1, https://spec.openapis.org/oas/v3.1.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

from pydantic import TypeAdapter

from serve import answers
from serve.http.described import JSON, Operation, Parameter
from serve.http.oip.errors import is_within
from serve.http.oip.operations import Error
from serve.http.operations import FORM, OPERATIONS, PATH_PARAMETERS
from serve.http.problems import PROBLEM, RETRY_AFTER_S, TITLES

ABOUT = (
    "One student trunk, many task heads, swapped live. Errors are problem details (RFC 9457), "
    'and `{"error": text}` under /v2; '
    "429 and 503 say by `Retry-After` when to ask again. A path that is not listed answers 404, a "
    "method that it does not have 405."
)
SCHEMAS = "#/components/schemas/"
BYTES = {"type": "string", "format": "binary"}
# What each error looks like: one example of many.
EXAMPLES: Mapping[int, str] = {
    400: "top is '0'; expected a whole number of at least 1.",
    401: "The request has no token; expected one header, Authorization: Bearer TOKEN.",
    403: "The token shop lacks the scope push:pets.",
    404: "There is no task 'pet'. The closest names are: pets. GET /tasks lists what is live.",
    405: "/tasks does not take DELETE.",
    408: "The body is not here after 30 s, the longest that one may take. Send it faster, or a "
    "smaller one.",
    409: "Task pets is at version 8; expected version 7.",
    413: "The body is larger than 16777216 bytes, the most accepted here.",
    415: "The bytes are not a picture in an accepted format (JPEG, PNG, WebP).",
    422: (
        "The golden samples do not reproduce: logits differ by 1.20e-01, more than the trunk's "
        "tolerance 1.00e-04. Bundle the head with the trunk that it is for."
    ),
    429: "The token shop asks more than 10 requests a second; ask again in 0.1 s.",
    431: "Address and headers have 40000 bytes; at most 32768 are accepted.",
    500: "The service failed to answer; its log has the reason.",
    503: "512 requests wait already; try again shortly.",
}
ALWAYS = (401, 403, 429, 431, 500)
WITH_A_BODY = (408,)
SAYS_WHEN = (429, 503)
REFUSED_BY_A_GATE = 422


@cache
def openapi() -> dict[str, Any]:
    """The schema of every route of the service."""
    schemas: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, schemas)
    problems = {f"Problem{status}": _problem(status, schemas) for status in EXAMPLES}
    errors = {f"Error{status}": _error(status, schemas) for status in EXAMPLES}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headstock",
            "version": version("headstock"),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(o.tag for o in OPERATIONS.values())],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {**problems, **errors},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # Only a service that more than its own machine reaches asks for one.
        "security": [{}, {"token": []}],
    }


def _operation(
    method: str, path: str, operation: Operation, schemas: dict[str, Any]
) -> dict[str, Any]:
    in_path = (PATH_PARAMETERS[name] for name in re.findall("{(.*?)}", path))
    parameters = [_parameter(p, schemas) for p in (*in_path, *operation.parameters)]
    errors = {*operation.errors, *ALWAYS, *(WITH_A_BODY if operation.body else ())}
    form = "Error" if is_within(path) else "Problem"
    shown: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]),
        "tags": [operation.tag],
        "responses": {
            "200": _answer(operation, schemas),
            **{
                str(status): {"$ref": f"#/components/responses/{form}{status}"}
                for status in sorted(errors)
            },
        },
    }
    if parameters:
        shown["parameters"] = parameters
    if operation.body:
        content = {media: _body(media, of, schemas) for media, of in operation.body.items()}
        shown["requestBody"] = {"required": operation.is_body_required, "content": content}
    return shown


def _parameter(parameter: Parameter, schemas: dict[str, Any]) -> dict[str, Any]:
    shown = {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "required": parameter.is_required,
        "schema": _schema(parameter.type, schemas),
    }
    return shown if parameter.example is None else {**shown, "example": parameter.example}


def _answer(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": operation.summary}
    if operation.headers:
        shown["headers"] = {
            name: {"description": what, "schema": {"type": "string"}}
            for name, what in operation.headers.items()
        }
    if operation.media_type:
        of = operation.answer
        schema = {"type": "string"} if of is None else _schema(of, schemas)
        others = {media_type: {"schema": BYTES} for media_type in operation.also}
        shown["content"] = {operation.media_type: {"schema": schema}, **others}
    return shown


def _body(media_type: str, of: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    if media_type == FORM:
        files = {"type": "array", "items": BYTES, "minItems": 1}
        names = of.split()
        fields = {
            "type": "object",
            "properties": dict.fromkeys(names, files),
            "required": names[:1],
        }
        return {"schema": {**fields, "additionalProperties": False}}
    return {"schema": BYTES if of is None else _schema(of, schemas)}


def _problem(status: int, schemas: dict[str, Any]) -> dict[str, Any]:
    example: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES[status],
        "status": status,
        "detail": EXAMPLES[status],
    }
    if status == REFUSED_BY_A_GATE:
        verdict = {
            "task": "pets",
            "gate": "golden",
            "passed": False,
            "reason": EXAMPLES[status],
            "skipped": False,
        }
        example["gates"] = [verdict]
    content = {PROBLEM: {"schema": _schema(answers.Problem, schemas), "example": example}}
    return _refusal(status, content)


def _error(status: int, schemas: dict[str, Any]) -> dict[str, Any]:
    """The same within `/v2`, where the protocol says how."""
    example = {"error": EXAMPLES[status]}
    return _refusal(status, {JSON: {"schema": _schema(Error, schemas), "example": example}})


def _refusal(status: int, content: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": TITLES[status], "content": content}
    if status in SAYS_WHEN:
        when = "Seconds after which to ask again."
        schema = {"type": "integer", "examples": [RETRY_AFTER_S]}
        shown["headers"] = {"retry-after": {"description": when, "schema": schema}}
    return shown


def _schema(of: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a type; whatever in it has a name is put among the schemas."""
    shown = TypeAdapter(of).json_schema(ref_template=f"{SCHEMAS}{{model}}")
    named = shown.pop("$defs", {})
    if shown.get("type") == "object" and "title" in shown:
        named, shown = {**named, shown["title"]: shown}, {"$ref": SCHEMAS + shown["title"]}
    for name, schema in named.items():
        assert schemas.setdefault(name, schema) == schema, f"two types are called {name}"
    return shown
