"""How the database of records came to its shape; Alembic runs these."""
