"""The commands that end a rollout, or widen it, and the way back: `promote` and `rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.answers import Rollout
from serve.client import Client
from serve.console import DEFAULT_SERVER, AsJson, Server, Token, out, short, show_swap

Task = Annotated[str, typer.Argument(help="Task.")]
Message = Annotated[str, typer.Option(help="Why; shown by history.")]
Expected = Annotated[int | None, typer.Option(help="Refuse unless this version is live.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(epilog="Example: headstock promote pets --share 50%")(promote)
    app.command(epilog="Example: headstock rollback pets --to 3")(rollback)


def promote(
    task: Task,
    share: Annotated[
        str, typer.Option(help="Let the candidate answer this share of the callers, as in 50%.")
    ] = "",
    expected: Expected = None,
    message: Message = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Make the candidate of a rollout live for all callers, or for a larger share of them."""
    with Client(server, token=token) as client:
        promoted = client.promote(
            task, share=parse_share(share), expected=expected, message=message
        )
    show_swap("live" if not share else f"live for {share}", promoted, as_json=as_json)


def rollback(
    task: Annotated[str | None, typer.Argument(help="Task.")] = None,
    to: Annotated[int | None, typer.Option(help="Version; the one before unless given.")] = None,
    expected: Expected = None,
    trunk: Annotated[
        bool, typer.Option("--trunk", help="The trunk before, with the heads that it had.")
    ] = False,
    message: Message = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Make an older bundle live again, as a new version; a rollout ends. Or the trunk before."""
    if trunk != (task is None) or (trunk and (to or expected)):
        raise ValueError("Expected one of: a task, with --to and --expected; or --trunk alone.")
    with Client(server, token=token) as client:
        if task is None:
            rolled_back = client.rollback_trunk(message=message)
        else:
            rolled_back = client.rollback(task, to=to, expected=expected, message=message)
    show_swap("rolled back", rolled_back, as_json=as_json)


def parse_share(text: str) -> float | None:
    """A share from "10%" or "0.1"; None from nothing.

    Raises:
        ValueError: it is neither.
    """
    if not text:
        return None
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError:
        raise ValueError(f"The share is {text!r}; expected one such as 10% or 0.1.") from None


def print_rollout(task: str, rollout: Rollout) -> None:
    """One line for people: what is tried on whom, what was seen, what the rules make of it."""
    share = f" for {rollout['share']:.3g} of the callers" if rollout["share"] else ""
    seen = rollout.get("seen")
    told = f"{seen['served']} answers, {seen['compared']} compared; " if seen else ""
    verdict = f"{rollout['verdict']}: {rollout['reason']}" if seen else "no conductor to ask"
    out.print(f"{task}: {rollout['mode']} of {short(rollout['bundle'])}{share}: {told}{verdict}")
