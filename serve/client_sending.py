"""How a client's request is sent and its answer read: what is sent again, when, what went wrong.

Every request may be sent again: a prediction changes nothing, and a change carries a key of its own
that makes it one change however often it arrives.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

TRIES = 4
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
NOT_NOW = frozenset({429, 503})


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
class Ask:
    """One request, as httpx takes it.

    Args:
        files: Of a multipart body: field, and name, bytes and type of each.
    """

    method: str
    path: str
    params: Mapping[str, str | int | float] | None = None
    content: bytes | str | None = None
    headers: Mapping[str, str] | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = None

    def options(self) -> dict[str, Any]:
        """What httpx's `request` takes beside method and path."""
        return {
            "params": self.params,
            "content": self.content,
            "headers": self.headers,
            "files": self.files,
        }


# A call of the API: yields requests, is sent the JSON of each answer, returns what the caller gets.
# Neither client is known to it, so the one that waits and the one that awaits share every call.
Steps = Generator[Ask, Any, T]


def wait_s(
    outcome: httpx.Response | httpx.TransportError, *, attempt: int, tries: int, left_s: float
) -> float | None:
    """How long to wait before a request is sent again; None if this outcome stands.

    Sent again are requests whose connection broke, and those that were answered by "not now" and
    when to come back. The wait is drawn anew each time, so that callers who were turned away
    together do not come back together.

    Args:
        attempt: How often it has been sent, 1 or more.
        tries: How often it may be sent.
        left_s: Time that the caller still has.

    Source: "full jitter" of Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    asked_s = 0.0
    if isinstance(outcome, httpx.Response):
        after = outcome.headers.get("retry-after", "")
        if outcome.status_code not in NOT_NOW or not after.isdecimal():
            return None
        asked_s = float(after)
    most_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
    wait_s = asked_s + random.uniform(0, most_s)  # noqa: S311 (no secret)
    return wait_s if attempt < tries and wait_s < left_s else None


def read(outcome: httpx.Response | httpx.TransportError, url: str) -> Any:
    """The JSON of an answer, or its text if it is no JSON.

    Raises:
        ClientError: there is none, or the service said no.
    """
    if isinstance(outcome, httpx.TransportError):
        raise ClientError(
            0, f"{url} does not answer: {outcome or type(outcome).__name__}."
        ) from outcome
    if outcome.is_success:
        is_text = outcome.headers.get("content-type", "").startswith("text/plain")
        return outcome.text if is_text else outcome.json()
    if outcome.headers.get("content-type") == "application/problem+json":
        problem = outcome.json()
        raise ClientError(outcome.status_code, problem["detail"], problem.get("gates", ()))
    raise ClientError(
        outcome.status_code,
        f"{outcome.url} answers {outcome.status_code}: {outcome.text[:200]}",
    )


def change_headers(key: str | None, content_type: str | None = None) -> dict[str, str]:
    """Those of a change: its key, a new one unless given, and the type of its body."""
    headers = {"idempotency-key": key or uuid.uuid4().hex}
    return {**headers, "content-type": content_type} if content_type else headers
