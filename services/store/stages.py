"""The stages of runs: how they are read, and how one's end decides what becomes of the rest.

Every change of a stage's state locks its sweep first, so that the changes of one sweep take turns, and ends
by deriving the states of the runs it touched.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, Select, and_, bindparam, select, update

from services.contract.errors import NotFoundError
from services.contract.records import Problem, StageRecord
from services.contract.states import StageKind, State, combined_state
from services.store import schema


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a stage. ``number`` is its fencing number: a higher one makes every write of this one stale."""

    stage_id: str
    number: int


def select_stages() -> Select[Any]:
    """Stages joined to their newest attempt, for ``stage_record``."""
    newest = and_(schema.attempts.c.stage_id == schema.stages.c.id, schema.attempts.c.number == schema.stages.c.attempt)
    return select(schema.stages, schema.attempts.c.worker, schema.attempts.c.started_at).outerjoin(
        schema.attempts, newest
    )


def stage_record(row: RowMapping) -> StageRecord:
    return StageRecord(
        id=row["id"],
        sweep_id=row["sweep_id"],
        run_id=row["run_id"],
        kind=StageKind(row["kind"]),
        state=State(row["state"]),
        attempt=row["attempt"],
        worker=row["worker"],
        problem=Problem.model_validate(row["problem"]) if row["problem"] else None,
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def read_stage(connection: Connection, stage_id: str) -> StageRecord:
    row = connection.execute(select_stages().where(schema.stages.c.id == stage_id)).mappings().first()
    if row is None:
        raise no_stage(stage_id)
    return stage_record(row)


def read_inputs(connection: Connection, stage_id: str) -> list[StageRecord]:
    query = (
        select_stages()
        .join(schema.stage_needs, schema.stage_needs.c.needs_id == schema.stages.c.id)
        .where(schema.stage_needs.c.stage_id == stage_id)
        .order_by(schema.stages.c.position)
    )
    return [stage_record(row) for row in connection.execute(query).mappings()]


def read_ready(connection: Connection, *, after: str | None = None) -> list[StageRecord]:
    """Queued stages whose inputs have all succeeded; in a sweep, the evaluation of one run before the next training."""
    query = (
        select_stages()
        .where(schema.stages.c.state == State.QUEUED, ~waits())
        .order_by(schema.stages.c.sweep_id, schema.stages.c.position)
    )
    if after is not None:
        needing = select(schema.stage_needs.c.stage_id).where(schema.stage_needs.c.needs_id == after)
        query = query.where(schema.stages.c.id.in_(needing))
    return [stage_record(row) for row in connection.execute(query).mappings()]


def cancel_sweep(connection: Connection, sweep_id: str) -> None:
    """Marks the sweep, and cancels what has not begun; what runs learns of it by its heartbeat."""
    if not _lock_sweep(connection, sweep_id):
        raise no_sweep(sweep_id)
    connection.execute(update(schema.sweeps).where(schema.sweeps.c.id == sweep_id).values(cancel_requested=True))
    connection.execute(
        update(schema.stages)
        .where(schema.stages.c.sweep_id == sweep_id, schema.stages.c.state == State.QUEUED)
        .values(state=State.CANCELLED, ended_at=schema.now())
    )
    derive_run_states(connection, sweep_id=sweep_id)


def end_stage(connection: Connection, stage: Row[Any], state: State, *, problem: Problem | None) -> None:
    """Ends the stage and, unless it succeeded, skips everything queued that needs it."""
    kept = problem.model_dump() if problem else None
    connection.execute(
        update(schema.stages)
        .where(schema.stages.c.id == stage.id)
        .values(state=state, problem=kept, ended_at=schema.now())
    )
    if state != State.SUCCEEDED:
        needs = schema.stage_needs
        below = select(needs.c.stage_id).where(needs.c.needs_id == stage.id).cte("below", recursive=True)
        below = below.union(select(needs.c.stage_id).join(below, needs.c.needs_id == below.c.stage_id))
        connection.execute(
            update(schema.stages)
            .where(schema.stages.c.id.in_(select(below.c.stage_id)), schema.stages.c.state == State.QUEUED)
            .values(state=State.SKIPPED, ended_at=schema.now())
        )
    derive_run_states(connection, sweep_id=stage.sweep_id, stage_id=stage.id)


def requeue_stage(connection: Connection, stage: Row[Any]) -> State:
    query = select(schema.sweeps.c.cancel_requested).where(schema.sweeps.c.id == stage.sweep_id)
    if connection.execute(query).scalar_one():
        end_stage(connection, stage, State.CANCELLED, problem=None)
        return State.CANCELLED
    connection.execute(update(schema.stages).where(schema.stages.c.id == stage.id).values(state=State.QUEUED))
    derive_run_states(connection, sweep_id=stage.sweep_id, stage_id=stage.id)
    return State.QUEUED


def derive_run_states(connection: Connection, *, sweep_id: str, stage_id: str | None = None) -> None:
    """Writes the states of a sweep's runs, or of those that ``stage_id`` belongs to, from their stages."""
    query = (
        select(schema.runs.c.id, schema.runs.c.state, schema.stages.c.state)
        .join(schema.run_stages, schema.run_stages.c.run_id == schema.runs.c.id)
        .join(schema.stages, schema.stages.c.id == schema.run_stages.c.stage_id)
        .where(schema.runs.c.sweep_id == sweep_id)
    )
    if stage_id is not None:
        touched = select(schema.run_stages.c.run_id).where(schema.run_stages.c.stage_id == stage_id)
        query = query.where(schema.runs.c.id.in_(touched))
    before: dict[str, str] = {}
    parts: dict[str, list[State]] = defaultdict(list)
    for run_id, run_state, stage_state in connection.execute(query):
        before[run_id] = run_state
        parts[run_id].append(State(stage_state))
    changed = [
        {"of_run": run_id, "to": state}
        for run_id, states in parts.items()
        if (state := combined_state(states)) != before[run_id]
    ]
    if changed:
        statement = update(schema.runs).where(schema.runs.c.id == bindparam("of_run")).values(state=bindparam("to"))
        connection.execute(statement, changed)


def lock_stage(connection: Connection, stage_id: str, *, with_sweep: bool = False) -> Row[Any]:
    if with_sweep:
        lock_sweep_of(connection, stage_id)
    stage = connection.execute(select(schema.stages).where(schema.stages.c.id == stage_id).with_for_update()).first()
    if stage is None:
        raise no_stage(stage_id)
    return stage


def lock_sweep_of(connection: Connection, stage_id: str) -> None:
    sweep_id = connection.execute(select(schema.stages.c.sweep_id).where(schema.stages.c.id == stage_id)).scalar()
    if sweep_id is not None:
        _lock_sweep(connection, sweep_id)


def waits(stage_id: str | None = None) -> Any:
    """Whether a stage (by default, each of an enclosing query) needs one that has not succeeded."""
    needed = schema.stages.alias("needed")
    return (
        select(needed.c.id)
        .join(schema.stage_needs, schema.stage_needs.c.needs_id == needed.c.id)
        .where(schema.stage_needs.c.stage_id == (stage_id or schema.stages.c.id), needed.c.state != State.SUCCEEDED)
        .exists()
    )


def _lock_sweep(connection: Connection, sweep_id: str) -> bool:
    query = select(schema.sweeps.c.id).where(schema.sweeps.c.id == sweep_id).with_for_update()
    return connection.execute(query).first() is not None


def no_stage(stage_id: str) -> NotFoundError:
    return NotFoundError(
        f"there is no stage {stage_id}", fix="Take stage ids from a run: smoothkd sweep show SWEEP_ID."
    )


def no_sweep(sweep_id: str) -> NotFoundError:
    return NotFoundError(f"there is no sweep {sweep_id}", fix="List the sweeps there are: smoothkd sweep list.")
