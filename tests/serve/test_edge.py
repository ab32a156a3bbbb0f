"""What is refused at the edge: each bound with a request that would take memory or time without."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request
from starlette.types import Message

from serve.http.body import (
    MAX_JSON_DEPTH,
    MAX_JSON_SYMBOLS,
    QUICK_BYTES,
    pictures_in,
    read_body,
)
from serve.http.problems import RequestError
from serve.http.routes import http_app
from tests.serve import bombs
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem

MB = 2**20
MOST_BYTES = 16 * MB  # of memory, for a request of which 4 MB are accepted
SOON_S = 2.0


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Any]
) -> Iterator[LocalFleet]:
    """One replica with small bounds and two tasks."""
    settings = {
        "max_body_bytes": 4 * MB,
        "max_header_bytes": 4096,
        "max_rows": 5,
        "body_timeout_s": 0.4,
    }
    heads = Heads(make_bundle)
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, **settings) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield fleet


@contextmanager
def memory_below(most_bytes: int) -> Iterator[None]:
    """Fails if Python holds more at any moment than before."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < most_bytes, f"{(peak - before) / MB:.0f} MB"


async def endless(piece: bytes) -> AsyncIterator[bytes]:
    """The same piece for ever, without a length."""
    while True:
        yield piece


# Bytes


@pytest.mark.parametrize("path", ["/predict/colours", "/tasks/colours/rollback"])
def test_a_body_without_a_length_is_cut_off(http: HttpClient, path: str) -> None:
    """An endless one too."""
    with memory_below(MOST_BYTES):
        response = http.post(path, content=endless(bytes(64 * 1024)))

    assert "is larger than" in problem(response, 413)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_opened(http: HttpClient, encoding: str) -> None:
    """The answer is that of the picture in it."""
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    plain = http.post("/predict/colours", content=png_of(0))
    packed = http.post(
        "/predict/colours", content=pack(png_of(0)), headers={"content-encoding": encoding}
    )

    assert packed.json() == plain.json()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_bomb_takes_no_memory(http: HttpClient, encoding: str) -> None:
    """300 MB in 300 kB."""
    bomb = bombs.zeros(encoding, 300 * MB)
    with memory_below(MOST_BYTES):
        response = http.post(
            "/predict/colours", content=bomb, headers={"content-encoding": encoding}
        )

    assert "once it is opened" in problem(response, 413)


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip, deflate", "br", "zstd", "compress"])
def test_a_body_in_an_encoding_that_is_not_opened_is_refused(
    http: HttpClient, encoding: str
) -> None:
    """Nor one in several: a bomb in a bomb."""
    bomb = gzip.compress(bombs.zeros("gzip", 100 * MB))
    response = http.post("/predict/colours", content=bomb, headers={"content-encoding": encoding})

    assert "expected gzip or deflate, once" in problem(response, 415)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (gzip.compress(png_of(0))[:-4], "ends before"),
        (gzip.compress(png_of(0)) + b"more", "goes on after"),
        (b"plain" + gzip.compress(png_of(0)), "is not gzip"),
    ],
    ids=["cut", "more", "plain"],
)
def test_a_damaged_compressed_body_is_malformed(http: HttpClient, body: bytes, reason: str) -> None:
    """Cut, with something behind it, or not compressed at all."""
    response = http.post("/predict/colours", content=body, headers={"content-encoding": "gzip"})

    assert reason in problem(response, 400)


# JSON


def test_deep_json_is_refused(http: HttpClient) -> None:
    """Before it is parsed; brackets in texts are none."""
    deep = b'{"to":' + b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1) + b"}"
    text = json.dumps({"message": "[" * 100 + '\\"', "more": 1})
    refused = http.post("/tasks/colours/rollback", content=deep)
    shallow = http.post("/tasks/colours/rollback", content=text)

    assert f"deeper than {MAX_JSON_DEPTH}" in problem(refused, 400)
    assert "'more' is unknown" in problem(shallow, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * (MB // 3 * 4 - 2) + b"[]]",
        b'{"image":[' + b"{}," * (MB // 3 * 4 - 9) + b"{}]}",
        b"[" * (4 * MB),
        b"]" * (4 * MB),
        b'"' * (4 * MB),
        b'"' + b'\\"' * (2 * MB - 1),
        b'{"image":"' + b"A" * (4 * MB - 30),
    ],
    ids=["lists", "objects", "opened", "closed", "quotes", "escapes", "unended"],
)
def test_json_of_many_values_takes_neither_memory_nor_time(http: HttpClient, body: bytes) -> None:
    """Four megabytes of empty lists would take ninety."""
    headers = {"content-type": "application/json"}
    began_s = time.monotonic()
    with memory_below(24 * MB):
        response = http.post("/predict/colours", content=body, headers=headers)

    assert response.status_code in {400, 413}
    assert time.monotonic() - began_s < SOON_S


# Rows and headers


def test_a_request_has_so_many_answers_and_no_more(http: HttpClient) -> None:
    """Pictures times tasks, those of `*` too."""
    files = [("image", png_of(0))] * 3
    refused = [http.post(f"/predict?tasks={t}", files=files) for t in ("*", "colours,shapes")]
    alone = http.post("/predict?tasks=colours", files=files)

    for response in refused:
        assert "3 pictures of 2 tasks are 6 answers; at most 5" in problem(response, 413)
    assert alone.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"x-large": "x" * 4096},
        {f"x-{n}": "x" for n in range(1000)},
        {"authorization": "Bearer " + "x" * 5000},
    ],
)
def test_large_headers_are_refused(http: HttpClient, headers: dict[str, str]) -> None:
    """One large or many small."""
    assert "at most 4096 are accepted" in problem(http.get("/tasks", headers=headers), 431)


