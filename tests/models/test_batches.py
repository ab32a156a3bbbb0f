"""Specification of models/batches.py and models/augment.py: what training sees."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import batches as batches_module
from models.augment import DRAWINGS, PHOTOS, RANDAUGMENT, Augmentation, augment, fit_crop
from models.batches import UNKNOWN, TrainingPictures, pool
from models.data import Picture, Split
from models.pictures import Preprocessing, to_pixels

SMALL = Preprocessing(16, 18, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
LARGE = Preprocessing(32, 36, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(seed: int) -> Picture:
    """Smooth, so that two sizes of one crop can be compared."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC)
    return Picture(np.asarray(smooth), f"key{seed}")


PICTURES = [picture(seed) for seed in range(10)]


def pictures(
    augmentation: Augmentation | None,
    *,
    batch_size: int = 4,
    seed: int = 0,
    num_views: int | None = None,
    blended: bool = False,
) -> TrainingPictures:
    return TrainingPictures(
        PICTURES, [SMALL, LARGE], augmentation=augmentation, batch_size=batch_size, seed=seed,
        num_views=num_views, blended=blended,
    )  # fmt: skip


def by_row(source: TrainingPictures, epoch: int, preprocessing: Preprocessing) -> Tensor:
    """The pictures of an epoch, back in their own order."""
    all_batches = list(source.epoch(epoch))
    rows = torch.cat([batch.rows for batch in all_batches])
    return torch.cat([batch.images[preprocessing] for batch in all_batches])[rows.argsort()]


def test_an_epoch_holds_every_picture_once() -> None:
    """In batches of even size, so that no batch is a remainder of one."""
    sizes = [len(batch.rows) for batch in pictures(None, batch_size=3).epoch(1)]
    rows = torch.cat([batch.rows for batch in pictures(None, batch_size=3).epoch(1)])

    assert sizes == [4, 3, 3]
    assert sorted(rows.tolist()) == list(range(10))


def test_without_augmentation_training_sees_what_serving_sees() -> None:
    """Bit for bit, at every size."""
    for preprocessing in (SMALL, LARGE):
        seen = by_row(pictures(None), 1, preprocessing)

        for row, one in zip(seen, PICTURES, strict=True):
            assert isinstance(one.source, np.ndarray)
            np.testing.assert_array_equal(row.numpy(), to_pixels(one.source, preprocessing))


@pytest.mark.parametrize("augmentation", [PHOTOS, DRAWINGS])
def test_networks_of_all_sizes_see_the_same_crop(augmentation: Augmentation) -> None:
    """The large view, scaled down, is the small view; the crop of another epoch is far from it."""
    source = pictures(augmentation)
    small, large = by_row(source, 1, SMALL), by_row(source, 1, LARGE)
    halved = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2).float(), 2)

    difference = (halved - small.permute(0, 3, 1, 2)).abs().mean()
    other = (by_row(source, 2, SMALL).float() - small.float()).abs().mean()

    # Two resamplings of a smooth picture differ by a few of 255 steps, mostly at the border.
    assert difference < 4
    assert other > 4 * difference


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    """Bit for bit, whether pictures were kept from an earlier epoch or not."""
    warm = pictures(PHOTOS)
    list(warm.epoch(1))

    for first, again in zip(warm.epoch(2), pictures(PHOTOS).epoch(2), strict=True):
        assert torch.equal(first.rows, again.rows)
        assert torch.equal(first.images[LARGE], again.images[LARGE])


