"""The tokens that open this service: who has one, for what, until when."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.access import TokenChange
from serve.http.access import caller_in
from serve.http.body import check_fields, json_object
from serve.http.changes import MAX_COMMAND_BYTES, change_by, idempotency_key, malformed, written
from serve.http.problems import RequestError, problem_of_refusal
from serve.http.query import check_parameters
from serve.link import Link
from serve.messages import Refused, TokenRequest
from serve.record import LogView, TokenVersion
from serve.replica import Replica

FIELDS = ("token_id", "sha256", "name", "scopes", "valid_until", "rate_per_s", "message")


class Tokens:
    """The routes about access tokens of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def tokens(self, _: Request) -> Response:
        """Every token that was ever made, and whether one is asked for."""
        view = await asyncio.to_thread(self._replica.history)
        shown = [_described(view, token_id) for token_id in view.token_history]
        return JSONResponse(
            {
                "tokens_required": self._replica.settings.needs_tokens,
                "tokens": sorted(shown, key=lambda token: str(token["name"])),
            }
        )

    async def make(self, request: Request) -> Response:
        """Take a token that the caller has made; only its digest comes here."""
        fields = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        check_fields(fields, *FIELDS)
        message = fields.pop("message", "")
        try:
            token = TokenChange.model_validate(fields)
        except ValidationError as error:
            raise malformed(error, {0: "scopes"}) from error
        if token.state(datetime.now(UTC)) == "expired":
            raise RequestError(400, f"valid_until is {fields['valid_until']!r:.100}: it is past.")
        return await self._answer(request, token.token_id, token, message)

    async def revoke(self, request: Request) -> Response:
        """Let a token open nothing any more, on every replica when this answers."""
        check_parameters(request, "message")
        message = request.query_params.get("message", "")
        return await self._answer(request, request.path_params["token_id"], None, message)

    async def _answer(
        self, request: Request, token_id: str, token: TokenChange | None, message: object
    ) -> Response:
        who = caller_in(request).name
        asked: dict[str, Any] = {"token": token, "message": message, "who": who}
        try:
            change = TokenRequest(token_id=token_id, key=idempotency_key(request), **asked)
        except ValidationError as error:
            raise malformed(error, {"key": "idempotency-key"}) from error
        outcome = await change_by(
            self._link, change, limit_s=self._replica.settings.request_timeout_s
        )
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        view = await asyncio.to_thread(self._replica.history)
        # As of the record that the key made: the same request again gets the same answer.
        return JSONResponse(_described(view, token_id, after=view.keys.get(change.key)))


def _described(view: LogView, token_id: str, *, after: int | None = None) -> dict[str, object]:
    """What a token is for: now, or as of record `after`."""
    number = view.number if after is None else after
    history = [version for version in view.token_history[token_id] if version.number <= number]
    token = history[-1].change
    return {
        "token_id": token.token_id,
        "name": token.name,
        "state": token.state(datetime.now(UTC)),
        "scopes": list(token.scopes),
        "valid_until": token.valid_until and written(token.valid_until),
        "rate_per_s": token.rate_per_s,
        "history": [_shown(version) for version in history],
    }


def _shown(version: TokenVersion) -> dict[str, object]:
    return {
        "action": "revoke" if version.change.is_revoked else "make",
        "record": version.number,
        "written_at": version.written_at,
        "message": version.message,
        "who": version.who,
        "idempotency_key": version.idempotency_key,
    }
