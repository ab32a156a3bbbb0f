"""Whether heads trained on float features may be given those of another precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from models.evaluate import Estimate, share

MIN_AGREEMENT = 0.985
MAX_LOSS = 0.01  # lower end of the 95 % interval of the pooled change of accuracy
MIN_HEADS = 10
SIGNIFICANCE = 0.05
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class HeadOutcome:
    """What one head says of its task's test pictures before and after.

    Args:
        pictures: Key of each picture; heads may share pictures.
        agrees: Whether the first label is the same after as before.
        before: Whether the first label is right on float features.
        after: Whether it is right on the other features.
        shift: Largest change of a logit, as a share of the largest absolute logit or of 1.
    """

    name: str
    pictures: tuple[str, ...]
    agrees: Bool[np.ndarray, " pictures"]
    before: Bool[np.ndarray, " pictures"]
    after: Bool[np.ndarray, " pictures"]
    shift: float

    @property
    def change(self) -> float:
        """Accuracy after minus accuracy before."""
        return float(self.after.mean() - self.before.mean())


@dataclass(frozen=True)
class Agreement:
    """What a precision does to many heads together.

    Args:
        agreement: Share of answers with the same first label, over all heads' test pictures.
        accuracy_change: Accuracy after minus before, over the same answers; both with bootstrap
            intervals over pictures, because heads share them.
        largest_shift: Largest `HeadOutcome.shift`.
        significantly_worse: Heads that lose more answers than chance explains.
        objections: Why the precision is refused; none if it is accepted.
    """

    num_heads: int
    accuracy_before: Estimate
    accuracy_after: Estimate
    agreement: Estimate
    accuracy_change: Estimate
    worst_head: str
    worst_change: float
    largest_shift: float
    significantly_worse: tuple[str, ...]
    objections: tuple[str, ...]

    @property
    def is_accepted(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.objections


def judge(outcomes: Sequence[HeadOutcome]) -> Agreement:
    """Pool the heads, and hold them to the criteria.

    Raises:
        ValueError: no heads, or one without pictures.
    """
    if not outcomes or not all(outcome.pictures for outcome in outcomes):
        raise ValueError("There are no heads to judge, or one of them has no pictures.")
    before = np.concatenate([outcome.before for outcome in outcomes])
    after = np.concatenate([outcome.after for outcome in outcomes])
    agrees = np.concatenate([outcome.agrees for outcome in outcomes])
    keys = [key for outcome in outcomes for key in outcome.pictures]
    agreement = clustered(agrees.astype(np.float64), keys)
    change = clustered(after.astype(np.float64) - before, keys)
    worst = min(outcomes, key=lambda outcome: outcome.change)
    worse = significantly_worse(outcomes)
    return Agreement(
        num_heads=len(outcomes),
        accuracy_before=share(int(before.sum()), len(before)),
        accuracy_after=share(int(after.sum()), len(after)),
        agreement=agreement,
        accuracy_change=change,
        worst_head=worst.name,
        worst_change=worst.change,
        largest_shift=max(outcome.shift for outcome in outcomes),
        significantly_worse=worse,
        objections=objections(len(outcomes), agreement, change, worse),
    )


def objections(
    num_heads: int, agreement: Estimate, accuracy_change: Estimate, worse: Sequence[str]
) -> tuple[str, ...]:
    """The criteria: what speaks against a precision, in words."""
    found: list[str] = []
    if num_heads < MIN_HEADS:
        found.append(f"{num_heads} heads, fewer than {MIN_HEADS}")
    if agreement.value < MIN_AGREEMENT:
        found.append(f"agreement {agreement.value:.1%} below {MIN_AGREEMENT:.1%}")
    if accuracy_change.low <= -MAX_LOSS:
        low, limit = 100 * accuracy_change.low, -100 * MAX_LOSS
        found.append(f"accuracy may fall by {low:.1f} points, beyond {limit:.1f}")
    if worse:
        found.append(f"significantly worse: {', '.join(worse)}")
    return tuple(found)


def significantly_worse(outcomes: Sequence[HeadOutcome]) -> tuple[str, ...]:
    """Names of heads whose loss chance does not explain, at 5 % over all heads together.

    Source: McNemar 1947 in its exact form, one-sided; Holm 1979 for many heads at once.
    """
    chances = sorted((mcnemar(outcome.before, outcome.after), outcome.name) for outcome in outcomes)
    worse: list[str] = []
    for place, (chance, name) in enumerate(chances):
        if chance * (len(chances) - place) > SIGNIFICANCE:
            break
        worse.append(name)
    return tuple(worse)


def mcnemar(before: Bool[np.ndarray, " pictures"], after: Bool[np.ndarray, " pictures"]) -> float:
    """Chance of at least so many losses among the changed answers, were both equally good."""
    lost = int((before & ~after).sum())
    changed = lost + int((~before & after).sum())
    return sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed


def clustered(values: NDArray[np.float64], keys: Sequence[str]) -> Estimate:
    """Mean with a 95 % bootstrap interval over the groups of equal keys."""
    _, group = np.unique(np.asarray(keys), return_inverse=True)
    sums, counts = np.bincount(group, weights=values), np.bincount(group)
    # How often each group is drawn; the same draws for every measure of the same pictures.
    draws = np.random.default_rng(0).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=NUM_RESAMPLES
    )
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(values.mean())
    return Estimate(value, min(value, float(low)), max(value, float(high)), len(values))
