"""A client of the service: predictions, pushes, and what is live."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import HELDOUT, MANIFEST, Bundle, BundleError
from export.sign import sign

TRIES = 3


class ClientError(Exception):
    """The service said no, or did not answer.

    Args:
        status: HTTP status, 0 if there was no answer.
        gates: Verdicts of the admission gates, for a push that was refused.
    """

    def __init__(self, status: int, detail: str, gates: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(detail)
        self.status, self.gates = status, gates


@dataclass(frozen=True)
class Prediction:
    """What one version of a task says of a picture."""

    task: str
    version: int
    bundle: str
    label: str
    score: float
    scores: dict[str, float]


class Client:
    """Talks to one service.

    Every request is safe to repeat, predictions because they change nothing and changes because
    each carries a key of its own; so one whose connection broke is sent again, a few times.

    Args:
        url: Where the service answers, as `headstock serve` prints it.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=timeout_s)

    # Not Self: the shape checks of the tests wrap methods one by one, and Self needs the class.
    def __enter__(self) -> Client:  # noqa: PYI034
        """Use the client for a while."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its connections."""
        self._http.close()

    def predict(self, task: str, image: bytes | Path) -> Prediction:
        """Ask one task of one picture (a JPEG, PNG or WebP file, or its bytes).

        Raises:
            ClientError: the service said no.
        """
        return Prediction(**self._send("POST", f"/predict/{task}", content=_bytes(image)))

    def predict_tasks(self, tasks: Sequence[str] | None, image: bytes | Path) -> list[Prediction]:
        """Ask several tasks of one picture, or all of them (None), in one snapshot of versions.

        Raises:
            ClientError: the service said no.
        """
        names = "*" if tasks is None else ",".join(tasks)
        body = self._send("POST", "/predict", params={"tasks": names}, content=_bytes(image))
        return [Prediction(**result) for result in body["results"]]

    def push(
        self,
        bundle: Bundle | Path,
        *,
        task: str | None = None,
        message: str = "",
        new_labels: bool = False,
        canary: float | None = None,
        shadow: bool = False,
        dry_run: bool = False,
        key: str | None = None,
        sign_with: Ed25519PrivateKey | None = None,
    ) -> dict[str, Any]:
        """Push a bundle, its folder or its zip; returns when it is live on every replica.

        Args:
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
        if isinstance(bundle, Path):
            bundle = read_bundle(bundle)
        task = task or bundle.manifest.task
        if sign_with is not None:
            bundle = sign(bundle, sign_with, task=task, signed_at=datetime.now(UTC))
        params = {"message": message, "new_labels": str(new_labels).lower()}
        if canary is not None:
            params["canary"] = str(canary)
        if shadow:
            params["shadow"] = "true"
        if dry_run:
            params["dry_run"] = "true"
        return self._send(
            "POST",
            f"/tasks/{task}/versions",
            params=params,
            content=bundle.to_zip(),
            headers={"content-type": "application/zip", "idempotency-key": key or uuid.uuid4().hex},
        )

    def promote(
        self,
        task: str,
        *,
        share: float | None = None,
        expected: int | None = None,
        message: str = "",
    ) -> dict[str, Any]:
        """Make the candidate of a rollout live, or let it answer another share of the callers.

        Args:
            share: Above 0 and below 1; it goes live for all if this is not given.
            expected: Refuse unless this version is live.

        Raises:
            ClientError: the service said no.
        """
        command = {"share": share, "expected": expected, "message": message}
        return self._command(f"/tasks/{task}/promote", command)

    def task(self, task: str) -> dict[str, Any]:
        """What is live of one task, and how its rollout does if there is one.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", f"/tasks/{task}")

    def rollback(
        self, task: str, *, to: int | None = None, expected: int | None = None, message: str = ""
    ) -> dict[str, Any]:
        """Make an older version's bundle live again: that of `to`, or the one before.

        Args:
            expected: Refuse unless this version is live.

        Raises:
            ClientError: the service said no.
        """
        command = {"to": to, "expected": expected, "message": message}
        return self._command(f"/tasks/{task}/rollback", command)

    def retire(
        self, task: str, *, expected: int | None = None, message: str = ""
    ) -> dict[str, Any]:
        """Let a task answer nothing any more; a push or a rollback makes it answer again.

        Args:
            expected: Refuse unless this version is live.

        Raises:
            ClientError: the service said no.
        """
        parameters = {"message": message, **({"expected": expected} if expected else {})}
        return self._send(
            "DELETE",
            f"/tasks/{task}",
            params=parameters,
            headers={"idempotency-key": uuid.uuid4().hex},
        )

    def set_task(
        self,
        task: str,
        settings: Mapping[str, object],
        *,
        message: str = "",
        key: str | None = None,
    ) -> dict[str, Any]:
        """Change settings of a task; returns what is live of it when every replica has them.

        Args:
            settings: Those that change, as in `{"weight": 2, "pinned": True}`; see `TaskSettings`.
            key: Makes repeated calls one change; a new one for each call if it is not given.

        Raises:
            ClientError: the service said no.
        """
        return self._send(
            "PATCH",
            f"/tasks/{task}",
            params={"message": message},
            # Not httpx's own JSON, which fails for what is not finite: the service says it better.
            content=json.dumps(settings),
            headers={
                "content-type": "application/json",
                "idempotency-key": key or uuid.uuid4().hex,
            },
        )

    def trust_key(
        self,
        public_key: str,
        *,
        name: str,
        tasks: Sequence[str] = ("*",),
        until: str | None = None,
        message: str = "",
        key: str | None = None,
    ) -> dict[str, Any]:
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
        return self._send(
            "POST",
            "/keys",
            json={**wanted, "message": message},
            headers={"idempotency-key": key or uuid.uuid4().hex},
        )

    def revoke_key(
        self, key_id: str, *, message: str = "", key: str | None = None
    ) -> dict[str, Any]:
        """Trust a signing key no more, for ever; what it signed stays live and is named.

        Raises:
            ClientError: the service said no.
        """
        return self._send(
            "DELETE",
            f"/keys/{key_id}",
            params={"message": message},
            headers={"idempotency-key": key or uuid.uuid4().hex},
        )

    def keys(self) -> dict[str, Any]:
        """Every signing key that was ever trusted, and whether pushes have to be signed.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", "/keys")

    def set_heldout(
        self, task: str, source: Path, *, message: str = "", key: str | None = None
    ) -> dict[str, Any]:
        """Replace a task's held-out sample; returns what is live of the task.

        Args:
            source: `heldout.safetensors`, or a bundle that holds one and has the task's labels.
            key: Makes repeated calls one change; a new one for each call if it is not given.

        Raises:
            ClientError: the service said no.
            BundleError: the bundle has no sample, or other labels than the task.
            FileNotFoundError: there is nothing.
        """
        parameters: dict[str, str | int] = {"message": message}
        if source.suffix == ".safetensors":
            data = source.read_bytes()
        else:
            bundle, live = read_bundle(source), self._send("GET", f"/tasks/{task}")
            data = bundle.files.get(HELDOUT, b"")
            if not data:
                raise BundleError(f"The bundle {source} has no {HELDOUT}.")
            if list(bundle.manifest.labels) != live["labels"]:
                raise BundleError(
                    f"The bundle {source} has the labels {', '.join(bundle.manifest.labels)}; task "
                    f"{task} has {', '.join(live['labels'])}."
                )
            # Other labels may go live before the sample does.
            parameters["expected"] = live["version"]
        return self._send(
            "PUT",
            f"/tasks/{task}/heldout",
            params=parameters,
            content=data,
            headers={
                "content-type": "application/octet-stream",
                "idempotency-key": key or uuid.uuid4().hex,
            },
        )

    def tasks(self) -> dict[str, Any]:
        """What is live.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", "/tasks")

    def versions(self, task: str) -> list[dict[str, Any]]:
        """Every version of a task, oldest first.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", f"/tasks/{task}/versions")["versions"]

    def history(self, task: str) -> list[dict[str, Any]]:
        """Every version of a task and every change of its settings and sample, oldest first.

        Raises:
            ClientError: the service said no.
        """
        told = self._send("GET", f"/tasks/{task}/versions")
        entries = [*told["versions"], *told["settings"], *told["heldout"]]
        return sorted(entries, key=lambda entry: entry["record"])

    def log(self, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every record of the head log after that number, oldest first, as it arrives.

        Raises:
            ClientError: the service said no, or stopped in the middle.
        """
        try:
            with self._http.stream("GET", "/log", params={"after": after}) as response:
                if not response.is_success:
                    response.read()
                    _body(response)
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx.TransportError as error:
            raise ClientError(0, f"{self.url} stopped answering: {error}.") from error

    def bundle(self, digest: str) -> dict[str, Any]:
        """The manifest of a bundle that was ever live, and the versions that had it.

        Args:
            digest: As answers name it, or its first eight digits or more.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", f"/bundles/{digest}")

    def diff(self, task: str, a: int, b: int) -> dict[str, Any]:
        """What changed from one version of a task to another.

        Raises:
            ClientError: the service said no.
        """
        return self._send("GET", f"/tasks/{task}/diff", params={"a": a, "b": b})

    def _command(self, path: str, command: dict[str, Any]) -> dict[str, Any]:
        """A change that is asked for once, however often it has to be sent."""
        headers = {"idempotency-key": uuid.uuid4().hex}
        return self._send("POST", path, json=command, headers=headers)

    def _send(self, method: str, path: str, **content: Any) -> Any:
        for attempt in range(1, TRIES + 1):
            try:
                response = self._http.request(method, path, **content)
            except httpx.TransportError as error:
                if attempt < TRIES:
                    continue
                raise ClientError(
                    0, f"{self.url} does not answer: {error or type(error).__name__}."
                ) from error
            return _body(response)
        raise AssertionError


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


def _bytes(image: bytes | Path) -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image


def _body(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json()
    if response.headers.get("content-type") == "application/problem+json":
        problem = response.json()
        raise ClientError(response.status_code, problem["detail"], problem.get("gates", ()))
    raise ClientError(
        response.status_code,
        f"{response.url} answers {response.status_code}: {response.text[:200]}",
    )
