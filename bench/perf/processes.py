"""The programs of the bench: built, started on their core, watched through /proc, and ended whatever happens."""

import contextlib
import hashlib
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_proxy.protocol.wire import JsonObject

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.01


class Broken(Exception):
    """A part of the bench did not do what it must; what was measured says nothing."""


# --- programs in Go


def build(name: str) -> Path | None:
    """Build the Go program *name*, unless this source is built already; None where there is no Go.

    Raises:
        Broken: If there is Go, but it cannot build.
    """
    go = shutil.which("go")
    if go is None:
        return None
    sources = sorted((HERE / name).glob("*.go"))
    version = subprocess.run(
        [go, "version"], capture_output=True, check=True, stdin=subprocess.DEVNULL
    ).stdout
    digest = hashlib.sha256(version + b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    binary = base / "codex-proxy-bench" / f"{name}-{digest}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        fresh = binary.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [go, "build", "-trimpath", "-o", str(fresh), *map(str, sources)],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
            env={**os.environ, "GOTOOLCHAIN": "local", "GOFLAGS": "", "CGO_ENABLED": "0"},
        )  # fmt: skip
        if done.returncode:
            raise Broken(f"go cannot build {name}:\n{done.stderr}")
        fresh.replace(binary)
    return binary


# --- cores


@dataclass(slots=True, frozen=True)
class Cores:
    """Who runs where; empty where there is only one core, or no way to choose."""

    proxy: frozenset[int]
    mock: frozenset[int]
    load: frozenset[int]

    @classmethod
    def choose(cls) -> "Cores":
        """Give the last core to the proxy; the mock and the load generator share one only where they must."""
        found = sorted(os.sched_getaffinity(0))
        if len(found) < 2:
            return cls(frozenset(), frozenset(), frozenset())
        return cls(frozenset(found[-1:]), frozenset(found[:1]), frozenset(found[-2:-1]))


@contextlib.contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """Be on *cores* for a moment: a child starts where its parent is, and Go counts cores as it starts."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- processes


_ALL: set["Process"] = set()


def stop_all() -> None:
    """End whatever still runs: a signal may have come before anybody else knew of it."""
    for process in list(_ALL):
        process.stop()


class Process:
    """A program that runs until it is stopped."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        cores: frozenset[int],
        log: Path,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as sink, _on(cores):
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, cwd=cwd,
                env={**_environ(), **(environ or {})}, start_new_session=True,
            )  # fmt: skip
        _ALL.add(self)
        self.patience = 3.0
        """How long it may take to end by itself."""
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def say(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()

    def read_line(self, *, patience: float = PATIENCE_SECONDS) -> str:
        """Wait for a line on its stdout."""
        assert self._popen.stdout is not None
        deadline = time.monotonic() + patience
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._popen.stdout.fileno(), 1 << 20) if ready else b""
            if not piece:
                why = "ended" if ready else "said nothing in time"
                raise Broken(f"{self.name} {why}: {self.said()}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def said(self) -> str:
        """Return the end of what it logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "(it logged nothing)"

    def stop(self) -> None:
        """End it: kindly, then not."""
        if self.is_running:
            with contextlib.suppress(OSError):
                self._popen.terminate()
            try:
                self._popen.wait(self.patience)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    os.killpg(self.pid, 9)
                self._popen.wait()
        # What it started itself goes with it.
        with contextlib.suppress(OSError):
            os.killpg(self.pid, 9)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        _ALL.discard(self)


def _environ() -> dict[str, str]:
    """Return our environment without what would change what is measured."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((
            "CODEX_PROXY_",
            "GOMAXPROCS",
            "GOGC",
            "GODEBUG",
            "PYTHONASYNCIODEBUG",
            "PYTHONDEVMODE",
        ))
        and not name.lower().endswith("_proxy")
    }


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Have *process* for a while; it is gone afterwards."""
    try:
        yield process
    finally:
        process.stop()


def wait_until(condition: Callable[[], Any], what: str, *, patience: float = PATIENCE_SECONDS) -> None:
    """Look again and again until *condition* holds.

    Raises:
        Broken: If it does not in time.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"waited in vain for {what}")
        pause(_POLL_SECONDS)


def pause(seconds: float) -> None:
    """Wait; nothing of ours runs in this process meanwhile."""
    time.sleep(seconds)  # noqa: TID251 -- there is no loop here


def cpu_ns(pid: int) -> int:
    """Return the processor time of a process, all its threads, in nanoseconds.

    Raises:
        OSError: If it has ended.
    """
    # The clock of a process, as clock_getcpuclockid makes its number.
    return time.clock_gettime_ns(~pid << 3 | 2)


def memory_kb(pid: int) -> int:
    """Return how much memory only this process has, in KB.

    Raises:
        Broken: If it has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError as exc:
        raise Broken("the process has ended") from exc
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") // 1024


# --- the kit


@dataclass(slots=True, frozen=True)
class Kit:
    """How the mock and the load generator are started: built from Go, or the slow ones in Python."""

    command: tuple[str, ...]
    is_slow: bool

    @classmethod
    def make(cls) -> "Kit":
        """Build it, or take the fallback."""
        binary = build("kit")
        if binary is None:
            return cls((sys.executable, "-m", "bench.perf.fallback"), is_slow=True)
        return cls((str(binary),), is_slow=False)


class Mock:
    """The mock backend, running."""

    def __init__(self, kit: Kit, cores: Cores, folder: Path, plan: JsonObject) -> None:
        file = folder / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        self.process = Process(
            "mock",
            [*kit.command, "mock", "-plan", str(file)],
            cores=cores.mock,
            log=folder / "mock.log",
            cwd=ROOT,
        )
        try:
            self.port = int(self.process.read_line())
        except BaseException:
            self.process.stop()
            raise

    def statistics(self) -> dict[str, int]:
        """Return what it has seen so far."""
        raw = fetch(self.port, b"GET /_mock HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return dict(json.loads(raw))


class Load:
    """One run of the load generator."""

    def __init__(self, kit: Kit, cores: Cores, folder: Path, job: JsonObject) -> None:
        self._process = Process(
            "load", [*kit.command, "load"], cores=cores.load, log=folder / "load.log", cwd=ROOT
        )
        self._process.say(json.dumps(job))

    def read(self, *, patience: float = PATIENCE_SECONDS) -> JsonObject:
        """Return the next thing it reports."""
        return dict(json.loads(self._process.read_line(patience=patience)))

    def say(self, line: str) -> None:
        """Tell it how to go on."""
        self._process.say(line)

    def stop(self) -> None:
        """End it."""
        self._process.stop()


def fetch(port: int, request: bytes) -> bytes:
    """Send one request over a connection of its own and return the body of the answer.

    Raises:
        Broken: If the answer is not a 200.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as sock:
        sock.sendall(request)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        raw = answer.read()
        if answer.status != 200:
            raise Broken(f"status {answer.status}: {raw[:500].decode(errors='replace')}")
        return raw
