"""Affine heads, recognised from their graph whatever exporter wrote it.

A graph is followed with a symbol in place of the features. Linear and logistic regression end as
one product; a cosine head as the same product of a direction. What is not understood is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from serve.constants import fold

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# From here on the operators below mean what they mean today (axes and bounds are inputs).
MIN_OPSET = 13
# Two matrices in a row become one if that is quick; a large pair is rather run as it is.
MAX_FOLD_MULTIPLICATIONS = 2**30


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Features float32 [rows, num_features] -> logits float32 [rows, labels], each row by itself.

    Args:
        weight: Float32 [labels, num_features].
        bias: Float32 [labels].
        centre: Taken from the features first, float32 [num_features]. It is not folded into the
            bias: far from zero, the two would cancel and leave few digits.
        floor: If given, the centred features are divided by their norm or by this, whichever is
            more.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    centre: NDArray[np.float32] | None = None
    floor: np.float32 | None = None

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [rows, labels]."""
        if self.centre is not None:
            features = features - self.centre
        if self.floor is not None:
            norms: NDArray[np.float32] = np.sqrt(np.einsum("rf,rf->r", features, features))
            features = np.asarray(features / np.maximum(norms, self.floor)[:, None], np.float32)
        # A product for each row, 12 us more for 32 rows and 25 labels: one for all of them would
        # round a row by who is beside it.
        products = np.matmul(features[:, None, :], self.weight.T)[:, 0]
        return np.asarray(products + self.bias, np.float32)


def recognise(model: onnx.ModelProto) -> AffineMap | None:
    """The map from `features` to `logits` that a graph computes, or None if it is no such map."""
    opset = max((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), default=0)
    if opset < MIN_OPSET:
        return None
    values: dict[str, _Value] = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    width = next(i for i in model.graph.input if i.name == "features").type.tensor_type.shape.dim[1]
    values["features"] = _Linear(np.ones(width.dim_value), np.zeros(width.dim_value))
    for node in model.graph.node:
        # Shapes that do not fit are for ONNX Runtime to complain about.
        try:
            value = _evaluate(node, values)
        except ValueError:
            return None
        if value is None or len(node.output) != 1:
            return None
        values[node.output[0]] = value
    return _packed(values.get("logits"))


@dataclass(frozen=True)
class _Linear:
    """[rows, width]: weight x source + bias.

    The source is features - centre, divided by its norm if there is a floor.

    Args:
        weight: [width, num_features], or its diagonal [num_features] while there is no other.
    """

    weight: Vector | Matrix
    bias: Vector
    centre: Vector | None = None
    floor: float | None = None

    @property
    def is_source(self) -> bool:
        """Whether nothing has been done to the source yet."""
        return self.weight.ndim == 1 and bool((self.weight == 1).all() and (self.bias == 0).all())

    def plus(self, term: _Value) -> _Linear | None:
        vector = _vector(term, len(self.bias))
        if vector is None:
            return None
        if self.is_source and self.floor is None:
            return replace(self, centre=-vector if self.centre is None else self.centre - vector)
        return replace(self, bias=self.bias + vector)

    def times(self, factor: _Value) -> _Linear | None:
        vector = _vector(factor, len(self.bias))
        if vector is None:
            return None
        weight = (self.weight.T * vector).T
        return replace(self, weight=weight, bias=self.bias * vector)

    def through(self, matrix: Matrix) -> _Linear | None:
        """The product with a constant [width, new width]."""
        if self.weight.ndim == 1:
            weight = (self.weight[:, None] * matrix).T
        else:
            num_features, (width, new) = self.weight.shape[1], matrix.shape
            is_larger = num_features * new > self.weight.size + matrix.size
            if is_larger or num_features * width * new > MAX_FOLD_MULTIPLICATIONS:
                return None
            weight = matrix.T @ self.weight
        return replace(self, weight=weight, bias=self.bias @ matrix)


@dataclass(frozen=True)
class _Norm:
    """[rows, 1]: the norm of a value, or `floor` where that is more."""

    of: _Linear
    floor: float


_Value = NDArray[Any] | _Linear | _Norm
_Attributes = Mapping[str, Any]
_Operands = Sequence[_Value | None]


def _evaluate(node: onnx.NodeProto, values: Mapping[str, _Value]) -> _Value | None:
    is_known = all(not name or name in values for name in node.input)
    if node.domain not in {"", "ai.onnx"} or not is_known:
        return None
    operands = [values[name] if name else None for name in node.input]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if all(operand is None or isinstance(operand, np.ndarray) for operand in operands):
        return fold(node.op_type, operands, attributes)
    rule = _RULES.get(node.op_type)
    return rule(operands, attributes) if rule else None


def _packed(logits: _Value | None) -> AffineMap | None:
    if not isinstance(logits, _Linear) or logits.weight.ndim != 2:  # noqa: PLR2004
        return None
    # What overflows here did not where the graph computes in another order.
    with np.errstate(over="ignore"):
        weight, bias = logits.weight.astype(np.float32), logits.bias.astype(np.float32)
        centre = None if logits.centre is None else logits.centre.astype(np.float32)
    parts = (weight, bias) if centre is None else (weight, bias, centre)
    if not all(np.isfinite(part).all() for part in parts):
        return None
    floor = None if logits.floor is None else np.float32(logits.floor)
    return AffineMap(np.ascontiguousarray(weight), bias, centre, floor)


