"""Specification of models/grids.py: maps of two networks side by side."""

import pytest
import torch

from models.grids import as_grid, one_size
from models.methods import DistillationError


@pytest.mark.parametrize("num_class_tokens", [0, 1])
def test_tokens_are_laid_out_as_the_patches_lay(num_class_tokens: int) -> None:
    """Row by row, without the class token, which comes first."""
    tokens = torch.randn(2, num_class_tokens + 9, 5, generator=torch.Generator().manual_seed(0))

    grid = as_grid(tokens, name="vit")

    assert grid.shape == (2, 5, 3, 3)
    for row in range(3):
        for column in range(3):
            token = tokens[:, num_class_tokens + 3 * row + column]
            assert torch.equal(grid[:, :, row, column], token)


def test_maps_stay_as_they_are() -> None:
    """A convolution's output is a grid already."""
    maps = torch.ones(2, 5, 3, 4)

    assert as_grid(maps, name="net") is maps


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 5)])
def test_what_is_no_grid_is_refused(shape: tuple[int, ...]) -> None:
    """The message names the network and what it gave."""
    with pytest.raises(DistillationError, match=r"At its cut odd gives \[.*5\] a picture"):
        as_grid(torch.zeros(shape), name="odd")


def test_the_larger_maps_are_averaged_down() -> None:
    """So nothing is made up between the places of the smaller ones."""
    large = torch.arange(32.0).reshape(1, 2, 4, 4)
    small = torch.zeros(1, 3, 2, 2)

    first, second = one_size(large, small)

    assert torch.equal(second, small)
    assert first[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert one_size(small, large)[1].shape == (1, 2, 2, 2)
