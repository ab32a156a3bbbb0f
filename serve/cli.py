"""The command line: `headstock …`. Thin: each command calls functions that a program could call.

This is the composition root. The commands that learn or export live in `cli_learn.py` and import
torch when they run, so that the rest works in an image that has none.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from export.bundle import TRUNK_MANIFEST, BundleError
from serve import (
    cli_audit,
    cli_keys,
    cli_learn,
    cli_migrate,
    cli_predict,
    cli_rollout,
    cli_store,
    cli_task,
    cli_tokens,
    cli_watch,
)
from serve.cli_rollout import parse_share
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
from serve.runtime import DEFAULT_PROXY
from serve.settings import load_settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One student trunk, thousands of task heads, swapped live.",
    epilog="Every command takes --debug, which shows the traceback of an error.",
)
cli_learn.add_to(app)
cli_task.add_to(app)
cli_keys.add_to(app)
cli_store.add_to(app)
cli_rollout.add_to(app)
cli_audit.add_to(app)
cli_predict.add_to(app)
cli_tokens.add_to(app)
cli_watch.add_to(app)
cli_migrate.add_to(app)


def main() -> None:
    """Run a command; an error is one line, and the exit code says whether it worked."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    is_debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="headstock")
    except Exception as error:  # noqa: BLE001 (the last line of defence before the user)
        if is_debug:
            traceback.print_exc()
        notes.print(f"headstock: {_one_line(error)}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


@app.command(epilog="Example: headstock serve --store ./store --trunk ./trunk --replicas 2")
def serve(
    store: Annotated[
        str | None, typer.Option(help="Folder, or s3://, gs:// or az:// URL, of the head log.")
    ] = None,
    trunk: Annotated[
        Path | None, typer.Option(help="Trunk folder, for a store that has none yet.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address; 127.0.0.1 unless given.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 unless given.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes; 2 unless given.")] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(help="Fewest processes, if their number follows the load; 0 sleeps."),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most processes; lets their number follow the load.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "int8", "fp16"] | None,
        typer.Option(help="Variant of the trunk; what its export picked unless given."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option(help="Where the trunk runs; a GPU if one can be used, unless given."),
    ] = None,
    proxy: Annotated[
        Literal["haproxy", "python"], typer.Option(help="python: Ray's own, slower.")
    ] = DEFAULT_PROXY,
    as_json: AsJson = False,
) -> None:
    """Run the service here, until it is interrupted."""
    from serve.service import Service, asked_to_end  # noqa: PLC0415 (a second of imports)

    settings = load_settings(
        store=store,
        host=host,
        port=port,
        replicas=replicas,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        precision=precision,
        device=device,
    )
    with ExitStack() as running:
        with notes.status("starting") as status:
            service = running.enter_context(
                Service(
                    settings,
                    trunk=trunk,
                    proxy=proxy,
                    progress=lambda step: status.update(f"starting: {step}"),
                )
            )
        wait_for_end = asked_to_end()
        if as_json:
            ready = {"url": service.url, "pid": os.getpid(), "start_seconds": service.step_seconds}
            sys.stdout.write(json.dumps(ready) + "\n")
            sys.stdout.flush()
        else:
            out.print(f"Ready at {service.url} (Ctrl-C ends it)")
        wait_for_end()
        notes.print("stopping")


@app.command(epilog="Example: headstock push ./pets-bundle --message 'more pictures of cats'")
def push(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="[TRUNK] BUNDLE...",
            help="Bundle folder or zip; several, one for each task, go live in one moment. After "
            "the folder of a new trunk: a bundle of every live task, made for it.",
        ),
    ],
    task: Annotated[str | None, typer.Option(help="Task; the bundle's own unless given.")] = None,
    message: Annotated[str, typer.Option(help="Why; shown by history.")] = "",
    new_labels: Annotated[
        bool, typer.Option("--new-labels", help="Declare that the labels change.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="Private key (NAME.key) that signs the bundle.")
    ] = None,
    canary: Annotated[
        str, typer.Option(help="Let it answer this share of the callers, as in 10%.")
    ] = "",
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Let it answer nobody, and only be compared.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only ask the gates; nothing is stored.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Make a bundle live on every replica, or several at once, or a new trunk with all its heads.

    Returns when they are.
    """
    signer = cli_keys.read_private_key(key) if key else None
    try:
        with (
            Client(server, token=token) as client,
            notes.status("asking" if dry_run else "pushing"),
        ):
            is_one = len(bundles) == 1 and not _is_trunk(bundles[0])
            if not is_one:
                _refuse_options(task=task, canary=canary, shadow=shadow)
                ask = _try_several if dry_run else partial(_push_several, message=message)
                pushed = ask(client, bundles, new_labels=new_labels, sign_with=signer)
            else:
                ask = client.try_push if dry_run else partial(client.push, message=message)
                pushed = ask(
                    bundles[0],
                    task=task,
                    new_labels=new_labels,
                    canary=parse_share(canary),
                    shadow=shadow,
                    sign_with=signer,
                )
    except ClientError as error:
        if dry_run and error.gates:
            _show_gates({"dry_run": True, "gates": error.gates}, as_json=as_json)
        raise
    if dry_run:
        _show_gates(pushed, as_json=as_json)
        return
    what = "live"
    if shadow or canary:
        what = "live beside its shadow" if shadow else f"live, with a canary for {canary}"
    show_swap(what, pushed, as_json=as_json)


@app.command(epilog="Example: headstock retire pets --message 'replaced by animals'")
def retire(
    task: Annotated[str, typer.Argument(help="Task.")],
    expected: Annotated[
        int | None, typer.Option(min=1, help="Refuse unless this version is live.")
    ] = None,
    message: Annotated[str, typer.Option(help="Why; shown by history.")] = "",
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Let a task answer nothing any more; a push or a rollback brings it back."""
    with Client(server, token=token) as client:
        retired = client.retire(task, expected=expected, message=message)
    show_swap("retired", retired, as_json=as_json)


def _is_trunk(path: Path) -> bool:
    return (path / TRUNK_MANIFEST).is_file()


def _push_several(client: Client, given: Sequence[Path], **options: Any) -> Mapping[str, Any]:
    if _is_trunk(given[0]):
        return client.push_trunk(given[0], given[1:], **options)
    return client.push_together(given, **options)


def _try_several(client: Client, given: Sequence[Path], **options: Any) -> Mapping[str, Any]:
    if _is_trunk(given[0]):
        return client.try_push_trunk(given[0], given[1:], **options)
    return client.try_push_together(given, **options)


def _refuse_options(**options: object) -> None:
    """What is given for one task says nothing of several.

    Raises:
        BundleError: one of the options is given.
    """
    for name, value in options.items():
        if value:
            raise BundleError(
                f"--{name} is for one bundle; several go to the tasks that they were made for."
            )


def _show_gates(asked: Mapping[str, Any], *, as_json: bool) -> None:
    """What each gate says, and what a push would make."""
    if as_json:
        print_json(asked)
        return
    versions = asked.get("versions", [asked])
    out.print(gates_table([gate for version in versions for gate in version["gates"]]))
    for version in versions:
        if would := version.get("would_make"):
            out.print(
                f"{version['task']} would be at version {would['version']} "
                f"({short(would['bundle'])}); nothing was stored"
            )


def _one_line(error: Exception) -> str:
    """What happened, for a person; errors that are not ours are named by their kind too."""
    text = " ".join(str(error).split())
    is_ours = type(error).__module__.partition(".")[0] in {"serve", "models", "export"}
    if is_ours or isinstance(error, FileNotFoundError):
        return text
    return f"{type(error).__name__}: {text}"
