"""One attempt: what the child process does, and what the store then says."""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from services.contract.errors import StoreUnavailableError
from services.contract.settings import Settings
from services.contract.states import State
from services.store.store import Store
from student_trainer import stage_process
from student_trainer.stage_process import carry_out
from tests.store.examples import begin, example_sweep, stage_ids
from tests.worker.conftest import FAKE_STAGE, Platform
from tests.worker.processes import is_alive, wait_for


@pytest.fixture
def bench(settings: Settings, store: Store) -> Platform:
    """A platform of which only the store is used: no queue, no worker."""
    return Platform(settings.model_copy(update={"redis_url": "unix:///nothing"}), store, None, None)


@pytest.fixture
def train(store: Store) -> str:
    return stage_ids(store, store.create_sweep(example_sweep(grid={"alpha": 0})))[0]


def run(bench: Platform, stage_id: str, **changes: object) -> None:
    carry_out(
        stage_id,
        settings=bench.settings.model_copy(update=changes),
        worker="worker",
        command=(sys.executable, str(FAKE_STAGE)),
    )


def log_of(bench: Platform, stage_id: str, number: int) -> Path:
    stage = bench.store.stage(stage_id)
    return bench.settings.runs_dir / (stage.run_id or stage_id) / "logs" / f"{stage.kind}-{number}.log"


def test_a_child_that_ends_well_has_succeeded(bench: Platform, train: str) -> None:
    run(bench, train)
    record = bench.store.stage(train)
    assert (record.state, record.attempt, record.worker, record.problem) == (State.SUCCEEDED, 1, "worker", None)
    assert [entry[:2] for entry in bench.begun()] == [(train, 1)]
    assert log_of(bench, train, 1).read_text() == "attempt 1\n"


def test_a_stage_that_may_not_begin_starts_no_child(bench: Platform, train: str) -> None:
    begin(bench.store, train)
    run(bench, train)
    assert bench.begun() == []


def test_a_shared_stage_logs_under_its_own_name(bench: Platform) -> None:
    sweep = bench.store.create_sweep(example_sweep(distillation={"level": "word+sequence"}))
    decode = stage_ids(bench.store, sweep)[0]
    run(bench, decode)
    assert bench.store.stage(decode).state == State.SUCCEEDED
    assert (bench.settings.runs_dir / decode / "logs" / "decode-1.log").read_text() == "attempt 1\n"


def test_the_problem_a_child_reports_is_kept(bench: Platform, train: str) -> None:
    bench.behave({"*": "fail"})
    run(bench, train)
    record = bench.store.stage(train)
    assert (record.state, record.attempt) == (State.FAILED, 1)
    assert record.problem.model_dump() == {
        "reason": "invalid_dataset",
        "what": "row 7 has no response",
        "fix": "Add one.",
    }
    (run_record,) = bench.store.runs(record.sweep_id).items
    assert [stage.state for stage in run_record.stages] == [State.FAILED, State.SKIPPED]


@pytest.mark.parametrize(
    ("behaviour", "status", "word"), [("crash", 1, "something broke"), ("garbage", 4, "attempt 1")]
)
def test_a_child_without_a_problem_is_quoted(
    bench: Platform, train: str, behaviour: str, status: int, word: str
) -> None:
    bench.behave({"*": behaviour})
    run(bench, train)
    record = bench.store.stage(train)
    assert (record.state, record.problem.reason) == (State.FAILED, "stage_process")
    assert f"the train process of run {record.run_id} ended with exit code {status}" in record.problem.what
    assert word in record.problem.what
    assert str(log_of(bench, train, 1)) in record.problem.fix


def test_a_child_that_stopped_for_a_cancel_is_cancelled(bench: Platform, train: str) -> None:
    bench.behave({"*": "give up"})
    run(bench, train)
    assert bench.store.stage(train).state == State.CANCELLED


def test_a_killed_child_is_retried_and_then_failed(bench: Platform, train: str) -> None:
    bench.behave({"1": "die", "*": "abort"})
    run(bench, train, max_attempts=2)
    assert (bench.store.stage(train).state, bench.store.stage(train).problem) == (State.QUEUED, None)
    run(bench, train, max_attempts=2)
    record = bench.store.stage(train)
    assert (record.state, record.attempt, record.problem.reason) == (State.FAILED, 2, "process_killed")
    assert "was killed by SIGABRT in attempt 2; 2 losses fail a stage; its last words:" in record.problem.what
    assert "Fatal Python error: Aborted" in record.problem.what
    run(bench, train, max_attempts=2)
    assert len(bench.begun()) == 2


