"""Specification of models/rate_finder.py: which learning rate is too high."""

import json
from itertools import repeat
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

from models.fitting import TrainingError
from models.rate_finder import RateSweep, sweep_rates


def sweep_quadratic(curvature: float, *, groups: tuple[float, ...] = (1.0,)) -> RateSweep:
    """Gradient descent on curvature/2 * |x|^2: it diverges at rates above 2/curvature."""
    points = [nn.Parameter(torch.ones(1)) for _ in groups]
    optimizer = torch.optim.SGD(
        [{"params": [point], "lr": rate} for point, rate in zip(points, groups, strict=True)]
    )
    return sweep_rates(
        optimizer, repeat(None), lambda _: 0.5 * curvature * torch.cat([*points]).square().sum()
    )


@pytest.mark.parametrize("curvature", [10.0, 1000.0])
def test_the_suggestion_is_below_the_rate_that_diverges(curvature: float) -> None:
    """And not far below: within a factor of fifty of 2/curvature."""
    limit = 2 / curvature

    assert limit / 50 < sweep_quadratic(curvature).suggestion < limit


def test_the_sweep_ends_when_the_loss_blows_up() -> None:
    """It does at rates above 2/curvature = 0.02, though it has to grow from almost nothing."""
    sweep = sweep_quadratic(100.0)

    assert 0.02 < sweep.rates[-1] < 1.0
    assert len(sweep.rates) == len(sweep.losses) < 100


def test_rates_rise_evenly_on_a_logarithmic_scale() -> None:
    """From a millionth to one in a hundred steps, where nothing blows up."""
    sweep = sweep_quadratic(0.1)

    assert (sweep.rates[0], sweep.rates[-1]) == (pytest.approx(1e-6), pytest.approx(1.0))
    steps = torch.tensor(sweep.rates, dtype=torch.float64).log().diff()
    torch.testing.assert_close(steps, torch.full((99,), float(steps[0]), dtype=torch.float64))


def test_the_losses_are_a_moving_average_without_a_bias_to_zero() -> None:
    """Sum of 0.9^(n-i) * loss_i over sum of the same weights, by its definition."""
    losses = torch.tensor([3.0, 1.0, 2.0, 5.0])
    point = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([point], lr=1.0)

    sweep = sweep_rates(optimizer, losses, lambda loss: loss + 0 * point, num_steps=4)

    for last in range(4):
        weights = 0.9 ** torch.arange(last, -1, -1.0)
        expected = (weights * losses[: last + 1]).sum() / weights.sum()
        assert sweep.losses[last] == pytest.approx(float(expected), rel=1e-5)


def test_other_groups_keep_their_ratio_to_the_first() -> None:
    """A trunk that learns ten times slower does so all the way."""
    alone, beside = sweep_quadratic(10.0), sweep_quadratic(10.0, groups=(1.0, 100.0))

    # The second parameter diverges at a hundredth of the rate of the first.
    assert beside.suggestion == pytest.approx(alone.suggestion / 100, rel=0.5)


def test_a_start_of_nan_is_an_error() -> None:
    """There is nothing to plot."""
    point = nn.Parameter(torch.tensor(torch.nan))

    with pytest.raises(TrainingError, match="The loss is nan before anything was learned"):
        sweep_rates(torch.optim.SGD([point], lr=1.0), repeat(None), lambda _: point)


def test_it_writes_a_plot_and_the_numbers(tmp_path: Path) -> None:
    """The same files for the same sweep; the plot is one of the picture formats of a browser."""
    sweep = RateSweep((1e-3, 1e-2), (2.0, 1.0), 1e-3)

    sweep.write(tmp_path / "one")
    sweep.write(tmp_path / "two")

    told = json.loads((tmp_path / "one" / "rates.json").read_text())
    assert told == {"rates": [1e-3, 1e-2], "losses": [2.0, 1.0], "suggestion": 1e-3}
    plot = (tmp_path / "one" / "rates.svg").read_bytes()
    assert ET.fromstring(plot).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314 (our own file)
    assert plot == (tmp_path / "two" / "rates.svg").read_bytes()
