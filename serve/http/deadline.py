"""How long a request may take, and waiting for its answer no longer than that."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import TypeVar

from starlette.requests import Request

from serve.http.problems import RequestError
from serve.jobs import DeadlineError
from serve.replica import Replica

T = TypeVar("T")
MAX_TIMEOUT_DIGITS = 12


def allowed_s(request: Request, replica: Replica, tasks: tuple[str, ...] | None) -> float:
    """How long the answer may take, from when the request is there.

    What the caller says counts, else the strictest deadline that is set for one of the tasks, else
    the service's.

    Args:
        tasks: Names, or None for all that are live.

    Raises:
        RequestError: the caller says no time, or one that is too long.
    """
    longest_s = replica.settings.request_timeout_s
    if (asked_s := _asked_s(request, longest_s)) is not None:
        return asked_s
    settings = replica.batcher.snapshot.settings
    asked = settings if tasks is None else settings.keys() & set(tasks)
    return min([longest_s, *(settings[task].deadline_s or longest_s for task in asked)])


async def answered(future: Future[T], deadline_s: float, allowed_s: float) -> T:
    """The answer, if it comes in time.

    A caller that goes away cancels this, and with it the rows that have not started.

    Args:
        deadline_s: As `time.monotonic` tells it.
        allowed_s: For the error.

    Raises:
        DeadlineError: it does not.
    """
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            return await asyncio.wrap_future(future)
    except (TimeoutError, DeadlineError):
        raise DeadlineError(allowed_s) from None


def _asked_s(request: Request, longest_s: float) -> float | None:
    value = request.headers.get("x-headstock-timeout-ms")
    if value is None:
        return None
    is_number = value.isdecimal() and value.isascii() and len(value) <= MAX_TIMEOUT_DIGITS
    if not is_number or not 1 <= int(value) <= 1000 * longest_s:
        raise RequestError(
            400,
            f"x-headstock-timeout-ms is {value!r:.20}; expected a whole number of milliseconds "
            f"from 1 to {1000 * longest_s:.0f}.",
        )
    return int(value) / 1000
