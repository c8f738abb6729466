"""The admin API without HTTP, on a real ledger: what is answered is held against its own document."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Mode, Settlement
from codex_proxy.ledger.pricing import Pricing
from codex_proxy.net import Outbound
from codex_proxy.server.gateway import openapi
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.kept import KeptUpstreams
from codex_proxy.server.gateway.operations import BASE, OPERATIONS, Answered, perform, segment_of
from codex_proxy.storage.lock import StoreLock
from codex_proxy.tasks import Background
from codex_proxy.trace import UsageSource
from codex_proxy.upstream.providers import Providers

DOCUMENT = openapi.document(OPERATIONS)
NOW = 1_800_000_000.0


class Api:
    """Asks as a command would."""

    def __init__(self, desk: Desk, clock: ManualClock) -> None:
        self.desk = desk
        self.clock = clock

    async def ask(self, method: str, path: str, body: Any = None, **query: str) -> Any:
        """Do it, and return the answer, which fits the document."""
        answered = await self.raw(method, path, body, **query)
        hold_against_document(method, path, answered)
        return json.loads(answered.body)

    async def raw(self, method: str, path: str, body: Any = None, **query: str) -> Answered:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return await perform(self.desk, method, path, query=query, body=data, actor="tester")

    async def refusal(
        self, method: str, path: str, body: Any = None, **query: str
    ) -> tuple[int, str | None, str]:
        """Return status, field and words of what keeps it from being done."""
        with pytest.raises(ProxyError) as caught:
            await self.raw(method, path, body, **query)
        error = caught.value
        return error.status, getattr(error, "param", None), error.message

    async def user(self, name: str = "ann", dollars: str = "", **fields: Any) -> Any:
        """Make a user, with money if it is to have some."""
        user = await self.ask("POST", "/users", {"name": name, **fields})
        if dollars:
            paid = {"amount": dollars, "reason": "to begin with", "idempotency_key": f"first-{name}"}
            await self.ask("POST", f"/users/{user['id']}/credit", paid)
        return user

    async def key(self, user: Any, name: str = "laptop", **fields: Any) -> Any:
        """Make a key."""
        return await self.ask("POST", "/keys", {"user": user["id"], "name": name, **fields})

    async def spend(
        self, key: Any, request_id: str, cost: int | None, *, ago: float = 0.0, **fields: Any
    ) -> None:
        """Let a turn end that has used something."""
        await self.desk.ledger.settled(
            settlement(key["key"], request_id, cost, int((self.clock.now() - ago) * 1000), **fields)
        )


def settlement(
    key: Mapping[str, Any], request_id: str, cost: int | None, at: int, **fields: Any
) -> Settlement:
    values: dict[str, Any] = {
        "request_id": request_id,
        "user_id": key["user_id"],
        "key_id": key["id"],
        "at": at,
        "route": "responses",
        "asked_model": "gpt-5",
        "model": "gpt-5",
        "tier": "standard",
        "target": "atelier",
        "upstream": "",
        "client": "other",
        "end": "completed",
        "status": 200,
        "error": "",
        "input_tokens": 1_000,
        "cached_tokens": 400,
        "cache_write_tokens": 0,
        "output_tokens": 100,
        "reasoning_tokens": 10,
        "source": UsageSource.BACKEND,
        "flags": (),
        "cost": cost,
        "is_billed": cost is not None,
        "prices": {} if cost is None else {"input": "1.25", "output": "10.00"},
        "price_id": "" if cost is None else "package/gpt-5/standard",
        "milliseconds": 1_500,
    }
    return Settlement(**{**values, **fields})


def hold_against_document(method: str, path: str, answered: Answered) -> None:
    """Fail when an answer is not what the document says."""
    one = next(one for one in OPERATIONS if one.method == method and segment_of(one.path, path) is not None)
    if one.is_alias:
        return
    told = DOCUMENT["paths"][f"{BASE}{one.path}"][method.lower()]["responses"][str(answered.status)]
    (content_type,) = told["content"]
    assert content_type == answered.content_type
    if content_type == "application/json":
        holds(told["content"][content_type]["schema"], json.loads(answered.body))


def holds(schema: Mapping[str, Any], value: Any) -> None:
    """Fail when a value does not fit one of the document's schemas."""
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


@contextlib.asynccontextmanager
async def desk(folder: Path, mode: Mode = "billing", *, database_url: str = "") -> AsyncIterator[Api]:
    """Open a ledger and what works on it."""
    clock, live = ManualClock(NOW), Live(Settings())
    background, outbound = Background(clock.sleep), Outbound(live)
    ledger = Ledger(folder, mode=mode, clock=clock, lock=StoreLock(folder), database_url=database_url)
    await ledger.start()
    try:
        pricing = Pricing(ledger, clock.now)
        await pricing.load()
        providers = Providers(
            live=live, clock=clock, background=background, outbound=outbound, origins=Origins()
        )
        kept = KeptUpstreams(ledger, providers, clock.now)
        await kept.load()
        yield Api(Desk(live, clock, ledger=ledger, pricing=pricing, providers=providers, kept=kept), clock)
    finally:
        await ledger.aclose()
        await background.aclose()
        await outbound.aclose()
