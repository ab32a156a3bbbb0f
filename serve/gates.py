"""Admission: what a bundle must pass before anything of it goes live.

Each gate is a small function that gives a verdict with a plain reason. Those that read come before
those that load, so a hostile graph is refused before a session is made of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load

from export.bundle import GOLDEN, HEAD, Bundle
from serve import svm
from serve.costs import CostError, check_costs
from serve.engine import Engine
from serve.heads import Head, HeadOutputError, score
from serve.record import Verdict

MAX_NODES = 64
MAX_GOLDEN_PICTURES = 64
RUN_TRIALS = 5
GOLDEN_BATCH = 8  # the trunk's memory grows with its largest batch, and stays

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
ALLOWED_TYPES = frozenset(
    {
        onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE,
        onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32,
        onnx.TensorProto.INT64, onnx.TensorProto.BOOL,
    }
)  # fmt: skip


class GateError(Exception):
    """A gate said no."""


def admit(bundle: Bundle, engine: Engine, *, max_head_bytes: int) -> tuple[Verdict, ...]:
    """Run the gates in order, up to the first that says no.

    Returns:
        A verdict for each gate that ran; the bundle is admitted if the last one passed.
    """
    verdicts: list[Verdict] = []
    for gate, check in (
        ("trunk", lambda: check_trunk(bundle, engine)),
        ("graph", lambda: check_graph(bundle, max_head_bytes=max_head_bytes)),
        ("golden", lambda: check_golden(bundle, engine)),
    ):
        try:
            verdicts.append(Verdict(gate=gate, passed=True, reason=check()))
        except GateError as error:
            verdicts.append(Verdict(gate=gate, passed=False, reason=str(error)))
            break
    return tuple(verdicts)


def check_trunk(bundle: Bundle, engine: Engine) -> str:
    """The head was made for the trunk that is served.

    Raises:
        GateError: another trunk, feature width or preprocessing.
    """
    mine, theirs = engine.manifest, bundle.manifest
    if theirs.trunk != mine.digest:
        raise GateError(
            f"The head was trained on trunk {theirs.trunk}; this service has trunk {mine.digest}. "
            "Train the head on this trunk."
        )
    if theirs.num_features != mine.num_features:
        raise GateError(
            f"The head takes {theirs.num_features} features; the trunk gives {mine.num_features}."
        )
    if theirs.preprocessing != mine.preprocessing:
        raise GateError(
            f"The head's preprocessing is {theirs.preprocessing}; the trunk's is "
            f"{mine.preprocessing}."
        )
    return f"trained on this trunk, {mine.num_features} features"


def check_graph(bundle: Bundle, *, max_head_bytes: int) -> str:
    """The head is a small graph of known operators with finite weights of its own.

    Raises:
        GateError: too large, unreadable, or anything in it that a head does not need.
    """
    data = bundle.files[HEAD]
    if len(data) > max_head_bytes:
        raise GateError(f"{HEAD} has {len(data)} bytes; at most {max_head_bytes} are accepted.")
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise GateError(f"{HEAD} is not an ONNX graph: {error}.") from error
    _check_nodes(model)
    _check_weights(model)
    _check_interface(model.graph, bundle)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{HEAD} is not a valid ONNX graph: {error}") from error
    try:
        check_costs(model)
    except CostError as error:
        raise GateError(f"{HEAD} is refused for its cost: {error}") from error
    return f"{len(model.graph.node)} nodes, {len(data)} bytes"


def check_golden(bundle: Bundle, engine: Engine) -> str:
    """The recorded logits come out of the served trunk and this head again.

    Raises:
        GateError: the samples are not what they should be, or the logits differ.
    """
    pictures, expected = _golden(bundle, engine)
    scale = max(1.0, float(np.abs(expected).max()))
    tolerance = engine.manifest.golden_tolerance[engine.precision] * scale
    head = load_head(bundle)
    starts = range(0, len(pictures), GOLDEN_BATCH)
    features = np.concatenate(
        [engine.features(pictures[start : start + GOLDEN_BATCH]) for start in starts]
    )
    difference = _difference(head, features, expected)
    if not difference <= tolerance:
        raise GateError(
            f"The golden samples do not reproduce: logits differ by {difference:.2e}, more than "
            f"the trunk's tolerance {tolerance:.2e}. Bundle the head with the trunk that it is for."
        )
    others = np.zeros_like(features)
    among_others = _difference(head, np.concatenate([features, others]), expected)
    alone = _difference(head, features[:1], expected[:1])
    if not (among_others <= tolerance and alone <= tolerance):
        raise GateError(f"{HEAD} answers a row otherwise when others are in its batch.")
    return (
        f"{len(pictures)} samples reproduce within {difference:.1e} (tolerance {tolerance:.1e}); "
        f"runs {_how_it_runs(head, features[:1], num_bytes=len(bundle.files[HEAD]))}"
    )


def _how_it_runs(head: Head, row: NDArray[np.float32], *, num_bytes: int) -> str:
    if head.is_packed:
        return "packed"
    seconds = []
    for _ in range(RUN_TRIALS):
        began_s = time.perf_counter()
        head.logits(row)
        seconds.append(time.perf_counter() - began_s)
    run_us = 1e6 * statistics.median(seconds)
    return f"in its own session, {run_us:.0f} us a row, graph of {num_bytes / 1e3:.0f} kB"


def _difference(head: Head, features: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of a logit in the first rows.

    Raises:
        GateError: the head fails, or gives no scores for these rows.
    """
    shape = (len(features), expected.shape[1])
    try:
        logits = head.logits(features)
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:
        raise GateError(f"{HEAD} cannot be run with {len(features)} rows: {error}") from error
    if logits.shape != shape:
        raise GateError(f"{HEAD} gives logits {logits.shape}; expected {shape}.")
    for scores in score(list(logits), [head] * len(logits))[: len(expected)]:
        if isinstance(scores, HeadOutputError):
            raise GateError(f"{HEAD} gives no scores: {scores}")
    return float(np.abs(logits[: len(expected)] - expected).max())


