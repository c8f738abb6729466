"""The simulated backend and issuer as an HTTP server on one port.

Nothing is shared with the proxy but the JSON and SSE helpers: what is tested and what tests it
must not agree by construction.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web

from codex_proxy.protocol.wire import dumps
from codex_proxy.simulator import control
from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.exchange import Exchange, Received, decompress
from codex_proxy.simulator.faults import Reply
from codex_proxy.simulator.issuer import TEN_DAYS, Issuer
from codex_proxy.simulator.oauth import Logins
from codex_proxy.simulator.pages import Pages
from codex_proxy.simulator.script import Script
from codex_proxy.simulator.turns import Turns

# Far beyond any real request; past it the body is a mistake of the test.
MAX_BODY = 512 * 1024 * 1024

Handler = Callable[[Exchange], Awaitable[Reply | None]]


class Simulator:
    """A Codex backend with accounts, played locally.

    `requests` keeps the last *keep* of what was received.
    """

    def __init__(
        self,
        accounts: int = 3,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] | None = None,
        strict: bool = True,
        plan: str = "plus",
        lifetime: float = TEN_DAYS,
        quota_tokens: float = 50_000_000,
        latency: float = 0.0,
        keep: int = 10_000,
    ) -> None:
        self.host = host
        self.port = port
        self.strict = strict
        self.wire: Literal["strict", "any"] = "strict"
        """Whether the wrong wire shape for a model is refused."""
        self.latency = latency
        self.extra_events = True
        """Whether rate-limit and metadata events come along."""
        self.full_output = False
        """Whether `response.completed` lists the items again."""
        self.served_model: str | None = None
        """Another model than the one asked for, when the backend reroutes."""
        self.workspace_origin = "https://chatgpt.com"
        self.login_as: str | None = None
        """The account that the next browser or device login is for; the first one when None."""
        self.quota_tokens = quota_tokens
        self._base_now = now or time.time
        self._offset = 0.0
        self.issuer_state = Issuer(self.now, lifetime, strict)
        self._accounts: dict[str, SimAccount] = {}
        self.scripts: deque[Script] = deque()
        self._requests: deque[Received] = deque(maxlen=keep)
        self._runner: web.AppRunner | None = None
        self._closing = False
        self._serial = 0
        self._logins = Logins(self)
        self._routes = _routes(Turns(self), Pages(self), self._logins)
        for i in range(1, accounts + 1):
            self.add_account(f"a{i}", plan=plan)

    # What tests and people use

    @property
    def url(self) -> str:
        # Who listens everywhere is called at home.
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        """What the proxy's `base-url` is."""
        return f"{self.url}/backend-api/codex"

    @property
    def issuer(self) -> str:
        """What the proxy's `oauth-issuer` is."""
        return self.url

    @property
    def accounts(self) -> list[SimAccount]:
        return list(self._accounts.values())

    @property
    def requests(self) -> list[Received]:
        """Everything received, control requests aside."""
        return list(self._requests)

    @property
    def turns(self) -> list[Received]:
        """Only the requests for answers."""
        return [r for r in self._requests if r.method == "POST" and r.path.endswith("/codex/responses")]

    @property
    def exchanges(self) -> list[Received]:
        """Only the requests for tokens."""
        return [r for r in self._requests if r.path == "/oauth/token"]

    def now(self) -> float:
        """Return the simulator's time."""
        return self._base_now() + self._offset

    def advance(self, seconds: float) -> None:
        """Move the simulator's clock forward."""
        self._offset += seconds

    def account(self, name: str) -> SimAccount:
        """Return the account called *name*."""
        return self._accounts[name]

    def add_account(
        self,
        name: str | None = None,
        *,
        plan: str = "plus",
        models: list[str] | None = None,
        email: str = "",
        account_id: str = "",
        user_id: str = "",
        fedramp: bool = False,
        quota_tokens: float | None = None,
    ) -> SimAccount:
        """Add an account; what is left out is made from its name."""
        name = name or f"a{len(self._accounts) + 1}"
        if name in self._accounts:
            raise ValueError(f"there is an account {name!r} already")
        account = SimAccount(
            name,
            self.issuer_state,
            self.now,
            plan,
            list(models or []),
            email,
            account_id,
            user_id,
            fedramp,
            self.quota_tokens if quota_tokens is None else quota_tokens,
        )
        self._accounts[name] = account
        return account

    def script(self, *scripts: Script | str) -> None:
        """Queue answers for the next turns, whichever account has them."""
        self.scripts.extend(Script.text(item) if isinstance(item, str) else item for item in scripts)

    def set_all(self, state: str, *, times: int | None = None, **options: Any) -> None:
        """Put every account into *state*."""
        for account in self.accounts:
            account.set(state, times=times, **dict(options))

    def clear(self) -> None:
        """Forget all requests, scripts and states; tokens and quotas stay."""
        self._requests.clear()
        self.scripts.clear()
        for account in self.accounts:
            account.scripts.clear()
            account.set("ok")

    def write_auth_files(self, folder: Path, shape: Literal["flat", "codex"] = "flat") -> list[Path]:
        """Write a ready account file for every account and return the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for account in self.accounts:
            path = folder / f"simulated-{account.name}.json"
            value = account.flat_file() if shape == "flat" else account.codex_file()
            fresh = path.with_suffix(".tmp")
            fresh.touch(mode=0o600)
            fresh.write_bytes(dumps(value) + b"\n")
            fresh.replace(path)
            paths.append(path)
        return paths

    def approve_device(self, user_code: str, account: str | None = None) -> None:
        """Approve the device login with *user_code*, as a person would on the page."""
        who = self._logins.who(account)
        if who is None or not self.issuer_state.approve_device(user_code, who):
            raise ValueError(f"there is no code {user_code!r} or no account {account!r}")

    async def start(self) -> None:
        """Listen; `port` tells where."""
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.on_response_prepare.append(_drop_made_up_headers)
        # A peer that leaves ends its handler at once, as `Received.cancelled` says.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.05
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def aclose(self) -> None:
        """Stop listening and cut what is open."""
        self._closing = True
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # One request

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/_sim" or request.path.startswith("/_sim/"):
            return await control.handle(self, request)
        wire = await request.read()
        body, complaint = decompress(wire, request.headers.get("content-encoding", ""))
        received = Received(
            request.method, request.path, request.query_string, request.headers, wire, body, self.now()
        )
        self._requests.append(received)
        self._serial += 1
        exchange = Exchange(self, request, received, self._serial)
        try:
            reply = complaint or await self._answer(exchange)
            if reply is not None:
                await exchange.send(reply)
        except (asyncio.CancelledError, ConnectionError) as exc:
            if not (received.finished or exchange.aborted or self._closing):
                received.cancelled = True
            if isinstance(exc, asyncio.CancelledError):
                raise
        finally:
            received.closed.set()
        return exchange.response or web.Response()

    async def _answer(self, exchange: Exchange) -> Reply | None:
        path = exchange.path
        if exchange.request.method == "GET" and path == "/codex/responses":
            # No sockets here: the Codex CLI goes on over HTTP at once.
            return Reply.json({"detail": "Upgrade Required"}, 426)
        handler = self._routes.get((exchange.request.method, path))
        if handler is not None:
            return await handler(exchange)
        return Reply.json({"detail": "Not Found"}, 404)


async def _drop_made_up_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Remove the content type that aiohttp invents for a stream that names none."""
    if type(response) is web.StreamResponse:
        response.headers.popall("content-type", None)


