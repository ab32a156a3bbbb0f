"""How strongly counts speak against a rate: a test that may be looked at after every trial.

The evidence is an e-value: a bet against the hypothesis, which on average wins nothing while the
hypothesis is true. By Ville's inequality the chance that it *ever* reaches 1 / alpha is at most
alpha, however often one looks and whenever one stops; a p-value promises that for one look only.
The bet is a mixture of likelihood ratios over a fixed grid of rates, so it depends on the counts
alone, and counts of several replicas add up.

Source: Robbins 1970, "Statistical methods related to the law of the iterated logarithm", Annals of
Mathematical Statistics 41; Ramdas et al. 2023, "Game-theoretic statistics and safe anytime-valid
inference", Statistical Science 38.
"""

from __future__ import annotations

import numpy as np

# Distances from the rate to the end of its side, as shares: near ones need many trials to be told
# from it, far ones few.
GRID = np.geomspace(0.01, 0.99, 48)


def log_evidence_above(rate: float, num_events: int, num_trials: int) -> float:
    """Evidence that events come more often than `rate`, as the logarithm of an e-value.

    Args:
        rate: The largest rate that the hypothesis allows, in (0, 1).
    """
    return _log_mixture(rate, rate + (1 - rate) * GRID, num_events, num_trials)


def log_evidence_below(rate: float, num_events: int, num_trials: int) -> float:
    """Evidence that events come less often than `rate`, in (0, 1); see `log_evidence_above`."""
    return _log_mixture(rate, rate * (1 - GRID), num_events, num_trials)


def _log_mixture(rate: float, others: np.ndarray, num_events: int, num_trials: int) -> float:
    """Mean of the likelihood ratios of other rates to `rate`."""
    log_ratios = num_events * np.log(others / rate)
    log_ratios += (num_trials - num_events) * np.log((1 - others) / (1 - rate))
    return float(np.logaddexp.reduce(log_ratios) - np.log(len(others)))
