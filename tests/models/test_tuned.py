"""Specification of models/tuned.py: what learns when, how fast, and what is minimised."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from models.backbones import Backbone, build_backbone
from models.batches import Batch, TrainingPictures
from models.blocks import Block, blocks_of
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.fine_tuning import FineTuningError, StrategyName, fine_tuning
from models.fitting import batch_norms
from models.heads import LinearHead, features_of
from models.logistic import logistic_head
from models.transfer import teach, training_pictures
from models.tuned import Tuned


def untrained() -> Backbone:
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    return backbone


def few_digits(num: int) -> PictureData:
    """So many pictures of every class in train, four in validation and test."""
    data = load_digit_task("digits", seed=0)
    return dataclasses.replace(
        data,
        train=part(data.train, num),
        validation=part(data.validation, 4),
        test=part(data.test, 4),
    )


def part(split: Split, num: int) -> Split:
    """Some pictures of every class."""
    rows = [int(row) for c in range(10) for row in (split.labels == c).nonzero()[:num, 0]]
    return Split(tuple(split.pictures[row] for row in rows), split.labels[rows])


def some_head(scale: float = 1.0) -> LinearHead:
    """One that tells classes apart somehow, so that gradients reach the backbone."""
    head = LinearHead(128, 10)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.weight, 0, scale)
    return head


def everything(tuned: Tuned) -> Batch:
    """All training pictures as they are, in one batch."""
    size, split = tuned.backbone.preprocessing, tuned.data.train
    images = torch.cat(list(split.batches(size, batch_size=999)))
    return Batch(torch.arange(len(split)), {size: images})


def take_steps(tuned: Tuned, *, num_steps: int) -> None:
    """Each on all pictures and an epoch of its own."""
    optimizer = tuned.optimizer()
    for epoch in range(1, num_steps + 1):
        tuned.prepare(epoch, num_batches=1)
        optimizer.zero_grad()
        tuned.loss(everything(tuned)).backward()
        optimizer.step()


def changed_blocks(backbone: Backbone, before: dict[str, Tensor]) -> set[int]:
    """Numbers, from 1 on, of the blocks of which any weight is another one."""
    names = {id(tensor): name for name, tensor in backbone.named_parameters()}
    return {
        number
        for number, block in enumerate(blocks_of(backbone), start=1)
        if any(not torch.equal(p, before[names[id(p)]]) for p in block.parameters)
    }


@pytest.mark.parametrize(
    ("strategy", "chosen", "changed"),
    [
        ("last", {}, {3}),
        ("surgical", {"block": 1}, {1}),
        ("surgical", {"block": 2}, {2}),
        ("gradual", {}, {3}),
        ("gradual", {"num_epochs": 2}, {2, 3}),
        ("gradual", {"num_epochs": 3}, {1, 2, 3}),
        ("full", {}, {1, 2, 3}),
        ("direct", {}, {1, 2, 3}),
        ("scratch", {}, {1, 2, 3}),
    ],
)
def test_a_strategy_teaches_its_blocks_and_no_other(
    strategy: StrategyName, chosen: dict[str, Any], changed: set[int]
) -> None:
    """To the bit, in one step of each epoch."""
    backbone, data = untrained(), few_digits(4)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    how = fine_tuning(strategy, **{"num_epochs": 1, **chosen})
    tuned = Tuned(backbone, some_head(), data, how)

    take_steps(tuned, num_steps=how.num_epochs)

    assert changed_blocks(backbone, before) == changed


def test_surgical_takes_the_block_with_the_largest_gradient_for_its_size() -> None:
    """Of the loss over all training pictures at once, by hand; and the report says so."""
    backbone, data = untrained(), few_digits(4)
    head = some_head()
    images = next(data.train.batches(backbone.preprocessing, batch_size=40))
    backbone.eval()
    F.cross_entropy(head(backbone(images)), data.train.labels).backward()
    sizes: list[float] = []
    for block in blocks_of(backbone):
        gradient = torch.cat([p.grad.flatten() for p in block.parameters if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in block.parameters])
        sizes.append(float(gradient.norm() / weights.norm()))

    tuned = Tuned(backbone, head, data, fine_tuning("surgical"))

    assert tuned.gradient_norms == pytest.approx(sizes, rel=1e-3)
    assert tuned.chosen_block == tuned.blocks[sizes.index(max(sizes))]


def test_a_block_that_is_not_there_is_an_error_with_those_that_are() -> None:
    """Numbers are those of the backbone at hand."""
    with pytest.raises(FineTuningError, match=r"block is 4; expected 1 to 3: small32 has blocks"):
        Tuned(untrained(), some_head(), few_digits(4), fine_tuning("surgical", block=4))


@pytest.mark.parametrize(("batch_norm", "moves"), [("frozen", set()), ("follow", {3})])
def test_batch_statistics_follow_only_where_weights_learn(batch_norm: str, moves: set[int]) -> None:
    """Those of a frozen block describe what its frozen weights make."""
    backbone, data = untrained(), few_digits(4)
    tuned = Tuned(
        backbone, some_head(), data,
        fine_tuning("last", batch_norm=batch_norm),
    )  # fmt: skip
    tuned.prepare(1, num_batches=1)
    before = [norms_of(block) for block in tuned.blocks]

    images = {
        backbone.preprocessing: next(data.train.batches(backbone.preprocessing, batch_size=40))
    }
    tuned.loss(Batch(torch.arange(40), images))

    after = [norms_of(block) for block in tuned.blocks]
    assert {at + 1 for at in range(3) if not torch.equal(before[at], after[at])} == moves


def norms_of(block: Block) -> Tensor:
    """All running means of a block, copied."""
    return torch.cat([norm.running_mean.clone() for norm in batch_norms(block.layers)])  # pyrefly: ignore


def test_rates_fall_from_the_head_to_the_first_block() -> None:
    """The head's, three tenths of it, then by the factor from block to block."""
    backbone = untrained()
    tuned = Tuned(
        backbone, some_head(), few_digits(4),
        fine_tuning(rate=1e-2, rate_decay=0.5),
    )  # fmt: skip

    rates = {
        id(p): group["lr"] for group in tuned.optimizer().param_groups for p in group["params"]
    }

    assert len(rates) == sum(1 for _ in tuned.network.parameters())
    assert {rates[id(p)] for p in tuned.head.parameters()} == {1e-2}
    for block, rate in zip(tuned.blocks, (7.5e-4, 1.5e-3, 3e-3), strict=True):
        assert all(rates[id(p)] == pytest.approx(rate) for p in block.parameters)


