"""HAProxy's door is closed without breaking what came through it."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from serve.front_door import close_front_door
from serve.runtime import haproxy_binary
from tests.end_to_end.program import free_port
from tests.serve.harness import until

SLOW_S = 1.0


class Slow(BaseHTTPRequestHandler):
    """Answers after a second."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Any path."""
        time.sleep(SLOW_S)
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"done")


@pytest.fixture
def door(tmp_path: Path) -> Iterator[str]:
    """A real HAProxy in front of a slow server, by a configuration in the test's folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, config = free_port(), tmp_path / "node" / "haproxy.cfg"
        config.parent.mkdir()
        config.write_text(
            f"""defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option idle-close-on-response
frontend door
    bind 127.0.0.1:{port}
    default_backend slow
backend slow
    server one 127.0.0.1:{server.server_port}
"""
        )
        with subprocess.Popen([haproxy_binary(), "-db", "-f", str(config)]) as process:
            url = f"http://127.0.0.1:{port}"
            until(lambda: is_open(url))
            yield url
            process.kill()
        server.shutdown()


def is_open(url: str) -> bool:
    """Whether a connection is taken."""
    try:
        httpx.get(url, timeout=5)
    except httpx.ConnectError:
        return False
    return True


def test_what_is_in_flight_is_answered_and_nothing_more_is_taken(door: str, tmp_path: Path) -> None:
    """It takes as long as the answer does."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.get, door, timeout=10)
        time.sleep(SLOW_S / 4)
        is_closed = close_front_door(tmp_path, limit_s=10.0)

        assert asked.result().text == "done"
    assert is_closed
    assert not is_open(door)


def test_an_idle_connection_is_not_waited_for_longer_than_allowed(
    door: str, tmp_path: Path
) -> None:
    """Its client may keep it for as long as it likes."""
    with httpx.Client() as client:
        client.get(door)
        began_s = time.monotonic()

        assert not close_front_door(tmp_path, limit_s=0.5)
    assert time.monotonic() - began_s < 5


def test_the_door_of_another_service_stays_open(door: str, tmp_path: Path) -> None:
    """Only what runs by a configuration in the folder is closed."""
    other = tmp_path / "other"
    other.mkdir()

    assert close_front_door(other, limit_s=1.0)
    assert is_open(door)
