"""What vLLM loads in every process that it starts (the entry point ``vllm.general_plugins``): a teacher's end with it.

Not before it, on a Ctrl-C that it answers by letting requests finish; and not after it: by itself vLLM leaves them
behind when the process that started them is killed, and with them the memory of the GPU that its next start needs.
"""

import logging
import os
import select
import signal
import threading
from collections.abc import MutableMapping

logger = logging.getLogger(__name__)

PLUGIN = "smoothkd"
"""Its name among vLLM's plugins."""

TEACHER_PID = "SMOOTHKD_TEACHER_PID"
"""Environment variable by which a teacher's processes know it; without it vLLM serves somebody else."""

_ALLOWED = "VLLM_PLUGINS"
"""vLLM's own list of plugins that may load, with commas between; an empty one allows none."""


def mark_as_teacher(environment: MutableMapping[str, str]) -> None:
    """Have the processes that vLLM starts with this ``environment`` load the plugin and know this process as theirs."""
    environment[TEACHER_PID] = str(os.getpid())
    allowed = environment.get(_ALLOWED)
    # Not set, vLLM loads all; a list of those that may load was not made with this one in mind.
    if allowed is not None and PLUGIN not in allowed.split(","):
        environment[_ALLOWED] = ",".join(filter(None, [allowed, PLUGIN]))


def end_with_teacher() -> None:
    """Kill this process once the teacher that it works for has ended, however that came."""
    # vLLM forks on GPUs, and does not load plugins again in a process that was forked.
    os.register_at_fork(after_in_child=_watch)
    _watch()


def _watch() -> None:
    teacher = int(os.environ.get(TEACHER_PID, 0))
    if teacher in (0, os.getpid()):
        return
    _leave_ctrl_c_to_the_teacher()
    try:
        handle = os.pidfd_open(teacher)
    except ProcessLookupError:
        _end()
    except (OSError, AttributeError) as error:
        # Old kernels and some sandboxes have no such call, nor have systems other than Linux.
        logger.warning("this process will outlive a teacher that is killed: %s", error)
    else:
        threading.Thread(target=_wait, args=(handle,), name="end-with-teacher", daemon=True).start()


def _leave_ctrl_c_to_the_teacher() -> None:
    """A terminal sends it to all; the teacher still needs this process for what is under way."""
    # Blocked as well: in a process that was forked, vLLM sets a handler after this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait(handle: int) -> None:
    # Readable once the process has ended; a number that another process gets later does not matter.
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    ended.poll()
    _end()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
