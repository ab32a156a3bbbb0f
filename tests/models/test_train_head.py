"""Specification of models/train_head.py: one task's head on a trunk."""

import dataclasses

import pytest
import torch

from models.backbones import Backbone, build_backbone
from models.data import PictureData, Split, join
from models.digits import load_digit_task
from models.evaluate import accuracy
from models.head_kinds import COSINE_SCALES
from models.heads import CosineHead, LinearHead, cosine_head, features_of, logits_of
from models.logistic import L2_STRENGTHS, logistic_head
from models.train_head import choose_kind, train_head


@pytest.fixture(scope="module")
def trunk() -> Backbone:
    """Random features: enough to tell digits apart in part."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    return backbone


@pytest.fixture(scope="module")
def parity() -> PictureData:
    return load_digit_task("parity", seed=0)


def first(split: Split, num: int) -> Split:
    """`num` pictures of every class."""
    rows = [
        int(row)
        for label in split.labels.unique()
        for row in (split.labels == label).nonzero().flatten()[:num]
    ]
    return Split(tuple(split.pictures[row] for row in rows), split.labels[rows])


NOTHING = Split((), torch.zeros(0, dtype=torch.int64))


def test_a_linear_head_learns_from_train_and_validation_at_the_chosen_strength(
    trunk: Backbone, parity: PictureData
) -> None:
    """The final fit is logistic regression on both together, and test was only measured."""
    trained = train_head(trunk, parity, kind="linear")

    both = join(parity.train, parity.validation)
    features = features_of(trunk, both, stage="x")
    expected = logistic_head(features, both.labels, num_classes=2, l2=trained.setting["l2"])
    assert isinstance(trained.head, LinearHead)
    assert trained.setting["l2"] in L2_STRENGTHS
    torch.testing.assert_close(trained.head.weight, expected.weight)
    logits = logits_of(trained.head, features_of(trunk, parity.test, stage="x"))
    assert trained.metrics["test"] == accuracy(logits, parity.test.labels)


def test_a_cosine_head_has_a_scale_out_of_the_list(trunk: Backbone, parity: PictureData) -> None:
    """Chosen on validation, then fitted on train and validation together."""
    trained = train_head(trunk, parity, kind="cosine")

    both = join(parity.train, parity.validation)
    features = features_of(trunk, both, stage="x")
    expected = cosine_head(features, both.labels, num_classes=2, scale=trained.setting["scale"])
    assert isinstance(trained.head, CosineHead)
    assert trained.setting["scale"] in COSINE_SCALES
    torch.testing.assert_close(trained.head.prototypes, expected.prototypes)


@pytest.mark.parametrize("num", [1, 5])
def test_a_handful_of_pictures_gets_prototypes(
    num: int, trunk: Backbone, parity: PictureData
) -> None:
    """Without validation too: one picture a class is enough."""
    few = dataclasses.replace(parity, train=first(parity.train, num), validation=NOTHING)

    trained = train_head(trunk, few)

    assert (trained.kind, choose_kind(parity)) == ("cosine", "linear")
    assert set(trained.metrics) == {"test", "baseline_test"}
    assert 0.3 < trained.metrics["test"].value <= 1


def test_the_same_data_gives_the_same_head(trunk: Backbone, parity: PictureData) -> None:
    """Nothing is drawn at random."""
    first_head, again = (train_head(trunk, parity, kind="linear") for _ in range(2))

    assert torch.equal(first_head.head.state_dict()["weight"], again.head.state_dict()["weight"])


def test_a_head_worse_than_pixels_says_so(trunk: Backbone, parity: PictureData) -> None:
    """Prototypes of random features lose against a linear model on the pixels."""
    trained = train_head(trunk, parity, kind="cosine")

    assert trained.metrics["test"].value < trained.metrics["baseline_test"].value
    assert "worse on test than a linear model on 16 px thumbnails" in trained.notes[0]
