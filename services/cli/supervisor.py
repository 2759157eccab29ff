"""Keeps a set of processes running together: all start, one that ends is started again, all end.

Every child dies with this process, even after kill -9 of it (``services.process``).
"""

import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from services.contract.errors import PortInUseError, SmoothKDError
from services.process import start_child, stop_child

STOP_SECONDS = 30.0
"""A worker's stage saves a checkpoint before it ends."""


class ServiceFailedError(SmoothKDError):
    """A service ends again and again, or does not come up."""

    reason = "service_failed"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process. ``problem`` returns None once it answers as it should, else what is wrong."""

    name: str
    argv: Sequence[str]
    problem: Callable[[], str | None]
    port: int | None = None
    port_setting: str = ""
    start_seconds: float = 60.0


@dataclass
class _Running:
    service: Service
    child: subprocess.Popen[bytes]
    restarts: deque[float] = field(default_factory=lambda: deque(maxlen=3))


class Supervisor:
    """Services in the order they start; they stop in reverse. Use as a context manager.

    ``environment`` is added to this process's own. Each service writes ``log_dir/NAME.log``.
    """

    def __init__(self, services: Sequence[Service], *, log_dir: Path, environment: dict[str, str]) -> None:
        self._services = services
        self._log_dir = log_dir
        self._environment = {**os.environ, **environment}
        self._running: list[_Running] = []

    def __enter__(self) -> "Supervisor":
        for service in self._services:
            require_free_port(service)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str) -> None:
        """Start one service; PDEATHSIG follows the starting thread, so call it from the main thread."""
        service = next(service for service in self._services if service.name == name)
        self._running.append(_Running(service, self._spawn(service)))

    def wait_healthy(self, name: str) -> None:
        """Wait until a started service answers; ServiceFailedError with its last log lines when it does not."""
        running = next(running for running in self._running if running.service.name == name)
        deadline = time.monotonic() + running.service.start_seconds
        problem: str | None = "not asked yet"
        while time.monotonic() < deadline:
            self.restart_ended()
            problem = running.service.problem()
            if problem is None:
                return
            time.sleep(0.2)
        raise self._failure(running.service, f"did not come up in {running.service.start_seconds:.0f} s ({problem})")

    def restart_ended(self) -> list[str]:
        """Start again what has ended; the names of those restarted.

        A fourth end of one service within a minute raises ServiceFailedError.
        """
        restarted = []
        for running in self._running:
            status = running.child.poll()
            if status is None:
                continue
            now = time.monotonic()
            if len(running.restarts) == 3 and now - running.restarts[0] < 60:
                raise self._failure(running.service, f"ended with status {status}, again and again")
            running.restarts.append(now)
            running.child = self._spawn(running.service)
            restarted.append(running.service.name)
        return restarted

    def stop(self) -> None:
        """End every service, the last started first."""
        while self._running:
            stop_child(self._running.pop().child, grace_seconds=STOP_SECONDS)

    def _spawn(self, service: Service) -> subprocess.Popen[bytes]:
        with self._log_path(service).open("ab") as log:
            return start_child(service.argv, env=self._environment, stdout=log, stderr=log)

    def _failure(self, service: Service, what: str) -> ServiceFailedError:
        path = self._log_path(service)
        lines = path.read_text(errors="replace").splitlines()[-15:]
        return ServiceFailedError(
            f"{service.name} {what}; its last words:\n" + "\n".join(f"    {line}" for line in lines),
            fix=f"Its whole log is {path}; smoothkd doctor checks this machine.",
        )

    def _log_path(self, service: Service) -> Path:
        return self._log_dir / f"{service.name}.log"


def require_free_port(service: Service) -> None:
    """PortInUseError when something listens on the service's loopback port already."""
    if service.port is None:
        return
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", service.port)) == 0:
            raise PortInUseError(
                f"port {service.port}, which {service.name} needs, is taken by another process",
                fix=f"Stop that process, or choose another port with {service.port_setting}.",
            )
