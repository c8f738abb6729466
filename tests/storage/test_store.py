"""The thread that writes: what it does with trouble, with others, and with a sudden end. Turns stand for what is written."""

import contextlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from codex_proxy.protocol.wire import loads
from codex_proxy.records.asking import Filter
from codex_proxy.records.queries import page
from codex_proxy.records.tables import SCHEMA
from codex_proxy.storage import store as module
from codex_proxy.storage.engine import is_whole, writer_engine
from codex_proxy.storage.lock import StoreLock
from codex_proxy.storage.queue import Queue
from codex_proxy.storage.store import NoDatabase, NotKept, Store
from tests.records.making import ids, new_database, store, turn


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        time.sleep(0.002)  # noqa: TID251 -- there is no loop here


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at every few seconds is looked at at once."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)


@pytest.fixture
def queue() -> Queue[Any]:
    return Queue(10_000)


@pytest.fixture
def one(tmp_path: Path, queue: Queue[Any]) -> Iterator[Store[Any]]:
    started = store(tmp_path, queue)
    started.start()
    yield started
    started.stop()


def file(folder: Path) -> Path:
    return folder / "records.db"


def writes(one: Store[Any], count: int) -> None:
    until(lambda: one.statistics().written == count)


def names(found: tuple[list[Any], int | None]) -> list[str]:
    return [request["id"] for request in found[0]]


def listed(one: Store[Any]) -> list[str]:
    return names(one.read(lambda connection: page(connection, Filter(), limit=100)))


def test_what_is_put_in_is_written_in_batches(one: Store[Any], queue: Queue[Any], tmp_path: Path) -> None:
    for number in range(500):
        queue.put(turn(number))
    writes(one, 500)
    assert one.statistics().is_writing
    assert listed(one) == [f"req_{number}" for number in reversed(range(400, 500))]
    assert file(tmp_path).stat().st_mode & 0o777 == 0o600


def test_without_anything_to_write_there_is_no_file(one: Store[Any], tmp_path: Path) -> None:
    time.sleep(0.1)  # noqa: TID251 -- nothing is to happen
    assert not file(tmp_path).exists()
    with pytest.raises(NoDatabase):
        listed(one)
    # In the moment in which it is made it is empty.
    file(tmp_path).touch()
    one.may_write = False
    with pytest.raises(NoDatabase):
        listed(one)


def test_the_end_writes_what_waits(tmp_path: Path, queue: Queue[Any]) -> None:
    one = store(tmp_path, queue)
    one.start()
    for number in range(300):
        queue.put(turn(number))
    one.stop()
    assert len(ids(file(tmp_path))) == 300
    # Closed in order: nothing of it is left beside the file.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.db", "store.lock"]


