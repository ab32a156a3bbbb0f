"""Image folders: `DATA/CLASS/*.jpg`, or `DATA/train/CLASS/*` with `DATA/test/CLASS/*`."""

from pathlib import Path

from models.data import DataError, Picture, PictureData, Split, fingerprint
from models.label_table import LABELS, has_label_table
from models.picture_files import PictureReader
from models.progress import Progress, ProgressCallback, unheard
from models.splits import three_splits, to_split, two_splits


def load_folder(folder: Path, *, seed: int, progress: ProgressCallback = unheard) -> PictureData:
    """Read a folder of pictures; a subfolder is a class.

    Without a test/ folder the pictures are split 64 : 16 : 20 into train, validation and test,
    class by class; with one, test/ stays the test split and train/ is split 80 : 20. Files that
    cannot be read, and second copies of a picture, are left out and listed in `skipped`: a copy on
    both sides of a split would make the test easier than the truth.

    Raises:
        DataError: no folder, fewer than two classes, or too few pictures in a class.
    """
    if has_label_table(folder):
        raise DataError(
            f"{folder} has a {LABELS}: pictures with any number of labels each. Only `headstock "
            "head` learns from those, its kind linear; all else needs a subfolder a class."
        )
    train_folder, test_folder = _levels(folder)
    labels = _classes(train_folder)
    if test_folder and (unknown := sorted(set(_classes(test_folder)) - set(labels))):
        raise DataError(
            f"{test_folder} has the class {unknown[0]!r}, which {train_folder} has not; "
            "expected the same classes in both."
        )
    reader = PictureReader(folder)
    # Test first: of a picture that lies in both, the copy in train/ is left out.
    test = _read(reader, test_folder, labels, progress) if test_folder else None
    train = _read(reader, train_folder, labels, progress)
    try:
        splits = _split(train, test, labels=labels, seed=seed)
    except DataError as error:
        raise DataError(f"{folder}: {error}{reader.hint()}") from error
    entries = _entries(labels, train)
    if test is not None:
        # Which pictures are for the test is part of what the data is.
        entries += _entries(tuple(f"test/{label}" for label in labels), test)
    return PictureData(
        name=folder.resolve().name,
        labels=labels,
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        fingerprint=fingerprint(entries),
        skipped=tuple(reader.skipped),
    )


def read_pictures(folder: Path) -> list[Picture]:
    """Every readable picture in a folder and its subfolders, each once, whatever they show.

    Raises:
        DataError: no folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; expected one with pictures.")
    reader = PictureReader(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    read = (reader.read(path) for path in files if not _is_hidden(path, folder))
    pictures = [picture for picture in read if picture]
    if not pictures:
        raise DataError(f"{folder} has no readable picture.{reader.hint()}")
    return pictures


def _entries(labels: tuple[str, ...], classes: list[list[Picture]]) -> list[tuple[str, str]]:
    return [
        (label, picture.key)
        for label, pictures in zip(labels, classes, strict=True)
        for picture in pictures
    ]


def _split(
    train: list[list[Picture]],
    test: list[list[Picture]] | None,
    *,
    labels: tuple[str, ...],
    seed: int,
) -> tuple[Split, Split, Split]:
    if test is None:
        return three_splits(train, labels=labels, seed=seed)
    given = to_split(test)
    if not len(given):
        raise DataError("test/ has no readable picture; add some, or remove the folder.")
    return (*two_splits(train, labels=labels, seed=seed), given)


def _levels(folder: Path) -> tuple[Path, Path | None]:
    """The folder of classes to learn from and, where it is given, that of the test split."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; expected one with a subfolder a class.")
    train, test = folder / "train", folder / "test"
    if not train.is_dir():
        return folder, None
    others = {path.name for path in _folders(folder)} - {"train", "test"}
    if others:
        raise DataError(
            f"{folder} has train/ and beside it {min(others)}/; expected train/ and test/ "
            "only. Move pictures for validation into train/: they are split off by seed."
        )
    return train, test if test.is_dir() else None


def _classes(folder: Path) -> tuple[str, ...]:
    labels = tuple(path.name for path in _folders(folder))
    if len(labels) < 2:  # noqa: PLR2004
        found = f"one class ({labels[0]})" if labels else "no class"
        raise DataError(f"{folder} has {found}; expected at least two subfolders of pictures.")
    return labels


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read(
    reader: PictureReader, folder: Path, labels: tuple[str, ...], progress: ProgressCallback
) -> list[list[Picture]]:
    """The readable pictures of each class."""
    files = {label: _files(folder / label) for label in labels}
    total, done = sum(map(len, files.values())), 0
    classes: list[list[Picture]] = []
    for label, paths in files.items():
        pictures: list[Picture] = []
        for path in paths:
            done += 1
            if picture := reader.read(path):
                pictures.append(picture)
            progress(Progress(f"read {folder.name}", done, total, label))
        classes.append(pictures)
    return classes


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
