"""Two models on the same pictures: is one better, or is it chance?"""

from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from models.evaluate import Estimate

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies on the same pictures.

    Args:
        value: Accuracy of the first less that of the second, with a bootstrap interval of 95 %
            over pictures (10,000 resamples, fixed seed).
        p_lower: Chance of a first this much worse or more if both were equally good: one-sided
            exact McNemar test.
    """

    value: Estimate
    p_lower: float


def difference(first: Bool[Tensor, " pictures"], second: Bool[Tensor, " pictures"]) -> Difference:
    """Compare which pictures two models got right.

    Only pictures that one got right and the other wrong tell them apart, so this is far sharper
    than comparing the intervals of two accuracies.

    Raises:
        ValueError: there are no pictures.

    Source: McNemar 1947, doi:10.1007/BF02295996.
    """
    num = len(first)
    if not num:
        raise ValueError("There are no pictures to compare on; give at least one.")
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    # Resampling pictures is drawing how often each of three outcomes comes up.
    chances = np.array([wins, losses, num - wins - losses]) / num
    drawn = np.random.default_rng(0).multinomial(num, chances, size=NUM_RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / num, (0.025, 0.975))
    value = Estimate((wins - losses) / num, float(low), float(high), num)
    return Difference(value, _at_most(wins, wins + losses))


def _at_most(num_heads: int, num_tosses: int) -> float:
    """Chance of at most so many heads of a fair coin."""
    return sum(comb(num_tosses, heads) for heads in range(num_heads + 1)) / 2**num_tosses
