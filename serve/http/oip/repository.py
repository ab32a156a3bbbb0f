"""The model repository extension: which models there are, and letting a task answer or not.

The repository is the head log. To unload a task is to retire it, and to load it is to bring back
what it was before: changes of the log like any other, on every replica, once for each key. What a
task *is* changes by pushes alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.http.access import caller_in
from serve.http.body import json_object
from serve.http.changes import MAX_COMMAND_BYTES, change_by, idempotency_key
from serve.http.oip.errors import oip_error
from serve.http.oip.models import Model, asked_model, models_of
from serve.http.problems import STATUS_OF_REFUSAL, RequestError
from serve.jobs import RetiredTaskError, UnknownTaskError
from serve.link import Link
from serve.messages import Change, Refused
from serve.record import LogView
from serve.replica import Replica
from serve.versions import reason_of


class Repository:
    """The repository routes of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def index(self, request: Request) -> Response:
        """Every version of every model that answers, and why others do not."""
        asked = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        only_ready = asked.get("ready", False)
        if not isinstance(only_ready, bool):
            raise RequestError(400, f"ready is {only_ready!r:.40}; expected true or false.")
        view, caller = await self._history(), caller_in(request)
        entries = [
            entry
            for task in sorted(view.tasks)
            if caller.may("read", task)
            for model in models_of(task)
            for entry in self._entries(view, model)
            if not only_ready or entry["state"] == "READY"
        ]
        return JSONResponse(entries)

    async def load(self, request: Request) -> Response:
        """Bring a retired task back; one that answers is left as it is."""
        asked = await _parameters(request)
        if asked:
            raise RequestError(
                400,
                f"Parameter {min(asked)!r:.80} is not accepted: files and configuration of a "
                "model come in bundles, which have to pass the gates; push one to "
                "/tasks/TASK/versions.",
            )
        return await self._make(request, is_load=True)

    async def unload(self, request: Request) -> Response:
        """Retire a task; one that is retired is left as it is."""
        asked = await _parameters(request)
        # No model here depends on another, so both values mean the same.
        if unknown := sorted(set(asked) - {"unload_dependents"}):
            raise RequestError(
                400, f"Parameter {unknown[0]!r:.80} is unknown; expected unload_dependents."
            )
        return await self._make(request, is_load=False)

    async def _make(self, request: Request, *, is_load: bool) -> Response:
        task = _whole_task(asked_model(request))
        view = await self._history()
        last = view.last(task)
        if last is None:
            raise UnknownTaskError(task, view.tasks)
        if (view.live(task) is not None) == is_load:
            return Response()
        change = Change(
            task,
            idempotency_key(request),
            expected=last.change.version,
            retires=not is_load,
            message="loaded" if is_load else "unloaded",
            who=caller_in(request).name,
        )
        limit_s = self._replica.settings.request_timeout_s
        outcome = await change_by(self._link, change, limit_s=limit_s)
        if isinstance(outcome, Refused):
            # Somebody else may have done the same meanwhile.
            view = await self._history()
            if (view.live(task) is not None) != is_load:
                return oip_error(STATUS_OF_REFUSAL[outcome.kind], outcome.reason)
        return Response()

    def _entries(self, view: LogView, model: Model) -> Iterator[dict[str, str]]:
        last = view.tasks[model.task][-1]
        of_all = model.reason_against(self._replica.batcher.snapshot.heads.get(model.task))
        if last.change.bundle is None:
            of_all = str(RetiredTaskError(model.task, last.change.version, last.written_at))
        for version in model.listed(view) or (last,):
            reason = of_all or reason_of(view, version)
            yield {
                "name": model.name,
                "version": str(version.change.version),
                "state": "UNAVAILABLE" if reason else "READY",
                "reason": reason,
            }

    async def _history(self) -> LogView:
        return await asyncio.to_thread(self._replica.history)


async def _parameters(request: Request) -> dict[str, object]:
    body = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, f"parameters is {parameters!r:.40}; expected an object.")
    return parameters


def _whole_task(model: Model) -> str:
    if model.kind:
        raise RequestError(
            400, f"{model.name!r} is loaded and unloaded with its task, {model.task!r}."
        )
    return model.task
