"""What running a head costs, inferred from its graph before anything of it is run.

A kilobyte of allowed operators can ask for any amount of memory: a tensor that is joined with
itself forty times has a trillion elements, and ONNX Runtime computes constants while it loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from serve import svm

# Batches that a graph's cost is counted for; the bounds below are for so many rows.
HEAD_ROWS = 64
TAIL_ROWS = 8  # whose rows are maps
# Twice what 64 rows of 2,048 features and 100,000 labels need: about half a second on one core.
MAX_ELEMENTS = 2**26
MAX_MULTIPLICATIONS = 2**34

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

Shape = tuple[int, ...]


class CostError(Exception):
    """A graph costs too much, or what it costs cannot be known."""


def check_costs(model: onnx.ModelProto, *, rows: int) -> None:
    """Bound the elements that a graph's nodes give and the multiplications of its products.

    Raises:
        CostError: more than a head needs, or a shape that only a run would show.
    """
    machines = _machines(model)
    shapes = _shapes(model, machines, rows)
    num_elements = num_multiplications = 0
    for node in model.graph.node:
        for name in filter(None, node.output):
            if name not in shapes:
                raise CostError(
                    f"The shape of {name!r} ({node.op_type}) is not known before it is run."
                )
            size = math.prod(shapes[name])
            num_elements += size * max(1, len(node.input))
            if node.op_type in {"MatMul", "Gemm"}:
                num_multiplications += size * _depth(node, shapes)
            elif node.op_type == "Conv":
                num_multiplications += size * math.prod(shapes.get(node.input[1], ())[1:])
    for node, machine in machines:
        if shapes.get(node.input[0]) != (rows, machine.num_features):
            raise CostError(f"{node.op_type} takes {machine.num_features} numbers a row.")
        num_kernels = rows * machine.num_vectors
        num_elements += num_kernels
        num_multiplications += num_kernels * (machine.num_features + machine.num_outputs)
    for what, needed, allowed in (
        ("elements", num_elements, MAX_ELEMENTS),
        ("multiplications", num_multiplications, MAX_MULTIPLICATIONS),
    ):
        if needed > allowed:
            raise CostError(f"{rows} rows need {needed} {what}; at most {allowed} are accepted.")


_Machines = Sequence[tuple[onnx.NodeProto, svm.Svm]]


def _machines(model: onnx.ModelProto) -> _Machines:
    nodes = [node for node in model.graph.node if node.domain == svm.DOMAIN]
    try:
        return [(node, svm.read_svm(node)) for node in nodes]
    except svm.SvmError as error:
        raise CostError(f"A support vector machine is not understood: {error}.") from error


def _shapes(model: onnx.ModelProto, machines: _Machines, rows: int) -> Mapping[str, Shape]:
    """Shapes of all tensors for a batch of `rows`; one that is not wholly known is left out."""
    batch = onnx.ModelProto()
    batch.CopyFrom(model)
    # What a file says of its own shapes is not believed; inference says them anew.
    del batch.graph.value_info[:]
    for value in batch.graph.output:
        value.type.tensor_type.ClearField("shape")
    for value in batch.graph.input:
        if value.name in {"features", "prefix"}:
            value.type.tensor_type.shape.dim[0].dim_value = rows
    # Nothing is inferred of a machine, so its outputs are put in from outside.
    for node, machine in machines:
        batch.graph.node.remove(node)
        *labels, scores = node.output
        batch.graph.input.extend(
            helper.make_tensor_value_info(name, INT64, (rows,)) for name in filter(None, labels)
        )
        batch.graph.input.append(
            helper.make_tensor_value_info(scores, FLOAT, (rows, machine.num_outputs))
        )
    try:
        graph = onnx.shape_inference.infer_shapes(batch, strict_mode=True, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise CostError(f"The shapes in the graph cannot be inferred: {error}") from error
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in values:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


def _depth(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """How many products are summed for one element of a product of matrices."""
    left = shapes.get(node.input[0], ())
    is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return left[0 if is_transposed else -1] if left else 1
