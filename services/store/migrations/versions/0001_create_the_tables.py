"""Create the tables of services/store/schema.py."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "sweeps",
    "runs",
    "stages",
    "stage_needs",
    "run_stages",
    "attempts",
    "metrics",
    "generations",
    "scores",
    "artifacts",
    "changes",
)


def upgrade() -> None:
    _create_sweeps_and_runs()
    _create_stages()
    _create_results()
    changes = op.create_table(
        "changes",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
    )
    op.bulk_insert(changes, [{"id": 1, "counter": 0}])


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)


def _create_sweeps_and_runs() -> None:
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_key", sa.String(16), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sweeps"),
        sa.UniqueConstraint("idempotency_key", name="uq_sweeps_idempotency_key"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(60), nullable=False),
        sa.Column("sweep_id", sa.String(40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_runs_sweep_id"),
    )
    op.create_index("ix_runs_sweep_id_position", "runs", ["sweep_id", "position"], unique=True)
    op.create_index("ix_runs_sweep_id_state", "runs", ["sweep_id", "state"])


def _create_stages() -> None:
    op.create_table(
        "stages",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("sweep_id", sa.String(40), nullable=False),
        sa.Column("run_id", sa.String(60)),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("key", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("problem", sa.JSON(none_as_null=True)),
        sa.Column("ended_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_stages"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweeps.id"], name="fk_stages_sweep_id"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_stages_run_id"),
    )
    op.create_index("ix_stages_sweep_id_position", "stages", ["sweep_id", "position"], unique=True)
    op.create_index("ix_stages_state_sweep_id_position", "stages", ["state", "sweep_id", "position"])
    op.create_table(
        "stage_needs",
        sa.Column("stage_id", sa.String(80), nullable=False),
        sa.Column("needs_id", sa.String(80), nullable=False),
        sa.PrimaryKeyConstraint("stage_id", "needs_id", name="pk_stage_needs"),
        sa.ForeignKeyConstraint(["stage_id"], ["stages.id"], name="fk_stage_needs_stage_id"),
        sa.ForeignKeyConstraint(["needs_id"], ["stages.id"], name="fk_stage_needs_needs_id"),
    )
    op.create_index("ix_stage_needs_needs_id", "stage_needs", ["needs_id"])
    op.create_table(
        "run_stages",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("stage_id", sa.String(80), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "stage_id", name="pk_run_stages"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_stages_run_id"),
        sa.ForeignKeyConstraint(["stage_id"], ["stages.id"], name="fk_run_stages_stage_id"),
    )
    op.create_index("ix_run_stages_stage_id", "run_stages", ["stage_id"])
    op.create_table(
        "attempts",
        sa.Column("stage_id", sa.String(80), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(255), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("outcome", sa.String(16)),
        sa.Column("problem", sa.JSON(none_as_null=True)),
        sa.PrimaryKeyConstraint("stage_id", "number", name="pk_attempts"),
        sa.ForeignKeyConstraint(["stage_id"], ["stages.id"], name="fk_attempts_stage_id"),
    )


def _create_results() -> None:
    op.create_table(
        "metrics",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name", "step", name="pk_metrics"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_metrics_run_id"),
    )
    op.create_table(
        "generations",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("benchmark", sa.String(100), nullable=False),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("spans", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "benchmark", "item_id", name="pk_generations"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_generations_run_id"),
    )
    op.create_table(
        "scores",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("benchmark", sa.String(100), nullable=False),
        sa.Column("metric", sa.String(100), nullable=False),
        sa.Column("value", sa.Double()),
        sa.Column("missing", sa.Text()),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("higher_is_better", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "benchmark", "metric", name="pk_scores"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_scores_run_id"),
    )
    op.create_table(
        "artifacts",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "name", name="pk_artifacts"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_artifacts_run_id"),
    )
