"""What is live, its history, pushes, rollbacks and settings.

What is read here comes from the head log itself, so it is the fleet's and never goes back,
whichever replica answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from export.bundle import CARD, Bundle, BundleError
from serve.http.body import json_object, read_body
from serve.http.changes import (
    MAX_COMMAND_BYTES,
    change_by,
    idempotency_key,
    malformed,
    written,
)
from serve.http.problems import RequestError, problem_of_refusal
from serve.jobs import UnknownTaskError
from serve.link import Link, LinkError
from serve.messages import Change, Refused, Swapped
from serve.record import LogView, TaskChange, TaskVersion, Verdict
from serve.replica import Replica
from serve.task_settings import DEFAULTS, SettingError, asked_settings

PUSH_PARAMETERS = ("canary", "message", "new_labels", "shadow")
FIELD_NAMES: dict[int | str, str] = {0: "task", 1: "idempotency-key"}  # of what is given by place


class Admin:
    """The administration routes of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def tasks(self, _: Request) -> Response:
        """What is live."""
        view = await self._history()
        return JSONResponse(
            {
                "trunk": view.trunk.trunk if view.trunk else None,
                "log_number": view.number,
                "tasks": [_described(view, task) for task in sorted(view.tasks)],
            }
        )

    async def task(self, request: Request) -> Response:
        """What is live of one task."""
        view = await self._history()
        described = _described(view, _known(view, request))
        live = view.tasks[request.path_params["task"]][-1].change
        if live.candidate is not None:
            described["rollout"] = await self._rollout(live)
        return JSONResponse(described)

    async def set_task(self, request: Request) -> Response:
        """Change settings of a task everywhere; answers with its description."""
        if unknown := sorted(set(request.query_params) - {"message"}):
            raise RequestError(400, f"Parameter {unknown[0]!r} is unknown; expected message.")
        try:
            asked = asked_settings(await json_object(request, max_bytes=MAX_COMMAND_BYTES))
        except SettingError as error:
            raise RequestError(400, str(error)) from error
        task = _known(await self._history(), request)
        message = request.query_params.get("message", "")
        change = _requested(request, settings=asked, message=message)
        outcome = await change_by(
            self._link, change, limit_s=self._replica.settings.request_timeout_s
        )
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        view = await self._history()
        # As of the record that the key made: the same request again gets the same answer.
        return JSONResponse(_described(view, task, after=view.keys[change.key]))

    async def versions(self, request: Request) -> Response:
        """Every version that the task ever had and every change of its settings, oldest first."""
        view = await self._history()
        task = _known(view, request)
        return JSONResponse(
            {
                "versions": [_shown(view, version) for version in view.tasks[task]],
                "settings": _settings_shown(view, task),
            }
        )

    async def card(self, request: Request) -> Response:
        """The model card of the live bundle."""
        view = await self._history()
        live = view.tasks[_known(view, request)][-1]
        bundle = await asyncio.to_thread(self._replica.log.get_bundle, live.change.bundle)
        return Response(bundle.files[CARD], media_type="text/markdown")

    async def push(self, request: Request) -> Response:
        """Admit a bundle and make it live everywhere."""
        # What is not understood is refused: the push would be live for more callers than meant.
        if unknown := sorted(set(request.query_params).difference(PUSH_PARAMETERS)):
            raise RequestError(
                400,
                f"Parameter {unknown[0]!r} is unknown; expected {', '.join(PUSH_PARAMETERS)}.",
            )
        share = _candidate_share(request)
        data = await read_body(request, max_bytes=self._replica.settings.max_bundle_bytes)
        if not data:
            raise RequestError(400, "The body is empty; send a bundle as application/zip.")
        try:
            bundle = await asyncio.to_thread(Bundle.of_zip, data)
        except BundleError as error:
            verdict = Verdict(gate="bundle", passed=False, reason=str(error))
            return problem_of_refusal(Refused("gate", str(error), (verdict,)))
        task = request.path_params["task"]
        verdicts, signed = await asyncio.to_thread(self._replica.admit, bundle, task)
        if not verdicts[-1].passed:
            return problem_of_refusal(Refused("gate", verdicts[-1].reason, verdicts))
        await asyncio.to_thread(self._replica.log.put_bundle, bundle)
        return await self._answer(
            _requested(
                request,
                bundle=bundle.digest,
                labels=bundle.manifest.labels,
                message=request.query_params.get("message", ""),
                verdicts=verdicts,
                signed=signed,
                allow_new_labels=_flag(request, "new_labels"),
                share=share,
            )
        )

    async def promote(self, request: Request) -> Response:
        """Make the candidate of a rollout live, or give it another share."""
        command = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        if unknown := sorted(set(command) - {"share", "expected", "message"}):
            raise RequestError(
                400, f"Field {unknown[0]!r} is unknown; expected share, expected, message."
            )
        return await self._answer(
            _requested(
                request,
                promote=True,
                share=_share(command.get("share")),
                expected=_version(command, "expected"),
                message=command.get("message", ""),
            )
        )

    async def rollback(self, request: Request) -> Response:
        """Make an older bundle live again, as a new version."""
        command = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        if unknown := sorted(set(command) - {"to", "expected", "message"}):
            raise RequestError(
                400, f"Field {unknown[0]!r} is unknown; expected to, expected, message."
            )
        # Said now if the store is away, which the conductor would wait for.
        await self._history()
        return await self._answer(
            _requested(
                request,
                to=_version(command, "to"),
                expected=_version(command, "expected"),
                message=command.get("message", ""),
            )
        )

    async def metrics(self, _: Request) -> Response:
        """Prometheus text of the whole fleet."""
        text = await self._link.metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _rollout(self, live: TaskChange) -> dict[str, object]:
        """What is known of a candidate; without a conductor only what the log says."""
        candidate = live.candidate
        assert candidate is not None
        shown: dict[str, object] = {"mode": live.action, **candidate.model_dump(mode="json")}
        with contextlib.suppress(LinkError):
            trial, judgement = await self._link.rollout(live)
            shown |= {"seen": asdict(trial), "verdict": judgement.verdict}
            shown |= {"reason": judgement.reason}
        return shown

    async def _answer(self, change: Change) -> Response:
        outcome = await change_by(
            self._link, change, limit_s=self._replica.settings.request_timeout_s
        )
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        return JSONResponse(_swapped(outcome))

    async def _history(self) -> LogView:
        return await asyncio.to_thread(self._replica.history)