def test_a_large_address_is_refused(http: HttpClient) -> None:
    """It is searched and quoted as headers are."""
    assert "at most 4096" in problem(http.get("/tasks/" + "a" * 4096), 431)
    assert "at most 4096" in problem(http.get("/tasks?" + "a" * 4096), 431)


# Time


def drip(fleet: LocalFleet, pieces: AsyncIterator[bytes], path: str) -> httpx.Response:
    """The answer to a body that comes piece by piece, as a server gives it to the application."""

    async def ask() -> httpx.Response:
        app = http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
        told: list[Message] = []

        async def receive() -> Message:
            piece = await anext(pieces, None)
            if piece is None:
                return {"type": "http.request", "body": b"", "more_body": False}
            return {"type": "http.request", "body": piece, "more_body": True}

        async def send(message: Message) -> None:
            told.append(message)

        method, _, path_ = path.partition(" ")
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path_,
            "raw_path": path_.encode(),
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        await app(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in told)
        return httpx.Response(told[0]["status"], headers=told[0]["headers"], content=content)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "path",
    [
        "POST /predict/colours",
        "POST /tasks/colours/versions",
        "POST /tasks/colours/rollback",
        "PUT /tasks/colours/heldout",
        "PATCH /tasks/colours",
        "POST /keys",
    ],
)
def test_a_body_that_drips_is_given_up(fleet: LocalFleet, path: str) -> None:
    """Whichever route it is for, and though something comes all the time."""

    async def drops() -> AsyncIterator[bytes]:
        for _ in range(200):
            await asyncio.sleep(0.02)
            yield b"x"

    began_s = time.monotonic()
    response = drip(fleet, drops(), path)

    assert "not here after 0.4 s" in problem(response, 408)
    assert response.headers["connection"] == "close"
    assert time.monotonic() - began_s < SOON_S


def test_a_body_that_is_there_in_time_may_be_answered_later(fleet: LocalFleet) -> None:
    """The clock stops with the body's end."""

    async def in_time() -> AsyncIterator[bytes]:
        data = png_of(0)
        yield data[:10]
        await asyncio.sleep(0.2)
        yield data[10:]

    assert drip(fleet, in_time(), "POST /predict/colours").status_code == 200


# Without the application


async def _read(body: bytes, headers: dict[str, str], most: int) -> bytes:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "headers": raw}, receive)
    data = await read_body(request, max_bytes=most)
    (picture,) = await pictures_in(request, data, max_pictures=1)
    return picture


def test_the_bound_holds_for_what_a_body_opens_to() -> None:
    """To the byte."""
    packed, headers = gzip.compress(b"x" * 1000), {"content-encoding": "gzip"}

    assert asyncio.run(_read(packed, headers, 1000)) == b"x" * 1000
    with pytest.raises(RequestError, match="more than 999 bytes"):
        asyncio.run(_read(packed, headers, 999))


@pytest.mark.parametrize(
    ("encoding", "beside"), [("gzip", ["feed", "join"]), ("identity", ["join"])]
)
def test_a_large_body_is_opened_and_put_together_beside_the_event_loop(
    encoding: str, beside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 KiB may open to 64 MiB, which would keep all others waiting for 0.2 s."""
    in_thread: list[str] = []
    to_thread = asyncio.to_thread

    async def noted(call: Callable[..., Any], *given: Any) -> Any:
        in_thread.append(call.__name__)
        return await to_thread(call, *given)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    data = np.random.default_rng(1).bytes(QUICK_BYTES + 1)
    body = gzip.compress(data) if encoding == "gzip" else data
    opened = asyncio.run(_read(body, {"content-encoding": encoding}, 2 * len(data)))

    assert opened == data
    # The conductor of the other tests has threads too.
    assert [name for name in in_thread if name in {"feed", "join"}] == beside


def test_json_may_have_so_many_symbols() -> None:
    """To the symbol."""

    def read(num_commas: int) -> bytes:
        body = b'{"image": "' + b"," * num_commas + b'"}'
        return asyncio.run(_read(body, {"content-type": "application/json"}, 10**6))

    with pytest.raises(RequestError, match="is not base64"):
        read(MAX_JSON_SYMBOLS - 7)
    with pytest.raises(RequestError, match="has more than 50000 brackets"):
        read(MAX_JSON_SYMBOLS - 6)
