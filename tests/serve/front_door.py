"""HAProxy as Ray and our launcher set it up, before one replica: the way in, without Ray."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import runtime
from tests.serve.harness import until

# In a process of its own: Ray reads its variables when it is imported.
RENDER = """
import sys
from types import SimpleNamespace
from jinja2 import Environment
from ray.serve._private.haproxy import BackendConfig, HAProxyConfig, ServerConfig
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

folder, front, behind, first, is_asleep = sys.argv[1], *map(int, sys.argv[2:])
environment = Environment()
environment.filters["haproxy_fmt"] = str
config = HAProxyConfig(
    http_options=SimpleNamespace(host="127.0.0.1", port=front, keep_alive_timeout_s=5),
    stats_port=first,
    metrics_port=first + 1,
    socket_path=f"{folder}/admin.sock",
    server_state_base=folder,
    server_state_file=f"{folder}/server-state",
    timeout_client_s=30,
    metrics_enabled=False,
    bufsize=65536,
    error_file_path=f"{folder}/500.http",
)
backend = BackendConfig(
    name="app",
    path_prefix="/",
    http_health_check_path=None,
    servers=[ServerConfig(name="SERVE_REPLICA_r1", host="127.0.0.1", port=behind)],
)
if is_asleep:
    name = "SERVE_PROXY_ACTOR-fallback"
    backend.servers = []
    backend.fallback_server = ServerConfig(name=name, host="127.0.0.1", port=behind)
health = backend.build_health_check_config(config)
print(
    environment.from_string(HAPROXY_CONFIG_TEMPLATE).render(
        config=config,
        backends=[backend],
        backends_with_health_config=[{"backend": backend, "health_config": health}],
        healthz_rules="",
        route_info=SimpleNamespace(
            status=200, routes_content_type="text/plain", routes_message="{}"
        ),
    )
)
"""


AS_RAY_WRITES_IT = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 21\r\n\r\nInternal Server Error"
)


class FrontDoor:
    """HAProxy and a server behind it; use as a context manager.

    Args:
        body_timeout_s: As the launcher is told.
        certificate: Speaks TLS with it.
        min_replicas: As the settings say.
        is_asleep: No replica is there; what is behind is Ray's proxy, which waits for one.
    """

    def __init__(
        self,
        folder: Path,
        app: ASGIApp,
        *,
        body_timeout_s: float,
        certificate: Path | None = None,
        min_replicas: int = 1,
        is_asleep: bool = False,
    ) -> None:
        self._folder, self._app, self._is_tls = folder, app, certificate is not None
        self._body_timeout_s, self._certificate = body_timeout_s, certificate
        self._min_replicas, self._is_asleep = min_replicas, is_asleep
        self.port = _free_port()
        self.seen: list[tuple[str, str]] = []
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._record,
                host="127.0.0.1",
                port=_free_port(),
                log_level="error",
                interface="asgi3",
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        behind = self._server.config.port
        numbers = map(str, (self.port, behind, _free_port(), int(self._is_asleep)))
        command = [sys.executable, "-c", RENDER, str(self._folder), *numbers]
        configuration = self._folder / "haproxy.cfg"
        configuration.write_text(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        (self._folder / "500.http").write_bytes(AS_RAY_WRITES_IT)
        launcher = runtime.write_launcher(
            self._folder,
            body_timeout_s=self._body_timeout_s,
            certificate=self._certificate,
        )
        self._process = subprocess.Popen(
            [launcher, "-db", "-f", configuration],
            env=os.environ | {"HEADSTOCK_MIN_REPLICAS": str(self._min_replicas)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: self._server.started and self._listens(), limit_s=60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)
        self.stop_replica()

    def connect(self, trusted: Path | None = None) -> socket.socket:
        """A connection to it."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        if trusted is None:
            return plain
        context = ssl.create_default_context(cafile=str(trusted))
        return context.wrap_socket(plain, server_hostname="localhost")

    def say(self, data: bytes, *, limit_s: float = 3.0) -> bytes:
        """All that comes back to these bytes, until the connection ends or falls silent."""
        told = b""
        with self.connect() as connection, contextlib.suppress(TimeoutError, ConnectionError):
            connection.settimeout(limit_s)
            connection.sendall(data)
            while piece := connection.recv(65536):
                told += piece
        return told

    def stop_replica(self) -> None:
        """End the server behind it, as if it had been killed."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/-/healthz":  # as Ray's replicas do
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"success"})
            return
        if scope["type"] == "http":
            self.seen.append((scope["method"], scope["path"]))
        await self._app(scope, receive, send)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "HAProxy has ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        time.sleep(0.05)
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
