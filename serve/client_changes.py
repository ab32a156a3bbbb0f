"""What else a client asks of a service to change: rollbacks, settings, keys.

Each carries a key, which makes it one change however often it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.bundle import HELDOUT, BundleError
from serve.answers import SigningKey, Swapped, TaskState, TrunkSwapped
from serve.client_calls import path
from serve.client_pushes import read_bundle
from serve.client_sending import Ask, Steps, change_headers


def promote(
    task: str, *, share: float | None = None, expected: int | None = None, message: str = ""
) -> Steps[Swapped]:
    """Make the candidate of a rollout live, or let it answer another share of the callers.

    Args:
        share: Above 0 and below 1; it goes live for all if this is not given.
        expected: Refuse unless this version is live.

    Raises:
        ClientError: the service said no.
    """
    command = {"share": share, "expected": expected, "message": message}
    return (yield _command("POST", path("tasks", task, "promote"), command))


def rollback(
    task: str, *, to: int | None = None, expected: int | None = None, message: str = ""
) -> Steps[Swapped]:
    """Make an older version's bundle live again: that of `to`, or the one before.

    Args:
        expected: Refuse unless this version is live.

    Raises:
        ClientError: the service said no.
    """
    command = {"to": to, "expected": expected, "message": message}
    return (yield _command("POST", path("tasks", task, "rollback"), command))


def rollback_trunk(*, expected: str | None = None, message: str = "") -> Steps[TrunkSwapped]:
    """Serve the trunk again that was served before, with the bundles that were live on it.

    Args:
        expected: Refuse unless this trunk is served.

    Raises:
        ClientError: the service said no.
    """
    command = {"expected": expected, "message": message}
    return (yield _command("POST", "/trunks/rollback", command))


def retire(task: str, *, expected: int | None = None, message: str = "") -> Steps[Swapped]:
    """Let a task answer nothing any more; a push or a rollback makes it answer again.

    Args:
        expected: Refuse unless this version is live.

    Raises:
        ClientError: the service said no.
    """
    params = {"message": message, **({"expected": expected} if expected else {})}
    return (yield Ask("DELETE", path("tasks", task), params=params, headers=change_headers(None)))


def set_task(
    task: str, settings: Mapping[str, object], *, message: str = "", key: str | None = None
) -> Steps[TaskState]:
    """Change settings of a task; returns what is live of it when every replica has them.

    Args:
        settings: Those that change, as in `{"weight": 2, "pinned": True}`; see `TaskSettings`.
        key: Makes repeated calls one change; a new one for each call if it is not given.

    Raises:
        ClientError: the service said no.
    """
    params = {"message": message}
    return (yield _command("PATCH", path("tasks", task), settings, key=key, params=params))


def set_heldout(
    task: str, source: Path, *, message: str = "", key: str | None = None
) -> Steps[TaskState]:
    """Replace a task's held-out sample; returns what is live of the task.

    Args:
        source: `heldout.safetensors`, or a bundle that holds one and has the task's labels.
        key: Makes repeated calls one change; a new one for each call if it is not given.

    Raises:
        ClientError: the service said no.
        BundleError: the bundle has no sample, or other labels than the task.
        FileNotFoundError: there is nothing.
    """
    params: dict[str, str | int] = {"message": message}
    if source.suffix == ".safetensors":
        data = source.read_bytes()
    else:
        bundle = read_bundle(source)
        live = yield Ask("GET", path("tasks", task))
        data = bundle.files.get(HELDOUT, b"")
        if not data:
            raise BundleError(f"The bundle {source} has no {HELDOUT}.")
        if list(bundle.manifest.labels) != live["labels"]:
            raise BundleError(
                f"The bundle {source} has the labels {', '.join(bundle.manifest.labels)}; task "
                f"{task} has {', '.join(live['labels'])}."
            )
        # Other labels may go live before the sample does.
        params["expected"] = live["version"]
    return (
        yield Ask(
            "PUT",
            path("tasks", task, "heldout"),
            params=params,
            content=data,
            headers=change_headers(key, "application/octet-stream"),
        )
    )


def trust_key(
    public_key: str,
    *,
    name: str,
    tasks: Sequence[str] = ("*",),
    until: str | None = None,
    message: str = "",
    key: str | None = None,
) -> Steps[SigningKey]:
    """Trust a signing key, or change how far; from the first one on, pushes must be signed.

    Args:
        public_key: The text of a `NAME.pub`.
        tasks: For which it may sign: names with `*` and `?`.
        until: A date or a time, in UTC unless it says otherwise.
        key: Makes repeated calls one change; a new one for each call if it is not given.

    Raises:
        ClientError: the service said no.
    """
    wanted = {"public_key": public_key, "name": name, "tasks": list(tasks), "until": until}
    return (yield _command("POST", "/keys", {**wanted, "message": message}, key=key))


def revoke_key(key_id: str, *, message: str = "", key: str | None = None) -> Steps[SigningKey]:
    """Trust a signing key no more, for ever; what it signed stays live and is named.

    Raises:
        ClientError: the service said no.
    """
    params = {"message": message}
    return (yield Ask("DELETE", path("keys", key_id), params=params, headers=change_headers(key)))


def _command(
    method: str,
    path: str,
    fields: Mapping[str, object],
    *,
    key: str | None = None,
    params: Mapping[str, str] | None = None,
) -> Ask:
    # Not httpx's own JSON, which fails for what is not finite: the service says it better.
    content, headers = json.dumps(fields), change_headers(key, "application/json")
    return Ask(method, path, params=params, content=content, headers=headers)
