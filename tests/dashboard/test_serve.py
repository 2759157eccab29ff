"""The dashboard as the command line starts it: a real process, found healthy, that leaves the user's home alone."""

import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from dashboard.serve import HEALTH_PATH, command
from services.contract.settings import Settings


def test_the_key_is_in_no_argument():
    settings = Settings(api_key=SecretStr("hidden-key"), dashboard_host="0.0.0.0", dashboard_port=9000)
    argv = command(settings)
    assert not any("hidden-key" in argument for argument in argv)
    assert "--server.address=0.0.0.0" in argv
    assert "--server.port=9000" in argv
    assert "--browser.gatherUsageStats=false" in argv


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command(Settings(dashboard_port=port)), cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
        yield f"http://127.0.0.1:{port}", process, home, tmp_path / "log"
        process.kill()
        process.wait()


def test_it_serves_and_ends_on_sigterm(served):
    url, process, home, log = served
    deadline = time.monotonic() + 60
    while True:
        try:
            health = httpx.get(url + HEALTH_PATH)
            break
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    assert (health.status_code, health.text) == (200, "ok")
    assert httpx.get(f"{url}/case_studies?sweep=x").status_code == 200
    process.terminate()
    process.wait(timeout=20)
    assert list(home.iterdir()) == []
    assert "Traceback" not in log.read_text()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
