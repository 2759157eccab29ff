"""A real API process's parts: uvicorn on a loopback port, SQLite, Valkey, and a gRPC teacher."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from services.api.app import create_app
from services.contract.api_client import ApiClient
from services.contract.settings import Settings
from services.contract.spec import SweepSpec
from services.contract.spec_reading import parse_sweep
from services.store.queue import Queue
from services.store.store import Store
from tests.api.teacher import serving


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/smoothkd.db")
    yield store
    store.close()


@pytest.fixture
def queue(valkey_url: str) -> Iterator[Queue]:
    queue = Queue(valkey_url)
    yield queue
    queue.close()


@pytest.fixture(scope="session")
def teacher_address() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture
def settings(tmp_path: Path, teacher_address: str, valkey_url: str) -> Settings:
    return Settings(data_dir=tmp_path, teacher_address=teacher_address, redis_url=valkey_url, offline=True)


@pytest.fixture
def serve(store: Store, queue: Queue, settings: Settings) -> Iterator[Callable[..., str]]:
    """Starts an API and returns its address; takes changes of the settings."""
    with ExitStack() as servers:

        def start(**changes: Any) -> str:
            app = create_app(settings.model_copy(update=changes), store, queue)
            return servers.enter_context(running(app))

        yield start


@pytest.fixture
def api(serve: Callable[..., str]) -> Iterator[ApiClient]:
    with ApiClient(serve()) as client:
        yield client


@pytest.fixture
def spec() -> SweepSpec:
    return make_spec()


def make_spec(**changes: Any) -> SweepSpec:
    """SFT and KD alpha 1, each with two seeds."""
    return parse_sweep(
        {
            "name": "small",
            "teacher": {"model": "big-teacher"},
            "student": {"model": "owner/small-student"},
            "dataset": {"path": "demo_instructions", "limit": 8},
            "grid": {"alpha": [0, 1], "seed": [0, 1]},
            "evaluation": {"benchmarks": ["demo_news"]},
        }
        | changes
    )


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of an application on a real server, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 10
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.started
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
