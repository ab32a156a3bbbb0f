"""Specification of models/feature_cache.py: features on disk, bounded, and never believed."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models import feature_cache, heads
from models.backbones import Backbone, build_backbone
from models.data import Picture, PictureData, to_batch
from models.digits import load_digit_task
from models.feature_cache import FeatureCache, default_folder, features_by_split
from models.heads import extract_features
from models.pictures import Preprocessing
from models.progress import Progress

PREPROCESSING = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3)
KEYS = ("a" * 64, "b" * 64, "c" * 64)
FEATURES = torch.arange(12.0).view(3, 4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    net, _ = build_backbone("small32", weights=None, allow_untrained=True)
    return net


@pytest.fixture(scope="module")
def digits() -> PictureData:
    return load_digit_task("loop", seed=0)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", "sha256:one")


def few(data: PictureData, num: int = 5) -> dict[str, Sequence[Picture]]:
    """Some pictures of every split."""
    return {name: split.pictures[:num] for name, split in data.splits.items()}


def test_what_was_written_is_read_again(cache: FeatureCache) -> None:
    """To the bit."""
    cache.write(KEYS, PREPROCESSING, FEATURES)

    found = cache.read(KEYS, PREPROCESSING)
    assert found is not None
    assert torch.equal(found, FEATURES)


def test_another_trunk_preprocessing_or_set_of_pictures_is_not_found(cache: FeatureCache) -> None:
    """Each is part of what a file is of."""
    cache.write(KEYS, PREPROCESSING, FEATURES)
    larger = Preprocessing(32, 36, (0.0,) * 3, (1.0,) * 3)

    assert FeatureCache(cache.folder, "sha256:two").read(KEYS, PREPROCESSING) is None
    assert cache.read(KEYS, larger) is None
    assert cache.read(KEYS[:2], PREPROCESSING) is None
    assert cache.read(("d" * 64, *KEYS[1:]), PREPROCESSING) is None


def test_another_version_of_pytorch_is_not_believed(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may round otherwise, and the same run has to give the same result."""
    cache.write(KEYS, PREPROCESSING, FEATURES)
    monkeypatch.setattr(feature_cache, "package_versions", lambda: {"torch": "0.4.1"})

    assert cache.read(KEYS, PREPROCESSING) is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_others(path: Path) -> None:
    save_file({"features": FEATURES + 1}, path)


def rename_the_tensor(path: Path) -> None:
    save_file({"else": FEATURES}, path)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut_short, empty, replace_by_others, rename_the_tensor]
)
def test_a_damaged_file_is_as_if_it_were_not_there(
    damage: Callable[[Path], None], cache: FeatureCache
) -> None:
    """And the next write mends it."""
    cache.write(KEYS, PREPROCESSING, FEATURES)
    (path,) = cache.folder.iterdir()
    damage(path)

    assert cache.read(KEYS, PREPROCESSING) is None
    cache.write(KEYS, PREPROCESSING, FEATURES)
    assert cache.read(KEYS, PREPROCESSING) is not None


def test_features_under_another_name_are_not_taken(cache: FeatureCache) -> None:
    """A whole file of other pictures, moved to where these are looked for."""
    cache.write(KEYS, PREPROCESSING, FEATURES)
    (first,) = cache.folder.iterdir()
    others = ("d" * 64, "e" * 64, "f" * 64)
    cache.write(others, PREPROCESSING, FEATURES + 1)
    (second,) = set(cache.folder.iterdir()) - {first}
    second.replace(first)

    assert cache.read(KEYS, PREPROCESSING) is None


