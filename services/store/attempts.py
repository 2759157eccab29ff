"""Attempts: who may work on a stage, until when, and what follows from how it ended.

A write of an attempt locks its stage and checks, in the same transaction, that the attempt is still the
stage's newest and the stage is running. That alone makes the effects of work that ran twice happen once.
"""

from typing import Any

from sqlalchemy import Connection, Row, Select, and_, insert, select, update

from services.contract.errors import StaleAttemptError
from services.contract.records import Problem
from services.contract.states import State
from services.store import schema
from services.store.stages import Attempt, derive_run_states, end_stage, lock_stage, lock_sweep_of, requeue_stage, waits


def begin_attempt(connection: Connection, stage_id: str, *, worker: str, lease_seconds: float) -> Attempt | None:
    stage = lock_stage(connection, stage_id, with_sweep=True)
    if stage.state != State.QUEUED or connection.execute(select(waits(stage_id))).scalar_one():
        return None
    number = stage.attempt + 1
    connection.execute(
        insert(schema.attempts).values(
            stage_id=stage_id,
            number=number,
            worker=worker,
            started_at=schema.now(),
            heartbeat_at=schema.now(),
            lease_until=schema.now() + lease_seconds,
        )
    )
    connection.execute(
        update(schema.stages)
        .where(schema.stages.c.id == stage_id)
        .values(state=State.RUNNING, attempt=number, problem=None)
    )
    derive_run_states(connection, sweep_id=stage.sweep_id, stage_id=stage_id)
    return Attempt(stage_id=stage_id, number=number)


def check_current(connection: Connection, attempt: Attempt) -> Row[Any]:
    """Locks the attempt's stage until the transaction ends and returns it; StaleAttemptError when superseded."""
    stage = lock_stage(connection, attempt.stage_id)
    if stage.attempt != attempt.number or stage.state != State.RUNNING:
        newest = f"attempt {stage.attempt}" if stage.attempt != attempt.number else "the attempt"
        raise StaleAttemptError(
            f"attempt {attempt.number} of stage {attempt.stage_id} is over: {newest} is {stage.state}",
            fix="Stop this process; what it has not yet written is done elsewhere or no longer wanted.",
            details={"stage_id": attempt.stage_id, "attempt": str(attempt.number), "newest": str(stage.attempt)},
        )
    return stage


def heartbeat(connection: Connection, attempt: Attempt, *, lease_seconds: float) -> bool:
    stage = check_current(connection, attempt)
    connection.execute(
        update(schema.attempts)
        .where(_is_attempt(attempt))
        .values(heartbeat_at=schema.now(), lease_until=schema.now() + lease_seconds)
    )
    query = select(schema.sweeps.c.cancel_requested).where(schema.sweeps.c.id == stage.sweep_id)
    return bool(connection.execute(query).scalar_one())


def set_progress(connection: Connection, attempt: Attempt, fraction: float) -> None:
    check_current(connection, attempt)
    connection.execute(
        update(schema.stages)
        .where(schema.stages.c.id == attempt.stage_id)
        .values(progress=min(max(fraction, 0.0), 1.0))
    )


def end_attempt(connection: Connection, attempt: Attempt, state: State, *, problem: Problem | None) -> None:
    assert state in (State.SUCCEEDED, State.FAILED, State.CANCELLED), f"an attempt cannot end {state}"
    lock_sweep_of(connection, attempt.stage_id)
    stage = check_current(connection, attempt)
    _close_attempt(connection, attempt, outcome=state, problem=problem)
    end_stage(connection, stage, state, problem=problem)


def lose_attempt(connection: Connection, attempt: Attempt, *, max_attempts: int, problem: Problem) -> State:
    """Ends an attempt whose worker or process died: queued again, or failed with ``problem`` after ``max_attempts``."""
    lock_sweep_of(connection, attempt.stage_id)
    stage = check_current(connection, attempt)
    return _lose(connection, stage, max_attempts=max_attempts, problem=problem)


def release_attempt(connection: Connection, attempt: Attempt) -> State:
    """Hands the stage back unharmed: queued again without counting as lost, or cancelled where that was asked for."""
    lock_sweep_of(connection, attempt.stage_id)
    stage = check_current(connection, attempt)
    _close_attempt(connection, attempt, outcome="released", problem=None)
    return requeue_stage(connection, stage)


def select_expired() -> Select[Any]:
    """Ids of stages whose newest attempt's lease has run out, and their sweeps'."""
    return (
        select(schema.stages.c.id, schema.stages.c.sweep_id)
        .join(
            schema.attempts,
            and_(schema.attempts.c.stage_id == schema.stages.c.id, schema.attempts.c.number == schema.stages.c.attempt),
        )
        .where(schema.stages.c.state == State.RUNNING, schema.attempts.c.lease_until < schema.now())
    )


def reclaim(connection: Connection, stage_id: str, *, max_attempts: int) -> bool:
    """Takes a stage from a worker that fell silent; False when it has been heard of meanwhile."""
    stage = lock_stage(connection, stage_id, with_sweep=True)
    if connection.execute(select_expired().where(schema.stages.c.id == stage_id)).first() is None:
        return False
    worker, heartbeat_at, now = connection.execute(
        select(schema.attempts.c.worker, schema.attempts.c.heartbeat_at, schema.now()).where(
            schema.attempts.c.stage_id == stage_id, schema.attempts.c.number == stage.attempt
        )
    ).one()
    problem = Problem(
        reason="worker_lost",
        what=(
            f"worker {worker} was last heard of {now - heartbeat_at:.0f} s before attempt {stage.attempt} "
            f"of stage {stage_id} was given up ({stage.losses + 1} of {max_attempts} attempts lost)"
        ),
        fix=(
            "See whether that machine ran out of memory or went down; the attempt's log is "
            f"{log_path(stage_id, run_id=stage.run_id, kind=stage.kind, number=stage.attempt)} in its data directory."
        ),
    )
    _lose(connection, stage, max_attempts=max_attempts, problem=problem)
    return True


def log_path(stage_id: str, *, run_id: str | None, kind: str, number: int) -> str:
    """Where an attempt's output goes, relative to the data directory."""
    return f"runs/{run_id or stage_id}/logs/{kind}-{number}.log"


def _lose(connection: Connection, stage: Row[Any], *, max_attempts: int, problem: Problem) -> State:
    attempt = Attempt(stage_id=stage.id, number=stage.attempt)
    _close_attempt(connection, attempt, outcome="lost", problem=problem)
    losses = stage.losses + 1
    connection.execute(update(schema.stages).where(schema.stages.c.id == stage.id).values(losses=losses))
    if losses >= max_attempts:
        end_stage(connection, stage, State.FAILED, problem=problem)
        return State.FAILED
    return requeue_stage(connection, stage)


def _close_attempt(connection: Connection, attempt: Attempt, *, outcome: str, problem: Problem | None) -> None:
    connection.execute(
        update(schema.attempts)
        .where(_is_attempt(attempt))
        .values(ended_at=schema.now(), outcome=outcome, problem=problem.model_dump() if problem else None)
    )


def _is_attempt(attempt: Attempt) -> Any:
    return and_(schema.attempts.c.stage_id == attempt.stage_id, schema.attempts.c.number == attempt.number)
