"""How a route is described: what it takes and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """Something in the path, behind the question mark or among the headers.

    Args:
        where: "path", "query" or "header".
        type: As pydantic takes it.
    """

    name: str
    where: str
    type: Any
    description: str
    example: object = None
    is_required: bool = False


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Args:
        tag: Under which heading it is shown.
        answer: Type of the JSON that it answers, or None if it answers something else.
        media_type: Of the answer; "": it has no body.
        also: Other media types of the answer, as bytes.
        body: Media type of a request to the type of its JSON, or to the names of a form's fields
            for files, of which the first is needed; None: bytes of that media type.
        parameters: All but the path's.
        errors: Statuses that it may answer beside 200 and what every route may.
        headers: Of the answer, with what they say.
    """

    summary: str
    tag: str
    answer: Any = None
    media_type: str = JSON
    body: Mapping[str, Any] = field(default_factory=dict)
    is_body_required: bool = True
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[int, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()


def query(name: str, of: Any, description: str, example: object, **more: bool) -> Parameter:
    """Behind the question mark."""
    return Parameter(name, "query", of, description, example, **more)


def header(name: str, of: Any, description: str, example: object) -> Parameter:
    """Among the headers."""
    return Parameter(name, "header", of, description, example)


TIMEOUT = header(
    "x-headstock-timeout-ms",
    Annotated[int, Field(ge=1)],
    "How long the caller waits, at most the service's `request_timeout_s`.",
    2000,
)
CALLER = header(
    "x-headstock-caller", str, "Who asks: one caller stays with one side of a canary.", "shop-17"
)
KEY = header(
    "idempotency-key",
    Annotated[str, Field(max_length=200)],
    "Makes repeated requests one change; the request id if it is not given.",
    "push-2026-11-21-a",
)
