"""A new database and one that was led there have the same shape; a foreign one is left alone."""

from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect

from codex_proxy.records.tables import SCHEMA
from codex_proxy.storage.engine import writer_engine
from codex_proxy.storage.migrating import ForeignSchema, Schema, bring_up, check, migrate, revision_of


def shape(connection: Connection) -> dict[str, Any]:
    looked = inspect(connection)
    found: dict[str, Any] = {}
    for table in sorted(looked.get_table_names()):
        found[table] = {
            "columns": [
                (column["name"], str(column["type"]), column["nullable"], column.get("primary_key"))
                for column in looked.get_columns(table)
            ],
            "indexes": sorted(
                (
                    str(index["name"]),
                    tuple(index["column_names"]),
                    str(index.get("dialect_options", {}).get("sqlite_where")),
                )
                for index in looked.get_indexes(table)
            ),
            "foreign": looked.get_foreign_keys(table),
            "key": looked.get_pk_constraint(table)["constrained_columns"],
        }
    return found


def test_both_ways_to_the_last_shape_are_equal(tmp_path: Path) -> None:
    made, led = writer_engine(tmp_path / "a.db", "NORMAL"), writer_engine(tmp_path / "b.db", "NORMAL")
    with made.begin() as connection:
        bring_up(connection, SCHEMA)
        bring_up(connection, SCHEMA)
        one = shape(connection)
        assert revision_of(connection) == SCHEMA.revisions[-1]
        assert compare_metadata(MigrationContext.configure(connection), SCHEMA.metadata) == []
    with led.begin() as connection:
        migrate(connection, SCHEMA.migrations)
        other = shape(connection)
        assert revision_of(connection) == SCHEMA.revisions[-1]
    assert one == other
    assert set(one) == {"turns", "captures", "alembic_version"}
    made.dispose()
    led.dispose()


def test_the_written_down_history_is_that_of_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(SCHEMA.migrations))
    script = ScriptDirectory.from_config(config)
    assert len(script.get_heads()) == 1
    assert tuple(one.revision for one in reversed(list(script.walk_revisions()))) == SCHEMA.revisions


STEP = """
from alembic import op
import sqlalchemy as sa
revision, down_revision, branch_labels, depends_on = {this!r}, {before!r}, None, None
def upgrade():
    {work}
"""


@pytest.fixture
def schema(tmp_path: Path) -> Schema:
    """A history of three steps."""
    folder = tmp_path / "100% migrations"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(
        (SCHEMA.migrations / "env.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    steps = [
        ("1", None, "op.create_table('t', sa.Column('a', sa.Integer))"),
        ("2", "1", "op.add_column('t', sa.Column('b', sa.Integer))"),
        ("3", "2", "op.add_column('t', sa.Column('c', sa.Integer)); 1 / DIVISOR"),
    ]
    for this, before, work in steps:
        text = "DIVISOR = 1\n" + STEP.format(this=this, before=before, work=work)
        (folder / "versions" / f"{this}_step.py").write_text(text, encoding="utf-8")
    return Schema("x", MetaData(), folder, ("1", "2", "3"))


def test_an_older_one_is_led_to_the_last_shape_and_keeps_what_is_in_it(
    tmp_path: Path, schema: Schema
) -> None:
    engine = writer_engine(tmp_path / "x.db", "NORMAL")
    with engine.begin() as connection:
        migrate(connection, schema.migrations, "1")
        connection.exec_driver_sql("INSERT INTO t VALUES (7)")
    with engine.begin() as connection:
        bring_up(connection, schema)
        assert revision_of(connection) == "3"
        assert connection.exec_driver_sql("SELECT * FROM t").all() == [(7, None, None)]
    engine.dispose()


def test_a_step_that_fails_leaves_the_database_as_it_was(tmp_path: Path, schema: Schema) -> None:
    step = schema.migrations / "versions" / "3_step.py"
    step.write_text(step.read_text(encoding="utf-8").replace("DIVISOR = 1", "DIVISOR = 0"), encoding="utf-8")
    engine = writer_engine(tmp_path / "x.db", "NORMAL")
    with engine.begin() as connection:
        migrate(connection, schema.migrations, "1")
    with pytest.raises(ZeroDivisionError), engine.begin() as connection:
        bring_up(connection, schema)
    with engine.begin() as connection:
        assert revision_of(connection) == "1"
        assert [column["name"] for column in inspect(connection).get_columns("t")] == ["a"]
    engine.dispose()


@pytest.mark.parametrize(
    "statements",
    [
        [
            "CREATE TABLE alembic_version (version_num VARCHAR(32))",
            "INSERT INTO alembic_version VALUES ('9999')",
        ],
        ["CREATE TABLE alembic_version (version_num VARCHAR(32))"],
        ["CREATE TABLE something (a)"],
    ],
)
def test_one_that_is_not_ours_is_refused(tmp_path: Path, statements: list[str]) -> None:
    engine = writer_engine(tmp_path / "x.db", "NORMAL")
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
        before = shape(connection)
    with pytest.raises(ForeignSchema), engine.begin() as connection:
        bring_up(connection, SCHEMA)
    with engine.begin() as connection:
        assert shape(connection) == before
    engine.dispose()


def test_a_reader_takes_any_shape_that_is_known() -> None:
    check(SCHEMA.revisions[0], SCHEMA)
    with pytest.raises(ForeignSchema, match="'9999'"):
        check("9999", SCHEMA)
