"""What alembic runs: the migrations in the transaction that ``Database.upgrade`` opened."""

from alembic import context

from horizonplan.api.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
