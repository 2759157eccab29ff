"""Processes that are forked or started for a teacher end with it, also when it is killed."""

import os
import subprocess
import sys

import psutil
import pytest

from teacher_server.vllm_plugin import TEACHER_PID
from tests.teacher.serving import wait_until

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


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
