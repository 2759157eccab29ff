"""Stages and attempts: order, leases, fencing, retries, cancellation."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.contract.errors import StaleAttemptError
from services.contract.records import Artifact, Generation, MetricPoint, Problem, Score
from services.contract.states import State
from services.store import attempts
from services.store.store import Attempt, Store
from tests.store.examples import begin, example_sweep, finish, stage_ids

EXPIRED = -1.0  # seconds: a lease that has run out when it begins
PROBLEM = Problem(reason="training", what="the loss is not finite", fix="Lower the learning rate.")


def test_stages_become_ready_one_after_the_other(store: Store) -> None:
    sweep = store.create_sweep(example_sweep(distillation={"level": "word+sequence"}))
    decode, train, evaluate = stage_ids(store, sweep)
    _, other_train, _ = stage_ids(store, sweep, run=1)

    def ready() -> list[str]:
        return [stage.id for stage in store.ready_stages()]

    assert store.begin_attempt(train, worker="worker", lease_seconds=60) is None
    assert ready() == [decode]
    finish(store, decode)
    assert ready() == [train, other_train]
    assert [stage.id for stage in store.ready_stages(after=decode)] == [train, other_train]
    finish(store, train)
    assert ready() == [evaluate, other_train]
    assert [stage.id for stage in store.ready_stages(after=train)] == [evaluate]
    finish(store, evaluate)
    assert store.runs(sweep.id).items[0].state == State.SUCCEEDED
    assert store.sweep(sweep.id).runs == {State.SUCCEEDED: 1, State.RUNNING: 1}
    finish(store, other_train)
    finish(store, stage_ids(store, sweep, run=1)[2])
    assert (store.sweep(sweep.id).state, ready()) == (State.SUCCEEDED, [])
    assert store.begin_attempt(train, worker="worker", lease_seconds=60) is None


def test_a_stage_record_tells_of_its_newest_attempt(store: Store) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    assert (store.stage(train).attempt, store.stage(train).worker, store.stage(train).started_at) == (0, None, None)
    store.begin_attempt(train, worker="first", lease_seconds=EXPIRED)
    store.reclaim_expired(max_attempts=3)
    attempt = store.begin_attempt(train, worker="second", lease_seconds=60)
    assert attempt == Attempt(stage_id=train, number=2)
    record = store.stage(train)
    assert (record.state, record.attempt, record.worker) == (State.RUNNING, 2, "second")
    store.end_attempt(attempt, State.FAILED, problem=PROBLEM)
    record = store.stage(train)
    assert record.problem == PROBLEM
    assert record.started_at <= record.ended_at


@pytest.mark.parametrize("contenders", [16])
def test_one_of_many_workers_begins_a_stage(store: Store, contenders: int) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    start = threading.Barrier(contenders)

    def contend(number: int) -> Attempt | None:
        start.wait()
        return store.begin_attempt(train, worker=f"worker-{number}", lease_seconds=60)

    with ThreadPoolExecutor(contenders) as pool:
        begun = [attempt for attempt in pool.map(contend, range(contenders)) if attempt]
    assert begun == [Attempt(stage_id=train, number=1)]


def test_many_workers_finish_a_sweep_and_begin_each_stage_once(store: Store) -> None:
    sweep = store.create_sweep(
        example_sweep(grid={"alpha": 0.1, "seed": list(range(15))}, distillation={"level": "word+sequence"})
    )
    begun: list[str] = []

    def work(number: int) -> None:
        while store.sweep(sweep.id).state in (State.QUEUED, State.RUNNING):
            for stage in store.ready_stages()[number % 3 :]:
                attempt = store.begin_attempt(stage.id, worker=str(number), lease_seconds=60)
                if attempt:
                    begun.append(stage.id)
                    point = MetricPoint(name="loss", step=1, value=number)
                    if stage.run_id:
                        store.add_metrics(attempt, [point])
                    store.heartbeat(attempt, lease_seconds=60)
                    store.end_attempt(attempt, State.SUCCEEDED)
            store.reclaim_expired(max_attempts=3)

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, number) for number in range(6)]:
            done.result(timeout=60)
    assert len(begun) == len(set(begun)) == 31
    assert store.sweep(sweep.id).runs == {State.SUCCEEDED: 15}


def test_cancelling_while_workers_work_ends_every_stage(store: Store) -> None:
    sweep = store.create_sweep(example_sweep(grid={"alpha": 0.1, "seed": list(range(20))}))

    def work(number: int) -> None:
        for stage in store.ready_stages()[number::4]:
            attempt = store.begin_attempt(stage.id, worker=str(number), lease_seconds=60)
            if attempt:
                cancelled = store.heartbeat(attempt, lease_seconds=60)
                store.end_attempt(attempt, State.CANCELLED if cancelled else State.SUCCEEDED)

    with ThreadPoolExecutor(5) as pool:
        working = [pool.submit(work, number) for number in range(4)]
        store.request_cancel(sweep.id)
        for done in working:
            done.result(timeout=60)
    record = store.sweep(sweep.id)
    assert record.state == State.CANCELLED
    # Every run's evaluation was still queued, so every run is cancelled.
    assert record.runs == {State.CANCELLED: 20}
    assert store.ready_stages() == []


def test_a_failed_stage_skips_what_needs_it_and_nothing_else(store: Store) -> None:
    sweep = store.create_sweep(example_sweep())
    train, evaluate = stage_ids(store, sweep)
    store.end_attempt(begin(store, train), State.FAILED, problem=PROBLEM)
    assert store.stage(evaluate).state == State.SKIPPED
    assert store.stage(evaluate).ended_at is not None
    failed, other = store.runs(sweep.id).items
    assert (failed.state, failed.problem, failed.progress) == (State.FAILED, PROBLEM, 1)
    assert (other.state, other.problem) == (State.QUEUED, None)
    assert store.sweep(sweep.id).state == State.RUNNING
    for stage_id in stage_ids(store, sweep, run=1):
        finish(store, stage_id)
    assert store.sweep(sweep.id).state == State.FAILED


def test_a_failed_decode_skips_everything_below_it(store: Store) -> None:
    sweep = store.create_sweep(
        example_sweep(grid={"alpha": 0.1, "seed": [0, 1, 2]}, distillation={"level": "word+sequence"})
    )
    decode = stage_ids(store, sweep)[0]
    store.end_attempt(begin(store, decode), State.FAILED, problem=PROBLEM)
    for run in store.runs(sweep.id).items:
        assert [stage.state for stage in run.stages] == [State.FAILED, State.SKIPPED, State.SKIPPED]
        assert (run.state, run.problem) == (State.FAILED, PROBLEM)
    assert store.sweep(sweep.id).runs == {State.FAILED: 3}


def test_cancelling_ends_the_queued_and_tells_the_running(store: Store) -> None:
    sweep = store.create_sweep(example_sweep())
    train, _ = stage_ids(store, sweep)
    attempt = begin(store, train)
    assert store.heartbeat(attempt, lease_seconds=60) is False
    record = store.request_cancel(sweep.id)
    assert (record.cancel_requested, record.state) == (True, State.RUNNING)
    assert record.runs == {State.RUNNING: 1, State.CANCELLED: 1}
    assert store.ready_stages() == []
    assert store.heartbeat(attempt, lease_seconds=60) is True
    assert store.runs(sweep.id).items[0].cancel_requested
    store.end_attempt(attempt, State.CANCELLED)
    assert store.sweep(sweep.id).state == State.CANCELLED
    assert store.request_cancel(sweep.id) == store.sweep(sweep.id)


def test_a_stage_that_succeeds_although_cancelled_keeps_its_success(store: Store) -> None:
    sweep = store.create_sweep(example_sweep(evaluation={}, grid={"alpha": [0]}))
    (train,) = stage_ids(store, sweep)
    attempt = begin(store, train)
    store.request_cancel(sweep.id)
    store.end_attempt(attempt, State.SUCCEEDED)
    run = store.runs(sweep.id).items[0]
    assert (run.state, run.cancel_requested) == (State.SUCCEEDED, False)


def test_a_heartbeat_keeps_the_lease(store: Store) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    attempt = begin(store, train, lease_seconds=EXPIRED)
    store.heartbeat(attempt, lease_seconds=60)
    assert store.reclaim_expired(max_attempts=3) == []
    store.heartbeat(attempt, lease_seconds=EXPIRED)
    (reclaimed,) = store.reclaim_expired(max_attempts=3)
    assert (reclaimed.id, reclaimed.state) == (train, State.QUEUED)
    assert store.reclaim_expired(max_attempts=3) == []


def test_a_stage_fails_when_it_lost_its_worker_too_often(store: Store) -> None:
    sweep = store.create_sweep(example_sweep())
    train, evaluate = stage_ids(store, sweep)
    for number in (1, 2, 3):
        assert begin(store, train, lease_seconds=EXPIRED).number == number
        (reclaimed,) = store.reclaim_expired(max_attempts=3)
        assert reclaimed.state == (State.QUEUED if number < 3 else State.FAILED)
        assert (reclaimed.problem is None) == (number < 3)
    problem = store.stage(train).problem
    assert problem.reason == "worker_lost"
    assert "worker worker was last heard of" in problem.what
    assert "3 of 3 attempts lost" in problem.what
    assert f"runs/{store.stage(train).run_id}/logs/train-3.log" in problem.fix
    assert store.stage(evaluate).state == State.SKIPPED
    assert store.begin_attempt(train, worker="worker", lease_seconds=60) is None


def test_a_lost_process_is_retried_like_a_lost_worker(store: Store) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    assert store.lose_attempt(begin(store, train), max_attempts=2, problem=PROBLEM) == State.QUEUED
    assert store.stage(train).problem is None
    assert store.lose_attempt(begin(store, train), max_attempts=2, problem=PROBLEM) == State.FAILED
    assert store.stage(train).problem == PROBLEM


def test_a_stage_handed_back_counts_as_no_loss(store: Store) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    for number in range(1, 6):
        attempt = begin(store, train)
        assert attempt.number == number
        assert store.release_attempt(attempt) == State.QUEUED
    assert store.lose_attempt(begin(store, train), max_attempts=2, problem=PROBLEM) == State.QUEUED


@pytest.mark.parametrize("end", ["expire", "lose", "release"])
def test_a_cancelled_stage_is_not_queued_again(store: Store, end: str) -> None:
    sweep = store.create_sweep(example_sweep())
    train, _ = stage_ids(store, sweep)
    attempt = begin(store, train, lease_seconds=EXPIRED)
    store.request_cancel(sweep.id)
    if end == "expire":
        store.reclaim_expired(max_attempts=3)
    elif end == "lose":
        store.lose_attempt(attempt, max_attempts=3, problem=PROBLEM)
    else:
        store.release_attempt(attempt)
    assert store.stage(train).state == State.CANCELLED
    assert store.sweep(sweep.id).state == State.CANCELLED


WRITES: dict[str, Callable[[Store, Attempt], object]] = {
    "heartbeat": lambda store, attempt: store.heartbeat(attempt, lease_seconds=60),
    "set_progress": lambda store, attempt: store.set_progress(attempt, 0.9),
    "end_attempt": lambda store, attempt: store.end_attempt(attempt, State.SUCCEEDED),
    "lose_attempt": lambda store, attempt: store.lose_attempt(attempt, max_attempts=1, problem=PROBLEM),
    "release_attempt": lambda store, attempt: store.release_attempt(attempt),
    "check_current": lambda store, attempt: store.check_current(attempt),
    "add_metrics": lambda store, attempt: store.add_metrics(attempt, [MetricPoint(name="loss", step=1, value=9.0)]),
    "add_generations": lambda store, attempt: store.add_generations(
        attempt,
        [Generation(benchmark="xsum", item_id="1", source="", reference="", output="stale", scores={}, spans=[])],
    ),
    "put_scores": lambda store, attempt: store.put_scores(
        attempt, [Score(benchmark="xsum", metric="rouge_l", value=9.0, items=1)]
    ),
    "add_artifact": lambda store, attempt: store.add_artifact(
        attempt, Artifact(run_id=store.stage(attempt.stage_id).run_id, name="model", path="stale")
    ),
}


@pytest.mark.parametrize("over", ["reclaimed", "superseded", "ended"])
def test_a_stale_attempt_cannot_write(store: Store, over: str) -> None:
    sweep = store.create_sweep(example_sweep())
    train, _ = stage_ids(store, sweep)
    stale = begin(store, train, lease_seconds=EXPIRED)
    WRITES["add_metrics"](store, stale)
    if over == "ended":
        store.end_attempt(stale, State.FAILED, problem=PROBLEM)
    else:
        store.reclaim_expired(max_attempts=3)
    if over == "superseded":
        begin(store, train)
    before = _everything(store, sweep.id)
    for name, write in WRITES.items():
        with pytest.raises(StaleAttemptError, match=f"attempt 1 of stage {train} is over"):
            write(store, stale)
        assert _everything(store, sweep.id) == before, name


def test_the_current_attempt_can_write(store: Store) -> None:
    for write in WRITES.values():
        train, _ = stage_ids(store, store.create_sweep(example_sweep()))
        write(store, begin(store, train))


def test_a_writer_is_stale_the_moment_another_begins(store: Store) -> None:
    """Writers and a reclaimer race: every write that was accepted came before the next attempt began."""
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    run_id = store.stage(train).run_id
    accepted: dict[int, int] = {}

    def write_on(attempt: Attempt) -> None:
        until = time.monotonic() + 60
        for step in itertools.count():
            try:
                store.add_metrics(attempt, [MetricPoint(name=f"of-{attempt.number}", step=step, value=0)])
            except StaleAttemptError:
                return
            accepted[attempt.number] = step
            assert time.monotonic() < until, f"attempt {attempt.number} still writes after {step + 1} writes"

    with ThreadPoolExecutor(4) as pool:
        writing = []
        for _ in range(4):
            attempt = begin(store, train, lease_seconds=EXPIRED)
            writing.append(pool.submit(write_on, attempt))
            while attempt.number not in accepted:
                assert not writing[-1].done()
            store.reclaim_expired(max_attempts=10)
        for done in writing:
            done.result()
    points = store.metrics(run_id)
    for number, last in accepted.items():
        assert [point.step for point in points if point.name == f"of-{number}"] == list(range(last + 1))


def test_a_write_under_way_holds_off_the_next_attempt(store: Store) -> None:
    train, _ = stage_ids(store, store.create_sweep(example_sweep()))
    attempt = begin(store, train, lease_seconds=EXPIRED)
    with ThreadPoolExecutor(1) as pool:
        with store._database.writing() as connection:
            attempts.check_current(connection, attempt)
            reclaiming = pool.submit(store.reclaim_expired, max_attempts=3)
            with pytest.raises(TimeoutError):
                reclaiming.result(timeout=0.3)
        assert [stage.id for stage in reclaiming.result(timeout=60)] == [train]


def test_the_change_counter_grows_with_what_a_viewer_sees(store: Store) -> None:
    counts = [store.change_counter()]

    def grew() -> bool:
        counts.append(store.change_counter())
        return counts[-1] > counts[-2]

    sweep = store.create_sweep(example_sweep(), idempotency_key="key")
    assert grew()
    store.create_sweep(example_sweep(), idempotency_key="key")
    assert not grew()
    train, evaluate = stage_ids(store, sweep)
    attempt = begin(store, train)
    assert grew()
    assert store.begin_attempt(train, worker="worker", lease_seconds=1) is None
    assert not grew()
    store.heartbeat(attempt, lease_seconds=60)
    assert not grew()
    for name in ("set_progress", "add_metrics", "add_generations", "put_scores", "add_artifact", "end_attempt"):
        WRITES[name](store, attempt)
        assert grew(), name
    begin(store, evaluate, lease_seconds=EXPIRED)
    assert grew()
    store.reclaim_expired(max_attempts=3)
    assert grew()
    store.reclaim_expired(max_attempts=3)
    assert not grew()
    store.request_cancel(sweep.id)
    assert grew()


def _everything(store: Store, sweep_id: str) -> list[object]:
    runs = store.runs(sweep_id).items
    results = [
        [read(run.id) for read in (store.metrics, store.generations, store.scores, store.artifacts)] for run in runs
    ]
    return [store.sweep(sweep_id), runs, results, store.change_counter()]
