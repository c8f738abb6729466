"""Databases in data-dir: one writer thread each, one lock for all, migrations, a spool for who may not write."""
