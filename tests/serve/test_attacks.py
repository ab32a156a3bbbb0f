"""What somebody would try who means harm, and that nothing comes of it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import re
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve import access
from serve.access import NoAccessError, caller_of
from serve.http.routes import http_app
from tests.serve import bombs
from tests.serve.front_door import FrontDoor
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.holders import NOW, token_for, token_text
from tests.serve.oracle import Heads
from tests.serve.test_http import encoded, plain, png_of, problem

MB = 2**20
SOON_S = 3.0
BODY_TIMEOUT_S = 1.0

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux")


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Any]
) -> Iterator[LocalFleet]:
    """One replica with the task that is attacked."""
    store = tmp_path_factory.mktemp("store")
    settings = {"body_timeout_s": BODY_TIMEOUT_S}
    with LocalFleet(store, trunk_folder, replicas=1, **settings) as fleet:
        fleet.must_push(Heads(make_bundle)(1))
        yield fleet


@pytest.fixture(scope="module")
def door(fleet: LocalFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """HAProxy before that replica."""
    app = http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
    folder = tmp_path_factory.mktemp("door")
    with FrontDoor(folder, app, body_timeout_s=BODY_TIMEOUT_S) as door:
        yield door


# Names


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..%5c..%5cetc",
        "..%252f..%252fetc",
        "....//....//etc",
        "..;/log",
        "colours%00.json",
        "colours%0d%0aset-cookie:%20a=b",
        "%c0%ae%c0%ae%c0%afetc",
        "%ff%fe",
        "~root",
        "CON",
        "${HOME}",
        "%24%7Bjndi%3Aldap%3A%2F%2Fx%7D",
        "'%20or%20'1'='1",
        "a" * 1000,
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/predict/{}"),
        ("GET", "/tasks/{}"),
        ("GET", "/tasks/{}/card"),
        ("DELETE", "/tasks/{}"),
        ("POST", "/tasks/{}/rollback"),
        ("GET", "/bundles/{}"),
        ("DELETE", "/keys/{}"),
        ("DELETE", "/tokens/{}"),
    ],
)
def test_a_name_is_never_a_path(
    fleet: LocalFleet, http: HttpClient, method: str, path: str, name: str
) -> None:
    """Not encoded either, nor twice: what is unknown is told so, and nothing is touched."""
    store = Path(fleet.settings.store)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    answer = http.request(method, path.format(name), content=png_of(0))
    after = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}

    assert answer.status_code in {400, 404, 405, 409}, answer.text
    assert "root:" not in answer.text
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-type"] == "application/problem+json"
    assert after == before


# Smuggling: what the proxy takes for one request, the replica must not take for two.

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
FIRST = b"POST /first HTTP/1.1\r\nHost: a\r\n"


@on_linux
@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding : chunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: xchunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding:\x0bchunked\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked, identity\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nX: y\r\n Transfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nX: y\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nTransfer_Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 4\r\n",
        b"Content-Length: 4, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5 \r\n",
        b"Content-Length: 18446744073709551621\r\n",
        b"Content-Length: 0\r\nContent-Length : 5\r\n",
        b"Content-Length\x00: 5\r\n",
        b"Content-Length:\r\n 5\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n",
        b"Connection: Content-Length\r\nContent-Length: 5\r\n",
    ],
)
def test_a_request_in_a_body_is_never_answered(door: FrontDoor, head: bytes) -> None:
    """However its length is told: proxy and replica agree on where it ends, or it is refused.

    Did they not, then the replica would answer more requests than come back to the caller, and
    whoever asks next would get what is left over.
    """
    door.seen.clear()
    told = door.say(FIRST + head + b"\r\n" + b"0\r\n\r\n" + HIDDEN)
    next_told = door.say(b"GET /tasks HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")

    assert told.count(b"server: uvicorn") == len(door.seen) - 1
    assert len(re.findall(rb"HTTP/1\.[01] [0-9]{3}", told)) <= len(door.seen)
    assert door.seen[-1] == ("GET", "/tasks")
    assert b'"log_number"' in next_told


@on_linux
@pytest.mark.parametrize(
    "body",
    [
        b"ffffffffffffffff1\r\n",
        b"-1\r\n",
        b"0x4\r\nabcd\r\n0\r\n\r\n",
        b"4;" + b"x" * 70000 + b"\r\nabcd\r\n0\r\n\r\n",
        b"4\nabcd\n0\n\n",
        b"4\r\nabcdXX0\r\n\r\n",
        b" 4\r\nabcd\r\n0\r\n\r\n",
    ],
)
def test_a_malformed_chunk_is_refused_by_the_front_door(door: FrontDoor, body: bytes) -> None:
    """Nothing of what follows is taken for a request."""
    door.seen.clear()
    told = door.say(FIRST + b"Transfer-Encoding: chunked\r\n\r\n" + body + HIDDEN)

    assert ("GET", "/smuggled") not in door.seen
    assert told.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408", b"HTTP/1.0 400")) or not told


@on_linux
@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["header", "headers", "address", "hosts", "version", "zero", "TLS", "HTTP/2"],
)
def test_what_is_no_request_is_refused_and_harms_nobody(door: FrontDoor, head: bytes) -> None:
    """By the proxy, or by the replica in our own words; the next caller is answered."""
    told = door.say(head)

    assert not re.match(rb"HTTP/1\.[01] (2|5)", told), told[:200]
    assert b"200" in door.say(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")


# Slow callers


@on_linux
@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n", b"X-a: b\r\n"),
        (b"", b"G"),
        (FIRST + b"Content-Length: 1000\r\n\r\n", b"x"),
        (FIRST + b"Content-Length: 200000\r\n\r\n" + bytes(100_000), b"x"),
        (FIRST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["headers", "method", "body", "large body", "chunks"],
)
def test_a_caller_who_drips_is_given_up(door: FrontDoor, start: bytes, drop: bytes) -> None:
    """Though something comes all the time; others are answered meanwhile."""
    start = start.replace(b"/first", b"/predict/colours")
    began_s = time.monotonic()
    ended = False
    with door.connect() as slow:
        slow.settimeout(0.05)
        slow.sendall(start)
        while not ended and time.monotonic() - began_s < 10 * BODY_TIMEOUT_S:
            try:
                slow.sendall(drop)
                slow.recv(4096)
                ended = True
            except TimeoutError:
                time.sleep(0.05)
            except OSError:
                ended = True
            if not ended:
                assert b"200" in door.say(
                    b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                )

    assert ended
    assert time.monotonic() - began_s < 5 * BODY_TIMEOUT_S


@on_linux
def test_a_hundred_slow_callers_keep_nobody_waiting(door: FrontDoor) -> None:
    """They hold connections of the proxy, and nothing of a replica."""
    slow = [door.connect() for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"POST /predict/colours HTTP/1.1\r\nHost: a\r\nContent-Le")
        began_s = time.monotonic()
        told = door.say(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    finally:
        for connection in slow:
            connection.close()

    assert told.startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began_s < SOON_S


# Pictures


@pytest.mark.parametrize(
    ("bomb", "status"),
    [
        (lambda: bombs.claiming_jpeg(65_000), 413),
        (lambda: bombs.png(30_000), 413),
        (lambda: bombs.webp(12_000), 413),
        (lambda: bombs.claiming_webp(16_384), 415),
        (lambda: bombs.jpeg_of_scans(2000, 5000), 415),
        (lambda: bombs.jpeg_of_segments(1_000_000), 415),
        (lambda: bombs.png_of_chunks(500_000), 415),
        (lambda: bombs.png_of_text("zTXt", 300 * MB), 415),
        (lambda: bombs.png_of_text("iTXt", 300 * MB), 415),
        (lambda: bombs.png_of_text("iCCP", 300 * MB), 415),
        (lambda: bombs.png_of_text("zTXt", MB - 10, times=300), 415),
        (lambda: bombs.png_of_text("iCCP", MB - 10, times=300), 415),
    ],
    ids=[
        "JPEG", "PNG", "WebP", "WebP canvas", "scans", "segments", "chunks", "zTXt", "iTXt", "iCCP",
        "many zTXt", "many iCCP",
    ],
)  # fmt: skip
def test_a_picture_bomb_takes_neither_memory_nor_time(
    http: HttpClient, bomb: Callable[[], bytes], status: int
) -> None:
    """In whichever format, of pixels, parts, or what is packed beside them."""
    data, process = bomb(), psutil.Process()
    before = process.memory_info().rss
    began_s = time.monotonic()
    response = http.post("/predict/colours", content=data)

    problem(response, status)
    assert time.monotonic() - began_s < SOON_S
    assert process.memory_info().rss - before < 100 * MB


def zip_file() -> bytes:
    """An archive with a page in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("index.html", "<script>")
    return buffer.getvalue()


