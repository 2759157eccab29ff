"""One attempt at a stage: a child process does the work, this one keeps the lease and records how it ended."""

import contextlib
import enum
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from services.contract.errors import CancelledError, QueueUnavailableError, StaleAttemptError, StoreUnavailableError
from services.contract.records import Problem, StageRecord
from services.contract.settings import Settings
from services.contract.states import StageKind, State
from services.logs import log_fields
from services.process import start_child, stop_child
from services.store.attempts import log_path
from services.store.queue import Queue
from services.store.store import Attempt, Store

log = logging.getLogger("smoothkd.worker")

STOP_GRACE_SECONDS = 20.0
LOOK_SECONDS = 0.2
BEAT_SECONDS = 5.0
"""The longest time between heartbeats, and so until a running stage learns that it was cancelled."""
LAST_LINES = 15


class Ending(enum.Enum):
    """Why the child process is no more."""

    BY_ITSELF = enum.auto()
    CANCELLED = enum.auto()
    SUPERSEDED = enum.auto()
    INTERRUPTED = enum.auto()


@dataclass
class _Interruption:
    """Whether this process was asked to end, by its worker or because its worker died."""

    requested: bool = False


def carry_out(stage_id: str, *, settings: Settings, worker: str, command: Sequence[str]) -> None:
    """Begins an attempt, runs ``command STAGE_ID --attempt N`` in a child process, and records the outcome.

    Does nothing when the store does not let it begin. The child's output goes to the attempt's log. A child that
    exits with an error has failed the stage, with the Problem it left in SMOOTHKD_PROBLEM_FILE; one that a signal
    killed has lost the attempt. SIGTERM hands the stage back; the death of this process's parent counts as a loss.
    """
    worker_pid = os.getppid()
    with contextlib.closing(Store(settings.resolved_database_url)) as store, log_fields(stage=stage_id):
        with _interruptible() as interruption:
            attempt = store.begin_attempt(stage_id, worker=worker, lease_seconds=settings.lease_seconds)
            if attempt is None:
                log.info("stage %s is not to be begun: it waits, runs elsewhere or has ended", stage_id)
                return
            tried = _Try(store, attempt, store.stage(stage_id), settings, command, interruption)
            state = tried.carry_out(is_orphan=lambda: os.getppid() != worker_pid)
        log.info("attempt %d of stage %s: %s", attempt.number, stage_id, state or "superseded")
        if state == State.SUCCEEDED:
            _queue_dependants(store, stage_id, redis_url=settings.resolved_redis_url)


