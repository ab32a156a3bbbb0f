"""Specification of models/folders.py and models/splits.py: folders of pictures to splits."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.data import DataError, PictureData, join
from models.folders import load_folder, read_pictures
from models.pictures import Preprocessing, load_picture
from models.progress import Progress

AS_IS = Preprocessing(16, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def write(path: Path, *, seed: int, form: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, form)


def fill(folder: Path, numbers: dict[str, int], *, first_seed: int = 0) -> Path:
    """`numbers[label]` different pictures in a subfolder for each label."""
    seeds: Iterator[int] = iter(range(first_seed, 10_000))
    for label, number in numbers.items():
        for index in range(number):
            write(folder / label / f"{index:03}.png", seed=next(seeds))
    return folder


def keys(data: PictureData) -> dict[str, list[str]]:
    return {name: [p.key for p in split.pictures] for name, split in data.splits.items()}


def test_without_a_test_folder_every_class_is_split_alike(tmp_path: Path) -> None:
    """64 : 16 : 20 in each class, and no picture in two splits."""
    data = load_folder(fill(tmp_path / "pets", {"cat": 50, "dog": 25}), seed=0)

    assert (data.name, data.labels) == ("pets", ("cat", "dog"))
    assert data.counts == {
        "train": {"cat": 32, "dog": 16},
        "validation": {"cat": 8, "dog": 4},
        "test": {"cat": 10, "dog": 5},
    }
    assert len({key for split in keys(data).values() for key in split}) == 75


def test_a_given_test_folder_stays_the_test_split(tmp_path: Path) -> None:
    """Only train/ is divided, 80 : 20."""
    fill(tmp_path / "train", {"cat": 10, "dog": 5})
    fill(tmp_path / "test", {"cat": 3, "dog": 2}, first_seed=100)

    data = load_folder(tmp_path, seed=0)

    assert data.counts["test"] == {"cat": 3, "dog": 2}
    assert data.counts["train"] == {"cat": 8, "dog": 4}
    test_files = {
        p.source.parent.parent.name for p in data.test.pictures if isinstance(p.source, Path)
    }
    assert test_files == {"test"}


def test_the_split_follows_the_seed_and_the_content_only(tmp_path: Path) -> None:
    """Renamed files fall into the same splits; another seed deals anew."""
    folder = fill(tmp_path / "pets", {"cat": 20, "dog": 20})
    before, other = load_folder(folder, seed=0), load_folder(folder, seed=1)
    for index, path in enumerate(sorted(folder.glob("cat/*"), reverse=True)):
        path.rename(path.with_name(f"renamed{index}.png"))

    after = load_folder(folder, seed=0)

    assert keys(after) == keys(before)
    assert after.fingerprint == before.fingerprint == other.fingerprint
    assert keys(other) != keys(before)


def test_the_fingerprint_follows_content_and_labels(tmp_path: Path) -> None:
    """A picture in another class, a picture less, or one moved to the test is other data."""
    folder = fill(tmp_path / "a", {"cat": 6, "dog": 6})
    prints = {load_folder(folder, seed=0).fingerprint}
    (folder / "cat" / "000.png").rename(folder / "dog" / "cat.png")
    prints.add(load_folder(folder, seed=0).fingerprint)
    (folder / "dog" / "cat.png").unlink()
    prints.add(load_folder(folder, seed=0).fingerprint)
    for at, number in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            for path in sorted((folder / label).iterdir())[:number]:
                target = tmp_path / "b" / at / label / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
    prints.add(load_folder(tmp_path / "b", seed=0).fingerprint)

    assert len(prints) == 4


def test_files_that_cannot_be_read_are_skipped_with_their_reason(tmp_path: Path) -> None:
    """One damaged file does not end a run over thousands, nor pass in silence."""
    folder = fill(tmp_path, {"cat": 5, "dog": 5})
    (folder / "cat" / "cut.png").write_bytes((folder / "cat" / "000.png").read_bytes()[:200])
    (folder / "cat" / "empty.jpg").touch()
    (folder / "dog" / "notes.txt").write_text("not a picture")
    (folder / "dog" / "album").mkdir()
    write(folder / "dog" / "moving.png", seed=99, form="GIF")
    (folder / "dog" / ".hidden").touch()

    data = load_folder(folder, seed=0)

    reasons = {item.path: item.reason for item in data.skipped}
    assert sum(sum(counts.values()) for counts in data.counts.values()) == 10
    assert set(reasons) == {
        "cat/cut.png", "cat/empty.jpg", "dog/notes.txt", "dog/album", "dog/moving.png"
    }  # fmt: skip
    assert "truncated or damaged" in reasons["cat/cut.png"]
    assert "empty (0 bytes)" in reasons["cat/empty.jpg"]
    assert "accepted format" in reasons["dog/moving.png"]
    assert "not a .jpg" in reasons["dog/notes.txt"]


def test_second_copies_are_left_out(tmp_path: Path) -> None:
    """Of a picture in train/ and test/ the one in train/ goes, or the test would be too easy."""
    fill(tmp_path / "train", {"cat": 6, "dog": 6})
    fill(tmp_path / "test", {"cat": 2, "dog": 2}, first_seed=100)
    shutil.copy(tmp_path / "test" / "cat" / "000.png", tmp_path / "train" / "cat" / "leak.png")

    data = load_folder(tmp_path, seed=0)

    assert [(item.path, item.reason) for item in data.skipped] == [
        ("train/cat/leak.png", "the same picture as test/cat/000.png")
    ]


@pytest.mark.parametrize(
    ("number", "expected"), [(2, (1, 0, 1)), (3, (1, 1, 1)), (4, (2, 1, 1)), (5, (3, 1, 1))]
)
def test_a_few_pictures_go_to_training_and_test_first(
    number: int, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    """Two pictures are the least: one to learn from, one to test on."""
    data = load_folder(fill(tmp_path, {"many": 10, "few": number}), seed=0)

    assert tuple(counts["few"] for counts in data.counts.values()) == expected


def test_one_picture_a_class_is_enough_where_test_pictures_are_given(tmp_path: Path) -> None:
    """One-shot: nothing is left for validation."""
    fill(tmp_path / "train", {"cat": 1, "dog": 1})
    fill(tmp_path / "test", {"cat": 2, "dog": 2}, first_seed=100)

    data = load_folder(tmp_path, seed=0)

    assert [len(split) for split in data.splits.values()] == [2, 0, 4]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"cat": 5, "dog": 1}, "Class 'dog' has 1 readable pictures; expected at least 2"),
        ({"cat": 5, "dog": 0}, "Class 'dog' has 0 readable pictures"),
        ({"cat": 5}, r"has one class \(cat\); expected at least two"),
        ({}, "has no class; expected at least two"),
    ],
)
def test_too_few_pictures_or_classes_are_a_clear_error(
    numbers: dict[str, int], message: str, tmp_path: Path
) -> None:
    """Said before any training starts."""
    for label in numbers:
        (tmp_path / label).mkdir()
    fill(tmp_path, numbers)

    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, seed=0)


def test_an_error_about_too_few_pictures_names_the_broken_ones(tmp_path: Path) -> None:
    """A class whose files are all damaged is not simply called empty."""
    fill(tmp_path, {"cat": 5, "dog": 0})
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.jpg").write_bytes(b"")

    with pytest.raises(
        DataError, match=r"Left out 1 files, such as dog/a\.jpg: The picture is empty"
    ):
        load_folder(tmp_path, seed=0)


def test_a_test_class_that_is_not_learned_is_an_error(tmp_path: Path) -> None:
    """No head could ever answer it."""
    fill(tmp_path / "train", {"cat": 3, "dog": 3})
    fill(tmp_path / "test", {"cat": 1, "eel": 1}, first_seed=100)

    with pytest.raises(DataError, match="has the class 'eel', which"):
        load_folder(tmp_path, seed=0)


def test_a_third_folder_beside_train_and_test_is_an_error(tmp_path: Path) -> None:
    """Pictures in val/ would be ignored without a word."""
    for name in ("train", "test", "val"):
        fill(tmp_path / name, {"cat": 1, "dog": 1})

    with pytest.raises(DataError, match="beside it val/; expected train/ and test/ only"):
        load_folder(tmp_path, seed=0)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(DataError, match=r"There is no folder .*absent"):
        load_folder(tmp_path / "absent", seed=0)


def test_pictures_without_labels_are_read_from_any_subfolder(tmp_path: Path) -> None:
    """Each content once; hidden files and what is no picture are left out."""
    write(tmp_path / "one.png", seed=0)
    write(tmp_path / "deep" / "er" / "two.jpg", seed=1)
    write(tmp_path / "copy.png", seed=0)
    write(tmp_path / ".cache" / "three.png", seed=2)
    (tmp_path / "notes.txt").write_text("no picture")

    pictures = read_pictures(tmp_path)

    assert [str(one.source) for one in pictures] == [
        str(tmp_path / "copy.png"), str(tmp_path / "deep" / "er" / "two.jpg")
    ]  # fmt: skip


def test_a_folder_without_any_picture_is_an_error(tmp_path: Path) -> None:
    """Whether it is missing, empty, or has other files only."""
    with pytest.raises(DataError, match=r"no folder .*absent; expected one with pictures"):
        read_pictures(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"no readable picture\. Left out 1 files.*notes\.txt"):
        read_pictures(tmp_path)


def test_reading_reports_progress(tmp_path: Path) -> None:
    """Every file counts, to the last."""
    heard: list[Progress] = []

    load_folder(fill(tmp_path, {"cat": 3, "dog": 2}), seed=0, progress=heard.append)

    assert [p.done for p in heard] == [1, 2, 3, 4, 5]
    assert {p.total for p in heard} == {5}


@pytest.mark.slow
def test_training_sees_every_real_picture_as_serving_does(shared: Path) -> None:
    """Bit for bit, for every photo and a few sizes: both sides call one decoder."""
    folders = [path for path in sorted((shared / "data").iterdir()) if (path / "train").is_dir()]
    sizes = [(32, 32), (128, 146), (224, 256)]
    compared = 0
    for at, folder in enumerate(folders):
        size_px, resize_px = sizes[at % 3]
        preprocessing = Preprocessing(size_px, resize_px, AS_IS.mean, AS_IS.std)
        data = load_folder(folder, seed=0)
        pictures = join(*data.splits.values())
        batches = pictures.batches(preprocessing, batch_size=64)
        rows = (row for batch in batches for row in batch)
        for picture, row in zip(pictures.pictures, rows, strict=True):
            assert isinstance(picture.source, Path)
            served = load_picture(picture.source.read_bytes(), preprocessing)
            np.testing.assert_array_equal(row.numpy(), served)
            compared += 1

    assert len(folders) >= 5
    assert compared > 5000
