"""What vLLM loads in every process that it starts (the entry point ``vllm.general_plugins``): a teacher's end with it.

By itself vLLM leaves them behind when the process that started them is killed, and with them the memory of the GPU that
the teacher's next start needs.
"""

import os
import select
import signal
import threading

TEACHER_PID = "SMOOTHKD_TEACHER_PID"
"""Environment variable by which a teacher's processes know it; without it vLLM serves somebody else."""


def end_with_teacher() -> None:
    """Kill this process once the teacher that it works for has ended, however that came."""
    teacher = int(os.environ.get(TEACHER_PID, 0))
    if teacher in (0, os.getpid()):
        return
    try:
        handle = os.pidfd_open(teacher)
    except ProcessLookupError:
        _end()
        return
    threading.Thread(target=_wait, args=(handle,), name="end-with-teacher", daemon=True).start()


def _wait(handle: int) -> None:
    # Readable once the process has ended; a number that another process gets later does not matter.
    select.select([handle], [], [])
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
