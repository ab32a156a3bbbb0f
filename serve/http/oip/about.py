"""What there is to ask: the server's health, its models, and what they take and give."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version as version_of_package

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from export.bundle import TrunkManifest
from serve.http.oip.errors import oip_error
from serve.http.oip.models import asked_model, asked_version, config, metadata
from serve.http.oip.moment import served_view
from serve.record import LogView
from serve.replica import Replica

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
)


class About:
    """The routes of one replica that describe.

    What is said of models is read from the head log, so it is the fleet's and never goes back.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def live(self, _: Request) -> Response:
        """Whether this replica's threads live."""
        if not self._replica.is_healthy:
            return oip_error(503, "A thread of this replica has ended; it is about to be replaced.")
        return JSONResponse({"live": True})

    async def ready(self, _: Request) -> Response:
        """Whether this replica answers; it is only let in with all that is live loaded."""
        if not (self._replica.is_healthy and self._replica.watcher.is_admitted):
            return oip_error(503, "This replica has not been admitted to the fleet yet.")
        return JSONResponse({"ready": True})

    async def server(self, _: Request) -> Response:
        """Server metadata."""
        return JSONResponse(
            {
                "name": "headstock",
                "version": version_of_package("headstock"),
                "extensions": EXTENSIONS,
            }
        )

    async def model(self, request: Request) -> Response:
        """Model metadata."""
        model, (view, trunk) = asked_model(request), await self._served()
        version = model.version(view, asked_version(request))
        return JSONResponse(metadata(model, version, model.versions(view), trunk))

    async def config(self, request: Request) -> Response:
        """Model configuration."""
        model, (view, trunk) = asked_model(request), await self._served()
        version = model.version(view, asked_version(request))
        max_rows = self._replica.settings.max_pictures
        return JSONResponse(config(model, version, trunk, max_rows=max_rows))

    async def model_ready(self, request: Request) -> Response:
        """Whether a model answers, by the head log and here."""
        model, view = asked_model(request), await self._history()
        model.version(view, asked_version(request))
        live = self._replica.batcher.snapshot.heads.get(model.task)
        if reason := model.reason_against(live):
            return oip_error(400, reason)
        if live is None or not self._replica.watcher.is_admitted:
            return oip_error(503, f"Model {model.name!r} is not loaded in this replica yet.")
        return JSONResponse({"name": model.name, "ready": True})

    async def _served(self) -> tuple[LogView, TrunkManifest]:
        timeout_s = self._replica.settings.request_timeout_s
        return await served_view(self._replica, time.monotonic() + timeout_s, timeout_s)

    async def _history(self) -> LogView:
        return await asyncio.to_thread(self._replica.history)
