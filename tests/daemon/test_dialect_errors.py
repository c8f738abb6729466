"""Every failing path in every dialect: the status, the shape and the headers that a caller gets."""

import asyncio
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator import Script
from tests.harness import STANDARD, Answer, Stand, standing

KEY = "a-client-key-1"
IMPATIENT: dict[str, Any] = {"connect_timeout": 0.3, "first_byte_timeout": 0.3, "idle_timeout": 0.3}
SECRETS = re.compile(r"@example|\beyJ|\brt_|account_id|sim-")


@dataclass(frozen=True)
class Way:
    """One dialect, as a caller uses it."""

    name: str
    path: str
    body: Callable[[str], JsonObject]
    unknown_part: JsonObject
    """A body with a content part that nobody knows; its path is `where`."""
    where: str
    wrong_type: JsonObject
    wrong: str
    is_anthropic: bool = False


def _user(content: Any) -> list[JsonObject]:
    return [{"role": "user", "content": content}]


_ODD = [{"type": "text", "text": "a"}, {"type": "hologram", "data": "x"}]

WAYS = [
    Way(
        "chat",
        "/v1/chat/completions",
        lambda text: {"model": STANDARD, "messages": _user(text)},
        {"model": STANDARD, "messages": _user(_ODD)},
        "messages.0.content.1.type",
        {"model": STANDARD, "messages": 5},
        "messages",
    ),
    Way(
        "messages",
        "/v1/messages",
        lambda text: {"model": STANDARD, "max_tokens": 1000, "messages": _user(text)},
        {"model": STANDARD, "max_tokens": 1000, "messages": _user(_ODD)},
        "messages.0.content.1.type",
        {"model": STANDARD, "max_tokens": 1000, "messages": 5},
        "messages",
        is_anthropic=True,
    ),
    Way(
        "responses",
        "/v1/responses",
        lambda text: {"model": STANDARD, "input": _user(text)},
        {"model": STANDARD, "input": _user([{"text": "no type"}])},
        "input.0.content.0.type",
        {"model": STANDARD, "input": 5},
        "input",
    ),
    Way(
        "completions",
        "/v1/completions",
        lambda text: {"model": STANDARD, "prompt": text},
        {"model": STANDARD, "prompt": ["a", {"text": "b"}]},
        "prompt",
        {"model": STANDARD, "prompt": 5},
        "prompt",
    ),
]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
both = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def headers(way: Way) -> dict[str, str]:
    return {"x-api-key": KEY, **({"anthropic-version": "2023-06-01"} if way.is_anthropic else {})}


async def ask(stand: Stand, way: Way, text: str = "hi", *, stream: bool = False, **extra: Any) -> Answer:
    return await stand.post(way.path, {**way.body(text), "stream": stream, **extra}, headers=headers(way))


