"""The gate that reads a head's or a tail's graph before a session is made of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from export.bundle import TAIL, Bundle
from serve import svm
from serve.costs import HEAD_ROWS, TAIL_ROWS, CostError, check_costs
from serve.graph_parts import NoGraphError, count_parts
from serve.heads import graph_file

MAX_NODES = {"head": 64, "adapter": 64, "tail": 512}
MAX_PARTS = 2**16  # ten times what the largest tail needs; 10 MB of memory at most

# What heads are made of: affine maps, small networks, prototypes, nearest neighbours, and what
# converters put around them; beside these the support vector machines of svm.py. No control flow,
# no random numbers, nothing that reads files.
ALLOWED_OPERATORS = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Constant", "Div", "Exp", "Flatten", "Gather", "Gelu",
        "Gemm", "Identity", "LayerNormalization", "LpNormalization", "MatMul", "Max", "Mul", "Neg",
        "Pow", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape",
        "Sigmoid", "Slice", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
# What the last stages of image networks are made of besides.
TAIL_OPERATORS = ALLOWED_OPERATORS | {
    "AveragePool", "BatchNormalization", "Conv", "Erf", "GlobalAveragePool", "HardSigmoid",
    "HardSwish", "LeakyRelu", "MaxPool", "Pad", "PRelu", "Softmax",
}  # fmt: skip
ALLOWED_TYPES = frozenset(
    {
        onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE,
        onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32,
        onnx.TensorProto.INT64, onnx.TensorProto.BOOL,
    }
)  # fmt: skip


class GateError(Exception):
    """A gate said no."""


def check_graph(bundle: Bundle, *, max_head_bytes: int, prefix_shape: tuple[int, ...] = ()) -> str:
    """The head or tail is a graph of known operators with finite weights of its own.

    Args:
        prefix_shape: Of the trunk's prefix maps, which a tail takes.

    Raises:
        GateError: too large, unreadable, or anything in it that is not needed.
    """
    name = graph_file(bundle.manifest)
    data = bundle.files[name]
    if len(data) > max_head_bytes:
        raise GateError(f"{name} has {len(data)} bytes; at most {max_head_bytes} are accepted.")
    model = _read(data, name)
    _check_nodes(model, name, max_nodes=MAX_NODES[bundle.manifest.kind])
    _check_weights(model, name)
    given = (
        ("prefix", prefix_shape) if name == TAIL else ("features", (bundle.manifest.num_features,))
    )
    _check_interface(model.graph, name, given, ("logits", (len(bundle.manifest.labels),)))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{name} is not a valid ONNX graph: {error}") from error
    try:
        check_costs(model, rows=TAIL_ROWS if name == TAIL else HEAD_ROWS)
    except CostError as error:
        raise GateError(f"{name} is refused for its cost: {error}") from error
    return f"{len(model.graph.node)} nodes, {len(data)} bytes"


def _read(data: bytes, file: str) -> onnx.ModelProto:
    try:
        if count_parts(data, most=MAX_PARTS) > MAX_PARTS:
            raise GateError(f"{file} has too many parts; at most {MAX_PARTS} are accepted.")
        return onnx.load_model_from_string(data)
    except (NoGraphError, DecodeError) as error:
        raise GateError(f"{file} is not an ONNX graph: {error}.") from error


def _check_nodes(model: onnx.ModelProto, file: str, *, max_nodes: int) -> None:
    graph = model.graph
    if model.functions or model.training_info:
        raise GateError(f"{file} defines functions or training steps; it needs neither.")
    if len(graph.node) > max_nodes:
        raise GateError(f"{file} has {len(graph.node)} nodes; at most {max_nodes} are accepted.")
    operators = TAIL_OPERATORS if file == TAIL else ALLOWED_OPERATORS
    for node in graph.node:
        allowed = svm.OPERATORS if node.domain == svm.DOMAIN else operators
        if node.domain not in {"", "ai.onnx", svm.DOMAIN} or node.op_type not in allowed:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise GateError(f"{file} uses the operator {name}, which it may not use.")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise GateError(f"{file} has a graph inside its node {node.op_type}.")
            floats = np.fromiter(attribute.floats, np.float32, len(attribute.floats))
            if not (np.isfinite(attribute.f) and np.isfinite(floats).all()):
                raise GateError(f"{attribute.name} of a {node.op_type} in {file} is not finite.")
            if node.op_type == "Cast" and attribute.name == "to":
                _check_type(attribute.i, "A Cast")


def _check_weights(model: onnx.ModelProto, file: str) -> None:
    for tensor in _tensors(model.graph, file):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise GateError(f"{file} keeps the weight {tensor.name!r} in another file.")
        _check_type(tensor.data_type, f"The weight {tensor.name!r}")
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError) as error:
            raise GateError(f"The weight {tensor.name!r} cannot be read: {error}.") from error
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise GateError(f"The weight {tensor.name!r} is not finite everywhere.")


def _check_type(data_type: int, what: str) -> None:
    if data_type not in ALLOWED_TYPES:
        allowed = ", ".join(sorted(onnx.TensorProto.DataType.Name(t) for t in ALLOWED_TYPES))
        raise GateError(f"{what} is of the type numbered {data_type}; expected one of {allowed}.")


def _tensors(graph: onnx.GraphProto, file: str) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    if graph.sparse_initializer:
        raise GateError(f"{file} has sparse weights, which it may not have.")
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise GateError(f"{file} has sparse weights, which it may not have.")
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


Port = tuple[str, tuple[int, ...]]


def _check_interface(graph: onnx.GraphProto, file: str, given: Port, wanted: Port) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    for port, values in ((given, inputs), (wanted, list(graph.output))):
        found = [(value.name, _row_shape(value)) for value in values]
        if found != [port]:
            name, shape = port
            row = ", ".join(str(length) for length in shape)
            raise GateError(
                f"{file} has {found}; expected one float32 {name!r} of shape [rows, {row}]."
            )


def _row_shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The shape of one row of a float32 tensor of any number of rows; None of anything else."""
    tensor = value.type.tensor_type
    dimensions = tensor.shape.dim
    is_rows = tensor.elem_type == onnx.TensorProto.FLOAT and len(dimensions) > 0
    if not is_rows or dimensions[0].dim_value:
        return None
    return tuple(dimension.dim_value for dimension in dimensions[1:])
