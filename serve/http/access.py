"""Who is let in: every route names what it needs, and every request is asked for it first."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from urllib.parse import urlsplit

from starlette.requests import Request

from serve.access import ANYONE, Action, Caller, NoAccessError, caller_of, scope_for
from serve.http.problems import RequestError
from serve.replica import Replica

logger = logging.getLogger(__name__)


class Access:
    """The door of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._settings, self._watcher = replica.settings, replica.watcher
        self._rates = replica.rates

    def admit(self, request: Request, action: Action) -> None:
        """Find out who asks, for the route to know, if he may do that at all.

        A route about one task is open to who may do it to that task; one about several to who may
        do it to any, and it answers about those alone.

        Raises:
            RequestError: no valid token, or not for this, or not so often.
        """
        if not self._settings.needs_tokens or action == "open":
            self._check_origin(request)
            request.state.caller = ANYONE
            return
        caller = self._caller(request)
        request.state.caller = caller
        check(request, action, task_in(request))
        self._slow_down(request, caller)

    def _check_origin(self, request: Request) -> None:
        """Where no token is asked for, a browser must not lend its place to any page that it shows.

        It sends such requests without asking when they look like a form's, and says whose they are.
        """
        origin, allowed = request.headers.get("origin", ""), self._settings.cors_origins
        is_own = urlsplit(origin).netloc == request.headers.get("host")
        if origin and not is_own and not {origin, "*"} & set(allowed):
            refusal = RequestError(
                403, f"Pages of {origin!r:.100} may not ask; cors_origins names those that may."
            )
            _log(request, refusal)
            raise refusal

    def _slow_down(self, request: Request, caller: Caller) -> None:
        if caller.rate_per_s is None:
            return
        wait_s = self._rates.take(caller.token_id, caller.rate_per_s)
        if wait_s:
            refusal = RequestError(
                429,
                f"The token {caller.name} asks more than {caller.rate_per_s:g} requests a second; "
                f"ask again in {wait_s:.3g} s.",
                {"retry-after": str(math.ceil(wait_s))},
            )
            _log(request, refusal)
            raise refusal

    def _caller(self, request: Request) -> Caller:
        given = request.headers.getlist("authorization")
        kind, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if kind.lower() != "bearer" or not token.strip():
            what = "carries several Authorization headers" if len(given) > 1 else "has no token"
            refusal = RequestError(
                401,
                f"The request {what}; expected one header, Authorization: Bearer TOKEN.",
                {"www-authenticate": 'Bearer realm="headstock"'},
            )
            _log(request, refusal)
            raise refusal
        try:
            return caller_of(
                token.strip(),
                self._watcher.tokens,
                admin_sha256=self._settings.admin_sha256,
                now=datetime.now(UTC),
            )
        except NoAccessError as error:
            challenge = 'Bearer realm="headstock", error="invalid_token"'
            refusal = RequestError(401, str(error), {"www-authenticate": challenge})
            _log(request, refusal)
            raise refusal from None


def caller_in(request: Request) -> Caller:
    """Who asks, as the door has found out."""
    caller: Caller = request.state.caller
    return caller


def task_in(request: Request) -> str | None:
    """The task that a path is about; the models of a task begin with its name and a dot."""
    names = request.path_params
    return names.get("task") or names.get("model", "").partition(".")[0] or None


def check(request: Request, action: Action, task: str | None) -> None:
    """Refuse what the caller may not do.

    Raises:
        RequestError: his token has no scope for it.
    """
    caller = caller_in(request)
    if caller.may(action, task):
        return
    scope = scope_for(action, task)
    challenge = f'Bearer realm="headstock", error="insufficient_scope", scope="{scope}"'
    refusal = RequestError(
        403,
        f"The token {caller.name} lacks the scope {scope:.80}.",
        {"www-authenticate": challenge} if scope.isascii() and scope.isprintable() else {},
    )
    _log(request, refusal)
    raise refusal


def _log(request: Request, refusal: RequestError) -> None:
    # Whatever a stranger wrote is quoted, so that no line of the log is his own.
    path, reason = request.url.path, str(refusal)
    logger.warning("%d to %s %.200r: %.300r", refusal.status, request.method, path, reason)
