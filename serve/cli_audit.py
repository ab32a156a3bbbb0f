"""The commands that look: what is live, how it became so, what changed, and where it came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from serve.answers import Diff
from serve.cli_rollout import print_rollout
from serve.client import Client
from serve.console import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Token,
    gates_table,
    out,
    print_json,
    settings_text,
    short,
    signer_text,
)
from serve.task_settings import DEFAULTS

MAX_CHANGED = 10  # pictures that are shown one by one


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(epilog="Example: headstock status")(status)
    app.command(epilog="Example: headstock history pets")(history)
    app.command(epilog="Example: headstock diff pets 3 4")(diff)
    app.command(epilog="Example: headstock show 8d23ab90a1c4")(show)


def status(server: Server = DEFAULT_SERVER, token: Token = "", as_json: AsJson = False) -> None:
    """Show what is live."""
    with Client(server, token=token) as client:
        live = client.tasks()
        rollouts = {
            task["task"]: client.task(task["task"])["rollout"]
            for task in live["tasks"]
            if task["candidate"]
        }
    if as_json:
        print_json(live)
        return
    out.print(f"trunk {short(live['trunk'] or 'none')}, record {live['log_number']}")
    _print_versions(live["tasks"], first="task")
    for task in live["tasks"]:
        if special := _not_default(task["settings"]):
            out.print(f"{task['task']}: {settings_text(special)}")
    for name, rollout in rollouts.items():
        print_rollout(name, rollout)


def history(
    task: Annotated[
        str | None, typer.Argument(help="Task; every record of the log unless given.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show what became of a task, or of everything, oldest first.

    Of a task: every version, with who signed it, and every change of its settings and its held-out
    sample. Without a task: every record of the log, with --json as it is stored, one a line.
    """
    with Client(server, token=token) as client:
        if task is None:
            _show_log(client, as_json=as_json)
            return
        entries = client.history(task)
    if as_json:
        print_json(entries)
        return
    _print_versions(entries, first="version")


