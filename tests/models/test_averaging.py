"""Specification of models/averaging.py: the average of weights over the last steps."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from models.averaging import WeightAverage, renew_batch_statistics


def settled() -> None:
    """Nothing depends on the weights."""


def test_the_average_is_exponential_over_the_steps() -> None:
    """decay^(n-i) (1 - decay) of each step, and the first one for all before it."""
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, num_steps=4.0, settle=settled)
    values = [1.0, 5.0, -2.0, 3.0]

    for value in values:
        nn.init.constant_(network.weight, value)
        average.update()

    expected = values[0]
    for value in values[1:]:
        expected = 0.75 * expected + 0.25 * value
    with average.in_place():
        assert network.weight.item() == pytest.approx(expected)
    assert network.weight.item() == 3.0


def test_an_average_over_one_step_is_the_step() -> None:
    """There is nothing to look back on."""
    network = nn.Linear(1, 1, bias=False)
    average = WeightAverage(network, num_steps=0.5, settle=settled)
    for value in (1.0, 2.0):
        nn.init.constant_(network.weight, value)
        average.update()

    with average.in_place():
        assert network.weight.item() == 2.0


def test_the_average_swings_less_than_the_steps_do() -> None:
    """Noisy gradient descent around an optimum at 3 ends nearer to it on average."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    average = WeightAverage(network, num_steps=50.0, settle=settled)
    own: list[float] = []
    averaged: list[float] = []

    for step in range(1000):
        optimizer.zero_grad()
        (0.5 * (network.weight - 3 - torch.randn(())).square()).sum().backward()
        optimizer.step()
        average.update()
        if step >= 200:
            own.append((network.weight.item() - 3) ** 2)
            with average.in_place():
                averaged.append((network.weight.item() - 3) ** 2)

    # Variance of the steps: rate / (2 - rate) = 0.18; of their average less than a fifth of it.
    assert sum(own) / len(own) == pytest.approx(0.176, rel=0.25)
    assert sum(averaged) < 0.2 * sum(own)


def test_statistics_are_settled_while_the_average_is_in_place() -> None:
    """What the average was not made for does not stay: statistics of the last step."""
    network = nn.Linear(1, 1, bias=False)
    seen: list[float] = []
    average = WeightAverage(
        network, num_steps=2.0, settle=lambda: seen.append(network.weight.item())
    )
    for value in (0.0, 1.0):
        nn.init.constant_(network.weight, value)
        average.update()

    with average.in_place():
        assert seen == [0.5]


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()


def test_renewed_statistics_are_those_of_torch() -> None:
    """`update_bn` of the same batches, where all batch norms are renewed."""
    batches = [torch.randn(6, 3, 8, 8) + at for at in range(3)]
    own, reference = normalised(), normalised()

    renew_batch_statistics([own[1], own[4]], own, batches)  # pyrefly: ignore
    update_bn(batches, reference)

    for key, value in reference.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value)
    assert not any(module.training for module in own.modules())
    assert own[1].momentum == 0.1


def test_statistics_that_are_to_stay_stay() -> None:
    """Those of a frozen block are no business of the average."""
    own = normalised()
    before = own[1].running_mean.clone()  # pyrefly: ignore

    renew_batch_statistics([own[4]], own, [torch.randn(6, 3, 8, 8)])  # pyrefly: ignore

    assert torch.equal(own[1].running_mean, before)  # pyrefly: ignore
    assert not torch.equal(own[4].running_mean, torch.zeros(5))  # pyrefly: ignore
