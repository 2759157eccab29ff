"""The supervised platform as real processes: it starts, survives kills, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from services.cli.up import platform_services
from services.contract.settings import Settings
from tests.cli.test_compose import free_port

SMOOTHKD = [sys.executable, "-m", "services.cli.main"]
PARTS = ("queue", "api", "teacher", "dashboard", "worker")


class Platform:
    """One ``smoothkd up`` with ports and a data directory of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.log = folder / "up.log"
        self.api_port = free_port()
        ports = {f"SMOOTHKD_{name}_PORT": str(free_port()) for name in ("DASHBOARD", "TEACHER")}
        self.environment = {
            **os.environ,
            **ports,
            "SMOOTHKD_API_PORT": str(self.api_port),
            "SMOOTHKD_QUEUE_PORT": str(free_port()),
            "SMOOTHKD_DATA_DIR": str(folder / "data"),
            "SMOOTHKD_LEASE_SECONDS": "6",
            "SMOOTHKD_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.model = model
        self.process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        command = [*SMOOTHKD, "up", "--model", str(self.model), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.wait_until(lambda: "Ctrl-C ends everything" in self.log.read_text(), "is up", seconds=120)

    def smoothkd(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*SMOOTHKD, *arguments], env=self.environment, capture_output=True, text=True, timeout=60)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, words: str) -> psutil.Process:
        return next(child for child in self.children() if words in " ".join(child.cmdline()))

    def runs(self, sweep_id: str) -> list[dict]:
        return httpx.get(f"http://127.0.0.1:{self.api_port}/v1/sweeps/{sweep_id}/runs").json()["items"]

    def wait_until(self, condition, what, seconds=60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"up ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; {self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def ended(self, sweep_id: str) -> bool:
        return all(run["state"] in ("succeeded", "failed", "cancelled", "skipped") for run in self.runs(sweep_id))


@pytest.fixture
def platform(tmp_path, tiny_model):
    platform = Platform(tmp_path, tiny_model)
    yield platform
    if platform.process and platform.process.poll() is None:
        platform.process.terminate()
        platform.process.wait(60)


@pytest.fixture
def sweep_file(tmp_path, tiny_model):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"""
        name: tiny
        teacher: {{model: {tiny_model}}}
        student: {{model: {tiny_model}}}
        dataset: {{path: demo_instructions, limit: 12}}
        grid: {{alpha: [0, 1.0], learning_rate: [1.0e-3], batch_size: [4], seed: [0]}}
        training: {{max_length: 512, precision: fp32, checkpoint_steps: 1}}
        evaluation: {{benchmarks: [demo_news], limit: 2, max_new_tokens: 8}}
        """
    )
    return file


def gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_sweep_survives_kill_9_of_the_supervisor(platform, sweep_file):
    platform.start()
    submitted = platform.smoothkd("sweep", "submit", str(sweep_file))
    assert submitted.returncode == 0, submitted.stderr
    sweep_id = submitted.stdout.strip()
    platform.wait_until(lambda: any(run["state"] == "running" for run in platform.runs(sweep_id)), "a run starts")
    children = platform.children()
    assert len(children) >= len(PARTS)

    platform.process.send_signal(signal.SIGKILL)
    platform.process.wait()
    assert gone(children), [child.cmdline() for child in children if child.is_running()]

    platform.start()
    platform.wait_until(lambda: platform.ended(sweep_id), "the sweep ends", seconds=180)
    runs = platform.runs(sweep_id)
    assert [run["state"] for run in runs] == ["succeeded", "succeeded"], runs
    assert [run["method"] for run in runs] == ["SFT", "KD alpha=1"]
    shown = platform.smoothkd("sweep", "show", sweep_id)
    assert "KD alpha=1" in shown.stdout
    assert "ROUGE-L" in shown.stdout

    teacher = platform.child("teacher --model")
    teacher.kill()
    platform.wait_until(lambda: "teacher ended and was started again" in platform.log.read_text(), "restart")

    children = platform.children()
    platform.process.send_signal(signal.SIGINT)
    assert platform.process.wait(60) == 0, platform.log.read_text()[-2000:]
    assert gone(children)


@pytest.mark.slow
def test_a_taken_port_is_named_before_anything_starts(platform):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", platform.api_port))
        taken.listen()
        result = platform.smoothkd("up", "--model", str(platform.model))
    assert result.returncode == 3
    assert f"port {platform.api_port}" in result.stderr
    assert "SMOOTHKD_API_PORT" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((platform.folder / "data").glob("logs/*"))


def test_the_teacher_decodes_where_that_is_asked_for(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1")
    for asked in (False, True):
        services = platform_services(settings, model="m", engine="vllm", workers=1, generation=asked)
        [teacher] = [service for service in services if service.name == "teacher"]
        assert ("--generation" in teacher.argv) is asked