def test_a_full_cache_changes_nothing_but_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that do not fit are decoded again."""
    kept = by_row(pictures(PHOTOS), 1, LARGE)
    monkeypatch.setattr(batches_module, "MAX_CACHE_BYTES", 20_000)

    assert torch.equal(by_row(pictures(PHOTOS), 1, LARGE), kept)


def test_another_seed_draws_other_crops_and_another_order() -> None:
    """Seeds are independent."""
    assert not torch.equal(
        by_row(pictures(PHOTOS), 1, SMALL), by_row(pictures(PHOTOS, seed=1), 1, SMALL)
    )
    orders = [next(iter(pictures(None, batch_size=10).epoch(n))).rows.tolist() for n in (1, 2, 3)]
    assert all(a != b for a, b in pairwise(orders))


def test_fixed_views_come_in_turn_and_in_new_order() -> None:
    """Two views: the third epoch has the pixels of the first, in other batches."""
    source = pictures(PHOTOS, num_views=2)
    first, second, third = (by_row(source, epoch, SMALL) for epoch in (1, 2, 3))
    orders = [torch.cat([batch.rows for batch in source.epoch(epoch)]) for epoch in (1, 3)]

    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert not torch.equal(*orders)


@pytest.mark.parametrize(
    ("augmentation", "num_views", "blended", "again"),
    [
        (PHOTOS, None, False, False),
        (PHOTOS, 3, False, True),
        (None, None, False, True),
        (None, None, True, False),
        (None, 3, True, True),
    ],
)
def test_pixels_come_again_where_views_are_fixed_or_pictures_plain(
    augmentation: Augmentation | None, num_views: int | None, *, blended: bool, again: bool
) -> None:
    """What is said is what happens, over twelve epochs."""
    source = pictures(augmentation, num_views=num_views, blended=blended)
    epochs = [by_row(source, epoch, SMALL) for epoch in range(1, 13)]

    assert source.come_again == again
    assert any(torch.equal(epochs[0], other) for other in epochs[1:]) == again


def test_a_blend_is_a_mean_of_two_views() -> None:
    """Weighed by one share for all pixels and all sizes, which differs from picture to picture."""
    plain, blended = pictures(None), pictures(None, blended=True)
    seen = {size: by_row(plain, 1, size).double() for size in (SMALL, LARGE)}
    blends = {size: by_row(blended, 1, size).double() for size in (SMALL, LARGE)}

    shares = set[float]()
    for row in range(len(PICTURES)):
        fits = [
            share
            for partner in range(len(PICTURES))
            for share in np.linspace(0, 1, 501)
            if _is_blend(blends[SMALL][row], seen[SMALL][row], seen[SMALL][partner], share)
            and _is_blend(blends[LARGE][row], seen[LARGE][row], seen[LARGE][partner], share)
        ]
        assert fits
        shares.add(round(fits[0], 2))
    assert len(shares) >= 5


def _is_blend(blend: Tensor, one: Tensor, other: Tensor, share: float) -> bool:
    # Half a step of rounding, and half of the grid's 1/500 times 255.
    return bool((share * one + (1 - share) * other - blend).abs().max() <= 0.8)


def test_drawings_are_never_mirrored() -> None:
    """A picture that is dark at the left stays dark at the left."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    image = Image.fromarray(ramp)

    for seed in range(50):
        random = np.random.default_rng(seed)
        middle = fit_crop(augment(image, DRAWINGS, random), SMALL)[8].astype(int)
        assert middle[12, 0] > middle[4, 0]


def test_photos_are_mirrored_half_of_the_time() -> None:
    """Between 30 and 70 of 100, far outside which a fair coin never falls."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    crops = [
        fit_crop(augment(Image.fromarray(ramp), PHOTOS, np.random.default_rng(seed)), SMALL)
        for seed in range(100)
    ]

    assert 30 < sum(int(crop[8, 12, 0]) < int(crop[8, 4, 0]) for crop in crops) < 70


def test_a_crop_keeps_at_least_its_smallest_area() -> None:
    """Square, inside the picture, between min_area and all of the centre square's area."""
    areas = [
        np.prod(augment(Image.new("RGB", (200, 100)), PHOTOS, np.random.default_rng(s)).size)
        for s in range(200)
    ]

    # Sides are rounded to whole pixels.
    assert min(areas) >= 0.49 * 100**2
    assert max(areas) <= 100**2
    assert max(areas) - min(areas) > 0.4 * 100**2


@pytest.mark.parametrize("min_area", [0.0, 1.5])
def test_an_area_out_of_range_is_refused(min_area: float) -> None:
    """A crop of nothing, or of more than there is."""
    with pytest.raises(ValueError, match="expected 0 < min_area <= 1"):
        Augmentation(min_area=min_area, flip=False)


