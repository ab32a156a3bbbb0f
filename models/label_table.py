"""`labels.csv`: pictures that have any number of labels each.

    picture,labels
    beach/1.jpg,sea;sky
    beach/2.jpg,
    "a, b.jpg",sky

Paths are relative to the table's folder, labels are separated by semicolons, and a picture without
any is one that shows none of them.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.data import DataError

LABELS = "labels.csv"
HEADER = ["picture", "labels"]


@dataclass(frozen=True)
class LabelRow:
    """One line of the table.

    Args:
        line: Its number in the file, from 1; the last one of a row that has several.
    """

    line: int
    picture: str
    labels: frozenset[str]


def has_label_table(folder: Path) -> bool:
    """Whether the folder's pictures are labelled by a table, or those in its train/."""
    return (folder / LABELS).is_file() or (folder / "train" / LABELS).is_file()


def read_label_table(folder: Path) -> list[LabelRow]:
    """The rows of a folder's table.

    Raises:
        DataError: no table, no text, or a line that is not as it should be, by its number.
    """
    path = folder / LABELS
    try:
        # The mark that spreadsheets put before UTF-8 is no part of the header.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    rows: list[LabelRow] = []
    first_line: dict[str, int] = {}
    for line, cells in _lines(path, text):
        row = _row(path, line, cells)
        if (first := first_line.setdefault(row.picture, line)) != line:
            raise _wrong(path, line, f"{row.picture} is in line {first} already", "each once")
        rows.append(row)
    return rows


def _lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header that are not empty."""
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    try:
        header: list[str] = next(reader, [""])
        if header != HEADER:
            found = ",".join(header)
            raise _wrong(path, 1, f"the header is {found!r}", f"{','.join(HEADER)!r}")
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise _wrong(path, reader.line_num, str(error), "a comma-separated line") from error


def _row(path: Path, line: int, cells: list[str]) -> LabelRow:
    if len(cells) != len(HEADER):
        raise _wrong(
            path, line, f"there are {len(cells)} cells",
            "two, a picture and its labels; separate labels by semicolons, and quote a name with "
            "a comma",
        )  # fmt: skip
    picture, labels = cells[0].strip(), [label.strip() for label in cells[1].split(";")]
    place = PurePosixPath(picture)
    if not picture or place.is_absolute() or ".." in place.parts:
        raise _wrong(path, line, f"the picture is {picture!r}", "a path inside the folder")
    if labels == [""]:
        return LabelRow(line, picture, frozenset())
    for label in labels:
        if not label or not label.isprintable():
            raise _wrong(path, line, f"a label is {label!r}", "a name between two semicolons")
    if len(set(labels)) != len(labels):
        raise _wrong(path, line, f"the labels are {cells[1]!r}", "each label once")
    return LabelRow(line, picture, frozenset(labels))


def _wrong(path: Path, line: int, found: str, expected: str) -> DataError:
    return DataError(f"{path}, line {line}: {found}; expected {expected}.")
