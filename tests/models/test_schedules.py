"""Specification of models/schedules.py: how learning rates change."""

from itertools import pairwise

import pytest

from models.schedules import learning_rate_factor


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
