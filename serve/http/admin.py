"""What is live, its history, rollbacks and settings.

What is read here comes from the head log itself, so it is the fleet's and never goes back,
whichever replica answers.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict
from functools import partial
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from export.bundle import CARD, MAX_HELDOUT_BYTES, digest_of
from serve.heldout import read_heldout
from serve.http.access import caller_in
from serve.http.body import check_fields, json_object, read_body
from serve.http.changes import (
    FIELD_NAMES,
    MAX_COMMAND_BYTES,
    change_by,
    idempotency_key,
    malformed,
    share_of,
)
from serve.http.problems import RequestError, problem_of_refusal
from serve.http.query import check_parameters, number_in
from serve.http.shown import (
    described,
    heldouts_shown,
    replicas_shown,
    settings_shown,
    shown,
    swap_shown,
)
from serve.jobs import RetiredTaskError, UnknownTaskError
from serve.link import Link, LinkError
from serve.messages import Change, Outcome, Refused
from serve.record import LogView, TaskChange
from serve.replica import Replica
from serve.task_settings import SettingError, asked_settings
from serve.trunks import load_trunk_manifest

# What is live is known without the conductor, and is not to wait for one that is away.
CONDUCTOR_WAIT_S = 1.0


class Admin:
    """The administration routes of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def tasks(self, request: Request) -> Response:
        """What is live, of the tasks that the caller may read."""
        view, caller = await self._history(), caller_in(request)
        return JSONResponse(
            {
                "trunk": view.trunk.trunk if view.trunk else None,
                "log_number": view.number,
                "tasks": [
                    described(view, task) for task in sorted(view.tasks) if caller.may("read", task)
                ],
                "replicas": await self._replicas(),
            }
        )

    async def task(self, request: Request) -> Response:
        """What is live of one task."""
        view = await self._history()
        description = described(view, _known(view, request))
        live = view.tasks[request.path_params["task"]][-1].change
        if live.candidate is not None:
            description["rollout"] = await self._rollout(live)
        return JSONResponse(description)

    async def set_task(self, request: Request) -> Response:
        """Change settings of a task everywhere; answers with its description."""
        check_parameters(request, "message")
        try:
            asked = asked_settings(await json_object(request, max_bytes=MAX_COMMAND_BYTES))
        except SettingError as error:
            raise RequestError(400, str(error)) from error
        _known(await self._history(), request)
        message = request.query_params.get("message", "")
        change = _requested(request, settings=asked, message=message)
        return await self._describe(change)

    async def _describe(self, change: Change) -> Response:
        """Make a change that makes no version; the answer is the task's description after it."""
        outcome = await self._change(change)
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        view = await self._history()
        # As of the record that the key made: the same request again gets the same answer.
        return JSONResponse(described(view, change.task, after=view.keys[change.key]))

    async def versions(self, request: Request) -> Response:
        """Every version that the task ever had and every change of its settings, oldest first."""
        view = await self._history()
        task = _known(view, request)
        return JSONResponse(
            {
                "versions": [shown(view, version) for version in view.tasks[task]],
                "settings": settings_shown(view, task),
                "heldout": heldouts_shown(view, task),
            }
        )

    async def card(self, request: Request) -> Response:
        """The model card of the live bundle."""
        view = await self._history()
        last = view.tasks[_known(view, request)][-1]
        if last.change.bundle is None:
            raise RetiredTaskError(last.change.task, last.change.version, last.written_at)
        bundle = await asyncio.to_thread(self._replica.log.get_bundle, last.change.bundle)
        return Response(bundle.files[CARD], media_type="text/markdown")

    async def set_heldout(self, request: Request) -> Response:
        """Replace a task's held-out sample on purpose; answers with the task's description."""
        check_parameters(request, "message", "expected")
        data = await read_body(request, max_bytes=MAX_HELDOUT_BYTES)
        view = await self._history()
        task = _known(view, request)
        labels = view.tasks[task][-1].change.labels
        trunk, log = view.trunk, self._replica.log
        assert trunk is not None
        # What its key has made already may be of a trunk before.
        if not view.made_by(idempotency_key(request)):
            manifest = await asyncio.to_thread(load_trunk_manifest, log, trunk)
            size_px = manifest.preprocessing.size_px
            read = partial(read_heldout, size_px=size_px, num_labels=len(labels))
            await asyncio.to_thread(read, data)
        change = _requested(
            request,
            heldout=await asyncio.to_thread(digest_of, data),
            pictures=trunk.pictures,
            labels=labels,
            expected=number_in(request, "expected"),
            message=request.query_params.get("message", ""),
        )
        await asyncio.to_thread(log.put_blob, data)
        return await self._describe(change)

    async def promote(self, request: Request) -> Response:
        """Make the candidate of a rollout live, or give it another share."""
        command = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        check_fields(command, "share", "expected", "message")
        change = _requested(
            request,
            promote=True,
            share=share_of(command.get("share")),
            expected=_version(command, "expected"),
            message=command.get("message", ""),
        )
        return _answer(await self._change(change))

    async def rollback(self, request: Request) -> Response:
        """Make an older bundle live again, as a new version."""
        command = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        check_fields(command, "to", "expected", "message")
        # Said now if the store is away, which the conductor would wait for.
        await self._history()
        change = _requested(
            request,
            to=_version(command, "to"),
            expected=_version(command, "expected"),
            message=command.get("message", ""),
        )
        return _answer(await self._change(change))

    async def retire(self, request: Request) -> Response:
        """Let a task answer nothing any more, from one moment on and on every replica."""
        check_parameters(request, "message", "expected")
        await self._history()  # as for a rollback
        change = _requested(
            request,
            retires=True,
            expected=number_in(request, "expected"),
            message=request.query_params.get("message", ""),
        )
        return _answer(await self._change(change))

    async def metrics(self, _: Request) -> Response:
        """Prometheus text of the whole fleet."""
        text = await self._link.metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _replicas(self) -> dict[str, object] | None:
        """How many replicas there are, and why; None where no conductor can say so at once."""
        with contextlib.suppress(LinkError, TimeoutError):
            async with asyncio.timeout(CONDUCTOR_WAIT_S):
                return replicas_shown(await self._link.replicas())
        return None

    async def _rollout(self, live: TaskChange) -> dict[str, object]:
        """What is known of a candidate; without a conductor only what the log says."""
        candidate = live.candidate
        assert candidate is not None
        about: dict[str, object] = {"mode": live.action, **candidate.model_dump(mode="json")}
        with contextlib.suppress(LinkError):
            trial, judgement = await self._link.rollout(live)
            about |= {"seen": asdict(trial), "verdict": judgement.verdict}
            about |= {"reason": judgement.reason}
        return about

    async def _change(self, change: Change) -> Outcome:
        limit_s = self._replica.settings.request_timeout_s
        return await change_by(self._link, change, limit_s=limit_s)

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


def _answer(outcome: Outcome) -> Response:
    if isinstance(outcome, Refused):
        return problem_of_refusal(outcome)
    return JSONResponse(swap_shown(outcome))


def _requested(request: Request, **fields: Any) -> Change:
    """The change that a request asks for."""
    try:
        who = caller_in(request).name
        return Change(request.path_params["task"], idempotency_key(request), who=who, **fields)
    except ValidationError as error:
        raise malformed(error, FIELD_NAMES) from error


def _version(command: dict[str, object], field: str) -> int | None:
    value = command.get(field)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise RequestError(400, f"{field} is {value!r}; expected a version, 1 or higher.")
