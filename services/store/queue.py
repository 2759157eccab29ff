"""The queue that wakes workers: RQ on Redis or Valkey, carrying stage ids and nothing else.

It may lose or repeat anything: what is to be done stands in the store, a worker begins only what the store
lets it begin, and the reconciler queues again what got lost.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue as RedisQueue
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import as_text
from rq.worker import BaseWorker

from services.contract.errors import InvalidInputError, QueueUnavailableError

NAME = "stages"
WORK = "student_trainer.worker.run_stage"
FAILURE_SECONDS = 600
SILENT_SECONDS = 30
"""A worker that has not been heard of for this long does not count as listening; it calls every 5 s."""

BACKOFF_CAP, BACKOFF_BASE = 5.0, 0.1


class Queue:
    """Stage ids on their way to workers.

    ``url``: redis://host:port/db, rediss://... or unix:///path/to/socket. Every method waits out an outage of up
    to ``retry_seconds`` and then raises QueueUnavailableError. InvalidInputError for another kind of URL.
    """

    def __init__(self, url: str, *, retry_seconds: float = 2.0) -> None:
        self._url = url
        self._connection = connect(url, retry_seconds=retry_seconds, answer_seconds=5.0)
        self._queue = RedisQueue(NAME, connection=self._connection, serializer=JSONSerializer)

    def ping(self) -> None:
        """QueueUnavailableError unless Redis or Valkey answers."""
        with self._available():
            self._connection.ping()

    def enqueue(self, stage_id: str, attempt_number: int, *, front: bool = False) -> bool:
        """Queues the stage for the attempt of this number, once; False when that was done before.

        ``front`` puts it before all that waits.
        """
        with self._available():
            try:
                self._queue.enqueue_call(
                    WORK,
                    args=(stage_id,),
                    job_id=job_id(stage_id, attempt_number),
                    unique=True,
                    at_front=front,
                    timeout=-1,
                    result_ttl=0,
                    failure_ttl=FAILURE_SECONDS,
                    description=stage_id,
                )
            except DuplicateJobError:
                return False
            return True

    def waiting(self) -> set[str]:
        """Job ids that wait for a worker."""
        with self._available():
            return set(self._queue.get_job_ids())

    def forget(self, stage_id: str, attempt_number: int) -> None:
        """Removes every trace of a job that a dead worker took, so that it can be queued again."""
        name = job_id(stage_id, attempt_number)
        with self._available():
            self._connection.lrem(self._queue.intermediate_queue_key, 0, name)
            try:
                Job.fetch(name, connection=self._connection, serializer=JSONSerializer).delete()
            except NoSuchJobError:
                return

    def clean(self) -> None:
        """Ends RQ's records of jobs whose worker fell silent."""
        with self._available():
            for registry in (StartedJobRegistry, FailedJobRegistry):
                registry(queue=self._queue).cleanup()

    def worker_hosts(self) -> list[str]:
        """The host of every worker that listens to the queue."""
        with self._available():
            hosts = []
            for key in BaseWorker.all_keys(queue=self._queue):
                host, heard = self._connection.hmget(key, "hostname", "last_heartbeat")
                if host and heard and _age(as_text(heard)) < SILENT_SECONDS:
                    hosts.append(as_text(host))
            return hosts

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise QueueUnavailableError(
                f"the queue at {_without_password(self._url)} does not answer: {error}",
                fix="Start Redis or Valkey there, or point SMOOTHKD_REDIS_URL at one that runs.",
            ) from error


def job_id(stage_id: str, attempt_number: int) -> str:
    """The name of the job that begins this attempt."""
    return f"{stage_id}-{attempt_number}"


def connect(url: str, *, retry_seconds: float, answer_seconds: float | None) -> "redis.Redis":
    """A client that waits out an outage of ``retry_seconds``, and ``answer_seconds`` (None: for ever) for an answer."""
    try:
        return redis.Redis.from_url(
            url,
            retry=Retry(ExponentialBackoff(cap=BACKOFF_CAP, base=BACKOFF_BASE), _retries(retry_seconds)),
            socket_timeout=answer_seconds,
            socket_connect_timeout=5.0,
        )
    except ValueError as error:
        raise InvalidInputError(
            f"{_without_password(url)!r} is not the address of a queue: {error}",
            fix="Write redis://host:port/0 or unix:///path/to/socket.",
        ) from None


def _retries(seconds: float) -> int:
    """How many retries of the exponential backoff fill ``seconds``."""
    count, waited = 0, 0.0
    while waited < seconds:
        count += 1
        waited += min(BACKOFF_CAP, BACKOFF_BASE * 2**count)
    return count


def _age(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)
