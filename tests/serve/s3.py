"""An S3-compatible server in a process of its own: moto, as its own users start it.

What it does not show is in docs/head-log.md.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from types import TracebackType
from typing import Self

import httpx

BUCKET = "heads"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}

# It ends with its standard input, so also when the tests are killed. Puts go one at a time, because
# moto looks whether there is an object and then writes it: now and then two of 8 rivals won.
SERVER = """
import logging, sys, threading
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

put, one_at_a_time = S3Response.put_object, threading.Lock()

def put_alone(response):
    with one_at_a_time:
        return put(response)

S3Response.put_object = put_alone
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """A server with one empty bucket; use as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        httpx.put(f"{self.url}/{BUCKET}").raise_for_status()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate("")

    def variables(self) -> dict[str, str]:
        """What a program needs in its environment to find this server and be let in."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}


def new_url() -> str:
    """A place in the bucket that nobody has used."""
    return f"s3://{BUCKET}/{secrets.token_hex(6)}/log"
