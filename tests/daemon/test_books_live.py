"""The ledger under a real daemon: what a turn costs, who may begin one, and that all of it adds up."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import NO_LIMITS, Limits, User
from codex_proxy.ledger.money import NANOS
from codex_proxy.ledger.tables import usage
from codex_proxy.server.access import Level
from codex_proxy.server.app import ROUTES, Takes
from codex_proxy.server.delivery import EncodedSink
from codex_proxy.simulator import Script, compose
from codex_proxy.simulator.checks import seal
from codex_proxy.simulator.faults import Reply
from tests.harness import STANDARD, Answer, Stand, question, standing

CENT = NANOS // 100


@contextlib.asynccontextmanager
async def billing(folder: Path, **settings: object) -> AsyncIterator[Stand]:
    async with standing(folder, **{"ledger": "billing", **settings}) as stand:  # type: ignore[arg-type]
        yield stand


def ledger_of(stand: Stand) -> Ledger:
    assert stand.daemon.books is not None
    return stand.daemon.books.ledger


async def customer(
    stand: Stand, money: int, *, name: str = "ada", limits: Limits = NO_LIMITS
) -> tuple[User, dict[str, str]]:
    """Make a user with *money* and a key; return the user and the header that shows the key."""
    ledger = ledger_of(stand)
    user = await ledger.create_user(name, is_billed=True, limits=limits, actor="test")
    if money:
        await ledger.credit(
            user.id, money, kind="credit", reason="test", idempotency_key=f"first-{name}", actor="test"
        )
    _, text = await ledger.create_key(user.id, "laptop", limits=NO_LIMITS, expires=None, actor="test")
    return user, {"Authorization": f"Bearer {text}"}


async def rows(stand: Stand) -> list[Mapping[str, Any]]:
    """Return the usage rows, the oldest first, once every turn has settled."""
    await stand.idle()

    def ask(connection: Any) -> list[Mapping[str, Any]]:
        return [dict(row) for row in connection.execute(usage.select().order_by(usage.c.id)).mappings()]

    ledger = ledger_of(stand)
    # Whatever was put in before this is done before it.
    await ledger.write(lambda _: None)
    return await ledger.read(ask)


def balance(stand: Stand, user: User) -> tuple[int, int]:
    now = ledger_of(stand).directory.user(user.id)
    assert now is not None
    return now.balance, now.held


async def test_a_turn_is_paid_once_by_its_real_tokens(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        user, key = await customer(stand, 10 * NANOS)
        answer = await stand.ask(headers=key, stream=False)
        assert answer.status == 200
        (row,) = await rows(stand)
        told = answer.json["usage"]
        assert (row["input_tokens"], row["output_tokens"]) == (told["input_tokens"], told["output_tokens"])
        assert row["source"] == "backend"
        # $5 a million tokens in, $30 out; cached ones are a tenth.
        cached = told["input_tokens_details"]["cached_tokens"]
        cost = (told["input_tokens"] - cached) * 5_000 + cached * 500 + told["output_tokens"] * 30_000
        assert row["cost"] == row["debit"] == cost > 0
        assert balance(stand, user) == (10 * NANOS - cost, 0)
        assert await ledger_of(stand).check() == []


async def test_the_owners_keys_are_counted_and_never_pay(tmp_path: Path) -> None:
    async with billing(tmp_path, api_keys="{home: key-of-the-owner}") as stand:
        answer = await stand.ask(headers={"Authorization": "Bearer key-of-the-owner"}, stream=False)
        assert answer.status == 200
        (row,) = await rows(stand)
        assert row["user_id"] == "owner"
        assert row["cost"] > 0
        assert row["debit"] == 0
        assert not row["is_billed"]


CHAT = {"model": STANDARD, "messages": [{"role": "user", "content": "hi"}]}
MESSAGES = {**CHAT, "max_tokens": 100}

REFUSALS: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/responses", question(), 429, "insufficient_quota"),
    ("/v1/responses", question(stream=False), 429, "insufficient_quota"),
    ("/v1/chat/completions", CHAT, 429, "insufficient_quota"),
    ("/v1/chat/completions", {**CHAT, "stream": True}, 429, "insufficient_quota"),
    ("/v1/messages", MESSAGES, 402, "billing_error"),
    ("/v1/messages", {**MESSAGES, "stream": True}, 402, "billing_error"),
    ("/v1/completions", {"model": STANDARD, "prompt": "hi"}, 429, "insufficient_quota"),
]


async def test_nobody_without_money_is_served_and_each_hears_it_in_its_own_words(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        user, key = await customer(stand, 0)
        for path, body, status, word in REFUSALS:
            answer = await stand.post(path, body, headers=key)
            assert answer.status == status, path
            error = answer.json["error"]
            assert word in (error.get("code"), error.get("type")), path
            assert answer.headers["x-should-retry"] == "false"
        assert stand.sim.turns == []
        assert balance(stand, user) == (0, 0)
        assert await ledger_of(stand).check() == []


async def test_money_for_ten_serves_at_most_ten_of_fifty_at_once(tmp_path: Path) -> None:
    async with billing(tmp_path, reserve_tokens=256) as stand:
        user, key = await customer(stand, CENT * 8)
        stand.sim.script(*[Script.long_text(60, delay=0.002) for _ in range(50)])
        answers = await asyncio.gather(*[stand.ask(headers=key) for _ in range(50)])
        served = [one for one in answers if one.status == 200]
        assert {one.status for one in answers} == {200, 429}
        paid = await rows(stand)
        assert len([row for row in paid if row["debit"]]) == len(served) <= 10
        assert all(row["shortfall"] == 0 for row in paid)
        left, held = balance(stand, user)
        assert held == 0
        assert 0 <= left == CENT * 8 - sum(row["debit"] for row in paid)
        assert await ledger_of(stand).check() == []


async def test_who_leaves_pays_for_what_was_read_and_written(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        user, key = await customer(stand, NANOS)
        stand.sim.script(Script.long_text(1000, delay=0.005))
        async with stand.asking(headers=key) as response:
            assert response.status == 200
            await response.content.readany()
        (row,) = await rows(stand)
        assert row["end"] == "caller_gone"
        assert row["source"] == "estimate"
        assert row["input_tokens"] > 0
        assert 0 < row["debit"] == row["cost"]
        assert balance(stand, user) == (NANOS - row["debit"], 0)


async def test_what_no_account_answered_costs_nothing(tmp_path: Path) -> None:
    async with billing(tmp_path, max_retry=1) as stand:
        user, key = await customer(stand, NANOS)
        for account in stand.accounts:
            account.script(*[Script.state("server_error", status=500)] * 9)
        answer = await stand.ask(headers=key)
        assert answer.status == 429
        for row in await rows(stand):
            assert not row["debit"]
            assert row["cost"] in (0, None)
        assert balance(stand, user) == (NANOS, 0)
        assert await ledger_of(stand).check() == []


async def test_a_stream_whose_money_ends_is_cut_with_the_dialects_own_error(tmp_path: Path) -> None:
    async with billing(tmp_path, reserve_tokens=256) as stand:
        # For the first step, and not for many more.
        user, key = await customer(stand, CENT)
        stand.sim.script(Script.long_text(3000, delay=0.0005))
        answer = await stand.ask(headers=key)
        assert answer.status == 200
        assert answer.types[-1] == "response.failed"
        assert answer.events[-1].json["response"]["error"]["code"] == "insufficient_quota"
        (row,) = await rows(stand)
        assert row["debit"] > 0
        left, held = balance(stand, user)
        assert left >= 0 == held
        assert await ledger_of(stand).check() == []
        # The account did nothing wrong.
        assert {account.state.value for account in stand.daemon.pool.accounts()} == {"ready"}


async def test_what_is_thought_and_comes_sealed_needs_money_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may think for a dollar and say a word."""
    monkeypatch.setattr(compose, "seal", lambda *args, **fields: seal(*args, **fields) + "A" * 40_000)
    async with billing(tmp_path, reserve_tokens=256) as stand:
        user, key = await customer(stand, 3 * CENT)
        stand.sim.script(Script.reasoning("Hm.", text="word " * 50, delay=0.005))
        answer = await stand.ask(headers=key)
        # 7,500 tokens, at 30 dollars a million.
        assert answer.events[-1].json["response"]["error"]["code"] == "insufficient_quota"
        assert "word word" not in answer.text
        await ledger_of(stand).credit(user.id, NANOS, reason="test", idempotency_key="more", actor="test")
        stand.sim.script(Script.reasoning("Hm.", text="word " * 50))
        assert (await stand.ask(headers=key)).types[-1] == "response.completed"
        await rows(stand)
        assert balance(stand, user)[1] == 0


