"""Limits of keys and users under a real daemon: what is refused, in whose words, and what a key may see."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.ledger.model import Limits
from codex_proxy.ledger.money import NANOS
from codex_proxy.simulator.upstream import SimUpstream
from tests.daemon.test_books_live import balance, billing, ledger_of, rows
from tests.daemon.upstreams import staged
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


async def test_tokens_are_counted_eight_times_as_often_and_take_no_turn(tmp_path: Path) -> None:
    """Somebody's key cannot keep the tokenizer busy for all the others."""
    async with billing(tmp_path) as stand:
        key = await key_with(stand, requests_per_minute=2)
        both = [
            ("/v1/messages/count_tokens", CHAT),
            ("/v1/responses/input_tokens", {"model": STANDARD, "input": "hi"}),
        ]
        served = 0
        while (answer := await stand.post(*both[served % 2], headers=key)).status == 200:
            assert answer.json["input_tokens"] > 0
            served += 1
        # One more every four seconds, should it take so long.
        assert 16 <= served < 30
        words = ("rate_limit_error", "rate_limit_exceeded")[served % 2]
        assert told(answer) == (429, words)
        assert 1 <= int(answer.headers["retry-after"]) <= 4
        assert "16 times a minute" in answer.json["error"]["message"]
        assert (await stand.ask(headers=key)).status == 200
        free = await key_with(stand, name="free")
        for _ in range(20):
            assert (await stand.post(*both[1], headers=free)).status == 200
        assert len(await rows(stand)) == 1


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


async def test_an_answer_that_begins_with_a_sign_of_life_tells_the_limits_too(tmp_path: Path) -> None:
    async with billing(tmp_path, keep_alive_after="50ms") as stand:
        key = await key_with(stand, requests_per_minute=2)
        for path, body, name in (
            ("/v1/messages", MESSAGE, "anthropic-ratelimit-requests-remaining"),
            ("/v1/chat/completions", CHAT, "x-ratelimit-remaining-requests"),
        ):
            stand.sim.set_all("stall", where="headers")
            async with stand.session.post(path, json={**body, "stream": True}, headers=key) as answer:
                assert answer.status == 200
                assert answer.headers[name] in ("1", "0")


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


PRIORITY = '"service_tier":"priority"'
SAID = '"messages":[{"role":"user","content":"\\"model\\": \\u00e9"}],"tools":[]'


BODIES: list[tuple[str, tuple[int, str]]] = [
    (f'{{"model":"gpt-5.4",{SAID}}}', (200, "standard")),
    (f'{{"model":"gpt-5.4",{PRIORITY},{SAID}}}', (200, "priority")),
    (f'{{"model":"gpt-5.4","service_tier":"flex",{SAID}}}', (200, "flex")),
    (f'{{"model":"gpt-5.4","service_tier":"auto",{SAID}}}', (200, "standard")),
    # Nested, they are something else.
    (f'{{"model":"gpt-5.4","metadata":{{"model":"a","Model":"b","service_tier":"c"}},{SAID}}}', (200, "standard")),
    (f'{{"model":"gpt-5.4","service_tier":"scale",{SAID}}}', (400, "model_price_missing")),
    (f'{{"model":"gpt-5.4","service_tier":"PRIORITY",{SAID}}}', (400, "model_price_missing")),
    (f'{{"model":"gpt-5.4","service_tier":["priority"],{SAID}}}', (400, "model_price_missing")),
    (f'{{"model":"gpt-5.4-pro",{SAID},"model":"gpt-5.4"}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4",{SAID},"Model":"gpt-5.4-pro"}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4-pro",{SAID},"mod\\u0065l":"gpt-5.4"}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4",{SAID},"\\u004dodel":"gpt-5.4-pro"}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4","Service_Tier":"priority",{SAID}}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4","\u017fervice_tier":"priority",{SAID}}}', (400, "invalid_value")),
    (f'{{"model":"gpt-5.4",{PRIORITY},"service_tier":"default",{SAID}}}', (400, "invalid_value")),
]  # fmt: skip


async def test_what_passes_as_it_is_is_priced_as_it_is_served(tmp_path: Path) -> None:
    """An upstream reads the caller's own words: none may be cheap here, and dear there."""
    upstream = SimUpstream("up", models=("gpt-5.4", "gpt-5.4-pro"))
    async with staged(tmp_path, upstream, ledger="billing") as stage:
        key = await key_with(stage.stand)
        headers = {**key, "content-type": "application/json"}
        for body, told_of in BODIES:
            async with stage.session.post(
                "/v1/chat/completions", data=body.encode(), headers=headers
            ) as answer:
                said = await answer.json()
            if told_of[0] == 200:
                row = (await rows(stage.stand))[-1]
                assert (answer.status, row["price_id"]) == (200, f"package/gpt-5.4/{told_of[1]}"), body
                assert row["tier"] in (told_of[1], "", "auto")
                assert upstream.asked[-1].body == body.encode()
            else:
                assert (answer.status, said["error"]["code"]) == told_of, body
        assert len(upstream.asked) == sum(status == 200 for _, (status, _) in BODIES)
        # Hidden behind what one reader follows, and another does not.
        for odd in ("[" * 1010 + "]" * 1010, "9" * 5000):
            body = f'{{"model":"gpt-5.4-pro",{SAID},"x":{odd},"model":"gpt-5.4"}}'
            async with stage.session.post(
                "/v1/chat/completions", data=body.encode(), headers=headers
            ) as answer:
                assert answer.status == 400, odd[:10]
        for model, status in ((None, 200), ("gpt-5.4", 200), ("gpt-5.4-pro", 400), (["gpt-5.4-pro"], 400)):
            asked = {"prompt": "hi", **({} if model is None else {"model": model})}
            found = await stage.post("/v1/engines/gpt-5.4/completions", asked, headers=key)
            assert found.status == status, model
        assert await ledger_of(stage.stand).check() == []


async def test_a_dear_model_is_not_paid_as_the_cheap_one_whose_name_it_begins_with(tmp_path: Path) -> None:
    """The map gives accounts another model for a name; an upstream that has the very model serves that."""
    models = ("gpt-5.4-pro", "gpt-5.4", "gpt-4o-2024-05-13")
    upstream = SimUpstream("up", models=models)
    maps = '{"gpt-5.4-pro": "gpt-5.4", "gpt-4o-2024-05-13": "gpt-4o"}'
    async with staged(tmp_path, upstream, ledger="billing", model_map=maps, each={"models": models}) as stage:
        key = await key_with(stage.stand)
        for model, paid in (
            ("gpt-5.4-pro", "gpt-5.4-pro"),
            ("gpt-5.4-high", "gpt-5.4"),
            ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
        ):
            answer = await stage.post(
                "/v1/chat/completions", {**CHAT, "model": model, "max_tokens": 50}, headers=key
            )
            assert answer.status == 200
            assert upstream.asked[-1].json["model"] == paid
            row = (await rows(stage.stand))[-1]
            assert row["price_id"] == f"package/{paid}/standard"
        cheap = await key_with(stage.stand, name="cheap", models=("gpt-5.4",))
        answer = await stage.post("/v1/chat/completions", {**CHAT, "model": "gpt-5.4-pro"}, headers=cheap)
        assert told(answer) == (400, "model_not_allowed")
