"""What stands behind the question mark of a request."""

from __future__ import annotations

from starlette.requests import Request

from serve.http.problems import RequestError

MAX_DIGITS = 15


def check_parameters(request: Request, *known: str) -> None:
    """What is not understood is refused: it may have been meant.

    Raises:
        RequestError: a parameter has another name than these.
    """
    if unknown := sorted(set(request.query_params) - set(known)):
        raise RequestError(
            400, f"Parameter {unknown[0]!r} is unknown; expected {', '.join(known)}."
        )


def number_in(request: Request, name: str, *, least: int = 1) -> int | None:
    """A whole number, or None if it is not there.

    Raises:
        RequestError: it is none, or less than `least`.
    """
    value = request.query_params.get(name)
    if value is None:
        return None
    if not (value.isdecimal() and value.isascii() and len(value) <= MAX_DIGITS):
        raise RequestError(400, f"{name} is {value!r:.20}; expected a whole number.")
    if int(value) < least:
        raise RequestError(400, f"{name} is {value}; expected at least {least}.")
    return int(value)


def flag_in(request: Request, name: str) -> bool:
    """Whether a parameter is `true`; it is `false` if it is not there.

    Raises:
        RequestError: it is neither.
    """
    value = request.query_params.get(name, "false")
    if value not in {"true", "false"}:
        raise RequestError(400, f"{name} is {value!r}; expected true or false.")
    return value == "true"
