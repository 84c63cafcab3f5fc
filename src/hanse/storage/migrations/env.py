"""What Alembic runs for each of its commands: on the connection, and in the transaction, of who gave the command."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
