"""Specification of models/comparison.py: which size of specialisation is worth its bytes."""

import pytest
import torch
from torch import Tensor

from models.backbones import Backbone, build_backbone
from models.comparison import (
    STRATEGIES,
    ComparisonError,
    Strategy,
    cross_validate,
    folds,
    smallest_that_does_not_lose,
)
from models.prefix_maps import PrefixMaps


def trunk() -> Backbone:
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    return backbone


def noise(num: int, *, num_classes: int) -> PrefixMaps:
    """Maps that say nothing of their labels."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(num, 64, 4, 4, generator=random)
    labels = torch.arange(num) % num_classes
    return PrefixMaps(maps, labels)


def right(num: int, *, of: int = 100) -> Tensor:
    return torch.arange(of) < num


def test_every_picture_is_held_out_once_and_never_seen_before() -> None:
    """Neither trained on nor used for stopping in its own fold; classes are dealt alike."""
    labels = torch.arange(66) % 3

    seen = list(folds(labels, seed=0))

    held_out = torch.cat([part[2] for part in seen])
    assert sorted(held_out.tolist()) == list(range(66))
    for train, stop, out in seen:
        together = torch.cat([train, stop, out])
        assert sorted(together.tolist()) == list(range(66))
        assert all(abs(int((labels[out] == label).sum()) - 22 / 3) < 1 for label in range(3))
        assert 0 < len(stop) < len(train) / 2
        assert set(labels[stop].tolist()) == {0, 1, 2}


def test_folds_depend_on_the_seed_alone() -> None:
    """Same seed, same folds."""
    labels = torch.arange(60) % 3
    first, again, other = (
        torch.cat([part[2] for part in folds(labels, seed=seed)]).tolist() for seed in (0, 0, 1)
    )

    assert first == again
    assert first != other


def test_labels_that_are_noise_are_not_learned() -> None:
    """Whoever had seen the held-out pictures would name them all; unseen ones are at chance."""
    found = cross_validate(
        trunk(), noise(120, num_classes=2), kinds=("tail",), num_classes=2, seed=0, num_epochs=4
    )

    assert list(found) == ["head", "tail"]
    for is_right in found.values():
        assert 0.3 < float(is_right.float().mean()) < 0.7


def test_too_few_pictures_to_compare_on_are_an_error() -> None:
    """One that says what to do."""
    with pytest.raises(ComparisonError, match=r"has 5 pictures.*at least 6.*name the strategy"):
        cross_validate(trunk(), noise(10, num_classes=2), kinds=("bias",), num_classes=2, seed=0)


@pytest.mark.parametrize(
    ("num_right", "proposed"),
    [
        # McNemar with 4 pictures against none is p = 0.0625, with 5 it is 0.03125.
        ({"head": 76, "tail": 80}, "head"),
        ({"head": 75, "tail": 80}, "tail"),
        ({"head": 75, "lora": 77, "tail": 80}, "lora"),
        ({"head": 75, "ssf": 80, "tail": 80}, "ssf"),
        ({"head": 80, "ssf": 70, "tail": 75}, "head"),
        (dict.fromkeys(STRATEGIES, 50), "head"),
    ],
)
def test_the_smallest_that_is_not_significantly_below_the_best_is_proposed(
    num_right: dict[Strategy, int], proposed: Strategy
) -> None:
    """By size, not by the order in which they were trained."""
    is_right = {name: right(num) for name, num in reversed(num_right.items())}

    assert smallest_that_does_not_lose(is_right) == proposed
