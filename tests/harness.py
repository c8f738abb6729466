"""The whole proxy in front of the simulated backend, over real sockets, for tests of behaviour."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from codex_proxy import config
from codex_proxy.accounts.account import Account
from codex_proxy.daemon import Daemon
from codex_proxy.protocol.sse import Batch, Parser
from codex_proxy.simulator import SimAccount, Simulator
from codex_proxy.simulator.quota import quota_headers

TRANSPORT = os.environ.get("CODEX_PROXY_UPSTREAM_TRANSPORT", "native")
"""What carries calls to the backend, here and in daemons that run by themselves: the tests are to pass with each."""

STANDARD = "gpt-5.5"
"""A model with the standard wire shape."""
LITE = "gpt-6.1-sol"
"""A model with the lite wire shape."""

CODEX_HEADERS = {
    "originator": "codex_exec",
    "User-Agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)",
    "Accept": "text/event-stream",
}


@dataclasses.dataclass(slots=True)
class Answer:
    """What a caller saw."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def events(self) -> Batch:
        """The events of a stream."""
        parser = Parser()
        return parser.feed(self.body) + parser.finish()

    @property
    def types(self) -> list[str]:
        """The types of the events, in order."""
        return [event.type for event in self.events]

    @property
    def json(self) -> Any:
        """The body of a plain answer."""
        return orjson.loads(self.body)

    @property
    def text(self) -> str:
        """The visible text of a streamed or collected answer."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return "".join(
                event.json["delta"] for event in self.events if event.type == "response.output_text.delta"
            )
        return "".join(
            part.get("text", "")
            for item in self.json["output"]
            if item["type"] == "message"
            for part in item["content"]
        )


def question(text: str = "hi", *, stream: bool = True, model: str = STANDARD, **body: Any) -> dict[str, Any]:
    """Return the body of a Responses request that says *text*."""
    content = [{"type": "input_text", "text": text}]
    return {
        "model": model,
        "input": [{"type": "message", "role": "user", "content": content}],
        "stream": stream,
        **body,
    }


class Stand:
    """A simulator with accounts, a daemon in front of it, and a caller."""

    def __init__(self, simulator: Simulator, daemon: Daemon, session: aiohttp.ClientSession, folder: Path):
        self.sim = simulator
        self.daemon = daemon
        self.session = session
        self.folder = folder

    @property
    def url(self) -> str:
        return self.daemon.url

    @property
    def auths(self) -> Path:
        return self.folder / "auths"

    @property
    def accounts(self) -> list[SimAccount]:
        return self.sim.accounts

    async def post(
        self, path: str = "/v1/responses", body: Any = None, *, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a JSON request and return the whole answer."""
        async with self.session.post(path, json=body, headers=headers) as response:
            return Answer(
                response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()
            )

    async def get(self, path: str, *, headers: dict[str, str] | None = None) -> Answer:
        async with self.session.get(path, headers=headers) as response:
            return Answer(
                response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()
            )

    async def ask(
        self,
        text: str = "hi",
        *,
        stream: bool = True,
        model: str = STANDARD,
        codex: bool = False,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> Answer:
        """Ask one Responses question; `codex` asks as the Codex CLI does."""
        return await self.post(
            "/v1/responses",
            question(text, stream=stream, model=model, **body),
            headers={**(CODEX_HEADERS if codex else {}), **(headers or {})},
        )

    @contextlib.asynccontextmanager
    async def asking(
        self,
        text: str = "hi",
        *,
        model: str = STANDARD,
        codex: bool = False,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a stream and hand out the answer once its head is there; leaving drops the connection."""
        response = await self.session.post(
            "/v1/responses",
            json=question(text, model=model, **body),
            headers={**(CODEX_HEADERS if codex else {}), **(headers or {})},
        )
        try:
            yield response
        finally:
            response.close()

    def in_order(self) -> None:
        """Let the pool prefer the first account, then the second, and so on."""
        self.in_order_of(*self.accounts)

    def in_order_of(self, *accounts: SimAccount) -> None:
        """Let the pool prefer these accounts, one after the other, to all others.

        By the strategy whose order is that of the numbers alone.
        """
        self.daemon.pool.apply_settings(
            dataclasses.replace(self.daemon.live.current, strategy="quota-balance")
        )
        for place, account in enumerate([*accounts, *(a for a in self.accounts if a not in accounts)]):
            account.use(primary=10 * place, secondary=0)
            known = self.known(account)
            known.quota.read_headers(quota_headers(account), self.daemon.clock.now())

    def tried(self) -> list[str | None]:
        """Return which accounts the backend saw turns of, in order."""
        return [turn.account for turn in self.sim.turns]

    def known(self, account: SimAccount) -> Account:
        """Return what the daemon's pool knows of one of the backend's accounts."""
        return next(
            one
            for one in self.daemon.pool.accounts()
            if one.credential.identity.account_id == account.account_id
        )

    async def stats(self) -> Any:
        return (await self.get("/stats")).json

    async def idle(self) -> None:
        """Wait until no turn is under way: the end of a body is read after that of its answer."""
        await self.until(lambda: self.daemon.executor.in_flight == 0)

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Wait until *condition* holds; fail when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the awaited condition did not come true"
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def standing(
    folder: Path,
    *,
    accounts: int = 3,
    simulator: Simulator | None = None,
    auths: Callable[[Simulator, Path], object] | None = None,
    **settings: object,
) -> AsyncIterator[Stand]:
    """Start everything; *settings* are keys with `_` for `-`, e.g. `max_retry=0`.

    No background questions to the backend (usage, models), unless a test asks for them, so
    that what the simulator received is what the test caused.
    """
    sim = simulator if simulator is not None else Simulator(accounts=accounts)
    async with sim:
        directory = folder / "auths"
        await asyncio.to_thread(directory.mkdir, exist_ok=True)
        (auths or (lambda s, d: s.write_auth_files(d)))(sim, directory)
        values: dict[str, object] = {
            "listen": "127.0.0.1:0",
            "auth_dir": directory,
            "data_dir": folder / "data",
            "base_url": sim.base_url,
            "oauth_issuer": sim.issuer,
            "health_check_interval": 0,
            "drain_timeout": 5,
            "upstream_transport": TRANSPORT,
            # A database for each test would take longer than most of them; those about it ask for it.
            "records": "off",
            **settings,
        }
        lines = [
            f"{name.replace('_', '-')}: {value if not isinstance(value, Path) else str(value)}"
            for name, value in values.items()
        ]
        file = folder / "config.yaml"
        await asyncio.to_thread(file.write_text, "\n".join(lines) + "\n", encoding="utf-8")
        daemon = Daemon(await asyncio.to_thread(config.load, file, {}), environ={})
        await daemon.start()
        # The model lists are fetched at start; tests look at what comes after.
        await _quiet(daemon, sim)
        try:
            async with aiohttp.ClientSession(daemon.url) as session:
                yield Stand(sim, daemon, session, folder)
        finally:
            await daemon.stop()


async def _quiet(daemon: Daemon, sim: Simulator) -> None:
    deadline = time.monotonic() + 5.0
    while any(account.models is None for account in daemon.pool.accounts() if account.state.value == "ready"):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.005)
    sim.clear()
