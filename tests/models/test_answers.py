"""Specification of models/answers.py: a teacher that remembers what it was asked."""

import pytest
import torch
from torch import Tensor

from models import answers
from models.answers import Answer, Memory, features_and_maps
from models.backbones import Backbone, build_backbone
from models.heads import LinearHead


@pytest.fixture(scope="module")
def teacher() -> Backbone:
    """Small, with random values."""
    return build_backbone("small32", weights=None, allow_untrained=True)[0]


@pytest.fixture(scope="module")
def head() -> LinearHead:
    """Knows three classes."""
    head = LinearHead(128, 3)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return head


def pictures(num: int, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8, generator=random)


def test_an_answer_is_what_prefix_suffix_and_head_make(teacher: Backbone, head: LinearHead) -> None:
    """In evaluation mode, without gradients."""
    images = pictures(4)

    given = Memory().ask(teacher.train(), head, images, with_maps=True, keep=False)

    with torch.no_grad():
        features = teacher.eval()(images)
        torch.testing.assert_close(given.features, features)
        torch.testing.assert_close(given.logits, head(features))
        assert given.maps is not None
        torch.testing.assert_close(given.maps, teacher.prefix(teacher.normalise(images)))
    assert not given.logits.requires_grad


def test_known_pictures_are_answered_from_memory_in_any_order(
    teacher: Backbone, head: LinearHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by its own pixels, also when they were asked about in other batches."""
    images, memory = pictures(6), Memory()
    first = memory.ask(teacher, head, images[:3], with_maps=False, keep=True)
    second = memory.ask(teacher, head, images[3:], with_maps=False, keep=True)
    monkeypatch.setattr(answers, "features_and_maps", _refuse)
    order = torch.tensor([5, 0, 2, 3])

    again = memory.ask(teacher, head, images[order], with_maps=False, keep=True)

    assert torch.equal(again.logits, torch.cat([first.logits, second.logits])[order])
    assert torch.equal(again.features, torch.cat([first.features, second.features])[order])


def test_an_answer_without_maps_does_not_serve_who_needs_them(
    teacher: Backbone, head: LinearHead
) -> None:
    """Two methods may share a memory."""
    images, memory = pictures(2), Memory()
    memory.ask(teacher, head, images, with_maps=False, keep=True)

    assert memory.ask(teacher, head, images, with_maps=True, keep=True).maps is not None
    assert memory.ask(teacher, head, images, with_maps=True, keep=True).maps is not None
    assert memory.ask(teacher, head, images, with_maps=False, keep=True).maps is None


def test_a_full_memory_asks_again(
    teacher: Backbone, head: LinearHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not grow beyond its bound, and the answers stay right."""
    images, memory = pictures(4), Memory()
    one = Answer(torch.zeros(1, 3), torch.zeros(1, 128), None)
    monkeypatch.setattr(answers, "MAX_KEPT_BYTES", 2 * one.num_bytes)

    first = memory.ask(teacher, head, images, with_maps=False, keep=True)
    again = memory.ask(teacher, head, images, with_maps=False, keep=True)

    assert len(memory._kept) == 2
    assert torch.equal(first.logits, again.logits)


def test_maps_outlive_a_suffix_that_works_in_place(teacher: Backbone) -> None:
    """A suffix may begin with an activation that overwrites its input."""
    suffix = teacher.suffix
    teacher.suffix = torch.nn.Sequential(torch.nn.ReLU6(inplace=True), suffix)
    images = pictures(2)

    _, maps = features_and_maps(teacher, images, with_maps=True)

    teacher.suffix = suffix
    assert maps is not None
    torch.testing.assert_close(maps, teacher.prefix(teacher.normalise(images)))


def _refuse(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("the teacher was asked again")
