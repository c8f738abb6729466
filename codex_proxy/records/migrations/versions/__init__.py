"""One step each; see `records.tables.REVISIONS`."""
