"""Specification of models/multilabel_metrics.py: scikit-learn's values, of resamples too."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from models.multilabel_metrics import area_under_roc, average_precision, f1, measure

CHANCE = np.random.default_rng(0)
TRUTH = CHANCE.random(60) < 0.3
# Of one decimal, so that many are equal.
SCORES = np.round(np.clip(0.4 * TRUTH + CHANCE.random(60) * 0.7, 0, 1), 1)
WEIGHTS = CHANCE.integers(0, 4, (5, 60)).astype(np.float64)


def test_average_precision_and_area_are_those_of_scikit_learn() -> None:
    """With ties, and with pictures that count several times or not at all."""
    for weights, precision, area in zip(
        WEIGHTS,
        average_precision(SCORES, TRUTH, WEIGHTS),
        area_under_roc(SCORES, TRUTH, WEIGHTS),
        strict=True,
    ):
        assert precision == pytest.approx(
            average_precision_score(TRUTH, SCORES, sample_weight=weights)
        )
        assert area == pytest.approx(roc_auc_score(TRUTH, SCORES, sample_weight=weights))


def test_f1_is_that_of_scikit_learn() -> None:
    """With weights too."""
    given = SCORES >= 0.5
    for weights, value in zip(WEIGHTS, f1(given, TRUTH, WEIGHTS), strict=True):
        assert value == pytest.approx(f1_score(TRUTH, given, sample_weight=weights))


def test_the_report_has_the_means_and_each_label() -> None:
    """Means over labels of what scikit-learn says of each; exact is the share of whole rows."""
    scores = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    labels = (scores + torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) > 1).long()
    found = measure(scores, labels, (0.3, 0.5, 0.7), names=("a", "b", "c"))
    given = scores.numpy() >= np.array([0.3, 0.5, 0.7])
    truth = labels.numpy()

    assert found["map"].value == pytest.approx(average_precision_score(truth, scores))
    assert found["f1"].value == pytest.approx(f1_score(truth, given, average="macro"))
    assert found["exact"].value == pytest.approx((truth == given).all(axis=1).mean())
    assert found["auc b"].value == pytest.approx(roc_auc_score(truth[:, 1], scores[:, 1]))
    assert found["f1 c"].value == pytest.approx(f1_score(truth[:, 2], given[:, 2]))
    assert list(found)[:3] == ["map", "f1", "exact"]


def test_intervals_are_percentiles_over_resampled_pictures() -> None:
    """Of the area, against a bootstrap by hand with scikit-learn: within its own noise."""
    scores, truth = torch.from_numpy(SCORES)[:, None], torch.from_numpy(TRUTH)[:, None].long()
    found = measure(scores, truth, (0.5,), names=("a",))["auc a"]
    chance = np.random.default_rng(7)
    drawn = []
    for _ in range(400):
        rows = chance.integers(0, 60, 60)
        drawn.append(roc_auc_score(TRUTH[rows], SCORES[rows]))

    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)


def test_a_label_that_all_or_no_picture_has_is_left_out_of_the_means() -> None:
    """There is nothing to find; whole rows are counted all the same."""
    scores = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(20, 3, dtype=torch.int64)
    labels[:, 1] = 1
    labels[::2, 2] = 1
    found = measure(scores, labels, (0.5, 0.5, 0.5), names=("none", "all", "some"))

    assert set(found) == {"map", "f1", "exact", "auc some", "f1 some"}
    assert found["map"].value == pytest.approx(average_precision_score(labels[:, 2], scores[:, 2]))
    assert set(measure(scores[:, :2], labels[:, :2], (0.5, 0.5), names=("none", "all"))) == {
        "exact"
    }
