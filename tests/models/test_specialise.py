"""Specification of models/specialise.py, models/prefix_maps.py and models/tails.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import prefix_maps as maps_module
from models.backbones import Backbone, build_backbone
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.evaluate import accuracy
from models.fitting import TrainingError
from models.heads import LinearHead
from models.logistic import choose_logistic_head
from models.prefix_maps import MapsError, PrefixMaps, outputs_of, prefix_maps
from models.specialise import RATES, Special, SpecialKind, specialise, start
from models.tails import own_tail

KINDS: tuple[SpecialKind, ...] = tuple(RATES)


@pytest.fixture(scope="module")
def trunk() -> Backbone:
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=1)
    return backbone


@pytest.fixture(scope="module")
def digits() -> PictureData:
    data = load_digit_task("loop", seed=0)
    return dataclasses.replace(
        data,
        train=every_nth(data.train, 4),
        validation=every_nth(data.validation, 2),
        test=every_nth(data.test, 4),
    )


def every_nth(split: Split, step: int) -> Split:
    return Split(split.pictures[::step], split.labels[::step])


@pytest.fixture(scope="module")
def maps(trunk: Backbone, digits: PictureData) -> dict[str, PrefixMaps]:
    return {name: prefix_maps(trunk, split, stage=name) for name, split in digits.splits.items()}


def learn(
    trunk: Backbone, maps: dict[str, PrefixMaps], kind: SpecialKind, *, num_epochs: int
) -> Special:
    return specialise(
        trunk, kind, maps["train"], maps["validation"],
        num_classes=2, seed=0, num_epochs=num_epochs, patience=num_epochs,
    )  # fmt: skip


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def test_prefix_and_the_rest_are_the_backbone(
    trunk: Backbone, digits: PictureData, maps: dict[str, PrefixMaps]
) -> None:
    """Maps computed once stand for the pictures."""
    images = next(iter(digits.test.batches(trunk.preprocessing, batch_size=8)))
    with torch.no_grad():
        expected = trunk(images)

    torch.testing.assert_close(outputs_of(trunk.suffix, maps["test"].maps[:8]), expected)
    assert torch.equal(maps["test"].labels, digits.test.labels)


def test_maps_that_do_not_fit_into_memory_are_an_error(
    trunk: Backbone, digits: PictureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out at the first batch, not when memory is full."""
    monkeypatch.setattr(maps_module, "MAX_MAP_BYTES", 1000)

    with pytest.raises(MapsError, match="fewer pictures, or train a head"):
        prefix_maps(trunk, digits.train, stage="train")


@pytest.mark.parametrize("kind", KINDS)
def test_epoch_0_is_the_head_alone(
    kind: SpecialKind, trunk: Backbone, maps: dict[str, PrefixMaps]
) -> None:
    """The same logits as the logistic head on frozen features, up to the folding's rounding."""
    train, validation = maps["train"], maps["validation"]
    features = [outputs_of(trunk.suffix, part.maps) for part in (train, validation)]
    head, _ = choose_logistic_head(
        features[0], train.labels, features[1], validation.labels, num_classes=2
    )

    tail = start(trunk, kind, train, validation, num_classes=2, width=4, seed=0)
    logits = outputs_of(tail, validation.maps)

    torch.testing.assert_close(logits, outputs_of(head, features[1]), atol=1e-4, rtol=1e-4)
    assert learn(trunk, maps, kind, num_epochs=0).best_epoch == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_the_best_state_comes_back(kind: SpecialKind, trunk: Backbone) -> None:
    """Validated on what it trains on, it must improve; the trunk stays as it was."""
    # Twice as many random labels as 128 features can separate, so a head alone has to fail.
    random = torch.Generator().manual_seed(0)
    noise = PrefixMaps(torch.randn(512, 64, 4, 4, generator=random), torch.arange(512) % 2)
    same = {"train": noise, "validation": noise}
    before = learn(trunk, same, kind, num_epochs=0)
    frozen = values_of(trunk)

    special = learn(trunk, same, kind, num_epochs=8)

    logits = outputs_of(special.tail, noise.maps)
    told = special.validation
    assert special.best_epoch > 0
    assert told > before.validation
    assert told.accuracy == accuracy(logits, noise.labels).value
    assert -told.negative_loss == pytest.approx(float(F.cross_entropy(logits, noise.labels)))
    assert all(torch.equal(trunk.state_dict()[key], values) for key, values in frozen.items())


def test_training_that_only_harms_returns_the_head(
    trunk: Backbone, maps: dict[str, PrefixMaps]
) -> None:
    """Never worse on validation than the head on frozen features, even if every label is wrong."""
    train = maps["train"]
    wrong = {"train": PrefixMaps(train.maps, 1 - train.labels), "validation": train}

    special = learn(trunk, wrong, "lora", num_epochs=3)

    assert special.best_epoch == 0
    assert special.adapter is not None
    assert not any(bool(v.any()) for key, v in special.adapter[1].items() if key.endswith("up"))


def test_same_seed_same_adapter(trunk: Backbone, maps: dict[str, PrefixMaps]) -> None:
    """Pictures, views and starting values are drawn from the seed."""
    first, again = (learn(trunk, maps, "lora", num_epochs=2) for _ in range(2))

    assert first.adapter is not None
    assert again.adapter is not None
    assert first.adapter[0] == "lora"
    for key, values in first.adapter[1].items():
        assert torch.equal(again.adapter[1][key], values)


def test_a_tail_is_no_adapter(trunk: Backbone, maps: dict[str, PrefixMaps]) -> None:
    """It is a network of its own."""
    assert learn(trunk, maps, "tail", num_epochs=0).adapter is None


def test_a_tail_copies_and_keeps_its_batch_statistics(trunk: Backbone) -> None:
    """Every weight learns but the running statistics, and the trunk stays as it was."""
    tail = own_tail(trunk, LinearHead(trunk.num_features, 2)).train()
    tail.head.state_dict()["weight"].normal_()
    before, trunk_before = values_of(tail), values_of(trunk)
    optimizer = torch.optim.SGD(tail.parameters(), lr=0.1)

    tail(torch.randn(4, 64, 8, 8)).square().sum().backward()
    optimizer.step()

    after = tail.state_dict()
    changed = {key for key, values in before.items() if not torch.equal(after[key], values)}
    # Frozen: running statistics and the counter of batches.
    assert changed == {key for key, _ in tail.named_parameters()}
    assert all(torch.equal(trunk.state_dict()[k], values) for k, values in trunk_before.items())


def test_without_validation_there_is_no_stopping(
    trunk: Backbone, maps: dict[str, PrefixMaps]
) -> None:
    """An error that says what to do instead."""
    nothing = {**maps, "validation": maps["validation"].take(torch.tensor([], dtype=torch.int64))}

    with pytest.raises(TrainingError, match=r"no validation pictures.*train a head"):
        learn(trunk, nothing, "ssf", num_epochs=1)
