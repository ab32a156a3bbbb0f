"""`headstock watch`: what the service does, looked at again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from serve.client import Client, ClientError
from serve.console import DEFAULT_SERVER, Server, Token, out, short

ROWS = "headstock_task_rows_total"
MOST_CHANGES = 5


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="Example: headstock watch --json | head -3")(watch)


def watch(
    every_s: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between two looks.")
    ] = 2.0,
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each look.")
    ] = False,
) -> None:
    """Look on: what is live and how much it is asked, the replicas, and why there are so many.

    Ends with Ctrl-C. Reads GET /tasks and GET /metrics, so a token needs read and metrics.
    """
    with Client(server, token=token) as client:
        try:
            if as_json:
                for look in looks(client, every_s=every_s):
                    sys.stdout.write(json.dumps(look) + "\n")
                    sys.stdout.flush()
            else:
                with Live(console=out, auto_refresh=False) as screen:
                    for look in looks(client, every_s=every_s):
                        screen.update(drawn(look), refresh=True)
        except KeyboardInterrupt:
            return


def looks(client: Client, *, every_s: float) -> Iterator[dict[str, Any]]:
    """What is live, with rates since the look before; for ever.

    A service that does not answer meanwhile is looked for again; its look has the error alone.

    Raises:
        ClientError: the first look failed.
    """
    live = client.tasks()
    rows, looked_s = rows_answered(client.metrics()), time.monotonic()
    yield _look(live, {})
    while True:
        time.sleep(every_s)
        try:
            live, text = client.tasks(), client.metrics()
        except ClientError as error:
            yield {"at": _now(), "error": str(error)}
            continue
        before, before_s = rows, looked_s
        rows, looked_s = rows_answered(text), time.monotonic()
        rates = {
            task: (num - before.get(task, 0.0)) / (looked_s - before_s)
            for task, num in rows.items()
            # Fewer than before: the conductor, which adds up, is another.
            if num >= before.get(task, 0.0)
        }
        yield _look(live, rates)


def rows_answered(metrics: str) -> dict[str, float]:
    """Rows answered since the start, by task."""
    return {
        sample.labels["task"]: float(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == ROWS
    }


def drawn(look: Mapping[str, Any]) -> Group:
    """A look as it is shown."""
    if "error" in look:
        return Group(f"{look['at']}  {escape(look['error'])}")
    tasks = Table("task", "version", "since", "by", "bundle", "rows/s")
    for task in look["tasks"]:
        rate = task["rows_per_s"]
        tasks.add_row(
            task["task"],
            str(task["version"]),
            task["written_at"],
            task["action"],
            short(task["bundle"] or "none"),
            "" if rate is None else f"{rate:.1f}",
        )
    head = f"{look['at']}  trunk {short(look['trunk'] or 'none')}, record {look['log_number']}"
    return Group(head, tasks, *_replica_lines(look["replicas"]))


def _replica_lines(replicas: Mapping[str, Any] | None) -> list[str]:
    if replicas is None:
        return ["replicas: the conductor does not answer"]
    if replicas["last"] is None:
        return [f"{replicas['answering']} replicas answer, a fixed number"]
    changes = replicas["changes"][:MOST_CHANGES]
    return [
        f"{replicas['answering']} replicas answer, {replicas['wanted']} wanted",
        escape(f"now: {replicas['last']['text']}"),
        *(escape(f"{change['at']}: {change['text']}") for change in changes),
    ]


def _look(live: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    told = ("task", "version", "action", "bundle", "written_at")
    return {
        "at": _now(),
        "trunk": live["trunk"],
        "log_number": live["log_number"],
        "replicas": live["replicas"],
        "tasks": [
            {name: task[name] for name in told} | {"rows_per_s": rates.get(task["task"])}
            for task in live["tasks"]
        ],
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
