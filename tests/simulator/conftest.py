"""A simulator that listens, and a client that speaks to it as the proxy would."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.simulator import Simulator


@dataclass(slots=True)
class Answer:
    """What a client saw."""

    status: int
    headers: Any
    body: bytes
    broken: bool = False
    """The connection ended before the answer did."""

    @property
    def json(self) -> Any:
        return loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        parser = Parser()
        return [event.json for event in (*parser.feed(self.body), *parser.finish())]

    @property
    def kinds(self) -> list[str]:
        """The types of the events of the answer itself."""
        extra = {"codex.rate_limits", "response.metadata"}
        return [event["type"] for event in self.events if event["type"] not in extra]

    @property
    def text(self) -> str:
        return "".join(e["delta"] for e in self.events if e["type"] == "response.output_text.delta")

    @property
    def items(self) -> list[dict[str, Any]]:
        return [e["item"] for e in self.events if e["type"] == "response.output_item.done"]

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1]


class Caller:
    """A client with the accounts' tokens."""

    def __init__(self, sim: Simulator, session: aiohttp.ClientSession) -> None:
        self.sim = sim
        self.session = session

    def headers(self, account: str = "a1") -> dict[str, str]:
        who = self.sim.account(account)
        return {"authorization": f"Bearer {who.tokens.access}", "chatgpt-account-id": who.account_id}

    async def ask(
        self,
        method: str,
        path: str,
        *,
        account: str | None = "a1",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        own = self.headers(account) if account is not None else {}
        body = b""
        async with self.session.request(
            method, self.sim.url + path, headers={**own, **(headers or {})}, allow_redirects=False, **more
        ) as response:
            try:
                async for chunk in response.content.iter_any():
                    body += chunk
            except aiohttp.ClientError:
                return Answer(response.status, response.headers, body, broken=True)
            return Answer(response.status, response.headers, body)

    async def post(self, path: str, body: Any, *, account: str | None = "a1", **more: Any) -> Answer:
        headers = {"content-type": "application/json", **more.pop("headers", {})}
        return await self.ask("POST", path, account=account, data=dumps(body), headers=headers, **more)

    async def turn(
        self,
        said: str | list[Any] = "hello",
        *,
        account: str | None = "a1",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answer:
        items = [{"role": "user", "content": said}] if isinstance(said, str) else said
        body: dict[str, Any] = {"model": "gpt-5.5", "stream": True, "store": False, "input": items}
        body |= fields
        body = {key: value for key, value in body.items() if value is not ...}
        return await self.post("/backend-api/codex/responses", body, account=account, headers=headers or {})

    async def lite(self, said: str | list[Any] = "hello", **fields: Any) -> Answer:
        """A turn as the lite models want it."""
        own = {"x-openai-internal-codex-responses-lite": "true", **fields.pop("headers", {})}
        shape = {"model": "gpt-6-sol", "parallel_tool_calls": False, "reasoning": {"context": "all_turns"}}
        return await self.turn(said, headers=own, **{**shape, **fields})

    async def control(self, path: str, body: Any = None) -> Answer:
        if body is None:
            return await self.ask("GET", f"/_sim{path}", account=None)
        return await self.post(f"/_sim{path}", body, account=None)

    async def refresh(self, token: str, **fields: Any) -> Answer:
        body = {
            "client_id": self.sim.issuer_state.client_id,
            "grant_type": "refresh_token",
            "refresh_token": token,
        }
        return await self.post("/oauth/token", {**body, **fields}, account=None)


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator(accounts=2) as simulator:
        yield simulator


@pytest.fixture
async def caller(sim: Simulator) -> AsyncIterator[Caller]:
    # Each request has its own connection, so that one that was cut cannot disturb the next.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Caller(sim, session)
