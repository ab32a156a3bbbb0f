"""Access through the real front door: https, tokens, and what is sent to confuse or to wait."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import HEADSTOCK, Program, clean_environment
from tests.serve.certificates import certificate_in
from tests.serve.oracle import Heads, some_picture

pytestmark = pytest.mark.cluster

ADMIN = "a" * 64


class Locked:
    """A service that asks for tokens and speaks https, and who talks to it."""

    def __init__(self, folder: Path, trunk: Path) -> None:
        certificate, key = certificate_in(folder / "tls")
        self.trust = {"SSL_CERT_FILE": str(certificate)}
        self.program = Program(
            folder / "service",
            trunk,
            access="on",
            admin_token=ADMIN,
            tls_certificate=certificate,
            tls_key=key,
            body_timeout_s=2,
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.program.ready["url"]

    def run(self, *arguments: str, token: str = ADMIN) -> subprocess.CompletedProcess[str]:
        """A command, with this token."""
        environment = clean_environment(server=self.url, token=token) | self.trust
        return subprocess.run(
            [HEADSTOCK, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def ask(self, path: str, token: str = "", **options: Any) -> httpx.Response:
        """One request."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        method = "POST" if "content" in options else "GET"
        trusted = ssl.create_default_context(cafile=self.trust["SSL_CERT_FILE"])
        with httpx.Client(verify=trusted, timeout=60) as client:
            return client.request(method, f"{self.url}{path}", headers=headers, **options)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path) -> Iterator[Locked]:
    """That service."""
    locked = Locked(tmp_path_factory.mktemp("locked"), trunk_folder)
    with locked.program:
        yield locked


def test_a_token_opens_what_it_is_for_through_https(
    locked: Locked, heads: Heads, tmp_path: Path
) -> None:
    """Made, used on both replicas, and gone on both when its revocation returns."""
    heads(1, "pets").write(tmp_path / "head")
    pushed = locked.run("push", str(tmp_path / "head"))
    made = locked.run("tokens", "new", "shop", "--scope", "predict:pets", "--json")
    token = json.loads(made.stdout)["token"]
    body = {"content": png(some_picture(0))}
    answers = [locked.ask("/predict/pets", token, **body).status_code for _ in range(10)]
    denied = [locked.ask("/tasks/pets/rollback", token, content=b"").status_code for _ in range(4)]
    strangers = [locked.ask("/predict/pets", **body).status_code for _ in range(4)]
    revoked = locked.run("tokens", "revoke", "shop")
    after = [locked.ask("/predict/pets", token, **body).status_code for _ in range(10)]

    assert locked.url.startswith("https://")
    assert pushed.returncode == 0, pushed.stderr
    assert revoked.returncode == 0, revoked.stderr
    assert set(answers) == {200}
    assert set(denied) == {403}
    assert set(strangers) == {401}
    assert set(after) == {401}
    assert locked.ask("/v2/health/ready").status_code == 200


def test_a_secret_is_in_no_file_and_no_process_of_the_service(locked: Locked) -> None:
    """Neither the log of a process nor the head log, nor the configuration of the proxy."""
    locked.ask("/tasks", "hs_000000000000_" + "c" * 64)
    folders = [locked.program.run_folder(), locked.program.store]
    seen = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    tokens = (ADMIN.encode(), b"c" * 64)

    assert len(seen) > 10
    for path in seen:
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            assert not any(token in data for token in tokens), path


def say(service: Program, data: bytes, *, limit_s: float = 3.0) -> bytes:
    """All that comes back to these bytes."""
    told = b""
    with (
        socket.create_connection(("127.0.0.1", service.port), 20) as connection,
        contextlib.suppress(TimeoutError, ConnectionError),
    ):
        connection.settimeout(limit_s)
        connection.sendall(data)
        while piece := connection.recv(65536):
            told += piece
    return told


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding : chunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: xchunked\r\n",
        b"Content-Length: 4\r\nX: y\r\n Transfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: +5\r\n",
    ],
)
def test_no_answer_is_left_over_for_the_next_caller(service: Program, head: bytes) -> None:
    """A request that is hidden in a body gets no answer of its own, which another would get."""
    hidden = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    first = b"POST /first HTTP/1.1\r\nHost: a\r\n"
    told = say(service, first + head + b"\r\n0\r\n\r\n" + hidden)
    answers = [
        say(service, b"GET /tasks HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for _ in range(6)
    ]

    # The replica says 404 to either, or the proxy 400 to what it does not understand.
    assert set(re.findall(rb"HTTP/1\.[01] ([0-9]{3})", told)) <= {b"400", b"404"}
    assert all(b'"log_number"' in answer for answer in answers)


def test_a_slow_caller_is_given_up_by_the_front_door(locked: Locked) -> None:
    """Headers that drip for longer than `body_timeout_s`; of TLS he has not got that far."""
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", locked.program.port), 20) as slow:
        slow.settimeout(0.1)
        while time.monotonic() - began_s < 30:
            try:
                slow.sendall(b"\x16")
                if not slow.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break

    assert time.monotonic() - began_s < 15
