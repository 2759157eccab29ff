"""Say of every score who judged."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("scores", sa.Column("judged_by", sa.Text()))


def downgrade() -> None:
    op.drop_column("scores", "judged_by")
