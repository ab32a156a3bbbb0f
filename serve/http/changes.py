"""What all requests for a change have in common: their key, the conductor's answer, bad fields."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import ValidationError
from starlette.requests import Request

from serve.http.problems import RequestError
from serve.link import Link, LinkError
from serve.messages import AnyChange, Outcome

MAX_COMMAND_BYTES = 64 * 2**10
CONDUCTOR_TRIES = 10
CONDUCTOR_RETRY_S = 0.5


def idempotency_key(request: Request) -> str:
    """What makes a repeated request one change: the client's key, else the proxy's request id."""
    headers = request.headers
    return headers.get("idempotency-key") or headers.get("x-request-id") or uuid.uuid4().hex


async def change_by(link: Link, change: AnyChange) -> Outcome:
    """Ask the conductor; one that restarts is asked again, since a key changes things once.

    Raises:
        LinkError: it cannot be reached.
    """
    for attempt in range(CONDUCTOR_TRIES):
        try:
            return await link.change(change)
        except LinkError:
            if attempt == CONDUCTOR_TRIES - 1:
                raise
            await asyncio.sleep(CONDUCTOR_RETRY_S)
    raise AssertionError


def malformed(error: ValidationError, names: Mapping[int | str, str]) -> RequestError:
    """What is wrong with a field of a change.

    Args:
        names: Of the fields that are given by place.
    """
    problem = error.errors(include_url=False)[0]
    field = problem["loc"][-1] if problem["loc"] else "change"
    return RequestError(
        400, f"{names.get(field, field)} is {problem['input']!r:.100}: {problem['msg']}."
    )


def written(time: datetime) -> str:
    """A moment in UTC, as answers write it."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