def test_a_head_that_is_fitted_first_moves_the_features_less() -> None:
    """One that knows nothing bends them for its own sake: Kumar et al., section 3.

    A few steps at the same rates, on digits that the backbone knows.
    """
    data = few_digits(10)
    known = untrained()
    teach(known, data, fine_tuning("scratch", num_epochs=3), augmentation=None, seed=0)
    before = features_of(known, data.test, stage="test")
    moved: dict[str, float] = {}
    strategies: tuple[StrategyName, ...] = ("full", "direct")
    for strategy in strategies:
        backbone = copy.deepcopy(known)
        head = LinearHead(backbone.num_features, 10)
        if strategy == "full":
            train = features_of(backbone, data.train, stage="features")
            head = logistic_head(train, data.train.labels, num_classes=10, l2=0.1)
        take_steps(Tuned(backbone, head, data, fine_tuning(strategy)), num_steps=5)
        after = features_of(backbone, data.test, stage="test")
        moved[strategy] = float((after - before).norm() / before.norm())

    assert 0 < moved["full"] < 0.9 * moved["direct"]


def loss_after(tuned: Tuned, *, seed: int = 0) -> float:
    """Of everything, in training mode."""
    tuned.prepare(1, num_batches=1)
    torch.manual_seed(seed)
    return tuned.loss(everything(tuned)).item()


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.5},
        {"label_smoothing": 0.1},
        {"mix": "mixup"},
        {"mix": "cutmix"},
        {"balance": "weights"},
    ],
)
def test_every_regulariser_changes_what_is_minimised(settings: dict[str, Any]) -> None:
    """On digits of which one class has a fifth of the others' pictures."""
    data = few_digits(5)
    unbalanced = dataclasses.replace(data, train=without(data.train, label=3, keep=1))

    plain, held = (
        loss_after(Tuned(untrained(), some_head(scale=1000.0), unbalanced, how), seed=1)
        for how in (fine_tuning(), fine_tuning(**settings))
    )

    assert held != pytest.approx(plain, rel=1e-3)


def without(split: Split, *, label: int, keep: int) -> Split:
    """All pictures but those of one class beyond a few."""
    of_class = (split.labels == label).nonzero().flatten().tolist()
    rows = [row for row in range(len(split)) if row not in of_class[keep:]]
    return Split(tuple(split.pictures[row] for row in rows), split.labels[rows])


