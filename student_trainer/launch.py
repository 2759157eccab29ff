"""A run of several processes: this program started once per process by torchrun, under one that waits for them."""

import atexit
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from services.contract.errors import CancelledError, SmoothKDError, TrainingError, error_class
from services.process import die_with_parent, start_child, stop_child

GRACE_SECONDS = 60.0
"""What processes that are to stop get to save a checkpoint."""

REPORT_FILE = "SMOOTHKD_RANK_PROBLEM_FILE"
"""Environment variable: where the first process that fails says why."""

AGENT_PID = "SMOOTHKD_RANK_PARENT"
"""Environment variable: torch's launcher, with which its processes are to end."""


def in_processes(work: Callable[[], None], *, command: Sequence[str], processes: int) -> None:
    """Do ``work`` here, or have ``python -m COMMAND``, which leads here again, do it in so many processes together.

    In a process that a launcher has started as one of several it is done here; one that this launched then ends. When
    one process fails the others are stopped, and its error is raised here. SIGTERM and Ctrl-C reach all of them, which
    then save a checkpoint; they end when this process does, however it does.
    """
    if REPORT_FILE in os.environ:
        # By its number, for it may have ended while this process was loading.
        die_with_parent(int(os.environ[AGENT_PID]))
        _report_failure(work)
        _end()
    elif processes == 1 or "RANK" in os.environ:
        work()
    else:
        _launch(command, processes=processes)


def _report_failure(work: Callable[[], None]) -> None:
    try:
        work()
    except SmoothKDError as error:
        problem = {"reason": error.reason, "what": error.what, "fix": error.fix}
        try:
            # The first to fail is the cause; the others lose their partner.
            with open(os.environ[REPORT_FILE], "x", encoding="utf-8") as file:
                json.dump(problem, file)
        except FileExistsError:
            pass
        raise


def _end() -> None:
    """End this process without taking the interpreter down around gloo's threads.

    Those that still let go of a tensor then would abort the process, and its launcher would stop the others.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _launch(command: Sequence[str], *, processes: int) -> None:
    with tempfile.TemporaryDirectory(prefix="smoothkd-") as folder:
        report = Path(folder) / "problem.json"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, REPORT_FILE: str(report)}
        agent = [sys.executable, "-m", "student_trainer.launch", str(processes), *command]
        child = start_child(agent, env=environment)
        stopping = False

        def stop(_number: int, _frame: FrameType | None) -> None:
            nonlocal stopping
            stopping = True
            child.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            stop_child(child, grace_seconds=GRACE_SECONDS)
        if status == 0:
            return
        if report.exists():
            problem = json.loads(report.read_text(encoding="utf-8"))
            raise error_class(problem["reason"])(problem["what"], fix=problem["fix"])
    if stopping:
        raise CancelledError("stopped", fix="Start the same run again to go on from its last checkpoint.")
    raise TrainingError(
        f"one of {processes} training processes ended with an error of its own (exit code {status})",
        fix="The messages above say which; the last checkpoint is whole.",
    )


def _run_agent(processes: int, command: Sequence[str]) -> None:
    from torch.distributed.run import main

    # Torch says where each process failed, over many lines; the processes themselves have said why.
    os.environ[AGENT_PID] = str(os.getpid())
    main(["--standalone", f"--nproc-per-node={processes}", "--max-restarts=0", "-m", *command])


if __name__ == "__main__":
    _run_agent(int(sys.argv[1]), sys.argv[2:])
