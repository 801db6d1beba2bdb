"""Run by Alembic for every migration; the connection is handed in by server_core.store.migrate."""

from alembic import context

from server_core.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
