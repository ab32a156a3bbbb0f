"""What nodes give that read constants only: the arithmetic that exporters leave in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_Array = NDArray[Any]
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Add": np.add, "Div": np.divide, "Mul": np.multiply, "Neg": np.negative, "Sqrt": np.sqrt,
    "Sub": np.subtract,
}  # fmt: skip


def fold(operator: str, operands: Sequence[Any], attributes: Mapping[str, Any]) -> _Array | None:
    """The constant that an operator gives of constants, or None if the operator is another one.

    Args:
        operands: Arrays, or None for an input that is left out.

    Raises:
        ValueError: shapes do not fit.
    """
    if operator == "Constant":
        return _constant(attributes)
    arrays = [np.asarray(operand) for operand in operands if operand is not None]
    if operator in _ARITHMETIC:
        return _arithmetic(_ARITHMETIC[operator], arrays)
    if operator == "Identity":
        return arrays[0]
    if operator == "Transpose":
        return np.transpose(arrays[0], attributes.get("perm"))
    if operator == "Cast":
        return arrays[0].astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))
    if operator == "Reshape" and 0 not in arrays[1]:  # 0 has a meaning of its own
        return arrays[0].reshape(arrays[1].tolist())
    return None


def _constant(attributes: Mapping[str, Any]) -> _Array | None:
    if "value" in attributes:
        return numpy_helper.to_array(attributes["value"])
    kinds = {"value_float": np.float32, "value_floats": np.float32}
    kinds |= {"value_int": np.int64, "value_ints": np.int64}
    (name, value), *_ = attributes.items()
    return np.asarray(value, kinds[name]) if name in kinds else None


def _arithmetic(function: Callable[..., Any], arrays: Sequence[_Array]) -> _Array | None:
    # Whole numbers divide otherwise, and half precision rounds.
    if any(array.dtype not in {np.dtype(np.float32), np.dtype(np.float64)} for array in arrays):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(function(*(array.astype(np.float64) for array in arrays)))
