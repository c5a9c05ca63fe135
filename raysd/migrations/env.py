"""What Alembic executes: the migrations, on the connection and in the transaction that `raysd.database` opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
