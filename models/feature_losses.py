"""What a student's features and maps are taught by: those of its teacher, in several ways."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Relational distillation weighs distances and angles so (its section 4.1).
DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
_TINY = 1e-12


def feature_loss(
    projected: Float[Tensor, "batch features"], target: Float[Tensor, "batch features"]
) -> Float[Tensor, ""]:
    """How far the student's projected features point away from the teacher's: 0 to 2.

    One minus the cosine, so that neither network's scale of features matters.

    Source: hints through a learned regressor, Romero et al. 2015, arXiv:1412.6550, section 2.2,
    here between the pooled features and with both sides normalised.
    """
    return (1 - F.cosine_similarity(projected, target, dim=-1)).mean()


def hint_loss(
    projected: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """Mean squared difference between the student's projected maps and the teacher's.

    Source: FitNets, Romero et al. 2015, arXiv:1412.6550, equation 3, as a mean over all values
    and trained together with the rest, where the paper trains the hint alone first.
    """
    return F.mse_loss(projected, target)


def attention_loss(
    student_maps: Float[Tensor, "batch student_channels height width"],
    teacher_maps: Float[Tensor, "batch teacher_channels height width"],
) -> Float[Tensor, ""]:
    """Mean squared difference of where both networks look: mean squared activation by place.

    Each picture's attention has length 1, so neither network's scale matters.

    Source: attention transfer, Zagoruyko & Komodakis 2017, arXiv:1612.03928, equation 2 with p 2,
    as the mean over places of the authors' code.
    """
    return F.mse_loss(_attention(student_maps), _attention(teacher_maps))


def relational_loss(
    student_features: Float[Tensor, "batch student_features"],
    teacher_features: Float[Tensor, "batch teacher_features"],
) -> Float[Tensor, ""]:
    """How differently both networks lay the batch out: distances of pairs, angles of triples.

    Distances are relative to their mean, so neither network's scale matters, nor its width.

    Source: RKD, Park et al. 2019, arXiv:1904.05068, equations 5 to 9, with the weights of its
    section 4.1.
    """
    distance = F.smooth_l1_loss(_distances(student_features), _distances(teacher_features))
    angle = F.smooth_l1_loss(_angles(student_features), _angles(teacher_features))
    return DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * angle


def _attention(
    maps: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch places"]:
    return F.normalize(maps.square().mean(dim=1).flatten(1), dim=-1)


def _distances(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rows"]:
    """Euclidean, divided by the mean over pairs of two; 0 on the diagonal."""
    # Not torch.cdist: its slope at a distance of 0, as on the diagonal, is not a number twice over.
    squares = (rows[:, None] - rows[None]).square().sum(dim=-1)
    is_pair = squares > _TINY
    distances = torch.where(is_pair, squares.where(is_pair, 1.0).sqrt(), 0.0)
    return distances / (distances.sum() / is_pair.sum().clamp(min=1)).clamp(min=_TINY)


def _angles(rows: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rows rows"]:
    """Cosine of the angle at row i between the directions to rows j and k."""
    directions = F.normalize(rows[None] - rows[:, None], dim=-1)
    return directions @ directions.transpose(1, 2)
