"""The routes of the Open Inference Protocol V2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from serve.access import Action
from serve.http.oip.about import About
from serve.http.oip.infer import Infer
from serve.http.oip.repository import Repository
from serve.http.oip.statistics import ModelStatistics
from serve.link import Link
from serve.replica import Replica

Endpoint = Callable[[Request], Awaitable[Response]]
MODEL = "/v2/models/{model}"
VERSION = f"{MODEL}/versions/{{version}}"


def oip_routes(replica: Replica, link: Link) -> list[tuple[str, str, Action, Endpoint]]:
    """Method, path, what is needed for it, and endpoint of each."""
    about, infer, repository = About(replica), Infer(replica), Repository(replica, link)
    statistics = ModelStatistics(replica, link)
    of_model: list[tuple[str, str, Action, Endpoint]] = [
        ("GET", "", "read", about.model),
        ("GET", "/ready", "read", about.model_ready),
        ("GET", "/config", "read", about.config),
        ("GET", "/stats", "read", statistics.model),
        ("POST", "/infer", "predict", infer.infer),
    ]
    return [
        ("GET", "/v2", "read", about.server),
        ("GET", "/v2/health/live", "open", about.live),
        ("GET", "/v2/health/ready", "open", about.ready),
        ("POST", "/v2/repository/index", "read", repository.index),
        ("POST", "/v2/repository/models/{model}/load", "rollback", repository.load),
        ("POST", "/v2/repository/models/{model}/unload", "push", repository.unload),
        # Before the models, one of which may have this name.
        ("GET", "/v2/models/stats", "read", statistics.all),
        *(
            (method, f"{place}{rest}", needs, endpoint)
            for place in (MODEL, VERSION)
            for method, rest, needs, endpoint in of_model
        ),
    ]
