"""The pool as a command reaches it: through the running daemon, or from its files when none runs.

Both do the same work with the same code (`accounts.actions`, `server.admin`); a command does
not ask which it has, but to say so.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

import aiohttp
import yarl

from codex_proxy import logs
from codex_proxy.accounts.actions import Action, Actions
from codex_proxy.accounts.memory import Memory
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import SystemClock
from codex_proxy.config import CONTROL_SOCKET, Live, Settings
from codex_proxy.errors import ProxyError
from codex_proxy.net import Outbound
from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.server.admin import accounts_json, act_json, item_json
from codex_proxy.server.views import PoolAdmin
from codex_proxy.tasks import Background

Round = Literal["refresh", "check"]

# An exchange has half a minute, and may have to wait for another process's; a restart a minute and a half beside that.
_ANSWER_SECONDS = 150.0
_CONNECT_SECONDS = 5.0


class NoDaemon(ProxyError):
    """No daemon answers on this data-dir's control socket."""


class Control(Protocol):
    """What commands need of the pool."""

    is_daemon: bool

    async def accounts(self) -> JsonObject:
        """Return all accounts as `GET /accounts` does."""
        ...

    async def act(self, alias: str, action: Action) -> JsonObject:
        """Do something to one account, as `POST /accounts/{alias}/{action}` does.

        Raises:
            ProxyError: If there is no such account.
        """
        ...

    def each(self, round_: Round) -> AsyncIterator[JsonObject]:
        """Do something to all accounts, and tell of each."""
        ...


@asynccontextmanager
async def control(settings: Settings) -> AsyncIterator[Control]:
    """Reach the pool of *settings*."""
    try:
        async with daemon(settings) as running:
            yield running
            return
    except NoDaemon:
        pass
    async with _files(settings) as local:
        yield local


@asynccontextmanager
async def daemon(settings: Settings) -> "AsyncIterator[Running]":
    """Reach the running daemon.

    Raises:
        NoDaemon: If there is none.
        ProxyError: If there is one that cannot be asked.
    """
    path = settings.data_dir / CONTROL_SOCKET
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
    async with aiohttp.ClientSession(
        "http://localhost", connector=aiohttp.UnixConnector(str(path)), timeout=timeout
    ) as session:
        running = Running(session, str(path))
        # Nothing may be half done when it turns out that nobody is there.
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await running.get("/livez")
        except TimeoutError:
            raise ProxyError(f"the daemon at {path} does not answer") from None
        yield running


async def is_running(settings: Settings) -> bool:
    """Tell whether a daemon runs on this data-dir, even one that cannot be asked."""
    try:
        async with daemon(settings):
            return True
    except NoDaemon:
        return False
    except ProxyError:
        return True


async def take_up(settings: Settings, what: str = "it") -> str:
    """Say when the accounts that were just brought to auth-dir will serve."""
    if await is_running(settings):
        return f"The running daemon takes {what} up by itself."
    return "No daemon runs with this configuration: start it with `codex-proxy`."


