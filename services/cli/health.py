"""Whether each part of the platform answers as it should."""

import socket
from collections.abc import Callable

from services.contract.errors import InvalidInputError, SmoothKDError
from services.contract.settings import Settings


class UnhealthyError(SmoothKDError):
    """A part does not answer as it should."""

    reason = "unhealthy"


def require_healthy(name: str, settings: Settings) -> None:
    """UnhealthyError saying what is wrong with ``name``; InvalidInputError for a name that is none of CHECKS."""
    if name not in CHECKS:
        raise InvalidInputError(f"{name!r} is no part of the platform", fix=f"Name one of {', '.join(CHECKS)}.")
    problem = CHECKS[name](settings)
    if problem is not None:
        raise UnhealthyError(f"{name} is not healthy: {problem}", fix=f"Start it with smoothkd {name}, or see its log.")


def queue_problem(settings: Settings) -> str | None:
    """None when Redis or Valkey answers."""
    from services.store.queue import Queue

    try:
        Queue(settings.resolved_redis_url, retry_seconds=0).ping()
    except SmoothKDError as error:
        return error.what
    return None


def teacher_problem(settings: Settings) -> str | None:
    """None when the teacher's gRPC health service says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from services.contract.connection_problems import connection_problem
    from services.contract.teacher_channel import open_teacher_channel, teacher_access

    address = settings.resolved_teacher_address
    try:
        access = teacher_access(settings)
        with open_teacher_channel(address, access=access, balanced=False) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
    except SmoothKDError as error:
        return f"{error.what}. {error.fix}"
    except grpc.RpcError as error:
        problem = connection_problem(error.details(), address=address, access=access)
        return f"{address} {problem.what}. {problem.fix}" if problem else f"no teacher answers at {address}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else f"{address} is starting or stopping"


def api_problem(settings: Settings) -> str | None:
    """None when the API is ready: it reaches its store and its queue."""
    return _http_problem(f"{settings.resolved_api_url}/readyz")


def dashboard_problem(settings: Settings) -> str | None:
    """None when Streamlit serves."""
    return _http_problem(f"http://{_client_host(settings.dashboard_host)}:{settings.dashboard_port}/_stcore/health")


def worker_problem(settings: Settings) -> str | None:
    """None when a worker of this host listens to the queue."""
    from services.store.queue import Queue

    host = socket.gethostname()
    try:
        if host in Queue(settings.resolved_redis_url, retry_seconds=0).worker_hosts():
            return None
    except SmoothKDError as error:
        return error.what
    return f"no worker on {host} listens to the queue"


def _http_problem(url: str) -> str | None:
    import httpx

    try:
        answer = httpx.get(url, timeout=3)
    except httpx.HTTPError as error:
        return f"{url}: {error}"
    return None if answer.is_success else f"{url} answers {answer.status_code}: {answer.text[:300]}"


def _client_host(bind_host: str) -> str:
    return "127.0.0.1" if bind_host in ("0.0.0.0", "::", "") else bind_host


CHECKS: dict[str, Callable[[Settings], str | None]] = {
    "queue": queue_problem,
    "teacher": teacher_problem,
    "api": api_problem,
    "worker": worker_problem,
    "dashboard": dashboard_problem,
}
