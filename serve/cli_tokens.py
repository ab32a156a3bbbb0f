"""The commands about access tokens: `headstock tokens …`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from serve.answers import AccessToken
from serve.client import Client
from serve.console import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Token,
    notes,
    out,
    parse_span,
    print_json,
)
from serve.trust import valid_until

EXAMPLES = {
    "new": "Example: headstock tokens new ci --scope 'push:pets*' --scope rollback --expires 90d",
    "revoke": "Example: headstock tokens revoke ci --message 'laptop lost'",
    "list": "Example: headstock tokens list",
}
PERIODS_S = {"s": 1, "m": 60, "h": 3600}

tokens_app = typer.Typer(no_args_is_help=True, help="Say who may ask what.", epilog=EXAMPLES["new"])


class TokenError(Exception):
    """No such token, or a rate or a time that is none."""


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(tokens_app, name="tokens")


@tokens_app.command("new", epilog=EXAMPLES["new"])
def new(
    name: Annotated[str, typer.Argument(help="Whose it is: a person, a team, a program.")],
    scopes: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="predict:TASK, push:TASK (with * and ?), rollback, metrics or admin; repeat it.",
        ),
    ],
    expires: Annotated[
        str | None, typer.Option(help="After a time, as in 30d, or on a date, in UTC.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Most requests of the whole fleet: 100/s, 30/m, 10/h.")
    ] = None,
    message: Annotated[str, typer.Option(help="Why; shown by tokens list --json.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Make an access token and print it, once: the service knows only its digest."""
    until = None if expires is None else parse_expiry(expires)
    rate_per_s = None if rate is None else parse_rate(rate)
    with Client(server, token=token) as client, notes.status("making"):
        made, described = client.make_token(
            name, scopes, until=until, rate_per_s=rate_per_s, message=message
        )
    if as_json:
        print_json({"token": made, **described})
        return
    out.print(made, highlight=False, soft_wrap=True)
    told = f"{name} ({described['token_id']}): {_for(described)}. Shown only now; keep it."
    notes.print(told, soft_wrap=True)


@tokens_app.command("revoke", epilog=EXAMPLES["revoke"])
def revoke(
    which: Annotated[str, typer.Argument(metavar="TOKEN", help="Its name or id.")],
    message: Annotated[str, typer.Option(help="Why; shown by tokens list --json.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Let a token open nothing any more, for ever; returns when no replica takes it."""
    with Client(server, token=token) as client, notes.status("revoking"):
        known = client.tokens()["tokens"]
        revoked = client.revoke_token(find_token(known, which)["token_id"], message=message)
    if as_json:
        print_json(revoked)
        return
    out.print(f"{revoked['name']} ({revoked['token_id']}) is revoked on every replica")


@tokens_app.command("list", epilog=EXAMPLES["list"])
def show(server: Server = DEFAULT_SERVER, token: Token = "", as_json: AsJson = False) -> None:
    """Show every token that was ever made, and what it is for."""
    with Client(server, token=token) as client:
        told = client.tokens()
    if as_json:
        print_json(told)
        return
    if not told["tokens_required"]:
        out.print("this service asks nobody for a token")
    table = Table("name", "id", "state", "scopes", "rate", "until (UTC)", "made (UTC)")
    for one in told["tokens"]:
        rate = "" if one["rate_per_s"] is None else f"{one['rate_per_s']:g}/s"
        times = [one["valid_until"] or "", one["history"][0]["written_at"]]
        shown = (time[:19].replace("T", " ") for time in times)
        cells = (one["name"], one["token_id"], one["state"], ", ".join(one["scopes"]), rate)
        table.add_row(*cells, *shown)
    if told["tokens"]:
        out.print(table)


def find_token(known: Sequence[AccessToken], named: str) -> AccessToken:
    """The token of that id or name; of several with one name, the one that is not revoked.

    Raises:
        TokenError: there is none, or more than one.
    """
    found = [t for t in known if named in {t["token_id"], t["name"]}]
    found = [t for t in found if t["state"] != "revoked"] or found
    if len(found) != 1:
        names = ", ".join(f"{t['name']} ({t['token_id']})" for t in found or known) or "none"
        what = "Several tokens are" if found else "No token is"
        raise TokenError(f"{what} called {named!r}; there are {names}.")
    return found[0]


def parse_rate(text: str) -> float:
    """Requests a second, from `100/s`, `30/m` or `10/h`.

    Raises:
        TokenError: it is not of that form.
    """
    found = re.fullmatch(r"(\d{1,7}(?:\.\d{1,3})?)/([smh])", text)
    if found is None:
        raise TokenError(f"--rate is {text!r}; expected a number and a period: 100/s, 30/m, 10/h.")
    return float(found[1]) / PERIODS_S[found[2]]


def parse_expiry(text: str) -> datetime:
    """A moment, from a time from now (`30d`) or a date.

    Raises:
        TokenError: it is neither.
    """
    if span := parse_span(text):
        return datetime.now(UTC) + span
    try:
        return valid_until(text)
    except ValueError as error:
        raise TokenError(
            f"--expires is {text!r}; expected a time from now, as in 30d, or a date, 2027-01-01."
        ) from error


def _for(token: AccessToken) -> str:
    until = f" until {token['valid_until']}" if token["valid_until"] else ""
    return ", ".join(token["scopes"]) + until
