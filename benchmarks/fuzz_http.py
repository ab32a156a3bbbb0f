"""Does any request, however malformed, get an answer that is none, or harm the service?

Requests that schemathesis makes of the OpenAPI schema, good and bad; requests of our own, whose
pictures, bodies, archives, headers and numbers are damaged; and bytes that are hardly HTTP. Every
answer has to be one that the schema lists for its operation, of the media type and shape that it
says: none of 5xx but 503 with `Retry-After`, none that takes seconds. Memory of the service must
not grow with the number of requests. What this does not show: that wrong input is refused wherever
it should be, which the tests of each route do.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

from benchmarks.fuzz_cases import Frame, Sent, changes, frames, inferences, predictions, reads
from benchmarks.report import Figure, arguments, finish, note
from serve.http.openapi import openapi

NUM_CASES = 100_000
QUICK_CASES = 3_000
BLOCK = 200  # cases that one of the makers makes before the next one's turn
SLOW_S = 10.0
ANYWHERE = frozenset({404, 405})  # a name may lead to a path that is none
NOT_NOW = 503
NOT_HTTP = (400, "Invalid HTTP request received.")  # uvicorn's; HAProxy has one of its own
STEPS = 10
GROWTH_MIB = 32

Send = Callable[[Any], None]
Maker = tuple[st.SearchStrategy[Any], Send]


@schemathesis.serializer("application/zip")
def _as_it_is(_: object, value: bytes) -> bytes:
    return value


@dataclass
class Tally:
    """What the service answered."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def add(self, what: str, status: int, seconds: float, text: str, *, says_when: bool) -> None:
        """Count an answer, and note one that is none; 0 is a closed connection."""
        self.statuses[status] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if status >= 500 and not (status == NOT_NOW and says_when):
            self.problems[f"{what}: {status} {text[:200]}"] += 1
        if seconds > SLOW_S:
            self.problems[f"{what}: {seconds:.0f} s"] += 1


