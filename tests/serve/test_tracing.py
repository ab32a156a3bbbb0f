"""What arrives at an OTLP endpoint: one trace for each request, with its steps inside it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from typing_extensions import override

from export.bundle import Bundle
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{PARENT}-{flag}" for flag in ("01", "00"))


class Collector:
    """An OTLP endpoint: what is sent to it, decoded by OpenTelemetry's own messages."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collected = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collected.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            @override
            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        """Of all processes."""
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        """Take nothing more."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where spans are sent from now on."""
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.close()


@pytest.fixture
def asked(
    tmp_path: Path, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Callable[[str, bytes, str], httpx.Response]:
    """A function that starts a replica with one task, asks it once, and stops it."""

    def ask(path: str, body: bytes, traceparent: str) -> httpx.Response:
        with LocalFleet(tmp_path / "store", trunk_folder, replicas=1) as fleet:
            fleet.must_push(Heads(make_bundle)(1))
            client = HttpClient(fleet, "replica-1")
            return client.post(path, content=body, headers={"traceparent": traceparent})

    return ask


def test_a_prediction_is_a_span_of_its_callers_trace_with_its_steps(
    collector: Collector, asked: Callable[..., httpx.Response]
) -> None:
    """Decode, queue, trunk and head follow one another within it."""
    answer = asked("/predict/colours", png_of(0), SAMPLED)
    spans = {span.name: span for span in collector.spans()}
    request = spans.pop("POST /predict/{task}")
    steps = [spans.pop(name) for name in ("decode", "queue", "trunk", "head")]

    assert spans == {}
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.kind == Span.SPAN_KIND_SERVER
    assert all(step.trace_id == request.trace_id for step in steps)
    assert all(step.parent_span_id == request.span_id for step in steps)
    moments = [t for step in steps for t in (step.start_time_unix_nano, step.end_time_unix_nano)]
    # Both clocks are read at the start of the process, a moment apart.
    slack_ns = 5_000_000
    assert moments == sorted(moments)
    assert request.start_time_unix_nano - slack_ns <= moments[0]
    assert moments[-1] <= request.end_time_unix_nano + slack_ns
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{request.span_id.hex()}-01"


def test_an_error_is_named(collector: Collector, asked: Callable[..., httpx.Response]) -> None:
    """By its kind and status, and a caller's mistake is no fault of the service."""
    asked("/predict/colours", b"no picture", SAMPLED)
    (request,) = [span for span in collector.spans() if span.kind == Span.SPAN_KIND_SERVER]
    attributes = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}

    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/predict/{task}",
        "http.response.status_code": 415,
        "error.type": "picture",
    }
    assert not request.status.code


def test_a_push_shows_its_gates_and_the_phases_of_its_swap(
    collector: Collector,
    asked: Callable[..., httpx.Response],
    make_bundle: Callable[..., Bundle],
) -> None:
    """The phases follow one another within the swap."""
    bundle = make_bundle(seed=2)
    asked("/tasks/colours/versions?new_labels=true", bundle.to_zip(), SAMPLED)
    spans = collector.spans()
    swap = next(span for span in spans if span.name == "swap")
    phases = [next(s for s in spans if s.name == n) for n in ("stage", "hold", "commit", "flip")]
    moments = [t for p in phases for t in (p.start_time_unix_nano, p.end_time_unix_nano)]

    assert [span.name for span in spans].count("gates") == 2
    assert moments == sorted(moments)
    assert swap.start_time_unix_nano <= moments[0]
    assert moments[-1] <= swap.end_time_unix_nano + 5_000_000


def test_a_caller_that_is_not_sampled_is_not_traced(
    collector: Collector, asked: Callable[..., httpx.Response]
) -> None:
    """Its trace goes on all the same."""
    answer = asked("/predict/colours", png_of(0), UNSAMPLED)

    assert collector.spans() == []
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")


def test_without_an_endpoint_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, asked: Callable[..., httpx.Response]
) -> None:
    """Nor is a header added."""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    assert "traceresponse" not in asked("/predict/colours", png_of(0), SAMPLED).headers
