"""Support vector machines of ONNX's machine-learning domain, checked before they are run.

ONNX infers no shapes for these nodes, and ONNX Runtime takes their lists at their word: a list that
is shorter than the others say would be read beyond its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

DOMAIN = "ai.onnx.ml"
OPERATORS = frozenset({"SVMClassifier", "SVMRegressor"})


class SvmError(Exception):
    """A support vector machine that contradicts itself, or of a kind that heads do not have."""


@dataclass(frozen=True)
class Svm:
    """The sizes of a machine with a radial kernel.

    Args:
        num_outputs: Scores a row: 1 of a regressor, 2 of a classifier of two labels, else one for
            each pair of labels.
    """

    num_features: int
    num_vectors: int
    num_outputs: int


def read_svm(node: onnx.NodeProto) -> Svm:
    """The sizes that a node's lists agree on.

    Raises:
        SvmError: they do not agree, or the machine has another kernel, text for labels,
            probabilities of its own, or a last step.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    _check_kind(node, attributes)
    vectors = attributes.get("support_vectors", [])
    if node.op_type == "SVMRegressor":
        num_vectors, num_outputs, num_pairs = attributes.get("n_supports", 0), 1, 1
        num_coefficients = num_vectors
    else:
        counts = attributes.get("vectors_per_class", [])
        num_labels = len(counts)
        if attributes.get("classlabels_ints") != list(range(num_labels)) or num_labels < 2:  # noqa: PLR2004
            raise SvmError("classlabels_ints are not 0, 1, … for each of vectors_per_class")
        if min(counts) < 1:
            raise SvmError("a label has no support vector")
        num_vectors, num_pairs = sum(counts), num_labels * (num_labels - 1) // 2
        num_coefficients = num_vectors * (num_labels - 1)
        num_outputs = max(2, num_pairs)
    if num_vectors < 1 or not vectors or len(vectors) % num_vectors:
        raise SvmError(f"{len(vectors)} numbers are no {num_vectors} support vectors")
    for name, wanted in (("coefficients", num_coefficients), ("rho", num_pairs)):
        if len(attributes.get(name, [])) != wanted:
            raise SvmError(f"{name} has {len(attributes.get(name, []))} numbers, not {wanted}")
    return Svm(len(vectors) // num_vectors, num_vectors, num_outputs)


_OWN_NAMES = {
    "SVMClassifier": {"classlabels_ints", "vectors_per_class"},
    "SVMRegressor": {"n_supports"},
}
_SHARED_NAMES = {"coefficients", "kernel_params", "kernel_type", "rho", "support_vectors"}


def _check_kind(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    allowed = _OWN_NAMES[node.op_type] | _SHARED_NAMES | {"post_transform"}
    if extra := sorted(attributes.keys() - allowed):
        raise SvmError(f"{extra[0]} is nothing that a head's {node.op_type} needs")
    if attributes.get("post_transform", b"NONE") != b"NONE":
        raise SvmError("it ends with a transform; expected NONE, the link is the manifest's")
    if attributes.get("kernel_type") != b"RBF" or len(attributes.get("kernel_params", [])) != 3:  # noqa: PLR2004
        raise SvmError("its kernel is not RBF with three parameters")
    num_outputs = 1 if node.op_type == "SVMRegressor" else 2
    if len(node.input) != 1 or len(node.output) != num_outputs:
        raise SvmError(f"it has not one input and {num_outputs} outputs")
