"""Real workers on a real queue: what they do, and what is left when they, Redis or their processes are killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from services.contract.errors import QueueUnavailableError
from services.contract.settings import Settings
from services.contract.states import State
from services.store.queue import Queue
from student_trainer import worker
from tests.store.examples import example_sweep, stage_ids
from tests.worker.conftest import Platform
from tests.worker.processes import children, is_alive, wait_for


def create(platform: Platform, **changes: object) -> str:
    return platform.store.create_sweep(example_sweep(**changes)).id


def one_training(platform: Platform) -> str:
    """A sweep of one stage; returns the stage's id."""
    sweep_id = create(platform, grid={"alpha": 0}, evaluation={})
    return platform.store.runs(sweep_id).items[0].stages[0].id


def wait_for_end(platform: Platform, sweep_id: str) -> None:
    ended = (State.SUCCEEDED, State.FAILED, State.CANCELLED)
    wait_for(lambda: platform.store.sweep(sweep_id).state in ended)


def job_process(worker_process: "subprocess.Popen[bytes]") -> int:
    (found,) = children(worker_process.pid)
    return found


def test_a_worker_carries_out_a_sweep_in_order(platform: Platform) -> None:
    sweep_id = create(platform, distillation={"level": "word+sequence"})
    platform.start_worker()
    wait_for_end(platform, sweep_id)
    sweep = platform.store.sweep(sweep_id)
    assert sweep.runs == {State.SUCCEEDED: 2}
    decode, train, evaluate = stage_ids(platform.store, sweep)
    _, other_train, other_evaluate = stage_ids(platform.store, sweep, run=1)
    begun = [(stage, number) for stage, number, _ in platform.begun()]
    # A trained student is evaluated before the next one is trained.
    assert begun == [(stage, 1) for stage in (decode, train, evaluate, other_train, other_evaluate)]
    queue = Queue(platform.redis.url)
    assert queue.worker_hosts() == [socket.gethostname()]
    assert queue.waiting() == set()
    queue.close()


def test_two_workers_carry_out_each_stage_once(platform: Platform) -> None:
    sweep_id = create(platform, grid={"alpha": 0.1, "seed": list(range(6))})
    platform.start_worker()
    platform.start_worker()
    wait_for_end(platform, sweep_id)
    assert platform.store.sweep(sweep_id).runs == {State.SUCCEEDED: 6}
    begun = [stage for stage, _, _ in platform.begun()]
    assert len(begun) == len(set(begun)) == 12


def test_the_worker_stays_free_of_torch(settings: Settings) -> None:
    code = (
        "import sys, student_trainer.worker; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.parametrize("victim", ["worker", "job process", "stage process", "worker and job process"])
def test_a_kill_costs_one_attempt_and_leaves_no_orphan(platform: Platform, victim: str) -> None:
    platform.behave({"1": "wait"})
    stage_id = one_training(platform)
    first = platform.start_worker()
    wait_for(platform.begun)
    job, stage = job_process(first), platform.begun()[0][2]
    assert children(job) == [stage]
    killed = {"worker": [first.pid], "job process": [job], "stage process": [stage]}.get(victim, [first.pid, job])
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(stage))
    if victim != "stage process":
        wait_for(lambda: not is_alive(job))
    if "worker" in victim:
        first.wait()
        platform.start_worker()
    wait_for(lambda: platform.store.stage(stage_id).state == State.SUCCEEDED)
    assert [(number, is_alive(pid)) for _, number, pid in platform.begun()] == [(1, False), (2, False)]
    assert platform.store.stage(stage_id).attempt == 2


def test_workers_that_die_again_and_again_fail_the_stage(platform: Platform) -> None:
    platform.behave({"*": "wait"})
    stage_id = one_training(platform)
    for number in range(1, platform.settings.max_attempts + 1):
        running = platform.start_worker()
        wait_for(lambda number=number: len(platform.begun()) == number)
        running.kill()
        running.wait()
    wait_for(lambda: platform.store.stage(stage_id).state == State.FAILED)
    record = platform.store.stage(stage_id)
    assert record.problem.reason == "worker_lost"
    assert len(platform.begun()) == platform.settings.max_attempts


