"""The command that asks a task of pictures, one or thousands: `predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from serve.client import Client, ClientError, Prediction
from serve.client_each import AT_ONCE
from serve.console import DEFAULT_SERVER, Server, Token, notes, out

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


def add_to(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command(epilog="Example: headstock predict pets cat.jpg dog.jpg --top 3")(predict)


def predict(
    task: Annotated[str, typer.Argument(help="Task.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Labels to show of each picture.")] = 1,
    at_once: Annotated[
        int, typer.Option(min=1, max=256, help="Pictures that are under way at any time.")
    ] = AT_ONCE,
    after: Annotated[
        Path | None, typer.Option(help="Go on after this picture, the last that was answered.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line a picture and nothing else.")
    ] = False,
) -> None:
    """Ask a task of pictures; folders are read with all below them, in the order of names."""
    paths = _pictures(images, after)
    table = Table("picture", "label", "score", "version")
    num_failed = 0
    with Client(server, token=token) as client:
        each = client.predict_each(task, paths, top=top, at_once=at_once)
        try:
            for path, told in track(
                each, "asking", total=len(paths), console=notes, transient=True
            ):
                if not isinstance(told, Prediction):
                    num_failed += 1
                    _show_failure(path, told, as_json=as_json)
                elif as_json:
                    _print_json_line({"picture": str(path), **_shown(told)})
                else:
                    _add_rows(table, path, told)
        finally:  # what was answered is shown, whatever came then
            if table.rows:
                out.print(table)
    if num_failed:
        raise ClientError(415, f"{num_failed} of {len(paths)} pictures have no answer.")


def _pictures(images: list[Path], after: Path | None) -> list[Path]:
    """The files named, and the pictures in the folders named; those after one of them.

    Raises:
        FileNotFoundError: a path is missing, a folder holds no picture, or none is `after`.
    """
    paths: list[Path] = []
    for image in images:
        if image.is_dir():
            found = sorted(p for p in image.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"There is no picture in {image}.")
            paths += found
        elif image.is_file():
            paths.append(image)
        else:
            raise FileNotFoundError(f"There is no picture at {image}.")
    if after is None:
        return paths
    if after not in paths:
        raise FileNotFoundError(f"The picture {after} is none of the {len(paths)} that are named.")
    return paths[paths.index(after) + 1 :]


def _shown(prediction: Prediction) -> dict[str, Any]:
    return {
        "task": prediction.task,
        "version": prediction.version,
        "label": prediction.label,
        "score": prediction.score,
        **({} if prediction.labels is None else {"labels": prediction.labels}),
        "scores": prediction.scores,
    }


def _add_rows(table: Table, path: Path, prediction: Prediction) -> None:
    """Labels that reach their threshold have a star, where there are thresholds."""
    for place, (label, score) in enumerate(prediction.scores.items()):
        picture, version = (str(path), str(prediction.version)) if place == 0 else ("", "")
        star = " *" if label in (prediction.labels or ()) else ""
        table.add_row(picture, label + star, f"{score:.3f}", version)


def _show_failure(path: Path, error: Exception, *, as_json: bool) -> None:
    if as_json:
        _print_json_line({"picture": str(path), "error": str(error)})
    else:
        notes.print(f"{path}: {error}", style="red", markup=False, soft_wrap=True)


def _print_json_line(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
