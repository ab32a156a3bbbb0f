"""Specification of models/fine_tuning.py: which settings there are, and which go together."""

from typing import Any, get_args

import pytest

from models.fine_tuning import FineTuning, FineTuningError, StrategyName, fine_tuning


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_every_strategy_can_be_used_as_it_comes(strategy: StrategyName) -> None:
    """Its name is all that a user has to say."""
    assert fine_tuning(strategy).strategy == strategy


def test_what_is_chosen_comes_before_what_is_usual() -> None:
    """None is as good as nothing; settings of both dataclasses are named alike."""
    how = fine_tuning("scratch", rate=1e-4, rate_decay=None, dropout=0.2)

    assert (how.rate, how.rate_decay, how.batch_norm) == (1e-4, 1.0, "follow")
    assert how.regularisation.dropout == 0.2
    assert how.regularisation.weight_decay == FineTuning().regularisation.weight_decay


@pytest.mark.parametrize(
    ("strategy", "chosen", "message"),
    [
        ("full", {"rate": 0.0}, "rate is 0.0; expected a number above 0."),
        ("full", {"rate": float("nan")}, "rate is nan; expected a number above 0."),
        ("full", {"rate_decay": 1.5}, "rate_decay is 1.5; expected above 0, up to 1."),
        ("full", {"num_epochs": -1}, "num_epochs is -1; expected at least 0."),
        ("full", {"patience": 0}, "patience is 0; expected at least 1."),
        ("full", {"batch_size": 0}, "batch_size is 0; expected at least 1."),
        ("full", {"dropout": 1.0}, "dropout is 1.0; expected a share from 0 to below 1."),
        ("full", {"label_smoothing": -0.1}, "label_smoothing is -0.1; expected a share"),
        ("full", {"weight_decay": float("inf")}, "weight_decay is inf; expected a number of"),
        ("full", {"l2_sp": -1.0}, "l2_sp is -1.0; expected a number of at least 0."),
        ("full", {"average_epochs": -1.0}, "average_epochs is -1.0; expected a number"),
        ("full", {"block": 2}, "block is 2; expected none but with surgical."),
        ("surgical", {"block": 0}, "block is 0; expected at least 1."),
        ("linear", {"num_epochs": 3}, "num_epochs is 3; expected 0 with linear."),
        ("direct", {"num_epochs": 0}, "num_epochs is 0; expected at least 1 with direct, whose"),
        ("scratch", {"num_epochs": 0}, "num_epochs is 0; expected at least 1 with scratch, whose"),
        ("scratch", {"batch_norm": "frozen"}, "batch_norm is frozen; expected follow with scratch"),
        ("scratch", {"l2_sp": 0.1}, "l2_sp is 0.1; expected 0 with scratch"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    strategy: StrategyName, chosen: dict[str, Any], message: str
) -> None:
    """Before any picture is read: the field, its value and what was expected."""
    with pytest.raises(FineTuningError) as refusal:
        fine_tuning(strategy, **chosen)

    assert str(refusal.value).startswith(message)
