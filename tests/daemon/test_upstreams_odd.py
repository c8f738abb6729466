"""Providers that are broken, hostile or merely unlike others, and what a turn there costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from codex_proxy.ledger.model import Limits
from codex_proxy.ledger.money import NANOS
from codex_proxy.simulator.upstream import SimUpstream
from codex_proxy.trace import UsageSource
from tests.daemon.test_books_live import CENT, balance, customer, ledger_of, rows
from tests.daemon.upstreams import Stage, staged

CHAT: dict[str, Any] = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi there"}]}
MESSAGES: dict[str, Any] = {
    "model": "claude-opus-4-1",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "hi"}],
}
PLAIN = {"Content-Type": "application/json"}
STREAM = {"Content-Type": "text/event-stream"}


def answers(stage: Stage, body: Any, headers: Mapping[str, str] = PLAIN, status: int = 200) -> None:
    """Let the upstream answer just so."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    stage.up.well()
    stage.up.fault("status", status=status, body=data, headers=headers)


def completion(text: str, usage: Any = None, *, count: int = 1) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice] * count, "usage": usage}


# -- money ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    [{}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": -5}, {"prompt_tokens": 2**60}],
)
async def test_usage_that_says_nothing_makes_nothing_free(tmp_path: Path, usage: dict[str, Any]) -> None:
    text = b'data: {"choices":[{"delta":{"content":"hello world"},"finish_reason":"stop"}]}\n\n'
    last = b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n"
    async with staged(tmp_path, SimUpstream()) as stage:
        for stream in (False, True):
            if stream:
                answers(stage, text + last, STREAM)
            else:
                answers(stage, completion("hello world", usage))
            assert (await stage.post("/v1/chat/completions", {**CHAT, "stream": stream})).status == 200
            told = stage.trace.usage
            assert told.source is UsageSource.ESTIMATE
            assert told.input_tokens > 10
            assert told.output_tokens == 3
        answers(
            stage,
            b'data: {"type":"response.output_text.delta","item_id":"m","output_index":0,"delta":"hello world"}\n\n'
            b'data: {"type":"response.completed","response":{"id":"r","output":[],"usage":{"input_tokens":0}}}\n\n',
            STREAM,
        )
        # Translated too.
        stage.describe(capabilities=("responses",))
        assert (await stage.post("/v1/chat/completions", CHAT)).status == 200
        assert stage.trace.usage.source is UsageSource.ESTIMATE
        assert stage.trace.usage.input_tokens > 10


async def test_many_answers_are_held_for_as_many_times(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), ledger="billing") as stage:
        user, key = await customer(stage.stand, 2 * CENT)
        for path, body in (
            ("/v1/chat/completions", {**CHAT, "n": 50, "max_tokens": 100}),
            ("/v1/completions", {"model": "gpt-5.5", "prompt": ["a"] * 50, "max_tokens": 100}),
            (
                "/v1/completions",
                {"model": "gpt-5.5", "prompt": "a", "best_of": 50, "n": 1, "max_tokens": 100},
            ),
        ):
            answer = await stage.post(path, body, headers=key)
            assert (answer.status, answer.json["error"]["code"]) == (429, "insufficient_quota")
        assert stage.up.turns == []
        assert balance(stage.stand, user) == (2 * CENT, 0)


async def test_a_plain_answer_is_not_begun_that_might_not_be_paid(tmp_path: Path) -> None:
    """It comes whole, so all that the model can write has to be there before."""
    async with staged(tmp_path, SimUpstream(), ledger="billing") as stage:
        user, key = await customer(stage.stand, 30 * CENT)
        answer = await stage.post("/v1/chat/completions", CHAT, headers=key)
        assert (answer.status, answer.json["error"]["code"]) == (429, "insufficient_quota")
        assert "limit of its output" in answer.json["error"]["message"]
        assert stage.up.turns == []
        assert balance(stage.stand, user) == (30 * CENT, 0)
        for less in ({"max_tokens": 100}, {"stream": True}):
            assert (await stage.post("/v1/chat/completions", CHAT | less, headers=key)).status == 200
        await ledger_of(stage.stand).credit(
            user.id, 400 * CENT, kind="credit", reason="r", idempotency_key="more", actor="test"
        )
        answers(stage, completion("x" * 200_000, {"prompt_tokens": 11, "completion_tokens": 50_000}))
        assert (await stage.post("/v1/chat/completions", CHAT, headers=key)).status == 200
        last = (await rows(stage.stand))[-1]
        assert (last["output_tokens"], last["shortfall"]) == (50_000, 0)
        assert await ledger_of(stage.stand).check() == []


