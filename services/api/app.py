"""The REST API: an application over a store and a queue, and the process that serves it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import Depends, FastAPI

from services.api.access import LoopbackOnly, require_key, require_safe_binding
from services.api.evidence import make_ranking
from services.api.preflight import TeacherProbe, probe_teacher
from services.api.problems import answer_with_problems
from services.api.routes import events, health, results, runs, sweeps
from services.contract.errors import PortInUseError
from services.contract.problems import MEDIA_TYPE, ProblemDetails
from services.contract.settings import Settings
from services.store.queue import Queue
from services.store.reconciler import Reconciler
from services.store.store import Store

GRACE_SECONDS = 5
PROBLEMS = {
    "4XX": {"description": "The request cannot be met.", "content": {MEDIA_TYPE: {"schema": ProblemDetails}}},
}


def create_app(
    settings: Settings, store: Store, queue: Queue, *, probe: TeacherProbe = probe_teacher
) -> FastAPI:
    """The API over a store and a queue, which stay the caller's to close.

    While it runs, a reconciler keeps the queue true to the store. AuthenticationError when ``settings`` would
    let other machines in without a key.
    """
    require_safe_binding(settings)
    ...
