"""What is refused before any route: headers that are too large, and bodies that take too long."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.problems import RequestError


class BodyClock:
    """Lets no body take longer than a while.

    It stands around the whole application, so that no route can forget it.

    Args:
        limit_s: From when the body is first asked for to its end.
    """

    def __init__(self, app: ASGIApp, *, limit_s: float) -> None:
        self._app, self._limit_s = app, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline_s: float | None = None
        is_whole = False

        async def timed_receive() -> Message:
            nonlocal deadline_s, is_whole
            if is_whole:  # what comes now is that the caller has gone, at any time
                return await receive()
            now_s = asyncio.get_running_loop().time()
            deadline_s = deadline_s or now_s + self._limit_s
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError as error:
                raise RequestError(
                    408,
                    f"The body is not here after {self._limit_s:g} s, the longest that one may "
                    "take. Send it faster, or a smaller one.",
                    {"connection": "close"},
                ) from error
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, timed_receive, send)


def check_headers(scope: Scope, *, max_bytes: int) -> None:
    """Refuse headers that are larger than any that mean something.

    Raises:
        RequestError: they are.
    """
    size_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
    size_bytes += len(scope.get("raw_path", b"")) + len(scope["query_string"])
    if size_bytes > max_bytes:
        raise RequestError(
            431,
            f"Address and headers have {size_bytes} bytes; at most {max_bytes} are accepted.",
        )
