"""Specification of benchmarks/distil.py: how a share of a gap is told."""

import pytest

from benchmarks.distil import gap_closed


def test_a_student_half_way_to_its_teacher_has_closed_half_the_gap() -> None:
    """Whatever the seed brings to both students alike."""
    value, low, high = gap_closed([0.7, 0.7, 0.7], [0.6, 0.6, 0.6], teacher=0.8)

    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_seeds_that_disagree_widen_the_interval() -> None:
    """The value is of the means; a loss is a negative share."""
    value, low, high = gap_closed([0.7, 0.6, 0.5], [0.6, 0.6, 0.6], teacher=0.8)

    assert value == pytest.approx(0)
    assert low < -0.3
    assert high > 0.3
