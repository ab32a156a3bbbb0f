"""An application behind a real socket, as a fuzzer or a browser needs it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from serve.http.routes import http_app
from tests.serve.harness import LocalFleet, until


def app_of(fleet: LocalFleet, replica: str = "replica-1") -> ASGIApp:
    """What one replica of a fleet answers over HTTP."""
    return http_app(fleet.replicas[replica], fleet.links[replica])


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The URL of an application, on loopback."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=server.run, args=([door],))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)
