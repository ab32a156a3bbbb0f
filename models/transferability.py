"""How well features suit labels, from the features alone: nothing is trained, nothing held out."""

import math

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor

MAX_STEPS = 500
CLOSE = 1e-6


def log_evidence(
    features: Float[Tensor, "pictures num_features"],
    labels: Int[Tensor, " pictures"],
    *,
    num_classes: int,
) -> float:
    """LogME: the largest log evidence of labels given features, a picture and class.

    Each class is a target of ones and zeros, regressed on the features with Gaussian weights and
    noise; their two precisions are those of the largest evidence, found by a fixed point.

    Returns:
        Mean over the classes, by the number of pictures; more is better.

    Source: You et al. 2021, arXiv:2102.11005, algorithm 1, with the iteration of algorithm 3.
    """
    rows = features.double().numpy()
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    spectrum = values**2
    targets = [(labels == label).double().numpy() for label in range(num_classes)]
    evidences = [_largest_evidence(left.T @ y, float(y @ y), spectrum, rows.shape) for y in targets]
    return float(np.mean(evidences)) / len(rows)


def h_score(
    features: Float[Tensor, "pictures num_features"],
    labels: Int[Tensor, " pictures"],
    *,
    num_classes: int,
) -> float:
    """H-score: how much of the features' spread, in their own measure, is between the classes.

    The covariance is shrunk (Ledoit & Wolf 2004), without which features that outnumber pictures
    reach the largest score whatever they say (Ibrahim et al. 2021, arXiv:2110.06893).

    Returns:
        From 0 to at most the number of classes less one.

    Source: Bao et al. 2019, arXiv:2212.10082, definition 2.
    """
    rows = features.double().numpy()
    rows = rows - rows.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(rows, assume_centered=True)
    classes = labels.numpy()
    means = np.stack([rows[classes == label].mean(axis=0) for label in range(num_classes)])
    weights = np.bincount(classes, minlength=num_classes) / len(rows)
    between = (means.T * weights) @ means
    # The part between the classes is shrunk alike, as in arXiv:2110.06893, equation 6.
    return float((1 - shrinkage) * np.trace(np.linalg.solve(covariance, between)))


def _largest_evidence(
    along: NDArray[np.float64],
    squared: float,
    spectrum: NDArray[np.float64],
    shape: tuple[int, ...],
) -> float:
    """Log evidence of one target at the best precisions of weights (alpha) and noise (beta).

    Args:
        along: The target along the left singular vectors of the features.
        squared: Its squared length.
        spectrum: Squared singular values.
    """
    num, num_features = shape
    outside = squared - along @ along  # what no weights can explain
    alpha, beta = 1.0, 1.0
    for _ in range(MAX_STEPS):
        ratio = alpha / beta
        shrunk = spectrum / (spectrum + ratio)
        gamma = shrunk.sum()
        weights = (spectrum * along**2 / (spectrum + ratio) ** 2).sum()
        residual = max((along**2 * (1 - shrunk) ** 2).sum() + outside, 1e-12)
        alpha, beta = gamma / max(weights, 1e-12), (num - gamma) / residual
        if abs(alpha / beta - ratio) <= CLOSE * ratio:
            break
    ratio = alpha / beta
    weights = (spectrum * along**2 / (spectrum + ratio) ** 2).sum()
    residual = (along**2 * (ratio / (spectrum + ratio)) ** 2).sum() + outside
    log_determinant = np.log(alpha + beta * spectrum).sum()
    log_determinant += (num_features - len(spectrum)) * math.log(alpha)
    return 0.5 * (
        num_features * math.log(alpha)
        + num * math.log(beta / (2 * math.pi))
        - beta * residual
        - alpha * weights
        - log_determinant
    )
