"""A platform in small: a store, a real Valkey server, a reconciler, and real worker processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.contract.settings import Settings
from services.store.queue import Queue
from services.store.reconciler import Reconciler
from services.store.store import Store
from tests.store.redis_server import RedisServer

FAKE_STAGE = Path(__file__).with_name("fake_stage.py")
WORKER = f"""
import logging, sys
from services.contract.settings import Settings
from student_trainer.worker import run_worker
logging.basicConfig(level="INFO")
run_worker(Settings(), command=(sys.executable, {str(FAKE_STAGE)!r}))
"""


@dataclass
class Platform:
    settings: Settings
    store: Store
    redis: RedisServer
    start_worker: Callable[[], "subprocess.Popen[bytes]"]

    def behave(self, behaviours: dict[str, str]) -> None:
        """What fake_stage.py does in each attempt, by number; ``*`` in all others."""
        (self.settings.data_dir / "behaviour.json").write_text(json.dumps(behaviours))

    def let_go(self) -> None:
        (self.settings.data_dir / "go").touch()

    def begun(self) -> list[tuple[str, int, int]]:
        """Stage id, attempt number and process id of every stage process so far."""
        path = self.settings.data_dir / "begun"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(stage, int(number), int(pid)) for stage, number, pid in map(str.split, lines)]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Also in the environment, for the processes that the test starts."""
    monkeypatch.setenv("SMOOTHKD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SMOOTHKD_REDIS_URL", f"unix://{tmp_path / 'valkey.sock'}")
    monkeypatch.setenv("SMOOTHKD_LEASE_SECONDS", "3")
    return Settings()


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store(settings.resolved_database_url)
    yield store
    store.close()


@pytest.fixture
def platform(settings: Settings, store: Store, tmp_path: Path) -> Iterator[Platform]:
    server = RedisServer(tmp_path)
    server.start()
    queue = Queue(server.url, retry_seconds=0)
    reconciler = Reconciler(store, queue, settings, interval_seconds=0.1, grace_seconds=1.0)
    reconciler.start()
    workers: list[subprocess.Popen[bytes]] = []

    def start_worker() -> "subprocess.Popen[bytes]":
        with (tmp_path / "worker.log").open("ab") as log:
            workers.append(subprocess.Popen([sys.executable, "-c", WORKER], stdout=log, stderr=log, env=os.environ))
        return workers[-1]

    yield Platform(settings, store, server, start_worker)
    for worker in workers:
        worker.kill()
        worker.wait()
    reconciler.stop()
    queue.close()
    server.kill()
    print((tmp_path / "worker.log").read_text() if workers else "no worker ran")  # noqa: T201 - shown on failure
