"""The API as a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from services.contract.api_client import ApiClient
from services.contract.errors import SmoothKDError, StoreUnavailableError
from services.contract.problems import ProblemDetails
from services.contract.spec import SweepSpec
from services.store.store import Store
from tests.api.conftest import make_spec

REPOSITORY = Path(__file__).parents[2]
WAIT = 30


@contextmanager
def api_process(tmp_path: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; its output goes to a pipe."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"SMOOTHKD_DATA_DIR": str(tmp_path), "SMOOTHKD_API_PORT": str(port)} | settings
    command = [sys.executable, "-c", "from services.cli.main import main; main()", "api"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def wait_until_alive(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/healthz").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"no API at {url}: {process.poll()}")


def test_it_serves_and_ends_though_somebody_listens(tmp_path: Path, valkey_url: str, teacher_address: str) -> None:
    settings = {"SMOOTHKD_REDIS_URL": valkey_url, "SMOOTHKD_TEACHER_ADDRESS": teacher_address, "SMOOTHKD_OFFLINE": "1"}
    with api_process(tmp_path, **settings) as (process, url), ApiClient(url) as api:
        wait_until_alive(process, url)
        assert api.ready().model_dump() == {"ready": True, "store": "ok", "queue": "ok"}
        events = api._stream(api.submit_sweep(make_spec()).id, "")
        assert next(events)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=WAIT)
        assert process.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in output
        with pytest.raises(httpx.RemoteProtocolError):
            next(events)
    # What was submitted outlives the process.
    store = Store(f"sqlite:///{tmp_path}/smoothkd.db")
    assert len(store.sweeps().items) == 1
    store.close()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with api_process(tmp_path, SMOOTHKD_API_PORT=str(port)) as (process, _):
            output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 3
    assert f"error: another process listens on 127.0.0.1:{port}" in output
    assert "SMOOTHKD_API_PORT" in output
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_serve_others_without_a_key(tmp_path: Path) -> None:
    with api_process(tmp_path, SMOOTHKD_API_HOST="0.0.0.0") as (process, _):
        output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 2
    assert "error: the API would serve 0.0.0.0" in output
    assert list(tmp_path.iterdir()) == []


def test_it_lives_without_a_queue_and_says_what_it_lacks(tmp_path: Path) -> None:
    with api_process(tmp_path, SMOOTHKD_REDIS_URL=f"unix://{tmp_path}/nothing.sock") as (process, url):
        wait_until_alive(process, url)
        response = httpx.get(f"{url}/readyz", timeout=WAIT)
        problem = ProblemDetails.model_validate_json(response.content)
        assert (response.status_code, problem.reason) == (503, "not_ready")
        assert problem.details["store"] == "ok"
        assert "nothing.sock" in problem.details["queue"]
        assert problem.fix


def test_a_store_that_is_gone_is_named(api: ApiClient, monkeypatch: pytest.MonkeyPatch, spec: SweepSpec) -> None:
    def gone(*_: object, **__: object) -> None:
        raise StoreUnavailableError("the database does not answer", fix="Start it.")

    monkeypatch.setattr(Store, "change_counter", gone)
    with pytest.raises(SmoothKDError) as caught:
        api.ready()
    assert caught.value.details == {"store": "the database does not answer", "queue": "ok"}
    monkeypatch.setattr(Store, "sweeps", gone)
    with pytest.raises(StoreUnavailableError, match="Start it"):
        api.sweeps()
