"""Specification of models/train_task.py: a task in the size that is asked for, or that pays."""

import dataclasses

import pytest
import torch

from models.backbones import Backbone, build_backbone
from models.comparison import STRATEGIES
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.evaluate import accuracy
from models.heads import features_of, logits_of
from models.paired import difference
from models.prefix_maps import outputs_of, prefix_maps
from models.train_head import train_head
from models.train_task import TrainedTask, compare_strategies, possible_kinds, train_task


@pytest.fixture(scope="module")
def trunk() -> Backbone:
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=1)
    return backbone


@pytest.fixture(scope="module")
def data() -> PictureData:
    data = load_digit_task("loop", seed=0)
    train, validation, test = (
        Split(split.pictures[::3], split.labels[::3]) for split in data.splits.values()
    )
    return dataclasses.replace(data, train=train, validation=validation, test=test)


@pytest.fixture(scope="module")
def lora(trunk: Backbone, data: PictureData) -> TrainedTask:
    return train_task(trunk, data, strategy="lora", width=2, seed=0)


@pytest.fixture(scope="module")
def compared(trunk: Backbone, data: PictureData) -> TrainedTask:
    return compare_strategies(trunk, data, seed=0, num_epochs=2)


def test_a_head_is_what_train_head_makes(trunk: Backbone, data: PictureData) -> None:
    """The smallest size is what it always was."""
    trained = train_task(trunk, data, strategy="head", seed=0)

    assert trained.strategy == "head"
    assert (trained.special, trained.rows, trained.proposed) == (None, (), None)
    assert trained.metrics == train_head(trunk, data).metrics


def test_an_adapter_is_reported_beside_the_head(
    lora: TrainedTask, trunk: Backbone, data: PictureData
) -> None:
    """On the same pictures: both accuracies, their paired difference, and the sizes."""
    head, row = lora.rows

    assert lora.strategy == "lora"
    assert (head.strategy, row.strategy) == ("head", "lora")
    assert lora.special is not None
    maps = prefix_maps(trunk, data.test, stage="test")
    logits = outputs_of(lora.special.tail, maps.maps)
    head_logits = logits_of(lora.head.head, features_of(trunk, data.test, stage="test"))
    torch.testing.assert_close(lora.test_logits, logits)
    assert lora.metrics["test"] == row.test == accuracy(logits, data.test.labels)
    assert lora.metrics["head_only_test"] == head.test == accuracy(head_logits, data.test.labels)
    right, head_right = (values.argmax(-1) == data.test.labels for values in (logits, head_logits))
    assert row.against_head == difference(right, head_right)
    # Rank 2 at the two pointwise sites 64 -> 128 and 128 -> 128, and a head 128 -> 2.
    assert head.num_bytes == 4 * (128 + 1) * 2
    assert row.num_bytes == head.num_bytes + 4 * 2 * (64 + 128 + 128 + 128)


def test_a_report_says_what_chose_the_epoch_and_how_the_head_did(lora: TrainedTask) -> None:
    """For the model card."""
    assert "Validation chose the epoch" in lora.notes[0]
    assert lora.notes[1].startswith("head: test ")
    assert lora.notes[2].startswith("lora: test ")
    assert "against the head" in lora.notes[2]


def test_a_comparison_has_every_strategy_and_uses_the_one_it_proposes(
    compared: TrainedTask, data: PictureData
) -> None:
    """Cross-validated on every picture of train and validation, and on no other."""
    assert tuple(row.strategy for row in compared.rows) == STRATEGIES
    assert compared.strategy == compared.proposed
    for row in compared.rows:
        assert row.cross_validated is not None
        assert row.cross_validated.num_samples == len(data.train) + len(data.validation)
        assert row.test.num_samples == len(data.test)
    assert any(f"{compared.proposed!r} is the smallest" in note for note in compared.notes)


def test_test_pictures_do_not_decide(
    compared: TrainedTask, trunk: Backbone, data: PictureData
) -> None:
    """With every test label wrong the evidence and the proposal are the same."""
    wrong = dataclasses.replace(data, test=Split(data.test.pictures, 1 - data.test.labels))

    again = compare_strategies(trunk, wrong, seed=0, num_epochs=2)

    assert again.proposed == compared.proposed
    for row, other in zip(compared.rows, again.rows, strict=True):
        assert row.cross_validated == other.cross_validated
        assert row.test.value == pytest.approx(1 - other.test.value)


def test_low_rank_is_left_out_where_no_layer_allows_it() -> None:
    """ResNet-18's last stage has 3x3 convolutions."""
    with torch.random.fork_rng():
        backbone, _ = build_backbone("resnet18", weights=None, allow_untrained=True)

    assert possible_kinds(backbone) == ("bias", "ssf", "tail")
