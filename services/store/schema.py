"""The tables of the store. Migrations in ``migrations/versions`` create them; a test holds the two together.

    sweeps ──< runs ──< run_stages >── stages ──< attempts
                │                        └──< stage_needs >── stages
                └──< metrics, generations, scores, artifacts, annotations

Times are seconds since 1970 by the database's clock, so that a lease means the same to workers whose own
clocks differ.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("spec_key", String(16), nullable=False),
    Column("idempotency_key", String(255), unique=True),
    Column("cancel_requested", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(60), primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("spec", JSON, nullable=False),
    # Derived from the run's stages and written in the transaction that changes them: listing a page of
    # sweeps then counts runs in an index instead of visiting every stage.
    Column("state", String(16), nullable=False),
    Index("ix_runs_sweep_id_position", "sweep_id", "position", unique=True),
    Index("ix_runs_sweep_id_state", "sweep_id", "state"),
)

stages = Table(
    "stages",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("sweep_id", ForeignKey("sweeps.id"), nullable=False),
    Column("run_id", ForeignKey("runs.id")),
    Column("position", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("key", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    # The fencing number: that of the newest attempt. Only the attempt that bears it may write.
    Column("attempt", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("progress", Double, nullable=False),
    Column("problem", JSON(none_as_null=True)),
    Column("ended_at", Double),
    Index("ix_stages_sweep_id_position", "sweep_id", "position", unique=True),
    Index("ix_stages_state_sweep_id_position", "state", "sweep_id", "position"),
)

stage_needs = Table(
    "stage_needs",
    metadata,
    Column("stage_id", ForeignKey("stages.id"), primary_key=True),
    Column("needs_id", ForeignKey("stages.id"), primary_key=True),
    Index("ix_stage_needs_needs_id", "needs_id"),
)

run_stages = Table(
    "run_stages",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("stage_id", ForeignKey("stages.id"), primary_key=True),
    Index("ix_run_stages_stage_id", "stage_id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("stage_id", ForeignKey("stages.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("worker", String(255), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("heartbeat_at", Double, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("ended_at", Double),
    # A State once it ended, "lost" when its worker fell silent or its process was killed, "released" when
    # its worker handed the stage back; empty while it runs.
    Column("outcome", String(16)),
    Column("problem", JSON(none_as_null=True)),
)

metrics = Table(
    "metrics",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("name", String(100), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("value", Double, nullable=False),
)

generations = Table(
    "generations",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("benchmark", String(100), primary_key=True),
    Column("item_id", Text, primary_key=True),
    Column("source", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("output", Text, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("spans", JSON, nullable=False),
)

scores = Table(
    "scores",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("benchmark", String(100), primary_key=True),
    Column("metric", String(100), primary_key=True),
    Column("value", Double),
    Column("missing", Text),
    Column("items", Integer, nullable=False),
    Column("higher_is_better", Boolean, nullable=False),
    Column("judged_by", Text),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("path", Text, nullable=False),
)

annotations = Table(
    "annotations",
    metadata,
    Column("run_id", ForeignKey("runs.id"), primary_key=True),
    Column("benchmark", String(100), primary_key=True),
    Column("item_id", Text, primary_key=True),
    Column("annotator", String(100), primary_key=True),
    Column("spans", JSON, nullable=False),
    Column("written_at", Double, nullable=False),
)

# One row. Every write that a viewer would care about adds 1, last in its transaction, so that who reads the
# counter before the data never misses a change and writers hold the row only while they commit.
changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("counter", BigInteger, nullable=False),
)


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock in seconds since 1970."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(_element: now, _compiler: Any, **_options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(_element: now, _compiler: Any, **_options: Any) -> str:
    return "EXTRACT(EPOCH FROM clock_timestamp())::double precision"
