"""The command `migrate`: a new trunk under old tasks, each with a head learned anew from its data.

Part of the composition root: `models` and `export` are imported when it runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from export.bundle import Bundle, Manifest
from serve import cli_keys, cli_learn
from serve.client import Client, ClientError
from serve.console import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Token,
    gates_table,
    notes,
    out,
    print_json,
    short,
    show_swap,
)


class MigrationError(Exception):
    """A task stands in the way."""


@dataclass(frozen=True)
class Origin:
    """How the head that a task has now was made.

    Args:
        source: Where its data was; empty if its command does not say.
        strategy: Of `headstock head`.
        data_sha256: Fingerprint of what it learned from.
        accuracy: On its own test pictures; None if it was not measured.
    """

    task: str
    source: str
    strategy: str
    width: int
    seed: int
    data_sha256: str
    accuracy: float | None


@dataclass(frozen=True)
class Remade:
    """A task's new head.

    Args:
        is_same_data: Whether it learned from what the old one did.
    """

    origin: Origin
    bundle: Bundle
    is_same_data: bool
    accuracy: float


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(
        epilog="Example: headstock migrate --to ./new-trunk --out ./heads --data pets=./pets"
    )(migrate)


def migrate(
    to: Annotated[Path, typer.Option(help="Folder of the new trunk, as `export` wrote it.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the new bundles.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=DATA",
            help="Data of a task, once for each; where its head learned from, unless given.",
        ),
    ] = None,
    message: Annotated[str, typer.Option(help="Why; shown by history.")] = "",
    key: Annotated[
        Path | None, typer.Option(help="Private key (NAME.key) that signs the bundles.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Learn and ask the gates; nothing goes live.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Learn every task's head anew on another trunk, and make trunk and heads live in one moment.

    Each as its head was learned before, by the same strategy. Nothing changes unless every task
    has a head that the gates admit; the tasks that stand in the way are named.
    """
    signer = cli_keys.read_private_key(key) if key else None
    with Client(server, token=token) as client:
        origins = [origin_of(told["manifest"], task) for task, told in _live(client)]
        sources = _sources(origins, _by_task(data or ()))
        remade = [
            _remake(origin, sources[origin.task], to, folder / origin.task) for origin in origins
        ]
        if not as_json:
            out.print(_table(remade))
        ask = (
            client.try_push_trunk
            if dry_run
            else partial(client.push_trunk, message=message or f"migrated to {to.name}")
        )
        try:
            with notes.status("asking" if dry_run else "pushing"):
                told = ask(to, [one.bundle for one in remade], sign_with=signer)
        except ClientError as error:
            if error.gates and not as_json:
                out.print(gates_table(error.gates))
            raise
    if as_json:
        print_json({"heads": [_summary(one) for one in remade], **told})
    elif dry_run:
        out.print("every gate admits them; nothing was changed")
    else:
        show_swap("live", told, as_json=False)


def origin_of(manifest: Mapping[str, Any], task: str) -> Origin:
    """How a head was made, by its own manifest."""
    read = Manifest.model_validate(manifest)
    given = _parameters(read.provenance.command)
    measured = read.metrics.get("test")
    return Origin(
        task=task,
        source=given.get("data", ""),
        strategy=given.get("strategy", "head"),
        width=given.get("width", 4),
        seed=read.provenance.seed,
        data_sha256=read.data.sha256,
        accuracy=measured.value if measured else None,
    )


def _parameters(command: str) -> dict[str, Any]:
    """What `headstock head` was given, defaults included; nothing if it was another command."""
    words = shlex.split(command)
    if words[:2] != ["headstock", "head"]:
        return {}
    parser = typer.Typer()
    parser.command()(cli_learn.head)
    context = typer.main.get_command(parser).make_context("head", words[2:], resilient_parsing=True)
    return {name: value for name, value in context.params.items() if value is not None}


def _live(client: Client) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for state in client.tasks()["tasks"]:
        if state["bundle"] is not None:  # retired
            yield state["task"], client.bundle(state["bundle"])


def _by_task(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for task, equals, source in pairs:
        if not (task and equals and source):
            raise MigrationError(
                f"--data is {task + equals + source!r}; expected TASK=DATA, as in pets=./pets."
            )
    return {task: source for task, _, source in pairs}


def _sources(origins: Sequence[Origin], given: Mapping[str, str]) -> dict[str, str]:
    """Where each task's data is.

    Raises:
        MigrationError: data is missing or is not what the head learned from, with every such task;
            or data is given for a task that is not live.
    """
    from models.recipe import DataError, read_data  # noqa: PLC0415 (imports torch)

    tasks = [origin.task for origin in origins]
    if unknown := sorted(given.keys() - set(tasks)):
        raise MigrationError(
            f"--data names {', '.join(unknown)}; live are {', '.join(tasks) or 'no tasks'}."
        )
    problems = []
    for origin in origins:
        if origin.task in given:
            continue
        try:
            found = read_data(origin.source, seed=origin.seed).record().sha256
        except DataError:
            problems.append(
                f"{origin.task} (its data is not at {origin.source or 'a known place'})"
            )
            continue
        if found != origin.data_sha256:
            problems.append(f"{origin.task} (its data at {origin.source} has changed since)")
    if problems:
        raise MigrationError(
            f"In the way: {'; '.join(problems)}. Say what to learn from by --data TASK=DATA."
        )
    return {origin.task: given.get(origin.task, origin.source) for origin in origins}


def _remake(origin: Origin, source: str, trunk: Path, folder: Path) -> Remade:
    """Learn one head and write its bundle.

    Raises:
        MigrationError: it cannot be learned on this trunk.
    """
    from export.recipe import ExportError, default_folder, make_head  # noqa: PLC0415
    from models.errors import LearningError  # noqa: PLC0415

    given: dict[str, Any] = {
        "task": origin.task,
        "strategy": origin.strategy,
        "width": origin.width,
        "seed": origin.seed,
    }
    flags = {"trunk": trunk, "out": folder, **given}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with notes.status(origin.task) as shown:
        try:
            made = make_head(
                source,
                trunk,
                **given,
                cache=default_folder(),
                command=shlex.join(["headstock", "head", source, *words]),
                progress=lambda step: shown.update(
                    f"{origin.task}: {step.stage} {step.done}/{step.total} {step.note}"
                ),
            )
        except (LearningError, ExportError) as error:
            raise MigrationError(f"In the way: {origin.task}. {error}") from error
        made.write(folder)
    is_same = made.data.record().sha256 == origin.data_sha256
    return Remade(origin, made.bundle, is_same, made.trained.metrics["test"].value)


def _table(remade: Sequence[Remade]) -> Table:
    """Each task's accuracy before and now."""
    table = Table("task", "strategy", "data", "test accuracy", "before", "bundle")
    for one in remade:
        before = "-" if one.origin.accuracy is None else f"{one.origin.accuracy:.3f}"
        table.add_row(
            one.origin.task,
            one.origin.strategy,
            "the same" if one.is_same_data else "other",
            f"{one.accuracy:.3f}",
            before,
            short(one.bundle.digest),
        )
    return table


def _summary(one: Remade) -> dict[str, Any]:
    return {
        **asdict(one.origin),
        "accuracy_before": one.origin.accuracy,
        "accuracy": one.accuracy,
        "is_same_data": one.is_same_data,
        "bundle": one.bundle.digest,
    }
