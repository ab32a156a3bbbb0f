"""Specification of models/transferability.py: LogME and the H-score, by other formulas."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.cross_decomposition import CCA
from torch import Tensor

from models import transferability
from models.transferability import h_score, log_evidence


def some(num: int = 60, num_features: int = 5, *, signal: float = 1.0) -> tuple[Tensor, Tensor]:
    """Three classes whose means differ by `signal`."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 3
    features = torch.randn(num, num_features, generator=random)
    features[torch.arange(num), labels] += signal
    return features, labels


@pytest.mark.parametrize("num_features", [5, 90])
def test_the_evidence_is_that_of_a_gaussian_at_its_best_precisions(num_features: int) -> None:
    """Without weights: y is normal with covariance I / beta + F F' / alpha, maximised anew."""
    features, labels = some(60, num_features)
    rows = features.double().numpy()
    product = rows @ rows.T

    def negative(logs: np.ndarray, target: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(60) / beta + product / alpha
        return -float(multivariate_normal.logpdf(target, cov=covariance))

    best = [
        -minimize(
            negative, np.zeros(2), args=((labels == label).double().numpy(),),
            method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 2000},
        ).fun
        for label in range(3)
    ]  # fmt: skip

    found = log_evidence(features, labels, num_classes=3)

    # The fixed point nears the top in ever smaller steps; it stops when they are 1e-6 of the ratio.
    assert found == pytest.approx(np.mean(best) / 60, abs=1e-4)


def test_the_h_score_is_the_sum_of_squared_canonical_correlations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of features and labels: scikit-learn finds them one by one. Here without shrinkage."""
    features, labels = some(90)
    rows, ones = features.double().numpy(), np.eye(3)[labels.numpy()]

    def plain(values: np.ndarray, *, assume_centered: bool) -> tuple[np.ndarray, float]:
        assert assume_centered
        return values.T @ values / len(values), 0.0

    monkeypatch.setattr(transferability, "ledoit_wolf", plain)
    found = h_score(features, labels, num_classes=3)

    left, right = CCA(n_components=2, max_iter=5000, tol=1e-12).fit_transform(rows, ones[:, :2])
    correlations = [np.corrcoef(left[:, at], right[:, at])[0, 1] for at in range(2)]
    assert found == pytest.approx(sum(value**2 for value in correlations), rel=1e-6)


@pytest.mark.parametrize("measure", [log_evidence, h_score])
def test_features_that_tell_classes_apart_score_higher(measure: object) -> None:
    """With five times as many features as pictures too, where both could be fooled."""
    assert callable(measure)
    for num_features in (5, 300):
        noise, weak, strong = (
            measure(*some(60, num_features, signal=signal), num_classes=3)
            for signal in (0.0, 1.5, 4.0)
        )
        assert noise < weak < strong


def test_shrinkage_keeps_noise_from_the_largest_score() -> None:
    """Unshrunk, 300 features of 60 pictures separate any labels: 2 of 2."""
    assert h_score(*some(60, 300, signal=0.0), num_classes=3) < 0.5
