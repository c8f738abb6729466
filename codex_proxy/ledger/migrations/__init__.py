"""How the ledger's database came to its shape; Alembic runs these."""
