"""Processes that are forked or started for a teacher end with it, also when it is killed."""

import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import psutil
import pytest

from teacher_server.vllm_plugin import PLUGIN, TEACHER_PID, end_with_teacher, mark_as_teacher
from tests.teacher.serving import REPOSITORY, wait_until

VLLM = REPOSITORY / ".venv-vllm" / "bin" / "python"

TEACHER = f"""
import os, subprocess, sys, time
from teacher_server.vllm_plugin import end_with_teacher

os.environ["{TEACHER_PID}"] = str(os.getpid())
end_with_teacher()
if os.fork() == 0:
    os.fork()
    print(os.getpid(), flush=True)
    time.sleep(300)
started = "from teacher_server.vllm_plugin import end_with_teacher; end_with_teacher(); import os, time; "
subprocess.Popen([sys.executable, "-c", started + "print(os.getpid(), flush=True); time.sleep(300)"])
time.sleep(300)
"""


def test_what_a_killed_teacher_forked_or_started_ends() -> None:
    """vLLM forks on GPUs and starts anew on processors."""
    teacher = subprocess.Popen([sys.executable, "-c", TEACHER], stdout=subprocess.PIPE, text=True)
    assert teacher.stdout is not None
    with teacher.stdout:
        others = [psutil.Process(int(teacher.stdout.readline())) for _ in range(3)]
    assert teacher.pid not in [process.pid for process in others]
    # A terminal sends a Ctrl-C to all of them, and the teacher still needs the others for what is under way.
    assert not _is_deaf_to_ctrl_c(teacher.pid)
    assert all(_is_deaf_to_ctrl_c(process.pid) for process in others)
    teacher.kill()
    teacher.wait()
    wait_until(lambda: not any(_lives(process) for process in others), seconds=30)


def test_what_comes_too_late_ends_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    late = [sys.executable, "-c", "from teacher_server.vllm_plugin import end_with_teacher; end_with_teacher()"]
    assert subprocess.run(late, env=os.environ | {TEACHER_PID: str(gone.pid)}, check=False).returncode == -9


@pytest.mark.parametrize("environment", [{}, {TEACHER_PID: "0"}])
def test_others_who_use_vllm_are_left_alone(environment: dict[str, str]) -> None:
    code = "from teacher_server.vllm_plugin import end_with_teacher; end_with_teacher(); import threading; "
    code += "raise SystemExit(threading.active_count())"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=False).returncode == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),
        ("", "smoothkd"),
        ("lora_filesystem_resolver", "lora_filesystem_resolver,smoothkd"),
        ("a,b", "a,b,smoothkd"),
        ("smoothkd", "smoothkd"),
        ("a,smoothkd,b", "a,smoothkd,b"),
        ("smoothkd_of_others", "smoothkd_of_others,smoothkd"),
        # vLLM takes blanks for part of a name.
        ("a, smoothkd", "a, smoothkd,smoothkd"),
    ],
)
def test_the_plugin_joins_those_that_a_user_allows(before: str | None, after: str | None) -> None:
    environment = {} if before is None else {"VLLM_PLUGINS": before}
    for _ in range(2):
        mark_as_teacher(environment)
        assert environment.get("VLLM_PLUGINS") == after
        assert environment[TEACHER_PID] == str(os.getpid())


def test_the_distribution_offers_the_plugin_to_vllm() -> None:
    (offered,) = entry_points(group="vllm.general_plugins", name=PLUGIN)
    assert offered.load() is end_with_teacher


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="needs vLLM in .venv-vllm; make setup-vllm builds it")
@pytest.mark.parametrize("before", [None, "", "other"])
def test_vllm_itself_loads_the_plugin(before: str | None) -> None:
    code = (
        "import os; from teacher_server.vllm_plugin import mark_as_teacher; mark_as_teacher(os.environ); "
        "from vllm.plugins import load_plugins_by_group; print(*load_plugins_by_group('vllm.general_plugins'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {} if before is None else {"VLLM_PLUGINS": before}
    done = subprocess.run(
        [VLLM, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert PLUGIN in loaded
    assert before is None or loaded == [PLUGIN]


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _is_deaf_to_ctrl_c(pid: int) -> bool:
    """Both ways: vLLM sets a handler of its own in processes that it forks."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return all(int(status[field], 16) >> (signal.SIGINT - 1) & 1 for field in ("SigIgn", "SigBlk"))
