"""Nearest neighbours by cosine, as a head that exports to a plain graph."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from models.heads import check_rows, check_size, class_means

# How fast a vote's weight falls with the cosine (Wu et al. 2018, section 3.3).
VOTE_TEMPERATURE = 0.07


class NeighboursHead(nn.Module):
    """Logits are the shares, 0 to 1, that the labels have in the weighted votes of the nearest.

    Source: Cover & Hart 1967, doi:10.1109/TIT.1967.1053964; votes weighted by exp(cosine / 0.07)
    as in Wu et al. 2018 (arXiv:1805.01978); on centred features, see `models.heads.CosineHead`.
    """

    centre: Tensor
    points: Tensor
    votes: Tensor

    def __init__(
        self, num_features: int, num_points: int, num_classes: int, *, num_neighbours: int
    ) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.register_buffer("centre", torch.zeros(num_features))
        self.register_buffer("points", torch.zeros(num_points, num_features))
        self.register_buffer("votes", torch.zeros(num_points, num_classes))

    @override
    def forward(
        self, features: Float[Tensor, "rows num_features"]
    ) -> Float[Tensor, "rows num_classes"]:
        """Features to shares of the votes."""
        cosines = F.linear(F.normalize(features - self.centre, dim=-1), self.points)
        nearest, places = cosines.topk(self.num_neighbours, dim=-1)
        weights = torch.exp((nearest - 1) / VOTE_TEMPERATURE)
        shares = weights / weights.sum(dim=-1, keepdim=True)
        return torch.matmul(shares.unsqueeze(1), F.embedding(places, self.votes)).squeeze(1)


def neighbours_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    *,
    num_classes: int,
    num_neighbours: int,
) -> NeighboursHead:
    """Keep every picture's direction and label.

    Args:
        num_neighbours: How many vote, at least 1; all rows if they are fewer.

    Raises:
        HeadError: a class without a row, features with NaN, or more rows than a head may keep.
    """
    check_rows(features, labels, num_classes=num_classes)
    check_size(features)
    num_rows, num_features = features.shape
    head = NeighboursHead(
        num_features, num_rows, num_classes, num_neighbours=min(num_neighbours, num_rows)
    )
    head.centre.copy_(class_means(features, labels, num_classes=num_classes).mean(dim=0))
    head.points.copy_(F.normalize(features - head.centre, dim=-1))
    head.votes.copy_(F.one_hot(labels, num_classes))
    return head