def _vector(value: _Value | None, width: int) -> Vector | None:
    """A constant that is the same for every row, float64 [width]."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim > 2:  # noqa: PLR2004
        return None
    is_same = value.ndim < 2 or value.shape[0] == 1  # noqa: PLR2004
    if not is_same or value.size not in {1, width}:
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (width,))


def _matrix(value: _Value | None) -> Matrix | None:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.ndim != 2:  # noqa: PLR2004
        return None
    return value.astype(np.float64)


def _gemm(operands: _Operands, attributes: _Attributes) -> _Value | None:
    left, matrix = operands[0], _matrix(operands[1])
    if not isinstance(left, _Linear) or matrix is None or attributes.get("transA"):
        return None
    if attributes.get("transB"):
        matrix = matrix.T
    product = left.through(attributes.get("alpha", 1.0) * matrix)
    if product is None or len(operands) < 3 or operands[2] is None:  # noqa: PLR2004
        return product
    term = _vector(operands[2], matrix.shape[1])
    return None if term is None else product.plus(attributes.get("beta", 1.0) * term)


def _matmul(operands: _Operands, _: _Attributes) -> _Value | None:
    return _gemm(operands, {})


def _add(operands: _Operands, _: _Attributes) -> _Value | None:
    left, right = operands
    if isinstance(left, _Linear) and right is not None:
        return left.plus(right)
    return right.plus(left) if isinstance(right, _Linear) and left is not None else None


def _sub(operands: _Operands, _: _Attributes) -> _Value | None:
    left, right = operands
    if isinstance(left, _Linear) and isinstance(right, np.ndarray):
        return left.plus(np.asarray(-right))
    if isinstance(right, _Linear) and isinstance(left, np.ndarray):
        negative = right.times(np.array(-1.0))
        return negative.plus(left) if negative else None
    return None


def _mul(operands: _Operands, _: _Attributes) -> _Value | None:
    left, right = operands
    if isinstance(left, _Linear) and right is not None:
        return left.times(right)
    return right.times(left) if isinstance(right, _Linear) and left is not None else None


def _div(operands: _Operands, _: _Attributes) -> _Value | None:
    left, right = operands
    if not isinstance(left, _Linear):
        return None
    if isinstance(right, _Norm):
        return _direction(left, right.floor) if right.of is left else None
    divisor = _vector(right, len(left.bias))
    return left.times(1 / divisor) if divisor is not None and divisor.all() else None


def _neg(operands: _Operands, _: _Attributes) -> _Value | None:
    return operands[0].times(np.array(-1.0)) if isinstance(operands[0], _Linear) else None


def _direction(value: _Linear, floor: float) -> _Linear | None:
    return replace(value, floor=floor) if value.is_source and value.floor is None else None


def _lp_normalization(operands: _Operands, attributes: _Attributes) -> _Value | None:
    value = operands[0]
    is_rowwise = attributes.get("axis", -1) in {1, -1} and attributes.get("p", 2) == 2  # noqa: PLR2004
    if not isinstance(value, _Linear) or not is_rowwise:
        return None
    # A row of zeros stays one: 0 divided by anything but 0.
    return _direction(value, float(np.finfo(np.float32).tiny))


def _reduce_l2(operands: _Operands, attributes: _Attributes) -> _Value | None:
    value = operands[0]
    axes = operands[1] if len(operands) > 1 else np.array(attributes.get("axes", ()))
    is_rowwise = isinstance(axes, np.ndarray) and axes.tolist() in ([1], [-1])
    if not isinstance(value, _Linear) or not is_rowwise or not attributes.get("keepdims", 1):
        return None
    return _Norm(value, 0.0)


def _clip(operands: _Operands, _: _Attributes) -> _Value | None:
    has_upper = len(operands) > 2 and operands[2] is not None  # noqa: PLR2004
    return None if has_upper or len(operands) < 2 else _max(operands[:2], {})  # noqa: PLR2004


def _max(operands: _Operands, _: _Attributes) -> _Value | None:
    norms = [operand for operand in operands if isinstance(operand, _Norm)]
    floors = [operand for operand in operands if isinstance(operand, np.ndarray)]
    if len(operands) != 2 or len(norms) != 1 or len(floors) != 1:  # noqa: PLR2004
        return None
    floor = _vector(floors[0], 1)
    return None if floor is None else _Norm(norms[0].of, max(norms[0].floor, float(floor[0])))


def _cast(operands: _Operands, attributes: _Attributes) -> _Value | None:
    # Half precision would round.
    keeps = attributes["to"] in {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
    return operands[0] if keeps else None


def _flatten(operands: _Operands, attributes: _Attributes) -> _Value | None:
    value, axis = operands[0], attributes.get("axis", 1)
    return value if isinstance(value, _Linear) and axis in {1, -1} else None


def _reshape(operands: _Operands, attributes: _Attributes) -> _Value | None:
    value, shape = operands[0], operands[1]
    if not isinstance(value, _Linear) or not isinstance(shape, np.ndarray):
        return None
    width = len(value.bias)
    stays = [[0, -1], [0, width], [-1, width], [-1, 0], [0, 0]]
    return value if shape.tolist() in stays and not attributes.get("allowzero") else None


def _identity(operands: _Operands, _: _Attributes) -> _Value | None:
    return operands[0]


_Rule = Callable[[_Operands, _Attributes], _Value | None]

_RULES: dict[str, _Rule] = {
    "Add": _add, "Cast": _cast, "Clip": _clip, "Div": _div, "Flatten": _flatten, "Gemm": _gemm,
    "Identity": _identity, "LpNormalization": _lp_normalization, "MatMul": _matmul, "Max": _max,
    "Mul": _mul, "Neg": _neg, "ReduceL2": _reduce_l2, "Reshape": _reshape, "Sub": _sub,
}  # fmt: skip
