"""One client for everything that leaves this machine.

No redirects (a token never follows one), no cookies, no environment proxies, no total
deadline. A proxy that cannot be used is an error; nothing falls back to a direct connection.

What goes out directly goes through our own transport, unless `upstream-transport` says otherwise; aiohttp's
serves proxies. Both say the same by an answer and by an error.
"""

import asyncio
import ssl
from collections.abc import Mapping

from codex_proxy.config import Live
from codex_proxy.net.aio import AiohttpTransport
from codex_proxy.net.answer import Answer, Deadlines, NetError, NetKind, Reply, Transport
from codex_proxy.net.native import NativeTransport

__all__ = ["Answer", "Deadlines", "NetError", "NetKind", "Outbound", "Reply"]

# How long a connection is kept that carries nothing, and how long past the moment at which it
# is to be kept warm, so that it is still there then.
_IDLE_SECONDS = 120.0
_IDLE_GRACE_SECONDS = 30.0


class Outbound:
    """Calls out; a changed proxy or transport serves new ones."""

    def __init__(self, live: Live) -> None:
        self._live = live
        tls = ssl.create_default_context()
        self.native = NativeTransport(tls, self._idle_seconds)
        self.aiohttp = AiohttpTransport(tls, self._idle_seconds)

    async def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        deadlines: Deadlines,
        proxy_url: str | None = None,
        may_repeat: bool = False,
        is_guarded: bool = False,
    ) -> Answer:
        """Send a request and wait for the head of its answer.

        Args:
            proxy_url: The way out; None means the configured one.
            may_repeat: Whether the other side may get it twice. A kept connection may be at its end without our
                knowing, and be lost before a byte of an answer came: then such a request, and one
                whose method says so, is sent once more on a new connection.
            is_guarded: Whether addresses are left alone that nothing is to be sent to; see `addresses`. What a proxy
                looks up itself cannot be known here.

        Raises:
            NetError: If there is no head by the first-byte deadline, or no connection at all.
        """
        settings = self._live.current
        proxy = settings.proxy_url if proxy_url is None else proxy_url
        is_native = settings.upstream_transport == "native" and not proxy
        transport: Transport = self.native if is_native else self.aiohttp
        return await transport.open(
            method,
            url,
            headers=headers,
            body=body,
            deadlines=deadlines,
            proxy=proxy,
            may_repeat=may_repeat,
            is_guarded=is_guarded,
        )

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        timeout: float = 30.0,
        proxy_url: str | None = None,
        is_guarded: bool = False,
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
                    method,
                    url,
                    headers=headers,
                    body=body,
                    deadlines=deadlines,
                    proxy_url=proxy_url,
                    is_guarded=is_guarded,
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
        await self.native.aclose()
        await self.aiohttp.aclose()

    def _idle_seconds(self) -> float:
        """Return how long a connection may carry nothing: past the next sign of life at least."""
        return max(_IDLE_SECONDS, self._live.current.keepalive_interval + _IDLE_GRACE_SECONDS)
