"""What happens to every call besides its answer: it is counted, timed, traced, and named in the log."""

import asyncio
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from opentelemetry import propagate, trace

from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher_channel import REPLICA_KEY, SERVICE_NAME
from services.logs import log_fields
from teacher_server.metrics import TeacherMetrics

logger = logging.getLogger(__name__)

_tracer = trace.get_tracer("smoothkd.teacher")
_HANDLERS = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}


@dataclass
class Call:
    """One call under way and what it has brought so far."""

    metrics: TeacherMetrics
    status: str = "OK"
    sequences: int = 0
    positions: int = 0
    cache_hits: int = 0
    encodings: set[str] = field(default_factory=set)


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def note_labelled(*, encoding: str, positions: int, from_cache: bool) -> None:
    """Count a sequence for the call that this task works for; nothing where it works for none."""
    call = _current.get()
    if call is not None:
        call.sequences += 1
        call.positions += positions
        call.cache_hits += from_cache
        call.encodings.add(encoding)
        call.metrics.sequence_labelled(encoding=encoding, positions=positions, from_cache=from_cache)


def note_status(status: str) -> None:
    """Say with which gRPC status the call ends that this task works for: gRPC keeps it to itself."""
    call = _current.get()
    if call is not None:
        call.status = status


class CallObserver(grpc.aio.ServerInterceptor):
    """Watches the calls of TeacherService. ``replica`` is the name by which every answer says where it comes from."""

    def __init__(self, metrics: TeacherMetrics) -> None:
        self.replica = ""
        self._metrics = metrics

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        service, _, rpc = handler_call_details.method.strip("/").partition("/")
        if handler is None or service != SERVICE_NAME:
            return handler
        make, attribute = _HANDLERS[handler.request_streaming, handler.response_streaming]
        answer = getattr(handler, attribute)

        async def observed(request: Any, context: Any) -> Any:
            async with self._observed(rpc, request, context):
                result = answer(request, context)
                return await result if inspect.isawaitable(result) else await _send_all(result, context)

        return make(
            observed,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _observed(self, rpc: str, request: Any, context: Any) -> AsyncIterator[None]:
        began = time.monotonic()
        call = Call(metrics=self._metrics)
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = metadata.get("x-request-id", "")[:64] or uuid.uuid4().hex[:12]
        token = _current.set(call)
        self._metrics.call_began(rpc)
        try:
            with (
                log_fields(rpc=rpc, request=request_id),
                _tracer.start_as_current_span(
                    f"{SERVICE_NAME}/{rpc}",
                    context=propagate.extract(metadata),
                    kind=trace.SpanKind.SERVER,
                    attributes={
                        "rpc.system": "grpc",
                        "rpc.service": SERVICE_NAME,
                        "rpc.method": rpc,
                        **_asked(request),
                    },
                    # What ends a call is its status; a client that leaves is no exception of ours.
                    record_exception=False,
                    set_status_on_exception=False,
                ) as span,
            ):
                try:
                    await context.send_initial_metadata(((REPLICA_KEY, self.replica),))
                    yield
                except asyncio.CancelledError:
                    call.status = "CANCELLED"
                    raise
                finally:
                    _describe(span, call)
                    seconds = time.monotonic() - began
                    level = logging.DEBUG if call.status in ("OK", "CANCELLED") else logging.INFO
                    logger.log(level, "%s ended with %s after %.3f s", rpc, call.status, seconds)
        finally:
            self._metrics.call_ended(rpc, status=call.status, seconds=time.monotonic() - began)
            _current.reset(token)


async def _send_all(answers: AsyncIterator[Any], context: Any) -> None:
    async for answer in answers:
        await context.write(answer)


def _asked(request: Any) -> dict[str, str | int]:
    if isinstance(request, pb.ScoreSequencesRequest):
        return {
            "smoothkd.sequences": len(request.sequences),
            "smoothkd.tokens": sum(len(sequence.token_ids) for sequence in request.sequences),
        }
    if isinstance(request, pb.GenerateSequencesRequest):
        return {
            "smoothkd.sequences": len(request.prompts),
            "smoothkd.tokens": sum(len(prompt.token_ids) for prompt in request.prompts),
        }
    return {}


def _describe(span: trace.Span, call: Call) -> None:
    span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[call.status].value[0])
    if call.status not in ("OK", "CANCELLED"):
        span.set_status(trace.StatusCode.ERROR, call.status)
    if call.sequences:
        span.set_attribute("smoothkd.encoding", ",".join(sorted(call.encodings)))
        span.set_attribute("smoothkd.labelled_sequences", call.sequences)
        span.set_attribute("smoothkd.label_tokens", call.positions)
        span.set_attribute("smoothkd.cache_hits", call.cache_hits)
