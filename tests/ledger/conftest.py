"""A database for each test: a file, or one on a PostgreSQL server that all tests of a run share."""

import asyncio
import fcntl
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from codex_proxy.clock import SystemClock
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.tables import metadata
from codex_proxy.storage.lock import StoreLock
from tests.ledger.postgres import Server, execute, why_not

_numbers = itertools.count(1)
_MADE = "made"


@dataclass(slots=True, frozen=True)
class Database:
    """Where a ledger is."""

    folder: Path
    url: str
    """Empty for a file in *folder*."""

    @property
    def is_file(self) -> bool:
        """Whether it is one."""
        return not self.url


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The address of a database on the server of this run, by name.

    Whichever process comes first starts it, and the last one ends it.
    """
    reason = why_not()
    if reason:
        pytest.skip(reason)
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    home = place / "postgres"
    home.mkdir(exist_ok=True)
    told = home / "port"
    users = home / "users"
    server: Server | None = None
    with open(home / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            server = Server()
            subprocess.run(["cp", "-a", server.data, home / "new"], check=True, stdin=subprocess.DEVNULL)
            server.start()
            execute(server.url(), f"CREATE DATABASE {_MADE}")
            asyncio.run(_make(server.url(_MADE), home))
            told.write_text(f"{server.port}", encoding="utf-8")
        with open(users, "ab") as file:
            file.write(b".")
    port = told.read_text(encoding="utf-8")
    yield lambda name: f"postgresql://proxy@127.0.0.1:{port}/{name}"
    with open(home / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        users.write_bytes(users.read_bytes()[1:])
    if server is not None:
        # Its process has to be the last: the others say when they have gone.
        pause = threading.Event()
        for _ in range(600):
            if not users.read_bytes():
                break
            pause.wait(0.1)
        server.remove()


@pytest.fixture(scope="session")
def made_url(server_url: Callable[[str], str]) -> str:
    """A database of this process's own that a ledger has made its own."""
    name = f"made_{os.getpid()}"
    execute(server_url("postgres"), f"CREATE DATABASE {name} TEMPLATE {_MADE}")
    return server_url(name)


@pytest.fixture
def postgres(made_url: str, tmp_path: Path) -> Database:
    """A database on the server with nothing in its tables."""
    # Some of them refuse to be emptied.
    execute(
        made_url,
        "SET session_replication_role = replica",
        *[f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables)],
    )
    return Database(tmp_path, made_url)


@pytest.fixture
def empty_postgres(server_url: Callable[[str], str], tmp_path: Path) -> Database:
    """A database on the server with nothing in it."""
    name = f"t{os.getpid()}_{next(_numbers)}"
    execute(server_url("postgres"), f"CREATE DATABASE {name}")
    return Database(tmp_path, server_url(name))


async def _make(url: str, folder: Path) -> None:
    ledger = Ledger(folder, mode="personal", clock=SystemClock(), lock=StoreLock(folder), database_url=url)
    await ledger.start()
    await ledger.aclose()


@pytest.fixture
def postgres_data(server_url: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server's data, to be copied; see `Server`."""
    place = tmp_path_factory.getbasetemp()
    return (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "postgres" / "new"


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """A file that is not there yet."""
    return Database(tmp_path, "")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database:
    """Each of both."""
    made: Database = request.getfixturevalue(request.param)
    return made
