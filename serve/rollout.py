"""Whether a candidate does worse than what is live, from what replicas saw of both.

Pure: from counts and rules to a verdict. Each compared picture was answered by both sides alone, so
the sides are compared in pairs and not by who happened to get which caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from serve.evidence import log_evidence_above, log_evidence_below
from serve.task_settings import TaskSettings

FALSE_ALARM = 0.01  # chance that a candidate within the rules is ever called worse
FALSE_PRAISE = 0.05  # chance that one at the edge of a rule is ever called good
LESS_CONFIDENT = 0.1  # by how much a best score has to be lower to count as less confident


@dataclass(frozen=True, slots=True)
class Trial:
    """What was seen of a rollout; every count only grows.

    Args:
        served: Rows that callers were answered by the candidate.
        failed: Rows, served or compared, that the candidate had no scores for.
        compared: Pictures that both sides answered.
        disagreed: Of those, with another label.
        slower: Of those, where the candidate took more than the task's `max_slowdown` times as
            long.
        less_confident: Of those, where the candidate's best score was lower by more than
            `LESS_CONFIDENT`.
    """

    served: int = 0
    failed: int = 0
    compared: int = 0
    disagreed: int = 0
    slower: int = 0
    less_confident: int = 0

    def plus(self, **counts: int) -> Trial:
        """These counts with some of them raised."""
        return replace(self, **{name: getattr(self, name) + by for name, by in counts.items()})


def total(trials: Iterable[Trial]) -> Trial:
    """The counts of several replicas together."""
    sums = {field.name: 0 for field in fields(Trial)}
    for trial in trials:
        for name in sums:
            sums[name] += getattr(trial, name)
    return Trial(**sums)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the counts say, with the reason in words."""

    verdict: Literal["worse", "good", "undecided"]
    reason: str


def judge(trial: Trial, rules: TaskSettings) -> Judgement:
    """Compare a candidate with the task's rules; may be asked after every answer.

    "worse" once the evidence against one rule is strong enough, "good" once there is evidence that
    every rule is kept. A verdict needs `min_compared` pictures, whatever it is.
    """
    if trial.compared < rules.min_compared:
        return Judgement(
            "undecided", f"{trial.compared} of at least {rules.min_compared} pictures compared"
        )
    rates = _rates(trial, rules)
    alarm = math.log(len(rates) / FALSE_ALARM)
    for what, allowed, events, trials in rates:
        if log_evidence_above(allowed, events, trials) >= alarm:
            return Judgement("worse", f"{_seen(what, events, trials)}; at most {allowed:.2%} may")
    praise = math.log(1 / FALSE_PRAISE)
    open_rules = [
        (what, events, trials)
        for what, allowed, events, trials in rates
        if log_evidence_below(allowed, events, trials) < praise
    ]
    if open_rules:
        return Judgement("undecided", f"not yet clear: {_seen(*open_rules[0])}")
    what, _, events, trials = rates[1]
    return Judgement("good", f"{_seen(what, events, trials)}, and every rule is kept")


def _rates(trial: Trial, rules: TaskSettings) -> list[tuple[str, float, int, int]]:
    """For each rule what happened, how often it may, how often it did, and of how many."""
    compared = trial.compared
    return [
        ("had no scores", rules.max_failures, trial.failed, trial.served + compared),
        ("got another label", rules.max_disagreement, trial.disagreed, compared),
        # Half of them: then the median of the ratios is at the limit.
        (f"took over {rules.max_slowdown:g} times as long", 0.5, trial.slower, compared),
        (
            f"got a best score lower by {LESS_CONFIDENT:g} or more",
            rules.max_less_confident,
            trial.less_confident,
            compared,
        ),
    ]


def _seen(what: str, events: int, trials: int) -> str:
    return f"{events} of {trials} rows ({events / max(trials, 1):.2%}) {what}"
