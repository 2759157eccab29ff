"""The REST API: an application over a store and a queue, and the process that serves it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

from services.api.access import LoopbackOnly, require_key, require_safe_binding
from services.api.document import PROBLEMS, complete_document
from services.api.evidence import make_ranking, make_reporting
from services.api.preflight import TeacherProbe, probe_teacher
from services.api.problems import UnknownErrors, answer_with_problems
from services.api.routes import annotations, events, health, reports, results, runs, sweeps
from services.contract.hosts import bind_error
from services.contract.settings import Settings
from services.logs import configure_logging
from services.store.queue import Queue
from services.store.reconciler import Reconciler
from services.store.store import Store

DESCRIPTION = "Sweeps of students trained on a teacher's soft labels. Every error is problem+json (RFC 9457)."
GRACE_SECONDS = 5
"""How long requests under way may take to end once the API is told to stop."""
QUEUE_RETRY_SECONDS = 0.5
"""Short, so that a request hears soon that the queue is down; the reconciler tries on by itself."""
# One line per request would drown what matters: dashboards ask all the time.
LOG_LEVELS = {"": "INFO", "uvicorn.access": "WARNING", "httpx": "WARNING", "alembic": "WARNING"}


def create_app(settings: Settings, store: Store, queue: Queue, *, probe: TeacherProbe = probe_teacher) -> FastAPI:
    """The API over a store and a queue, which stay the caller's to close.

    While it runs, a reconciler keeps the queue true to the store. AuthenticationError when ``settings`` would
    let other machines in without a key.
    """
    require_safe_binding(settings)

    reconciler = Reconciler(store, queue, settings)

    @asynccontextmanager
    async def reconciling(_: FastAPI) -> AsyncIterator[None]:
        reconciler.start()
        yield
        await run_in_threadpool(reconciler.stop)

    app = FastAPI(
        title="smoothkd",
        version="v1",
        description=DESCRIPTION,
        lifespan=reconciling,
        docs_url="/v1/docs",
        openapi_url="/v1/openapi.json",
        redoc_url=None,
        # One schema per record, with its defaults optional: what a client sends is what it gets back.
        separate_input_output_schemas=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings, app.state.store, app.state.queue = settings, store, queue
    app.state.reconciler, app.state.probe = reconciler, probe
    app.state.ranking, app.state.reporting = make_ranking(store), make_reporting(store)
    for part in (sweeps, events, runs, results, reports, annotations):
        app.include_router(part.router, prefix="/v1", dependencies=[Depends(require_key)], responses=PROBLEMS)
    app.include_router(health.router)
    complete_document(app)
    answer_with_problems(app)
    app.add_middleware(LoopbackOnly, settings=settings)
    app.add_middleware(UnknownErrors)
    return app


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM. PortInUseError and AuthenticationError come before anything is opened."""
    require_safe_binding(settings)
    configure_logging(settings.log_format, levels=LOG_LEVELS)
    with (
        _listen(settings.api_host, settings.api_port) as listener,
        closing(Store(settings.resolved_database_url)) as store,
        closing(Queue(settings.resolved_redis_url, retry_seconds=QUEUE_RETRY_SECONDS)) as queue,
    ):
        config = uvicorn.Config(
            create_app(settings, store, queue), log_config=None, timeout_graceful_shutdown=GRACE_SECONDS
        )
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise bind_error(error, host=host, port=port, setting="SMOOTHKD_API_PORT") from None
