"""Is one model worse than another on the same pictures by more than a margin, or is it chance?

The score test for a difference of paired proportions. It looks at the pictures that only one of the
two got right, and unlike McNemar's test it can ask for a difference that is not 0.

Source: Tango 1998, Statistics in Medicine 17:891-908.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_5_PERCENT = 1.6448536269514722  # beyond one end; an interval with two such ends has 90 %
# Edwards 1948, Psychometrika 13:185, for McNemar's test: wins less losses moves in steps of two.
# Without it the test says "worse" of a model at the margin in up to 7.3 % of cases, with it in at
# most 4.4 % (every outcome counted, over a grid of 20 to 222 pictures).
CONTINUITY = 1.0
BISECTIONS = 40


@dataclass(frozen=True)
class Paired:
    """What two models did on the same pictures.

    Args:
        num: Pictures, at least 1.
        wins: Those that only the first got right.
        losses: Those that only the second got right.
    """

    num: int
    wins: int
    losses: int

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.wins - self.losses) / self.num


def score(paired: Paired, difference: float, *, correction: float = 0.0) -> float:
    """How far the counts are from a supposed true difference, in standard deviations.

    Args:
        difference: Supposed of the accuracies, from -1 to 1.
        correction: What the distance between counts is lessened by.

    Returns:
        Below 0 where the first did worse than that; about standard normal if that is the truth.
    """
    n, wins, losses = paired.num, paired.wins, paired.losses
    distance = wins - losses - n * difference
    distance = math.copysign(max(0.0, abs(distance) - correction), distance)
    if distance == 0:
        return 0.0
    # The likeliest share of losses if the difference is as supposed: a quadratic equation's root.
    linear = (2 * n - wins + losses) * difference - wins - losses
    constant = -losses * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * share + difference * (1 - difference))
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def is_worse(paired: Paired, *, margin: float) -> bool:
    """Whether the first is worse than the second by more than the margin, beyond chance (5 %)."""
    return score(paired, -margin, correction=CONTINUITY) < -Z_5_PERCENT


def interval(paired: Paired) -> tuple[float, float]:
    """The differences that the counts do not speak against, with 5 % of chance beyond each end.

    `is_worse` is so exactly where the upper end is below the margin.
    """
    low = _crossing(paired, -1.0, paired.difference, Z_5_PERCENT)
    high = _crossing(paired, paired.difference, 1.0, -Z_5_PERCENT)
    return low, high


def smallest_visible_drop(paired: Paired, *, margin: float) -> float | None:
    """The least drop of accuracy that so many pictures would show, or None if they show none.

    Args:
        paired: The pictures that only the first got right are taken to be those.
    """
    worst = paired.num - paired.wins
    for losses in range(worst + 1):
        other = Paired(paired.num, paired.wins, losses)
        if is_worse(other, margin=margin):
            return -other.difference
    return None


def _crossing(paired: Paired, low: float, high: float, target: float) -> float:
    """Where the score, which falls as the supposed difference grows, crosses the target."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if score(paired, middle, correction=CONTINUITY) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
