"""Specification of models/fitting.py: the loop that teacher and student share."""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from models.backbones import build_backbone
from models.batches import Batch
from models.fitting import (
    Score,
    TrainingError,
    fit,
    follow_batch_statistics,
    freeze_batch_statistics,
    parameter_groups,
)
from models.progress import Progress


class Point(nn.Module):
    """One learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.0))


def run(
    point: Point,
    *,
    loss: Callable[[], Tensor],
    scores: Iterable[float],
    num_epochs: int = 10,
    patience: int = 3,
    start_is_usable: bool = True,
    keep_last: bool = False,
) -> tuple[int, list[Progress]]:
    """Train with one batch an epoch and the given validation scores."""
    heard: list[Progress] = []
    given = iter(scores)
    fitted = fit(
        point,
        epoch_batches=lambda _epoch: [Batch(torch.zeros(1, dtype=torch.int64), {})],
        num_batches=1,
        loss_of=lambda _batch: loss(),
        validate=lambda: Score(next(given), 0.0),
        before_epoch=lambda _epoch: None,
        start_is_usable=start_is_usable,
        optimizer=torch.optim.SGD(point.parameters(), lr=0.1),
        num_epochs=num_epochs,
        patience=patience,
        stage="fit",
        progress=heard.append,
        keep_last=keep_last,
    )
    return fitted.best_epoch, heard


def test_the_best_state_is_kept_and_not_the_last() -> None:
    """Validation peaks at epoch 2, and the value of that epoch comes back."""
    point, seen = Point(), list[float]()

    def loss() -> Tensor:
        seen.append(point.at.item())
        return -point.at

    best_epoch, _ = run(point, loss=loss, scores=[0.1, 0.2, 0.9, 0.3, 0.3, 0.3])

    assert best_epoch == 2
    assert point.at.item() == seen[2]  # what the third epoch started from
    assert not point.training


def test_the_last_state_is_kept_if_asked_for() -> None:
    """A fixed budget: no stopping early, whatever validation says."""
    point = Point()

    last, heard = run(point, loss=lambda: -point.at, scores=[0.9] + [0.1] * 10, keep_last=True)

    assert (last, len(heard)) == (10, 10)
    assert point.at.item() > 0


def test_training_stops_when_validation_does_not_improve() -> None:
    """After `patience` epochs without a better score."""
    _, heard = run(Point(), loss=(point := Point()).at.square, scores=[0.5] + [0.4] * 20)

    assert len(heard) == 3
    assert point.at.item() == 0


def test_a_run_that_only_harms_returns_the_start() -> None:
    """Fine-tuning is never worse on validation than what it began with."""
    point = Point()

    best_epoch, _ = run(point, loss=lambda: -point.at, scores=[0.5] + [0.4] * 10)

    assert (best_epoch, point.at.item()) == (0, 0.0)


def test_a_run_from_scratch_never_returns_its_random_start() -> None:
    """Even if the first epochs score below chance."""
    point = Point()

    best_epoch, _ = run(
        point, loss=lambda: -point.at, scores=[0.1, 0.2, 0.1], num_epochs=3, start_is_usable=False
    )

    assert best_epoch == 2


def test_equal_accuracy_is_decided_by_loss() -> None:
    """A few dozen validation pictures tie often."""
    assert Score(0.9, -0.3) > Score(0.9, -0.4)
    assert Score(0.8, -0.1) < Score(0.9, -0.9)


def test_a_loss_of_nan_is_an_error_that_says_what_to_do() -> None:
    """Not a checkpoint of NaN an hour later."""
    point = Point()

    with pytest.raises(TrainingError, match=r"became nan in epoch 1.*Lower the learning rate"):
        run(point, loss=lambda: point.at * math.nan, scores=[0.5] * 3)


def test_progress_tells_each_epoch_and_its_score() -> None:
    """What a progress bar shows."""
    point = Point()

    _, heard = run(point, loss=lambda: -point.at, scores=[0.1, 0.2, 0.3], num_epochs=2)

    assert [(p.stage, p.done, p.total, p.note) for p in heard] == [
        ("fit", 1, 2, "validation 0.200, best 0.200"),
        ("fit", 2, 2, "validation 0.300, best 0.300"),
    ]
    names = {"training loss", "validation loss", "validation accuracy"}
    assert all(set(p.values) == names for p in heard)
    assert [p.values["validation accuracy"] for p in heard] == [0.2, 0.3]


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    """Decaying a scale or bias pulls normalisation towards zero for no gain."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)

    groups = list(parameter_groups(backbone, rate=0.1))

    members = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in backbone.parameters()}
    assert len(members) == len(list(backbone.parameters()))
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize(("num_batches", "momentum"), [(1, 1.0), (6, 0.5), (300, 0.1)])
def test_running_statistics_forget_within_an_epoch(num_batches: int, momentum: float) -> None:
    """Few batches an epoch need a large momentum, many keep PyTorch's own."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)

    follow_batch_statistics(backbone, num_batches=num_batches)

    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {momentum}
    assert len(norms) == 11


def test_frozen_statistics_stay_while_scales_learn() -> None:
    """Running means do not move in a training step; their scales get gradients."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    before = {key: t.clone() for key, t in backbone.state_dict().items() if "running" in key}
    backbone.train()
    freeze_batch_statistics(backbone)

    backbone(torch.zeros(4, 32, 32, 3, dtype=torch.uint8)).sum().backward()

    after = backbone.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(parameter.grad is not None for parameter in backbone.parameters())
