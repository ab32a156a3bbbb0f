"""What a client asks of a service to change: pushes, rollbacks, settings, keys.

Each carries a key, which makes it one change however often it is sent.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import (
    HELDOUT,
    MANIFEST,
    TRUNK_MANIFEST,
    Bundle,
    BundleError,
    read_trunk_folder,
)
from export.sign import sign
from serve.client_calls import path
from serve.client_sending import Ask, Steps
from serve.references import stored_files


def push(
    bundle: Bundle | Path | Sequence[Bundle | Path],
    *,
    task: str | None = None,
    message: str = "",
    new_labels: bool = False,
    canary: float | None = None,
    shadow: bool = False,
    dry_run: bool = False,
    key: str | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[dict[str, Any]]:
    """Push a bundle, its folder or its zip; returns when it is live on every replica.

    Several bundles, one for each task, go live in one moment or none of them does; no answer mixes
    the old head of one with the new head of another.

    Args:
        bundle: One, or a list of several, which takes neither `task` nor `canary` or `shadow`.
        task: The task to push to; the one that the bundle was made for if it is not given.
        new_labels: Declare that the labels are not those that are live.
        canary: Share of the callers, above 0 and below 1, that it answers for now.
        shadow: Let it answer nobody for now, and only be compared.
        dry_run: Only ask the gates, and say what a push would make.
        key: Makes repeated pushes one change; a new one for each call if it is not given.
        sign_with: Signs the bundle for this task as of now; `export.keys` reads one. If it is
            not given the bundle goes as it is.

    Raises:
        ClientError: a gate said no, or another reason.
        BundleError: it is no bundle.
    """
    params = _push_parameters(message, new_labels=new_labels, dry_run=dry_run)
    if canary is not None:
        params["canary"] = canary
    if shadow:
        params["shadow"] = "true"
    if isinstance(bundle, Bundle | Path):
        task, data = _ready(bundle, task, sign_with)
        where, headers = path("tasks", task, "versions"), _headers(key, "application/zip")
        return (yield Ask("POST", where, params=params, content=data, headers=headers))
    if task is not None:
        raise BundleError("Several bundles go to the tasks that they were made for.")
    files = [_file(*_ready(one, None, sign_with)) for one in bundle]
    return (yield Ask("POST", "/versions", params=params, files=files, headers=_headers(key)))


def push_trunk(
    trunk: Path,
    bundles: Sequence[Bundle | Path],
    *,
    message: str = "",
    new_labels: bool = False,
    dry_run: bool = False,
    key: str | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[dict[str, Any]]:
    """Put a new trunk in place of the one that is served, with a bundle of every live task.

    All of it goes live in one moment, and no request fails meanwhile.

    Args:
        trunk: Its folder.
        bundles: Made for this trunk: of every task that is live, and of others if you like.
        new_labels: See `push`.
        dry_run: Only ask the gates, and say what would be made.
        key: Makes repeated pushes one change; a new one for each call if it is not given.
        sign_with: See `push`.

    Raises:
        ClientError: a live task has no bundle, a gate said no, or another reason.
        BundleError: it is no trunk, or one of the bundles is none.
    """
    manifest, present = read_trunk_folder(trunk)
    names = (TRUNK_MANIFEST, *stored_files(manifest))
    contents = {**present, TRUNK_MANIFEST: (trunk / TRUNK_MANIFEST).read_bytes()}
    files = [("trunk", (name, contents[name], "application/octet-stream")) for name in names]
    files += [_file(*_ready(one, None, sign_with)) for one in bundles]
    params = _push_parameters(message, new_labels=new_labels, dry_run=dry_run)
    return (yield Ask("POST", "/trunks", params=params, files=files, headers=_headers(key)))


def promote(
    task: str, *, share: float | None = None, expected: int | None = None, message: str = ""
) -> Steps[dict[str, Any]]:
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
) -> Steps[dict[str, Any]]:
    """Make an older version's bundle live again: that of `to`, or the one before.

    Args:
        expected: Refuse unless this version is live.

    Raises:
        ClientError: the service said no.
    """
    command = {"to": to, "expected": expected, "message": message}
    return (yield _command("POST", path("tasks", task, "rollback"), command))


def rollback_trunk(*, expected: str | None = None, message: str = "") -> Steps[dict[str, Any]]:
    """Serve the trunk again that was served before, with the bundles that were live on it.

    Args:
        expected: Refuse unless this trunk is served.

    Raises:
        ClientError: the service said no.
    """
    command = {"expected": expected, "message": message}
    return (yield _command("POST", "/trunks/rollback", command))


def retire(task: str, *, expected: int | None = None, message: str = "") -> Steps[dict[str, Any]]:
    """Let a task answer nothing any more; a push or a rollback makes it answer again.

    Args:
        expected: Refuse unless this version is live.

    Raises:
        ClientError: the service said no.
    """
    params = {"message": message, **({"expected": expected} if expected else {})}
    return (yield Ask("DELETE", path("tasks", task), params=params, headers=_headers(None)))


def set_task(
    task: str, settings: Mapping[str, object], *, message: str = "", key: str | None = None
) -> Steps[dict[str, Any]]:
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
) -> Steps[dict[str, Any]]:
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
            headers=_headers(key, "application/octet-stream"),
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
) -> Steps[dict[str, Any]]:
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


def revoke_key(key_id: str, *, message: str = "", key: str | None = None) -> Steps[dict[str, Any]]:
    """Trust a signing key no more, for ever; what it signed stays live and is named.

    Raises:
        ClientError: the service said no.
    """
    params = {"message": message}
    return (yield Ask("DELETE", path("keys", key_id), params=params, headers=_headers(key)))


def _ready(
    bundle: Bundle | Path, task: str | None, sign_with: Ed25519PrivateKey | None
) -> tuple[str, bytes]:
    """The task that a bundle goes to, and its zip, signed if there is a key."""
    if isinstance(bundle, Path):
        bundle = read_bundle(bundle)
    task = task or bundle.manifest.task
    if sign_with is not None:
        bundle = sign(bundle, sign_with, task=task, signed_at=datetime.now(UTC))
    return task, bundle.to_zip()


def _push_parameters(
    message: str, *, new_labels: bool, dry_run: bool
) -> dict[str, str | int | float]:
    asked: dict[str, str | int | float] = {
        "message": message,
        "new_labels": str(new_labels).lower(),
    }
    return asked | ({"dry_run": "true"} if dry_run else {})


def _file(task: str, data: bytes) -> tuple[str, tuple[str, bytes, str]]:
    """A bundle as a file of a multipart body."""
    return "bundle", (f"{task}.zip", data, "application/zip")


def read_bundle(path: Path) -> Bundle:
    """A bundle from its folder or its zip file.

    Raises:
        BundleError: it is no bundle.
        FileNotFoundError: there is nothing.
    """
    if path.is_dir() or not path.exists():
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(f"There is no bundle at {path}.")
        return Bundle.of_folder(path)
    return Bundle.of_zip(path.read_bytes())


def _command(
    method: str,
    path: str,
    fields: Mapping[str, object],
    *,
    key: str | None = None,
    params: Mapping[str, str] | None = None,
) -> Ask:
    # Not httpx's own JSON, which fails for what is not finite: the service says it better.
    content, headers = json.dumps(fields), _headers(key, "application/json")
    return Ask(method, path, params=params, content=content, headers=headers)


def _headers(key: str | None, content_type: str | None = None) -> dict[str, str]:
    headers = {"idempotency-key": key or uuid.uuid4().hex}
    return {**headers, "content-type": content_type} if content_type else headers
