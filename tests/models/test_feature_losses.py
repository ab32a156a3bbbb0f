"""Specification of models/feature_losses.py: what a student's features and maps are taught by."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from models.feature_losses import attention_loss, feature_loss, hint_loss, relational_loss

RANDOM = torch.Generator().manual_seed(0)
ROWS, ROWS_TOO = (torch.randn(5, 7, generator=RANDOM, dtype=torch.float64) for _ in range(2))
MAPS, MAPS_TOO = (torch.randn(3, 4, 2, 3, generator=RANDOM, dtype=torch.float64) for _ in range(2))

CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "features": (feature_loss, ROWS, ROWS_TOO),
    "relations": (relational_loss, ROWS, ROWS_TOO),
    "hint": (hint_loss, MAPS, MAPS_TOO),
    "attention": (attention_loss, MAPS, MAPS_TOO),
}


@pytest.mark.parametrize("name", CASES)
def test_a_student_that_copies_its_teacher_has_no_loss(name: str) -> None:
    """Each loss is zero where both agree."""
    loss, _, teacher = CASES[name]

    assert loss(teacher.clone(), teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_as_the_student_approaches_its_teacher(name: str) -> None:
    """On the straight way from one to the other."""
    loss, student, teacher = CASES[name]
    shares = torch.linspace(0, 1, 6)

    losses = [loss(student + share * (teacher - student), teacher).item() for share in shares]

    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 100 * losses[-1]


@pytest.mark.parametrize("name", CASES)
def test_the_slope_is_that_of_the_loss(name: str) -> None:
    """By finite differences."""
    loss, student, teacher = CASES[name]

    given = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (given, teacher))


def test_features_that_point_alike_match_at_any_scale() -> None:
    """A teacher whose features are ten times as large teaches the same."""
    assert feature_loss(ROWS, 10 * ROWS).item() == pytest.approx(0, abs=1e-12)
    assert feature_loss(ROWS, -ROWS).item() == pytest.approx(2)


def test_a_hint_is_a_squared_distance() -> None:
    """A mean over all values of all maps."""
    assert hint_loss(MAPS, MAPS_TOO).item() == pytest.approx(
        float(np.mean((MAPS.numpy() - MAPS_TOO.numpy()) ** 2))
    )


def test_attention_is_where_squares_are_large() -> None:
    """Written out with loops: squares summed over channels, scaled to length 1 in each picture."""
    maps: list[np.ndarray] = []
    for network in (MAPS.numpy(), MAPS_TOO.numpy()):
        places = np.zeros((3, 6))
        for picture, channel, row, column in np.ndindex(network.shape):
            places[picture, 3 * row + column] += network[picture, channel, row, column] ** 2
        maps.append(places / np.sqrt((places**2).sum(axis=1, keepdims=True)))

    loss = attention_loss(MAPS, MAPS_TOO)

    assert loss.item() == pytest.approx(float(np.mean((maps[0] - maps[1]) ** 2)))


def test_attention_does_not_depend_on_width_or_scale() -> None:
    """Every channel twice, ten times as large: still looks at the same places."""
    assert attention_loss(MAPS, 10 * torch.cat([MAPS, MAPS], dim=1)).item() == pytest.approx(0)


def test_relations_are_distances_of_pairs_and_angles_of_triples() -> None:
    """SciPy's distances over their mean, angles by loops, Huber's penalty, 25 and 50."""
    distances, angles = list[np.ndarray](), list[np.ndarray]()
    for rows in (ROWS.numpy(), ROWS_TOO.numpy()):
        pairs = pdist(rows)
        distances.append(squareform(pairs / pairs.mean()))
        angle = np.zeros((5, 5, 5))
        for i, j, k in np.ndindex(angle.shape):
            if i not in {j, k}:
                to_j, to_k = rows[j] - rows[i], rows[k] - rows[i]
                angle[i, j, k] = to_j @ to_k / np.linalg.norm(to_j) / np.linalg.norm(to_k)
        angles.append(angle)

    loss = relational_loss(ROWS, ROWS_TOO)

    assert loss.item() == pytest.approx(25 * huber(*distances) + 50 * huber(*angles))


def huber(one: np.ndarray, other: np.ndarray) -> float:
    """Half the square up to 1, then straight on with slope 1."""
    size = np.abs(one - other)
    return float(np.mean(np.where(size < 1, size**2 / 2, size - 0.5)))


def test_relations_do_not_depend_on_width_place_or_scale() -> None:
    """The same layout in more dimensions, elsewhere and larger."""
    wider = 10 * torch.cat([ROWS, torch.zeros(5, 2)], dim=1) + 3

    assert relational_loss(ROWS, wider).item() == pytest.approx(0, abs=1e-12)


def test_two_pictures_at_the_same_place_do_no_harm() -> None:
    """A distance of zero has no slope, and must not become NaN."""
    rows = ROWS.clone()
    rows[1] = rows[0]
    rows.requires_grad_()

    relational_loss(rows, ROWS_TOO).backward()

    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
