"""Children that die with their parent: real processes, real signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.process import start_child, stop_child
from tests.worker.processes import is_alive, wait_for

PARENT = """
import sys, time
from services.process import start_child
child = start_child([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
)


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_dies_when_its_parent_is_killed(killed_by: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout
    lines = {parent.stdout.readline().strip() for _ in range(2)}
    (child,) = (int(line) for line in lines - {b"up"})
    assert is_alive(child)
    parent.send_signal(killed_by)
    parent.communicate()
    wait_for(lambda: not is_alive(child))


def test_a_child_whose_parent_died_before_it_could_ask_ends_by_itself(tmp_path: Path) -> None:
    """What start_child runs, with the process id of a parent that is gone."""
    import services.process

    gone = subprocess.Popen(["true"])
    gone.wait()
    argv = [
        sys.executable,
        "-I",
        "-S",
        services.process.__file__,
        str(gone.pid),
        "/bin/touch",
        "touch",
        tmp_path / "made",
    ]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()


def test_a_child_gets_arguments_environment_folder_and_output(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['SMOOTHKD_X'], os.getcwd(), sys.stdin.read() == '')"
    with (tmp_path / "output").open("wb") as output:
        child = start_child(
            [sys.executable, "-c", code, "a b", "--c"],
            env={**os.environ, "SMOOTHKD_X": "ü"},
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        assert child.wait() == 0
    assert (tmp_path / "output").read_text() == f"['a b', '--c'] ü {tmp_path} True\n"


def test_a_child_has_its_own_session_and_fresh_signals() -> None:
    code = (
        "import os, signal\n"
        "print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGINT) is signal.default_int_handler,\n"
        "      signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        child = start_child([sys.executable, "-c", code], stdout=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGINT, before)
    assert child.communicate()[0] == b"True True True set()\n"


def test_a_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no program no-such-program"):
        start_child(["no-such-program"])
    with pytest.raises(FileNotFoundError, match="no program ls"):
        start_child(["ls"], env={"PATH": "/nowhere"})


def test_a_child_that_ends_in_the_grace_is_not_killed() -> None:
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint(flush=True)\nsignal.pause()"
    )
    child = start_child([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    assert stop_child(child, grace_seconds=30) == 7
    assert stop_child(child, grace_seconds=30) == 7
    child.stdout.close()


def test_a_child_that_will_not_end_is_killed_after_the_grace() -> None:
    child = start_child([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    assert stop_child(child, grace_seconds=0.2) == -signal.SIGKILL
    child.stdout.close()


@pytest.mark.parametrize("leader_ends", ["by itself", "by SIGTERM"])
def test_what_a_child_started_ends_with_it(leader_ends: str) -> None:
    wait = "time.sleep(300)" if leader_ends == "by SIGTERM" else ""
    code = (
        "import subprocess, sys, time\n"
        f"grandchild = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.PIPE)\n"
        "grandchild.stdout.readline()\n"
        f"print(grandchild.pid, flush=True)\n{wait}"
    )
    child = start_child([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    grandchild = int(child.stdout.readline())
    if leader_ends == "by itself":
        child.wait()
    assert is_alive(grandchild)
    stop_child(child, grace_seconds=30)
    wait_for(lambda: not is_alive(grandchild))
    child.stdout.close()