def load_head(bundle: Bundle) -> Head:
    """Make the head's session.

    Raises:
        GateError: ONNX Runtime cannot load it.
    """
    try:
        return Head.of_bundle(bundle)
    except Exception as error:
        raise GateError(f"{HEAD} cannot be loaded: {error}") from error


def _check_nodes(model: onnx.ModelProto) -> None:
    graph = model.graph
    if model.functions or model.training_info:
        raise GateError(f"{HEAD} defines functions or training steps; a head has none.")
    if len(graph.node) > MAX_NODES:
        raise GateError(f"{HEAD} has {len(graph.node)} nodes; at most {MAX_NODES} are accepted.")
    for node in graph.node:
        allowed = svm.OPERATORS if node.domain == svm.DOMAIN else ALLOWED_OPERATORS
        if node.domain not in {"", "ai.onnx", svm.DOMAIN} or node.op_type not in allowed:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise GateError(f"{HEAD} uses the operator {name}, which heads may not use.")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise GateError(f"{HEAD} has a graph inside its node {node.op_type}.")
            if not np.isfinite([attribute.f, *attribute.floats]).all():
                raise GateError(f"{attribute.name} of a {node.op_type} in {HEAD} is not finite.")
            if node.op_type == "Cast" and attribute.name == "to":
                _check_type(attribute.i, "A Cast")


def _check_weights(model: onnx.ModelProto) -> None:
    for tensor in _tensors(model.graph):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise GateError(f"{HEAD} keeps the weight {tensor.name!r} in another file.")
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


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    if graph.sparse_initializer:
        raise GateError(f"{HEAD} has sparse weights, which heads may not have.")
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise GateError(f"{HEAD} has sparse weights, which heads may not have.")
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _check_interface(graph: onnx.GraphProto, bundle: Bundle) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    wanted = (("features", bundle.manifest.num_features), ("logits", len(bundle.manifest.labels)))
    for (name, width), values in zip(wanted, (inputs, list(graph.output)), strict=True):
        found = [(value.name, _width(value)) for value in values]
        if found != [(name, width)]:
            raise GateError(
                f"{HEAD} has {found}; expected one float32 {name!r} of shape [rows, {width}]."
            )


def _width(value: onnx.ValueInfoProto) -> int | None:
    """The second of two dimensions of a float32 tensor; None if it is anything else."""
    tensor = value.type.tensor_type
    dimensions = tensor.shape.dim
    is_matrix = tensor.elem_type == onnx.TensorProto.FLOAT and len(dimensions) == 2  # noqa: PLR2004
    return dimensions[1].dim_value if is_matrix and not dimensions[0].dim_value else None


def _golden(bundle: Bundle, engine: Engine) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures uint8 [n, size, size, 3] and the logits float32 [n, labels] to expect of them."""
    try:
        tensors = load(bundle.files[GOLDEN])
    # safetensors raises an error class of its own that is no public name.
    except Exception as error:
        raise GateError(f"{GOLDEN} cannot be read: {error}.") from error
    if set(tensors) != {"pictures", "logits"}:
        raise GateError(f"{GOLDEN} holds {sorted(tensors)}; expected logits and pictures.")
    pictures, logits = tensors["pictures"], tensors["logits"]
    num, size_px = (len(pictures) if pictures.ndim else 0), engine.manifest.preprocessing.size_px
    shapes = ((num, size_px, size_px, 3), (num, len(bundle.manifest.labels)))
    types = (pictures.dtype == np.uint8) and (logits.dtype == np.float32)
    if (pictures.shape, logits.shape) != shapes or not types:
        raise GateError(
            f"{GOLDEN} holds {pictures.dtype} {pictures.shape} and {logits.dtype} {logits.shape}; "
            f"expected uint8 {shapes[0]} and float32 {shapes[1]}."
        )
    if not 1 <= num <= MAX_GOLDEN_PICTURES:
        raise GateError(f"{GOLDEN} holds {num} samples; expected 1 to {MAX_GOLDEN_PICTURES}.")
    if not math.isfinite(float(np.abs(logits).max())):
        raise GateError(f"{GOLDEN} holds logits that are not finite numbers.")
    return pictures, logits
