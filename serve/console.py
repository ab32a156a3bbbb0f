"""What the commands share: where they print, whom they ask, and how settings are written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve.trust import SHORT_ID

out = Console()
notes = Console(stderr=True)

Server = Annotated[
    str,
    typer.Option(envvar="HEADSTOCK_SERVER", help="URL of the service.", show_default=True),
]
Token = Annotated[
    str,
    typer.Option(
        envvar="HEADSTOCK_TOKEN",
        help="Access token; better given as the variable, which no list of processes shows.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
DEFAULT_SERVER = "http://127.0.0.1:8000"


UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_span(text: str) -> timedelta | None:
    """A number and its unit, as in `7d`; None if it is not of that form."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    return timedelta(**{UNITS[found[2]]: int(found[1])}) if found else None


def print_json(value: object) -> None:
    """The one value of a command's `--json`."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def settings_text(settings: Mapping[str, object]) -> str:
    """As they are typed: `weight=2 pinned=true`."""
    return " ".join(f"{name}={_value_text(value)}" for name, value in settings.items())


def signer_text(signed_by: Mapping[str, Any] | None) -> str:
    """Name and short id of the key that signed, or nothing: `ci (8d23ab90a1c4)`."""
    return f"{signed_by['name']} ({signed_by['key_id'][:SHORT_ID]})" if signed_by else ""


def short(digest: str) -> str:
    """The first letters of a digest, enough for people."""
    return digest.removeprefix("sha256:")[:12]


def gates_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    """What each gate said, and of which task if there are several."""
    is_many = len({gate["task"] for gate in gates}) > 1
    table = Table(*(["task"] if is_many else []), "gate", "says", "why")
    for gate in gates:
        says = "skipped" if gate.get("skipped") else "yes" if gate["passed"] else "no"
        whose = [gate["task"]] if is_many else []
        table.add_row(*whose, gate["gate"], says, escape(gate["reason"]))
    return table


def _value_text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def show_swap(what: str, swapped: Mapping[str, Any], *, as_json: bool) -> None:
    """Say of a change that it is live, whether of one task or of several."""
    if as_json:
        print_json(swapped)
        return
    swap = swapped["swap"]
    if "trunk" in swapped:
        out.print(f"trunk {short(swapped['trunk'])} is {what} on {swap['replicas']} replicas")
    for made in swapped.get("versions", [swapped]):
        out.print(
            f"{made['task']} version {made['version']} is {what} on {swap['replicas']} replicas: "
            f"staged in {swap['stage_ms']:.0f} ms, held for {swap['hold_ms']:.0f} ms"
            + (f" ({short(made['bundle'])})" if made["bundle"] else "")
        )
