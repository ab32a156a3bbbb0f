"""Specification of export/heldout.py: pictures that no head learned from, each class by share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from export import heldout
from export.bundle import HELDOUT, MAX_HELDOUT_BYTES
from export.heldout import heldout_of, stratified
from export.recipe import make_head
from export.trunk import TrunkReport
from models.data import Picture, Split, to_batch
from models.pictures import Preprocessing
from models.recipe import read_data

PREPROCESSING = Preprocessing(8, 8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def split_of(counts: dict[int, int]) -> Split:
    """So many pictures of each label; a picture's first pixel says which one it is."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    pictures = [np.full((8, 8, 3), place % 256, np.uint8) for place in range(len(labels))]
    return Split(tuple(Picture(p, str(k)) for k, p in enumerate(pictures)), torch.tensor(labels))


@pytest.mark.parametrize("num", [10, 50, 99])
def test_every_class_has_its_share(num: int) -> None:
    """Within one picture of it, and none twice."""
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    places = stratified(labels, num, seed=1)
    counts = labels[places].bincount(minlength=3)

    assert len(set(places)) == num
    for count, share in zip(counts.tolist(), (0.5, 0.3, 0.2), strict=True):
        assert abs(count - share * num) <= 1


def test_the_seed_draws_the_pictures() -> None:
    """The same ones for the same seed, so that later bundles bring the same sample."""
    labels = torch.arange(100) % 4

    assert stratified(labels, 20, seed=1) == stratified(labels, 20, seed=1)
    assert stratified(labels, 20, seed=1) != stratified(labels, 20, seed=2)


def test_a_small_split_is_taken_whole() -> None:
    """In its own order."""
    assert stratified(torch.tensor([1, 0, 1]), 500, seed=0) == [0, 1, 2]


def test_pictures_stay_with_their_labels() -> None:
    """As serving decodes them, uint8, labels int64."""
    split = split_of({0: 30, 1: 20})
    sample = load(heldout_of(split, PREPROCESSING, seed=0))

    torch.testing.assert_close(sample["pictures"], to_batch(split.pictures, PREPROCESSING))
    assert (sample["pictures"].dtype, sample["labels"].dtype) == (torch.uint8, torch.int64)
    assert torch.equal(sample["labels"], split.labels)


def test_the_sample_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, and by bytes for large pictures."""
    by_number = load(heldout_of(split_of({0: 400, 1: 400}), PREPROCESSING, seed=0))
    monkeypatch.setattr(heldout, "MAX_HELDOUT_BYTES", 20_000)
    by_bytes = heldout_of(split_of({0: 400, 1: 400}), PREPROCESSING, seed=0)

    assert len(by_number["labels"]) == 500
    assert 10_000 < len(by_bytes) <= 20_000 < MAX_HELDOUT_BYTES


@pytest.mark.usefixtures("trunk")
def test_a_bundle_brings_pictures_that_its_head_never_saw(
    trunk: TrunkReport, trunk_folder: Path
) -> None:
    """All of them are of the test split, none of train or validation."""
    made = make_head("loop", trunk_folder, task="loop", seed=0, command="test", max_train=120)
    sample = load(made.bundle.files[HELDOUT])
    data, preprocessing = read_data("loop", seed=0), trunk.manifest.preprocessing

    def keys(split: Split) -> set[bytes]:
        return {picture.numpy().tobytes() for picture in to_batch(split.pictures, preprocessing)}

    mine = {picture.numpy().tobytes() for picture in sample["pictures"]}
    assert mine <= keys(data.test)
    assert not mine & (keys(data.train) | keys(data.validation))
    assert len(sample["labels"]) == min(500, len(data.test))