def test_a_full_disk_costs_records_and_nothing_else(
    one: Store[Any], queue: Queue[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    queue.put(turn(0))
    writes(one, 1)
    assert one._engine is not None
    # SQLite itself finds no room.
    with one._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    for number in range(1, 4):
        for part in range(100):
            queue.put(turn(100 * number + part))
        until(lambda number=number: one.statistics().dropped == 100 * number)  # type: ignore[misc]
    assert "full" in one.statistics().trouble
    with one._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    queue.put(turn(1_000))
    writes(one, 2)
    until(lambda: one.statistics().trouble == "")
    assert listed(one) == ["req_1000", "req_0"]
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2, said
    assert "full" in said[0]
    assert said[1].startswith("writing works again")
    assert "lost=300" in said[1]


def test_a_folder_that_cannot_be_written_is_tried_again(
    tmp_path: Path, queue: Queue[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refuses = writer_engine, [True]

    def engine(*args: Any) -> Any:
        if refuses[0]:
            raise PermissionError(13, "Permission denied")
        return real(*args)

    monkeypatch.setattr(module, "writer_engine", engine)
    one = store(tmp_path, queue)
    one.start()
    queue.put(turn(1))
    until(lambda: one.statistics().trouble == "Permission denied")
    refuses[0] = False
    writes(one, 1)
    one.stop()
    assert len([record for record in caplog.records if "Permission denied" in record.message]) == 1


def test_a_network_file_system_is_refused(
    tmp_path: Path, queue: Queue[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "network_file_system", lambda folder: "nfs4")
    one = store(tmp_path, queue)
    one.start()
    queue.put(turn(1))
    until(lambda: "nfs4" in one.statistics().trouble)
    one.stop()
    assert not file(tmp_path).exists()


@pytest.mark.parametrize("content", [b"this is no database" * 500, b"SQLite format 3\0" + b"\xff" * 8_000])
def test_a_broken_database_is_set_aside(
    one: Store[Any], queue: Queue[Any], tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file(tmp_path).write_bytes(content)
    queue.put(turn(1))
    writes(one, 1)
    assert listed(one) == ["req_1"]
    (kept,) = tmp_path.glob("records.db.broken-*")
    assert kept.read_bytes() == content
    assert [record.levelname for record in caplog.records if kept.name in record.message] == ["ERROR"]


def test_one_that_breaks_while_it_is_in_use_is_set_aside(
    one: Store[Any], queue: Queue[Any], tmp_path: Path
) -> None:
    for number in range(200):
        queue.put(turn(number))
    writes(one, 200)
    with contextlib.closing(sqlite3.connect(file(tmp_path))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = file(tmp_path).stat().st_size
    with open(file(tmp_path), "r+b") as damaged:
        damaged.seek(4096)
        damaged.write(b"\xff" * (size - 4096))
    # A reader is who notices.
    with pytest.raises(NotKept):
        listed(one)
    until(lambda: bool(list(tmp_path.glob("records.db.broken-*"))))
    queue.put(turn(1_000))
    until(lambda: file(tmp_path).exists())
    writes(one, 201)
    assert listed(one) == ["req_1000"]


def test_one_of_a_later_version_is_set_aside(
    one: Store[Any], queue: Queue[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "of-tomorrow"
    engine = new_database(elsewhere)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    # There at one stroke: the store looks again and again.
    elsewhere.replace(file(tmp_path))
    queue.put(turn(1))
    writes(one, 1)
    assert listed(one) == ["req_1"]
    (kept,) = tmp_path.glob("records.db.foreign-*")
    engine = writer_engine(kept, "NORMAL")
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT * FROM alembic_version").scalar() == "9999"
    engine.dispose()
    assert "'9999'" in caplog.text


def test_a_row_that_cannot_be_written_does_not_stop_the_thread(
    one: Store[Any], queue: Queue[Any], caplog: pytest.LogCaptureFixture
) -> None:
    queue.put("no turn at all")
    until(lambda: "writing failed" in caplog.text)
    queue.put(turn(1))
    writes(one, 1)
    assert listed(one) == ["req_1"]
    assert "no turn at all" not in caplog.text
    assert one.statistics().dropped == 1


def test_two_on_one_folder_one_writes_and_the_other_takes_over(tmp_path: Path) -> None:
    queues: list[Queue[Any]] = [Queue(100), Queue(100)]
    first, second = (store(tmp_path, queue) for queue in queues)
    first.start()
    queues[0].put(turn(1))
    writes(first, 1)
    second.start()
    for number in range(2, 5):
        queues[1].put(turn(number))
    time.sleep(0.1)  # noqa: TID251 -- nothing is to happen
    assert (second.statistics().written, second.statistics().is_writing) == (0, False)
    # It can read all the same.
    assert listed(second) == ["req_1"]
    first.stop()
    writes(second, 3)
    assert listed(second) == ["req_4", "req_3", "req_2", "req_1"]
    second.stop()


def test_one_that_must_not_write_does_not(tmp_path: Path, queue: Queue[Any]) -> None:
    one = store(tmp_path, queue)
    one.may_write = False
    one.start()
    queue.put(turn(1))
    time.sleep(0.1)  # noqa: TID251 -- nothing is to happen
    assert not file(tmp_path).exists()
    assert StoreLock(tmp_path).acquire("another")
    one.stop()


def test_the_lock_is_given_back_when_writing_is_forbidden(
    one: Store[Any], queue: Queue[Any], tmp_path: Path
) -> None:
    queue.put(turn(1))
    writes(one, 1)
    another = StoreLock(tmp_path)
    assert not another.acquire("another")
    one.may_write = False
    until(lambda: another.acquire("another"))
    another.release("another")
    one.may_write = True
    queue.put(turn(2))
    writes(one, 2)


# --- a restart


def test_what_comes_after_handing_over_reaches_the_next_process(tmp_path: Path) -> None:
    queues: list[Queue[Any]] = [Queue(10_000), Queue(10_000)]
    old, new = (store(tmp_path, queue) for queue in queues)
    old.start()
    for number in range(50):
        queues[0].put(turn(number))
    old.hand_over()
    # What waited is written, and the lock is free.
    assert old.statistics().written == 50
    new.start()
    for number in range(50, 100):
        queues[0].put(turn(number))
        queues[1].put(turn(1_000 + number))
    # Also while the old one goes on.
    writes(new, 100)
    for number in range(100, 150):
        queues[0].put(turn(number))
    writes(new, 150)
    old.stop()
    until(lambda: not list(tmp_path.glob("*.spool")))
    new.stop()
    expected = {f"req_{number}" for number in (*range(150), *range(1_050, 1_100))}
    found = ids(file(tmp_path))
    assert (len(found), set(found)) == (200, expected)


def test_a_spool_whose_writer_was_killed_is_read_by_the_next_one(tmp_path: Path, queue: Queue[Any]) -> None:
    left = store(tmp_path, queue)
    left.start()
    queue.put(turn(1))
    left.hand_over()
    queue.put(turn(2))
    writes(left, 2)
    (spool,) = tmp_path.glob("records-*.spool")
    # As if the process had ended in the middle of a line.
    with open(spool, "ab") as file_:
        file_.write(b'12345678 {"key": 1')
    left.stop()
    next_one = store(tmp_path, Queue(10))
    next_one.start()
    until(lambda: not spool.exists())
    next_one.stop()
    assert ids(file(tmp_path)) == ["req_1", "req_2"]


def test_a_spool_is_read_twice_without_harm(tmp_path: Path, queue: Queue[Any]) -> None:
    old = store(tmp_path, queue)
    old.start()
    old.hand_over()
    for number in range(20):
        queue.put(turn(number))
    writes(old, 20)
    (spool,) = tmp_path.glob("records-*.spool")
    copy = spool.read_bytes()
    old.stop()
    for _ in range(2):
        spool.write_bytes(copy)
        one = store(tmp_path, Queue(10))
        one.start()
        until(lambda: not spool.exists())
        one.stop()
    assert len(ids(file(tmp_path))) == 20


def test_handing_over_can_be_taken_back(one: Store[Any], queue: Queue[Any], tmp_path: Path) -> None:
    queue.put(turn(1))
    one.hand_over()
    queue.put(turn(2))
    writes(one, 2)
    one.take_back()
    queue.put(turn(3))
    until(lambda: not list(tmp_path.glob("*.spool")) and one.statistics().is_writing)
    until(lambda: listed(one) == ["req_3", "req_2", "req_1"])
    # And once more.
    one.hand_over()
    assert StoreLock(tmp_path).acquire("another")


def test_a_spool_that_cannot_be_made_does_not_take_the_lock_again(
    one: Store[Any], queue: Queue[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    queue.put(turn(1))
    writes(one, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SpoolWriter", refuse)
        one.hand_over()
        another = StoreLock(tmp_path)
        assert another.acquire("another")
        queue.put(turn(2))
        time.sleep(0.1)  # noqa: TID251 -- nothing is to happen
    # Once there is room it goes on.
    writes(one, 2)
    another.release("another")


# --- a sudden end

WRITER = """
import pathlib, sys
from tests.records.making import store, turn
from codex_proxy.storage.queue import Queue
queue = Queue(1_000_000)
one = store(pathlib.Path(sys.argv[1]), queue)
one.start()
number = 0
while True:
    for _ in range(50):
        queue.put(turn(number))
        number += 1
    while len(queue) > 200:
        pass
    print(one.statistics().written, flush=True)
"""


@pytest.mark.parametrize("after", [1, 700])
def test_a_process_that_is_killed_leaves_whole_records(tmp_path: Path, after: int) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root, env=dict(os.environ)
    )
    assert process.stdout is not None
    with process, process.stdout:
        written = 0
        for line in process.stdout:
            written = int(line)
            if written >= after:
                break
        process.send_signal(signal.SIGKILL)
    engine = writer_engine(file(tmp_path), "NORMAL")

    def look(connection: Connection) -> None:
        assert is_whole(connection)
        rows = connection.exec_driver_sql("SELECT id, attempts, story FROM turns ORDER BY key").all()
        # All that was said to be written is there, and nothing is missing in between.
        assert len(rows) >= written
        assert [row[0] for row in rows] == [f"req_{number}" for number in range(len(rows))]
        assert all(len(loads(row[2])[3]) == row[1] for row in rows)

    with engine.begin() as connection:
        look(connection)
    engine.dispose()
    # The next process goes on with it.
    queue: Queue[Any] = Queue(10)
    one = store(tmp_path, queue)
    one.start()
    queue.put(turn(1_000_000))
    writes(one, 1)
    one.stop()
    assert not list(tmp_path.glob("*.broken-*"))


def test_the_file_has_the_name_of_the_schema(tmp_path: Path) -> None:
    assert store(tmp_path).path == tmp_path / f"{SCHEMA.name}.db"
