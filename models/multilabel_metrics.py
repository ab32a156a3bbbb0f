"""How good scores of several labels a picture are, and how sure one can be of it.

Every metric is a function of weighted pictures, so one pass gives its value (all weights 1) and its
bootstrap interval (weights are how often a resample drew a picture), as in `models.metrics`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from models.evaluate import Estimate, share

NUM_RESAMPLES = 1000

Floats = NDArray[np.float64]


def measure(
    scores: Float[Tensor, "pictures labels"],
    labels: Int[Tensor, "pictures labels"],
    thresholds: Sequence[float],
    *,
    names: Sequence[str],
) -> dict[str, Estimate]:
    """Several views of the same answers, with 95 % intervals over pictures.

    A label that no picture has, or that all have, counts in "exact" alone: nothing is to be found.

    Args:
        scores: 0 to 1.
        labels: 0 or 1.
        thresholds: For each label the least score at which it is given.

    Returns:
        "map": mean over labels of the average precision; "f1": mean over labels of F1; "exact":
        share of pictures that get exactly their labels; and of each label "auc LABEL", the area
        under the ROC curve, and "f1 LABEL". Intervals of "exact" are Wilson's, of all others
        bootstrap percentiles (1,000 resamples of pictures, fixed seed, those without a picture with
        or without the label left out).
    """
    values, truth = scores.double().numpy(), labels.numpy() == 1
    given = values >= np.asarray(thresholds)
    num = len(truth)
    drawn = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES)
    # The first row is the pictures as they are.
    weights = np.concatenate([np.ones((1, num)), drawn.astype(np.float64)])
    exact = share(int((given == truth).all(axis=1).sum()), num)
    places = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0)).tolist()
    if not places:
        return {"exact": exact}
    columns = {place: (values[:, place], truth[:, place]) for place in places}
    f1s = {place: f1(given[:, place], truth[:, place], weights) for place in places}
    precisions = [average_precision(*column, weights) for column in columns.values()]
    found = {
        "map": _estimate(_mean(precisions), num),
        "f1": _estimate(_mean(list(f1s.values())), num),
        "exact": exact,
    }
    for place in places:
        found[f"auc {names[place]}"] = _estimate(area_under_roc(*columns[place], weights), num)
        found[f"f1 {names[place]}"] = _estimate(f1s[place], num)
    return found


def average_precision(scores: Floats, has_label: NDArray[np.bool_], weights: Floats) -> Floats:
    """Sum over thresholds of the precision there times what recall rises by, for each resample.

    Args:
        scores: Float64 [pictures].
        weights: Float64 [resamples, pictures].

    Returns:
        Float64 [resamples]; NaN where no picture with the label has weight.
    """
    hits, false_alarms = _counts(scores, has_label, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(hits / (hits + false_alarms))
        recall = hits / hits[:, -1:]
    return (np.diff(recall, axis=1, prepend=0) * precision).sum(axis=1)


def area_under_roc(scores: Floats, has_label: NDArray[np.bool_], weights: Floats) -> Floats:
    """By trapezoids, as `average_precision`; NaN also where no picture without the label is."""
    hits, false_alarms = _counts(scores, has_label, weights)
    before = np.concatenate([np.zeros((len(hits), 1)), hits[:, :-1]], axis=1)
    area = (np.diff(false_alarms, axis=1, prepend=0) * (hits + before) / 2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return area / (hits[:, -1] * false_alarms[:, -1])


def f1(given: NDArray[np.bool_], has_label: NDArray[np.bool_], weights: Floats) -> Floats:
    """Of the pictures that are given the label, float64 [resamples]; see `average_precision`."""
    both = weights @ (given & has_label)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * both / (weights @ given + weights @ has_label)


def _counts(scores: Floats, has_label: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """Weight with and without the label from each score on, the best first: [resamples, scores]."""
    order = np.argsort(-scores, kind="stable")
    # Pictures of one score pass a threshold together.
    is_last = np.append(np.diff(scores[order]) != 0, True)
    ordered = weights[:, order]
    hits = (ordered * has_label[order]).cumsum(axis=1)[:, is_last]
    return hits, ordered.cumsum(axis=1)[:, is_last] - hits


def _mean(each: Sequence[Floats]) -> Floats:
    """Over the labels; a resample in which one cannot be judged counts without it."""
    stacked = np.stack(each)
    return np.nansum(stacked, axis=0) / np.maximum(1, (~np.isnan(stacked)).sum(axis=0))


def _estimate(values: Floats, num: int) -> Estimate:
    value = float(values[0])
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Estimate(value, min(value, float(low)), max(value, float(high)), num)
