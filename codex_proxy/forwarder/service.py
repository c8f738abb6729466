"""The forwarder: which requests are passed on, to whom, and what is said of it."""

import asyncio
import hmac
import logging
import math
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion11

from codex_proxy import __version__
from codex_proxy.forwarder.heads import OWN_KEY, request_head
from codex_proxy.forwarder.incoming import SERVER_OPTIONS, Incoming, Said, Server, error, page
from codex_proxy.forwarder.limits import Limiter, caller_of, is_loopback, slot_of
from codex_proxy.forwarder.relay import Body, CallerGoneError, Failed, Relay
from codex_proxy.forwarder.routes import Upstream, Way, affinity, in_order, way_of
from codex_proxy.forwarder.settings import Settings
from codex_proxy.logs import Later
from codex_proxy.logs import Said as Line
from codex_proxy.net.answer import NetError
from codex_proxy.net.connections import STALE_SECONDS
from codex_proxy.net.head import Place
from codex_proxy.net.relaying import RelayConnection, Relays
from codex_proxy.tasks import Background
from codex_proxy.throttle import Throttle

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0

# Shorter than most servers keep theirs.
_IDLE_SECONDS = 55.0

# How long an upstream that could not be reached comes last.
_DOWN_SECONDS = 10.0

_BACKLOG = 4096

# By these a reverse proxy in front of us tells that a request is not from this machine.
_RELAYED = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")

_MAX_SHOWN_PATH = 120


@dataclass(slots=True, frozen=True)
class _Story:
    """What the log says of a request."""

    method: str
    path: str
    uid: int | None
    upstream: str
    status: int
    failure: str
    seconds: float
    size: int


def _tell(story: _Story) -> Line:
    return (
        "forwarded method=%s path=%s uid=%s upstream=%s status=%d error=%s seconds=%.3f bytes=%d",
        (
            story.method, story.path, "-" if story.uid is None else story.uid, story.upstream or "-",
            story.status, story.failure or "-", story.seconds, story.size,
        ),
    )  # fmt: skip


