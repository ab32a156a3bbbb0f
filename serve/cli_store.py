"""The commands about the head log's store itself: `headstock doctor`, `gc` and `trunk`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from serve.console import AsJson, notes, out, parse_span, print_json, short
from serve.doctor import Finding, is_healthy
from serve.garbage import Garbage, find_garbage, remove
from serve.headlog import HeadLog
from serve.settings import load_settings
from serve.store import StoreError

STORE_HELP = "Folder, or s3://, gs:// or az:// URL, of the head log."
SHORTEST_GRACE = timedelta(hours=1)
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}
NUM_SHOWN = 50


class GraceError(ValueError):
    """A time of grace that is none, or that a push on its way might outlast."""


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(epilog="Example: headstock doctor --store ./store --deep")(doctor)
    app.command(epilog="Example: headstock gc --store s3://heads/log --grace 7d --dry-run")(gc)
    app.command(epilog="Example: headstock trunk ./trunk --store s3://heads/log")(trunk)


def doctor(
    store: Annotated[
        str | None,
        typer.Option(envvar="HEADSTOCK_STORE", help=f"{STORE_HELP} Unless given, no log is seen."),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every blob, and compare it with its digest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this installation or head log, and how to mend it."""
    from serve.doctor_machine import check_machine  # noqa: PLC0415 (ONNX Runtime takes a second)

    findings: list[Finding] = []
    with notes.status("looking"):
        for finding in (*check_machine(), *(check_log(store, is_deep=deep) if store else ())):
            findings.append(finding)
            if not as_json:
                _show(finding)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if not is_healthy(findings):
        raise typer.Exit(1)


def gc(
    store: Annotated[str, typer.Option(envvar="HEADSTOCK_STORE", help=STORE_HELP)],
    grace: Annotated[
        str, typer.Option(help="Keep what was stored within this time: 7d, 12h, …; at least 1h.")
    ] = "7d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove blobs that no record of the head log refers to."""
    span = parse_grace(grace)
    log = open_existing(store)
    with notes.status("reading the log"):
        found = find_garbage(log, grace=span)
    removed = [] if dry_run else _remove(log, found, span)
    if as_json:
        told = {"found": found, "removed": removed}
        print_json({name: [asdict(one) for one in some] for name, some in told.items()})
        return
    _print_table(found if dry_run else removed, what="would go" if dry_run else "removed")


def trunk(
    folder: Annotated[Path, typer.Argument(help="Trunk folder.")],
    store: Annotated[str | None, typer.Option(help=STORE_HELP)] = None,
    as_json: AsJson = False,
) -> None:
    """Store the first trunk, or more variants of it, where a Ray cluster runs that waits for one.

    To be typed on a node of that cluster; `serve --trunk` does the same for its own.
    """
    import ray  # noqa: PLC0415 (seconds of imports, for this command only)

    from serve.cluster import install_trunk  # noqa: PLC0415 (see above)
    from serve.first_trunk import store_folder  # noqa: PLC0415 (see above)

    settings = load_settings(store=store)
    with notes.status("storing"):
        stored = store_folder(HeadLog(settings.store), folder)
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        install_trunk(settings, stored)
    if as_json:
        print_json(stored.model_dump(mode="json"))
        return
    out.print(f"{settings.store} has trunk {short(stored.trunk)}")


def check_log(url: str, *, is_deep: bool) -> Iterable[Finding]:
    """All checks of a head log and its store."""
    from serve import doctor_log  # noqa: PLC0415 (not needed for the commands beside it)

    try:
        log = open_existing(url)
        yield from doctor_log.check_writable(log.store)
        contents = doctor_log.read_contents(log)
    except StoreError as error:
        yield Finding("store", "problem", str(error), "See docs/head-log.md for what it needs.")
        return
    yield from doctor_log.check_records(contents)
    yield from doctor_log.check_blobs(log, contents, is_deep=is_deep)
    yield from doctor_log.check_strangers(contents)


def open_existing(url: str) -> HeadLog:
    """A head log that is there; a service would make a folder that is missing.

    Raises:
        StoreError: there is none, or it cannot be used.
    """
    if "://" not in url and not Path(url).expanduser().is_dir():
        raise StoreError(f"There is no folder {url}.")
    return HeadLog(url)


def parse_grace(text: str) -> timedelta:
    """A number and its unit, as in `7d`.

    Raises:
        GraceError: it is not of that form, or too short.
    """
    span = parse_span(text)
    if span is None:
        raise GraceError(f"--grace is {text!r}; expected a number and one of s, m, h, d, w: 7d.")
    if span < SHORTEST_GRACE:
        raise GraceError(
            f"--grace is {text}; expected at least 1h: a push that is on its way has stored what "
            "no record refers to yet."
        )
    return span


def _remove(log: HeadLog, found: Sequence[Garbage], grace: timedelta) -> list[Garbage]:
    with Progress(console=notes, transient=True) as bar:
        task = bar.add_task("removing", total=len(found))
        return remove(log, found, grace=grace, progress=lambda n: bar.update(task, completed=n))


def _print_table(garbage: Sequence[Garbage], *, what: str) -> None:
    table = Table(f"blob ({what})", "bytes", "days old")
    for one in garbage[:NUM_SHOWN]:
        table.add_row(one.name, f"{one.size_bytes:,}", f"{one.age_s / 86400:.1f}")
    if len(garbage) > NUM_SHOWN:
        table.add_row(f"… and {len(garbage) - NUM_SHOWN} more", "", "")
    if garbage:
        out.print(table)
    num_bytes = sum(one.size_bytes for one in garbage)
    out.print(f"{len(garbage)} blobs, {num_bytes:,} bytes: {what}")


def _show(finding: Finding) -> None:
    mend = f" → {finding.mend}" if finding.mend else ""
    out.print(
        f"[{STYLES[finding.level]}]{finding.level:8}[/]{finding.check:11}",
        end="",
    )
    out.print(f"{finding.says}{mend}", markup=False, soft_wrap=True)
