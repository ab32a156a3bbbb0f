"""Traces over OTLP: a span for each request and one for each of its steps.

Set up by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...),
which the SDK reads. Importing this imports the SDK: only where an endpoint is set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.timeline import CURRENT, Timeline


class Tracing:
    """The spans of one process; a thread of the SDK sends them.

    Args:
        instance: Which process this is.
    """

    def __init__(self, instance: str) -> None:
        service = os.environ.get("OTEL_SERVICE_NAME", "headstock")
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("headstock")
        self._context = TraceContextTextMapPropagator()
        # What is noted by the monotonic clock is sent by the wall clock.
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def begin(self, method: str, route: str, headers: Mapping[str, str]) -> Span:
        """The span of a request, within the trace that its caller may have begun (W3C)."""
        # An empty context: whatever the server itself may have set is none of ours.
        caller = self._context.extract(headers, Context())
        span = self._tracer.start_span(
            f"{method} {route}",
            caller,
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        )
        CURRENT.set(Timeline() if span.is_recording() else None)
        return span

    def end(self, span: Span, status: int, error_kind: str | None) -> str:
        """Send it with its steps.

        Returns:
            What the answer's header `traceresponse` says: where the trace is found.
        """
        if timeline := CURRENT.get():
            within = set_span_in_context(span, Context())
            for name, began_s, ended_s in timeline.steps:
                step = self._tracer.start_span(name, within, start_time=self._wall_ns(began_s))
                step.end(self._wall_ns(ended_s))
            span.set_attribute("http.response.status_code", status)
            if error_kind:
                span.set_attribute("error.type", error_kind)
            if status >= 500:  # noqa: PLR2004
                span.set_status(Status(StatusCode.ERROR))
        span.end()
        headers: dict[str, str] = {}
        self._context.inject(headers, set_span_in_context(span, Context()))
        return headers["traceparent"]

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _wall_ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns
