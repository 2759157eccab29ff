"""Teachers as real processes, for benchmarks that measure them from outside."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from services.cli.health import teacher_problem
from services.contract.settings import Settings, load_settings
from services.models.resolve import resolve_model

REPOSITORY = Path(__file__).parents[1]
VLLM_PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_directory() -> Path:
    """SmolLM2-135M-Instruct, converted; fetched once."""
    return Path(resolve_model(MODEL, settings=load_settings()))


@contextmanager
def teacher_process(
    *options: str, python: Path = Path(sys.executable), environment: dict[str, str] | None = None
) -> Iterator[tuple[str, int]]:
    """The address and process id of ``smoothkd teacher`` with these options and no label cache of earlier runs."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"SMOOTHKD_TEACHER_PORT": str(port), "SMOOTHKD_LABEL_CACHE_DIR": f"{folder}/labels"}
        with running(
            [str(python), "-m", "services.cli.main", "teacher", *options],
            environment={**settings, **(environment or {})},
            is_up=lambda: teacher_problem(Settings(teacher_address=f"127.0.0.1:{port}")) is None,
        ) as process_id:
            yield f"127.0.0.1:{port}", process_id


@contextmanager
def running(
    command: Sequence[str], *, environment: dict[str, str], is_up: Callable[[], bool], start_seconds: float = 300
) -> Iterator[int]:
    """The process id once ``is_up``; the process is stopped at the end."""
    with tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + start_seconds
            while not is_up():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[2:4]} did not start:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.5)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