def test_dropout_hides_features_from_the_head_and_makes_up_for_it() -> None:
    """The mean loss over many draws of a linear loss is the loss without; the net never drops."""
    tuned = Tuned(untrained(), some_head(), few_digits(2), fine_tuning(dropout=0.4))
    tuned.prepare(1, num_batches=1)
    batch = everything(tuned)
    seen: list[Tensor] = []

    def listen(_head: nn.Module, features: tuple[Tensor]) -> None:
        seen.append(features[0].detach())

    tuned.head.register_forward_pre_hook(listen)
    torch.manual_seed(0)
    for _ in range(60):
        tuned.loss(batch)

    drawn = torch.stack(seen)
    known = features_of(tuned.backbone, tuned.data.train, stage="features")
    is_hidden = (drawn == 0) & (known != 0)
    assert float(is_hidden.float().sum() / (known != 0).sum() / 60) == pytest.approx(0.4, abs=0.01)
    kept = drawn[(drawn != 0)] / known.expand_as(drawn)[(drawn != 0)]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.6))


def test_l2_sp_pulls_the_backbone_to_its_start_and_not_to_zero() -> None:
    """It ends nearer to where it began than the same steps with the plain decay."""
    ends: dict[float, float] = {}
    for strength in (0.0, 1.0):
        backbone = untrained()
        before = [p.detach().clone() for p in backbone.parameters()]
        tuned = Tuned(backbone, some_head(), few_digits(2), fine_tuning(l2_sp=strength, rate=1e-2))
        take_steps(tuned, num_steps=5)
        distances = [
            (p.detach() - start).square().sum()
            for p, start in zip(backbone.parameters(), before, strict=True)
        ]
        ends[strength] = float(torch.stack(distances).sum())

    groups = Tuned(untrained(), some_head(), few_digits(2), fine_tuning(l2_sp=1.0)).optimizer()
    assert 0 < ends[1.0] < 0.5 * ends[0.0]
    assert [group["weight_decay"] for group in groups.param_groups[:2]] == [0.05, 0.0]
    assert all(group["weight_decay"] == 0 for group in groups.param_groups[2:])


def test_balanced_sampling_shows_a_rare_class_as_often_as_any_other() -> None:
    """Though the network is run on no more pictures than without."""
    data = few_digits(10)
    data = dataclasses.replace(data, train=without(data.train, label=3, keep=1))
    shown: dict[str, float] = {}
    for balance in ("none", "sampling"):
        pictures = training_pictures(
            untrained(), data, fine_tuning(balance=balance), augmentation=None, seed=0
        )
        rows = torch.cat([batch.rows for epoch in range(20) for batch in pictures.epoch(epoch)])
        assert len(rows) == 20 * 91
        shown[balance] = float((data.train.labels[rows] == 3).float().mean())

    assert shown["none"] == pytest.approx(1 / 91)
    # Four standard deviations of 1,820 draws.
    assert shown["sampling"] == pytest.approx(0.1, abs=4 * 0.3 / 1820**0.5)


STRATEGIES_WITH_AND_WITHOUT: tuple[StrategyName, ...] = ("scratch", "full")


def test_an_average_brings_its_own_batch_statistics() -> None:
    """Those of the pictures under the averaged weights, where they follow; else they stay."""
    data = few_digits(4)
    for strategy in STRATEGIES_WITH_AND_WITHOUT:
        tuned = Tuned(untrained(), some_head(), data, fine_tuning(strategy, average_epochs=1.0))
        pictures = TrainingPictures(
            data.train.pictures, [tuned.backbone.preprocessing], augmentation=None, batch_size=40,
            seed=0,
        )  # fmt: skip
        average = tuned.average(pictures)
        assert average is not None
        took = [norms_of(block) for block in tuned.blocks]
        take_steps(tuned, num_steps=2)
        average.update()
        with average.in_place():
            now = [norms_of(block) for block in tuned.blocks]
            expected = copy.deepcopy(tuned.backbone)
            update_bn([everything(tuned).images[tuned.backbone.preprocessing]], expected)
            fresh = [norms_of(block) for block in blocks_of(expected)]
        for old, own, new in zip(took, now, fresh, strict=True):
            torch.testing.assert_close(own, new if strategy == "scratch" else old)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_in_bfloat16_what_a_cpu_computes_in_float32() -> None:
    """Within its 8 bits; weights stay float32."""
    on_cpu = Tuned(untrained(), some_head(), few_digits(4), fine_tuning())
    on_gpu = Tuned(untrained().cuda(), some_head().cuda(), few_digits(4), fine_tuning())

    assert loss_after(on_gpu) == pytest.approx(loss_after(on_cpu), rel=2e-2)
    assert all(p.dtype == torch.float32 for p in on_gpu.network.parameters())


def test_a_cpu_computes_in_float32() -> None:
    """Mixed precision is for devices that have it."""
    tuned = Tuned(untrained(), some_head(), few_digits(2), fine_tuning())
    seen: list[torch.dtype] = []

    def listen(_head: nn.Module, _features: tuple[Tensor], logits: Tensor) -> None:
        seen.append(logits.dtype)

    tuned.head.register_forward_hook(listen)
    loss_after(tuned)

    assert seen == [torch.float32]
