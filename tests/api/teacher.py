"""A teacher that only says who it is, on a real gRPC server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.contract.teacher.v1 import teacher_service_pb2 as wire
from services.contract.teacher.v1 import teacher_service_pb2_grpc as wire_grpc

TEACHER = wire.GetTeacherResponse(
    model="big-teacher",
    max_length=1024,
    max_k=100,
    max_draws=50,
    encodings=[wire.ENCODING_EXACT, wire.ENCODING_TOP_K, wire.ENCODING_SAMPLED],
    engine="mock",
    generates=True,
)


class _Teacher(wire_grpc.TeacherServiceServicer):
    def __init__(self, answer: wire.GetTeacherResponse) -> None:
        self.answer = answer

    def GetTeacher(  # noqa: N802 - the rpc's name
        self, request: wire.GetTeacherRequest, context: grpc.ServicerContext
    ) -> wire.GetTeacherResponse:
        if request.model not in ("", self.answer.model):
            context.abort(grpc.StatusCode.NOT_FOUND, f"this teacher does not serve {request.model}")
        return self.answer


@contextmanager
def serving(
    answer: wire.GetTeacherResponse = TEACHER, *, status: int = health_pb2.HealthCheckResponse.SERVING
) -> Iterator[str]:
    """Its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    wire_grpc.add_TeacherServiceServicer_to_server(_Teacher(answer), server)
    servicer = health.HealthServicer()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
