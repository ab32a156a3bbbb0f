"""Small ONNX graphs, good and hostile, for the engine and the gates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LABELS = ("red", "green", "blue")
FLOAT = TensorProto.FLOAT
Dimensions = Sequence[int | str]


def node(operator: str, given: str, wanted: str, **attributes: Any) -> onnx.NodeProto:
    """One operation; names of tensors are separated by spaces."""
    return helper.make_node(operator, given.split(), wanted.split(), **attributes)


def head_model(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    inputs: Sequence[tuple[str, int, Dimensions]] = (("features", FLOAT, ("rows", 3)),),
    outputs: Sequence[tuple[str, int, Dimensions]] = (("logits", FLOAT, ("rows", 3)),),
    domains: Sequence[str] = ("",),
) -> onnx.ModelProto:
    """A model with a head's interface, unless told otherwise."""
    graph = helper.make_graph(
        list(nodes),
        "head",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    versions = {"ai.onnx.ml": 3}
    opsets = [helper.make_opsetid(domain, versions.get(domain, 18)) for domain in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def constant_head(logits: Sequence[float]) -> bytes:
    """A head that gives the same logits for every picture."""
    bias = np.asarray(logits, np.float32)
    weights = {"weight": np.zeros((3, len(bias)), np.float32), "bias": bias}
    outputs = [("logits", FLOAT, ("rows", len(bias)))]
    gemm = node("Gemm", "features weight bias", "logits")
    return head_model([gemm], weights, outputs=outputs).SerializeToString()


def two_row_head() -> bytes:
    """A head that passes with two rows and fails with any other number."""
    weights = {"shape": np.array([2, 3], np.int64)}
    return head_model([node("Reshape", "features shape", "logits")], weights).SerializeToString()


def first_row_head() -> bytes:
    """A head that gives one row of logits, however many it is asked for."""
    weights = {"start": np.array([0], np.int64), "end": np.array([1], np.int64)}
    return head_model(
        [node("Slice", "features start end start", "logits")], weights
    ).SerializeToString()


def mixing_head() -> bytes:
    """A head whose answer to a row depends on the other rows of its batch."""
    nodes = [node("ReduceMean", "features axes", "mean"), node("Sub", "features mean", "logits")]
    return head_model(nodes, {"axes": np.array([0], np.int64)}).SerializeToString()


def constant_node(tensor: np.ndarray) -> onnx.NodeProto:
    """A weight that is a node's attribute."""
    return node("Constant", "", "bias", value=numpy_helper.from_array(tensor))


def biased(constant: onnx.NodeProto) -> onnx.ModelProto:
    """Features plus what a node named `bias` gives."""
    return head_model([constant, node("Add", "features bias", "logits")])


def doubling(times: int) -> onnx.ModelProto:
    """A tensor that is joined with itself again and again, then reduced to logits."""
    names = ["features", *(f"wide{place}" for place in range(times))]
    nodes = [
        node("Concat", f"{small} {small}", large, axis=1)
        for small, large in itertools.pairwise(names)
    ]
    weights = {"axes": np.array([1], np.int64)}
    nodes += [
        node("ReduceMean", f"{names[-1]} axes", "mean"),
        node("Add", "features mean", "logits"),
    ]
    return head_model(nodes, weights)


def constant_product(size: int, times: int) -> onnx.ModelProto:
    """A square matrix of constants times itself, again and again."""
    names = ["square", *(f"product{place}" for place in range(times))]
    nodes = [node("MatMul", f"{left} square", right) for left, right in itertools.pairwise(names)]
    weights = {
        "row": np.ones((1, size), np.float32),
        "column": np.ones((size, 1), np.float32),
        "axes": np.array([0, 1], np.int64),
    }
    nodes = [
        node("Mul", "row column", "square"),
        *nodes,
        node("ReduceMean", f"{names[-1]} axes", "mean", keepdims=0),
        node("Add", "features mean", "logits"),
    ]
    return head_model(nodes, weights)
