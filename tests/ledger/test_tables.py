"""A ledger's database made at once and one that was led there have the same shape; an older one is kept beside it."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect, text

from codex_proxy.ledger.bases import FileBase, NotOpened
from codex_proxy.ledger.tables import SCHEMA, metadata
from codex_proxy.storage.engine import writer_engine
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.migrating import Schema, bring_up, migrate, revision_of
from codex_proxy.storage.postgres import Postgres
from tests.ledger.conftest import Database

Do = Callable[[Callable[[Connection], Any]], Any]


def shape(connection: Connection) -> dict[str, Any]:
    looked = inspect(connection)
    found: dict[str, Any] = {}
    for table in sorted(looked.get_table_names()):
        found[table] = {
            "columns": [
                (column["name"], str(column["type"]), column["nullable"])
                for column in looked.get_columns(table)
            ],
            "indexes": sorted(
                (
                    str(index["name"]),
                    str(index["column_names"]),
                    bool(index["unique"]),
                    sorted((name, str(value)) for name, value in index.get("dialect_options", {}).items()),
                )
                for index in looked.get_indexes(table)
            ),
            "unique": sorted(
                str(sorted(one["column_names"])) for one in looked.get_unique_constraints(table)
            ),
            "checks": sorted(str(one["sqltext"]) for one in looked.get_check_constraints(table)),
            "foreign": sorted(str(one["constrained_columns"]) for one in looked.get_foreign_keys(table)),
            "key": looked.get_pk_constraint(table)["constrained_columns"],
        }
    found["triggers"] = sorted(
        connection.execute(
            text(
                "SELECT name || sql FROM sqlite_master WHERE type = 'trigger'"
                if connection.dialect.name == "sqlite"
                else "SELECT tgname || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
            )
        ).scalars()
    )
    if connection.dialect.name == "sqlite":
        found["rowids"] = sorted(
            str(one) for one in connection.execute(text("SELECT name FROM sqlite_master WHERE sql LIKE '%WITHOUT ROWID%'")).scalars()
        )  # fmt: skip
    return found


def look(lead: Callable[[Connection], None], is_made: bool) -> Callable[[Connection], dict[str, Any]]:
    def work(connection: Connection) -> dict[str, Any]:
        lead(connection)
        assert revision_of(connection) == SCHEMA.revisions[-1]
        if is_made:
            # The comparison does not know of what belongs to one kind of database.
            differences = compare_metadata(MigrationContext.configure(connection), metadata)
            only_on_a_server = [] if connection.dialect.name == "postgresql" else ["holds_by_user"]
            assert [getattr(one[1], "name", one) for one in differences] == only_on_a_server
        return shape(connection)

    return work


def make(connection: Connection) -> None:
    bring_up(connection, SCHEMA)


def lead(connection: Connection) -> None:
    migrate(connection, SCHEMA.migrations)


def test_both_ways_to_the_last_shape_are_equal_in_a_file(tmp_path: Path) -> None:
    found = []
    for number, way in enumerate((make, lead)):
        engine = writer_engine(tmp_path / f"{number}.db", "FULL")
        with engine.begin() as connection:
            found.append(look(way, way is make)(connection))
        engine.dispose()
    assert found[0] == found[1]
    assert set(metadata.tables) < set(found[0])


def _empty(connection: Connection) -> None:
    for statement in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
        connection.execute(text(statement))


async def test_both_ways_to_the_last_shape_are_equal_on_a_server(empty_postgres: Database) -> None:
    found = []
    server = Postgres(empty_postgres.url, connections=1, is_writer=True)
    for way in (make, lead):
        found.append(await server.transaction(look(way, way is make)))
        await server.transaction(_empty)
    await server.aclose()
    assert found[0] == found[1]
    assert set(metadata.tables) < set(found[0])


def test_the_written_down_history_is_that_of_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(SCHEMA.migrations))
    script = ScriptDirectory.from_config(config)
    assert len(script.get_heads()) == 1
    assert tuple(one.revision for one in reversed(list(script.walk_revisions()))) == SCHEMA.revisions


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    """A history of two steps."""
    folder = tmp_path / "migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(
        (SCHEMA.migrations / "env.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    for this, before, work in (("1", None, "create_table('t', sa.Column('a', sa.Integer))"), ("2", "1", "add_column('t', sa.Column('b', sa.Integer))")):  # fmt: skip
        (folder / "versions" / f"{this}.py").write_text(
            f"import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = {this!r}, {before!r}\n"
            f"branch_labels = depends_on = None\ndef upgrade():\n    op.{work}\n",
            encoding="utf-8",
        )
    return Schema("ledger", MetaData(), folder, ("1", "2"), synchronous="FULL")


def test_a_file_is_copied_before_its_shape_is_changed(tmp_path: Path, schema: Schema) -> None:
    engine = writer_engine(tmp_path / "ledger.db", "FULL")
    with engine.begin() as connection:
        migrate(connection, schema.migrations, "1")
        connection.exec_driver_sql("INSERT INTO t VALUES (7)")
    engine.dispose()
    for _ in range(2):
        base = FileBase(tmp_path, StoreLock(tmp_path), schema)
        base.open()
        assert base.transaction(lambda c: c.exec_driver_sql("SELECT * FROM t").all()) == [(7, None)]
        base.give_up()
    kept = tmp_path / "ledger.db.before-2"
    assert kept.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(kept) as copy:
        assert copy.execute("SELECT * FROM t").fetchall() == [(7,)]
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("1",)]
    copy.close()
    assert len(list(tmp_path.glob("ledger.db*"))) == 2


def test_a_file_of_a_later_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as made:
        made.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        made.execute("INSERT INTO alembic_version VALUES ('9999')")
    made.close()
    base = FileBase(tmp_path, StoreLock(tmp_path))
    with pytest.raises(NotOpened, match="'9999'"):
        base.open()
    base.give_up()
    assert StoreLock(tmp_path).acquire("another")


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"something else" * 1_000)
    base = FileBase(tmp_path, StoreLock(tmp_path))
    with pytest.raises(Exception, match=r"ledger\.db: file is not a database"):
        base.open()
    base.give_up()
    assert (tmp_path / "ledger.db").read_bytes().startswith(b"something else")


def test_the_database_itself_keeps_a_balance_from_being_negative(tmp_path: Path) -> None:
    base = FileBase(tmp_path, StoreLock(tmp_path))
    base.open()
    row = "INSERT INTO users VALUES ('u', 'u', 'active', 1, {balance}, {held}, 0, '{{}}', 0)"
    for balance, held in ((-1, 0), (5, 6), (5, -1)):
        with pytest.raises(Exception, match="users_covered"):
            base.transaction(lambda c, b=balance, h=held: c.exec_driver_sql(row.format(balance=b, held=h)))  # type: ignore[misc]
    base.give_up()
