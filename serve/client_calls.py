"""What a client asks of a service without changing it: predictions, and what is live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from serve.answers import (
    Diff,
    HeldoutChange,
    KnownBundle,
    Live,
    SettingsChange,
    SigningKeys,
    TaskDetails,
    TaskVersion,
)
from serve.client_sending import Ask, Steps


@dataclass(frozen=True)
class Prediction:
    """What one version of a task says of a picture.

    Args:
        label: Of the best score, whether it reaches a threshold or not.
        labels: Those that reach their threshold, if the task gives any number of labels.
    """

    task: str
    version: int
    bundle: str
    label: str
    score: float
    scores: dict[str, float]
    labels: list[str] | None = None


def predict(task: str, image: bytes | Path, *, top: int | None = None) -> Steps[Prediction]:
    """Ask one task of one picture (a JPEG, PNG or WebP file, or its bytes).

    Args:
        top: How many scores to return, the best first; all of them if it is not given.

    Raises:
        ClientError: the service said no.
    """
    params: dict[str, int] = {} if top is None else {"top": top}
    body = yield Ask("POST", path("predict", task), params=params, content=_bytes(image))
    return Prediction(**body)


def predict_tasks(
    tasks: Sequence[str] | None, image: bytes | Path, *, top: int | None = None
) -> Steps[list[Prediction]]:
    """Ask several tasks of one picture, or all of them (None), in one snapshot of versions.

    Args:
        top: How many scores of each to return, the best first; all of them if it is not given.

    Raises:
        ClientError: the service said no.
    """
    params: dict[str, str | int] = {"tasks": "*" if tasks is None else ",".join(tasks)}
    if top is not None:
        params["top"] = top
    body = yield Ask("POST", "/predict", params=params, content=_bytes(image))
    return [Prediction(**result) for result in body["results"]]


def tasks() -> Steps[Live]:
    """What is live.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", "/tasks"))


def metrics() -> Steps[str]:
    """What the fleet has counted, as Prometheus text.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", "/metrics"))


def task(task: str) -> Steps[TaskDetails]:
    """What is live of one task, and how its rollout does if there is one.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", path("tasks", task)))


def versions(task: str) -> Steps[list[TaskVersion]]:
    """Every version of a task, oldest first.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", path("tasks", task, "versions")))["versions"]


def history(task: str) -> Steps[list[TaskVersion | SettingsChange | HeldoutChange]]:
    """Every version of a task and every change of its settings and sample, oldest first.

    Raises:
        ClientError: the service said no.
    """
    told = yield Ask("GET", path("tasks", task, "versions"))
    entries = [*told["versions"], *told["settings"], *told["heldout"]]
    return sorted(entries, key=lambda entry: entry["record"])


def diff(task: str, a: int, b: int) -> Steps[Diff]:
    """What changed from one version of a task to another.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", path("tasks", task, "diff"), params={"a": a, "b": b}))


def bundle(digest: str) -> Steps[KnownBundle]:
    """The manifest of a bundle that was ever live, and the versions that had it.

    Args:
        digest: As answers name it, or its first eight digits or more.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", path("bundles", digest)))


def keys() -> Steps[SigningKeys]:
    """Every signing key that was ever trusted, and whether pushes have to be signed.

    Raises:
        ClientError: the service said no.
    """
    return (yield Ask("GET", "/keys"))


def path(*names: str) -> str:
    """A path of these names, whatever characters they have."""
    return "".join(f"/{quote(name, safe='')}" for name in names)


def _bytes(image: bytes | Path) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image
