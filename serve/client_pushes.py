"""What a client pushes: a bundle, several of one moment, or a trunk with all its heads.

Each push has a twin that only asks the gates, and says what the push would make.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import MANIFEST, TRUNK_MANIFEST, Bundle, read_trunk_folder
from export.sign import sign
from serve.answers import (
    DryRun,
    DryRunTogether,
    Swapped,
    SwappedTogether,
    TrunkDryRun,
    TrunkSwapped,
)
from serve.client_calls import path
from serve.client_sending import Ask, Steps, change_headers
from serve.references import stored_files

Parameters = dict[str, str | int | float]
DRY_RUN: Parameters = {"dry_run": "true"}


def push(
    bundle: Bundle | Path,
    *,
    task: str | None = None,
    message: str = "",
    new_labels: bool = False,
    canary: float | None = None,
    shadow: bool = False,
    key: str | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[Swapped]:
    """Push a bundle, its folder or its zip; returns when it is live on every replica.

    Args:
        task: The task to push to; the one that the bundle was made for if it is not given.
        new_labels: Declare that the labels are not those that are live.
        canary: Share of the callers, above 0 and below 1, that it answers for now.
        shadow: Let it answer nobody for now, and only be compared.
        key: Makes repeated pushes one change; a new one for each call if it is not given.
        sign_with: Signs the bundle for this task as of now; `export.keys` reads one. If it is
            not given the bundle goes as it is.

    Raises:
        ClientError: a gate said no, or another reason.
        BundleError: it is no bundle.
    """
    asked = _asked(new_labels, message=message) | _beside(canary, shadow=shadow)
    return (yield _one(bundle, task, asked, key, sign_with))


def try_push(
    bundle: Bundle | Path,
    *,
    task: str | None = None,
    new_labels: bool = False,
    canary: float | None = None,
    shadow: bool = False,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[DryRun]:
    """Only ask the gates, and say what `push` would make.

    Raises:
        ClientError: a gate said no, or another reason.
        BundleError: it is no bundle.
    """
    asked = _asked(new_labels) | _beside(canary, shadow=shadow) | DRY_RUN
    return (yield _one(bundle, task, asked, None, sign_with))


def push_together(
    bundles: Sequence[Bundle | Path],
    *,
    message: str = "",
    new_labels: bool = False,
    key: str | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[SwappedTogether]:
    """Push bundles of several tasks, each to the task that it was made for.

    They go live in one moment or none of them does; no answer mixes the old head of one with the
    new head of another.

    Args:
        new_labels, key, sign_with: See `push`.

    Raises:
        ClientError: a gate said no, or another reason.
        BundleError: one of them is no bundle.
    """
    return (yield _several(bundles, _asked(new_labels, message=message), key, sign_with))


def try_push_together(
    bundles: Sequence[Bundle | Path],
    *,
    new_labels: bool = False,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[DryRunTogether]:
    """Only ask the gates, and say what `push_together` would make.

    Raises:
        ClientError: a gate said no, or another reason.
        BundleError: one of them is no bundle.
    """
    return (yield _several(bundles, _asked(new_labels) | DRY_RUN, None, sign_with))


def push_trunk(
    trunk: Path,
    bundles: Sequence[Bundle | Path],
    *,
    message: str = "",
    new_labels: bool = False,
    key: str | None = None,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[TrunkSwapped]:
    """Put a new trunk in place of the one that is served, with a bundle of every live task.

    All of it goes live in one moment, and no request fails meanwhile.

    Args:
        trunk: Its folder.
        bundles: Made for this trunk: of every task that is live, and of others if you like.
        new_labels, key, sign_with: See `push`.

    Raises:
        ClientError: a live task has no bundle, a gate said no, or another reason.
        BundleError: it is no trunk, or one of the bundles is none.
    """
    return (yield _trunk(trunk, bundles, _asked(new_labels, message=message), key, sign_with))


def try_push_trunk(
    trunk: Path,
    bundles: Sequence[Bundle | Path],
    *,
    new_labels: bool = False,
    sign_with: Ed25519PrivateKey | None = None,
) -> Steps[TrunkDryRun]:
    """Only ask the gates, and say what `push_trunk` would make.

    Raises:
        ClientError: a live task has no bundle, a gate said no, or another reason.
        BundleError: it is no trunk, or one of the bundles is none.
    """
    return (yield _trunk(trunk, bundles, _asked(new_labels) | DRY_RUN, None, sign_with))


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


def _asked(new_labels: bool, *, message: str = "") -> Parameters:  # noqa: FBT001 (by name above)
    return {"message": message, "new_labels": str(new_labels).lower()}


def _beside(canary: float | None, *, shadow: bool) -> Parameters:
    share: Parameters = {} if canary is None else {"canary": canary}
    return {**share, "shadow": "true"} if shadow else share


def _one(
    bundle: Bundle | Path,
    task: str | None,
    asked: Parameters,
    key: str | None,
    signer: Ed25519PrivateKey | None,
) -> Ask:
    task, data = _ready(bundle, task, signer)
    headers = change_headers(key, "application/zip")
    return Ask("POST", path("tasks", task, "versions"), params=asked, content=data, headers=headers)


def _several(
    bundles: Sequence[Bundle | Path],
    asked: Parameters,
    key: str | None,
    signer: Ed25519PrivateKey | None,
) -> Ask:
    files = [_file(*_ready(bundle, None, signer)) for bundle in bundles]
    return Ask("POST", "/versions", params=asked, files=files, headers=change_headers(key))


def _trunk(
    trunk: Path,
    bundles: Sequence[Bundle | Path],
    asked: Parameters,
    key: str | None,
    signer: Ed25519PrivateKey | None,
) -> Ask:
    manifest, present = read_trunk_folder(trunk)
    names = (TRUNK_MANIFEST, *stored_files(manifest))
    contents = {**present, TRUNK_MANIFEST: (trunk / TRUNK_MANIFEST).read_bytes()}
    files = [("trunk", (name, contents[name], "application/octet-stream")) for name in names]
    files += [_file(*_ready(bundle, None, signer)) for bundle in bundles]
    return Ask("POST", "/trunks", params=asked, files=files, headers=change_headers(key))


def _ready(
    bundle: Bundle | Path, task: str | None, signer: Ed25519PrivateKey | None
) -> tuple[str, bytes]:
    """The task that a bundle goes to, and its zip, signed if there is a key."""
    if isinstance(bundle, Path):
        bundle = read_bundle(bundle)
    task = task or bundle.manifest.task
    if signer is not None:
        bundle = sign(bundle, signer, task=task, signed_at=datetime.now(UTC))
    return task, bundle.to_zip()


def _file(task: str, data: bytes) -> tuple[str, tuple[str, bytes, str]]:
    """A bundle as a file of a multipart body."""
    return "bundle", (f"{task}.zip", data, "application/zip")