class Running:
    """A daemon that runs, through its control socket."""

    is_daemon = True

    def __init__(self, session: aiohttp.ClientSession, place: str) -> None:
        self._session = session
        self._place = place

    async def get(self, path: str) -> JsonObject:
        """Ask for a page.

        Raises:
            ProxyError: With the daemon's own words, when it refuses.
            NoDaemon: If it does not answer.
        """
        return await self._json("GET", path)

    async def accounts(self) -> JsonObject:
        return await self.get("/accounts")

    async def act(self, alias: str, action: Action) -> JsonObject:
        return await self._json("POST", f"/accounts/{segment(alias)}/{action}")

    async def restart(self) -> JsonObject:
        """Have a new process take over; return what came of it."""
        return await self._json("POST", "/restart")

    async def why(self, request_id: str) -> JsonObject:
        """Return the story of a turn."""
        return await self.get(f"/why/{segment(request_id)}")

    async def follow(self) -> AsyncIterator[tuple[list[JsonObject], int]]:
        """Yield the requests that end from now on, the newest first, and how many more there were."""
        parser = Parser()
        try:
            async with self._session.get("/requests/live") as answer:
                if answer.status != 200:
                    raise ProxyError(f"the daemon answered {answer.status}")
                async for chunk in answer.content.iter_any():
                    for event in parser.feed(chunk):
                        if "requests" in event.json:
                            yield event.json["requests"], event.json["dropped"]
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise self._silent(exc) from exc

    async def each(self, round_: Round) -> AsyncIterator[JsonObject]:
        path = "/refresh" if round_ == "refresh" else "/check-quota"
        parser = Parser()
        try:
            async with self._session.post(path) as answer:
                async for chunk in answer.content.iter_any():
                    for event in parser.feed(chunk):
                        if event.type == "item":
                            yield event.json
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise self._silent(exc) from exc

    async def _json(self, method: str, path: str) -> JsonObject:
        said = await self.ask(method, path)
        with contextlib.suppress(BadJson):
            if isinstance(document := loads(said), dict):
                return document
        raise ProxyError("the daemon answered 200, and not what was asked for")

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> bytes:
        """Ask for anything, with a JSON *body* if there is to be one.

        Raises:
            ProxyError: With the daemon's own words, when it refuses.
            NoDaemon: If it does not answer.
        """
        url = yarl.URL(f"{path}?{urlencode(query)}" if query else path, encoded=True)
        sent = None if body is None else dumps(body)
        headers = {} if sent is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(method, url, data=sent, headers=headers) as answer:
                status, said = answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            raise self._silent(exc) from exc
        if status in (200, 201):
            return said
        try:
            document: Any = loads(said)
        except BadJson:
            document = None
        error = document.get("error") if isinstance(document, dict) else None
        if isinstance(error, dict) and error.get("code") == "unknown_url":
            raise ProxyError(
                "the running daemon does not know this command: it is of another version, restart it"
            )
        words = error.get("message") if isinstance(error, dict) else None
        raise ProxyError(words if isinstance(words, str) else f"the daemon answered {status}")

    def _silent(self, exc: Exception) -> ProxyError:
        """Return the error for no answer: only who is sure that no daemon runs may go on without it."""
        if isinstance(exc, aiohttp.ClientConnectorError):
            if isinstance(exc.os_error, PermissionError):
                return ProxyError(
                    f"{self._place} is another user's: run this as the user that runs the daemon"
                )
            return NoDaemon(f"no daemon answers at {self._place}: is it running, with this configuration?")
        return ProxyError("the daemon went away or does not answer; nothing is known of what was asked")


def segment(text: str) -> str:
    """Return *text* as it can be one segment of a path."""
    # Dots too: a client takes a path apart at them.
    return quote(text, safe="", errors="replace").replace(".", "%2E")


class Files:
    """The pool as its files have it; for as long as a command runs."""

    is_daemon = False

    def __init__(self, admin: PoolAdmin, memory: Memory, data_dir: Path) -> None:
        self._admin = admin
        self._memory = memory
        self._data_dir = data_dir

    async def accounts(self) -> JsonObject:
        return accounts_json(self._admin.accounts(), self._admin.problems())

    async def act(self, alias: str, action: Action) -> JsonObject:
        try:
            return await act_json(self._admin, alias, action)
        finally:
            await self._save()

    async def each(self, round_: Round) -> AsyncIterator[JsonObject]:
        progress = self._admin.refresh_all() if round_ == "refresh" else self._admin.check_quota()
        current = 0
        async for item in progress.listen():
            if item is not None:
                current += 1
                yield item_json(item, current, progress.total)
        await self._save()

    async def _save(self) -> None:
        """Keep what was learned for the daemon's next start; it costs only that where it cannot be kept."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._data_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
        await self._memory.save()


@asynccontextmanager
async def _files(settings: Settings) -> AsyncIterator[Files]:
    logs.setup("error")
    clock, live = SystemClock(), Live(settings)
    background, outbound, pool = Background(), Outbound(live), Pool(clock)
    pool.apply_settings(settings)
    keeper = Keeper(pool, live=live, clock=clock, background=background, outbound=outbound)
    memory = Memory(pool, live=live, clock=clock, background=background)
    actions = Actions(pool, keeper, live=live, clock=clock, outbound=outbound)
    admin = PoolAdmin(pool, keeper, actions, clock=clock, background=background, phase=lambda: "ready")
    try:
        await keeper.load()
        await memory.load()
        yield Files(admin, memory, settings.data_dir)
    finally:
        # An exchange that is under way ends before we do: its answer exists only once.
        await background.wait_critical()
        await background.aclose()
        await outbound.aclose()
