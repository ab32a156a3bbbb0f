"""The whole log, where a bundle came from, and what changed between two versions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from export.bundle import Digest, read_manifest
from serve.diff import diff
from serve.http.access import caller_in
from serve.http.problems import RequestError
from serve.http.query import check_parameters, number_in
from serve.http.shown import shown
from serve.jobs import UnknownTaskError
from serve.record import LogView, Record, TaskVersion
from serve.replica import Replica

LEAST_DIGITS = 8  # of a shortened digest
RECORDS_AT_ONCE = 64


class Audit:
    """The routes of one replica that look back."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def log(self, request: Request) -> Response:
        """Every record as it was written, one a line; its sha256 is what the next one names."""
        check_parameters(request, "after")
        number = (number_in(request, "after", least=0) or 0) + 1
        first = await self._records(number)  # an error now is an answer, and later a torn one
        return StreamingResponse(self._lines(first), media_type="application/x-ndjson")

    async def bundle(self, request: Request) -> Response:
        """The manifest of a bundle that was ever live, and where it was, as far as he may read."""
        view = await asyncio.to_thread(self._replica.history)
        readable = [v for v in _versions(view) if caller_in(request).may("read", v.change.task)]
        digest = _known_digest(readable, request.path_params["digest"])
        manifest = read_manifest(await asyncio.to_thread(self._replica.log.get_blob, digest))
        versions = sorted(readable, key=lambda version: version.number)
        return JSONResponse(
            {
                "bundle": digest,
                "manifest": manifest.model_dump(mode="json"),
                "used": [
                    {
                        "task": version.change.task,
                        "version": version.change.version,
                        "action": version.change.action,
                        "is_live": view.live(version.change.task) == version,
                        "record": version.number,
                        "written_at": version.written_at,
                        "message": version.message,
                    }
                    for version in versions
                    if digest in _bundles(version)
                ],
            }
        )

    async def diff(self, request: Request) -> Response:
        """What changed from version `a` of a task to version `b`."""
        check_parameters(request, "a", "b")
        view = await asyncio.to_thread(self._replica.history)
        task = request.path_params["task"]
        if task not in view.tasks:
            raise UnknownTaskError(task, view.tasks)
        versions = {side: _version(view, task, request, side) for side in ("a", "b")}
        # Of a rollout, what it tries: what answers beside it is the version before.
        digests = [_bundles(version)[-1] for version in versions.values()]
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._replica.examiner, self._diff, *digests)
        for side, version in versions.items():
            found[side] = {**shown(view, version), **found[side]}
        return JSONResponse({"task": task, **found})

    def _diff(self, *digests: Digest) -> dict[str, Any]:
        a, b = map(self._replica.log.get_bundle, digests)
        return diff(a, b, self._replica.engine)

    async def _records(self, first: int) -> list[Record]:
        """The next few, as far as there are any."""
        log = self._replica.log
        numbers = range(first, first + RECORDS_AT_ONCE)
        found = await asyncio.to_thread(log.of_each, log.get_record, numbers)
        end = found.index(None) if None in found else len(found)
        return [record for record in found[:end] if record is not None]

    async def _lines(self, records: list[Record]) -> AsyncIterator[bytes]:
        while records:
            yield b"".join(record.to_bytes() + b"\n" for record in records)
            records = await self._records(records[-1].number + 1)


def _versions(view: LogView) -> Iterator[TaskVersion]:
    return (version for history in view.tasks.values() for version in history)


def _bundles(version: TaskVersion) -> list[Digest]:
    """What answers in a version, and what it tries in a rollout."""
    change = version.change
    return [side.bundle for side in (change, change.candidate) if side and side.bundle]


def _known_digest(versions: Sequence[TaskVersion], asked: str) -> Digest:
    """The one bundle that a digest, or the beginning of one, names.

    Raises:
        RequestError: none that was ever live, or several.
    """
    start = asked.removeprefix("sha256:")
    bundles = {bundle for version in versions for bundle in _bundles(version)}
    found = sorted(b for b in bundles if b.removeprefix("sha256:").startswith(start))
    if len(start) < LEAST_DIGITS:
        raise RequestError(
            400, f"The digest {asked!r:.80} is too short; expected {LEAST_DIGITS} digits or more."
        )
    if not found:
        raise RequestError(404, f"No bundle {asked!r:.80} was ever live here.")
    if len(found) > 1:
        raise RequestError(400, f"The digest {asked!r:.80} begins several bundles: {found}.")
    return found[0]


def _version(view: LogView, task: str, request: Request, name: str) -> TaskVersion:
    """The version that a parameter names.

    Raises:
        RequestError: it is missing, there is no such version, or it has no bundle.
    """
    number = number_in(request, name)
    if number is None:
        raise RequestError(400, f"{name} is missing; expected a version, as in ?a=1&b=2.")
    history = view.tasks[task]
    found = next((v for v in history if v.change.version == number), None)
    if found is None:
        last = history[-1].change.version
        raise RequestError(404, f"Task {task} has no version {number}; it has 1 to {last}.")
    if found.change.bundle is None:
        raise RequestError(404, f"Version {number} of task {task} retired it and has no bundle.")
    return found