def _routes(turns: Turns, pages: Pages, logins: Logins) -> dict[tuple[str, str], Handler]:
    async def empty(_exchange: Exchange) -> Reply:
        return Reply.json({})

    async def settings(_exchange: Exchange) -> Reply:
        return Reply.json({"commit_attribution_enabled": False})

    async def reset_credits(_exchange: Exchange) -> Reply:
        return Reply.json({"credits": [], "available_count": 0})

    return {
        ("POST", "/codex/responses"): turns.responses,
        ("POST", "/codex/responses/compact"): turns.compact,
        ("POST", "/codex/alpha/search"): turns.search,
        ("POST", "/codex/images/generations"): turns.images,
        ("POST", "/codex/images/edits"): turns.images,
        ("GET", "/codex/models"): pages.models,
        ("GET", "/wham/usage"): pages.usage,
        ("GET", "/api/codex/usage"): pages.usage,
        ("GET", "/wham/accounts/check"): pages.accounts_check,
        ("GET", "/wham/rate-limit-reset-credits"): reset_credits,
        ("GET", "/wham/settings/user"): settings,
        ("POST", "/codex/analytics-events/events"): empty,
        ("POST", "/oauth/token"): logins.token,
        ("GET", "/oauth/authorize"): logins.authorize,
        ("POST", "/oauth/revoke"): logins.revoke,
        ("POST", "/api/accounts/deviceauth/usercode"): logins.device_start,
        ("POST", "/api/accounts/deviceauth/token"): logins.device_poll,
        ("GET", "/codex/device"): logins.device_page,
    }
