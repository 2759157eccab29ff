"""The queue worker: takes stage ids from the queue and has each stage carried out by processes that it watches.

    worker (this, RQ)  ->  job process (fork)  ->  stage process (exec of ``smoothkd stage``)

Neither of the first two imports torch, and the third gives its GPU memory back by ending. Each dies with the one
before it. The store decides what is begun and what counts; RQ only passes the word.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Worker, worker_registration
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer

from services.contract.errors import QueueUnavailableError
from services.contract.settings import Settings
from services.process import die_with_parent
from services.store.queue import NAME, Queue, connect
from services.store.store import Store
from student_trainer.stage_process import carry_out

log = logging.getLogger("smoothkd.worker")

STAGE_COMMAND = (sys.executable, "-m", "services.cli.main", "stage")
START_SECONDS = 10.0
OUTAGE_SECONDS = 300.0
"""An outage of Redis that a worker sits out; it then ends, to be started again by its supervisor."""
MONITORING_SECONDS = 5
SILENCE_SECONDS = 30
"""RQ takes a job whose worker was silent this long for abandoned."""
IDLE_SECONDS = 20  # RQ waits for a job 15 s less than this before it calls again
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_carry_out: ContextVar[Callable[[str], None]] = ContextVar("carry_out")


def run_worker(settings: Settings, *, command: Sequence[str] = STAGE_COMMAND, burst: bool = False) -> None:
    """Works on stages, one at a time, until SIGTERM or SIGINT; in ``burst`` mode until the queue is empty.

    ``command STAGE_ID --attempt N`` carries a stage out. A stop hands the running stage back to the queue. Raises
    QueueUnavailableError or StoreUnavailableError when those do not answer at the start, and QueueUnavailableError
    when Redis stays away for five minutes.
    """
    queue = Queue(settings.resolved_redis_url, retry_seconds=START_SECONDS)
    queue.ping()
    queue.close()
    Store(settings.resolved_database_url).close()
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    _carry_out.set(partial(carry_out, settings=settings, worker=name, command=command))
    worker = StageWorker(
        [NAME],
        name=name,
        connection=connect(settings.resolved_redis_url, retry_seconds=OUTAGE_SECONDS, answer_seconds=None),
        serializer=JSONSerializer,
        job_monitoring_interval=MONITORING_SECONDS,
        worker_ttl=IDLE_SECONDS,
    )
    log.info("worker %s waits for stages", name)
    worker.stop_on_signals()
    try:
        worker.work(burst=burst, logging_level="WARNING")
    except StopRequested:
        worker.teardown()
    if not burst and not worker.asked_to_stop:
        raise QueueUnavailableError(
            f"worker {name} ended because the queue stayed away or answered nonsense; the log above says which",
            fix="Check Redis or Valkey, then start the worker again.",
        )


def run_stage(stage_id: str) -> None:
    """The job: what RQ calls, by this name, in the process it forks."""
    worker = os.getppid()
    _carry_out.get()(stage_id)
    if os.getppid() != worker:
        # The worker died: RQ's bookkeeping would keep this orphan, possibly waiting for a Redis that died too.
        os._exit(1)


class StageWorker(Worker):
    """RQ's worker, made to notice deaths in seconds and to live through outages of Redis."""

    max_connection_wait_time = 5.0

    @property
    def asked_to_stop(self) -> bool:
        return self._shutdown_requested_date is not None

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT raise StopRequested from here on; RQ itself heeds them only once it has started up."""
        self._install_signal_handlers()

    def get_heartbeat_ttl(self, job: Any, working_time: float = 0.0) -> int:
        return SILENCE_SECONDS

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        super().heartbeat(timeout, pipeline=pipeline)
        if pipeline is None and self.birth_date and not self.connection.hexists(self.key, "birth"):
            # Redis lost its memory; without this nobody would know that the worker listens.
            self.connection.hset(self.key, mapping=self.serialize())
            worker_registration.register(self)

    def maintain_heartbeats(self, job: Any, execution: Any) -> None:
        try:
            super().maintain_heartbeats(job, execution)
        except RedisError as error:
            log.warning("stage %s goes on without the queue: %s", job.description, error)

    def fork_work_horse(self, job: Any, queue: Any) -> None:
        # A stop that comes between the fork and the child's own handlers would otherwise be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            super().fork_work_horse(job, queue)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if self.asked_to_stop:
            self.handle_warm_shutdown_request()

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()
        assert self.pid is not None
        die_with_parent(self.pid, with_signal=signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def request_stop(self, signum: Any, frame: Any) -> None:
        # Who stops waits for nobody: with the patience of work, RQ's goodbyes to a Redis that is down take minutes.
        self.connection.set_retry(Retry(NoBackoff(), 0))
        super().request_stop(signum, frame)

    def set_shutdown_requested_date(self) -> None:
        with contextlib.suppress(RedisError):
            super().set_shutdown_requested_date()

    def teardown(self) -> None:
        with contextlib.suppress(RedisError):
            super().teardown()

    def handle_warm_shutdown_request(self) -> None:
        """Has the job process stop its stage and hand it back: nobody waits hours for a training to end."""
        if self.horse_pid:
            self.kill_horse(signal.SIGTERM)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        # The process alone, not its group: until the child has made one of its own, that is this process's.
        try:
            os.kill(self.horse_pid, sig)
        except ProcessLookupError:
            return
