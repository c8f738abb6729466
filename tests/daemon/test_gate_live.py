"""Limits of keys and users under a real daemon: what is refused, in whose words, and what a key may see."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.ledger.model import Limits
from codex_proxy.ledger.money import NANOS
from tests.daemon.test_books_live import balance, billing, ledger_of, rows
from tests.harness import LITE, STANDARD, Answer, Stand

MESSAGE = {"model": STANDARD, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
CHAT = {"model": STANDARD, "messages": [{"role": "user", "content": "hi"}]}


async def key_with(stand: Stand, *, name: str = "laptop", **limits: Any) -> dict[str, str]:
    """The header with a key that has *limits*, of a user with money."""
    ledger = ledger_of(stand)
    user = await ledger.create_user(f"user of {name}", is_billed=True, actor="test")
    await ledger.credit(user.id, 10 * NANOS, reason="test", idempotency_key=name, actor="test")
    _, text = await ledger.create_key(user.id, name, limits=Limits(**limits), actor="test")
    return {"authorization": f"Bearer {text}"}


def told(answer: Answer) -> tuple[int, str]:
    error = answer.json["error"]
    return answer.status, error.get("code") or error["type"]


async def test_a_rate_is_told_in_the_heads_that_clients_read(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        key = await key_with(stand, requests_per_minute=2, tokens_per_minute=100_000)
        answer = await stand.ask(headers=key)
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-requests"] == "1"
        assert answer.headers["x-ratelimit-limit-tokens"] == "100000"
        assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
        answer = await stand.post("/v1/messages", MESSAGE, headers=key)
        assert answer.status == 200
        assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
        refused = await stand.ask(headers=key)
        assert told(refused) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "30"
        assert 29_000 < int(refused.headers["retry-after-ms"]) <= 30_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        refused = await stand.post("/v1/messages", MESSAGE, headers=key)
        assert told(refused) == (429, "rate_limit_error")
        assert refused.headers["anthropic-ratelimit-requests-limit"] == "2"
        # What was refused is no usage.
        assert len(await rows(stand)) == 2
        assert (
            "x-ratelimit-limit-requests"
            not in (await stand.ask(headers=await key_with(stand, name="free"))).headers
        )


async def test_what_a_key_may_not_ask_is_refused_in_each_dialect(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        key = await key_with(stand, models=(LITE,), endpoints=("responses", "messages"))
        assert (await stand.ask(model=LITE, headers=key)).status == 200
        refused = await stand.ask(headers=key)
        assert told(refused) == (400, "model_not_allowed")
        assert refused.json["error"]["param"] == "model"
        assert told(await stand.post("/v1/messages", MESSAGE, headers=key)) == (403, "permission_error")
        assert told(await stand.post("/v1/chat/completions", {**CHAT, "model": LITE}, headers=key)) == (
            400,
            "endpoint_not_allowed",
        )
        assert len(stand.sim.turns) == 1


async def test_a_key_sees_the_models_that_it_may_use(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        key = await key_with(stand, models=(STANDARD,))
        free = await key_with(stand, name="free")

        async def listed(path: str, **headers: str) -> list[str]:
            answer = await stand.get(path, headers={**key, **headers})
            entries = answer.json.get("data") or answer.json.get("models") or []
            return [entry.get("id") or entry["slug"] for entry in entries]

        names = await listed("/v1/models")
        assert STANDARD in names
        assert all(name.startswith(STANDARD) for name in names)
        names = await listed("/v1/models?limit=1000", **{"anthropic-version": "2023-06-01"})
        assert STANDARD in names
        assert all(STANDARD in name for name in names)
        assert await listed("/v1/models?client_version=1.0.0") == [STANDARD]
        assert (await stand.get(f"/v1/models/{STANDARD}", headers=key)).status == 200
        assert (await stand.get(f"/v1/models/{LITE}", headers=key)).status == 404
        assert (await stand.get(f"/v1/models/{LITE}", headers=free)).status == 200
        # The Codex CLI asks for its list again when an answer names another one.
        etag = (await stand.get("/v1/models?client_version=1.0.0", headers=key)).headers["etag"]
        answer = await stand.ask(model=STANDARD, codex=True, headers=key)
        assert answer.headers["x-models-etag"] == etag
        other = await stand.ask(model=STANDARD, codex=True, headers=free)
        assert other.headers["x-models-etag"] not in ("", etag)


async def test_one_key_under_pressure_leaves_room_for_the_others(tmp_path: Path) -> None:
    """Forty turns of one key at once, four places, and another key that asks once: it waits for one turn, not for forty."""
    async with billing(tmp_path, max_turns=4, queue_timeout=20) as stand:
        greedy, calm = await key_with(stand, name="greedy"), await key_with(stand, name="calm")
        stand.sim.set_all("slow", delay=0.02)
        order: list[str] = []

        async def ask(name: str, key: dict[str, str]) -> None:
            assert (await stand.ask(headers=key)).status == 200
            order.append(name)

        crowd = [asyncio.get_running_loop().create_task(ask("greedy", greedy)) for _ in range(40)]
        await stand.until(lambda: len(stand.sim.turns) >= 4)
        await ask("calm", calm)
        await asyncio.gather(*crowd)
        assert order.index("calm") < 16
        assert stand.daemon.books is not None
        await stand.idle()
        assert stand.daemon.books.gate.places.taken == 0
        assert await ledger_of(stand).check() == []


async def test_who_finds_no_place_in_time_is_told_whose_limit_it_is(tmp_path: Path) -> None:
    async with billing(tmp_path, queue_timeout="50ms") as stand:
        key = await key_with(stand, concurrency=1)
        stand.sim.set_all("stall", where="middle")
        async with stand.asking(headers=key) as answer:
            assert answer.status == 200
            refused = await stand.ask(headers=key)
            assert told(refused) == (429, "rate_limit_exceeded")
            assert "this key has 1 requests under way" in refused.json["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
        stand.sim.set_all("ok")
        await stand.idle()
        assert (await stand.ask(headers=key)).status == 200


async def test_a_caller_who_leaves_the_queue_is_forgotten(tmp_path: Path) -> None:
    async with billing(tmp_path, max_turns=1, queue_timeout=20) as stand:
        assert stand.daemon.books is not None
        places = stand.daemon.books.gate.places
        key = await key_with(stand)
        stand.sim.set_all("stall", where="middle")
        async with stand.asking(headers=key):
            waiting = asyncio.get_running_loop().create_task(stand.ask(headers=key))
            await stand.until(lambda: places.waiting == 1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await stand.until(lambda: places.waiting == 0)
        await stand.until(lambda: places.taken == 0)
        assert len(await rows(stand)) == 1


async def test_a_caller_cannot_have_two_turns_taken_for_one(tmp_path: Path) -> None:
    """What a request is called is the caller's choice; what it costs is not."""
    async with billing(tmp_path) as stand:
        ledger = ledger_of(stand)
        user = await ledger.create_user("ada", is_billed=True, actor="test")
        await ledger.credit(user.id, NANOS, reason="test", idempotency_key="first", actor="test")
        _, text = await ledger.create_key(user.id, "laptop", actor="test")
        headers = {"authorization": f"Bearer {text}", "x-request-id": "always-the-same"}
        before = []
        for _ in range(3):
            assert (await stand.ask(headers=headers)).status == 200
            await rows(stand)
            before.append(balance(stand, user)[0])
        assert NANOS > before[0] > before[1] > before[2]
        assert len(await rows(stand)) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_price_that_is_set_counts_for_the_next_turn(tmp_path: Path, stream: bool) -> None:
    async with billing(tmp_path) as stand:
        assert stand.daemon.books is not None
        key = await key_with(stand)
        pricing = stand.daemon.books.pricing
        await pricing.set(STANDARD, None, None, {"input": "2000", "output": "2000"}, actor="test")
        assert (await stand.ask(headers=key, stream=stream)).status == 429
        await pricing.set(STANDARD, None, None, {"input": "0", "output": "0"}, actor="test")
        assert (await stand.ask(headers=key, stream=stream)).status == 200
        (row,) = await rows(stand)
        assert (row["cost"], row["price_id"]) == (0, "own/2")