async def test_a_compaction_that_says_nothing_of_its_tokens_costs_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with billing(tmp_path) as stand:
        _, key = await customer(stand, NANOS)
        said: list[Any] = [None, {}, {"input_tokens": 0, "output_tokens": 0}, {"input_tokens": "9"}, [], "9"]
        for usage in said:
            body = json.dumps({"output": [], "usage": usage}).encode()
            monkeypatch.setattr(Reply, "json", lambda *_, body=body, **__: Reply(200, body))
            assert (await stand.post("/v1/responses/compact", BODIES["compact"], headers=key)).body == body
        assert [row["source"] for row in await rows(stand)] == ["estimate"] * len(said)
        assert all(row["debit"] > 0 for row in await rows(stand))


async def test_a_picture_that_streams_is_paid_as_it_says_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cost stands behind a picture of any size; without that nobody would pay for more than the prompt."""
    usage = {"input_tokens": 50, "output_tokens": 4000, "input_tokens_details": {"text_tokens": 50}}
    frames = "".join(
        f"event: {kind}\ndata: {json.dumps({'type': kind, 'b64_json': 'A' * 20_000, **more})}\n\n"
        for kind, more in (
            ("image_generation.partial_image", {"partial_image_index": 0}),
            ("image_generation.completed", {"usage": usage}),
        )
    )
    body = frames.encode()
    async with billing(tmp_path) as stand:
        _, key = await customer(stand, 100 * NANOS)
        assert stand.daemon.books is not None
        await stand.daemon.books.pricing.set(
            "gpt-image-2", None, None, {"input": "5", "output": "40"}, actor="t"
        )
        monkeypatch.setattr(Reply, "json", lambda *_, **__: Reply(200, body, "text/event-stream"))
        answer = await stand.post(
            "/v1/images/generations", {**BODIES["images_generations"], "stream": True}, headers=key
        )
        assert (answer.status, answer.body) == (200, body)
        (row,) = await rows(stand)
        assert (row["input_tokens"], row["output_tokens"], row["source"]) == (50, 4000, "backend")
        assert row["debit"] == 50 * 5_000 + 4000 * 40_000


async def test_a_turn_whose_story_cannot_be_told_gives_back_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with billing(tmp_path) as stand:
        user, key = await customer(stand, NANOS)
        with monkeypatch.context() as patch:
            patch.setattr(EncodedSink, "usage", lambda *_, **__: 1 / 0)
            await stand.ask(headers=key, stream=False)
            books = stand.daemon.books
            assert books is not None
            await stand.until(lambda: books.gate.places.taken == 0)
        await ledger_of(stand).write(lambda _: None)
        assert balance(stand, user)[1] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "word"), [one for one in REFUSALS if not one[1].get("stream")]
)
async def test_a_whole_answer_whose_money_ends_is_refused_as_one_without_money(
    tmp_path: Path, path: str, body: dict[str, Any], status: int, word: str
) -> None:
    """Whoever took it for passing trouble would ask again, and pay for each try."""
    async with billing(tmp_path, reserve_tokens=256) as stand:
        user, key = await customer(stand, CENT)
        stand.sim.script(Script.long_text(1000, delay=0.0005))
        answer = await stand.post(
            path, {**body, **({"max_tokens": 9000} if "max_tokens" in body else {})}, headers=key
        )
        error = answer.json["error"]
        assert (answer.status, answer.headers["x-should-retry"]) == (status, "false")
        assert word in (error.get("code"), error.get("type"))
        assert "used up" in error["message"]
        assert "retry-after" not in answer.headers
        (row,) = await rows(stand)
        assert (row["status"], row["error"], row["end"]) == (status, "insufficient_quota", "failed")
        assert row["debit"] > 0
        assert balance(stand, user)[1] == 0


async def test_an_unpriced_model_is_refused_where_money_is_taken(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        _, key = await customer(stand, NANOS)
        answer = await stand.ask(headers=key, model="gpt-9-nobody-knows")
        assert (answer.status, answer.json["error"]["code"]) == (400, "model_price_missing")
        assert answer.json["error"]["param"] == "model"
        assert stand.sim.turns == []


async def test_personal_mode_counts_and_takes_nothing(tmp_path: Path) -> None:
    async with standing(tmp_path, ledger="personal") as stand:
        user, key = await customer(stand, 0)
        assert (await stand.ask(headers=key, stream=False)).status == 200
        (row,) = await rows(stand)
        assert row["cost"] > 0 == row["debit"]
        assert balance(stand, user) == (0, 0)


async def test_a_revoked_key_is_refused_at_once_also_on_an_open_socket(tmp_path: Path) -> None:
    async with billing(tmp_path) as stand:
        user, key = await customer(stand, NANOS)
        ledger = ledger_of(stand)
        (one,) = [found for found in ledger.directory.keys() if found.user_id == user.id]  # noqa: SIM118 -- no mapping
        async with stand.session.ws_connect("/v1/responses", headers=key) as socket:
            await socket.send_json({"type": "response.create", **question()})
            types: list[str] = []
            while not types or types[-1] != "response.completed":
                types.append((await socket.receive_json(timeout=5.0))["type"])
            await ledger.revoke_key(one.id, "test")
            assert (await stand.ask(headers=key)).status == 401
            await socket.send_json({"type": "response.create", **question()})
            said = await socket.receive(timeout=5.0)
            assert "response.created" not in str(said.data)
        assert len(stand.sim.turns) == 1


# What needs a key and never reaches a backend, so that there is nothing to pay.
FREE = {
    "input_tokens": "counted here",
    "count_tokens": "counted here",
    "models": "a list that we have",
    "model": "a list that we have",
    "usage": "how the pool does",
    "responses_socket": "each of its turns passes the gate; see the test of sockets",
}

BODIES: dict[str, dict[str, Any]] = {
    "responses": question(),
    "compact": {"model": STANDARD, "input": question()["input"]},
    "alpha_search": {"model": STANDARD, "query": "q", "input": question()["input"]},
    "images_generations": {"model": "gpt-image-2", "prompt": "p"},
    "images_edits": {
        "model": "gpt-image-2",
        "prompt": "p",
        "images": [{"image_url": "data:image/png;base64,AA=="}],
    },
    "chat": CHAT,
    "completions": {"model": STANDARD, "prompt": "hi"},
    "engine_completions": {"prompt": "hi"},
    "edits": {"model": STANDARD, "input": "hi", "instruction": "shout"},
    "embeddings": {"model": "text-embedding-3-small", "input": "hi"},
    "messages": MESSAGES,
}


async def test_every_route_passes_the_gate(tmp_path: Path) -> None:
    """Whoever may use nothing at all reaches a backend by no path."""
    keyed = [route for route in ROUTES if route.level is Level.KEYED]
    assert {route.handler for route in keyed} == BODIES.keys() | FREE.keys()
    async with billing(tmp_path) as stand:
        _, key = await customer(stand, NANOS, limits=Limits(endpoints=("nothing",), models=("nothing",)))
        for route in keyed:
            for path in route.paths:
                path = path.replace("{engine}", STANDARD).replace("{model}", STANDARD)
                if route.handler in FREE:
                    continue
                assert route.takes is not Takes.NOTHING
                answer = await stand.post(path, BODIES[route.handler], headers=key)
                codes = {
                    400: ("endpoint_not_allowed", "model_not_allowed"),
                    403: (None,),
                    404: ("model_not_found",),
                }
                assert answer.status in codes, (path, answer.body)
                assert answer.json["error"].get("code") in codes[answer.status], (path, answer.body)
        async with stand.session.ws_connect("/v1/responses", headers=key) as socket:
            await socket.send_json({"type": "response.create", **question()})
            said = await socket.receive_json(timeout=5.0)
            assert said["type"] in ("error", "response.failed")
            assert "not_allowed" in str(said)
        assert stand.sim.turns == []


async def test_a_daemon_without_a_ledger_knows_nothing_of_one(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
from tests.harness import standing

async def main():
    async with standing(pathlib.Path({str(tmp_path)!r})) as stand:
        assert (await stand.ask()).status == 200
    print(sorted(name for name in sys.modules if name.startswith(("codex_proxy.ledger", "sqlalchemy", "alembic"))))

asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not [path.name for path in (tmp_path / "data").iterdir() if "ledger" in path.name]


async def test_a_second_daemon_on_the_same_ledger_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codex_proxy.ledger.ledger._LOCK_SECONDS", 0.5)
    async with billing(tmp_path):
        second = tmp_path / "second"
        second.mkdir()
        with pytest.raises(Exception, match="ledger"):
            async with billing(second, data_dir=tmp_path / "data"):
                pass


async def test_all_that_was_under_way_is_settled_at_the_end(tmp_path: Path) -> None:
    async with billing(tmp_path, drain_timeout=0.2) as stand:
        user, key = await customer(stand, NANOS)
        stand.sim.script(Script.long_text(5000, delay=0.01))
        asking = asyncio.get_running_loop().create_task(stand.ask(headers=key))
        await stand.until(lambda: balance(stand, user)[1] > 0)
        await asyncio.sleep(0.1)
        await stand.daemon.stop()
        answer: Answer = await asking
        assert answer.status == 200
    async with billing(tmp_path) as stand:
        (row,) = await rows(stand)
        assert row["debit"] > 0
        assert balance(stand, user) == (NANOS - row["debit"], 0)
        assert await ledger_of(stand).check() == []
