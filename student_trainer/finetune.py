"""The teacher, fine-tuned on the data set that its students will learn (paper, section 4.1): a run like any other."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from services.contract.errors import CancelledError
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from student_trainer.arguments import processes
from student_trainer.finetuned import finetuned_directory
from student_trainer.train import train
from student_trainer.watcher import stop_on_signals

log = logging.getLogger(__name__)


def finetune_teacher(
    spec: RunSpec,
    *,
    settings: Settings,
    on_progress: Callable[[float], None] = lambda share: None,
    should_stop: Callable[[], bool] = lambda: False,
    before_rename: Callable[[], None] = lambda: None,
) -> Path | None:
    """The directory of the fine-tuned teacher that ``spec`` learns from; made unless it is there, None without one.

    Runs of all sweeps that fine-tune the same teacher alike share it. LoRA adapters are merged in, so that it is a
    whole checkpoint. Errors and interruptions are those of ``train``.
    """
    directory, run = finetuned_directory(spec, settings), spec.finetune_run
    if directory is None or run is None:
        return None
    with stop_on_signals(should_stop) as stopping, _alone(directory, stopping):
        return train(
            run,
            out=directory,
            settings=settings,
            on_progress=on_progress,
            should_stop=stopping,
            before_rename=before_rename,
        )


@contextmanager
def _alone(directory: Path, stopping: Callable[[], bool]) -> Iterator[None]:
    """While no other process of a sweep fine-tunes the same teacher; the ranks of one count as one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_suffix(".lock"))
    ranks = processes()
    if ranks.is_main_process:
        _acquire(lock, stopping, waiting_for=directory)
    try:
        ranks.wait_for_everyone()
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, stopping: Callable[[], bool], *, waiting_for: Path) -> None:
    told = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0.5)
            return
        except Timeout:
            if stopping():
                raise CancelledError("stopped while another process fine-tuned the same teacher") from None
            if time.monotonic() - told > 60:
                told = time.monotonic()
                log.info("another process is fine-tuning %s", waiting_for)