def test_the_file_used_longest_ago_makes_room(cache: FeatureCache) -> None:
    """Reading counts as use, and what is not of the cache is left alone."""
    small = FeatureCache(cache.folder, cache.trunk, max_bytes=700)
    names = [[letter * 64] for letter in "abc"]
    row = torch.zeros(1, 16)
    cache.folder.mkdir()
    (cache.folder / "notes.safetensors").write_bytes(bytes(1000))
    small.write(names[0], PREPROCESSING, row)
    small.write(names[1], PREPROCESSING, row)
    for age_s, path in enumerate(sorted(cache.folder.glob("?" * 64 + "*")), start=100):
        os.utime(path, (age_s, age_s))
    assert small.read(names[0], PREPROCESSING) is not None
    small.write(names[2], PREPROCESSING, row)

    assert [small.read(name, PREPROCESSING) is not None for name in names] == [True, False, True]
    assert (cache.folder / "notes.safetensors").exists()


def test_more_than_the_whole_cache_is_not_kept(cache: FeatureCache) -> None:
    """Nothing else is thrown away for it."""
    small = FeatureCache(cache.folder, cache.trunk, max_bytes=700)
    small.write(["a" * 64], PREPROCESSING, torch.zeros(1, 16))
    small.write(["b" * 64], PREPROCESSING, torch.zeros(1, 1600))

    assert small.read(["a" * 64], PREPROCESSING) is not None
    assert small.read(["b" * 64], PREPROCESSING) is None


def test_two_who_write_at_once_leave_whole_files(cache: FeatureCache) -> None:
    """Whoever reads finds one of both, or nothing; never a part."""
    seen: list[bool] = []
    row = torch.ones(3, 20_000)

    def write() -> None:
        for _ in range(15):
            cache.write(KEYS, PREPROCESSING, row)

    def read() -> None:
        while any(writer.is_alive() for writer in writers):
            if list(cache.folder.glob("*.safetensors")):
                seen.append(cache.read(KEYS, PREPROCESSING) is not None)

    writers = [threading.Thread(target=write) for _ in range(2)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in (*writers, reader):
        thread.join()

    assert seen
    assert all(seen)
    assert len(list(cache.folder.iterdir())) == 1


def test_features_out_of_the_cache_are_those_that_are_computed(
    backbone: Backbone, digits: PictureData, cache: FeatureCache
) -> None:
    """To the bit, and each row is that of its picture."""
    fresh = features_by_split(backbone, few(digits), cache=None)
    first = features_by_split(backbone, few(digits), cache=cache)
    seen: list[Progress] = []
    again = features_by_split(backbone, few(digits), cache=cache, progress=seen.append)

    assert [step.note for step in seen] == ["from the cache"]
    for name, pictures in few(digits).items():
        assert torch.equal(first[name], fresh[name])
        assert torch.equal(again[name], fresh[name])
        pixels = to_batch(pictures, backbone.preprocessing)
        torch.testing.assert_close(again[name], extract_features(backbone, pixels))


def test_the_same_pictures_in_other_splits_are_found(
    backbone: Backbone, digits: PictureData, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed runs no trunk."""
    splits = few(digits)
    features_by_split(backbone, splits, cache=cache)
    monkeypatch.setattr(heads, "extract_features", None)
    swapped = {"train": splits["test"], "validation": splits["train"], "test": splits["validation"]}

    found = features_by_split(backbone, swapped, cache=cache)
    assert [len(part) for part in found.values()] == [5, 5, 5]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    backbone: Backbone, digits: PictureData, tmp_path: Path
) -> None:
    """The features are there, and the last step says why they were not kept."""
    (tmp_path / "file").write_text("not a folder")
    seen: list[Progress] = []
    found = features_by_split(
        backbone,
        few(digits),
        cache=FeatureCache(tmp_path / "file" / "features", "sha256:one"),
        progress=seen.append,
    )

    assert len(found["train"]) == 5
    assert seen[-1].note.startswith("not cached: ")


def test_the_cache_lies_where_the_user_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """XDG_CACHE_HOME, or ~/.cache where it is not set or not absolute."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert default_folder() == Path("/var/caches/headstock/features")
    for nothing in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert default_folder() == tmp_path / ".cache" / "headstock" / "features"
