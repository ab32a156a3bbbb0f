"""Specification of models/untrained.py: the same trunk without what it learned."""

import dataclasses

import pytest
import torch

from models.backbones import build_backbone
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.untrained import untrained_logits


@pytest.fixture(scope="module")
def data() -> PictureData:
    data = load_digit_task("loop", seed=0)
    train, validation, test = (
        Split(split.pictures[::6], split.labels[::6]) for split in data.splits.values()
    )
    return dataclasses.replace(data, train=train, validation=validation, test=test)


def test_it_does_not_depend_on_what_the_trunk_has_learned(data: PictureData) -> None:
    """Only on its architecture, the data and the seed; and the trunk stays as it was."""
    trunk, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=5)
    before = untrained_logits(trunk, data, seed=0)
    with torch.no_grad():
        for weight in trunk.parameters():
            weight.mul_(0.0)

    again, other = (untrained_logits(trunk, data, seed=seed) for seed in (0, 1))

    assert torch.equal(before, again)
    assert not torch.equal(before, other)
    assert all(not bool(weight.any()) for weight in trunk.parameters())


def test_random_features_of_digits_are_worth_something(data: PictureData) -> None:
    """Else every trunk would look good beside them."""
    trunk, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=5)

    named = untrained_logits(trunk, data, seed=0).argmax(dim=-1)

    assert float((named == data.test.labels).float().mean()) > 0.75


def test_batch_norms_know_the_training_pictures(
    data: PictureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the statistics that they start with, a deep network tells no picture from another."""
    seen: list[torch.Tensor] = []
    from models import untrained  # noqa: PLC0415

    original = untrained.features_of

    def spy(backbone: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        seen.extend(b.clone() for name, b in backbone.named_buffers() if name.endswith("_var"))
        return original(backbone, *args, **kwargs)  # pyrefly: ignore

    monkeypatch.setattr(untrained, "features_of", spy)
    trunk, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=5)

    untrained_logits(trunk, data, seed=0)

    assert seen
    assert all(not torch.allclose(var, torch.ones_like(var)) for var in seen)
