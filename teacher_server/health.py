"""The health service: what probes and students' channels ask, and what they watch."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.contract.teacher_channel import SERVICE_NAME

_NAMES = ("", SERVICE_NAME)
_STATES = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until told otherwise; belongs to one event loop.

    gRPC's own servicer keeps watchers until they leave, and with them the server that waits for its calls to end.
    """

    def __init__(self) -> None:
        self._state = _STATES.NOT_SERVING
        self._stopping = False
        self._changed = asyncio.Event()

    def serve(self) -> None:
        """From now on SERVING."""
        self._become(_STATES.SERVING)

    def stop(self) -> None:
        """From now on NOT_SERVING; who watches hears it as the last."""
        self._stopping = True
        self._become(_STATES.NOT_SERVING)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        if request.service not in _NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"this server has no service {request.service[:200]!r}")
        return _STATES(status=self._state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802
        told = None
        while True:
            changed = self._changed
            state = self._state if request.service in _NAMES else _STATES.SERVICE_UNKNOWN
            if state != told:
                await context.write(_STATES(status=state))
                told = state
            # What changed while it was written is told, too.
            if self._changed is changed:
                if self._stopping:
                    return
                await changed.wait()

    def _become(self, state: Any) -> None:
        self._state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
