"""Child processes that never outlive their parent, whatever kills it.

On Linux the kernel signals a child when the thread that started it ends (prctl PR_SET_PDEATHSIG): start children
from a thread that lives as long as they should. Elsewhere a child outlives a parent that was killed with -9.

Run as a script, this file is the few lines between fork and exec; it imports the standard library alone.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_child(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts ``argv`` in a session of its own; it is killed when the calling thread or process ends.

    FileNotFoundError when there is no such program.
    """
    program, *arguments = map(str, argv)
    path = shutil.which(program, path=(env or os.environ).get("PATH"))
    if path is None:
        raise FileNotFoundError(f"there is no program {program}")
    # preexec_fn would run Python between fork and exec, where a lock that another thread held never opens.
    prelude = (sys.executable, "-I", "-S", __file__, str(os.getpid()), path)
    return subprocess.Popen(
        [*prelude, program, *arguments],
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def stop_child(child: subprocess.Popen[bytes], *, grace_seconds: float) -> int:
    """Ends a child of ``start_child``: SIGTERM, and after the grace SIGKILL to all of its process group.

    Returns its status: the exit code, or minus the signal.
    """
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_seconds)
    # Also after a clean end: what the child started and left behind belongs to its group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def die_with_parent(parent: int, *, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send ``with_signal`` to this process when the parent, of process id ``parent``, ends.

    Ends this process at once when the parent is gone already. Does nothing but that on systems other than Linux.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), with_signal)


def _become(parent: int, path: str, argv: list[str]) -> None:
    """Turns this process into ``argv``, with the signal dispositions that a fresh process expects."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    die_with_parent(parent)
    os.execv(path, argv)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
