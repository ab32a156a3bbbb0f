"""Specification of models/iterative_split.py: every part gets its share of every label."""

import numpy as np
import pytest
import torch

from models.iterative_split import iterative_split

SHARES = (0.64, 0.16, 0.2)


def drawn(num: int, frequencies: tuple[float, ...], *, seed: int = 0) -> torch.Tensor:
    """Labels that are had independently, each by its share of the pictures."""
    chance = torch.rand(num, len(frequencies), generator=torch.Generator().manual_seed(seed))
    return (chance < torch.tensor(frequencies)).long()


def worst(labels: torch.Tensor, part_of: np.ndarray) -> float:
    """How many pictures of any label any part has too many or too few."""
    has = labels.numpy()
    return max(
        abs(has[part_of == part].sum(axis=0) - share * has.sum(axis=0)).max()
        for part, share in enumerate(SHARES)
    )


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_spread_far_better_than_by_chance(seed: int) -> None:
    """Within two pictures of the share of each label, and closer to it than by chance."""
    labels = drawn(300, (0.5, 0.3, 0.1, 0.05, 0.02), seed=seed)
    by_chance = np.random.default_rng(seed).choice(3, 300, p=SHARES)
    found = iterative_split(labels, SHARES, seed=seed)

    assert worst(labels, found) <= 2
    assert worst(labels, found) < worst(labels, by_chance)


def test_every_picture_is_dealt_once_and_parts_have_their_size() -> None:
    """Within a few pictures: labels come first."""
    part_of = iterative_split(drawn(250, (0.4, 0.2, 0.1)), SHARES, seed=0)

    assert part_of.min() == 0
    np.testing.assert_allclose(np.bincount(part_of) / 250, SHARES, atol=0.02)


def test_three_pictures_of_a_label_are_not_all_tested_on() -> None:
    """The rarest label is dealt first, and most of it to train."""
    labels = drawn(100, (0.5, 0.0))
    labels[[3, 50, 90], 1] = 1
    part_of = iterative_split(labels, SHARES, seed=0)

    assert (part_of[[3, 50, 90]] == 0).sum() in {1, 2}
    assert (part_of[[3, 50, 90]] == 2).any()


def test_a_part_without_a_share_gets_nothing() -> None:
    """Where test pictures are given."""
    part_of = iterative_split(drawn(50, (0.4, 0.2)), (0.8, 0.2, 0.0), seed=0)

    assert set(part_of.tolist()) == {0, 1}


def test_the_same_seed_deals_alike_and_another_one_otherwise() -> None:
    """Nothing else is drawn from."""
    labels = drawn(80, (0.4, 0.2))
    first, again, other = (iterative_split(labels, SHARES, seed=seed) for seed in (1, 1, 2))

    assert (first == again).all()
    assert (first != other).any()
