"""How a backbone is fine-tuned: what learns, how fast, and what holds it back. Settings alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from models.errors import LearningError

StrategyName = Literal["full", "last", "linear", "surgical", "gradual", "direct", "scratch"]
ScheduleName = Literal["cosine", "one-cycle"]


class FineTuningError(LearningError):
    """A setting of fine-tuning is out of range, or two of them do not go together."""


@dataclass(frozen=True)
class Regularisation:
    """What keeps a network of many weights from learning few pictures by heart.

    Args:
        weight_decay: Decoupled pull of matrices towards zero, at least 0 (arXiv:1711.05101).
        l2_sp: Strength of the pull of the backbone towards where it started, at least 0; above 0 it
            takes the place of the backbone's weight decay (Li et al. 2018, arXiv:1802.01483).
        dropout: Share of the features that the head does not see in a step, 0 to below 1.
        label_smoothing: Share of the label that is spread over all classes, 0 to below 1
            (Szegedy et al. 2015, arXiv:1512.00567, section 7).
        mix: Whether pictures of a batch are blended (Zhang et al. 2017, arXiv:1710.09412) or
            patched into each other (Yun et al. 2019, arXiv:1905.04899).
        balance: Whether rare classes weigh more in the loss, or are drawn more often.
        average_epochs: Weights are averaged over about so many epochs, at least 0; 0: they are not.

    Raises:
        FineTuningError: a value out of range.
    """

    weight_decay: float = 0.05
    l2_sp: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    mix: Literal["none", "mixup", "cutmix"] = "none"
    balance: Literal["none", "weights", "sampling"] = "none"
    average_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight_decay", "l2_sp", "average_epochs"):
            value = getattr(self, name)
            _expect(0 <= value < math.inf, name, value, "a number of at least 0")
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            _expect(0 <= value < 1, name, value, "a share from 0 to below 1")


@dataclass(frozen=True)
class FineTuning:
    """What learns and how fast; `fine_tuning` makes one with what a strategy is used with.

    Args:
        strategy: What learns, and from what start:
            "linear": the head alone, on frozen features.
            "last": the head so, then head and last block.
            "full": the head so, then everything (Kumar et al. 2022, arXiv:2202.10054).
            "gradual": the head so, then in each epoch one block more, from the last to the first
            (Howard & Ruder 2018, arXiv:1801.06146, section 3.3).
            "surgical": the head so, then head and one block (Lee et al. 2022, arXiv:2210.11466).
            "direct": everything at once, with a head that knows nothing: what "full" is compared
            with.
            "scratch": everything, from random values.
        block: Of "surgical": its number, 1 being nearest to the pictures; None takes the one with
            the largest gradient for its size.
        batch_norm: Whether running statistics stay as they came, or follow where weights learn.
        num_epochs: At most; 0 trains the head alone.
        patience: Epochs without a better validation score before giving up.
        rate: Learning rate of the head at its peak, above 0.
        rate_decay: Factor from a block's rate to that of the block below it, above 0 to 1
            (discriminative rates: arXiv:1801.06146, section 3.1).

    Raises:
        FineTuningError: a value out of range, or settings that do not go together.
    """

    strategy: StrategyName = "full"
    block: int | None = None
    batch_norm: Literal["frozen", "follow"] = "frozen"
    schedule: ScheduleName = "cosine"
    num_epochs: int = 12
    patience: int = 5
    batch_size: int = 32
    rate: float = 1e-3
    rate_decay: float = 0.6
    regularisation: Regularisation = field(default_factory=Regularisation)

    def __post_init__(self) -> None:
        _expect(self.num_epochs >= 0, "num_epochs", self.num_epochs, "at least 0")
        _expect(self.patience >= 1, "patience", self.patience, "at least 1")
        _expect(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _expect(0 < self.rate < math.inf, "rate", self.rate, "a number above 0")
        _expect(0 < self.rate_decay <= 1, "rate_decay", self.rate_decay, "above 0, up to 1")
        if self.block is not None:
            _expect(self.strategy == "surgical", "block", self.block, "none but with surgical")
            _expect(self.block >= 1, "block", self.block, "at least 1")
        if self.strategy == "linear":
            _expect(self.num_epochs == 0, "num_epochs", self.num_epochs, "0 with linear")
        if not self.probes_head:
            told = f"at least 1 with {self.strategy}, whose head starts from nothing"
            _expect(self.num_epochs >= 1, "num_epochs", self.num_epochs, told)
        if self.strategy == "scratch":
            _expect(
                self.batch_norm == "follow", "batch_norm", self.batch_norm, "follow with scratch"
            )
            l2_sp = self.regularisation.l2_sp
            _expect(l2_sp == 0, "l2_sp", l2_sp, "0 with scratch, whose start is worth nothing")

    @property
    def probes_head(self) -> bool:
        """Whether the head is fitted on frozen features before anything else learns."""
        return self.strategy not in {"direct", "scratch"}


# What a strategy is used with unless told otherwise. From scratch nothing is worth keeping, so all
# learn at one high rate.
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "linear": {"num_epochs": 0},
    "scratch": {"batch_norm": "follow", "rate": 3e-3, "rate_decay": 1.0},
}


def fine_tuning(strategy: StrategyName = "full", **chosen: Any) -> FineTuning:
    """The strategy with what it is usually used with, but for what is chosen.

    Args:
        chosen: Fields of `FineTuning` and of `Regularisation`; None is as good as left out.

    Raises:
        FineTuningError: see those two.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    held = {own.name for own in fields(Regularisation)} & given.keys()
    regularisation = Regularisation(**{name: given.pop(name) for name in held})
    settings = {**_USUAL.get(strategy, {}), **given}
    return FineTuning(strategy=strategy, regularisation=regularisation, **settings)


def _expect(holds: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001
    if not holds:
        raise FineTuningError(f"{name} is {value}; expected {expected}.")
