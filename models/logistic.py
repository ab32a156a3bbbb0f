"""Multinomial logistic regression as one affine head, its strength chosen on validation."""

import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import ThreadpoolController
from torch import Tensor

from models.heads import HeadError, LinearHead, check_rows, standard_of

# From strong to weak. Half a decade apart would change accuracies by less than test sets of a few
# hundred pictures can show (assumed).
L2_STRENGTHS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# Where there is nothing to choose on: strong enough for a handful of pictures a class.
DEFAULT_L2 = 1e-1
MAX_ITERATIONS = 300
# Matrices this small gain nothing from a second thread and lose much on a busy machine: 1,151 x 768
# took 9.6 s with two threads beside other work, 0.24 s with one (2 cores, 2026-11-21).
_BLAS = ThreadpoolController()


def choose_logistic_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    validation_features: Float[Tensor, "validation_rows num_features"],
    validation_labels: Int[Tensor, " validation_rows"],
    *,
    num_classes: int,
) -> tuple[LinearHead, float]:
    """Weaken the penalty as long as cross-entropy on validation falls.

    Cross-entropy rather than accuracy, because a few dozen pictures tie most accuracies.

    Returns:
        The best head and its L2 strength; `DEFAULT_L2` where validation is empty.

    Raises:
        HeadError: see `logistic_head`.
    """
    if len(validation_labels) == 0:
        head = logistic_head(features, labels, num_classes=num_classes, l2=DEFAULT_L2)
        return head, DEFAULT_L2
    best, best_l2, best_loss = LinearHead(features.shape[1], num_classes), math.nan, math.inf
    fitted = _heads(features, labels, num_classes=num_classes, strengths=L2_STRENGTHS)
    for l2, head in zip(L2_STRENGTHS, fitted, strict=False):
        with torch.no_grad():
            loss = float(F.cross_entropy(head(validation_features), validation_labels))
        if loss >= best_loss:
            break
        best, best_l2, best_loss = head, l2, loss
    return best, best_l2


def logistic_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    l2: float,
) -> LinearHead:
    """Minimise mean cross-entropy + l2/2 * |weights|^2 on standardised features.

    Args:
        l2: Strength of the penalty, above 0; it does not depend on the number of rows.

    Returns:
        A head on the features as they are: the standardisation is folded into weight and bias.

    Raises:
        HeadError: `l2` out of range, a class without a row, or features with NaN.
    """
    if not l2 > 0:
        raise HeadError(f"The L2 strength is {l2}; expected a value above 0.")
    return next(_heads(features, labels, num_classes=num_classes, strengths=[l2]))


def _heads(
    features: Tensor, labels: Tensor, *, num_classes: int, strengths: Sequence[float]
) -> Iterator[LinearHead]:
    """A head for each strength, fitted when it is asked for."""
    check_rows(features, labels, num_classes=num_classes)
    mean, deviation = standard_of(features)
    coordinates, axes = row_space((features.double().numpy() - mean) / deviation)
    for l2 in strengths:
        weight, bias = _fit(coordinates, labels.numpy(), l2=l2)
        weight = weight @ axes / deviation
        head = LinearHead(features.shape[1], num_classes)
        head.load_state_dict(
            {
                "weight": torch.from_numpy(weight).float(),
                "bias": torch.from_numpy(bias - weight @ mean).float(),
            }
        )
        yield head


def row_space(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates [rows, rank] and orthonormal axes [rank, features] of the space of the rows.

    The penalty does not change under rotation, so the best weights lie in that space: the result
    is the same, and the fit is cheaper where features outnumber rows or repeat each other.
    """
    with _BLAS.limit(limits=1, user_api="blas"):
        left, values, axes = np.linalg.svd(rows, full_matrices=False)
    is_used = values > 1e-10 * max(1e-300, values[0])
    return left[:, is_used] * values[is_used], axes[is_used]


def _fit(
    rows: NDArray[np.float64], labels: NDArray[np.int64], *, l2: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    model = LogisticRegression(C=1 / (l2 * len(rows)), max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(), _BLAS.limit(limits=1, user_api="blas"):
        # Weak penalties may stop early on separable rows; validation judges what came of it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, labels)
    weight, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(weight) == 1:
        # scikit-learn gives one row for two classes: the difference of their logits.
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
    return weight, bias
