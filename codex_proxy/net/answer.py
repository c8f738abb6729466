"""What a call that leaves this machine is made of, whichever transport carries it."""

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

# A model list or a usage answer is kilobytes; anything larger is not what we asked for.
MAX_REPLY_SIZE = 32 * 1024 * 1024

READ_SIZE = 64 * 1024
"""What one read takes at most: all of it is held, taken apart and written, several times over,
while a reader stalls."""

MAX_HEAD_SIZE = 64 * 1024
"""What the head of an answer may hold; also, as far as a transport can tell, one line of it."""

LARGE_BODY_SIZE = 1024 * 1024
"""A larger body is sent in pieces: written at once it would hold up every other stream."""


class NetKind(enum.StrEnum):
    """Where on its way a call failed."""

    CONNECT = "connect"
    DNS = "dns"
    PROXY = "proxy"
    TLS = "tls"
    TIMEOUT = "timeout"
    """No byte before the deadline."""
    CUT = "cut"
    """The connection ended after the request may have been sent."""

    @property
    def is_path(self) -> bool:
        """Whether the request never left: the way there is what failed."""
        return self in (NetKind.CONNECT, NetKind.DNS, NetKind.PROXY, NetKind.TLS)


class NetError(Exception):
    """A call that got no answer, or lost it. The message names the host, never the path."""

    def __init__(self, kind: NetKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def not_allowed(host: str, why: str) -> NetError:
    """Return the error of a request to an address that nothing is sent to."""
    return NetError(NetKind.CONNECT, f"{host} is {why}, to which nothing is sent")


def not_reached(kind: NetKind, host: str) -> NetError:
    """Return the error of a request that never left."""
    return NetError(kind, f"{kind.value} failed for {host}")


@dataclass(slots=True, frozen=True)
class Reply:
    """A whole answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True, frozen=True)
class Deadlines:
    """How long each part may take, in seconds; there is no total."""

    connect: float
    first_byte: float
    """Counted from the moment there is a connection."""
    idle: float


class Answer(abc.ABC):
    """An answer whose body is read as it comes."""

    __slots__ = ("head_seconds", "headers", "status")

    status: int
    headers: Mapping[str, str]
    """Names in lower case; of a field that came twice, the last one."""
    head_seconds: float | None
    """How long the head took on a connection that was made for it; None on one that was kept."""

    @abc.abstractmethod
    async def read(self, within: float | None = None) -> bytes:
        """Return what has arrived, 64 KiB at most, waiting for at least a byte; b'' at the end.

        Nothing is lost when it times out: the next call goes on where this one stopped. What has
        arrived already is returned without a deadline, and without giving way to another task.

        Args:
            within: How long to wait; None means the idle deadline.

        Raises:
            NetError: If nothing came in that time, or the connection was lost.
        """

    def read_nowait(self) -> bytes | None:
        """Return what `read` would return at once, b'' at the end; None when it would wait.

        Raises:
            NetError: If the connection was lost.
        """
        return None

    async def read_all(self, limit: int = MAX_REPLY_SIZE) -> bytes:
        """Return the rest of the body.

        Raises:
            NetError: As `read`, and when the body is larger than *limit* bytes.
        """
        parts: list[bytes] = []
        size = 0
        while chunk := await self.read():
            size += len(chunk)
            if size > limit:
                raise NetError(NetKind.CUT, f"the answer is larger than {limit} bytes")
            parts.append(chunk)
        return b"".join(parts)

    @abc.abstractmethod
    def close(self) -> None:
        """Abort: the connection is closed, so the other side stops working."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give the connection back when the body has been read to its end, else close it."""


class Transport(Protocol):
    """One way to make calls."""

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        deadlines: Deadlines,
        proxy: str,
        may_repeat: bool,
        is_guarded: bool,
    ) -> Answer:
        """Send a request and wait for the head of its answer; see `Outbound.open`."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...
