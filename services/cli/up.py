"""Everything on one machine: queue, teacher, API, workers and dashboard as supervised processes."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from services.cli import health
from services.cli.supervisor import Service, Supervisor
from services.contract.errors import ConflictError, ModelNotFoundError
from services.contract.settings import Settings
from services.embedded import valkey_binary

console = Console()


def run_up(settings: Settings, *, model: str, engine: str, workers: int, generation: bool) -> None:
    """Serve until Ctrl-C or SIGTERM. ``generation``: the teacher also decodes, with vLLM in a second engine."""
    with running_platform(settings, model=model, engine=engine, workers=workers, generation=generation) as supervisor:
        console.print("Ctrl-C ends everything; the next start goes on where this one stopped.")
        serve_until_stopped(supervisor)


@contextmanager
def running_platform(
    settings: Settings, *, model: str, engine: str, workers: int, generation: bool = False
) -> Iterator[Supervisor]:
    """Every part started and healthy; all end when the context does."""
    for name in ("api_url", "teacher_address"):
        if getattr(settings, name):
            raise ConflictError(
                f"SMOOTHKD_{name.upper()} is set, but everything that starts here is on this machine",
                fix="Unset it, or start the parts that you need by themselves: smoothkd worker, smoothkd api ...",
            )
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _sole_owner(settings.data_dir), _sigterm_as_ctrl_c():
        services = platform_services(settings, model=model, engine=engine, workers=workers, generation=generation)
        with Supervisor(
            services, log_dir=settings.data_dir / "logs", environment=_child_environment(settings)
        ) as supervisor:
            _fetch(model, settings)
            first, *others = [service.name for service in services]
            supervisor.start(first)
            supervisor.wait_healthy(first)
            for name in others:
                supervisor.start(name)
            with console.status("") as status:
                for name in others:
                    status.update(f"waiting for {name}")
                    supervisor.wait_healthy(name)
                    console.print(f"  [green]●[/] {name}")
            console.print(f"API        {settings.resolved_api_url}/v1/docs")
            console.print(f"Dashboard  {dashboard_url(settings)}")
            try:
                yield supervisor
            except KeyboardInterrupt:
                console.print("\nstopping")


def serve_until_stopped(supervisor: Supervisor) -> None:
    """Restart whatever ends, until KeyboardInterrupt."""
    while True:
        for name in supervisor.restart_ended():
            console.print(f"  [yellow]●[/] {name} ended and was started again")
        time.sleep(1)


def dashboard_url(settings: Settings) -> str:
    return f"http://{settings.dashboard_host}:{settings.dashboard_port}"


def platform_services(
    settings: Settings, *, model: str, engine: str, workers: int, generation: bool = False
) -> list[Service]:
    """The processes of one machine, in the order they start.

    A Redis that SMOOTHKD_REDIS_URL names is used as it is; otherwise an embedded Valkey is the first service.
    """
    services = []
    if not settings.redis_url:
        services.append(_embedded_queue(settings))
    services += [
        Service(
            name="api",
            argv=_smoothkd("api"),
            problem=lambda: health.api_problem(settings),
            port=settings.api_port,
            port_setting="SMOOTHKD_API_PORT",
        ),
        Service(
            name="teacher",
            argv=_smoothkd("teacher", "--model", model, "--engine", engine, *(["--generation"] if generation else [])),
            problem=lambda: health.teacher_problem(settings),
            port=settings.teacher_port,
            port_setting="SMOOTHKD_TEACHER_PORT",
            start_seconds=1800,
        ),
        Service(
            name="dashboard",
            argv=_smoothkd("dashboard"),
            problem=lambda: health.dashboard_problem(settings),
            port=settings.dashboard_port,
            port_setting="SMOOTHKD_DASHBOARD_PORT",
        ),
    ]
    for number in range(workers):
        name = "worker" if workers == 1 else f"worker-{number}"
        services.append(Service(name=name, argv=_smoothkd("worker"), problem=lambda: health.worker_problem(settings)))
    return services


def _embedded_queue(settings: Settings) -> Service:
    directory = settings.data_dir.absolute() / "valkey"
    directory.mkdir(parents=True, exist_ok=True)
    return Service(
        name="queue",
        argv=[
            str(valkey_binary()),
            *("--bind", "127.0.0.1", "--port", str(settings.queue_port), "--dir", str(directory)),
            *("--appendonly", "yes", "--save", ""),
        ],
        problem=lambda: health.queue_problem(settings),
        port=settings.queue_port,
        port_setting="SMOOTHKD_QUEUE_PORT",
    )


def _child_environment(settings: Settings) -> dict[str, str]:
    """Children work on the same files wherever they start from."""
    return {"SMOOTHKD_DATA_DIR": str(settings.data_dir.absolute()), "PYTHONUNBUFFERED": "1"}


def _smoothkd(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "services.cli.main", *arguments]


def _fetch(model: str, settings: Settings) -> None:
    """Bring the teacher here before the clock of its health check starts, with its progress in view."""
    console.print(f"fetching {model}")
    status = subprocess.run(
        _smoothkd("fetch", model), env={**os.environ, **_child_environment(settings)}, check=False
    ).returncode
    if status != 0:
        raise ModelNotFoundError(
            f"the model {model} could not be brought to this machine", fix="The lines above say why."
        )


@contextmanager
def _sole_owner(data_dir: Path) -> Iterator[None]:
    """Two supervisors on one data directory would fight over its queue and ports."""
    with (data_dir / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"smoothkd up already runs on {data_dir}",
                fix="Use the one that runs, end it with Ctrl-C, or choose another SMOOTHKD_DATA_DIR and other ports.",
            ) from None
        yield


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
