"""Does the source help? A model beside the same one without its source, on the same pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from models.evaluate import Estimate, share
from models.paired import difference

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Gap:
    """What a model loses, or gains, against a rival without its source.

    Args:
        rival: What it is compared with, as one would say it.
        accuracy: The rival's, on test.
        gap: Error of the model less error of the rival, with the bootstrap interval of the pairs;
            above 0 is negative transfer. The name and the definition are those of Wang et al.
            2019, arXiv:1811.09751, section 3.1: err(A(source, target)) - err(A(no source, target)).
        p_harm: Chance of a gap this large or larger if both were equally good (one-sided exact
            McNemar test).
    """

    rival: str
    accuracy: Estimate
    gap: Estimate
    p_harm: float

    @property
    def is_harm(self) -> bool:
        """Whether the model is worse than the rival, be it by chance or not."""
        return self.gap.value > 0

    @property
    def is_gain(self) -> bool:
        """Whether the model is better beyond chance: the interval holds no gap of 0 or more."""
        return self.gap.high < 0

    def __str__(self) -> str:
        """In words, in points of accuracy."""
        size = f"{abs(100 * self.gap.value):.1f} points"
        low, high = sorted((-100 * self.gap.low, -100 * self.gap.high))
        versus = f"than {self.rival} ({self.accuracy}), 95 % interval {low:+.1f} to {high:+.1f}"
        if self.is_harm:
            chance = "" if self.p_harm < SIGNIFICANT else ", which may be chance"
            return f"{size} worse {versus}{chance}"
        if self.is_gain:
            return f"{size} better {versus}"
        return f"{size if self.gap.value else 'not'} better {versus}, which may be chance"


def gaps(
    is_right: Bool[Tensor, " pictures"], rivals: Mapping[str, Bool[Tensor, " pictures"]]
) -> tuple[Gap, ...]:
    """Compare a model with every rival.

    Args:
        is_right: Which test pictures the model named.
        rivals: What it is compared with -> which of the same pictures that named.

    Raises:
        ValueError: there are no pictures.
    """
    found: list[Gap] = []
    for rival, rival_right in rivals.items():
        gained = difference(is_right, rival_right)
        low, high = -gained.value.high, -gained.value.low
        gap = Estimate(-gained.value.value, low, high, gained.value.num_samples)
        accuracy = share(int(rival_right.sum()), len(rival_right))
        found.append(Gap(rival, accuracy, gap, gained.p_lower))
    return tuple(found)


def verdict(found: tuple[Gap, ...]) -> tuple[bool, str]:
    """Whether to ship, and why, in words.

    Not to ship is the advice where any rival is ahead, were it by chance: the rival is simpler.

    Raises:
        ValueError: it was compared with nothing.
    """
    if not found:
        raise ValueError("There is no rival, so whether transfer pays is unknown; give one.")
    if harm := [gap for gap in found if gap.is_harm]:
        reasons = "; ".join(str(gap) for gap in harm)
        return False, (
            f"Do not ship: negative transfer. On the same test pictures it is {reasons}. Try other "
            "weights or another trunk, or use the simpler model."
        )
    if unsure := [gap for gap in found if not gap.is_gain]:
        reasons = "; ".join(str(gap) for gap in unsure)
        return True, (
            f"That transfer pays is not shown: on the same test pictures it is {reasons}. More "
            "test pictures would tell; until then the simpler model is as good a choice."
        )
    reasons = "; ".join(str(gap) for gap in found)
    return True, f"Transfer pays: on the same test pictures it is {reasons}."