@pytest.mark.parametrize("tail", [b"<script>alert(1)</script>", zip_file(), b"%PDF-1.7", png_of(1)])
def test_a_picture_with_something_behind_it_is_that_picture(http: HttpClient, tail: bytes) -> None:
    """What else it is for another program is no business of ours; the answer is JSON either way."""
    for form in ("JPEG", "PNG"):
        picture = encoded(plain(), form)
        alone = http.post("/predict/colours", content=picture)
        both = http.post("/predict/colours", content=picture + tail)

        assert both.json() == alone.json()
        assert both.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(plain(), form) for form in ("GIF", "BMP", "TIFF", "ICO", "PPM", "PCX", "TGA")),
        zip_file() + encoded(plain()),
        b"GIF89a" + encoded(plain(), "JPEG"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"\x0a\x05\x01\x08" + bytes(200),
    ],
)
def test_only_three_formats_are_ever_opened(http: HttpClient, data: bytes) -> None:
    """By their first bytes, whatever their sender says that they are."""
    for kind in ("image/jpeg", "image/gif", "application/octet-stream"):
        response = http.post("/predict/colours", content=data, headers={"content-type": kind})

        assert "JPEG, PNG, WebP" in problem(response, 415)


# Tokens


def test_every_token_is_compared_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash, and two comparisons in constant time of equally long digests: by construction."""
    known = {token.token_id: token for token in (token_for(1, "admin"), token_for(2, "metrics"))}
    compared: list[tuple[int, int]] = []
    hashed: list[int] = []

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    def digest(text: str) -> str:
        hashed.append(len(text))
        return hashlib.sha256(text.encode()).hexdigest()

    monkeypatch.setattr(access, "hmac", type("Spy", (), {"compare_digest": staticmethod(compare)}))
    monkeypatch.setattr(access, "digest_of_token", digest)
    texts = [token_text(1), token_text(2), token_text(3), token_text(1)[:-1] + "f", "", "x" * 200]
    for text in texts:
        for admin in ("", "a" * 64):
            with contextlib.suppress(NoAccessError):
                caller_of(text, known, admin_sha256=admin, now=NOW)

    assert compared == [(64, 64)] * 4 * len(texts)
    assert hashed == [len(text) for text in texts for _ in range(2)]


def seconds_of(check: Callable[[str], object], texts: list[str]) -> list[float]:
    """The median time of each text, asked in turn so that what else runs disturbs all alike."""
    times: list[list[float]] = [[] for _ in texts]
    for _ in range(4000):
        for place, text in enumerate(texts):
            began_s = time.perf_counter()
            check(text)
            times[place].append(time.perf_counter() - began_s)
    return [statistics.median(mine) for mine in times]


def test_the_time_of_a_refusal_tells_nothing_of_the_token() -> None:
    """Right in none, half or all but the last of its digits, of a known id: the same to 5 %.

    A comparison that stops at the first difference tells them apart by this measure.
    """
    secret = token_text(0xABCDEF)
    known = {secret[3:15]: token_for(0xABCDEF, "admin")}
    guesses = [secret[:16] + "f" * 64, secret[:48] + "f" * 32, secret[:-1] + "0"]

    def refused(text: str) -> None:
        try:
            caller_of(text, known, admin_sha256="", now=NOW)
        except NoAccessError:
            return
        raise AssertionError

    def naive(text: str) -> bool:
        return all(a == b for a, b in zip(text, secret, strict=True))

    ours, theirs = seconds_of(refused, guesses), seconds_of(naive, guesses)
    assert max(ours) / min(ours) < 1.05
    assert max(theirs) / min(theirs) > 1.5
