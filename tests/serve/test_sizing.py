"""The size of a batch follows from how the device's time grows with it."""

from __future__ import annotations

import pytest

from serve.sizing import largest_batch


@pytest.mark.parametrize(
    ("picture_ms", "expected"), [(25.0, 1), (10.0, 1), (6.0, 1), (2.6, 3), (0.9, 11), (0.1, 32)]
)
def test_where_time_is_linear_the_target_is_divided_by_the_time_of_one(
    picture_ms: float, expected: int
) -> None:
    """A CPU: whole pictures that fit into 10 ms, at least one and at most 32."""
    size, picture_s = largest_batch(lambda size: size * picture_ms / 1000, target_s=0.01, most=32)

    assert size == expected
    assert picture_s == pytest.approx(picture_ms / 1000)


def test_where_large_batches_cost_little_more_they_are_taken() -> None:
    """A GPU: 2 ms for any batch and 0.1 ms for each picture; one picture says nothing of many."""
    size, picture_s = largest_batch(lambda size: 0.002 + 0.0001 * size, target_s=0.01, most=256)

    # (10 - 2) / 0.1 ms = 80, which lies between the tried 64 and 128.
    assert size in {79, 80}
    assert picture_s == pytest.approx((0.002 + 0.0001 * size) / size)


def test_no_batch_larger_than_allowed_is_tried() -> None:
    """Nor one that comes after a batch that took too long."""
    tried: list[int] = []

    def seconds_of(size: int) -> float:
        tried.append(size)
        return size / 1000

    assert largest_batch(seconds_of, target_s=1.0, most=6)[0] == 6
    assert largest_batch(seconds_of, target_s=0.0035, most=64)[0] == 3
    assert tried == [1, 2, 4, 6, 1, 2, 4]
