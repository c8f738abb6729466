"""SQLite as we use it: who may write, where it may lie, what is wrong with it."""

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from codex_proxy.storage import engine
from codex_proxy.storage.engine import is_broken, is_whole, network_file_system, reader_engine, writer_engine

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/nas rw - nfs4 nas:/export rw
31 30 254:1 / /mnt/nas/local rw - xfs /dev/vdb rw
32 22 0:41 / /mnt/with\\040space rw shared:9 master:1 - fuse.sshfs me@there:/ rw
33 22 0:42 / /mnt/twice rw - ext4 /dev/vdc rw
34 22 0:43 / /mnt/twice rw - cifs //there/share rw
broken line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/codex-proxy", None),
        ("/mnt/nas", "nfs4"),
        ("/mnt/nas/deeper/still", "nfs4"),
        ("/mnt/nasty", None),
        ("/mnt/nas/local/data", None),
        ("/mnt/with space/data", "fuse.sshfs"),
        ("/mnt/twice", "cifs"),
    ],
)
def test_the_file_system_of_another_machine_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str | None
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS, encoding="utf-8")
    monkeypatch.setattr(engine, "_MOUNTS", mounts)
    assert network_file_system(Path(folder)) == kind


def test_where_nothing_is_told_of_mounts_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_MOUNTS", tmp_path / "nowhere")
    assert network_file_system(tmp_path) is None


def test_settings_of_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "a b%c?d#e.db"
    writer = writer_engine(path, "FULL")
    with writer.begin() as connection:
        settings = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "auto_vacuum")
        }
    writer.dispose()
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "auto_vacuum": 2}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_reader_cannot_write_and_does_not_wait_for_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    writer, reader = writer_engine(path, "NORMAL"), reader_engine(path)
    with writer.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
    with writer.begin() as writing, reader.begin() as reading:
        writing.exec_driver_sql("INSERT INTO t VALUES (1)")
        assert reading.exec_driver_sql("SELECT count(*) FROM t").scalar() == 0
    with pytest.raises(DBAPIError, match="readonly"), reader.begin() as reading:
        reading.exec_driver_sql("INSERT INTO t VALUES (1)")
    writer.dispose()
    reader.dispose()


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    writer = writer_engine(tmp_path / "x.db", "NORMAL")

    def fail() -> None:
        with writer.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE t (a)")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with writer.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar() == 0
    writer.dispose()


def test_what_is_no_database_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"this is no database" * 500)
    reader = reader_engine(path)
    with pytest.raises(DBAPIError) as caught, reader.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM t")
    assert is_broken(caught.value)
    reader.dispose()


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    writer = writer_engine(path, "NORMAL")
    with writer.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (a)")
        connection.exec_driver_sql("INSERT INTO t VALUES (?)", [("x" * 500,) for _ in range(100)])
        assert is_whole(connection)
    writer.dispose()
    with open(path, "r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 4096)
    writer = writer_engine(path, "NORMAL")
    with writer.begin() as connection:
        assert not is_whole(connection)
    writer.dispose()
