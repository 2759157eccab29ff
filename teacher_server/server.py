"""The teacher's process: one gRPC server around one engine."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.contract.errors import TeacherError
from services.contract.hosts import bind_error
from services.contract.settings import Settings
from services.contract.soft_labels import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.labels.cache import LabelCache
from services.logs import configure_logging
from services.telemetry import start_telemetry
from teacher_server.admission import Admission
from teacher_server.arenas import limit_arenas
from teacher_server.calls import CallObserver
from teacher_server.engine import ENGINE_FAILED
from teacher_server.health import Health
from teacher_server.metrics import TeacherMetrics
from teacher_server.models import Models
from teacher_server.options import TeacherOptions
from teacher_server.security import TokenInterceptor, require_safe_binding, server_credentials, teacher_token
from teacher_server.servicer import TeacherServicer
from teacher_server.undecodable import UndecodableInterceptor

__all__ = ["TeacherOptions", "run_server", "serve"]

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_SERVER_OPTIONS = (
    # Somewhat more than is accepted, so that what is too much is refused in words of our own.
    ("grpc.max_receive_message_length", 4 * MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its clients by chance; the second must fail instead.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def serve(settings: Settings, options: TeacherOptions) -> None:
    """Serve until SIGTERM or SIGINT, then let calls under way finish; a second signal ends them at once.

    PortInUseError when the port is taken; AuthenticationError when other machines could use the teacher without a
    token; the model's own errors when it cannot be loaded; TeacherError when the labels would not be the model's
    distribution, or when what computes has failed for good: the status tells supervisors that restart on failure.
    """
    configure_logging(settings.log_format, levels={"": "WARNING", "teacher_server": "INFO"})
    start_telemetry("smoothkd-teacher")
    limit_arenas()
    asyncio.run(_serve_until_signal(settings, options))


async def run_server(
    settings: Settings,
    options: TeacherOptions,
    *,
    stop: asyncio.Event,
    hurry: asyncio.Event | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until ``stop`` is set; ``on_ready`` learns the port once sequences can be scored.

    While the model loads, the health service answers NOT_SERVING and the teacher's rpcs UNAVAILABLE. From ``stop`` on
    no call is accepted; those under way have ``options.drain_seconds``, unless ``hurry`` is set before.
    """
    host = options.host if options.host is not None else settings.teacher_host
    require_safe_binding(settings, host=host)
    credentials, token = server_credentials(settings), teacher_token(settings)
    models = Models(settings, options)
    cache = open_label_cache(settings)
    admission = Admission(options.limits)
    metrics = _metrics(admission, cache)
    observer = CallObserver(metrics)
    servicer = TeacherServicer(models, admission=admission, cache=cache, metrics=metrics)
    health_servicer = Health()
    guards = [TokenInterceptor(token)] if token else []
    interceptors = [observer, *guards, UndecodableInterceptor()]
    server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=interceptors)
    servicer.add_to(server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    port = _bind(server, host, settings.teacher_port if options.port is None else options.port, credentials=credentials)
    observer.replica = f"{socket.gethostname()}:{port}"
    metrics_port = settings.teacher_metrics_port if options.metrics_port is None else options.metrics_port
    stop_metrics = metrics.serve(host, metrics_port) if metrics_port else None
    await server.start()
    preparing = asyncio.ensure_future(_prepare(models, address=f"{host}:{port}"))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            preparing.result()
            health_servicer.serve()
            if on_ready is not None:
                on_ready(port)
            await stopping
    finally:
        preparing.cancel()
        stopping.cancel()
        health_servicer.stop()
        await _drain(server, seconds=options.drain_seconds, hurry=hurry)
        models.close()
        if stop_metrics is not None:
            await asyncio.to_thread(stop_metrics)
        if cache is not None:
            cache.close()


def open_label_cache(settings: Settings) -> LabelCache | None:
    """Where labels are kept; None where the settings keep none. InvalidInputError for a directory that is unusable."""
    if settings.label_cache_gib == 0:
        return None
    return LabelCache(settings.resolved_label_cache_dir, max_bytes=round(settings.label_cache_gib * 2**30))


async def _serve_until_signal(settings: Settings, options: TeacherOptions) -> None:
    stop, hurry, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    def on_failure() -> None:
        failed.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(ENGINE_FAILED, on_failure)
    await run_server(settings, options, stop=stop, hurry=hurry)
    if failed.is_set():
        raise TeacherError("the teacher's engine has failed", fix="Its log says why; start the teacher again.")
    logger.info("stopped")


async def _drain(server: Any, *, seconds: float, hurry: asyncio.Event | None) -> None:
    """Accept no call any more; wait for those under way, then cancel what is left."""
    logger.info("stopping; calls under way have %.0f seconds", seconds)
    ended = asyncio.ensure_future(server.stop(seconds))
    hurried = asyncio.ensure_future((hurry or asyncio.Event()).wait())
    await asyncio.wait([ended, hurried], return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    # A second, shorter grace takes the place of the first.
    await server.stop(None)
    await ended


def _metrics(admission: Admission, cache: LabelCache | None) -> TeacherMetrics:
    metrics = TeacherMetrics()
    metrics.watch("queue_sequences", "Sequences and prompts that wait or are computed.", lambda: admission.sequences)
    metrics.watch("queue_tokens", "Tokens of these.", lambda: admission.tokens)
    metrics.watch("label_bytes", "Labels being computed or unread by clients.", lambda: admission.label_bytes)
    metrics.watch("clients", "Clients with a call under way.", lambda: admission.clients)
    if cache is not None:
        metrics.watch_cache(cache)
    return metrics


async def _prepare(models: Models, *, address: str) -> None:
    checked = await models.start()
    logger.info("serving %s on %s", checked.card.model, address)


def _bind(server: Any, host: str, port: int, *, credentials: grpc.ServerCredentials | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is not None:
            return int(server.add_secure_port(address, credentials))
        return int(server.add_insecure_port(address))
    except RuntimeError:
        raise _why_not_bound(host, port) from None


def _why_not_bound(host: str, port: int) -> Exception:
    """gRPC only says that it failed; the socket says why."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        return bind_error(error, host=host, port=port, setting="SMOOTHKD_TEACHER_PORT")
    in_use = OSError(errno.EADDRINUSE, "in use")
    return bind_error(in_use, host=host, port=port, setting="SMOOTHKD_TEACHER_PORT")
