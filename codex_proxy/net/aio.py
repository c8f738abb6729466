"""The transport on aiohttp's client: through proxies, and for those who choose it.

No redirects, no cookies, no environment proxies. A proxy that cannot be used is an error;
nothing falls back to a direct connection.
"""

import asyncio
import io
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import yarl
from aiohttp_socks import ProxyConnectionError, ProxyConnector, ProxyError, ProxyTimeoutError

from codex_proxy.addresses import why_not
from codex_proxy.net.answer import (
    LARGE_BODY_SIZE,
    MAX_HEAD_SIZE,
    READ_SIZE,
    Answer,
    Deadlines,
    NetError,
    NetKind,
    not_allowed,
    not_reached,
)

if TYPE_CHECKING:
    from aiohttp.abc import ResolveResult
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class AiohttpAnswer(Answer):
    """An answer of aiohttp's."""

    __slots__ = ("_idle", "_response")

    def __init__(self, response: aiohttp.ClientResponse, idle: float) -> None:
        self._response = response
        self._idle = idle
        self.head_seconds = None
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    async def read(self, within: float | None = None) -> bytes:
        """See `Answer.read`."""
        # What is there needs no deadline, and setting one costs more than reading.
        data = self.read_nowait()
        if data is not None:
            return data
        wait = self._idle if within is None else within
        try:
            async with asyncio.timeout(wait):
                return await self._response.content.read(READ_SIZE)
        except TimeoutError as exc:
            raise NetError(NetKind.TIMEOUT, f"no byte for {wait:g} s") from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise NetError(NetKind.CUT, "the connection was lost") from exc

    def read_nowait(self) -> bytes | None:
        """See `Answer.read_nowait`."""
        content = self._response.content
        try:
            data = content.read_nowait(READ_SIZE)
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise NetError(NetKind.CUT, "the connection was lost") from exc
        return data if data or content.at_eof() else None

    def close(self) -> None:
        """See `Answer.close`."""
        self._response.close()

    def release(self) -> None:
        """See `Answer.release`."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class AiohttpTransport:
    """Calls through one client session per proxy.

    What may be repeated is aiohttp's own choice: idempotent methods, once.
    """

    def __init__(self, tls: ssl.SSLContext, idle_seconds: Callable[[], float]) -> None:
        self._tls = tls
        self._idle_seconds = idle_seconds
        self._sessions: dict[str, aiohttp.ClientSession] = {}

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
        """See `Outbound.open`."""
        # `connect` is all of it: the name, the proxy, TLS.
        timeout = aiohttp.ClientTimeout(total=None, connect=deadlines.connect, sock_read=None)
        host = urlsplit(url).hostname or ""
        data = io.BytesIO(body) if body is not None and len(body) > LARGE_BODY_SIZE else body
        try:
            session = self._session(proxy)
            async with asyncio.timeout(deadlines.connect + deadlines.first_byte) as deadline:
                started = _CONNECTED.set(lambda: _restart(deadline, deadlines.first_byte))
                made: list[float] = []
                making = _MADE.set(made)
                guarding = _GUARDED.set(is_guarded and not proxy)
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
                    _GUARDED.reset(guarding)
                    _MADE.reset(making)
                    _CONNECTED.reset(started)
        except _NotReached as exc:
            cause: BaseException | None = exc
            while cause is not None and not isinstance(cause, _NotAllowed):
                cause = cause.__cause__
            if cause is not None:
                raise not_allowed(host, cause.why) from exc
            raise not_reached(exc.kind, host) from exc
        except TimeoutError as exc:
            raise NetError(NetKind.TIMEOUT, f"no answer from {host} in time") from exc
        except ValueError as exc:
            # An address that nobody can call, mostly that of an account's own proxy.
            raise not_reached(NetKind.PROXY if proxy else NetKind.CONNECT, host) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise NetError(NetKind.CUT, f"the connection to {host} was lost") from exc
        answer = AiohttpAnswer(response, deadlines.idle)
        if made:
            answer.head_seconds = time.monotonic() - made[-1]
        return answer

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
                max_line_size=MAX_HEAD_SIZE,
                max_field_size=MAX_HEAD_SIZE,
            )
        return session

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


_MADE: ContextVar[list[float] | None] = ContextVar("made", default=None)
"""Where it is noted when a connection was made for that call, by the machine's monotonic clock."""


_GUARDED: ContextVar[bool] = ContextVar("guarded", default=False)
"""Whether that call leaves addresses alone that nothing is to be sent to."""


def _restart(deadline: asyncio.Timeout, seconds: float) -> None:
    deadline.reschedule(asyncio.get_running_loop().time() + seconds)


class _NotReached(Exception):
    """There was no connection, so the request did not leave."""

    def __init__(self, kind: NetKind) -> None:
        super().__init__(kind.value)
        self.kind = kind


class _NotAllowed(OSError):
    """A name stands for addresses alone that nothing is to be sent to."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


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

    async def _resolve_host(
        self, host: str, port: int, traces: "Sequence[Trace] | None" = None
    ) -> "list[ResolveResult]":
        infos = await super()._resolve_host(host, port, traces)
        if not _GUARDED.get():
            return infos
        allowed = [info for info in infos if not why_not(info["host"])]
        if infos and not allowed:
            raise _NotAllowed(why_not(infos[0]["host"]))
        return allowed

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: "list[Trace]", timeout: aiohttp.ClientTimeout
    ) -> "ResponseHandler":
        # Only called when none that was kept serves.
        protocol = await super()._create_connection(req, traces, timeout)
        made = _MADE.get()
        if made is not None:
            made.append(time.monotonic())
        return protocol


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
