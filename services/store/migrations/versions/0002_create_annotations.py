"""Create the table of people's annotations."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "annotations",
        sa.Column("run_id", sa.String(60), nullable=False),
        sa.Column("benchmark", sa.String(100), nullable=False),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("annotator", sa.String(100), nullable=False),
        sa.Column("spans", sa.JSON(), nullable=False),
        sa.Column("written_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "benchmark", "item_id", "annotator", name="pk_annotations"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_annotations_run_id"),
    )


def downgrade() -> None:
    op.drop_table("annotations")
