"""A restart that drops nobody: the running process starts the next one and gives it the sockets.

What the two say to each other, over a socket pair, one JSON object in a line:

    new    {"said": "prepared"}       configuration read, everything imported, account files read
    old    {"said": "go"}             takes no newcomers, has written what it knows, writes no more
    new    {"said": "ready"}          serves; newcomers were held by the kernel meanwhile
    old    {"said": "news", ...}      what it learns while it drains, as often as it likes
    (the pair closes when the old one has ended)

Until "ready" the old process can take everything back, because it still has the sockets. What the new
one logs until then goes through the old one, which can so say why nothing came of it.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

from codex_proxy.errors import ProxyError
from codex_proxy.supervisor import for_successor, listening_socket

logger = logging.getLogger(__name__)

# Not one of the settings' names, so that nobody takes it for one.
VARIABLE = "_CODEX_PROXY_HANDOVER"

PREPARE_SECONDS = 60.0
"""How long the new process may take to be prepared; nobody waits for it but the command."""

TAKE_SECONDS = 30.0
"""How long it may then take to serve, with thousands of accounts on a busy machine; newcomers wait for it."""

# Enough for a traceback, or all that is wrong with a configuration.
_LAST_LINES = 20
_MAX_LINE = 500

# Its last words may still be on their way when it has ended.
_LAST_WORDS_SECONDS = 1.0

# As process 1 they end when their only child does, and all of the container with them.
_END_WITH_CHILD = frozenset({
    "tini", "docker-init", "dumb-init", "catatonit", "podman-init", "sh", "dash", "bash", "ash", "busybox",
})  # fmt: skip

# They start another one when their child ends, which then finds the port taken.
_REPLACE_CHILD = frozenset({"supervisord", "runsv", "s6-supervise", "circusd"})

# What an old process may say at a time; its news are a few kilobytes.
_MAX_MESSAGE = 16 * 1024 * 1024

Said = Literal["prepared", "go", "ready", "news"]


class NotRestarted(ProxyError):
    """The process goes on as before; the message says why."""

    status = 409
    code = "not_restarted"

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = tuple(lines)
        """What the new process logged last."""


def obstacle(environ: Mapping[str, str], *, pid: int, parent: str, parent_pid: int) -> str | None:
    """Say why a process with this environment cannot be replaced by a new one, and what to do instead.

    Args:
        pid: The process's own.
        parent: The name of the process that started it.
        parent_pid: Its number.
    """
    # A parent of number 0 is outside: what it runs here is the container's own process all the same.
    if pid == 1 or parent_pid == 0:
        return (
            "the daemon is the container's own process, and everything ends with that: recreate the container instead "
            "(docker compose up -d --force-recreate), or run several behind a load balancer"
        )
    if parent_pid == 1 and parent in _END_WITH_CHILD:
        return (
            f"{parent} runs the daemon and ends everything when it ends: recreate the container instead "
            "(docker compose up -d --force-recreate)"
        )
    if parent in _REPLACE_CHILD:
        return f"{parent} runs the daemon and starts another one when it ends: restart it with {parent}'s own means"
    if environ.get("SYSTEMD_EXEC_PID") == str(pid) and not environ.get("NOTIFY_SOCKET"):
        return (
            "systemd runs the daemon and is not told of a new process: set Type=notify and NotifyAccess=main "
            "in the unit (as in deploy/systemd), or use systemctl restart"
        )
    return None


def obstacle_here(environ: Mapping[str, str]) -> str | None:
    """Say why this process cannot be replaced by a new one."""
    parent_pid = os.getppid()
    parent = ""
    with contextlib.suppress(OSError):
        parent = Path(f"/proc/{parent_pid}/comm").read_text(encoding="utf-8").strip()
    return obstacle(environ, pid=os.getpid(), parent=parent, parent_pid=parent_pid)


def own_command() -> list[str]:
    """Return the command line that this process was started with."""
    # The interpreter by its path: its name alone may lead elsewhere by now.
    return [sys.executable, *sys.orig_argv[1:]]


@dataclasses.dataclass(slots=True, frozen=True)
class Estate:
    """What is handed over."""

    listen: str
    """The setting that the sockets were opened for."""
    is_given: bool
    """The supervisor opened the sockets, so the setting says nothing."""
    data_dir: str
    """Whose control socket it is, as an absolute path."""
    sockets: Sequence[socket.socket]
    control: socket.socket | None


# -- the old process ----------------------------------------------------------------------


class Successor:
    """The new process, as the old one sees it."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: socket.socket, log: int) -> None:
        self._process = process
        self._channel = channel
        self._log = log
        self._lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._part = b""
        self._silent = asyncio.Event()
        """It has ended, or logs where it will log from now on."""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @classmethod
    async def start(cls, command: Sequence[str], environ: Mapping[str, str], estate: Estate) -> "Successor":
        """Start *command* with all of *estate*.

        Raises:
            NotRestarted: If it cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        log, theirs_log = os.pipe()
        stderr = os.dup(2)
        given = [sock.fileno() for sock in estate.sockets]
        control = None if estate.control is None else estate.control.fileno()
        told = {
            "channel": theirs.fileno(),
            "stderr": stderr,
            "listen": estate.listen,
            "is_given": estate.is_given,
            "data_dir": estate.data_dir,
            "sockets": given,
            "control": control,
        }
        passed = [theirs.fileno(), stderr, *given, *([] if control is None else [control])]

        try:
            # Not in a thread, for the few milliseconds it takes: one that is called off meanwhile would leave a
            # process that nobody knows of.
            process = subprocess.Popen(  # noqa: ASYNC220 -- as said
                list(command),
                stdin=subprocess.DEVNULL,
                stderr=theirs_log,
                pass_fds=passed,
                env={**for_successor(environ), VARIABLE: json.dumps(told)},
            )
        except OSError as exc:
            ours.close()
            os.close(log)
            raise NotRestarted(
                f"the new process cannot be started: {exc.strerror or type(exc).__name__}: {command[0]}"
            ) from exc
        finally:
            theirs.close()
            os.close(theirs_log)
            os.close(stderr)
        found = cls(process, ours, log)
        try:
            await found._listen()
        except BaseException:
            # Alone it would take the sockets for its own.
            await found.kill()
            raise
        return found

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def lines(self) -> tuple[str, ...]:
        """What it logged last."""
        return tuple(self._lines)

    async def _listen(self) -> None:
        self._channel.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._channel, limit=_MAX_MESSAGE
        )
        os.set_blocking(self._log, False)
        asyncio.get_running_loop().add_reader(self._log, self._on_log)

    def _on_log(self) -> None:
        """Pass on what it logs, and keep the last of it."""
        try:
            data = os.read(self._log, 65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._log)
            self._silent.set()
        # There may be none, or one that is closed.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        *lines, self._part = (self._part + data).split(b"\n")
        if not data and self._part:
            lines.append(self._part)
        self._lines.extend(line.decode(errors="replace")[:_MAX_LINE] for line in lines if line.strip())
        # What never ends its line is no line.
        self._part = self._part[-65_536:]

    async def wait_for(self, what: Said, seconds: float) -> None:
        """Wait until it says *what*.

        Raises:
            NotRestarted: If it ends instead, or does not say it in time.
        """
        assert self._reader is not None
        try:
            async with asyncio.timeout(seconds):
                said = _read(await self._reader.readline()).get("said")
        except TimeoutError:
            raise NotRestarted(
                f"the new process did not get {'prepared' if what == 'prepared' else 'to serve'} "
                f"within {seconds:g} s",
                self.lines,
            ) from None
        except (OSError, ValueError):
            said = None
        if said == what:
            return
        code = await self._ended()
        raise NotRestarted(f"the new process ended with {code} before it served", self.lines)

    async def _ended(self) -> str:
        """Wait for its end, and what it had to say; not for long, because it may only have stopped talking."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                while self._process.poll() is None:  # noqa: ASYNC110 -- nobody tells of a child that is not the loop's
                    await asyncio.sleep(0.01)
                await self._silent.wait()
        return _code(self._process.poll())

    def go(self) -> None:
        """Tell it that everything is its own now."""
        self._say("go")

    async def tell(self, news: Mapping[str, Any]) -> None:
        """Tell it what was learned since it has taken over."""
        assert self._writer is not None
        if self._writer.is_closing():
            return
        self._say("news", **news)
        # It may have ended, or be another one's predecessor by now.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self._writer.drain()

    def _say(self, what: Said, **more: Any) -> None:
        assert self._writer is not None
        self._writer.write(_line(what, **more))

    async def kill(self) -> None:
        """End it, and wait until it has ended: two must not serve."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.to_thread(self._process.wait)
        await self.let_go()
        (self._writer or self._channel).close()

    async def let_go(self) -> None:
        """Leave its log to itself; the channel stays open, because its end tells it of ours."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self._silent.wait()
        asyncio.get_running_loop().remove_reader(self._log)
        os.close(self._log)


