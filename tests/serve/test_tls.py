"""The front door's certificate: checked before anything starts, and shown to who connects."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serve.tls import CertificateError, certificate_for, context_for
from tests.serve.certificates import certificate_in
from tests.serve.front_door import FrontDoor


def test_without_a_certificate_there_is_none(tmp_path: Path) -> None:
    """The default: whatever stands in front of the service speaks TLS."""
    assert certificate_for(tmp_path, "", "") is None
    assert context_for(None) is True


def test_a_key_is_linked_and_not_copied(tmp_path: Path) -> None:
    """So that there is one, and a renewed one is found."""
    certificate, key = certificate_in(tmp_path / "given")
    pem = certificate_for(tmp_path, str(certificate), str(key))

    assert pem is not None
    assert pem.resolve() == certificate
    assert pem.with_name(f"{pem.name}.key").is_symlink()
    assert pem.with_name(f"{pem.name}.key").resolve() == key


def test_a_certificate_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    """One of the two is missing, no such file, of another pair, or locked: nobody is asked."""
    certificate, key = map(str, certificate_in(tmp_path / "a"))
    _, other = map(str, certificate_in(tmp_path / "b"))
    _, locked = map(str, certificate_in(tmp_path / "c", passphrase=b"sesame"))

    for files, reason in (
        ((certificate, ""), "Set both"),
        (("", key), "Set both"),
        ((certificate, str(tmp_path / "none")), "No such file"),
        ((key, key), "cannot be used"),
        ((certificate, other), "mismatch"),
        ((certificate, locked), "cannot be used"),
    ):
        with pytest.raises(CertificateError, match=reason):
            certificate_for(tmp_path, *files)


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux")
def test_the_front_door_speaks_tls_with_it(tmp_path: Path) -> None:
    """And nothing else on that port; the service trusts its own, and nobody else's default does."""

    async def scheme(_: Request) -> Response:
        return PlainTextResponse("hello")

    certificate, key = certificate_in(tmp_path / "given")
    pem = certificate_for(tmp_path, str(certificate), str(key))
    app = Starlette(routes=[Route("/", scheme)])
    with FrontDoor(tmp_path, app, body_timeout_s=5.0, certificate=pem) as door:
        url = f"https://127.0.0.1:{door.port}"
        told = httpx.get(url, verify=ssl.create_default_context(cafile=str(certificate)))
        own = httpx.get(url, verify=context_for(pem))
        plainly = door.say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)

    assert (told.text, own.text) == ("hello", "hello")
    assert b"hello" not in plainly
