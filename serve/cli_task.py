"""The commands about how the service treats one task: `headstock task …`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from serve.client import Client
from serve.console import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Token,
    notes,
    out,
    print_json,
    settings_text,
    short,
)
from serve.task_settings import SettingError, TaskSettings

EXAMPLE = "Example: headstock task set pets weight=2 pinned=true"
WORDS = {"true": True, "false": False, "null": None, "none": None}

task_app = typer.Typer(
    no_args_is_help=True, help="Change how the service treats a task.", epilog=EXAMPLE
)


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(task_app, name="task")


@task_app.command("set", epilog=EXAMPLE)
def set_task(
    task: Annotated[str, typer.Argument(help="Task.")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE",
            help=" ".join(
                f"{name}: {field.description}" for name, field in TaskSettings.model_fields.items()
            ),
        ),
    ],
    message: Annotated[str, typer.Option(help="Why; shown by history.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Change settings of a task on every replica; what is not named stays as it is."""
    values = parse_settings(settings)
    with Client(server, token=token) as client, notes.status("setting"):
        described = client.set_task(task, values, message=message)
    if as_json:
        print_json(described)
        return
    now = {name: described["settings"][name] for name in values}
    out.print(f"{task} is set on every replica: {settings_text(now)}")


@task_app.command("heldout", epilog="Example: headstock task heldout pets ./pets-bundle")
def set_heldout(
    task: Annotated[str, typer.Argument(help="Task.")],
    source: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE|FILE", help="A bundle with a sample, or the sample's file."),
    ],
    message: Annotated[str, typer.Option(help="Why; shown by history.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Replace the held-out pictures that pushes to a task are compared on."""
    with Client(server, token=token) as client, notes.status("setting"):
        told = client.set_heldout(task, source, message=message)
    if as_json:
        print_json(told)
        return
    out.print(f"{task} is compared on the sample {short(told['heldout'] or '')} from now on")


def parse_settings(assignments: Sequence[str]) -> dict[str, object]:
    """Settings by name, from `name=value` each.

    Raises:
        SettingError: not of that form, or a name that comes twice.
    """
    values: dict[str, object] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals and text):
            raise SettingError(f"{assignment!r} sets nothing; expected key=value, as in weight=2.")
        if name in values:
            raise SettingError(f"{name} is set twice; expected each setting once.")
        values[name] = _value(text)
    return values


def _value(text: str) -> object:
    """A word, a number, or anything else as it stands, which the service will refuse by name."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text