def test_a_kill_hints_at_memory(bench: Platform, train: str) -> None:
    bench.behave({"*": "die"})
    run(bench, train, max_attempts=1)
    problem = bench.store.stage(train).problem
    assert "was killed by SIGKILL" in problem.what
    assert "memory ran out" in problem.fix


@pytest.mark.parametrize("behaviour", ["wait", "stubborn"])
def test_a_cancelled_stage_is_stopped(
    bench: Platform, train: str, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "STOP_GRACE_SECONDS", 0.3)
    bench.behave({"*": behaviour})

    def cancel() -> None:
        wait_for(bench.begun)
        bench.store.request_cancel(bench.store.stage(train).sweep_id)

    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(cancel)
        run(bench, train)
        cancelling.result()
    assert bench.store.sweep(bench.store.stage(train).sweep_id).state == State.CANCELLED
    assert not is_alive(bench.begun()[0][2])


def test_a_superseded_attempt_is_stopped_and_records_nothing(bench: Platform, train: str) -> None:
    bench.behave({"1": "wait"})

    def supersede() -> None:
        wait_for(bench.begun)
        attempt = bench.store.stage(train).attempt
        while bench.store.stage(train).attempt == attempt:
            # A partition in small: another worker is given the stage although this one is alive.
            with bench.store._database.writing() as connection:
                connection.exec_driver_sql("UPDATE attempts SET lease_until = 0")
            if bench.store.reclaim_expired(max_attempts=3):
                begin(bench.store, train)

    with ThreadPoolExecutor(1) as pool:
        superseding = pool.submit(supersede)
        run(bench, train)
        superseding.result()
    record = bench.store.stage(train)
    assert (record.state, record.attempt) == (State.RUNNING, 2)
    assert not is_alive(bench.begun()[0][2])


def test_the_lease_is_kept_while_the_child_works(bench: Platform, train: str) -> None:
    bench.behave({"*": "wait"})
    leases = []

    def watch() -> None:
        wait_for(bench.begun)
        while len(leases) < 5:
            with bench.store._database.reading() as connection:
                lease = connection.exec_driver_sql("SELECT lease_until FROM attempts").scalar()
            if lease not in leases:
                leases.append(lease)
                assert bench.store.reclaim_expired(max_attempts=3) == []
        bench.let_go()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        run(bench, train, lease_seconds=1.0)
        watching.result()
    gaps = [later - earlier for earlier, later in pairwise(leases)]
    assert min(gaps) > 0.2  # a quarter of the lease, less the clock's grain
    assert bench.store.stage(train).state == State.SUCCEEDED


def test_an_outage_of_the_database_does_not_stop_the_work(
    bench: Platform, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.behave({"*": "wait"})
    down = threading.Event()
    failures = []

    def flaky(method: str) -> None:
        original = getattr(Store, method)

        def call(self: Store, *args: object, **options: object) -> object:
            if down.is_set():
                failures.append(method)
                if method == "end_attempt":
                    down.clear()
                raise StoreUnavailableError("the database does not answer")
            return original(self, *args, **options)

        monkeypatch.setattr(Store, method, call)

    flaky("heartbeat")
    flaky("end_attempt")

    def fail_twice() -> None:
        wait_for(bench.begun)
        down.set()
        wait_for(lambda: len(failures) >= 2)
        bench.let_go()

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(fail_twice)
        run(bench, train, lease_seconds=4.0)
        failing.result()
    assert failures[-1] == "end_attempt"
    assert bench.store.stage(train).state == State.SUCCEEDED


def test_sigterm_hands_the_stage_back(bench: Platform, train: str) -> None:
    bench.behave({"*": "wait"})

    def interrupt() -> None:
        wait_for(bench.begun)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        interrupting = pool.submit(interrupt)
        run(bench, train, max_attempts=1)
        interrupting.result()
    assert (bench.store.stage(train).state, bench.store.stage(train).problem) == (State.QUEUED, None)
    assert not is_alive(bench.begun()[0][2])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_log_that_cannot_be_written_loses_the_attempt(bench: Platform, train: str) -> None:
    bench.settings.runs_dir.write_text("a file where a folder should be")
    run(bench, train, max_attempts=1)
    record = bench.store.stage(train)
    assert (record.state, record.problem.reason) == (State.FAILED, "worker")
    assert "could not be started" in record.problem.what
