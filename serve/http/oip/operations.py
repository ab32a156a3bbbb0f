"""What each route of the Open Inference Protocol takes and answers, for the OpenAPI schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from serve.http.described import CALLER, JSON, KEY, TIMEOUT, Operation, Parameter, header
from serve.http.oip.request import LENGTH_HEADER, InferRequest

TAG = "open inference protocol"
BINARY = "application/octet-stream"
MODEL_ERRORS = (400, 404, 503)


class Tensor(TypedDict):
    """A tensor that a model takes or gives; -1 is the batch, or what differs between sides."""

    name: str
    datatype: Annotated[str, Field(examples=["BYTES", "FP32"])]
    shape: list[int]


class ServerLive(TypedDict):
    """This replica works."""

    live: Literal[True]


class ServerReady(TypedDict):
    """This replica answers."""

    ready: Literal[True]


class Server(TypedDict):
    """The service, and what of the protocol it speaks."""

    name: Literal["headstock"]
    version: str
    extensions: list[str]


class Model(TypedDict):
    """A model: its versions that answer, what it takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    properties: dict[str, str]


class ModelReady(TypedDict):
    """A model answers."""

    name: str
    ready: Literal[True]


class ConfiguredTensor(TypedDict):
    """A tensor as configurations have it, without the batch."""

    name: str
    data_type: str
    dims: list[int]


class ModelConfig(TypedDict):
    """What load generators read of a model."""

    name: str
    platform: str
    version_policy: dict[str, Any]
    max_batch_size: int
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]
    dynamic_batching: dict[str, Any]


class ModelStatistics(TypedDict):
    """What the fleet counted of a version of a model; times in nanoseconds."""

    name: str
    version: str
    last_inference: Annotated[int, Field(ge=0, description="Milliseconds since 1970.")]
    inference_count: int
    execution_count: int
    inference_stats: dict[str, dict[str, int]]
    response_stats: dict[str, Any]
    batch_stats: list[dict[str, Any]]
    memory_usage: list[Any]


class Statistics(TypedDict):
    """Of each version that was asked for."""

    model_stats: list[ModelStatistics]


class IndexAsk(TypedDict, total=False):
    """Which models to list."""

    ready: bool


class IndexEntry(TypedDict):
    """A version of a model, and whether it answers."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryAsk(TypedDict, total=False):
    """Parameters of loading or unloading, of which there are hardly any."""

    parameters: dict[str, Any]


class Output(TypedDict):
    """A tensor of the answer: its data, or how many bytes of it follow the JSON."""

    name: str
    shape: list[int]
    datatype: Literal["FP32", "BYTES"]
    data: NotRequired[list[float | str]]
    parameters: NotRequired[dict[str, int]]


class InferResponse(TypedDict):
    """What one version of a model says of each row."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    parameters: dict[str, str]
    outputs: list[Output]


class Error(TypedDict):
    """What was wrong and what was expected, as the protocol has it."""

    error: str


LENGTH = header(
    LENGTH_HEADER,
    Annotated[int, Field(ge=0)],
    "Bytes of the JSON before raw tensors; 0: the body is the model's one tensor.",
    None,
)


def _get(summary: str, answer: Any, *errors: int) -> Operation:
    return Operation(summary, TAG, answer, errors=errors)


def _change(summary: str) -> Operation:
    return Operation(
        summary,
        TAG,
        media_type="",
        body={JSON: RepositoryAsk},
        is_body_required=False,
        parameters=(KEY,),
        errors=(400, 404, 409, 413, 503),
    )


def _of_models() -> Mapping[tuple[str, str], Operation]:
    infer = Operation(
        "Ask a model of a batch.",
        TAG,
        InferResponse,
        body={JSON: InferRequest, BINARY: None},
        parameters=(LENGTH, TIMEOUT, CALLER),
        errors=(400, 404, 409, 413, 415, 503),
        also=(BINARY,),
    )
    of_model = {
        ("GET", ""): _get("What a model takes and gives.", Model, *MODEL_ERRORS),
        ("GET", "/ready"): _get("Whether a model answers.", ModelReady, *MODEL_ERRORS),
        ("GET", "/config"): _get("A model's configuration.", ModelConfig, *MODEL_ERRORS),
        ("GET", "/stats"): _get("What was counted of a model.", Statistics, *MODEL_ERRORS),
        ("POST", "/infer"): infer,
    }
    places = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    return {
        (method, place + rest): operation
        for place in places
        for (method, rest), operation in of_model.items()
    }


PARAMETERS = {
    "model": Parameter(
        "model",
        "path",
        Annotated[str, Field(min_length=1)],
        "A task, TASK.pixels or TASK.features.",
        "pets",
        is_required=True,
    ),
    "version": Parameter(
        "version",
        "path",
        Annotated[str, Field(pattern="^[0-9]{1,15}$")],
        "One that answers.",
        "1",
        is_required=True,
    ),
}
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/v2"): _get("The service and its extensions.", Server),
    ("GET", "/v2/health/live"): _get("200 while this replica works.", ServerLive, 503),
    ("GET", "/v2/health/ready"): _get("200 once this replica may answer.", ServerReady, 503),
    ("POST", "/v2/repository/index"): Operation(
        "Every version of every model.",
        TAG,
        list[IndexEntry],
        body={JSON: IndexAsk},
        is_body_required=False,
        errors=(400, 413, 503),
    ),
    ("POST", "/v2/repository/models/{model}/load"): _change("Bring a retired task back."),
    ("POST", "/v2/repository/models/{model}/unload"): _change("Retire a task."),
    ("GET", "/v2/models/stats"): _get("What was counted of every model.", Statistics, 503),
    **_of_models(),
}
