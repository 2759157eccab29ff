"""The queue on a real Valkey server."""

import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from services.contract.errors import InvalidInputError, QueueUnavailableError
from services.store.queue import Queue, job_id
from tests.store.redis_server import RedisServer


@pytest.fixture
def queue(server: RedisServer) -> Iterator[Queue]:
    queue = Queue(server.url)
    yield queue
    queue.close()


def order(server: RedisServer) -> list[str]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return client.lrange("rq:queue:stages", 0, -1)


def test_an_attempt_is_queued_once(queue: Queue, server: RedisServer) -> None:
    queue.ping()
    assert queue.enqueue("sw-1-train", 1) is True
    assert queue.enqueue("sw-1-train", 1) is False
    assert queue.enqueue("sw-1-train", 2) is True
    assert order(server) == ["sw-1-train-1", "sw-1-train-2"]
    assert queue.waiting() == {job_id("sw-1-train", 1), job_id("sw-1-train", 2)}


def test_the_front_comes_before_all_that_waits(queue: Queue, server: RedisServer) -> None:
    for stage in ("a", "b"):
        queue.enqueue(stage, 1)
    queue.enqueue("c", 1, front=True)
    assert order(server) == ["c-1", "a-1", "b-1"]


def test_a_job_carries_the_stage_id_as_json_and_nothing_else(queue: Queue, server: RedisServer) -> None:
    queue.enqueue("sw-1-train", 1)
    with redis.Redis.from_url(server.url) as client:
        data = json.loads(zlib.decompress(client.hget("rq:job:sw-1-train-1", "data")))
    assert data == ["student_trainer.worker.run_stage", None, ["sw-1-train"], {}]


def test_a_job_that_a_dead_worker_took_can_be_queued_again(queue: Queue, server: RedisServer) -> None:
    queue.enqueue("a", 1)
    with redis.Redis.from_url(server.url) as client:
        client.lmove("rq:queue:stages", "rq:queue:stages:intermediate")
        assert queue.waiting() == set()
        assert queue.enqueue("a", 1) is False
        queue.forget("a", 1)
        queue.forget("never-queued", 1)
        assert client.llen("rq:queue:stages:intermediate") == 0
    assert queue.enqueue("a", 1) is True
    assert order(server) == ["a-1"]


def test_an_absent_server_is_named_without_its_password(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/nothing.sock", "redis://user:secret@127.0.0.1:1/0"):
        queue = Queue(url, retry_seconds=0)
        for call in (queue.ping, queue.waiting, queue.worker_hosts, queue.clean, lambda q=queue: q.enqueue("a", 1)):
            with pytest.raises(QueueUnavailableError, match="does not answer") as caught:
                call()
            assert url.replace("user:secret@", "") in caught.value.what
            assert "secret" not in str(caught.value)
            assert "SMOOTHKD_REDIS_URL" in caught.value.fix


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "nonsense", "", "redis://host:port/0"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="not the address of a queue"):
        Queue(url)


def test_a_short_outage_is_waited_out(server: RedisServer) -> None:
    queue = Queue(server.url, retry_seconds=20.0)
    queue.enqueue("a", 1)
    server.kill()
    started = time.monotonic()
    restart = threading.Timer(0.5, server.start)
    restart.start()
    assert queue.waiting() == {"a-1"}
    assert time.monotonic() - started >= 0.5
    restart.join()
    queue.close()


def test_acknowledged_jobs_survive_a_kill_of_the_server(queue: Queue, server: RedisServer) -> None:
    for number in range(100):
        queue.enqueue(f"stage-{number}", 1)
    server.kill()
    server.start()
    assert order(server) == [f"stage-{number}-1" for number in range(100)]
