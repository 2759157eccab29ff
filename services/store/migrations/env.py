"""Runs migrations on the connection that the caller passes; ``services.store.database`` is the caller."""

from alembic import context

from services.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
