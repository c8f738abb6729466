"""One step each; see `ledger.tables.REVISIONS`."""