class Forwarder:
    """A relay on one address.

    Args:
        now: The clock by which callers are counted and upstreams come last.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._now = now
        self.port = 0
        # Reading whom to trust takes longer than everything else here.
        is_tls = any(one.place.is_tls for one in settings.routes.all())
        tls = ssl.create_default_context() if is_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._relays = Relays(tls, lambda: _IDLE_SECONDS)
        self._background = Background()
        self._limiter = Limiter(settings.rate_limit) if settings.rate_limit else None
        self._throttle = Throttle(now)
        self._down: dict[Place, float] = {}
        """Until when an upstream comes last."""
        self._busy: set[object] = set()
        """Connections with a request in work."""
        self._idle = asyncio.Event()
        self._is_closing = False
        self._started = now()
        self._counts = {"requests": 0, "refused": 0, "failed": 0}
        self._later = Later(logger, _tell)
        self._server: Server | None = None
        self._listening: list[asyncio.Server] = []

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: If the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        self._server = server = Server(
            self._handle,
            request_factory=Incoming,
            max_connections=self.settings.max_connections,
            **SERVER_OPTIONS,
        )
        listening = await loop.create_server(
            server, self.settings.host or None, self.settings.port, backlog=_BACKLOG
        )
        self._listening.append(listening)
        self.port = int(listening.sockets[0].getsockname()[1])
        for place in {one.place for one in self.settings.routes.all() if not one.place.is_tls}:
            if not is_loopback(place.host) and place.host != "localhost":
                logger.warning(
                    "the way to an upstream is not encrypted: keys go in clear host=%s", place.host
                )

    async def drain(self, patience: float) -> None:
        """Take nobody in any more, and wait *patience* seconds for what is in work."""
        self._is_closing = True
        for listening in self._listening:
            listening.close()
        # A request that was read in this very moment gets to its handler first.
        for _ in range(3):
            await asyncio.sleep(0)
        if self._server is not None:
            for connection in self._server.connections:
                if connection not in self._busy:
                    connection.force_close()
        if self._busy and patience > 0:
            logger.info("waiting for what is in work requests=%d seconds=%g", len(self._busy), patience)
            try:
                async with asyncio.timeout(patience):
                    await self._idle.wait()
            except TimeoutError:
                logger.warning("cut requests=%d", len(self._busy))

    async def aclose(self) -> None:
        """Close everything at once."""
        for listening in self._listening:
            listening.close()
        if self._server is not None:
            for connection in self._server.connections:
                if connection.transport is not None:
                    (connection.transport.abort if connection in self._busy else connection.force_close)()
            await self._server.shutdown(1.0)
        await self._background.aclose()
        await self._relays.aclose()

    # -- requests ------------------------------------------------------------------------------

    async def _handle(self, http: Incoming) -> Said | Relay:
        """Answer one request."""
        self._busy.add(http.protocol)
        self._idle.clear()
        try:
            return await self._answer(http)
        finally:
            self._busy.discard(http.protocol)
            if not self._busy:
                self._idle.set()

    async def _answer(self, http: Incoming) -> Said | Relay:
        message = http.message
        self._counts["requests"] += 1
        way = way_of(message.path)
        if way is None:
            return self._own_page(http)
        refusal = self._refusal(http, way)
        if refusal is not None:
            self._counts["refused"] += 1
            self._log(http, way, None, self._now(), refusal.status, "refused", 0)
            return refusal
        started = self._now()
        relay = Relay(http, self.settings.timeout, self._closes)
        upstream: Upstream | None = None
        status, failure = 0, ""
        try:
            body = Body(http)
            for upstream in self._in_order(http, way):
                if await self._is_served(http, way, upstream, relay, body):
                    return relay
            assert upstream is not None
            raise Failed(502, "upstream_unreachable", f"{upstream.name} cannot be reached")
        except Failed as exc:
            self._counts["failed"] += 1
            failure = exc.code
            logger.debug("failed upstream=%s reason=%s", upstream.name if upstream else "-", exc.message)
            if not relay.has_begun:
                status = exc.status
                return error(
                    exc.status, exc.code, exc.message, method=message.method, keep_alive=self._may_stay(http)
                )
            await relay.break_off()
            return relay
        except (CallerGoneError, asyncio.CancelledError):
            failure = "caller_gone"
            raise
        finally:
            self._log(http, way, upstream, started, status or relay.status, failure, relay.size)

    async def _is_served(
        self, http: Incoming, way: Way, upstream: Upstream, relay: Relay, body: Body
    ) -> bool:
        """Pass a request on to *upstream*; False when that cannot be reached, so that another one may try.

        Raises:
            Failed: If there is no answer, or no whole one.
        """
        message = http.message
        upgrades = bool(message.upgrade) and message.headers.get("Upgrade", "").lower() == "websocket"
        head = request_head(
            message.method,
            upstream.prefix + way.target.encode("utf-8", "surrogateescape"),
            upstream.authority,
            message.raw_headers,
            is_chunked=message.chunked,
            upgrade=upgrades,
            version=message.version,
        )
        place = upstream.place
        connection = self._relays.take(place)
        may_be_stale = False
        if connection is not None:
            age = asyncio.get_running_loop().time() - connection.idle_since
            may_be_stale = age >= STALE_SECONDS
        else:
            connection = await self._connected(place)
            if connection is None:
                return False
        options: dict[str, Any] = {"upgrades": upgrades, "background": self._background}
        if not await relay.exchange(connection, head, body, may_repeat=may_be_stale, **options):
            connection = await self._connected(place)
            if connection is None:
                return False
            await relay.exchange(connection, head, body, may_repeat=False, **options)
        return True

    async def _connected(self, place: Place) -> RelayConnection | None:
        try:
            connection = await self._relays.connect(place, CONNECT_SECONDS, is_guarded=True)
        except NetError as exc:
            logger.warning("upstream not reached reason=%s", exc)
            self._down[place] = self._now() + _DOWN_SECONDS
            return None
        self._down.pop(place, None)
        return connection

    def _in_order(self, http: Incoming, way: Way) -> Iterator[Upstream]:
        """Yield who may serve a request, whoever could just now not be reached last."""
        upstreams = self.settings.routes.upstreams(way.uid)
        if len(upstreams) == 1:
            yield upstreams[0]
            return
        order = in_order(upstreams, affinity(way.uid, http.message.raw_headers, self._address(http)))
        now = self._now()
        # A stable order: among those that are up, and among those that are not, it stays.
        yield from sorted(order, key=lambda one: self._down.get(one.place, 0.0) > now)

    def _refusal(self, http: Incoming, way: Way) -> Said | None:
        """Return why a request is not passed on."""
        message = http.message
        settings = self.settings
        if self._limiter is not None:
            wait = self._limiter.admit(slot_of(self._address(http)), self._now())
            if wait > 0:
                return error(
                    429, "rate_limit_exceeded",
                    f"more than {settings.rate_limit} requests a minute from this address; try again in {wait:.1f} s",
                    method=message.method, keep_alive=self._may_stay(http),
                    headers={"Retry-After": str(int(wait) + 1)},
                )  # fmt: skip
        if settings.key is not None:
            shown = http.fields(OWN_KEY)
            if len(shown) != 1 or not _is_same(shown[0], settings.key):
                return error(
                    401, "forward_key_missing",
                    "this forwarder wants its own key in the header x-forward-key, beside your key for the server behind it",
                    method=message.method, keep_alive=self._may_stay(http),
                )  # fmt: skip
        if message.method == "CONNECT":
            return error(400, "bad_target", "this forwarder opens no way to another server")
        if way.climbs:
            return error(
                400, "bad_path", "the path leads out of /v1: no part of it may be . or ..",
                method=message.method, keep_alive=self._may_stay(http),
            )  # fmt: skip
        if message.chunked and message.version < HttpVersion11:
            # To whom speaks 1.0 there is no body here, and another request in its place.
            return error(400, "bad_request", "HTTP/1.0 knows no body in chunks")
        if message.chunked and message.headers.get("Transfer-Encoding", "").strip().lower() != "chunked":
            return error(501, "unknown_coding", "a request may be sent in chunks, and coded in no other way")
        return None

    def _address(self, http: Incoming) -> str:
        if not self.settings.trust:
            return http.peer
        return caller_of(http.peer, http.fields(b"x-forwarded-for"), self.settings.trust)

    def _closes(self) -> bool:
        return self._is_closing

    def _may_stay(self, http: Incoming) -> bool:
        """Tell whether another request may follow one that we answered by ourselves."""
        return not (http.message.should_close or self._is_closing or not http.payload.is_eof())

    def _log(
        self,
        http: Incoming,
        way: Way,
        upstream: Upstream | None,
        started: float,
        status: int,
        failure: str,
        size: int,
    ) -> None:
        # A query may hold a key.
        path = way.target.partition("?")[0][:_MAX_SHOWN_PATH]
        seconds = self._now() - started
        name = upstream.name if upstream is not None else ""
        self._later.add(_Story(http.message.method, path, way.uid, name, status, failure, seconds, size))

    # -- our own pages -------------------------------------------------------------------------

    def _own_page(self, http: Incoming) -> Said:
        message = http.message
        stays = self._may_stay(http)
        path = message.path.partition("?")[0]
        if path not in ("/", "/debug/info"):
            if not path.startswith("/"):
                return error(
                    400, "bad_target", "a request names a path of this forwarder, and no other server",
                    method=message.method,
                )  # fmt: skip
            return error(
                404, "unknown_url",
                "only /v1/... and /u1/v1/... (a number for each route) are passed on; / says whether anybody is here",
                method=message.method, keep_alive=stays,
            )  # fmt: skip
        if message.method not in ("GET", "HEAD"):
            return error(
                405, "method_not_allowed", f"{path} is there to be read", method=message.method,
                keep_alive=stays, headers={"Allow": "GET, HEAD"},
            )  # fmt: skip
        if path == "/":
            return page(
                200, {"ok": True, "proxy": "codex-proxy forward"}, method=message.method, keep_alive=stays
            )
        return self._refusal_of_info(http) or page(200, self._info(), method=message.method, keep_alive=stays)

    def _refusal_of_info(self, http: Incoming) -> Said | None:
        """Return why a caller is not told what we know; None for the owner: with the admin key, or at this machine."""
        method, stays = http.message.method, self._may_stay(http)
        if self._is_here(http):
            return None
        key = self.settings.admin_key
        for shown in _shown_keys(http) if key is not None else ():
            assert key is not None
            address = self._address(http)
            wait = self._throttle.wait(address)
            if wait > 0:
                if self._throttle.is_news():
                    logger.warning("admin key refused reason=throttled from=%s", address)
                return error(
                    429, "too_many_guesses", f"too many wrong keys; try again in {math.ceil(wait)} s",
                    method=method, keep_alive=stays, headers={"Retry-After": str(math.ceil(wait))},
                )  # fmt: skip
            if _is_same(shown, key):
                self._throttle.admitted(address)
                return None
            if self._throttle.guessed(address, shown):
                logger.warning("admin key refused reason=unknown_key from=%s", address)
        return error(
            403, "owner_only", "this is told to who shows the admin key, or asks on this very machine",
            method=method, keep_alive=stays,
        )  # fmt: skip

    def _is_here(self, http: Incoming) -> bool:
        """Tell whether somebody at this machine asks.

        A reverse proxy on this machine comes from loopback too; it adds a field that says for whom. The page of
        another site that a browser here was led to calls us by that site's name.
        """
        if not is_loopback(http.peer) or any(http.fields(name) for name in _RELAYED):
            return False
        host = (http.fields(b"host") or [""])[0].rsplit(":", 1)[0].strip("[]").lower()
        return host == "localhost" or is_loopback(host)

    def _info(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "version": __version__,
            "uptime_seconds": round(self._now() - self._started, 1),
            "upstreams": [one.url for one in settings.routes.default],
            "routes": {
                f"u{uid}": [one.url for one in found] for uid, found in settings.routes.by_uid.items()
            },
            "timeout_seconds": settings.timeout,
            "rate_limit_per_minute": settings.rate_limit,
            "wants_key": settings.key is not None,
            "connections": len(self._server.connections) if self._server is not None else 0,
            "max_connections": settings.max_connections,
            "in_work": len(self._busy),
            "counts": dict(self._counts),
            "upstream_connections": self._relays.statistics(),
            "unreachable": [
                one.url for one in settings.routes.all() if self._down.get(one.place, 0.0) > self._now()
            ],
        }


def _shown_keys(http: Incoming) -> list[str]:
    shown = [value.removeprefix("Bearer ").strip() for value in http.fields(b"authorization")]
    return [key for key in (*shown, *http.fields(b"x-admin-key")) if key]


def _is_same(shown: str, key: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), key.encode("ascii"))
