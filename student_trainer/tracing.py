"""The student's part of a trace: a span around each request, which the teacher's span continues (W3C traceparent)."""

from collections.abc import Callable
from typing import Any

import grpc
from opentelemetry import propagate, trace

from services.contract.teacher_channel import SERVICE_NAME, Metadata

_tracer = trace.get_tracer("smoothkd.student")


def traced_stream(rpc: str, start: Callable[[Metadata], Any], *, sequences: int) -> Any:
    """The stream that ``start`` opens with the metadata it is given; the span ends when the stream does."""
    span = _tracer.start_span(
        f"{SERVICE_NAME}/{rpc}",
        kind=trace.SpanKind.CLIENT,
        attributes={
            "rpc.system": "grpc",
            "rpc.service": SERVICE_NAME,
            "rpc.method": rpc,
            "smoothkd.sequences": sequences,
        },
    )
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    stream = start(tuple(carrier.items()))

    def end() -> None:
        code = stream.code()
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            span.set_status(trace.StatusCode.ERROR, code.name)
        span.end()

    if not stream.add_callback(end):
        end()
    return stream
