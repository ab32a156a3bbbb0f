"""Errors as the Open Inference Protocol has them: `{"error": text}`, whatever the status."""

from __future__ import annotations

from starlette.responses import JSONResponse

from serve.http.problems import headers_of, told
from serve.jobs import UnknownTaskError

PREFIX = "/v2"


def is_within(path: str) -> bool:
    """Whether a path is the protocol's."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def oip_error_of(error: Exception) -> JSONResponse:
    """The answer to an error."""
    status, detail, headers = told(error)
    if isinstance(error, UnknownTaskError):
        detail = f"Request for unknown model: {detail}"
    return JSONResponse({"error": detail}, status, headers)


def oip_error(status: int, detail: str) -> JSONResponse:
    """What was wrong, and what was expected."""
    return JSONResponse({"error": detail}, status, headers_of(status))
