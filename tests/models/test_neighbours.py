"""Specification of models/neighbours.py: votes of the nearest, as scikit-learn counts them."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from models.heads import MAX_KEPT_BYTES, HeadError, logits_of
from models.neighbours import VOTE_TEMPERATURE, neighbours_head
from tests.models.features import clouds


def weights(distances: np.ndarray) -> np.ndarray:
    """Of votes, by cosine distance."""
    return np.exp(-distances / VOTE_TEMPERATURE)


@pytest.mark.parametrize("num_neighbours", [1, 5, 30])
def test_shares_of_votes_are_those_of_scikit_learn(num_neighbours: int) -> None:
    """Its search by cosine distance, with the same weights given to it as a function."""
    rows, labels = clouds(90)
    unseen, _ = clouds(40, seed=1)
    head = neighbours_head(rows, labels, num_classes=3, num_neighbours=num_neighbours)
    centre = np.stack([rows[labels == label].double().mean(dim=0) for label in range(3)]).mean(0)
    reference = KNeighborsClassifier(num_neighbours, metric="cosine", weights=weights)
    reference.fit(rows.double().numpy() - centre, labels.numpy())

    expected = reference.predict_proba(unseen.double().numpy() - centre)
    # Float32 cosines of 1e-6, amplified by the votes' 1 / 0.07.
    np.testing.assert_allclose(logits_of(head, unseen), expected, atol=1e-4)


def test_fewer_pictures_than_neighbours_all_vote() -> None:
    """Three rows, one a label, asked for the fifty nearest."""
    rows, labels = clouds(3)
    head = neighbours_head(rows, labels, num_classes=3, num_neighbours=50)
    votes = logits_of(head, rows)

    assert votes.argmax(dim=1).tolist() == [0, 1, 2]
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(3))


def test_more_pictures_than_a_head_may_keep_are_refused() -> None:
    """With what to train instead."""
    rows = torch.rand(MAX_KEPT_BYTES // 4096 + 1, 1024)

    with pytest.raises(HeadError, match="4097 of them take 16 MiB, at most 16 are allowed"):
        neighbours_head(rows, torch.arange(4097) % 2, num_classes=2, num_neighbours=5)