def check_shape(way: Way, answer: Answer) -> tuple[str, str | None, str]:
    """Assert the dialect's error shape; return type, code (None in Anthropic's) and message."""
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    body = answer.json
    error = body["error"]
    assert error["message"]
    assert not SECRETS.search(answer.body.decode())
    if way.is_anthropic:
        assert body.keys() == {"type", "error", "request_id"}
        assert (body["type"], error.keys()) == ("error", {"type", "message"})
        assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
        return error["type"], None, error["message"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return error["type"], error["code"], error["message"]


def frames(answer: Answer) -> list[tuple[str, Any]]:
    """Return the frames of a stream: the `event:` line and the JSON (or the bare word) of each."""
    found = []
    for block in answer.body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            kind = next((line[7:] for line in lines if line.startswith("event: ")), "")
            data = next(line[6:] for line in lines if line.startswith("data: "))
            found.append((kind, data if data == "[DONE]" else json.loads(data)))
    return found


def check_broken_end(way: Way, answer: Answer) -> None:
    """Assert that a stream ends with the dialect's own error and never looks finished."""
    assert answer.status == 200
    seen = frames(answer)
    kind, last = seen[-1]
    match way.name:
        case "messages":
            assert (kind, last["type"]) == ("error", "error")
            assert last["error"]["type"] in ("overloaded_error", "api_error", "rate_limit_error")
            assert not any(name in ("message_stop", "message_delta") for name, _ in seen)
        case "responses":
            assert (kind, last["type"]) == ("response.failed", "response.failed")
            assert last["response"]["error"]["message"]
            assert not any(name == "response.completed" for name, _ in seen)
        case _:
            assert last["error"]["message"]
            assert b"[DONE]" not in answer.body
            choices = [c for _, data in seen if isinstance(data, dict) for c in data.get("choices", [])]
            assert all(choice.get("finish_reason") is None for choice in choices)
    assert not SECRETS.search(answer.body.decode())


@every_way
@both
async def test_a_caller_without_a_key_is_told_so(way: Way, stream: bool, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, api_keys=f"[{KEY}]") as stand:
        for presented in ({}, {"x-api-key": "wrong"}, {"Authorization": "Bearer wrong"}):
            answer = await stand.post(way.path, {**way.body("hi"), "stream": stream}, headers=presented)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            kind, code, _ = check_shape(way, answer)
            assert (kind, code) == (
                ("authentication_error", None) if way.is_anthropic else ("invalid_request_error", "invalid_api_key")
            )  # fmt: skip
        assert not stand.sim.requests


@every_way
async def test_a_body_that_cannot_be_served_names_the_place(way: Way, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, api_keys=f"[{KEY}]") as stand:

        async def send(body: bytes) -> tuple[str, str | None, str]:
            sent = {**headers(way), "Content-Type": "application/json"}
            async with stand.session.post(way.path, data=io.BytesIO(body), headers=sent) as response:
                found = {k.lower(): v for k, v in response.headers.items()}
                answer = Answer(response.status, found, await response.read())
            assert answer.status == 400, answer.body
            kind, code, message = check_shape(way, answer)
            assert kind == "invalid_request_error"
            if not way.is_anthropic:
                places.append(answer.json["error"]["param"])
            return kind, code, message

        places: list[str | None] = []
        for broken in (b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"{}" + b"x", b'{"model": NaN}'):
            await send(broken)
        places.clear()
        _, _, message = await send(json.dumps(way.wrong_type).encode())
        assert way.wrong in message or places == [way.wrong]
        places.clear()
        _, _, message = await send(json.dumps(way.unknown_part).encode())
        assert way.where in message or places[0] is not None
        assert way.is_anthropic or (places[0] or "").startswith(way.where)
        places.clear()
        body = way.body("hi")
        del body["model"]
        _, _, message = await send(json.dumps(body).encode())
        assert "model" in message
        _, _, message = await send(json.dumps({**way.body("hi"), "stream": "yes"}).encode())
        assert "stream" in message
        assert not stand.sim.requests


@every_way
async def test_a_wrong_method_is_refused_in_the_dialects_words(way: Way, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        async with stand.session.delete(way.path) as response:
            answer = Answer(
                response.status, {k.lower(): v for k, v in response.headers.items()}, await response.read()
            )
        assert answer.status == 405
        assert "POST" in answer.headers["allow"]
        check_shape(way, answer)


def _deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@every_way
async def test_hostile_bodies_are_refused_or_served_within_a_second(way: Way, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, api_keys=f"[{KEY}]") as stand:
        plain = json.dumps(way.body("WORDS")).encode()
        huge = b"x" * 10_000_000
        hostile: dict[str, tuple[bytes, set[int]]] = {
            "deep objects": (plain.replace(b'"WORDS"', _deep(100_000)), {400}),
            "deep lists": (plain.replace(b'"WORDS"', b"[" * 100_000 + b"]" * 100_000), {400}),
            "deep metadata": (plain[:-1] + b',"metadata":' + _deep(5_000) + b"}", {200, 400}),
            "a long string": (plain.replace(b"WORDS", huge), {200}),
            "NUL": (plain.replace(b"WORDS", rb"a\u0000b"), {200}),
            "half a surrogate pair": (plain.replace(b"WORDS", rb"a\ud83db"), {200, 400}),
            "a number for the words": (plain.replace(b'"WORDS"', b"1e999"), {400}),
            "a list in a list": (plain.replace(b'"WORDS"', b'[["a"]]'), {400}),
            "many parts": (
                plain.replace(b'"WORDS"', b"[" + b",".join([b'{"type":"text"}'] * 20_000) + b"]"),
                {400},
            ),
        }
        for name, (body, statuses) in hostile.items():
            began = time.monotonic()
            sent = {**headers(way), "Content-Type": "application/json"}
            async with stand.session.post(way.path, data=io.BytesIO(body), headers=sent) as response:
                found = {k.lower(): v for k, v in response.headers.items()}
                answer = Answer(response.status, found, await response.read())
            # A slow machine with other tests on it has its share.
            assert time.monotonic() - began < 5.0, name
            assert answer.status in statuses, (name, answer.status, answer.body[:300])
            if answer.status >= 400:
                check_shape(way, answer)


@every_way
@both
async def test_a_pool_at_its_limit_says_when_and_stops_the_retrying(
    way: Way, stream: bool, tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=2, api_keys=f"[{KEY}]") as stand:
        for account in stand.accounts:
            account.set("usage_limit", resets_in=3600)
        for _ in range(2):
            answer = await ask(stand, way, stream=stream)
            assert answer.status == 429
            kind, code, _ = check_shape(way, answer)
            assert (kind, code) == (
                ("rate_limit_error", None) if way.is_anthropic else ("usage_limit_reached", "usage_limit_reached")
            )  # fmt: skip
            assert 3500 < int(answer.headers["retry-after"]) <= 3601
            assert answer.headers["x-should-retry"] == "false"
        assert len(stand.sim.turns) == 2


@every_way
@both
async def test_passing_trouble_everywhere_may_be_retried_soon(way: Way, stream: bool, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2, max_retry=1, api_keys=f"[{KEY}]") as stand:
        for account in stand.accounts:
            account.set("overloaded")
        answer = await ask(stand, way, stream=stream)
        kind, code, _ = check_shape(way, answer)
        if way.is_anthropic:
            assert (answer.status, kind) == (529, "overloaded_error")
        else:
            assert (answer.status, kind, code) == (429, "rate_limit_exceeded", "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert "x-should-retry" not in answer.headers


@every_way
@both
@pytest.mark.parametrize("state", ["payment", "forbidden", "cloudflare", "revoked", "not_found"])
async def test_an_accounts_trouble_is_never_the_callers(
    way: Way, stream: bool, state: str, tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0, api_keys=f"[{KEY}]") as stand:
        stand.accounts[0].set(state)
        answer = await ask(stand, way, stream=stream)
        assert answer.status not in (401, 402, 403, 404)
        assert answer.status >= 400
        _, _, message = check_shape(way, answer)
        assert "cloudflare" not in message.lower()


@every_way
@both
async def test_a_failure_before_the_first_word_goes_on_elsewhere(
    way: Way, stream: bool, tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=2, api_keys=f"[{KEY}]") as stand:
        stand.in_order()
        stand.accounts[0].set("overloaded_in_stream", times=1)
        answer = await ask(stand, way, "words", stream=stream)
        assert answer.status == 200
        assert b"pong" in answer.body
        assert b"overload" not in answer.body
        assert stand.tried() == [a.account_id for a in stand.accounts] or len(stand.tried()) == 2


@every_way
@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("failed", {"after": 4}),
        ("failed", {"after": 4, "how": "error"}),
        ("failed", {"after": 4, "code": "usage_limit_reached"}),
        ("failed", {"after": 4, "code": "insufficient_quota"}),
        ("cut", {"after": 5}),
        ("cut", {"after": 5, "clean": True}),
        ("stall", {"after": 6}),
    ],
    ids=lambda value: str(value),
)
async def test_a_failure_after_the_first_word_ends_in_the_dialects_error(
    way: Way, state: str, options: dict[str, Any], tmp_path: Path
) -> None:
    async with standing(tmp_path, accounts=2, api_keys=f"[{KEY}]", **IMPATIENT) as stand:
        for account in stand.accounts:
            account.set(state, **options)
        streamed = await ask(stand, way, "one two three four five six", stream=True)
        check_broken_end(way, streamed)
        assert len(stand.sim.turns) == 1
        await stand.idle()
        # The other account has the same trouble.
        plain = await ask(stand, way, "one two three four five six")
        assert plain.status >= 400
        check_shape(way, plain)


@every_way
@both
async def test_a_prompt_that_is_too_long_is_the_callers(way: Way, stream: bool, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=2, api_keys=f"[{KEY}]") as stand:
        for account in stand.accounts:
            account.set("context_length")
        answer = await ask(stand, way, stream=stream)
        assert answer.status == 400
        kind, code, message = check_shape(way, answer)
        if way.is_anthropic:
            # The words by which Claude Code knows that it has to compact.
            assert re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", message)
            used, most = map(int, re.findall(r"\d+", message))
            assert used > most
            assert kind == "invalid_request_error"
        else:
            assert code == "context_length_exceeded"
        assert len(stand.sim.turns) == 1


# --- signs of life before an account has answered

EARLY = [way for way in WAYS if way.name != "responses"]
early_way = pytest.mark.parametrize("way", EARLY, ids=lambda way: way.name)


def signs(answer: Answer) -> int:
    text = answer.body.decode()
    return (
        text.count('data: {"type": "ping"}')
        + text.count('data: {"type":"ping"}')
        + text.count(": keep-alive")
    )


@early_way
async def test_a_waiting_caller_sees_life_and_another_account_still_takes_over(
    way: Way, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"keep_alive_after": 0.1, "first_byte_timeout": 0.8, "api_keys": f"[{KEY}]"}
    async with standing(tmp_path, accounts=2, **settings) as stand:
        stand.in_order()
        stand.accounts[0].set("stall", where="headers", seconds=30)
        began = time.monotonic()
        async with stand.session.post(
            way.path, json={**way.body("hi"), "stream": True}, headers=headers(way)
        ) as response:
            assert response.status == 200
            first = await response.content.readany()
            assert time.monotonic() - began < 0.75, "the head came with the answer, not before it"
            rest = await response.read()
        answer = Answer(200, {"content-type": "text/event-stream"}, first + rest)
        assert signs(answer) >= 2
        assert b"pong" in answer.body
        assert len(stand.tried()) == 2
        kinds = [kind for kind, _ in frames(answer) if kind != "ping"]
        if way.is_anthropic:
            assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        else:
            assert frames(answer)[-1][1] == "[DONE]"


@early_way
async def test_after_a_sign_of_life_a_failure_goes_into_the_stream(way: Way, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "keep_alive_after": 0.1, "first_byte_timeout": 0.4, "max_retry": 0, "api_keys": f"[{KEY}]",
    }  # fmt: skip
    async with standing(tmp_path, accounts=1, **settings) as stand:
        stand.accounts[0].set("stall", where="headers", seconds=30)
        answer = await ask(stand, way, stream=True)
        assert answer.status == 200
        assert signs(answer) >= 1
        check_broken_end(way, answer)


async def test_responses_stay_open_for_their_status(tmp_path: Path) -> None:
    way = next(way for way in WAYS if way.name == "responses")
    async with standing(
        tmp_path, accounts=1, keep_alive_after=0.05, first_byte_timeout=0.4, max_retry=0, api_keys=f"[{KEY}]"
    ) as stand:
        stand.accounts[0].set("stall", where="headers", seconds=30)
        answer = await ask(stand, way, stream=True)
        assert answer.status == 429


@early_way
async def test_a_silent_backend_in_the_middle_is_bridged_by_signs_of_life(way: Way, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"keep_alive_after": 0.05, "api_keys": f"[{KEY}]"}
    async with standing(tmp_path, accounts=1, **settings) as stand:
        stand.accounts[0].scripts.append(Script.text("one two three four", delay=0.2))
        answer = await ask(stand, way, stream=True)
        assert signs(answer) >= 3
        assert answer.status == 200
        assert not any("error" in str(kind) for kind, _ in frames(answer))


@early_way
async def test_a_caller_who_leaves_while_it_waits_frees_the_account(way: Way, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"keep_alive_after": 0.05, "api_keys": f"[{KEY}]"}
    async with standing(tmp_path, accounts=1, **settings) as stand:
        stand.accounts[0].set("stall", where="headers", seconds=30)
        response = await stand.session.post(
            way.path, json={**way.body("hi"), "stream": True}, headers=headers(way)
        )
        await response.content.readany()
        response.close()
        await stand.idle()
        (turn,) = stand.sim.turns
        await asyncio.wait_for(turn.closed.wait(), 5)
        assert turn.cancelled
        assert stand.known(stand.accounts[0]).state.value == "ready"
