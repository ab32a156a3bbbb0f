"""The OpenAPI schema, as JSON and as a page that needs nothing from elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.http.openapi import openapi

STATIC = Path(__file__).parent / "static"
# RapiDoc 9.3.8 as its npm package has it, which is compressed.
SCRIPT = STATIC / "rapidoc-min.js.gz"
# Whatever the page asks for, the browser lets nothing go anywhere but here.
FROM_HERE = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def schema(_: Request) -> Response:
    """The OpenAPI schema."""
    # It takes a moment to make the first time.
    return Response(orjson.dumps(await asyncio.to_thread(openapi)), media_type="application/json")


async def page(_: Request) -> Response:
    """The schema to read and to try."""
    headers = {"content-security-policy": FROM_HERE}
    return Response((STATIC / "docs.html").read_bytes(), headers=headers, media_type="text/html")


async def script(_: Request) -> Response:
    """What draws the page."""
    headers = {"content-encoding": "gzip", "cache-control": "max-age=3600"}
    return Response(SCRIPT.read_bytes(), headers=headers, media_type="text/javascript")
