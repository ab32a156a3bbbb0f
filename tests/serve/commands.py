"""One replica of a fleet as HTTP, Python and the command line see it, without a socket."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serve import (
    cli,
    cli_audit,
    cli_keys,
    cli_migrate,
    cli_predict,
    cli_rollout,
    cli_task,
    cli_tokens,
    cli_watch,
)
from serve.client import Client
from tests.serve.harness import HttpClient, LocalFleet


@pytest.fixture
def http(fleet: LocalFleet) -> HttpClient:
    """The replica that is asked."""
    return HttpClient(fleet, "replica-1")


@pytest.fixture
def connect(http: HttpClient) -> Callable[..., Client]:
    """Makes Python clients of that replica, in place of the class."""

    def forward(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        options: dict[str, Any] = {"headers": request.headers, "content": request.content}
        told = http.request(request.method, path, **options)
        return httpx.Response(told.status_code, headers=told.headers, content=told.content)

    def connect(url: str = "http://test", *, token: str = "") -> Client:
        client = Client(url, token=token)
        told = {"headers": client._http.headers, "transport": httpx.MockTransport(forward)}
        client._http = httpx.Client(base_url=url, **told)
        return client

    return connect


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]
COMMANDS = (
    cli,
    cli_audit,
    cli_keys,
    cli_migrate,
    cli_predict,
    cli_rollout,
    cli_task,
    cli_tokens,
    cli_watch,
)


@pytest.fixture
def run(
    connect: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command against the fleet."""

    def run(*arguments: str) -> Done:
        for module in COMMANDS:
            monkeypatch.setattr(module, "Client", connect)
        monkeypatch.setattr(sys, "argv", ["headstock", *arguments])
        monkeypatch.setattr(cli.out, "width", 200)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, told.out, told.err)

    return run
