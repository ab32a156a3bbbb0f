"""Multinomial logistic regression as one affine head, its strength chosen on validation."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from models.heads import HeadError, LinearHead, check_rows

# Half a decade apart would change accuracies by less than the test sets can show (assumed).
L2_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Where there is nothing to choose on: strong enough for a handful of pictures a class.
DEFAULT_L2 = 1e-2


def choose_logistic_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    validation_features: Float[Tensor, "validation_rows num_features"],
    validation_labels: Int[Tensor, " validation_rows"],
    *,
    num_classes: int,
) -> tuple[LinearHead, float]:
    """Fit one head a strength and keep that with the lowest cross-entropy on validation.

    Cross-entropy rather than accuracy, because a few dozen pictures tie most accuracies.

    Returns:
        The head and its L2 strength; `DEFAULT_L2` where validation is empty.

    Raises:
        HeadError: see `logistic_head`.
    """
    if len(validation_labels) == 0:
        head = logistic_head(features, labels, num_classes=num_classes, l2=DEFAULT_L2)
        return head, DEFAULT_L2
    heads = {
        l2: logistic_head(features, labels, num_classes=num_classes, l2=l2) for l2 in L2_STRENGTHS
    }
    with torch.no_grad():
        losses = {
            l2: float(F.cross_entropy(head(validation_features), validation_labels))
            for l2, head in heads.items()
        }
    best = min(losses, key=lambda l2: losses[l2])
    return heads[best], best


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
    check_rows(features, labels, num_classes=num_classes)
    if not l2 > 0:
        raise HeadError(f"The L2 strength is {l2}; expected a value above 0.")
    rows = features.double().numpy()
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    # A feature that never changes says nothing; dividing by its rounding error would invent a sign.
    deviation = np.where(deviation > 1e-6 * (1 + np.abs(mean)), deviation, np.inf)
    model = LogisticRegression(C=1 / (l2 * len(rows)), max_iter=500)
    with warnings.catch_warnings():
        # Weak penalties may stop early on separable rows; validation judges what came of it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((rows - mean) / deviation, labels.numpy())
    weight, bias = np.asarray(model.coef_), np.asarray(model.intercept_)
    if num_classes == 2:  # noqa: PLR2004
        # scikit-learn gives one row for two classes: the difference of their logits.
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
    weight = weight / deviation
    head = LinearHead(features.shape[1], num_classes)
    head.load_state_dict(
        {
            "weight": torch.from_numpy(weight).float(),
            "bias": torch.from_numpy(bias - weight @ mean).float(),
        }
    )
    return head
