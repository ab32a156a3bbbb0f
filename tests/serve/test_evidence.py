"""Evidence that may be looked at after every trial: fair bets, few false alarms, quick alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.evidence import log_evidence_above, log_evidence_below

ALPHA = 0.05
NUM_RUNS, NUM_TRIALS = 400, 600


def expected_value(evidence: str, *, rate: float, truth: float, num_trials: int) -> float:
    """Mean of the e-value over all outcomes of so many trials, by enumeration."""
    test = log_evidence_above if evidence == "above" else log_evidence_below
    return sum(
        math.comb(num_trials, k)
        * truth**k
        * (1 - truth) ** (num_trials - k)
        * math.exp(test(rate, k, num_trials))
        for k in range(num_trials + 1)
    )


@pytest.mark.parametrize("evidence", ["above", "below"])
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("num_trials", [1, 2, 13, 40])
def test_a_bet_at_the_hypothesis_is_fair(evidence: str, rate: float, num_trials: int) -> None:
    """Nobody wins on average while the rate is exactly what the hypothesis says."""
    value = expected_value(evidence, rate=rate, truth=rate, num_trials=num_trials)

    assert value == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("evidence", "truth"), [("above", 0.1), ("below", 0.3)])
def test_a_bet_against_what_is_allowed_loses(evidence: str, truth: float) -> None:
    """A rate well inside the hypothesis costs the bettor."""
    assert expected_value(evidence, rate=0.2, truth=truth, num_trials=30) < 1


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5])
def test_looking_after_every_trial_raises_few_false_alarms(rate: float) -> None:
    """Of 400 runs at the limit, looked at 600 times each, at most 5 % ever cross 1 / 5 %.

    Four standard errors are allowed for the number of runs; a p-value that is looked at as often
    is below 5 % at some time in far more of them, which the last line shows.
    """
    chance = np.random.default_rng(0)
    counts = np.cumsum(chance.random((NUM_RUNS, NUM_TRIALS)) < rate, axis=1)
    crossed = sum(
        any(
            log_evidence_above(rate, int(count), place + 1) >= math.log(1 / ALPHA)
            for place, count in enumerate(run)
        )
        for run in counts
    )
    trials = np.arange(1, NUM_TRIALS + 1)
    z = (counts - rate * trials) / np.sqrt(trials * rate * (1 - rate))

    assert crossed / NUM_RUNS <= ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / NUM_RUNS)
    assert (z[:, 20:].max(axis=1) > 1.645).mean() > 3 * ALPHA


@pytest.mark.parametrize(("rate", "truth", "within"), [(0.2, 0.4, 200), (0.5, 0.95, 30)])
def test_a_rate_that_is_too_high_is_found_soon(rate: float, truth: float, within: int) -> None:
    """At an alarm level of 1 % for four rules, in 95 of 100 runs."""
    chance = np.random.default_rng(1)
    events = (chance.random((200, within)) < truth).sum(axis=1)
    found = [log_evidence_above(rate, int(k), within) >= math.log(400) for k in events]

    assert np.mean(found) >= 0.95


def test_evidence_depends_on_the_counts_alone() -> None:
    """No trials say nothing; more events among as many trials say more."""
    assert log_evidence_above(0.2, 0, 0) == pytest.approx(0.0)
    assert log_evidence_above(0.2, 30, 100) > log_evidence_above(0.2, 25, 100)
    assert log_evidence_below(0.2, 5, 100) > log_evidence_below(0.2, 10, 100)
