"""From which score on a label is given: the threshold with the best F1 on validation."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

# Where validation has no picture with the label, or none without it.
USUAL = 0.5
# A manifest's thresholds lie between 0 and 1, and scores may be either.
MARGIN = 1e-6


def choose_thresholds(
    scores: Float[Tensor, "pictures labels"], labels: Int[Tensor, "pictures labels"]
) -> tuple[float, ...]:
    """For each label the threshold, halfway between two scores, whose F1 is the highest.

    Where several are as good, the one closest to 0.5.

    Args:
        scores: 0 to 1, of pictures that the head did not learn from.
        labels: 0 or 1.

    Source: Lipton, Elkan & Narayanaswamy 2014, arXiv:1402.1892: the best threshold for F1 is half
    the best F1 where scores are calibrated, so rare labels need a lower one than 0.5.
    """
    columns = zip(scores.double().numpy().T, labels.numpy().T, strict=True)
    return tuple(_best(column, has_label == 1) for column, has_label in columns)


def _best(scores: NDArray[np.float64], has_label: NDArray[np.bool_]) -> float:
    if not has_label.any() or has_label.all():
        return USUAL
    edges = np.concatenate([[0.0], np.unique(scores), [1.0]])
    candidates = np.clip((edges[1:] + edges[:-1]) / 2, MARGIN, 1 - MARGIN)
    given = scores >= candidates[:, None]
    hits = (given & has_label).sum(axis=1)
    f1 = 2 * hits / (given.sum(axis=1) + has_label.sum())
    is_best = f1 >= f1.max() - 1e-12  # but for rounding
    best = candidates[is_best]
    return float(best[np.argmin(np.abs(best - USUAL))])
