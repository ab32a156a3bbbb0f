"""What the routes of the Open Inference Protocol take and answer, for the OpenAPI schema.

The protocol says it to the byte; here is what there is, and the form of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.http.operations import CALLER, JSON, KEY, TIMEOUT, Operation, Parameter, header

TAG = "open inference protocol"
INDEX = list[dict[str, str]]
RAW = "application/octet-stream"
LENGTH = header(
    "inference-header-content-length",
    str,
    "Bytes of JSON before raw tensors; 0: the body is the one tensor.",
    "0",
)

OIP_PATH_PARAMETERS = {
    "model": Parameter(
        "model", "path", str, "TASK, TASK.pixels or TASK.features.", "pets", is_required=True
    ),
    "version": Parameter("version", "path", str, "A version by number.", "7", is_required=True),
}


def _get(summary: str, *errors: int) -> Operation:
    return Operation(summary, TAG, dict[str, Any], errors=errors)


def _of_model(place: str) -> dict[tuple[str, str], Operation]:
    infer = Operation(
        "Tensors in, tensors out.",
        TAG,
        dict[str, Any],
        body={JSON: dict[str, Any], RAW: None},
        parameters=(LENGTH, TIMEOUT, CALLER),
        errors=(400, 404, 413, 415, 503),
    )
    return {
        ("GET", place): _get("What a model takes and gives.", 400, 404, 503),
        ("GET", f"{place}/ready"): _get("200 if the model answers.", 400, 404, 503),
        ("GET", f"{place}/config"): _get("How large a batch may be.", 400, 404, 503),
        ("GET", f"{place}/stats"): _get("What the fleet counted of the model.", 400, 404, 503),
        ("POST", f"{place}/infer"): infer,
    }


def _change(summary: str) -> Operation:
    return Operation(
        summary,
        TAG,
        media_type="",
        body={JSON: dict[str, Any]},
        is_body_required=False,
        parameters=(KEY,),
        errors=(400, 404, 409, 413, 415, 503),
    )


OIP_OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/v2"): _get("Name, version and extensions of the server."),
    ("GET", "/v2/health/live"): _get("200 while this replica works.", 503),
    ("GET", "/v2/health/ready"): _get("200 once this replica may answer.", 503),
    ("POST", "/v2/repository/index"): Operation(
        "Every model, whether it answers, and why not.",
        TAG,
        INDEX,
        body={JSON: dict[str, Any]},
        is_body_required=False,
        errors=(400, 413, 415, 503),
    ),
    ("POST", "/v2/repository/models/{model}/load"): _change("Bring a retired task back."),
    ("POST", "/v2/repository/models/{model}/unload"): _change("Retire a task."),
    ("GET", "/v2/models/stats"): _get("What the fleet counted of every model.", 503),
    **_of_model("/v2/models/{model}"),
    **_of_model("/v2/models/{model}/versions/{version}"),
}
