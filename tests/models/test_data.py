"""Specification of models/data.py and models/digits.py: pictures with labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from models import data as data_module
from models.data import DataError, Picture, Split, fingerprint, join
from models.digits import DIGIT_TASKS, LOOPED, DigitTask, load_digit_task
from models.pictures import Preprocessing, load_picture

AS_IS = Preprocessing(16, 20, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def split_of(num: int, tmp_path: Path) -> Split:
    pictures: list[Picture] = []
    for index in range(num):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(pixels).save(path)
        pictures.append(Picture(path, str(index)))
    return Split(tuple(pictures), torch.arange(num) % 2)


@pytest.mark.parametrize("limit", [0, 2**30])
def test_batches_are_what_serving_decodes(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from the cache as from the files."""
    monkeypatch.setattr(data_module, "MAX_CACHE_BYTES", limit)
    split = split_of(5, tmp_path)

    for _ in range(2):
        batches = list(split.batches(AS_IS, batch_size=2))

        assert [len(batch) for batch in batches] == [2, 2, 1]
        for row, picture in zip(torch.cat(batches), split.pictures, strict=True):
            assert isinstance(picture.source, Path)
            expected = load_picture(picture.source.read_bytes(), AS_IS)
            np.testing.assert_array_equal(row.numpy(), expected)


def test_small_splits_are_decoded_once(tmp_path: Path) -> None:
    """The second epoch does not need the files."""
    split = split_of(3, tmp_path)
    first = torch.cat(list(split.batches(AS_IS, batch_size=2)))
    for picture in tmp_path.iterdir():
        picture.unlink()

    assert torch.equal(torch.cat(list(split.batches(AS_IS, batch_size=3))), first)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    """Between reading the folder and training, files can go."""
    picture = Picture(tmp_path / "gone.jpg", "key")

    with pytest.raises(DataError, match=r"gone\.jpg was there and cannot be read now"):
        picture.pixels(AS_IS)


def test_splits_join_in_order(tmp_path: Path) -> None:
    """Labels stay with their pictures."""
    split = split_of(3, tmp_path)

    both = join(split, split)

    assert both.pictures == split.pictures * 2
    assert both.labels.tolist() == [0, 1, 0, 0, 1, 0]


def test_a_fingerprint_does_not_depend_on_order() -> None:
    """But on which label belongs to which picture."""
    one = fingerprint([("cat", "1"), ("dog", "2")])

    assert one == fingerprint([("dog", "2"), ("cat", "1")])
    assert one != fingerprint([("dog", "1"), ("cat", "2")])
    assert len(one) == 64


TRUTH: dict[DigitTask, Callable[[int], str]] = {
    "digits": str,
    "parity": lambda digit: "odd" if digit % 2 else "even",
    "loop": lambda digit: "loop" if digit in (0, 6, 8, 9) else "no_loop",
    "at_least_five": lambda digit: "at_least_five" if digit >= 5 else "below_five",
}


@pytest.mark.parametrize("task", DIGIT_TASKS)
def test_every_digit_has_the_label_of_its_task(task: DigitTask) -> None:
    """Checked through the pixels against scikit-learn's own targets."""
    rows, targets = load_digits(return_X_y=True)
    large = Preprocessing(32, 32, AS_IS.mean, AS_IS.std)
    truth = {}
    for row, target in zip(rows, targets, strict=True):
        grey = Image.fromarray(np.round(row.reshape(8, 8) * (255 / 16)).astype(np.uint8))
        pixels = np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB"))
        truth[pixels.tobytes()] = TRUTH[task](target)

    data = load_digit_task(task, seed=0)

    everything = join(*data.splits.values())
    assert len(everything) == 1797
    for picture, label in zip(everything.pictures, everything.labels.tolist(), strict=True):
        assert data.labels[label] == truth[picture.pixels(large).tobytes()]


def test_all_tasks_are_split_alike() -> None:
    """A trunk that learned one task's training pictures has seen no test picture of another."""
    tests = [{p.key for p in load_digit_task(t, seed=3).test.pictures} for t in DIGIT_TASKS]

    assert all(test == tests[0] for test in tests)


def test_tasks_on_the_same_pictures_have_fingerprints_of_their_own() -> None:
    """The labels are part of the data."""
    assert len({load_digit_task(task, seed=0).fingerprint for task in DIGIT_TASKS}) == 4


def test_four_has_no_loop() -> None:
    """Many writers leave it open."""
    assert 4 not in LOOPED


def test_the_record_counts_every_split() -> None:
    """What a checkpoint says of its data."""
    data = load_digit_task("parity", seed=0)

    record = data.record()

    assert (record.name, record.sha256) == ("parity", data.fingerprint)
    assert sum(sum(counts.values()) for counts in record.num_pictures.values()) == 1797
    assert set(record.num_pictures["train"]) == {"even", "odd"}
