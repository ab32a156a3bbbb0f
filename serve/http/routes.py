"""All routes of the service as one ASGI application, and what every answer has in common."""

from __future__ import annotations

import logging
import time
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.access import Action
from serve.http import pages
from serve.http.access import Access, caller_in, task_in
from serve.http.admin import Admin
from serve.http.audit import Audit
from serve.http.edge import BodyClock, check_headers
from serve.http.keys import Keys
from serve.http.oip.errors import is_within, oip_error, oip_error_of
from serve.http.oip.routes import Endpoint, oip_routes
from serve.http.predict import Predict
from serve.http.problems import kind_of, problem, problem_of
from serve.http.push import Push
from serve.http.tokens import Tokens
from serve.http.trunks import TrunkRoutes
from serve.jobs import DeadlineError, OverloadedError, UnknownTaskError
from serve.link import Link
from serve.replica import Replica
from serve.settings import ServeSettings

logger = logging.getLogger(__name__)

MAX_LOGGED = 128  # characters of what a caller chooses


def http_app(replica: Replica, link: Link) -> Starlette:
    """The service of one replica over HTTP."""
    predict, admin, keys = Predict(replica), Admin(replica, link), Keys(replica, link)
    audit, push = Audit(replica), Push(replica, link)
    tokens, access = Tokens(replica, link), Access(replica)
    trunks = TrunkRoutes(replica, link, push)

    def route(method: str, path: str, needs: Action, endpoint: Endpoint) -> Route:
        async def admitted(request: Request) -> Response:
            check_headers(request.scope, max_bytes=replica.settings.max_header_bytes)
            access.admit(request, needs)
            try:
                return await endpoint(request)
            except UnknownTaskError as error:
                may_read = partial(caller_in(request).may, "read")
                raise UnknownTaskError(error.task, filter(may_read, error.known)) from None

        return Route(path, _measured(replica, path, admitted), methods=[method])

    app = Starlette(
        routes=[
            route("POST", "/predict/{task}", "predict", predict.one_task),
            route("POST", "/predict", "predict", predict.many_tasks),
            route("GET", "/tasks", "read", admin.tasks),
            route("GET", "/tasks/{task}", "read", admin.task),
            route("PATCH", "/tasks/{task}", "admin", admin.set_task),
            route("DELETE", "/tasks/{task}", "push", admin.retire),
            route("GET", "/tasks/{task}/versions", "read", admin.versions),
            route("GET", "/tasks/{task}/card", "read", admin.card),
            route("PUT", "/tasks/{task}/heldout", "admin", admin.set_heldout),
            route("POST", "/tasks/{task}/versions", "push", push.one),
            route("POST", "/versions", "push", push.several),
            route("POST", "/trunks", "admin", trunks.push),
            route("POST", "/trunks/rollback", "admin", trunks.rollback),
            route("POST", "/tasks/{task}/promote", "push", admin.promote),
            route("POST", "/tasks/{task}/rollback", "rollback", admin.rollback),
            route("GET", "/keys", "admin", keys.keys),
            route("POST", "/keys", "admin", keys.trust),
            route("DELETE", "/keys/{key_id}", "admin", keys.revoke),
            route("GET", "/tokens", "admin", tokens.tokens),
            route("POST", "/tokens", "admin", tokens.make),
            route("DELETE", "/tokens/{token_id}", "admin", tokens.revoke),
            route("GET", "/tasks/{task}/diff", "read", audit.diff),
            route("GET", "/bundles/{digest}", "read", audit.bundle),
            route("GET", "/log", "admin", audit.log),
            route("GET", "/metrics", "metrics", admin.metrics),
            route("GET", "/openapi.json", "open", pages.schema),
            route("GET", "/docs", "open", pages.page),
            route("GET", "/docs/rapidoc-min.js", "open", pages.script),
            *(route(*oip) for oip in oip_routes(replica, link)),
        ],
        exception_handlers={HTTPException: _no_route},
        middleware=_around(replica.settings),
    )
    # A slash at the end makes another path, which is not there: nobody is sent elsewhere.
    app.router.redirect_slashes = False
    return app


def _around(settings: ServeSettings) -> list[Middleware]:
    """What stands around every route."""
    clock = Middleware(BodyClock, limit_s=settings.body_timeout_s)
    if not settings.cors_origins:
        return [clock]
    # Credentials are cookies, of which there are none: a script has to be given its token.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=[
            "authorization",
            "content-type",
            "idempotency-key",
            "x-headstock-caller",
            "x-headstock-timeout-ms",
            "x-request-id",
        ],
        expose_headers=["retry-after", "x-headstock-bundle", "x-headstock-version", "x-request-id"],
    )
    return [cors, clock]


def _measured(replica: Replica, path: str, endpoint: Endpoint) -> Endpoint:
    """Count and time every answer, and turn errors into what a caller is told."""

    async def answer(request: Request) -> Response:
        began_s, error_kind = time.monotonic(), None
        tracing = replica.tracing
        span = tracing.begin(request.method, path, request.headers) if tracing else None
        try:
            response = await endpoint(request)
        except Exception as error:
            response = oip_error_of(error) if is_within(path) else problem_of(error)
            error_kind = kind_of(error)
            replica.metrics.errors.labels(error_kind).inc()
            # Refusing has to be cheap, and a trace says nothing of why there are too many.
            is_overload = isinstance(error, (OverloadedError, DeadlineError))
            if response.status_code >= 500 and not is_overload:  # noqa: PLR2004
                logger.exception("%s %s failed", request.method, path)
        replica.metrics.requests.labels(path, response.status_code).inc()
        if span:
            trace = tracing.end(span, response.status_code, error_kind)
            response.headers["traceresponse"] = trace
        seconds = time.monotonic() - began_s
        replica.metrics.request_seconds.observe(seconds)
        if replica.access_log:
            line = _log_line(request, path, response)
            replica.access_log.note({**line, "error": error_kind, "seconds": round(seconds, 6)})
        return response

    return answer


def _log_line(request: Request, path: str, response: Response) -> dict[str, object]:
    """What is said of a request: nothing of its body, query or token, and of its path the task."""
    version = response.headers.get("x-headstock-version")
    trace = response.headers.get("traceresponse", "")
    return {
        "request_id": request.headers.get("x-request-id", "")[:MAX_LOGGED] or None,
        "method": request.method,
        "route": path,
        "task": (task_in(request) or "")[:MAX_LOGGED] or None,
        "version": int(version) if version else None,
        "status": response.status_code,
        "answer_bytes": len(response.body),
        "trace_id": trace.split("-")[1] if trace else None,
    }


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    tell = oip_error if is_within(path) else problem
    if error.status_code == 405:  # noqa: PLR2004
        response = tell(405, f"{path} does not take {request.method}.")
        response.headers.update(error.headers or {})  # which methods it takes
        return response
    return tell(404, f"There is nothing at {path}.")
