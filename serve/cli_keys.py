"""The commands about keys that sign bundles: `headstock keys …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.table import Table

from export.keys import KeyFileError, load_private_key, new_key, read_public_key
from export.sign import key_id_of
from serve.answers import SigningKey
from serve.client import Client
from serve.console import DEFAULT_SERVER, AsJson, Server, Token, notes, out, print_json, signer_text
from serve.settings import PREFIX
from serve.trust import SHORT_ID

MIN_ID_LENGTH = 8  # of an id that is cut short

EXAMPLES = {
    "new": "Example: headstock keys new ci --out ~/keys",
    "trust": "Example: headstock keys trust ~/keys/ci.pub --tasks 'pets*' --until 2027-01-01",
    "revoke": "Example: headstock keys revoke ci --message 'laptop lost'",
    "list": "Example: headstock keys list",
}

keys_app = typer.Typer(
    no_args_is_help=True, help="Say who may sign bundles.", epilog=EXAMPLES["trust"]
)


class KeySettings(BaseSettings):
    """What commands that read a private key take from the environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    key_passphrase: SecretStr | None = None


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(keys_app, name="keys")


@keys_app.command("new", epilog=EXAMPLES["new"])
def new(
    name: Annotated[str, typer.Argument(help="Name of the key: a person, a team, a pipeline.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of both files.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Make NAME.key, which signs and stays private, and NAME.pub, which a service is to trust.

    The passphrase is HEADSTOCK_KEY_PASSPHRASE, or asked for on a terminal.
    """
    passphrase = _passphrase("Passphrase (empty for none)", confirm=True)
    private_path, public_path = new_key(name, folder, passphrase=passphrase)
    key_id = key_id_of(read_public_key(public_path.read_bytes()))
    if as_json:
        print_json({"key_id": key_id, "private": str(private_path), "public": str(public_path)})
        return
    how = "encrypted" if passphrase else "not encrypted"
    out.print(f"key {name} ({key_id[:SHORT_ID]}): {private_path} ({how}) and {public_path}")


@keys_app.command("trust", epilog=EXAMPLES["trust"])
def trust(
    public_key: Annotated[Path, typer.Argument(help="NAME.pub.")],
    name: Annotated[
        str | None, typer.Option(help="Its name there; the file's unless given.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks for which it may sign, with * and ?; repeat it for more."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="When this ends: a date or a time, in UTC.")
    ] = None,
    message: Annotated[str, typer.Option(help="Why; shown by keys list --json.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Trust a key to sign bundles, or change how far. From the first on, pushes must be signed."""
    if not public_key.is_file():
        raise FileNotFoundError(f"There is no key at {public_key}.")
    pem = public_key.read_bytes()
    read_public_key(pem)
    with Client(server, token=token) as client, notes.status("trusting"):
        key = client.trust_key(
            pem.decode(),
            name=name or public_key.stem,
            tasks=tasks or ("*",),
            until=until,
            message=message,
        )
    if as_json:
        print_json(key)
        return
    out.print(f"{signer_text(key)} may sign for {_scope(key)}")


@keys_app.command("revoke", epilog=EXAMPLES["revoke"])
def revoke(
    key: Annotated[str, typer.Argument(help="Its name, or its id (at least 8 digits of it).")],
    message: Annotated[str, typer.Option(help="Why; shown by keys list --json.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Trust a key no more, for ever. What it signed stays live; the answer says what that is."""
    with Client(server, token=token) as client, notes.status("revoking"):
        known = client.keys()["keys"]
        revoked = client.revoke_key(find_key(known, key)["key_id"], message=message)
    if as_json:
        print_json(revoked)
        return
    out.print(f"{signer_text(revoked)} is revoked on every replica")
    if live := _live(revoked):
        out.print(f"Signed by it and still live: {live}. Roll back or push what should not be.")


@keys_app.command("list", epilog=EXAMPLES["list"])
def show(server: Server = DEFAULT_SERVER, token: Token = "", as_json: AsJson = False) -> None:
    """Show every key that was ever trusted, and what it signed of what is live."""
    with Client(server, token=token) as client:
        told = client.keys()
    if as_json:
        print_json(told)
        return
    if not told["signatures_required"]:
        out.print("no key was ever trusted here, so pushes need no signature")
        return
    table = Table("name", "id", "state", "tasks", "until (UTC)", "since (UTC)", "signed live")
    for key in told["keys"]:
        cells = [key["name"], key["key_id"][:SHORT_ID], key["state"], ", ".join(key["tasks"])]
        times = [key["valid_until"] or "", key["history"][0]["written_at"]]
        table.add_row(*cells, *(time[:19].replace("T", " ") for time in times), _live(key))
    out.print(table)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key that a command signs with.

    Raises:
        KeyFileError: no private key, or others can read it, or no passphrase or another.
        FileNotFoundError: there is none.
    """

    def passphrase() -> str:
        if given := _passphrase(f"Passphrase of {path}", confirm=False):
            return given
        raise KeyFileError(
            f"{path} is encrypted; expected its passphrase, on a terminal or as "
            "HEADSTOCK_KEY_PASSPHRASE."
        )

    return load_private_key(path, passphrase)


def find_key(known: Sequence[SigningKey], named: str) -> SigningKey:
    """The key of that id or name; of several with one name, the one that is not revoked.

    Raises:
        KeyFileError: there is none, or more than one.
    """
    found = [k for k in known if len(named) >= MIN_ID_LENGTH and k["key_id"].startswith(named)]
    found = found or [k for k in known if k["name"] == named]
    found = [k for k in found if k["state"] != "revoked"] or found
    if len(found) != 1:
        names = ", ".join(signer_text(key) for key in found or known) or "none"
        what = "Several keys are" if found else "No key is"
        raise KeyFileError(f"{what} called {named!r}; there are {names}.")
    return found[0]


def _passphrase(question: str, *, confirm: bool) -> str:
    """From the environment, else from a person, if there is one."""
    given = KeySettings().key_passphrase
    if given is not None:
        return given.get_secret_value()
    if not sys.stdin.isatty():
        return ""
    return typer.prompt(
        question,
        default="",
        hide_input=True,
        show_default=False,
        confirmation_prompt=confirm,
        err=True,
    )


def _scope(key: SigningKey) -> str:
    until = f" until {key['valid_until']}" if key["valid_until"] else ""
    return ", ".join(key["tasks"]) + until


def _live(key: SigningKey) -> str:
    return ", ".join(f"{live['task']} {live['version']}" for live in key["signed_live"])