async def test_an_answer_that_is_to_be_fetched_later_is_refused(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        answer = await stage.ask(stream=False, background=True)
        assert (answer.status, answer.json["error"]["param"]) == (400, "background")
        assert stage.up.turns == []


async def test_the_model_that_is_asked_is_the_one_that_is_paid_and_allowed(tmp_path: Path) -> None:
    message = {
        "type": "message",
        "content": [{"type": "text", "text": "hi"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1000, "output_tokens": 100},
    }
    async with staged(tmp_path, SimUpstream(), accounts=1, ledger="billing", each={"priority": -1}) as stage:
        # Accounts serve it by a model of theirs, whose price is no other's.
        _, key = await customer(stage.stand, NANOS)
        for path, body in (("/v1/messages", MESSAGES), ("/v1/chat/completions", {**MESSAGES, "n": 2})):
            answers(stage, message)
            answer = await stage.post(path, body, headers=key)
            assert (answer.status, b"there is no price" in answer.body) == (400, True)
        await _price(stage, "claude-opus-4-1", "15", "75")
        answer = await stage.post("/v1/messages", MESSAGES, headers=key)
        assert answer.status == 200
        row = (await rows(stage.stand))[-1]
        assert (row["model"], row["cost"]) == ("claude-opus-4-1", 1000 * 15_000 + 100 * 75_000)
        # An account's turn costs what its own model costs.
        stage.afresh()
        stage.up.fault("status", status=500)
        assert (await stage.post("/v1/messages", MESSAGES, headers=key)).status == 200
        row = (await rows(stage.stand))[-1]
        assert (row["upstream"], row["model"].startswith("gpt-")) == ("", True)
        # Whoever may use the accounts' model may not use that one for it.
        _, key = await customer(stage.stand, NANOS, name="bob", limits=Limits(models=("gpt-*",)))
        assert (await stage.post("/v1/messages", MESSAGES, headers=key)).status == 403
        assert await ledger_of(stage.stand).check() == []


async def _price(stage: Stage, model: str, read: str, written: str) -> None:
    assert stage.daemon.books is not None
    await stage.daemon.books.pricing.set(
        model, "standard", 0, {"input": read, "output": written}, actor="test"
    )


# -- what is no answer ---------------------------------------------------------------------


async def test_a_page_is_no_answer(tmp_path: Path) -> None:
    async with staged(
        tmp_path, SimUpstream("up"), SimUpstream("b"), by_name={"up": {"priority": 1}}
    ) as stage:
        page = b"<html>\n\n" + (b"<p>canary" + b" " * 1000 + b"</p>\n\n") * 4_500
        for headers in ({"Content-Type": "text/html"}, STREAM):
            stage.afresh()
            answers(stage, page, headers)
            answer = await stage.post("/v1/chat/completions", {**CHAT, "stream": True})
            assert (answer.status, stage.trace.upstream) == (200, "b")
            assert b"canary" not in answer.body


async def test_words_of_its_key_and_purse_do_not_reach_the_caller(tmp_path: Path) -> None:
    async with staged(
        tmp_path, SimUpstream("up"), SimUpstream("b"), by_name={"up": {"priority": 1}}
    ) as stage:
        for words, state in (
            ("Your credit balance is too low to access the Anthropic API.", "degraded"),
            ("API key not valid. Please pass a valid API key.", "disabled"),
        ):
            stage.afresh()
            answers(stage, {"error": {"type": "invalid_request_error", "message": words}}, status=400)
            assert (await stage.ask()).status == 200
            assert stage.trace.upstream == "b"
            assert stage.state()["state"] == state
        # What repeats the caller's words is not believed.
        stage.afresh()
        words = "Invalid value: 'Your credit balance is too low'"
        answers(stage, {"error": {"type": "invalid_request_error", "message": words}}, status=400)
        assert (await stage.ask()).status == 400
        assert stage.state()["state"] == "healthy"


async def test_what_a_request_refers_to_in_vain_takes_no_model_from_others(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        for error in (
            {"message": "Item with id 'rs_1' not found.", "type": "invalid_request_error", "param": "input"},
            {"message": "No such File object: file-1", "type": "invalid_request_error"},
        ):
            stage.up.well()
            stage.up.fault("status", times=1, status=404, body=orjson.dumps({"error": error}), headers=PLAIN)
            answer = await stage.ask(stream=False)
            assert (answer.status, answer.json["error"]["message"]) == (400, error["message"])
            assert stage.state()["lacking"] == []
            assert (await stage.ask()).status == 200


# -- 403 -----------------------------------------------------------------------------------


async def test_one_403_is_about_its_request_and_three_in_a_row_are_not(tmp_path: Path) -> None:
    async with staged(
        tmp_path, SimUpstream("up"), SimUpstream("b"), by_name={"up": {"priority": 1}}
    ) as stage:
        up = stage.up

        async def ask(session: str) -> str:
            assert (await stage.ask(headers={"session_id": session})).status == 200
            return stage.trace.upstream

        # One conversation, however often it tries, takes nobody else's upstream away.
        up.fault("status", status=403, paths="/v1/responses")
        for _ in range(5):
            assert await ask("flagged") == "b"
        assert len(up.turns) == 5
        assert stage.state()["state"] == "degraded"
        up.well()
        assert await ask("other") == "up"
        assert stage.state()["state"] == "healthy"
        up.fault("status", status=403, paths="/v1/responses")
        for number in range(3):
            assert await ask(f"new {number}") == "b"
        assert stage.state()["state"] == "disabled"
        assert await ask("one more") == "b"
        assert len(up.turns) == 9
        # Its key is good for the list of models.
        await stage.daemon.providers.check_all()
        assert stage.state()["state"] == "healthy"


async def test_a_lone_upstream_whose_key_is_refused_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        stage.up.fault("status", status=401)
        answer = await stage.ask()
        assert (answer.status, answer.json["error"]["code"]) == (429, "no_account_available")
        assert "retry-after" not in answer.headers
        assert stage.trace.seconds < 0.4


async def test_one_that_cannot_be_asked_for_the_usage_of_a_stream_serves_without(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        words = "Extra inputs are not permitted: stream_options"
        stage.up.fault("status", times=1, status=422, message=words)
        for turns in (2, 3):
            answer = await stage.post("/v1/chat/completions", {**CHAT, "stream": True})
            assert (answer.status, len(stage.up.turns)) == (200, turns)
            assert "stream_options" not in stage.up.turns[-1].json
            assert stage.trace.usage.source is UsageSource.ESTIMATE
        # Whose own words are repeated makes nothing worse for others.
        stage.afresh()
        stage.daemon.providers.all()[0].takes_usage_option = True
        stage.up.fault("status", times=2, status=400, message="Invalid value: 'include_usage'")
        assert (await stage.post("/v1/chat/completions", {**CHAT, "stream": True})).status == 400
        assert (await stage.post("/v1/chat/completions", {**CHAT, "stream": True})).status == 200
        assert stage.trace.usage.source is UsageSource.BACKEND
        # Whoever asks for it is told what is wrong.
        stage.up.fault("status", times=1, status=422, message=words)
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        assert (await stage.post("/v1/chat/completions", body)).status == 422
