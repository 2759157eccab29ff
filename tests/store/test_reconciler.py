"""The reconciler over a real store and a real Valkey server."""

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from services.contract.settings import Settings
from services.contract.states import State
from services.store.queue import Queue, job_id
from services.store.reconciler import Reconciler
from services.store.store import Store
from tests.store.examples import begin, example_sweep, finish, stage_ids
from tests.store.redis_server import RedisServer


@pytest.fixture
def queue(server: RedisServer) -> Iterator[Queue]:
    queue = Queue(server.url, retry_seconds=0)
    yield queue
    queue.close()


@pytest.fixture
def reconciler(sqlite_store: Store, queue: Queue) -> Reconciler:
    return Reconciler(sqlite_store, queue, Settings(max_attempts=2), interval_seconds=0.05, grace_seconds=0.0)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def take_all(server: RedisServer) -> None:
    """As workers do that then die before they begin."""
    with redis.Redis.from_url(server.url) as client:
        while client.lmove("rq:queue:stages", "rq:queue:stages:intermediate"):
            pass


def test_ready_stages_are_queued_once(sqlite_store: Store, queue: Queue, reconciler: Reconciler) -> None:
    sweep = sqlite_store.create_sweep(example_sweep())
    trains = [stage_ids(sqlite_store, sweep, run=run)[0] for run in range(2)]
    for _ in range(3):
        reconciler.run_once()
        assert queue.waiting() == {job_id(train, 1) for train in trains}
    finish(sqlite_store, trains[0])
    reconciler.run_once()
    evaluate = job_id(stage_ids(sqlite_store, sweep)[1], 1)
    # The finished stage's job is still there: whoever takes it finds nothing to do.
    assert queue.waiting() == {job_id(train, 1) for train in trains} | {evaluate}


def test_a_wiped_queue_is_rebuilt(
    sqlite_store: Store, queue: Queue, server: RedisServer, reconciler: Reconciler
) -> None:
    sqlite_store.create_sweep(example_sweep(grid={"alpha": 0.1, "seed": list(range(50))}))
    reconciler.run_once()
    queued = queue.waiting()
    assert len(queued) == 50
    server.wipe()
    assert queue.waiting() == set()
    reconciler.run_once()
    assert queue.waiting() == queued


def test_a_job_that_died_with_its_worker_is_queued_again_after_the_grace(
    sqlite_store: Store, queue: Queue, server: RedisServer
) -> None:
    sweep = sqlite_store.create_sweep(example_sweep())
    train = stage_ids(sqlite_store, sweep)[0]
    patient = Reconciler(sqlite_store, queue, Settings(), grace_seconds=60.0)
    patient.run_once()
    take_all(server)
    patient.run_once()
    assert queue.waiting() == set()  # a worker may be about to begin it

    hasty = Reconciler(sqlite_store, queue, Settings(), grace_seconds=0.0)
    hasty.run_once()
    assert job_id(train, 1) in queue.waiting()


def test_a_stage_under_way_is_left_alone(
    sqlite_store: Store, queue: Queue, server: RedisServer, reconciler: Reconciler
) -> None:
    sweep = sqlite_store.create_sweep(example_sweep(grid={"alpha": 0}))
    begin(sqlite_store, stage_ids(sqlite_store, sweep)[0])
    reconciler.run_once()
    assert queue.waiting() == set()


def test_an_expired_lease_is_reclaimed_and_queued_under_the_next_number(
    sqlite_store: Store, queue: Queue, reconciler: Reconciler
) -> None:
    sweep = sqlite_store.create_sweep(example_sweep(grid={"alpha": 0}))
    train = stage_ids(sqlite_store, sweep)[0]
    begin(sqlite_store, train, lease_seconds=-1)
    reconciler.run_once()
    assert queue.waiting() == {job_id(train, 2)}
    begin(sqlite_store, train, lease_seconds=-1)
    reconciler.run_once()
    assert sqlite_store.stage(train).state == State.FAILED


def test_an_outage_is_logged_once_and_leases_are_reclaimed_meanwhile(
    sqlite_store: Store,
    queue: Queue,
    server: RedisServer,
    reconciler: Reconciler,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="smoothkd.reconciler")
    sweep = sqlite_store.create_sweep(example_sweep(grid={"alpha": 0}))
    train = stage_ids(sqlite_store, sweep)[0]
    begin(sqlite_store, train, lease_seconds=-1)
    server.kill()
    for _ in range(5):
        reconciler.run_once()
    assert sqlite_store.stage(train).state == State.QUEUED
    assert [record.levelname for record in caplog.records if "does not answer" in record.message] == ["WARNING"]
    server.start()
    for _ in range(2):
        reconciler.run_once()
    assert [record.message for record in caplog.records if "recovered" in record.message] == [
        "recovered from queue_unavailable"
    ]
    assert queue.waiting() == {job_id(train, 2)}
    server.kill()
    reconciler.run_once()
    assert sum("does not answer" in record.message for record in caplog.records) == 2


def test_it_runs_in_the_background_until_stopped(
    sqlite_store: Store, queue: Queue, server: RedisServer, reconciler: Reconciler
) -> None:
    reconciler.start()
    sqlite_store.create_sweep(example_sweep())
    wait_for(lambda: len(queue.waiting()) == 2)
    server.kill()
    server.start()
    server.wipe()
    wait_for(lambda: len(queue.waiting()) == 2)
    reconciler.stop()
    server.wipe()
    assert queue.waiting() == set()


def test_waking_it_begins_a_pass_at_once(sqlite_store: Store, queue: Queue) -> None:
    reconciler = Reconciler(sqlite_store, queue, Settings(), interval_seconds=3600)
    reconciler.start()
    sqlite_store.create_sweep(example_sweep())
    reconciler.wake()
    wait_for(lambda: len(queue.waiting()) == 2)
    reconciler.stop()


def test_a_pass_that_fails_does_not_end_it(
    sqlite_store: Store, queue: Queue, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reconciler = Reconciler(sqlite_store, queue, Settings(), interval_seconds=0.01)
    sqlite_store.create_sweep(example_sweep())
    ready = sqlite_store.ready_stages
    failures = iter([True])

    def fail_once() -> list:
        if next(failures, False):
            raise ZeroDivisionError
        return ready()

    monkeypatch.setattr(sqlite_store, "ready_stages", fail_once)
    reconciler.start()
    wait_for(lambda: len(queue.waiting()) == 2)
    reconciler.stop()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_stopping_one_that_never_started_returns(sqlite_store: Store, queue: Queue) -> None:
    Reconciler(sqlite_store, queue, Settings()).stop()
