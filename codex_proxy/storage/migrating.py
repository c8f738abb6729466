"""A database's shape: which one it has, and the way to ours.

What is new is made at once in its last shape; what is older is led there by Alembic, step by step, in one
transaction. A test holds both ways equal.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, MetaData, inspect, text

from codex_proxy.storage.engine import Synchronous


@dataclass(slots=True, frozen=True)
class Schema:
    """What a store needs to know of its database."""

    name: str
    """Of the file, without its ending."""
    metadata: MetaData
    """The tables in their last shape."""
    migrations: Path
    """Alembic's folder."""
    revisions: tuple[str, ...]
    """All shapes there have been, the first one first; written down so that Alembic is needed only for a change."""
    synchronous: Synchronous = "NORMAL"


class ForeignSchema(Exception):
    """The database has a shape that we do not know: a later version of ours made it, or somebody else."""


def revision_of(connection: Connection) -> str | None:
    """Return which shape a database has; None for an empty one.

    Raises:
        ForeignSchema: If it has tables, and does not say.
    """
    tables = inspect(connection).get_table_names()
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        if len(found) == 1:
            return str(found[0])
    if tables:
        raise ForeignSchema("it does not say what it is")
    return None


def bring_up(connection: Connection, schema: Schema) -> None:
    """Give a database its last shape.

    Raises:
        ForeignSchema: If it has one that we do not know.
    """
    revision = revision_of(connection)
    if revision == schema.revisions[-1]:
        return
    if revision is None:
        schema.metadata.create_all(connection, checkfirst=False)
        connection.execute(
            text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        )
        connection.execute(
            text("INSERT INTO alembic_version (version_num) VALUES (:revision)"),
            {"revision": schema.revisions[-1]},
        )
        return
    check(revision, schema)
    migrate(connection, schema.migrations)


def check(revision: str, schema: Schema) -> None:
    """Raise unless we know *revision*.

    Raises:
        ForeignSchema: If we do not.
    """
    if revision not in schema.revisions:
        raise ForeignSchema(
            f"it has the shape {revision[:40]!r}, and this version knows {schema.revisions[-1]!r}"
        )


def migrate(connection: Connection, folder: Path, revision: str = "head") -> None:
    """Have Alembic lead a database to *revision*, within the transaction that *connection* is in."""
    command = importlib.import_module("alembic.command")
    config = importlib.import_module("alembic.config").Config()
    # A percent sign begins a reference there.
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
