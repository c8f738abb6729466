"""One client for everything that leaves this machine.

No redirects (a token never follows one), no cookies, no environment proxies, no total
deadline. A proxy that cannot be used is an error; nothing falls back to a direct connection.
"""

import asyncio
import enum
import io
import ssl
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import yarl
from aiohttp_socks import ProxyConnectionError, ProxyConnector, ProxyError, ProxyTimeoutError

from codex_proxy.config import Live

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

# A model list or a usage answer is kilobytes; anything larger is not what we asked for.
MAX_REPLY_SIZE = 32 * 1024 * 1024

# What one read takes at most: all of it is held, taken apart and written, several times over,
# while a reader stalls.
_READ_SIZE = 64 * 1024

# How long a connection is kept that carries nothing, and how long past the moment at which it
# is to be kept warm, so that it is still there then.
_IDLE_SECONDS = 120.0
_IDLE_GRACE_SECONDS = 30.0

# A larger body is sent in pieces: written at once it would hold up every other stream.
_LARGE_BODY_SIZE = 1024 * 1024


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


class Answer:
    """An answer whose body is read as it comes."""

    __slots__ = ("_idle", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, idle: float) -> None:
        self._response = response
        self._idle = idle
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def read(self, within: float | None = None) -> bytes:
        """Return what has arrived, 64 KiB at most, waiting for at least a byte; b'' at the end.

        Nothing is lost when it times out: the next call goes on where this one stopped.

        Args:
            within: How long to wait; None means the idle deadline.

        Raises:
            NetError: If nothing came in that time, or the connection was lost.
        """
        wait = self._idle if within is None else within
        content = self._response.content
        try:
            # What is there needs no deadline, and setting one costs more than reading.
            data = content.read_nowait(_READ_SIZE)
            if data or content.at_eof():
                return data
            async with asyncio.timeout(wait):
                return await content.read(_READ_SIZE)
        except TimeoutError as exc:
            raise NetError(NetKind.TIMEOUT, f"no byte for {wait:g} s") from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise NetError(NetKind.CUT, "the connection was lost") from exc

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

    def close(self) -> None:
        """Abort: the connection is closed, so the other side stops working."""
        self._response.close()

    def release(self) -> None:
        """Give the connection back when the body has been read to its end, else close it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Outbound:
    """Calls through one client session per proxy; a changed proxy serves new connections."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._tls = ssl.create_default_context()

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        deadlines: Deadlines,
        proxy_url: str | None = None,
    ) -> Answer:
        """Send a request and wait for the head of its answer.

        Args:
            proxy_url: The way out; None means the configured one.

        Raises:
            NetError: If there is no head by the first-byte deadline, or no connection at all.
        """
        proxy = self._live.current.proxy_url if proxy_url is None else proxy_url
        # `connect` is all of it: the name, the proxy, TLS.
        timeout = aiohttp.ClientTimeout(total=None, connect=deadlines.connect, sock_read=None)
        host = urlsplit(url).hostname or ""
        data = io.BytesIO(body) if body is not None and len(body) > _LARGE_BODY_SIZE else body
        try:
            session = self._session(proxy)
            async with asyncio.timeout(deadlines.connect + deadlines.first_byte) as deadline:
                started = _CONNECTED.set(lambda: _restart(deadline, deadlines.first_byte))
                try:
                    response = await session.request(
                        method,
                        yarl.URL(url, encoded=True),
                        headers=headers,
                        data=data,
                        allow_redirects=False,
                        timeout=timeout,
                        proxy=proxy if proxy and not _is_socks(proxy) else None,
                    )
                finally:
                    _CONNECTED.reset(started)
        except _NotReached as exc:
            raise NetError(exc.kind, f"{exc.kind.value} failed for {host}") from exc
        except TimeoutError as exc:
            raise NetError(NetKind.TIMEOUT, f"no answer from {host} in time") from exc
        except ValueError as exc:
            # An address that nobody can call, mostly that of an account's own proxy.
            kind = NetKind.PROXY if proxy else NetKind.CONNECT
            raise NetError(kind, f"{kind.value} failed for {host}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise NetError(NetKind.CUT, f"the connection to {host} was lost") from exc
        return Answer(response, deadlines.idle)

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout: float = 30.0,
        proxy_url: str | None = None,
    ) -> Reply:
        """Send a request and return its whole answer, all within *timeout* seconds.

        Raises:
            NetError: As `open`.
        """
        deadlines = Deadlines(min(timeout, self._live.current.connect_timeout), timeout, timeout)
        answer: Answer | None = None
        try:
            async with asyncio.timeout(timeout):
                answer = await self.open(
                    method, url, headers=headers, body=body, deadlines=deadlines, proxy_url=proxy_url
                )
                data = await answer.read_all()
        except TimeoutError as exc:
            raise NetError(NetKind.TIMEOUT, f"no whole answer within {timeout:g} s") from exc
        finally:
            if answer is not None:
                answer.release()
        return Reply(answer.status, answer.headers, data)

    async def aclose(self) -> None:
        """Close every connection."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _session(self, proxy: str) -> aiohttp.ClientSession:
        session = self._sessions.get(proxy)
        if session is None:
            session = self._sessions[proxy] = aiohttp.ClientSession(
                connector=self._connector(proxy),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                # Compressed streams would sit in a decoder's buffer; nobody gains by them here.
                headers={"Accept-Encoding": "identity"},
                skip_auto_headers=("User-Agent", "Accept"),
                # One event may be large, and its reader slow: the socket waits, not our memory.
                read_bufsize=64 * 1024,
                max_line_size=65_536,
                max_field_size=65_536,
            )
        return session

    def _idle_seconds(self) -> float:
        """Return how long a connection may carry nothing: past the next sign of life at least."""
        return max(_IDLE_SECONDS, self._live.current.keepalive_interval + _IDLE_GRACE_SECONDS)

    def _connector(self, proxy: str) -> aiohttp.BaseConnector:
        if not proxy:
            return _Connector(limit=0, ssl=self._tls, keepalive_timeout=self._idle_seconds())
        # The client takes an address without a host for none at all, and would go direct.
        scheme, host = urlsplit(proxy).scheme, urlsplit(proxy).hostname
        if scheme not in _PROXY_SCHEMES or not host:
            raise _NotReached(NetKind.PROXY)
        if not _is_socks(proxy):
            return _Connector(limit=0, ssl=self._tls, keepalive_timeout=self._idle_seconds())
        # socks5h means that the proxy looks names up; the library's own switch for it.
        return _SocksConnector.from_url(
            proxy.replace("socks5h://", "socks5://", 1),
            rdns=scheme == "socks5h",
            limit=0,
            ssl=self._tls,
            keepalive_timeout=self._idle_seconds(),
        )


_PROXY_SCHEMES = frozenset({"http", "https", "socks4", "socks5", "socks5h"})


def _is_socks(proxy: str) -> bool:
    return proxy.startswith("socks")


_CONNECTED: ContextVar[Callable[[], None] | None] = ContextVar("connected", default=None)
"""What to call when the call that this task makes has its connection."""


def _restart(deadline: asyncio.Timeout, seconds: float) -> None:
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)


class _NotReached(Exception):
    """There was no connection, so the request did not leave."""

    def __init__(self, kind: NetKind) -> None:
        super().__init__(kind.value)
        self.kind = kind


class _Connector(aiohttp.TCPConnector):
    """Tells what fails before there is a connection from what fails on it.

    The exceptions' own types do not: a proxy that hangs up in the middle of CONNECT looks like
    a backend that does so in the middle of an answer.
    """

    async def connect(
        self, req: aiohttp.ClientRequest, traces: "list[Trace]", timeout: aiohttp.ClientTimeout
    ) -> "Connection":
        try:
            connection = await super().connect(req, traces, timeout)
        except (
            TimeoutError,
            aiohttp.ClientError,
            ProxyConnectionError,
            ProxyError,
            ProxyTimeoutError,
            OSError,
            ValueError,
        ) as exc:
            raise _NotReached(_kind_of(exc, has_proxy=req.proxy is not None)) from exc
        connected = _CONNECTED.get()
        if connected is not None:
            connected()
        return connection


class _SocksConnector(_Connector, ProxyConnector):
    """The same, through a SOCKS proxy."""


def _kind_of(exc: BaseException, *, has_proxy: bool) -> NetKind:
    match exc:
        case TimeoutError():
            return NetKind.CONNECT
        case (
            aiohttp.ClientProxyConnectionError()
            | aiohttp.ClientHttpProxyError()
            | ProxyConnectionError()
            | ProxyError()
            | ProxyTimeoutError()
        ):
            return NetKind.PROXY
        case aiohttp.ClientConnectorDNSError():
            return NetKind.DNS
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return NetKind.TLS
        case _:
            return NetKind.PROXY if has_proxy else NetKind.CONNECT
