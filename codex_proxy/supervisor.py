"""What systemd and we tell each other: sockets that it opened, readiness, signs of life.

The protocols are a handful of lines each (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)),
so no library is needed. Without systemd, all of it does nothing.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, MutableMapping

from codex_proxy.errors import ProxyError

logger = logging.getLogger(__name__)

# The first file descriptor that systemd hands over.
_FIRST = 3

# More than anybody has addresses.
_MOST_SOCKETS = 64

# Rare, and lost words of these would have the service taken for dead: the loop may wait as long.
_PATIENCE_SECONDS = 2.0

_SOCKET_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_WATCHDOG_VARIABLES = ("WATCHDOG_PID",)


class Supervisor:
    """Whoever started us and wants to know how we are.

    Args:
        environ: Says where it listens; nothing happens when it does not.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._watch_seconds = _watchdog(environ) if self._address else 0.0

    @property
    def is_there(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    @property
    def sign_of_life_seconds(self) -> float:
        """How often `alive` is to be called; 0 when nobody watches."""
        # Half of what is allowed, as its manual says.
        return self._watch_seconds / 2

    async def alive(self) -> None:
        """Say that the loop still turns."""
        # The next one comes soon.
        self._tell("WATCHDOG=1", patience=0.0)

    def ready(self, status: str) -> None:
        """Say that we serve."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is being read again; `ready` ends that."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """Say that we end."""
        self._tell("STOPPING=1", f"STATUS={status}")

    def succeeded_by(self, pid: int, status: str) -> None:
        """Say that another process is the service from now on."""
        # A sign of life that it gave before counts for nothing, and it gives the next one at its own time.
        self._tell(f"MAINPID={pid}", "READY=1", "WATCHDOG=1", f"STATUS={status}")

    def _tell(self, *lines: str, patience: float | None = None) -> None:
        if not self._address:
            return
        # An @ stands for the zero byte of a name that is in no file system.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as there:
                # Its queue is short, and full for a moment when it is busy.
                there.settimeout(_PATIENCE_SECONDS if patience is None else patience)
                there.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), address)
        except OSError as exc:
            level = logging.WARNING if patience is None else logging.DEBUG
            logger.log(
                level, "supervisor not told what=%s reason=%s", lines[0], exc.strerror or type(exc).__name__
            )


def _watchdog(environ: Mapping[str, str]) -> float:
    """Return within how many seconds a sign of life is expected; 0 for never, or from somebody else."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isascii() and text.isdigit() and len(text) < 16 else 0.0


def take_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that were opened for us, none when none were; *environ* says so no more.

    Raises:
        ProxyError: If what is there is no socket that takes connections.
    """
    theirs = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS", "")
    for name in _SOCKET_VARIABLES:
        environ.pop(name, None)
    pid, text = theirs
    # What a parent of ours forgot to clear away is meant for that parent.
    if (
        pid != str(os.getpid())
        or not (text.isascii() and text.isdigit())
        or not 0 < int(text) <= _MOST_SOCKETS
    ):
        return []
    return [listening_socket(number) for number in range(_FIRST, _FIRST + int(text))]


def listening_socket(number: int) -> socket.socket:
    """Return the socket that file descriptor *number* is; children do not get it.

    Raises:
        ProxyError: If it is none that takes connections.
    """
    try:
        found = socket.socket(fileno=number)
    except OSError as exc:
        raise ProxyError(f"file descriptor {number} was handed over and is no socket") from exc
    found.set_inheritable(False)
    listens = 0
    with contextlib.suppress(OSError):
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if found.type != socket.SOCK_STREAM or not listens:
        found.detach()
        raise ProxyError(
            f"file descriptor {number} was handed over and takes no connections; "
            "a socket unit needs ListenStream= and Accept=no"
        )
    return found


def for_successor(environ: Mapping[str, str]) -> dict[str, str]:
    """Return *environ* without what is meant for this process alone."""
    ours = {*_SOCKET_VARIABLES, *_WATCHDOG_VARIABLES}
    return {name: value for name, value in environ.items() if name not in ours}
