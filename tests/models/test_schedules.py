"""Specification of models/schedules.py: how learning rates change."""

import math
from itertools import pairwise

import pytest
import torch

from models.fine_tuning import ScheduleName
from models.schedules import learning_rate_factor, start_schedule


def test_the_learning_rate_warms_up_and_then_falls_along_half_a_cosine() -> None:
    """A tenth of the steps up, the peak, half of it in the middle, zero at the end."""
    factors = [learning_rate_factor(step, num_steps=100) for step in range(101)]

    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_even_a_single_step_has_a_rate() -> None:
    """One batch and one epoch still learn something."""
    assert learning_rate_factor(0, num_steps=1) == 1


def rates_of(name: ScheduleName, *, num_steps: int) -> tuple[list[float], list[float]]:
    """Rates and first momentum of each step of a run whose peak is 0.5."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = start_schedule(name, optimizer, num_steps=num_steps)
    rates: list[float] = []
    momenta: list[float] = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        schedule.step()
    return rates, momenta


def test_cosine_scales_the_rate_by_its_factor() -> None:
    """Step by step."""
    rates, _ = rates_of("cosine", num_steps=20)

    assert rates == [0.5 * learning_rate_factor(step, num_steps=20) for step in range(20)]


def test_one_cycle_rises_to_the_peak_and_falls_far_below_its_start() -> None:
    """Half a cosine up for 30 % from a 25th, half a cosine down; momentum the other way."""
    rates, momenta = rates_of("one-cycle", num_steps=100)

    low, end = 0.5 / 25, 0.5 / 25 / 1e4
    top = 0.3 * 101 - 1
    for step in range(100):
        is_rising = step <= top
        start, aim = (low, 0.5) if is_rising else (0.5, end)
        share = step / top if is_rising else (step - top) / (100 - top)
        half_cosine = 0.5 * (1 + math.cos(math.pi * share))
        assert rates[step] == pytest.approx(aim + (start - aim) * half_cosine)
    assert max(rates) == pytest.approx(0.5, rel=1e-2)
    assert rates[-1] < low / 10
    assert momenta[0] == pytest.approx(0.95)
    assert min(momenta) == pytest.approx(0.85, abs=1e-3)


@pytest.mark.parametrize("name", ["cosine", "one-cycle"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_even_a_run_of_few_steps_has_a_schedule(name: ScheduleName, num_steps: int) -> None:
    """One batch and one epoch still learn something."""
    rates, _ = rates_of(name, num_steps=num_steps)

    assert all(0 < rate <= 0.5 for rate in rates)
