"""The keys that may sign bundles: who is trusted, for which tasks, since when."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from export.keys import KeyFileError, read_public_key
from export.sign import key_id_of
from serve.http.access import caller_in
from serve.http.body import check_fields, json_object
from serve.http.changes import MAX_COMMAND_BYTES, change_by, idempotency_key, malformed, written
from serve.http.problems import RequestError, problem_of_refusal
from serve.http.query import check_parameters
from serve.link import Link
from serve.messages import KeyRequest, Refused
from serve.record import KeyVersion, LogView
from serve.replica import Replica
from serve.trust import KeyChange, valid_until

FIELDS = ("public_key", "name", "tasks", "until", "message")


class Keys:
    """The routes about signing keys of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def keys(self, _: Request) -> Response:
        """Every key that was ever trusted, and whether pushes have to be signed."""
        view = await asyncio.to_thread(self._replica.history)
        shown = [_described(view, key_id) for key_id in view.key_history]
        return JSONResponse(
            {
                "signatures_required": bool(shown),
                "keys": sorted(shown, key=lambda k: str(k["name"])),
            }
        )

    async def trust(self, request: Request) -> Response:
        """Trust a key, or change for what and until when it is trusted."""
        fields = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        check_fields(fields, *FIELDS)
        message = fields.get("message", "")
        return await self._answer(request, _trusted(fields), message)

    async def revoke(self, request: Request) -> Response:
        """Trust a key no more; answers with the live versions that it signed, which stay live."""
        check_parameters(request, "message")
        return await self._answer(request, None, request.query_params.get("message", ""))

    async def _answer(self, request: Request, trust: KeyChange | None, message: object) -> Response:
        key_id = trust.key_id if trust else request.path_params["key_id"]
        who = caller_in(request).name
        asked: dict[str, Any] = {"key_id": key_id, "trust": trust, "message": message, "who": who}
        try:
            change = KeyRequest(key=idempotency_key(request), **asked)
        except ValidationError as error:
            raise malformed(error, {"key": "idempotency-key"}) from error
        outcome = await change_by(
            self._link, change, limit_s=self._replica.settings.request_timeout_s
        )
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        view = await asyncio.to_thread(self._replica.history)
        # As of the record that the key made: the same request again gets the same answer.
        return JSONResponse(_described(view, change.key_id, after=view.keys.get(change.key)))


def _trusted(fields: dict[str, object]) -> KeyChange:
    """The key that is to be trusted, and how far.

    Raises:
        RequestError: a field is missing or cannot be what it is.
    """
    pem, until, tasks = fields.get("public_key"), fields.get("until"), fields.get("tasks", ["*"])
    if not isinstance(pem, str):
        raise RequestError(400, "public_key is missing; expected the text of a NAME.pub.")
    if not isinstance(tasks, list):
        raise RequestError(400, f"tasks is {tasks!r:.100}; expected a list, as in ['pets*'].")
    try:
        raw = read_public_key(pem.encode(errors="replace"))
        return KeyChange.model_validate(
            {
                "key_id": key_id_of(raw),
                "public_key": base64.b64encode(raw).decode(),
                "name": fields.get("name"),
                "tasks": tasks,
                "valid_until": _until(until),
            }
        )
    except KeyFileError as error:
        raise RequestError(400, f"public_key: {error}") from error
    except ValidationError as error:
        raise malformed(error, {0: "tasks"}) from error


def _until(until: object) -> datetime | None:
    if until is None:
        return None
    try:
        return valid_until(str(until))
    except ValueError as error:
        raise RequestError(
            400, f"until is {until!r:.100}; expected a date or a time, as in 2027-01-01."
        ) from error


def _described(view: LogView, key_id: str, *, after: int | None = None) -> dict[str, object]:
    """How far a key is trusted: now, or as of record `after`."""
    number = view.number if after is None else after
    history = [version for version in view.key_history[key_id] if version.number <= number]
    key = history[-1].change
    return {
        "key_id": key.key_id,
        "name": key.name,
        "state": key.state(datetime.now(UTC)),
        "tasks": list(key.tasks),
        "valid_until": key.valid_until and written(key.valid_until),
        "public_key": key.public_key,
        "signed_live": _signed_live(view, key_id),
        "history": [_shown(version) for version in history],
    }


def _signed_live(view: LogView, key_id: str) -> list[dict[str, object]]:
    """The live versions of which a key signed the bundle or the candidate."""
    shown: list[dict[str, object]] = []
    for task in sorted(view.tasks):
        live = view.tasks[task][-1].change
        sides = (live.signed, live.candidate.signed if live.candidate else None)
        if any(signed and signed.key_id == key_id for signed in sides):
            shown.append({"task": task, "version": live.version})
    return shown


def _shown(version: KeyVersion) -> dict[str, object]:
    key = version.change
    return {
        "action": "revoke" if key.is_revoked else "trust",
        "name": key.name,
        "tasks": list(key.tasks),
        "valid_until": key.valid_until and written(key.valid_until),
        "record": version.number,
        "written_at": version.written_at,
        "message": version.message,
        "who": version.who,
        "idempotency_key": version.idempotency_key,
    }
