"""Ways to teach a student, by name: each is a weighted sum of labels, soft targets and a hint."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from models.errors import LearningError
from models.feature_losses import attention_loss, feature_loss, hint_loss, relational_loss
from models.losses import (
    correlation_loss,
    decoupled_loss,
    soft_target_loss,
    standardised_loss,
)

MethodName = Literal[
    "cosine", "kd", "standardised", "dkd", "dist", "patient", "fitnets", "attention", "rkd",
    "labels",
]  # fmt: skip
Needed = Literal["logits", "features", "maps"]

# (student's logits, teacher's logits, labels, temperature) -> loss.
SoftLoss = Callable[
    [
        Float[Tensor, "batch num_classes"],
        Float[Tensor, "batch num_classes"],
        Int[Tensor, " batch"],
        float,
    ],
    Float[Tensor, ""],
]


class DistillationError(LearningError):
    """Teachers, data and method do not belong together."""


@dataclass(frozen=True)
class Hint:
    """What is compared beside logits.

    Args:
        reads: Pooled features, or the maps at the cut.
        is_projected: Whether the student's first go through a learned linear map to the teacher's
            width, place by place.
        loss: (student's, teacher's) -> loss.
    """

    reads: Literal["features", "maps"]
    is_projected: bool
    loss: Callable[[Tensor, Tensor], Float[Tensor, ""]]


@dataclass(frozen=True)
class Method:
    """label_weight x labels + soft_weight x soft + hint_weight x hint.

    Args:
        temperature: Softening factor of `soft`, above 0.
        blends: Whether pictures are blended in pairs. Such a picture has no one label, so
            `label_weight` is 0.
        num_epochs: The usual number.

    Raises:
        DistillationError: a weight or the temperature is out of range, or not of this method.
    """

    label_weight: float
    soft: SoftLoss | None = None
    soft_weight: float = 0.0
    temperature: float = 1.0
    hint: Hint | None = None
    hint_weight: float = 0.0
    blends: bool = False
    num_epochs: int = 16

    def __post_init__(self) -> None:
        weights = (self.label_weight, self.soft_weight, self.hint_weight)
        is_finite = math.isfinite(sum(weights)) and 0 < self.temperature < math.inf
        if not (is_finite and min(weights) >= 0 and max(weights) > 0):
            raise DistillationError(
                f"label_weight={self.label_weight}, soft_weight={self.soft_weight}, "
                f"hint_weight={self.hint_weight}, temperature={self.temperature}; "
                "expected finite weights of at least 0, one of them above 0, and a temperature "
                "above 0."
            )
        if self.blends and self.label_weight > 0:
            raise DistillationError(
                f"label_weight={self.label_weight} for pictures that are blended in pairs; "
                "expected 0, since such a picture has no one label."
            )
        for name, weight, term in (
            ("soft_weight", self.soft_weight, self.soft),
            ("hint_weight", self.hint_weight, self.hint),
        ):
            if weight > 0 and term is None:
                raise DistillationError(
                    f"{name}={weight}, but this method has no such term; expected 0."
                )

    @property
    def needs(self) -> frozenset[Needed]:
        """What a teacher is asked for; nothing where labels alone count."""
        soft: frozenset[Needed] = frozenset(("logits",) if self.soft_weight > 0 else ())
        return soft | ({self.hint.reads} if self.hint and self.hint_weight > 0 else set())


def _plain(loss: Callable[..., Tensor]) -> SoftLoss:
    """A loss that does not look at labels."""
    return lambda student, teacher, _labels, temperature: loss(
        student, teacher, temperature=temperature
    )


# The weights are those of each paper or of its authors' code. For FitNets, attention and RKD they
# were chosen beside labels of weight 1 and without soft targets.
METHOD: MethodName = "cosine"
METHODS: Mapping[MethodName, Method] = {
    "labels": Method(1.0),
    # Shares as in Tian et al. 2020 (arXiv:1910.10699, section 4); the temperature is among the best
    # for small students in Hinton et al. (section 3).
    "kd": Method(0.1, _plain(soft_target_loss), 0.9, temperature=4.0),
    # Soft targets and pooled features; the weight of the latter is assumed.
    "cosine": Method(
        0.1, _plain(soft_target_loss), 0.9, temperature=4.0,
        hint=Hint("features", is_projected=True, loss=feature_loss), hint_weight=1.0,
    ),
    "standardised": Method(0.1, _plain(standardised_loss), 9.0, temperature=2.0),
    # Beta 8; the authors take 2 from ResNet-56 to ResNet-20.
    "dkd": Method(
        1.0,
        lambda student, teacher, labels, temperature: decoupled_loss(
            student, teacher, labels, temperature=temperature, others_weight=8.0
        ),
        1.0, temperature=4.0,
    ),
    "dist": Method(1.0, _plain(correlation_loss), 2.0, temperature=4.0),
    # "Patient and consistent", Beyer et al. 2022, arXiv:2106.05237: the teacher alone, on the
    # student's own crop, blended in pairs, for many epochs.
    "patient": Method(0.0, _plain(soft_target_loss), 1.0, blends=True, num_epochs=60),
    "fitnets": Method(
        1.0, hint=Hint("maps", is_projected=True, loss=hint_loss), hint_weight=100.0
    ),
    "attention": Method(
        1.0, hint=Hint("maps", is_projected=False, loss=attention_loss), hint_weight=1000.0
    ),
    "rkd": Method(
        1.0, hint=Hint("features", is_projected=False, loss=relational_loss), hint_weight=1.0
    ),
}  # fmt: skip


def find_method(
    name: MethodName,
    *,
    label_weight: float | None = None,
    soft_weight: float | None = None,
    hint_weight: float | None = None,
    temperature: float | None = None,
) -> Method:
    """A method by its name, with other weights or temperature where they are given.

    Raises:
        DistillationError: a value is out of range or not of this method.
    """
    usual = METHODS[name]
    if temperature is not None and usual.soft is None:
        raise DistillationError(
            f"temperature={temperature}, but the method {name!r} has no soft targets to soften."
        )
    try:
        return dataclasses.replace(
            usual,
            label_weight=usual.label_weight if label_weight is None else label_weight,
            soft_weight=usual.soft_weight if soft_weight is None else soft_weight,
            hint_weight=usual.hint_weight if hint_weight is None else hint_weight,
            temperature=usual.temperature if temperature is None else temperature,
        )
    except DistillationError as error:
        raise DistillationError(f"Method {name!r}: {error}") from error
