"""Sweeps and runs: how they come to be with all their stages, and how they are read."""

import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, func, insert, select

from services.contract.errors import ConflictError, NotFoundError
from services.contract.records import RunPage, RunRecord, StageRecord, SweepPage, SweepRecord
from services.contract.spec import RunSpec, SweepSpec, content_key, expand
from services.contract.states import ENDED, StageKind, State, combined_state
from services.store import schema
from services.store.pages import check_limit, decode_cursor, encode_cursor
from services.store.stages import no_sweep, select_stages, stage_record

CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"
"""Base-32 digits in ASCII order without look-alikes, so that ids sort as the numbers they spell."""


def insert_sweep(connection: Connection, spec: SweepSpec, *, idempotency_key: str | None) -> str:
    """Writes a sweep with its runs and stages; returns its id. See ``find_by_idempotency_key`` for the key."""
    sweep_id = new_sweep_id()
    connection.execute(
        insert(schema.sweeps).values(
            id=sweep_id,
            name=spec.name,
            spec=spec.model_dump(mode="json"),
            spec_key=_spec_key(spec),
            idempotency_key=idempotency_key,
            cancel_requested=False,
            created_at=schema.now(),
        )
    )
    rows = _plan(sweep_id, expand(spec))
    for table in (schema.runs, schema.stages, schema.run_stages, schema.stage_needs):
        if rows[table.name]:
            connection.execute(insert(table), rows[table.name])
    return sweep_id


def find_by_idempotency_key(connection: Connection, idempotency_key: str, spec: SweepSpec) -> str | None:
    """The id of the sweep that was created with this key; ConflictError when that was another specification."""
    row = connection.execute(
        select(schema.sweeps.c.id, schema.sweeps.c.spec_key).where(schema.sweeps.c.idempotency_key == idempotency_key)
    ).first()
    if row is None:
        return None
    if row.spec_key != _spec_key(spec):
        raise ConflictError(
            f"the idempotency key {idempotency_key!r} already made sweep {row.id}, of another specification",
            fix="Send a new key with a new specification.",
            details={"sweep_id": row.id},
        )
    return str(row.id)


def new_sweep_id() -> str:
    """A random id whose first 11 digits are the time in microseconds: newer sweeps sort later."""
    return f"sw-{_base32(time.time_ns() // 1000, 11)}{_base32(secrets.randbits(30), 6)}"


def read_sweep(connection: Connection, sweep_id: str) -> SweepRecord:
    row = connection.execute(select(schema.sweeps).where(schema.sweeps.c.id == sweep_id)).mappings().first()
    if row is None:
        raise no_sweep(sweep_id)
    return _sweep_records(connection, [row])[0]


def read_sweeps(connection: Connection, *, limit: int, cursor: str | None) -> SweepPage:
    """Newest first."""
    check_limit(limit)
    query = select(schema.sweeps).order_by(schema.sweeps.c.id.desc()).limit(limit + 1)
    if cursor is not None:
        (before,) = decode_cursor(cursor, str)
        query = query.where(schema.sweeps.c.id < before)
    rows = connection.execute(query).mappings().all()
    more = encode_cursor(rows[limit - 1]["id"]) if len(rows) > limit else None
    return SweepPage(items=_sweep_records(connection, rows[:limit]), next_cursor=more)


def read_run(connection: Connection, run_id: str) -> RunRecord:
    records = _run_records(connection, _select_runs().where(schema.runs.c.id == run_id))
    if not records:
        raise no_run(run_id)
    return records[0]


def read_runs(connection: Connection, sweep_id: str, *, limit: int, cursor: str | None) -> RunPage:
    """In the order of ``expand``."""
    check_limit(limit)
    after = decode_cursor(cursor, int)[0] if cursor is not None else -1
    if connection.execute(select(schema.sweeps.c.id).where(schema.sweeps.c.id == sweep_id)).first() is None:
        raise no_sweep(sweep_id)
    positions = (
        select(schema.runs.c.position)
        .where(schema.runs.c.sweep_id == sweep_id, schema.runs.c.position > after)
        .order_by(schema.runs.c.position)
        .limit(limit + 1)
    )
    found = connection.execute(positions).scalars().all()
    if not found:
        return RunPage(items=[])
    shown = found[:limit]
    query = _select_runs().where(
        schema.runs.c.sweep_id == sweep_id, schema.runs.c.position.between(shown[0], shown[-1])
    )
    more = encode_cursor(shown[-1]) if len(found) > limit else None
    return RunPage(items=_run_records(connection, query), next_cursor=more)


def no_run(run_id: str) -> NotFoundError:
    return NotFoundError(f"there is no run {run_id}", fix="List a sweep's runs: smoothkd sweep show SWEEP_ID.")