class Fuzzer:
    """Sends cases to one service.

    Args:
        url: Where it answers.
    """

    def __init__(self, url: str) -> None:
        self._url, self.tally = url, Tally()
        self._session = requests.Session()
        self._http = httpx.Client(base_url=url, timeout=2 * SLOW_S)
        schema = schemathesis.openapi.from_dict(openapi())
        operations = [r.ok() for r in schema.get_all_operations() if isinstance(r, Ok)]
        by_schema: list[Maker] = [
            (operation.as_strategy(generation_mode=mode), self._send_case)
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if mode is GenerationMode.POSITIVE or _takes_something(operation)
        ]
        ours: list[Maker] = [
            (predictions(), self._send),
            (inferences(), self._send),
            (changes(), self._send),
            (reads(), self._send),
            (frames(), self._send_frame),
        ]
        # As many of ours, which find more.
        turns = itertools.cycle(ours)
        self.makers = [maker for one in by_schema for maker in (one, next(turns))]

    def run(self, num_cases: int, *, first_seed: int = 0) -> None:
        """Send at least so many cases, a block of each maker in turn."""
        goal = self.tally.statuses.total() + num_cases
        size = max(1, min(BLOCK, num_cases // len(self.makers)))
        for block in itertools.count(first_seed):
            if self.tally.statuses.total() >= goal:
                return
            strategy, send = self.makers[block % len(self.makers)]
            _each_of(strategy, send, size, block)

    def close(self) -> None:
        """Close its connections."""
        self._session.close()
        self._http.close()

    def _send_case(self, case: Case[Any]) -> None:
        what, began_s = case.operation.label, time.monotonic()
        try:
            response = self._session.request(
                **case.as_transport_kwargs(base_url=self._url),
                timeout=2 * SLOW_S,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            self._add_broken(what, began_s, error)
            return
        self._add(what, began_s, response.status_code, response.text, response.headers)
        if (response.status_code, response.text) == NOT_HTTP:
            return  # the parser's answer, before there is a request that could have ours
        try:
            case.validate_response(
                response, checks=[content_type_conformance, response_schema_conformance]
            )
        except FailureGroup as failures:
            for failure in failures.exceptions:
                self.tally.problems[f"{what}: {failure}"[:300]] += 1
        listed = {*case.operation.definition.raw["responses"], *map(str, ANYWHERE)}
        if str(response.status_code) not in listed:
            self.tally.problems[f"{what}: {response.status_code} is not listed"] += 1

    def _send(self, sent: Sent) -> None:
        what, began_s = f"{sent.method} {sent.path.partition('?')[0][:40]}", time.monotonic()
        headers = [(n.encode(), value.encode("latin-1")) for n, value in sent.headers.items()]
        try:
            response = self._http.request(
                sent.method, sent.path, content=sent.body, headers=headers
            )
        except (httpx.TransportError, httpx.DecodingError) as error:
            self._add_broken(what, began_s, error)
            return
        self._add(what, began_s, response.status_code, response.text, response.headers)

    def _send_frame(self, frame: Frame) -> None:
        """Bytes, and then nothing more; the answer, if there is one, ends with the connection."""
        what, began_s = f"frame {frame.data[:40]!r}", time.monotonic()
        try:
            told = exchange(self._url, frame.data, timeout_s=2 * SLOW_S)
        except TimeoutError as error:
            self._add_broken(what, began_s, error)
            return
        status = int(told[9:12]) if told[:7] == b"HTTP/1." and told[9:12].isdigit() else 0
        text = told.decode("latin-1")
        headers = {"retry-after": ""} if "retry-after" in text.lower() else {}
        self._add(what, began_s, status, text, headers)

    def _add(
        self, what: str, began_s: float, status: int, text: str, headers: Mapping[str, str]
    ) -> None:
        seconds, says_when = time.monotonic() - began_s, "retry-after" in headers
        self.tally.add(what, status, seconds, text, says_when=says_when)

    def _add_broken(self, what: str, began_s: float, error: Exception) -> None:
        self._add(what, began_s, 0, "", {})
        self.tally.problems[f"{what}: {type(error).__name__}: {error}"[:200]] += 1


def _takes_something(operation: schemathesis.APIOperation[Any, Any, Any, Any]) -> bool:
    """Whether there is anything in it to get wrong."""
    return bool(
        operation.definition.raw.get("parameters") or "requestBody" in operation.definition.raw
    )


def _each_of(strategy: st.SearchStrategy[Any], send: Send, number: int, first_seed: int) -> None:
    """Send what a strategy makes, the same for the same seed."""

    @seed(first_seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(case: Any) -> None:
        send(case)

    # Not everything can be got wrong: any text is good as a name.
    with contextlib.suppress(Unsatisfiable):
        each()


def exchange(url: str, frame: bytes, *, timeout_s: float) -> bytes:
    """What a server says to these bytes until it closes the connection; its first 64 kB."""
    host, _, port = urlsplit(url).netloc.partition(":")
    told = b""
    with (
        socket.create_connection((host, int(port)), timeout=timeout_s) as connection,
        # The server may have said no, and gone, before all is sent.
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(frame)
        with contextlib.suppress(OSError):  # ENOTCONN, where it has gone already
            connection.shutdown(socket.SHUT_WR)
        while len(told) < 2**16 and (more := connection.recv(2**16)):
            told += more
    return told


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A service in a process of its own: where it answers, and the process."""
    command = [sys.executable, "-m", "benchmarks.fuzz_service", str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), psutil.Process(process.pid)
    finally:
        process.communicate(timeout=60)


def main() -> None:
    """Warm it up, note its memory, send the rest, note it again."""
    chosen = arguments(__doc__ or "")
    num_cases = QUICK_CASES if chosen.quick else NUM_CASES
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as (url, process):
        fuzzer = Fuzzer(url)
        memory_mib = [_resident_mib(process)]
        for step in range(STEPS):
            fuzzer.run(num_cases // STEPS, first_seed=step * num_cases)
            memory_mib.append(_resident_mib(process))
            tally = fuzzer.tally
            note(
                f"{tally.statuses.total()} of {num_cases} cases, {memory_mib[-1]:.0f} MiB; "
                f"{len(tally.problems)} problems"
            )
        fuzzer.close()
        is_alive = httpx.get(f"{url}/v2/health/ready").status_code == 200
    for problem, times in tally.problems.most_common():
        note(f"{times} x {problem}")
    note(f"by status: {dict(sorted(tally.statuses.items()))}")
    # The first steps fill caches and pools; what matters is whether the later ones add to them.
    grown_mib = memory_mib[-1] - memory_mib[STEPS // 2]
    finish(
        "fuzz_http",
        [
            _exact("cases", tally.statuses.total(), "", ""),
            _exact(
                "answers that are none, or are not as listed", tally.problems.total(), "", "<= 0"
            ),
            _exact("answers of 503, which say when to ask again", tally.statuses[503], "", ""),
            _exact("slowest answer", tally.slowest_s, "s", f"<= {SLOW_S:g}"),
            _exact("ready at the end", is_alive, "", ">= 1"),
            _exact("memory after the first half", memory_mib[STEPS // 2], "MiB", ""),
            _exact("memory that the second half added", grown_mib, "MiB", f"<= {GROWTH_MIB}"),
        ],
        chosen,
    )


def _resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def _exact(name: str, value: float, unit: str, aim: str) -> Figure:
    return Figure(name, float(value), float(value), float(value), unit, aim)


if __name__ == "__main__":
    main()
