"""Real teacher servers on loopback: one in a thread of the test, one as a process that can be killed."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.contract.sequences import TokenSequence
from services.contract.settings import Settings
from teacher_server.server import TeacherOptions, run_server

REPOSITORY = Path(__file__).parents[2]
WITHOUT_CACHE = Settings(label_cache_gib=0)


@contextmanager
def running_teacher(
    options: TeacherOptions, *, settings: Settings | None = None, patience_seconds: float = 120
) -> Iterator[str]:
    """A server in a thread, without a label cache by default; gives its address once it serves, or its error."""
    ready = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    ports: list[int] = []
    errors: list[BaseException] = []

    async def serve() -> None:
        event = asyncio.Event()
        stop.append((asyncio.get_running_loop(), event))

        def on_ready(port: int) -> None:
            ports.append(port)
            ready.set()

        await run_server(settings or WITHOUT_CACHE, options, stop=event, on_ready=on_ready)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - raised again by the test that waits
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(patience_seconds)
        if errors:
            raise errors[0]
        yield f"127.0.0.1:{ports[0]}"
    finally:
        loop, event = stop[0]
        if thread.is_alive():
            loop.call_soon_threadsafe(event.set)
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def teacher_process(options: dict[str, object], *, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """``serve`` in a process of its own; killed in the end whatever happens."""
    code = (
        "from services.contract.settings import Settings\n"
        "from teacher_server.server import TeacherOptions, serve\n"
        f"serve(Settings(label_cache_gib=0), TeacherOptions(**{options!r}))\n"
    )
    with (log or Path(os.devnull)).open("a") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stderr=sink,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_until(condition, *, seconds: float = 30.0) -> None:
    """Poll until ``condition()`` holds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def long_sequences(count: int) -> list[TokenSequence]:
    return [
        TokenSequence(
            id=f"s{index}", token_ids=[(index * 31 + place) % 290 for place in range(20)], label_positions=[5, 19]
        )
        for index in range(count)
    ]


def health_of(address: str) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