def _plan(sweep_id: str, runs: list[RunSpec]) -> dict[str, list[dict[str, Any]]]:
    """The rows of all tables for the runs of a new sweep. Stages that runs share come first."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("runs", "stages", "run_stages", "stage_needs")}

    def add_stage(stage_id: str, *, run_id: str | None, kind: StageKind, key: str) -> str:
        rows["stages"].append(
            {
                "id": stage_id,
                "sweep_id": sweep_id,
                "run_id": run_id,
                "position": len(rows["stages"]),
                "kind": kind,
                "key": key,
                "state": State.QUEUED,
                "attempt": 0,
                "losses": 0,
                "progress": 0.0,
            }
        )
        return stage_id

    finetunes = {
        key: add_stage(f"{sweep_id}-{key[:8]}-finetune", run_id=None, kind=StageKind.FINETUNE_TEACHER, key=key)
        for key in dict.fromkeys(run.finetune_key for run in runs)
        if key is not None
    }
    decodes = {
        key: add_stage(f"{sweep_id}-{key[:8]}-decode", run_id=None, kind=StageKind.DECODE, key=key)
        for key in dict.fromkeys(run.decode_key for run in runs)
        if key is not None
    }
    keys = [run.key for run in runs]
    # A decode's need of the fine-tuning is one, however many runs share both.
    needs: dict[tuple[str, str], None] = {}
    for position, (run, key, short) in enumerate(zip(runs, keys, _shortened(keys), strict=True)):
        run_id = f"{sweep_id}-{short}"
        rows["runs"].append(
            {
                "id": run_id,
                "sweep_id": sweep_id,
                "position": position,
                "spec": run.model_dump(mode="json"),
                "state": State.QUEUED,
            }
        )
        chain = [finetunes[run.finetune_key]] if run.finetune_key is not None else []
        if run.decode_key is not None:
            chain.append(decodes[run.decode_key])
        chain.append(add_stage(f"{run_id}-train", run_id=run_id, kind=StageKind.TRAIN, key=key))
        if run.evaluation.benchmarks:
            chain.append(add_stage(f"{run_id}-evaluate", run_id=run_id, kind=StageKind.EVALUATE, key=key))
        rows["run_stages"] += [{"run_id": run_id, "stage_id": stage_id} for stage_id in chain]
        needs.update(dict.fromkeys(itertools.pairwise(chain)))
    rows["stage_needs"] = [{"stage_id": later, "needs_id": earlier} for earlier, later in needs]
    return rows


def _shortened(keys: list[str]) -> list[str]:
    """The first 8 digits of every key, or all 16 should two of a sweep begin alike."""
    short = [key[:8] for key in keys]
    return short if len(set(short)) == len(keys) else keys


def _spec_key(spec: SweepSpec) -> str:
    return content_key(spec.model_dump(mode="json"))


def _base32(number: int, digits: int) -> str:
    return "".join(CROCKFORD[number >> (5 * place) & 31] for place in reversed(range(digits)))


def _sweep_records(connection: Connection, rows: Sequence[RowMapping]) -> list[SweepRecord]:
    counts: dict[str, dict[State, int]] = defaultdict(dict)
    query = (
        select(schema.runs.c.sweep_id, schema.runs.c.state, func.count())
        .where(schema.runs.c.sweep_id.in_([row["id"] for row in rows]))
        .group_by(schema.runs.c.sweep_id, schema.runs.c.state)
    )
    for sweep_id, state, count in connection.execute(query):
        counts[sweep_id][State(state)] = count
    return [
        SweepRecord(
            id=row["id"],
            name=row["name"],
            spec=SweepSpec.model_validate(row["spec"]),
            state=combined_state(counts[row["id"]]),
            cancel_requested=row["cancel_requested"],
            created_at=row["created_at"],
            runs=counts[row["id"]],
        )
        for row in rows
    ]


def _select_runs() -> Select[Any]:
    return select(schema.runs, schema.sweeps.c.cancel_requested).join(schema.sweeps).order_by(schema.runs.c.position)


def _run_records(connection: Connection, query: Select[Any]) -> list[RunRecord]:
    """The runs that ``query`` selects, with their stages: two queries, however many the runs."""
    rows = connection.execute(query).mappings().all()
    wanted = query.with_only_columns(schema.runs.c.id).order_by(None).scalar_subquery()
    stages: dict[str, list[StageRecord]] = defaultdict(list)
    progress: dict[str, list[float]] = defaultdict(list)
    with_runs = (
        select_stages()
        .add_columns(schema.run_stages.c.run_id.label("of_run"))
        .join(schema.run_stages, schema.run_stages.c.stage_id == schema.stages.c.id)
        .where(schema.run_stages.c.run_id.in_(wanted))
        .order_by(schema.stages.c.position)
    )
    for row in connection.execute(with_runs).mappings():
        record = stage_record(row)
        stages[row["of_run"]].append(record)
        progress[row["of_run"]].append(1.0 if record.state in ENDED else row["progress"])
    return [
        RunRecord(
            id=row["id"],
            sweep_id=row["sweep_id"],
            method=(spec := RunSpec.model_validate(row["spec"])).method,
            spec=spec,
            state=State(row["state"]),
            cancel_requested=row["cancel_requested"] and row["state"] not in ENDED - {State.CANCELLED},
            stages=stages[row["id"]],
            progress=sum(progress[row["id"]]) / len(progress[row["id"]]),
            problem=next((stage.problem for stage in stages[row["id"]] if stage.problem), None),
        )
        for row in rows
    ]
