"""What all requests for a change have in common: their key, the conductor's answer, bad fields."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import ValidationError
from starlette.requests import Request

from serve.http.problems import RequestError
from serve.link import Link, LinkError
from serve.messages import AnyChange, Outcome, Refused, Swapped
from serve.timeline import CURRENT, step

MAX_COMMAND_BYTES = 64 * 2**10
FIELD_NAMES: dict[int | str, str] = {0: "task", 1: "idempotency-key"}  # of what is given by place
CONDUCTOR_TRIES = 10
PHASES = ("stage", "hold", "commit", "flip")
CONDUCTOR_RETRY_S = 0.5


def idempotency_key(request: Request) -> str:
    """What makes a repeated request one change: the client's key, else the proxy's request id."""
    headers = request.headers
    return headers.get("idempotency-key") or headers.get("x-request-id") or uuid.uuid4().hex


async def change_by(link: Link, change: AnyChange, *, limit_s: float) -> Outcome:
    """Ask for a change; one that is not decided within `limit_s` may still be made.

    A swap that was begun waits for its store, however long that is away.

    Raises:
        LinkError: the conductor cannot be reached.
    """
    asking = asyncio.ensure_future(_ask(link, change))
    with step("swap"):
        done, _ = await asyncio.wait({asking}, timeout=limit_s)
    if done:
        _note_phases(outcome := asking.result())
        return outcome
    return Refused(
        "unavailable",
        f"The change is not decided after {limit_s:g} s, and may still be made. Ask again with the "
        f"idempotency key {change.key!r}: it is made once.",
    )


def _note_phases(outcome: Outcome) -> None:
    """The phases of a swap that has just ended, as steps of the request that asked for it."""
    timeline = CURRENT.get()
    if timeline is None or not isinstance(outcome, Swapped):
        return
    ended_s = time.monotonic()
    # A change that was made before, by the same key, has no phases.
    for name, took_s in zip(PHASES[::-1], outcome.phases_s[::-1], strict=False):
        timeline.steps.append((name, ended_s - took_s, ended_s))
        ended_s -= took_s


async def _ask(link: Link, change: AnyChange) -> Outcome:
    """Ask the conductor; one that restarts is asked again, since a key changes things once."""
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


def share_of(value: object) -> float | None:
    """A share of the callers; None if none is asked for.

    Raises:
        RequestError: it is no number between 0 and 1.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and 0 < value < 1):
        return value
    raise RequestError(400, f"The share is {value!r:.40}; expected one above 0 and below 1.")


def written(time: datetime) -> str:
    """A moment in UTC, as answers write it."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
