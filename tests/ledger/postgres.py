"""A PostgreSQL server of the tests' own: on loopback, as an ordinary user, in a folder that goes with it."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql*/bin",
)
_SECONDS = 60


@cache
def programs() -> Path | None:
    """Return where the server's programs are; None where there are none."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    places = [path for place in _PLACES for path in Path("/").glob(place.lstrip("/"))]
    return max((path for path in places if (path / "initdb").exists()), default=None)


def why_not() -> str:
    """Return why there can be no server here; empty when there can."""
    if programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and not _ordinary_user():
        return "PostgreSQL does not run as root, and there is no user nobody"
    try:
        import asyncpg  # noqa: F401 -- only whether it is there
    except ImportError:
        return "asyncpg is not installed"
    return ""


def _ordinary_user() -> str | None:
    for name in ("nobody", "postgres"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


class Server:
    """One server.

    Args:
        like: Another one's folder of data, which is copied: that is faster than making one.
    """

    def __init__(self, like: Path | None = None) -> None:
        self._user = _ordinary_user() if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="codex-proxy-pg-"))
        self.data = self._home / "data"
        if self._user is not None:
            shutil.chown(self._home, self._user)
        if like is None:
            # Nothing of it is worth anything before it runs.
            self._run(
                "initdb",
                "-D",
                self.data,
                "-U",
                "proxy",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            )
        else:
            subprocess.run(
                ["cp", "-a", like, self.data], check=True, timeout=_SECONDS, stdin=subprocess.DEVNULL
            )
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]

    def start(self) -> None:
        """Start it, with what is committed on disk."""
        options = (
            f"-p {self.port} -k {self._home} -c listen_addresses=127.0.0.1 -c fsync=on -c max_connections=60 "
            "-c shared_buffers=32MB -c logging_collector=off"
        )
        self._run("pg_ctl", "-D", self.data, "-w", "-l", self._home / "log", "-o", options, "start")

    def stop(self) -> None:
        """Stop it; who is connected is cut."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def _pids(self) -> list[int]:
        first = int((self.data / "postmaster.pid").read_text(encoding="utf-8").split("\n")[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text(encoding="utf-8")
        return [first, *map(int, children.split())]

    def freeze(self) -> None:
        """Have it do nothing, and not even tell."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on."""
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)

    def remove(self) -> None:
        """Stop it, and leave nothing."""
        with contextlib.suppress(OSError, ValueError):
            self.thaw()
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            # On a machine that has too much to do.
            with contextlib.suppress(OSError, ValueError):
                for pid in self._pids():
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._home, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        """Return the address of a database."""
        return f"postgresql://proxy@127.0.0.1:{self.port}/{database}"

    def _run(self, program: str, *arguments: object) -> None:
        where = programs()
        assert where is not None
        options: dict[str, Any] = {}
        if self._user is not None:
            options = {"user": self._user, "extra_groups": []}
        subprocess.run(
            [where / program, *map(str, arguments)], check=True, timeout=_SECONDS, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options,
        )  # fmt: skip


def execute(url: str, *statements: str) -> list[Any]:
    """Run *statements*, and return what the last one gives; from where there is no loop."""
    import asyncpg

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url, timeout=20)
        try:
            found: list[Any] = []
            for statement in statements:
                found = await connection.fetch(statement)
            return found
        finally:
            await connection.close()

    return asyncio.run(run())


@contextlib.contextmanager
def running(like: Path | None = None) -> Iterator[Server]:
    """A server, for as long as it takes."""
    server = Server(like)
    try:
        server.start()
        yield server
    finally:
        server.remove()
