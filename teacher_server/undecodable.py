"""Messages that are none or too large: gRPC would answer UNKNOWN and log a traceback for each of the ones, and
RESOURCE_EXHAUSTED to the others, which clients take for a teacher that has too much to do.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from services.contract.errors import InvalidInputError, LimitExceededError
from services.contract.soft_labels import MAX_REQUEST_BYTES
from services.contract.teacher_channel import SERVICE_NAME
from teacher_server.status import abort

_REMAKE = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
}


class UndecodableInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls of TeacherService whose bytes cannot be decoded, or are too many, with INVALID_ARGUMENT."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE_NAME}/"):
            return handler
        make, attribute = _REMAKE[handler.request_streaming, handler.response_streaming]
        answer, decode = getattr(handler, attribute), handler.request_deserializer

        def decode_or_tell(data: bytes) -> Any:
            if len(data) > MAX_REQUEST_BYTES:
                return _Refused(
                    LimitExceededError(
                        f"the request has {len(data)} bytes, more than {MAX_REQUEST_BYTES}",
                        fix="Ask for fewer sequences at a time; one alone may be too long for any request.",
                    )
                )
            try:
                return decode(data)
            except DecodeError as error:
                return _Refused(
                    InvalidInputError(
                        f"the request cannot be decoded: {error}",
                        fix="Send protobuf messages of services/contract/teacher/v1/teacher_service.proto.",
                    )
                )

        async def answer_one(request: Any, context: Any) -> Any:
            if isinstance(request, _Refused):
                await abort(context, request.error)
            return await answer(request, context)

        async def answer_many(requests: Any, context: Any) -> Any:
            return await answer(_decoded(requests), context)

        return make(
            answer_many if handler.request_streaming else answer_one,
            request_deserializer=decode_or_tell,
            response_serializer=handler.response_serializer,
        )


@dataclass(frozen=True)
class _Refused:
    """What a handler gets in place of a message."""

    error: InvalidInputError


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Refused):
            raise request.error
        yield request
