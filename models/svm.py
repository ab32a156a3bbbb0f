"""Support vector machines, one label against the rest, as heads that export to plain graphs."""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC, LinearSVC
from torch import Tensor, nn
from typing_extensions import override

from models.heads import LinearHead, check_rows, check_size, standard_of
from models.logistic import row_space

MAX_ITERATIONS = 5_000


class RbfHead(nn.Module):
    """Logits are sums over support vectors of exp(-|row - vector|^2), one sum a label.

    A plain graph of products instead of ONNX's own operator for such machines: that one gives a
    score for each pair of labels, which votes would have to turn into one a label, and a vote jumps
    where a score only passes through zero.
    """

    centre: Tensor
    factor: Tensor
    vectors: Tensor
    norms: Tensor
    coefficients: Tensor
    bias: Tensor

    def __init__(self, num_features: int, num_vectors: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(num_features))
        self.register_buffer("factor", torch.ones(num_features))
        self.register_buffer("vectors", torch.zeros(num_vectors, num_features))
        self.register_buffer("norms", torch.zeros(num_vectors))
        self.register_buffer("coefficients", torch.zeros(num_classes, num_vectors))
        self.register_buffer("bias", torch.zeros(num_classes))

    @override
    def forward(
        self, features: Float[Tensor, "rows num_features"]
    ) -> Float[Tensor, "rows num_classes"]:
        """Features to logits."""
        rows = (features - self.centre) * self.factor
        distances = (rows * rows).sum(dim=1, keepdim=True) + self.norms
        distances = distances - 2 * F.linear(rows, self.vectors)
        return F.linear(torch.exp(-distances), self.coefficients, self.bias)


def linear_svm_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    c: float,
) -> LinearHead:
    """A linear machine for each label against the rest, with squared hinge loss.

    Args:
        c: Weight of the losses against the width of the margin, above 0; for rows of norm about 1.

    Returns:
        An affine head on the features as they are; of two labels, each has half the decision value.

    Raises:
        HeadError: a class without a row, or features with NaN.

    Source: Cortes & Vapnik 1995, doi:10.1007/BF00994018; one against the rest as in Rifkin &
    Klautau 2004, JMLR 5:101-141.
    """
    check_rows(features, labels, num_classes=num_classes)
    centre, factor = _scaling(features)
    # The margin's width does not change under rotation, so the cheaper space has the same machine.
    coordinates, axes = row_space((features.double().numpy() - centre) * factor)
    weights: list[NDArray[np.float64]] = []
    biases: list[float] = []
    for is_label in _against_rest(labels, num_classes):
        machine = LinearSVC(C=c, dual=False, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            # A weak penalty may stop early; what is left out of the data judges what came of it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            machine.fit(coordinates, is_label)
        weights.append(machine.coef_[0] @ axes * factor)
        biases.append(float(machine.intercept_[0]))
    weight, bias = _both_sides(np.stack(weights), np.array(biases))
    head = LinearHead(features.shape[1], num_classes)
    head.load_state_dict(
        {
            "weight": torch.from_numpy(weight).float(),
            "bias": torch.from_numpy(bias - weight @ centre).float(),
        }
    )
    return head


def rbf_svm_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    c: float,
    gamma: float,
) -> RbfHead:
    """A machine with a radial kernel for each label against the rest.

    Args:
        c: Weight of the losses against the width of the margin, above 0.
        gamma: How fast a vector's say falls with the squared distance, above 0; for rows of norm
            about 1, so 1 is scikit-learn's "scale".

    Raises:
        HeadError: a class without a row, features with NaN, or more rows than a head may keep.

    Source: see `linear_svm_head`.
    """
    check_rows(features, labels, num_classes=num_classes)
    check_size(features)
    centre, factor = _scaling(features)
    rows = (features.double().numpy() - centre) * factor
    kernels = rbf_kernel(rows, gamma=gamma)
    coefficients: list[NDArray[np.float64]] = []
    biases: list[float] = []
    for is_label in _against_rest(labels, num_classes):
        machine = SVC(C=c, kernel="precomputed").fit(kernels, is_label)
        own = np.zeros(len(rows))
        own[machine.support_] = machine.dual_coef_[0]
        coefficients.append(own)
        biases.append(float(machine.intercept_[0]))
    sums, bias = _both_sides(np.stack(coefficients), np.array(biases))
    is_used = sums.any(axis=0)
    # The kernel's width is folded into the scaling.
    vectors = rows[is_used] * np.sqrt(gamma)
    head = RbfHead(features.shape[1], int(is_used.sum()), num_classes)
    tensors = {
        "centre": centre,
        "factor": factor * np.sqrt(gamma),
        "vectors": vectors,
        "norms": (vectors**2).sum(axis=1),
        "coefficients": sums[:, is_used],
        "bias": bias,
    }
    head.load_state_dict({name: torch.from_numpy(value).float() for name, value in tensors.items()})
    return head


def _scaling(features: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and factor that give rows a norm of about 1, so that one grid fits every trunk."""
    mean, deviation = standard_of(features)
    return mean, 1 / (deviation * np.sqrt(features.shape[1]))


def _against_rest(labels: Tensor, num_classes: int) -> Iterator[NDArray[np.bool_]]:
    """Of two labels the second one's machine says all."""
    for label in range(num_classes) if num_classes > 2 else (1,):  # noqa: PLR2004
        yield (labels == label).numpy()


def _both_sides(
    weights: NDArray[np.float64], biases: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One row a label, also of two labels that share a machine."""
    if len(weights) > 1:
        return weights, biases
    return np.stack([-weights[0], weights[0]]) / 2, np.stack([-biases[0], biases[0]]) / 2