def _known(view: LogView, request: Request) -> str:
    """The task that is asked for.

    Raises:
        UnknownTaskError: it was never pushed.
    """
    task: str = request.path_params["task"]
    if task not in view.tasks:
        raise UnknownTaskError(task, view.tasks)
    return task


def _described(view: LogView, task: str, *, after: int | None = None) -> dict[str, object]:
    """What is live of a task and its settings: now, or as of record `after`."""
    number = view.number if after is None else after
    history = reversed(view.set_tasks.get(task, ()))
    settings = next((s.change.settings for s in history if s.number <= number), DEFAULTS)
    return {**_shown(view, _live(view, task, number)), "settings": settings.model_dump()}


def _live(view: LogView, task: str, number: int) -> TaskVersion:
    """The version that was live after a record."""
    return next(v for v in reversed(view.tasks[task]) if v.number <= number)


def _shown(view: LogView, version: TaskVersion) -> dict[str, object]:
    change, signed = version.change, version.change.signed
    return {
        "task": change.task,
        "version": change.version,
        "action": change.action,
        "bundle": change.bundle,
        "labels": list(change.labels),
        "rolled_back_to": change.rolled_back_to,
        "signed_by": signed
        and {
            "name": view.signing_keys[signed.key_id].name,
            "key_id": signed.key_id,
            "signed_at": written(signed.signed_at),
        },
        "candidate": change.candidate.model_dump(mode="json") if change.candidate else None,
        "record": version.number,
        "written_at": version.written_at,
        "message": version.message,
        "idempotency_key": version.idempotency_key,
        "gates": [verdict.model_dump() for verdict in version.verdicts],
    }


def _settings_shown(view: LogView, task: str) -> list[dict[str, object]]:
    """Every change of a task's settings, with the version that was live then."""
    shown: list[dict[str, object]] = []
    before = DEFAULTS
    for made in view.set_tasks.get(task, ()):
        settings = made.change.settings
        shown.append(
            {
                "task": task,
                "version": _live(view, task, made.number).change.version,
                "action": "settings",
                "settings": settings.model_dump(),
                "changed": settings.different_from(before),
                "record": made.number,
                "written_at": made.written_at,
                "message": made.message,
                "idempotency_key": made.idempotency_key,
            }
        )
        before = settings
    return shown


def _swapped(swapped: Swapped) -> dict[str, object]:
    change = swapped.change
    assert change is not None  # only a trunk has none
    return {
        "task": change.task,
        "version": change.version,
        "bundle": change.bundle,
        "repeated": swapped.is_repeat,
        "swap": {
            "stage_ms": round(swapped.stage_ms, 3),
            "hold_ms": round(swapped.hold_ms, 3),
            "replicas": swapped.replicas,
        },
    }


def _requested(request: Request, **fields: Any) -> Change:
    """The change that a request asks for."""
    try:
        return Change(request.path_params["task"], idempotency_key(request), **fields)
    except ValidationError as error:
        raise malformed(error, FIELD_NAMES) from error


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in {"true", "false"}:
        raise RequestError(400, f"{name} is {value!r}; expected true or false.")
    return value == "true"


def _candidate_share(request: Request) -> float | None:
    """Of the callers, for a push that starts a rollout; None for one that is live at once."""
    if _flag(request, "shadow"):
        if "canary" in request.query_params:
            raise RequestError(400, "A push is either a canary or a shadow; name one of the two.")
        return 0.0
    value = request.query_params.get("canary")
    if value is None:
        return None
    try:
        return _share(float(value))
    except ValueError:
        return _share(value)


def _share(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and 0 < value < 1):
        return value
    raise RequestError(400, f"The share is {value!r:.40}; expected one above 0 and below 1.")


def _version(command: dict[str, object], field: str) -> int | None:
    value = command.get(field)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise RequestError(400, f"{field} is {value!r}; expected a version, 1 or higher.")
