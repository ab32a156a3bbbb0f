"""Request bodies, bounded while they arrive, and the pictures in them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator, Iterable
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve.http.inflate import Inflater
from serve.http.problems import RequestError

FIELD = "image"
MAX_FILES = 10_000
# What takes the event loop longer is done in a thread: 64 MiB are joined in 61 ms, and a piece of
# 64 KiB may open to 32 MiB in 112 ms, while weights take 0.4 (AMD EPYC, busy machine, 2026-11-22).
QUICK_BYTES = 2**20
# What is asked here has few values, none of them deep; see docs/limits.md.
MAX_JSON_SYMBOLS = 50_000
MAX_JSON_DEPTH = 16
_SYMBOLS = (b"[", b"]", b"{", b"}", b",", b":", b'"')
# A string goes to its end, or to that of the body: what begins is read once.
_BRACKETS = re.compile(rb'[][{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body, opened if it is compressed.

    It is cut off at the limit, whatever length was announced.

    Raises:
        RequestError: more than `max_bytes`, as they came or opened; or an encoding that is not
            opened here.
    """
    announced = request.headers.get("content-length", "0")
    encoding = request.headers.get("content-encoding", "identity")
    inflater = None if encoding == "identity" else Inflater(encoding, max_bytes=max_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    if announced.isdigit() and int(announced) <= max_bytes:
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                break
            if inflater and chunk:
                chunk = await asyncio.to_thread(inflater.feed, chunk)  # noqa: PLW2901
            chunks.append(chunk)
        else:
            if inflater:
                inflater.end()
            if sum(map(len, chunks)) <= QUICK_BYTES:
                return b"".join(chunks)
            return await asyncio.to_thread(b"".join, chunks)
    raise _too_large(max_bytes)


async def pictures_in(request: Request, body: bytes, *, max_pictures: int) -> list[bytes]:
    """The encoded pictures of a request: the body itself, multipart fields, or base64 in JSON.

    Raises:
        RequestError: empty, malformed, or too many pictures.
    """
    if not body:
        raise RequestError(400, "The body is empty; send a JPEG, PNG or WebP as the body.")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        pictures = await _multipart(request, body, max_pictures)
    elif content_type == "application/json":
        pictures = [_from_json(body)]
    else:
        pictures = [body]
    for number, picture in enumerate(pictures, start=1):
        if not picture:
            raise RequestError(400, f"The body's picture {number} is empty.")
    return pictures


async def json_object(request: Request, *, max_bytes: int) -> dict[str, object]:
    """A small JSON object; an empty body is an empty object.

    Raises:
        RequestError: not a JSON object, or too large.
    """
    body = await read_body(request, max_bytes=max_bytes)
    value = _parse(body or b"{}")
    if not isinstance(value, dict):
        raise RequestError(400, f"The body is a JSON {type(value).__name__}; expected an object.")
    return value


class File(NamedTuple):
    """A file of a multipart body: its field, the name that it was sent under, its bytes."""

    field: str
    name: str
    data: bytes


async def files_in(request: Request, *fields: str, max_bytes: int) -> list[File]:
    """The files of a multipart body, in their order; what is large waits on disk meanwhile.

    Raises:
        RequestError: more than `max_bytes`, no files, or a field that is none of these.
    """
    expected = f"expected multipart/form-data with files named {' and '.join(fields)}"
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise RequestError(400, f"The body is {content_type or 'of no type'}; {expected}.")

    async def stream() -> AsyncGenerator[bytes]:
        size_bytes = 0
        async for chunk in request.stream():
            size_bytes += len(chunk)
            if size_bytes > max_bytes:
                raise _too_large(max_bytes)
            yield chunk

    parser = MultiPartParser(request.headers, stream(), max_files=MAX_FILES, max_fields=0)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise RequestError(400, f"The multipart body cannot be read: {error}; {expected}.") from (
            error
        )
    try:
        parts = [(field, part) for field, part in form.multi_items() if not isinstance(part, str)]
        if not parts:
            raise RequestError(400, f"The multipart body has no files; {expected}.")
        if others := sorted({field for field, _ in parts} - set(fields)):
            raise RequestError(400, f"Field {others[0]!r} is unknown; {expected}.")
        return [File(field, part.filename or "", await part.read()) for field, part in parts]
    finally:
        await form.close()


def check_fields(given: Iterable[str], *known: str) -> None:
    """What is not understood is refused: it may have been meant.

    Raises:
        RequestError: a field has another name than these.
    """
    if unknown := sorted(set(given) - set(known)):
        raise RequestError(400, f"Field {unknown[0]!r} is unknown; expected {', '.join(known)}.")


async def _multipart(request: Request, body: bytes, max_pictures: int) -> list[bytes]:
    async def stream() -> AsyncGenerator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=max_pictures, max_fields=max_pictures
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise RequestError(400, f"The multipart body cannot be read: {error}.") from error
    try:
        parts = form.getlist(FIELD)
        if not parts:
            raise RequestError(400, f"The multipart body has no field named {FIELD!r}.")
        if others := sorted(set(form) - {FIELD}):
            raise RequestError(400, f"Field {others[0]!r} is unknown; send pictures as {FIELD!r}.")
        if len(parts) > max_pictures:  # files and texts have a bound each
            raise RequestError(
                400, f"The body holds {len(parts)} pictures; at most {max_pictures} are accepted."
            )
        return [
            await part.read() if isinstance(part, UploadFile) else part.encode() for part in parts
        ]
    finally:
        await form.close()


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"The body is larger than {max_bytes} bytes, the most accepted here.")


def _from_json(body: bytes) -> bytes:
    value = _parse(body)
    if not isinstance(value, dict) or set(value) != {FIELD} or not isinstance(value[FIELD], str):
        raise RequestError(400, f'The JSON body must be {{"{FIELD}": "<base64>"}}.')
    try:
        return base64.b64decode(value[FIELD], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"The field {FIELD!r} is not base64: {error}.") from error


def _parse(body: bytes) -> object:
    check_json(body, max_symbols=MAX_JSON_SYMBOLS)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}.") from error


def check_json(body: bytes, *, max_symbols: int) -> None:
    """Refuse JSON that is large or deep once it is read.

    Raises:
        RequestError: more brackets, commas, colons and quotes than that, or nested too deep.
    """
    # Three bytes of an empty list take 64 of memory, so a body of 16 MB would take 340.
    if sum(map(body.count, _SYMBOLS)) > max_symbols:
        raise RequestError(
            413, f"The JSON body has more than {max_symbols} brackets, commas and quotes."
        )
    depth = 0
    for token in _BRACKETS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > MAX_JSON_DEPTH:
            raise RequestError(400, f"The JSON body is nested deeper than {MAX_JSON_DEPTH} levels.")
