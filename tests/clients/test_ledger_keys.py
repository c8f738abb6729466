"""Real clients with a key of the ledger: they are served, and what is refused is asked for once and understood."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.ledger.model import NO_LIMITS, Limits
from codex_proxy.ledger.money import NANOS
from codex_proxy.simulator import Script
from tests.clients import codex_desk, test_claude_code
from tests.clients.codex_desk import KEY, WITH_KEY
from tests.daemon.test_books_live import balance, customer, ledger_of, rows
from tests.harness import STANDARD

pytestmark = pytest.mark.clients

codex = codex_desk.codex
claude = test_claude_code.claude

BILLING: dict[str, Any] = {"ledger": "billing"}


@pytest.fixture
async def coder(codex: Path, tmp_path: Path) -> AsyncIterator[codex_desk.Desk]:
    async with codex_desk.sitting(
        codex, tmp_path, WITH_KEY, api_keys=[KEY], enable_websocket=False, **BILLING
    ) as desk:
        yield desk


@pytest.fixture
async def writer(claude: Path, tmp_path: Path) -> AsyncIterator[test_claude_code.Desk]:
    async with test_claude_code.sitting(claude, tmp_path, **BILLING) as desk:
        yield desk


def give(environment: dict[str, str], name: str, header: dict[str, str]) -> None:
    environment[name] = header["Authorization"].removeprefix("Bearer ")


async def test_codex_pays_for_its_turns(coder: codex_desk.Desk) -> None:
    user, key = await customer(coder.stand, NANOS)
    give(coder.environment, "POOL_KEY", key)
    coder.sim.script(Script.text("Hello from afar."))
    ran = await coder.run("say hello")
    assert (ran.code, ran.out) == (0, "Hello from afar.\n")
    (row,) = await rows(coder.stand)
    assert row["client"] == "codex"
    assert balance(coder.stand, user) == (NANOS - row["debit"], 0)
    assert row["debit"] > 0


@pytest.mark.parametrize(
    ("money", "limits", "words"),
    [
        (0, NO_LIMITS, "quota"),
        (NANOS, Limits(models=("gpt-nothing",)), "may not use the model"),
        (NANOS, Limits(endpoints=("chat",)), "may not ask for responses"),
    ],
)
async def test_codex_asks_once_for_what_it_may_not_have(
    coder: codex_desk.Desk, money: int, limits: Limits, words: str
) -> None:
    _, key = await customer(coder.stand, money, limits=limits)
    give(coder.environment, "POOL_KEY", key)
    ran = await coder.run("say hello")
    assert ran.code != 0
    assert words in ran.err.lower()
    assert len(coder.tap.sent("POST", "/backend-api/codex/responses")) == 1
    assert coder.sim.turns == []


async def test_codex_waits_out_a_limit_of_requests(coder: codex_desk.Desk) -> None:
    # One in two seconds, with room for one.
    user, key = await customer(coder.stand, NANOS, limits=Limits(requests_per_minute=30))
    give(coder.environment, "POOL_KEY", key)
    ledger = ledger_of(coder.stand)
    for _ in range(30):
        # What it may ask at once is used up.
        assert (await coder.stand.ask(headers=key)).status == 200
    assert (await coder.stand.ask(headers=key)).status == 429
    ran = await coder.run("say hello", model=STANDARD)
    assert ran.code == 0, ran.err
    assert balance(coder.stand, user)[1] == 0
    assert await ledger.check() == []


async def test_claude_code_pays_for_its_turns(writer: test_claude_code.Desk) -> None:
    user, key = await customer(writer.stand, 10 * NANOS)
    give(writer.environment, "ANTHROPIC_AUTH_TOKEN", key)
    writer.sim.script(Script.text("Hello from afar."))
    ran = await writer.run()
    assert ran.is_well
    assert ran.result == "Hello from afar."
    paid = await rows(writer.stand)
    assert {row["client"] for row in paid} == {"claude-code"}
    assert balance(writer.stand, user) == (10 * NANOS - sum(row["debit"] for row in paid), 0)


async def test_claude_code_without_money_ends_and_says_why(writer: test_claude_code.Desk) -> None:
    _, key = await customer(writer.stand, 0)
    give(writer.environment, "ANTHROPIC_AUTH_TOKEN", key)
    ran = await writer.run()
    assert ran.told["is_error"]
    assert "balance" in ran.result.lower()
    assert len(writer.asked) == 1
    assert writer.sim.turns == []
