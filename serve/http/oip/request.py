"""An inference request: its JSON part, its raw tensors, and what it asks for.

Which of its three forms a body has is said by `Inference-Header-Content-Length` alone: clients send
any content type, or none. Without it the body is JSON; a number is the length of the JSON before
the raw tensors; 0 makes the whole body the one tensor of the model.

Source: Open Inference Protocol V2, inference request, and its binary tensor data extension.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serve.http.body import check_json
from serve.http.oip.tensors import Elements, TensorError, TensorSpec, from_list, from_raw
from serve.http.problems import RequestError

LENGTH_HEADER = "inference-header-content-length"
MAX_LENGTH_DIGITS = 12
MAX_JSON_SYMBOLS = 1_000_000  # six pictures of 224 px as numbers; raw they are a tenth as long

Count = Annotated[int, Field(ge=1)]
T = TypeVar("T")
# Some clients write null where they have nothing to say.
Said = Annotated[T, BeforeValidator(lambda value: {} if value is None else value)]


class _Part(BaseModel):
    # What is not known is an extension's, and left alone: clients send names of their own.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Given(_Part):
    """A tensor that the request brings."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Said[dict[str, str | bool | int | float | None]] = {}
    data: list[Any] | None = None

    @property
    def raw_bytes(self) -> int | None:
        """Its length if it follows the JSON."""
        value = self.parameters.get("binary_data_size")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RequestError(
                400,
                f"binary_data_size of input {self.name!r:.80} is {value!r:.40}; expected bytes.",
            )
        return value


class OutputParameters(_Part):
    """How an output is wanted; `classification` is the number of best classes."""

    binary_data: bool | None = None
    classification: Count | None = None


class Wanted(_Part):
    """An output that is asked for."""

    name: str
    parameters: Said[OutputParameters] = OutputParameters()


class RequestParameters(_Part):
    """What of the request's parameters means something here; `timeout` is in microseconds."""

    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0)] = 0


class InferRequest(_Part):
    """The JSON part; `outputs` is None for all of them."""

    id: str | None = None
    parameters: Said[RequestParameters] = RequestParameters()
    inputs: list[Given]
    outputs: list[Wanted] | None = None


def json_length(header: str | None, body_bytes: int) -> int:
    """Bytes of the JSON part of a body.

    Raises:
        RequestError: the header is not a length that the body can have.
    """
    if header is None:
        return body_bytes
    is_number = header.isascii() and header.isdecimal() and len(header) <= MAX_LENGTH_DIGITS
    if not is_number or int(header) > body_bytes:
        raise RequestError(
            400,
            f"Inference-Header-Content-Length is {header!r:.40}; expected a whole number of bytes, "
            f"at most those of the body, {body_bytes}.",
        )
    return int(header)


def read_request(
    body: bytes, num_json: int, spec: TensorSpec, *, max_rows: int
) -> tuple[InferRequest, Elements]:
    """What a body asks for, and its input.

    Args:
        num_json: See `json_length`.
        spec: The model's one input.
        max_rows: Most that a batch may have.

    Raises:
        RequestError: the body is malformed, or its input is another.
    """
    if not body:
        raise RequestError(400, "The body is empty; expected an inference request.")
    try:
        if num_json == 0:
            return _raw_request(body, spec)
        request = _read_json(body[:num_json])
        return request, _input_of(request, body[num_json:], spec, max_rows)
    except TensorError as error:
        raise RequestError(400, f"Input {spec.name!r} is malformed: {error}.") from error


def _raw_request(body: bytes, spec: TensorSpec) -> tuple[InferRequest, Elements]:
    """One element of the batch and nothing around it; all outputs are to come raw."""
    parameters = RequestParameters(binary_data_output=True)
    request = InferRequest(inputs=[], parameters=parameters)
    if spec.datatype == "BYTES":
        return request, [body]
    return request, from_raw(body, spec.datatype, [1, *spec.shape[1:]])


def _read_json(data: bytes) -> InferRequest:
    check_json(data, max_symbols=MAX_JSON_SYMBOLS)
    try:
        return InferRequest.model_validate(orjson.loads(data))
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"The request is not JSON: {error}.") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the request"
        raise RequestError(
            400, f"{place} is {problem['input']!r:.80}: {problem['msg']}."
        ) from error


def _input_of(request: InferRequest, raw: bytes, spec: TensorSpec, max_rows: int) -> Elements:
    if [given.name for given in request.inputs] != [spec.name]:
        names = [given.name for given in request.inputs]
        raise RequestError(400, f"The inputs are {names!r:.80}; expected one, {spec.name!r}.")
    (given,) = request.inputs
    if given.datatype != spec.datatype:
        raise RequestError(
            400,
            f"Input {spec.name!r} has datatype {given.datatype!r:.20}; expected {spec.datatype}.",
        )
    if "shared_memory_region" in given.parameters:
        raise RequestError(400, "Shared memory is not offered here; send the tensor itself.")
    if (given.data is None) == (given.raw_bytes is None):
        raise RequestError(
            400, f"Input {spec.name!r} needs either data or the parameter binary_data_size."
        )
    if len(raw) != (given.raw_bytes or 0):
        raise RequestError(
            400,
            f"{len(raw)} bytes follow the JSON of the request; expected {given.raw_bytes or 0}.",
        )
    shape = _checked(given.shape, spec, max_rows)
    if given.data is None:
        return from_raw(raw, spec.datatype, shape)
    elements = from_list(given.data, spec.datatype, shape)
    if isinstance(elements, np.ndarray):
        return elements
    return [_decoded(text, spec.name) for text in elements]


def _checked(shape: list[int], spec: TensorSpec, max_rows: int) -> list[int]:
    """The shape, if the input may have it; a batch of texts is also sent as a column.

    Raises:
        RequestError: another shape, or too many rows.
    """
    rows, *rest = shape or [0]
    row = list(spec.shape[1:])
    if rest not in (row, row or [1]) or rows < 1:
        raise RequestError(
            400, f"Input {spec.name!r} has shape {shape!r:.80}; expected {list(spec.shape)}."
        )
    if rows > max_rows:
        raise RequestError(
            400, f"Input {spec.name!r} has {rows} rows; at most {max_rows} are accepted."
        )
    return shape


def _decoded(text: bytes, name: str) -> bytes:
    # An encoded picture is no text, so in JSON it is base64.
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RequestError(
            400, f"Input {name!r} is not base64, as a picture in JSON has to be: {error}."
        ) from error