@dataclass
class _Try:
    store: Store
    attempt: Attempt
    stage: StageRecord
    settings: Settings
    command: Sequence[str]
    interruption: _Interruption

    def carry_out(self, *, is_orphan: Callable[[], bool]) -> State | None:
        """Runs the child to its end and returns what became of the stage; None when a newer attempt holds it."""
        try:
            ending, status = self._run_child()
        except OSError as error:
            problem = self._problem("worker", f"could not be started: {error}")
            return self._record(lambda: self._lose(problem))
        if ending is Ending.SUPERSEDED:
            return None
        if ending is Ending.INTERRUPTED and status != 0:
            if is_orphan():
                problem = self._problem("worker_lost", f"was stopped because its worker died{self._count_losses()}")
                return self._record(lambda: self._lose(problem))
            return self._record(lambda: self.store.release_attempt(self.attempt))
        return self._record(lambda: self._end(ending, status))

    @property
    def log_file(self) -> Path:
        stage = self.stage
        return self.settings.data_dir / log_path(
            stage.id, run_id=stage.run_id, kind=stage.kind, number=self.attempt.number
        )

    @property
    def problem_file(self) -> Path:
        return self.log_file.with_suffix(".problem.json")

    def _run_child(self) -> tuple[Ending, int]:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        argv = [*self.command, self.attempt.stage_id, "--attempt", str(self.attempt.number)]
        environment = {
            **os.environ,
            "SMOOTHKD_PROBLEM_FILE": str(self.problem_file.absolute()),
            # What a killed process had to say must stand in its log, Python's own last words included.
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        with self.log_file.open("ab") as output:
            child = start_child(argv, env=environment, stdout=output, stderr=output)
        try:
            ending = self._watch(child)
        finally:
            status = stop_child(child, grace_seconds=STOP_GRACE_SECONDS)
        return ending, status

    def _watch(self, child: subprocess.Popen[bytes]) -> Ending:
        """Keeps the lease until the child ends or is to be stopped."""
        between = min(self.settings.lease_seconds / 4, BEAT_SECONDS)
        next_beat = time.monotonic() + between
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(min(LOOK_SECONDS, between))
                return Ending.BY_ITSELF
            if self.interruption.requested:
                return Ending.INTERRUPTED
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + between
                ending = self._beat()
                if ending is not None:
                    return ending

    def _beat(self) -> Ending | None:
        try:
            cancelled = self.store.heartbeat(self.attempt, lease_seconds=self.settings.lease_seconds)
        except StaleAttemptError as error:
            log.warning("%s; stopping its process", error.what)
            return Ending.SUPERSEDED
        except StoreUnavailableError as error:
            # Work goes on: should the lease run out meanwhile, the first heartbeat that gets through will tell.
            log.warning("no heartbeat of stage %s: %s", self.stage.id, error.what)
            return None
        return Ending.CANCELLED if cancelled else None

    def _end(self, ending: Ending, status: int) -> State:
        if status == 0:
            self.store.end_attempt(self.attempt, State.SUCCEEDED)
            return State.SUCCEEDED
        if ending is Ending.CANCELLED:
            self.store.end_attempt(self.attempt, State.CANCELLED)
            return State.CANCELLED
        if status < 0:
            return self._lose(self._signal_problem(-status))
        problem = self._reported_problem() or self._exit_problem(status)
        state = State.CANCELLED if problem.reason == CancelledError.reason else State.FAILED
        self.store.end_attempt(self.attempt, state, problem=problem)
        return state

    def _lose(self, problem: Problem) -> State:
        return self.store.lose_attempt(self.attempt, max_attempts=self.settings.max_attempts, problem=problem)

    def _record(self, write: Callable[[], State]) -> State | None:
        """Writes the outcome, insisting for as long as the lease lasts should the database not answer."""
        deadline = time.monotonic() + self.settings.lease_seconds
        while True:
            try:
                return write()
            except StaleAttemptError as error:
                log.warning("%s; its outcome is not recorded", error.what)
                return None
            except StoreUnavailableError:
                if self.interruption.requested or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _reported_problem(self) -> Problem | None:
        try:
            return Problem.model_validate_json(self.problem_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def _exit_problem(self, status: int) -> Problem:
        return self._problem("stage_process", f"ended with exit code {status}{self._last_words()}")

    def _signal_problem(self, number: int) -> Problem:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = ""
        if number == signal.SIGKILL:
            hint = "If nobody killed it, memory ran out: lower micro_batch_size, max_length or evaluation.batch_size."
        what = f"was killed by {name}{self._count_losses()}{self._last_words()}"
        return self._problem("process_killed", what, hint=hint)

    def _problem(self, reason: str, what: str, *, hint: str = "") -> Problem:
        subject = f"run {self.stage.run_id}" if self.stage.run_id else f"sweep {self.stage.sweep_id}"
        return Problem(
            reason=reason,
            what=f"the {self.stage.kind} process of {subject} {what}",
            fix=f"{hint} Its log is {self.log_file}.".strip(),
        )

    def _count_losses(self) -> str:
        return f" in attempt {self.attempt.number}; {self.settings.max_attempts} losses fail a stage"

    def _last_words(self) -> str:
        try:
            with self.log_file.open("rb") as output:
                output.seek(max(0, output.seek(0, os.SEEK_END) - 8192))
                lines = output.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        shown = [f"    {line}" for line in lines[-LAST_LINES:] if line.strip()]
        return "; its last words:\n" + "\n".join(shown) if shown else ""


@contextlib.contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """SIGTERM sets a flag inside the block; outside it has its usual effect."""
    interruption = _Interruption()

    def interrupt(_number: int, _frame: object) -> None:
        interruption.requested = True

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGTERM, before)


def _queue_dependants(store: Store, stage_id: str, *, redis_url: str) -> None:
    """Queues what became ready, evaluations before all that waits; should Redis be down, the reconciler will do it."""
    queue = Queue(redis_url)
    try:
        for stage in store.ready_stages(after=stage_id):
            queue.enqueue(stage.id, stage.attempt + 1, front=stage.kind == StageKind.EVALUATE)
    except QueueUnavailableError as error:
        log.warning("%s; the reconciler will queue what follows stage %s", error.what, stage_id)
    finally:
        queue.close()