def test_sigterm_stops_the_worker_and_hands_the_stage_back(platform: Platform) -> None:
    platform.behave({"1": "wait"})
    stage_id = one_training(platform)
    first = platform.start_worker()
    wait_for(platform.begun)
    started = time.monotonic()
    first.terminate()
    assert first.wait(30) == 0
    assert time.monotonic() - started < 10
    record = platform.store.stage(stage_id)
    assert (record.state, record.attempt) == (State.QUEUED, 1)
    assert not is_alive(platform.begun()[0][2])
    platform.start_worker()
    wait_for(lambda: platform.store.stage(stage_id).state == State.SUCCEEDED)
    assert platform.store.stage(stage_id).attempt == 2


def test_sigterm_ends_an_idle_worker_at_once(platform: Platform) -> None:
    idle = platform.start_worker()
    queue = Queue(platform.redis.url)
    wait_for(queue.worker_hosts)
    idle.terminate()
    assert idle.wait(30) == 0
    assert queue.worker_hosts() == []
    queue.close()


def test_sigterm_is_heeded_while_redis_is_away(platform: Platform) -> None:
    platform.behave({"*": "wait"})
    stage_id = one_training(platform)
    busy = platform.start_worker()
    wait_for(platform.begun)
    idle = platform.start_worker()
    queue = Queue(platform.redis.url)
    wait_for(lambda: len(queue.worker_hosts()) == 2)
    queue.close()
    platform.redis.kill()
    idle.terminate()
    assert idle.wait(10) == 0
    busy.terminate()
    wait_for(lambda: platform.store.stage(stage_id).state == State.QUEUED, seconds=10)
    assert not is_alive(platform.begun()[0][2])
    # The job process now tries to tell RQ; it ends with its worker all the same.
    job = job_process(busy)
    busy.kill()
    busy.wait()
    wait_for(lambda: not is_alive(job))
    assert platform.store.stage(stage_id).state == State.QUEUED


def test_a_cancelled_sweep_stops_within_seconds(platform: Platform) -> None:
    platform.behave({"*": "wait"})
    sweep_id = create(platform)
    platform.start_worker()
    wait_for(platform.begun)
    platform.store.request_cancel(sweep_id)
    wait_for(lambda: platform.store.sweep(sweep_id).state == State.CANCELLED, seconds=10)
    assert len(platform.begun()) == 1
    assert not is_alive(platform.begun()[0][2])


@pytest.mark.parametrize("wiped", [False, True])
def test_work_goes_on_when_redis_is_killed_and_restarted(platform: Platform, wiped: bool) -> None:
    platform.behave({"*": "wait"})
    sweep_id = create(platform)
    running = platform.start_worker()
    wait_for(platform.begun)
    platform.redis.kill()
    platform.let_go()
    train = platform.begun()[0][0]
    # The outcome is recorded while Redis is away: the store is the truth.
    wait_for(lambda: platform.store.stage(train).state == State.SUCCEEDED)
    platform.redis.start()
    if wiped:
        platform.redis.wipe()
    wait_for_end(platform, sweep_id)
    assert platform.store.sweep(sweep_id).runs == {State.SUCCEEDED: 2}
    begun = [(stage, number) for stage, number, _ in platform.begun()]
    assert len(begun) == len({stage for stage, _ in begun}) == 4
    assert {number for _, number in begun} == {1}
    assert running.poll() is None


@pytest.mark.slow
def test_an_outage_of_15_seconds_costs_nothing(platform: Platform) -> None:
    """As long as RQ's own worker would not survive."""
    platform.behave({"*": "wait"})
    sweep_id = create(platform)
    running = platform.start_worker()
    wait_for(platform.begun)
    platform.redis.kill()
    until = time.monotonic() + 15
    wait_for(lambda: time.monotonic() > until or running.poll() is not None)
    platform.redis.start()
    platform.let_go()
    wait_for_end(platform, sweep_id)
    assert platform.store.sweep(sweep_id).runs == {State.SUCCEEDED: 2}
    assert [number for _, number, _ in platform.begun()] == [1, 1, 1, 1]
    assert running.poll() is None


def test_an_idle_worker_is_found_again_after_redis_was_wiped(platform: Platform) -> None:
    idle = platform.start_worker()
    queue = Queue(platform.redis.url)
    wait_for(queue.worker_hosts)
    platform.redis.wipe()
    assert queue.worker_hosts() == []
    wait_for(queue.worker_hosts)
    queue.close()
    stage_id = one_training(platform)
    wait_for(lambda: platform.store.stage(stage_id).state == State.SUCCEEDED)
    assert idle.poll() is None


def test_a_worker_without_a_queue_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "START_SECONDS", 0.0)
    with pytest.raises(QueueUnavailableError, match=r"the queue at unix:///.*valkey\.sock does not answer"):
        worker.run_worker(settings)
