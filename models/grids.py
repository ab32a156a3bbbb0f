"""Maps of two networks side by side: as grids of places, and of one size."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.methods import DistillationError


def as_grid(maps: Tensor, *, name: str) -> Float[Tensor, "batch channels height width"]:
    """Maps as they are, or a transformer's tokens [batch, tokens, channels] laid out as a square.

    A class token, which would come first, has no place and is left out.

    Args:
        name: Of the network, for the message.

    Raises:
        DistillationError: neither.
    """
    if maps.ndim == 4:  # noqa: PLR2004
        return maps
    side = math.isqrt(maps.shape[1]) if maps.ndim == 3 else 0  # noqa: PLR2004
    if not side or maps.shape[1] - side**2 not in {0, 1}:
        raise DistillationError(
            f"At its cut {name} gives {list(maps.shape[1:])} a picture; this method compares maps, "
            "expected [channels, height, width] or the tokens of a square. Choose a method that "
            "compares logits or features."
        )
    return maps[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def one_size(
    first: Float[Tensor, "batch channels1 height1 width1"],
    second: Float[Tensor, "batch channels2 height2 width2"],
) -> tuple[
    Float[Tensor, "batch channels1 height width"], Float[Tensor, "batch channels2 height width"]
]:
    """The larger maps averaged down to the size of the smaller ones."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
