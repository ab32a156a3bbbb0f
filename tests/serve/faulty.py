"""A server between a client and the one that it asks, which does to requests what a test wants."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

from typing_extensions import override

Fault = Literal["refuse", "forget", "tear", "slow", "silent", "500", "503", "denied", "ignore"]
Only = Callable[[str, str], bool]

SLOW_S = 0.4
SILENT_S = 60.0
ANSWERS = {
    "500": (500, "InternalError", "We encountered an internal error."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "InvalidAccessKeyId", "The access key does not exist in our records."),
}


@dataclass
class Plan:
    """What to do to the next requests of a kind.

    Args:
        fault: "refuse" breaks the connection before the server has acted, "forget" after it; "tear"
            cuts the answer's body short; "slow" and "silent" keep the caller waiting; "ignore"
            takes away the condition of a put; all others are answers with an error.
        only: Which requests, by method and path.
    """

    fault: Fault
    times: float
    only: Only


class FaultyServer:
    """Passes requests on, but for those that a plan is for; use as a context manager."""

    def __init__(self, port: int) -> None:
        self.upstream_port = port
        self.seen: list[tuple[str, str]] = []
        self.plans: list[Plan] = []
        self.is_over = threading.Event()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()

    def plan(self, fault: Fault, *, times: float = 1, only: Only = lambda _, __: True) -> None:
        """Do this to the next requests."""
        self.plans.append(Plan(fault, times, only))

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        self.plans.clear()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """What happens to a request that has just come."""
        self.seen.append((method, path))
        for plan in self.plans:
            if plan.times >= 1 and plan.only(method, path):
                plan.times -= 1
                return plan.fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, faulty: FaultyServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faulty = faulty

    @override
    def shutdown_request(self, request: Any) -> None:
        # Without the polite end of a connection: a reset has to arrive as one.
        self.close_request(request)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _answer(self) -> None:
        faulty = self._faulty
        fault = faulty.next_fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if fault == "refuse":
            self._reset()
        elif fault == "silent":
            faulty.is_over.wait(SILENT_S)
            self._reset()
        elif fault in ANSWERS:
            self._reply(*_problem(fault))
        else:
            if fault == "slow":
                time.sleep(SLOW_S)
            if fault == "ignore":
                del self.headers["if-none-match"]
            status, headers, data = self._ask(body)
            if fault == "forget":
                self._reset()
            else:
                self._reply(status, headers, data, is_torn=fault == "tear")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

    @property
    def _faulty(self) -> FaultyServer:
        assert isinstance(self.server, _Server)
        return self.server.faulty

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._faulty.upstream_port)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            kept = [(n, v) for n, v in response.getheaders() if n.lower() not in _OUR_OWN]
            size = response.headers.get("content-length", "0")
            data = response.read()
            return response.status, [*kept, ("content-length", size)], data
        finally:
            connection.close()

    def _reply(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, is_torn: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if is_torn:
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


_OUR_OWN = frozenset({"connection", "transfer-encoding", "content-length"})


def _problem(fault: str) -> tuple[int, list[tuple[str, str]], bytes]:
    status, code, message = ANSWERS[fault]
    data = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return status, [("content-type", "text/xml"), ("content-length", str(len(data)))], data
