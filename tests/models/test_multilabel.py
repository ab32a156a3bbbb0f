"""Specification of models/label_table.py and models/multilabel.py: pictures with several labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import DataError
from models.digits import load_digit_traits
from models.folders import load_folder
from models.label_table import read_label_table
from models.multilabel import MultiLabelData, load_label_folder


def fill(folder: Path, labels: list[str], *, first_seed: int = 0, header: str = "") -> Path:
    """A picture for each entry and the table that says so; names are `0.png`, `1.png`, …."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header or "picture,labels"]
    for number, text in enumerate(labels):
        chance = np.random.default_rng(first_seed + number)
        pixels = chance.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{text}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


# 40 pictures: 20 have sea, 20 sky, 10 both and 10 neither.
BEACH = ["sea", "sky", "sea;sky", ""] * 10


def labels_of(data: MultiLabelData) -> dict[str, set[str]]:
    """File name -> labels, over all splits."""
    return {
        picture.source.name: {data.labels[place] for place in row.nonzero().flatten().tolist()}
        for split in data.splits.values()
        for picture, row in zip(split.pictures, split.labels, strict=True)
        if isinstance(picture.source, Path)
    }


def test_every_picture_has_the_labels_of_its_line(tmp_path: Path) -> None:
    """Whatever split it is in; labels are in the order of their names."""
    data = load_label_folder(fill(tmp_path / "beach", BEACH), seed=0)

    assert (data.name, data.labels) == ("beach", ("sea", "sky"))
    expected = {f"{n}.png": set(filter(None, text.split(";"))) for n, text in enumerate(BEACH)}
    assert labels_of(data) == expected


def test_every_label_is_split_alike(tmp_path: Path) -> None:
    """64 : 16 : 20 of each, within one picture."""
    counts = load_label_folder(fill(tmp_path, BEACH), seed=0).counts

    for name, share in (("train", 12.8), ("validation", 3.2), ("test", 4)):
        assert counts[name] == {
            "sea": pytest.approx(share, abs=1),
            "sky": pytest.approx(share, abs=1),
        }


def test_a_given_test_folder_stays_the_test_split(tmp_path: Path) -> None:
    """And a picture that lies in both is left out of train."""
    fill(tmp_path / "train", BEACH)
    fill(tmp_path / "test", ["sea", "sky;sea", ""], first_seed=39)
    data = load_label_folder(tmp_path, seed=0)

    assert data.test.labels.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert len(data.train) + len(data.validation) == 39
    assert [one.path for one in data.skipped] == ["train/39.png"]