def split(*seeds: int, label: int = 0) -> Split:
    return Split(tuple(picture(seed) for seed in seeds), torch.full((len(seeds),), label))


def test_a_picture_of_two_tasks_is_pooled_once_with_both_labels() -> None:
    """A label is unknown where a task does not have the picture."""
    together, labels = pool([split(1, 2, label=3), split(2, 4, label=5)], [])

    assert [one.key for one in together] == ["key1", "key2", "key4"]
    assert labels.tolist() == [[3, UNKNOWN], [3, 5], [UNKNOWN, 5]]


def test_what_any_task_holds_out_is_in_nobodys_pool() -> None:
    """Else the student would be tested on pictures that it learned another task from."""
    together, labels = pool([split(1, 2), split(2, 3)], [split(2), split(9)])

    assert [one.key for one in together] == ["key1", "key3"]
    assert labels.shape == (2, 2)


def test_unlabelled_pictures_are_pooled_unless_a_task_has_them_or_holds_them_out() -> None:
    """A label that a task knows is kept."""
    train = Split(tuple(PICTURES[:2]), torch.tensor([1, 0]))
    held_out = Split(tuple(PICTURES[2:4]), torch.tensor([0, 0]))

    pictures, labels = pool([train], [held_out], unlabelled=PICTURES[1:6])

    assert [one.key for one in pictures] == ["key0", "key1", "key4", "key5"]
    assert labels.tolist() == [[1], [0], [UNKNOWN], [UNKNOWN]]


def test_pictures_are_drawn_as_often_as_their_chances_say() -> None:
    """An epoch has as many draws as pictures; over many epochs each comes up at its rate."""
    chances = np.array([0.5] + [0.5 / 9] * 9)
    source = TrainingPictures(
        PICTURES, [SMALL], augmentation=None, batch_size=4, seed=0, chances=chances
    )

    orders = np.array([source._order(epoch) for epoch in range(400)])

    assert orders.shape == (400, 10)
    shares = np.bincount(orders.ravel(), minlength=10) / orders.size
    # Four standard deviations of 4,000 draws.
    np.testing.assert_allclose(shares, chances, atol=4 * 0.5 / 4000**0.5)
    assert np.array_equal(orders[1], source._order(1))


def test_a_picture_that_is_drawn_again_looks_different() -> None:
    """Else a rare class would be the same few crops over and over."""
    chances = np.array([1.0] + [0.0] * 9)
    source = TrainingPictures(
        PICTURES, [SMALL, LARGE], augmentation=PHOTOS, batch_size=4, seed=0, chances=chances
    )

    views = torch.cat([batch.images[SMALL] for batch in source.epoch(1)])
    first = by_row(pictures(PHOTOS), 1, SMALL)[0]

    assert len(views.flatten(1).unique(dim=0)) == 10
    # The first is the one that it would be without chances.
    assert torch.equal(views[0], first)


def test_randaugment_goes_through_as_many_operations_as_are_asked_for() -> None:
    """None leaves the crop; the draws are those of the picture's own generator alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def view(num_operations: int, seed: int) -> bytes:
        policy = dataclasses.replace(RANDAUGMENT, num_operations=num_operations)
        return augment(image, policy, np.random.default_rng(seed)).tobytes()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [view(2, seed) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = [view(2, seed) for seed in range(12)]
    plain = [augment(image, PHOTOS, np.random.default_rng(seed)).tobytes() for seed in range(12)]

    assert first == again
    assert [view(0, seed) for seed in range(12)] == plain
    # Two of fourteen operations do nothing or next to nothing to noise.
    assert sum(one != other for one, other in zip(first, plain, strict=True)) >= 9


@pytest.mark.parametrize(("num_operations", "magnitude"), [(-1, 9), (2, 31), (2, -1)])
def test_randaugment_out_of_range_is_refused(num_operations: int, magnitude: int) -> None:
    """With both values."""
    with pytest.raises(ValueError, match=f"num_operations={num_operations}, magnitude={magnitude}"):
        Augmentation(min_area=0.5, flip=True, num_operations=num_operations, magnitude=magnitude)
