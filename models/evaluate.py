"""What was measured, and how sure one can be of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Two-sided 95 % quantile of the normal distribution.
Z_95 = 1.959963984540054
# Beyond this ratio of the largest class to the smallest, accuracy says little of the smallest.
MAX_BALANCED_RATIO = 4


@dataclass(frozen=True)
class Estimate:
    """A measured quantity with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(num_hits: int, num_samples: int) -> Estimate:
    """A share of samples with its Wilson score interval.

    Wilson's interval stays inside 0..1 and keeps its width at 0 and 1, where the usual normal
    interval collapses to a point; both matter with a hundred test pictures.

    Raises:
        ValueError: no samples, or more hits than samples.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not 0 <= num_hits <= num_samples or num_samples == 0:
        raise ValueError(
            f"A share needs 0 <= hits <= samples and one sample; got {num_hits} of {num_samples}."
        )
    value = num_hits / num_samples
    shrink = 1 + Z_95**2 / num_samples
    centre = (value + Z_95**2 / (2 * num_samples)) / shrink
    spread = value * (1 - value) / num_samples + Z_95**2 / (4 * num_samples**2)
    half_width = Z_95 * math.sqrt(spread) / shrink
    # At 0 and 1 the bound equals the value but for rounding.
    low, high = min(value, centre - half_width), max(value, centre + half_width)
    return Estimate(value, max(0.0, low), min(1.0, high), num_samples)


def accuracy(logits: Float[Tensor, "batch num_classes"], labels: Int[Tensor, " batch"]) -> Estimate:
    """Share of rows whose largest logit is that of their label.

    Raises:
        ValueError: no rows, or a logit is NaN (a NaN would count as the largest).
    """
    if bool(torch.isnan(logits).any()):
        raise ValueError("Logits hold NaN, so there is no accuracy; check the weights and inputs.")
    return share(int((logits.argmax(dim=-1) == labels).sum()), len(labels))


def class_balance(counts: Mapping[str, int]) -> dict[str, float]:
    """Each class's share of the pictures, the largest first."""
    total = max(1, sum(counts.values()))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {label: count / total for label, count in ordered}


def balance_notes(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A warning where classes differ so much in size that accuracy hides the rare ones.

    Args:
        counts: Label -> number of pictures learned from, each at least 1.
    """
    shares = class_balance(counts)
    largest, smallest = next(iter(shares)), next(reversed(shares))
    if shares[largest] <= MAX_BALANCED_RATIO * shares[smallest]:
        return ()
    note = (
        f"Classes are unbalanced: {largest!r} has {shares[largest]:.1%} of the pictures, "
        f"{smallest!r} {shares[smallest]:.1%}; accuracy hides what becomes of the rare ones."
    )
    return (note,)
