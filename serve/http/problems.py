"""What a caller is told when there is no answer: problem details (RFC 9457).

The one place where an error of ours becomes a status code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from export.bundle import BundleError
from models.pictures import PictureError, PictureTooLargeError
from serve.heldout import HeldoutError
from serve.jobs import (
    DeadlineError,
    FeaturesOnlyError,
    OtherTrunkError,
    OverloadedError,
    RetiredTaskError,
    StoppingError,
    UndecidedError,
    UnknownTaskError,
)
from serve.link import LinkError
from serve.memory import MemoryShortError
from serve.messages import Refused
from serve.precision import PrecisionError
from serve.residency import AdaptersTooLargeError
from serve.store import StoreError
from serve.trunks import TrunkBusyError
from serve.versions import NoVersionError

RETRY_AFTER_S = 1
PROBLEM = "application/problem+json"
TITLES = {
    400: "Malformed request",
    401: "Not known here",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Conflict",
    413: "Too large",
    415: "Not an accepted picture",
    422: "Refused by a gate",
    429: "Too often",
    431: "Too large headers",
    500: "Internal error",
    503: "Not available now",
}
STATUS_OF_ERROR: Mapping[type[Exception], int] = {
    ClientDisconnect: 400,  # for the counters: nobody reads the answer
    FeaturesOnlyError: 400,
    UnknownTaskError: 404,
    RetiredTaskError: 404,
    NoVersionError: 404,
    AdaptersTooLargeError: 413,
    PictureTooLargeError: 413,
    PictureError: 415,
    BundleError: 422,
    HeldoutError: 422,
    OverloadedError: 503,
    UndecidedError: 503,
    StoppingError: 503,
    LinkError: 503,
    StoreError: 503,
    DeadlineError: 503,
    OtherTrunkError: 409,
    TrunkBusyError: 409,
    PrecisionError: 422,
    MemoryShortError: 422,
}
STATUS_OF_REFUSAL = {"conflict": 409, "stale": 409, "gate": 422, "unknown": 404, "unavailable": 503}


class RequestError(Exception):
    """The request itself is wrong; `status` says how."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers


def kind_of(error: Exception) -> str:
    """What an error is counted as: "overloaded", ...; "internal" is what we did not foresee."""
    known = (RequestError, *STATUS_OF_ERROR)
    found = next((kind.__name__ for kind in known if isinstance(error, kind)), "InternalError")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", found.removesuffix("Error")).lower()


def told(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, detail and headers; an error that we did not foresee says nothing of our insides."""
    if isinstance(error, RequestError):
        return error.status, str(error), headers_of(error.status) | dict(error.headers)
    for kind, status in STATUS_OF_ERROR.items():
        if isinstance(error, kind):
            headers = headers_of(status)
            if isinstance(error, OverloadedError):
                headers["retry-after"] = str(error.retry_after_s)
            return status, str(error) or TITLES[status], headers
    return 500, "The service failed to answer; its log has the reason.", {}


def problem_of(error: Exception) -> JSONResponse:
    """The answer to an error."""
    status, detail, headers = told(error)
    response = problem(status, detail)
    response.headers.update(headers)
    return response


def problem_of_refusal(refused: Refused) -> JSONResponse:
    """The answer to a change that was not made, with each gate's verdict."""
    verdicts = [verdict.model_dump() for verdict in refused.verdicts]
    return problem(
        STATUS_OF_REFUSAL[refused.kind], refused.reason, **({"gates": verdicts} if verdicts else {})
    )


def problem(status: int, detail: str, **more: object) -> JSONResponse:
    """`application/problem+json` with what was wrong and what was expected."""
    body = {"type": "about:blank", "title": TITLES[status], "status": status, "detail": detail}
    headers = headers_of(status)
    return JSONResponse({**body, **more}, status, headers, media_type=PROBLEM)


def headers_of(status: int) -> dict[str, str]:
    """What an error says beside its body."""
    return {"retry-after": str(RETRY_AFTER_S)} if status == 503 else {}  # noqa: PLR2004