def diff(
    task: Annotated[str, typer.Argument(help="Task.")],
    a: Annotated[int, typer.Argument(min=1, help="Version.")],
    b: Annotated[int, typer.Argument(min=1, help="Another version.")],
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show what changed from one version of a task to another."""
    with Client(server, token=token) as client:
        found = client.diff(task, a, b)
    if as_json:
        print_json(found)
        return
    out.print(_sides_table(found))
    for side in ("a", "b"):
        if gates := found[side]["gates"]:
            out.print(f"gates of version {found[side]['version']}")
            out.print(gates_table(gates))
    for line in _diff_lines(found):
        out.print(line, markup=False, soft_wrap=True)


def show(
    digest: Annotated[
        str, typer.Argument(help="A bundle, as an answer names it, or its first digits.")
    ],
    server: Server = DEFAULT_SERVER,
    token: Token = "",
    as_json: AsJson = False,
) -> None:
    """Show where a bundle came from, data and command, and where it was live."""
    with Client(server, token=token) as client:
        told = client.bundle(digest)
    if as_json:
        print_json(told)
        return
    manifest, origin = told["manifest"], told["manifest"]["provenance"]
    table = Table("bundle", told["bundle"])
    counts = ", ".join(
        f"{sum(labels.values())} {split}"
        for split, labels in manifest["data"]["num_pictures"].items()
    )
    for name, text in (
        ("made for", manifest["task"]),
        ("kind", manifest["kind"]),
        ("labels", ", ".join(manifest["labels"])),
        ("trunk", manifest["trunk"]),
        ("data", f"{manifest['data']['name']}: {counts or 'not counted'}"),
        ("data fingerprint", manifest["data"]["sha256"]),
        ("command", origin["command"]),
        ("made at", origin["created_at"]),
        ("seed", str(origin["seed"])),
        ("packages", ", ".join(f"{name} {v}" for name, v in origin["versions"].items())),
        *((name, _estimate(value)) for name, value in manifest["metrics"].items()),
    ):
        table.add_row(name, escape(text))
    out.print(table)
    for used in told["used"]:
        now = ", live now" if used["is_live"] else ""
        out.print(
            f"{used['task']} version {used['version']} ({used['action']}, record "
            f"{used['record']}, {_when(used)}{now})"
        )


def _show_log(client: Client, *, as_json: bool) -> None:
    if as_json:
        for record in client.log():
            # As it is stored: the next record names the sha256 of this line.
            line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            sys.stdout.write(line + "\n")
        return
    table = Table("record", "what", "when (UTC)", "writer", "message")
    for record in client.log():
        message = escape(record.get("message", ""))
        what = escape("; ".join(_happenings(record)))
        is_abort = record["kind"] == "abort"
        table.add_row(
            str(record["number"]),
            what,
            _when(record),
            record["writer"],
            message,
            style="dim" if is_abort else None,
        )
    out.print(table)


def _happenings(record: dict[str, Any]) -> list[str]:
    """What a record did, in words."""
    if record["kind"] == "abort":
        epoch = record.get("epoch")
        return [f"cluster {epoch} writes from here on" if epoch else "abort"]
    found = [
        f"{change['action']} {change['task']} {change['version']}"
        for change in record.get("changes", ())
    ]
    found += [f"settings of {setting['task']}" for setting in record.get("settings", ())]
    found += [f"held-out sample of {sample['task']}" for sample in record.get("heldout", ())]
    found += [f"trust in key {key['name']}" for key in record.get("signing_keys", ())]
    found += [
        f"{'revoked' if token.get('is_revoked') else 'made'} token {token['name']}"
        for token in record.get("tokens", ())
    ]
    return found + ([f"trunk {short(record['trunk']['trunk'])}"] if "trunk" in record else [])


def _sides_table(found: Diff) -> Table:
    """Both versions side by side."""
    a, b = found["a"], found["b"]
    table = Table(found["task"], f"version {a['version']}", f"version {b['version']}")

    def row(name: str, left: str, right: str) -> None:
        table.add_row(name, escape(left), escape(right), style=None if left != right else "dim")

    row("bundle", short(a["bundle"]), short(b["bundle"]))
    row("made live by", a["action"], b["action"])
    row("signed by", signer_text(a["signed_by"]), signer_text(b["signed_by"]))
    row("when (UTC)", _when(a), _when(b))
    row("message", a["message"], b["message"])
    row("kind", _kind(a), _kind(b))
    row("trunk", short(a["trunk"]), short(b["trunk"]))
    row("bytes", f"{a['size_bytes']:,}", f"{b['size_bytes']:,}")
    row("data", a["data"]["name"], b["data"]["name"])
    row("data fingerprint", a["data"]["sha256"][:12], b["data"]["sha256"][:12])
    row("command", a["command"], b["command"])
    row("seed", str(a["seed"]), str(b["seed"]))
    for name, sides in found["metrics"].items():
        row(name, _estimate(sides["a"]), _estimate(sides["b"]))
    for name, sides in found["packages"].items():
        row(name, sides["a"] or "", sides["b"] or "")
    return table


def _diff_lines(found: Diff) -> list[str]:
    """Labels, weights and answers, in words."""
    labels, weights = found["labels"], found["weights"]
    told = [f"added {', '.join(labels['added'])}"] if labels["added"] else []
    told += [f"removed {', '.join(labels['removed'])}"] if labels["removed"] else []
    told += ["in another order"] if labels["reordered"] else []
    distance = weights["distance"]
    moved = "no distance" if distance is None else f"moved by {distance:.3g} of their norm"
    lines = [
        f"labels: {'; '.join(told) or 'the same'}",
        f"weights: {moved} ({weights['reason']})",
    ]
    if (golden := found["golden"]) is None:
        return [*lines, "golden pictures: not compared, as not both are for the trunk now served"]
    agreement = f"{golden['agreement']:.1%} of {golden['pictures']} get the same label"
    largest = f"the largest change of a score is {golden['largest_score_change']:.3f}"
    lines.append(f"golden pictures: {agreement}; {largest}")
    for one in golden["changed"][:MAX_CHANGED]:
        a, b = one["a"], one["b"]
        lines.append(f"  picture {one['picture']}: {_given(a)}, now {_given(b)}")
    return lines


def _given(side: Mapping[str, Any]) -> str:
    """The label of one side with its score, or all that reach their thresholds."""
    if "labels" in side:
        return ", ".join(side["labels"]) or "no label"
    return f"{side['label']} ({side['score']:.3f})"


def _kind(side: Mapping[str, Any]) -> str:
    return f"{side['kind']} ({side['adapter']['kind']})" if side["adapter"] else side["kind"]


def _estimate(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _when(entry: Mapping[str, Any]) -> str:
    return entry["written_at"][:19].replace("T", " ")


def _not_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults = DEFAULTS.model_dump()
    return {name: value for name, value in settings.items() if value != defaults.get(name)}


def _print_versions(versions: Sequence[Mapping[str, Any]], *, first: str) -> None:
    columns = [
        "task",
        "version",
        "action",
        "bundle",
        "labels",
        "signed by",
        "when (UTC)",
        "message",
    ]
    rows = [[version["task"], *_cells(version)] for version in versions]
    # Narrow terminals have no room for columns that say nothing.
    shown = [
        place
        for place, column in enumerate(columns)
        if (column != "task" or first == "task")
        and (column != "signed by" or any(row[place] for row in rows))
    ]
    table = Table(*(columns[place] for place in shown))
    for version, row in zip(versions, rows, strict=True):
        is_gone = first == "task" and version["action"] == "retire"
        table.add_row(*(row[place] for place in shown), style="dim" if is_gone else None)
    out.print(table)


def _cells(version: Mapping[str, Any]) -> list[str]:
    when, message = _when(version), version["message"]
    if version["action"] == "settings":
        return ["", f"set {settings_text(version['changed'])}", "", "", "", when, message]
    if version["action"] == "heldout":
        return ["", f"held-out sample {short(version['heldout'])}", "", "", "", when, message]
    labels = version["labels"]
    more = f" +{len(labels) - 4}" if len(labels) > 4 else ""  # noqa: PLR2004
    action = version["action"]
    if version["rolled_back_to"]:
        action += f" to {version['rolled_back_to']}"
    if candidate := version["candidate"]:
        share = f" for {100 * candidate['share']:.3g} %" if candidate["share"] else ""
        action += f" {short(candidate['bundle'])}{share}"
    return [
        str(version["version"]),
        action,
        short(version["bundle"] or ""),
        ", ".join(labels[:4]) + more,
        signer_text(version["signed_by"]),
        when,
        message,
    ]