def _code(code: int | None) -> str:
    if code is None:
        return "a closed connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


# -- the new process ----------------------------------------------------------------------


class Predecessor:
    """The old process, as the new one sees it: what it leaves, and when."""

    def __init__(self, estate: Estate, channel: socket.socket, stderr: int) -> None:
        self.estate = estate
        self._channel = channel
        self._stderr = stderr
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def wait_for_go(self) -> None:
        """Say that everything is prepared, and wait until it is ours."""
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._channel, limit=_MAX_MESSAGE
        )
        self._say("prepared")
        said = None
        with contextlib.suppress(OSError, ValueError):
            said = _read(await self._reader.readline()).get("said")
        if said != "go":
            # It was killed. Its sockets are ours all the same, and nobody else has them.
            logger.warning(
                "the process before this one ended without handing over; what it knew last may be lost"
            )

    def ready(self) -> None:
        """Say that we serve, and log for ourselves from now on."""
        self._say("ready")
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.dup2(self._stderr, 2)
            os.close(self._stderr)

    async def news(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what it learns while it drains, until it has ended."""
        assert self._reader is not None
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                yield _read(line)
        if self._writer is not None:
            self._writer.close()

    def _say(self, what: Said) -> None:
        assert self._writer is not None
        self._writer.write(_line(what))


def predecessor(environ: MutableMapping[str, str]) -> Predecessor | None:
    """Return who hands over to this process, if anybody does; *environ* says so no more.

    Raises:
        ProxyError: If what it says is not so.
    """
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    try:
        told: dict[str, Any] = json.loads(text)
        channel = socket.socket(fileno=told["channel"])
        estate = Estate(
            listen=told["listen"],
            is_given=told["is_given"],
            data_dir=told["data_dir"],
            sockets=[listening_socket(number) for number in told["sockets"]],
            control=None if told["control"] is None else listening_socket(told["control"]),
        )
        stderr = int(told["stderr"])
        os.set_inheritable(stderr, False)
    except (ValueError, KeyError, TypeError, OSError) as exc:
        raise ProxyError(f"{VARIABLE} is for the daemon's own use; unset it") from exc
    channel.set_inheritable(False)
    channel.setblocking(False)
    return Predecessor(estate, channel, stderr)


def _line(said: Said, **more: Any) -> bytes:
    return json.dumps({"said": said, **more}).encode() + b"\n"


def _read(line: bytes) -> dict[str, Any]:
    message = json.loads(line) if line else None
    return message if isinstance(message, dict) else {}
