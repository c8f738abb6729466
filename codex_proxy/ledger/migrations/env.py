"""Alembic comes in here: the connection, and the transaction, are the caller's."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"], render_as_batch=True, transactional_ddl=True
)
context.run_migrations()