def test_the_fingerprint_is_of_content_labels_and_what_is_for_the_test(tmp_path: Path) -> None:
    """Neither names nor the order of lines are part of it."""
    first = load_label_folder(fill(tmp_path / "a", BEACH), seed=0)
    lines = (tmp_path / "a" / "labels.csv").read_text().splitlines()
    (tmp_path / "a" / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    reordered = load_label_folder(tmp_path / "a", seed=0)
    changed = load_label_folder(fill(tmp_path / "b", ["sky", *BEACH[1:]]), seed=0)

    assert reordered.fingerprint == first.fingerprint
    assert [p.key for p in reordered.train.pictures] == [p.key for p in first.train.pictures]
    assert changed.fingerprint != first.fingerprint


def test_a_picture_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    """Damaged ones and second copies."""
    fill(tmp_path, BEACH)
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "5.png").write_bytes((tmp_path / "1.png").read_bytes())
    data = load_label_folder(tmp_path, seed=0)

    assert [one.path for one in data.skipped] == ["3.png", "5.png"]
    assert data.skipped[1].reason == "the same picture as 1.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: the header is ''; expected 'picture,labels'"),
        ("file;tags\n", r"line 1: the header is 'file;tags'; expected 'picture,labels'"),
        ("picture,labels\n0.png,sea,sky\n", r"line 2: there are 3 cells; expected two, a picture"),
        ("picture,labels\n0.png\n", "line 2: there are 1 cells"),
        ("picture,labels\n0.png,sea\n\n0.png,sky\n", "line 4: 0.png is in line 2 already"),
        ("picture,labels\n,sea\n", "line 2: the picture is ''; expected a path inside"),
        ("picture,labels\n../0.png,sea\n", r"line 2: the picture is '\.\./0\.png'"),
        ("picture,labels\n/0.png,sea\n", "line 2: the picture is '/0.png'"),
        ("picture,labels\n0.png,sea;;sky\n", "line 2: a label is ''; expected a name between"),
        ("picture,labels\n0.png,sea;\x07\n", "line 2: a label is"),
        ("picture,labels\n0.png,sea;sea\n", "line 2: the labels are 'sea;sea'; expected each"),
        ('picture,labels\n"0.png,sea\n', "line 2: .*; expected a comma-separated line"),
        ("picture,labels\n0.png,sea\nmissing.png,sky\n", "line 3: there is no picture .*missing"),
    ],
)
def test_a_line_that_is_wrong_is_named_by_its_number(
    text: str, message: str, tmp_path: Path
) -> None:
    """With what is there and what was expected."""
    fill(tmp_path, BEACH)
    (tmp_path / "labels.csv").write_text(text)

    with pytest.raises(DataError, match=f"labels.csv, {message}"):
        load_label_folder(tmp_path, seed=0)


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A spreadsheet's own format, for one."""
    (tmp_path / "labels.csv").write_bytes(b"PK\x03\x04\xff\xfe")

    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_label_table(tmp_path)


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """With the mark before UTF-8, Windows' line ends, quotes and spaces."""
    text = '\ufeffpicture,labels\r\n"a, b.png"," sea ; sky "\r\nc.png,\r\n'
    (tmp_path / "labels.csv").write_bytes(text.encode())

    rows = [(row.picture, set(row.labels)) for row in read_label_table(tmp_path)]
    assert rows == [("a, b.png", {"sea", "sky"}), ("c.png", set())]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["sea"] * 9 + [""] * 9, "have 1 different labels in all; expected at least 2"),
        ([*BEACH, "bird", "bird"], "There are 2 readable pictures with the label 'bird'"),
        (["sea", "sea;sky"] * 5 + ["sky"] * 2, "There are 2 readable pictures without .*'sea'"),
    ],
)
def test_a_label_with_too_few_pictures_is_named(
    labels: list[str], message: str, tmp_path: Path
) -> None:
    """Each needs three with it and three without."""
    with pytest.raises(DataError, match=message):
        load_label_folder(fill(tmp_path, labels), seed=0)


def test_a_label_that_only_the_test_has_is_refused(tmp_path: Path) -> None:
    """Nothing could learn it."""
    fill(tmp_path / "train", BEACH)
    fill(tmp_path / "test", ["ship"], first_seed=100)

    with pytest.raises(DataError, match="the label 'ship', which no picture in train/ has"):
        load_label_folder(tmp_path, seed=0)


def test_what_learns_one_label_a_picture_says_that_this_folder_has_several(tmp_path: Path) -> None:
    """Teachers and students, before they look for classes."""
    with pytest.raises(DataError, match=r"has a labels.csv: pictures with any number of labels"):
        load_folder(fill(tmp_path, BEACH), seed=0)


def test_the_traits_of_digits_are_true_of_them() -> None:
    """Odd, with a loop, at least five: what the three tasks say of the same pictures."""
    data = load_digit_traits(seed=0)

    assert data.labels == ("odd", "loop", "at_least_five")
    combinations = {tuple(row) for row in data.train.labels.tolist()}
    # A digit has no loop and is below five and even: 2 and 4; and so on for all ten.
    true_of = {(d % 2, int(d in {0, 6, 8, 9}), int(d >= 5)) for d in range(10)}
    assert combinations == true_of
    assert len(data.train) + len(data.validation) + len(data.test) == 1797


def test_the_same_set_of_labels_has_the_same_number() -> None:
    """For samples that have something of all."""
    split = load_digit_traits(seed=0).test
    numbers = split.combinations

    for number in numbers.unique():
        assert len(torch.unique(split.labels[numbers == number], dim=0)) == 1
    assert len(numbers.unique()) == len(torch.unique(split.labels, dim=0))
