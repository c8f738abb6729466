"""Upstreams beside the accounts: native forwarding, in every dialect, through the whole daemon."""

import asyncio
import base64
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from codex_proxy.simulator.upstream import SimUpstream
from codex_proxy.trace import End, UsageSource
from tests.daemon.upstreams import Stage, staged
from tests.harness import CODEX_HEADERS, Answer, question

CHAT = {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hello out there"}]}
MESSAGES = {**CHAT, "max_tokens": 100}
RESPONSES = {"model": "gpt-5.5", "input": "hello out there"}
COMPLETION = {"model": "gpt-5.5", "prompt": "hello out there"}
EDIT = {"model": "gpt-5.5", "input": "hello out there", "instruction": "shout"}

DIALECTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/responses", RESPONSES),
    ("/v1/messages", MESSAGES),
    ("/v1/completions", COMPLETION),
    ("/v1/engines/gpt-5.5/completions", {"prompt": "hello out there"}),
]


async def test_a_plain_request_and_its_answer_pass_as_they_are(tmp_path: Path) -> None:
    async with straight() as (other, direct), staged(tmp_path, SimUpstream()) as stage:
        for path, body in [*DIALECTS, ("/v1/edits", EDIT)]:
            stage.afresh()
            raw = orjson.dumps(body, option=orjson.OPT_INDENT_2)
            headers = {"Content-Type": "application/json"}
            async with stage.session.post(path, data=raw, headers=headers) as answer:
                assert answer.status == 200, await answer.read()
                got = await answer.read()
            (asked,) = stage.up.turns
            # Not a byte of it is another one.
            assert (asked.path, asked.body) == (path, raw)
            expected = await (await direct.post(path, json=body)).read()
            assert got == expected.replace(other.name.encode(), b"up")
            trace = stage.trace
            assert (trace.alias, trace.upstream, trace.end) == ("up", "up", End.COMPLETED)
            assert trace.usage.source is UsageSource.BACKEND
            assert trace.usage.input_tokens
            tries = [(one.alias, one.outcome, one.is_upstream) for one in trace.attempts]
            assert tries == [("up", "ok", True)]


async def test_a_stream_passes_as_it_is(tmp_path: Path) -> None:
    async with straight() as (other, direct), staged(tmp_path, SimUpstream()) as stage:
        for path, body in DIALECTS:
            got = await stage.post(path, {**body, "stream": True})
            assert got.status == 200, got.body
            expected = await (await direct.post(path, json={**body, "stream": True})).read()
            # A chat tells its usage to us alone: null in each chunk is all that is left of it.
            plain = got.body.replace(b',"usage":null', b"") if "chat" in path else got.body
            assert plain == expected.replace(other.name.encode(), b"up")
            usage = stage.trace.usage
            assert usage.source is UsageSource.BACKEND
            assert usage.output_tokens
            assert stage.trace.end is End.COMPLETED
            assert stage.trace.first_text is not None


@contextlib.asynccontextmanager
async def straight() -> AsyncIterator[tuple[SimUpstream, aiohttp.ClientSession]]:
    """Yield an upstream like the daemon's, and the way to it without a daemon."""
    async with SimUpstream("direct", key="") as other, aiohttp.ClientSession(other.base_url) as session:
        yield other, session


async def test_the_usage_of_a_streamed_chat_is_asked_for_and_shown_to_who_asked(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        quiet = await stage.post("/v1/chat/completions", {**CHAT, "stream": True})
        asked = stage.up.turns[-1].json
        assert asked == {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        assert b'"choices":[],' not in quiet.body
        assert quiet.body.endswith(b"data: [DONE]\n\n")
        usage = stage.trace.usage
        assert (usage.input_tokens, usage.cached_tokens, usage.reasoning_tokens) == (11, 3, 1)

        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        told = await stage.post("/v1/chat/completions", body)
        assert b'"choices":[],' in told.body
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": False, "x": 1}}
        told = await stage.post("/v1/chat/completions", body)
        assert b'"choices":[],' not in told.body
        assert stage.up.turns[-1].json["stream_options"] == {"include_usage": True, "x": 1}


async def test_headers_that_matter_pass_and_credentials_do_not(tmp_path: Path) -> None:
    sent = {
        "Authorization": "Bearer sk-the-callers-own",
        "x-api-key": "sk-the-callers-own",
        "cookie": "a=b",
        "x-forward-key": "k",
        "openai-organization": "org-1",
        "openai-beta": "assistants=v2",
        "idempotency-key": "i-1",
        "anthropic-beta": "context-1m",
        "session_id": "s-1",
        "user-agent": "claude-cli/2.1",
    }
    async with staged(tmp_path, SimUpstream()) as stage:
        await stage.post("/v1/chat/completions", CHAT, headers=sent)
        headers = stage.up.turns[-1].headers
        for name in ("openai-beta", "idempotency-key", "anthropic-beta", "session_id", "user-agent"):
            assert headers[name] == sent[name]
        assert headers["authorization"] == f"Bearer {stage.upstreams['up'].key}"
        for name in ("x-api-key", "cookie", "x-forward-key", "openai-organization"):
            assert name not in headers
        await stage.post("/v1/messages?beta=true", MESSAGES, headers=sent)
        asked = stage.up.turns[-1]
        assert asked.query == "beta=true"
        assert asked.headers["x-api-key"] == stage.up.key
        assert asked.headers["anthropic-version"] == "2023-06-01"
        assert "authorization" not in asked.headers


async def test_a_mapped_model_is_the_only_thing_that_changes(tmp_path: Path) -> None:
    models = [{"gpt-9": "gpt-5.5"}, {"mine-*": "gpt-4o"}]
    async with staged(tmp_path, SimUpstream(), each={"models": models}) as stage:
        raw = (
            b'{ "messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00"}],\n "model":"gpt-9", "n": 1e0 }'
        )
        async with stage.session.post(
            "/v1/chat/completions", data=raw, headers={"Content-Type": "application/json"}
        ) as answer:
            assert answer.status == 200
        asked = stage.up.turns[-1]
        # By field: what is in each of them is spelled as it was.
        assert asked.body == (
            b'{"messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00"}],"model":"gpt-5.5","n":1e0}'
        )
        await stage.post("/v1/engines/mine-too/completions", {"prompt": "x"})
        assert stage.up.turns[-1].path == "/v1/engines/gpt-4o/completions"
        refused = await stage.post("/v1/chat/completions", {**CHAT, "model": "gpt-5.5"})
        assert refused.status in (400, 429)


async def test_what_no_account_could_be_asked_goes_to_an_upstream(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), accounts=1, max_retry=0) as stage:
        for more, goes in (
            ({"n": 2}, "up"),
            ({"modalities": ["text", "audio"]}, "up"),
            # An account leaves these out.
            ({"logprobs": True, "top_logprobs": 2}, ""),
        ):
            for stream in (False, True):
                answer = await stage.post("/v1/chat/completions", {**CHAT, **more, "stream": stream})
                assert answer.status == 200, answer.body
                assert stage.trace.upstream == goes
        stage.up.fault("status", status=503)
        answer = await stage.post("/v1/chat/completions", {**CHAT, "n": 2})
        assert answer.status == 429
        assert answer.json["error"]["code"] == "rate_limit_exceeded"


async def test_what_no_upstream_speaks_is_refused_as_ever(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), each={"capabilities": ["responses"]}) as stage:
        answer = await stage.post("/v1/chat/completions", {**CHAT, "n": 2})
        assert answer.status == 400
        assert answer.json["error"]["param"] == "n"
        answer = await stage.post("/v1/embeddings", {"model": "m", "input": "x"})
        assert answer.status == 404
        assert not stage.up.turns


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings(tmp_path: Path, encoding: str) -> None:
    body = {"model": "text-embedding-3-small", "input": ["a", "bcd"], "encoding_format": encoding}
    async with staged(tmp_path, SimUpstream(), accounts=1) as stage:
        answer = await stage.post("/v1/embeddings", body)
        assert answer.status == 200
        numbers = [one["embedding"] for one in answer.json["data"]]
        if encoding == "base64":
            numbers = [list(struct.unpack("<3f", base64.b64decode(one))) for one in numbers]
        assert numbers == [[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
        assert (stage.trace.route, stage.trace.usage.input_tokens) == ("embeddings", 8)
        for wrong in ({"input": "x"}, {"model": 3, "input": "x"}):
            assert (await stage.post("/v1/embeddings", wrong)).status == 400


async def test_a_suffix_of_ours_becomes_an_effort_where_responses_are_spoken(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), each={"models": ["gpt-5*"]}) as stage:
        answer = await stage.post("/v1/responses", {**RESPONSES, "model": "gpt-5.5-high"})
        assert answer.status == 200
        asked = stage.up.turns[-1].json
        assert (asked["model"], asked["reasoning"]["effort"]) == ("gpt-5.5", "high")
        assert answer.json["model"] == "gpt-5.5-high"


async def test_the_accounts_come_first_unless_told_otherwise(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), accounts=1) as stage:
        await stage.ask()
        assert stage.trace.upstream == ""
        assert len(stage.sim.turns) == 1
        stage.sim.set_all("usage_limit")
        answer = await stage.ask()
        assert answer.status == 200
        assert stage.trace.upstream == "up"
        assert stage.trace.decision == "failover"
        rules = [one.rule for one in stage.trace.decisions[-1].excluded]
        assert rules == ["usage_limit_reached"]
    other = tmp_path / "other"
    other.mkdir()
    async with staged(other, SimUpstream(), accounts=1, accounts_priority=20) as stage:
        await stage.ask()
        assert stage.trace.upstream == "up"
        stage.up.fault("status", status=500)
        answer = await stage.ask()
        assert answer.status == 200
        assert stage.trace.upstream == ""
        assert [one.outcome for one in stage.trace.attempts] == ["server", "ok"]


async def test_conversations_share_one_priority_and_stay(tmp_path: Path) -> None:
    ups = [SimUpstream("a"), SimUpstream("b")]
    async with staged(tmp_path, *ups, accounts=1, each={"priority": 0}) as stage:
        seen: dict[str, set[str]] = {}
        for _ in range(2):
            for number in range(24):
                key = f"c{number}"
                await stage.post("/v1/chat/completions", {**CHAT, "prompt_cache_key": key})
                seen.setdefault(key, set()).add(stage.trace.upstream)
        assert all(len(places) == 1 for places in seen.values())
        assert set.union(*seen.values()) == {"", "a", "b"}


async def test_models_are_listed_and_the_whole_works_without_an_account(tmp_path: Path) -> None:
    by_name = {"b": {"models": ["gpt-4*", {"mine": "gpt-4o"}]}}
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), by_name=by_name) as stage:
        names = [one["id"] for one in (await stage.get("/v1/models")).json["data"]]
        assert names == ["gpt-5.5", "gpt-4o", "text-embedding-3-small", "mine"]
        assert (await stage.get("/v1/models/mine")).status == 200
        shown = await stage.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
        assert "mine" in [one["id"] for one in shown.json["data"]]
        assert (await stage.ask(model="mine")).status == 200
    async with staged(tmp_path, SimUpstream("a"), accounts=1) as stage:
        names = [one["id"] for one in (await stage.get("/v1/models")).json["data"]]
        assert len(names) == len(set(names))
        assert {"gpt-5.5-high", "gpt-4o"} <= set(names)


# -- failures ----------------------------------------------------------------------------


async def test_an_upstreams_own_trouble_never_reaches_the_caller(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), max_retry=0) as stage:
        for status in (401, 402, 403, 404, 500, 502, 503, 529):
            for path, body in DIALECTS[:3]:
                stage.afresh()
                for one in stage.upstreams.values():
                    one.fault("status", status=status, message="canary of an upstream")
                for stream in (False, True):
                    answer = await stage.post(path, {**body, "stream": stream})
                    # Nobody has the model: that is the request's own fault.
                    assert answer.status in ((400, 429, 529) if status == 404 else (429, 529))
                    assert b"canary" not in answer.body


async def test_a_callers_fault_is_told_at_once_and_counts_for_nothing(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        for status in (400, 413, 422):
            stage.up.well()
            stage.up.fault("status", status=status, message="you are wrong", code="odd")
            for path, body in DIALECTS[:3] * 2:
                answer = await stage.post(path, body)
                assert answer.status == status
                assert b"you are wrong" in answer.body
        state = stage.state()
        assert (state["state"], state["ejected"], state["errors"]) == ("healthy", [], 0)
        assert len(stage.up.turns) == 18


async def test_before_its_first_words_an_answer_is_begun_elsewhere(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), by_name={"a": {"priority": 1}}) as stage:
        a = stage.upstreams["a"]
        for fault in ("refuse", "cut", "end", "fail", "stall"):
            if fault == "stall":
                stage.set(idle_timeout=0.2)
                stage.describe(timeout=0.2)
            for path, body in DIALECTS[:3]:
                stage.afresh()
                options: dict[str, Any] = {} if fault == "refuse" else {"after": 1}
                a.fault(fault, **options)
                answer = await stage.post(path, {**body, "stream": True})
                assert answer.status == 200
                assert b"a_" not in answer.body
                assert len(stage.trace.attempts) == 2
                assert (stage.trace.upstream, stage.trace.end) == ("b", End.COMPLETED)


async def test_a_broken_stream_never_looks_finished(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        for fault in ("cut", "end", "fail"):
            for path, body in DIALECTS:
                stage.afresh()
                stage.up.says, stage.up.delay = "one two three four five six", 0.004
                options: dict[str, Any] = (
                    {"message": "canary", "code": "insufficient_quota"} if fault == "fail" else {}
                )
                stage.up.fault(fault, after=5, **options)
                answer = await stage.post(path, {**body, "stream": True})
                assert answer.status == 200
                _assert_is_broken_off(path, answer)
                trace = stage.trace
                assert trace.end is End.FAILED
                assert trace.usage.source is UsageSource.ESTIMATE
                assert trace.usage.output_tokens
                assert len(trace.attempts) == 1


def _assert_is_broken_off(path: str, answer: Answer) -> None:
    tail = answer.body.decode()
    assert "canary" not in tail
    match path:
        case "/v1/responses":
            last = answer.events[-1].json
            assert last["type"] == "response.failed"
            assert last["response"]["id"].startswith("resp_up_")
            assert last["sequence_number"] == 5
            assert answer.types.count("response.created") == 1
        case "/v1/messages":
            assert tail.rstrip().splitlines()[-2] == "event: error"
            assert "message_stop" not in tail
        case _:
            assert "[DONE]" not in tail
            assert '"error"' in tail.rstrip().splitlines()[-1]


async def test_wherever_a_stream_is_cut_it_looks_whole_only_when_it_is(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), max_retry=0) as stage:
        for path, body in DIALECTS[:4]:
            whole = (await stage.post(path, {**body, "stream": True})).body
            sent = len(whole) + 2_000
            for place in range(0, sent, 151):
                fault = "cut" if place % 2 else "end"
                stage.afresh()
                stage.up.fault(fault, at=place)
                answer = await stage.post(path, {**body, "stream": True})
                await stage.stand.idle()
                if answer.status != 200:
                    assert answer.status in (429, 529)
                    continue
                _assert_is_sound(path, answer.body, is_whole=stage.trace.end is End.COMPLETED)


def _assert_is_sound(path: str, body: bytes, *, is_whole: bool) -> None:
    """Hold a stream to its form: whole frames, each of them JSON, and an end of one kind or the other."""
    assert body.endswith(b"\n\n")
    said = [
        line.removeprefix(b"data: ")
        for frame in body.split(b"\n\n")
        for line in frame.splitlines()
        if line.startswith(b"data: ")
    ]
    events = [orjson.loads(one) for one in said if one != b"[DONE]"]
    match path:
        case "/v1/responses":
            ends = {"completed": True, "failed": False}
            assert ends[events[-1]["type"].removeprefix("response.")] is is_whole
        case "/v1/messages":
            assert {"message_stop": True, "error": False}[events[-1]["type"]] is is_whole
        case _:
            has_error = "error" in events[-1]
            assert has_error is not is_whole
            # One that has told its reason to end has ended, whether or not its mark came.
            assert not (has_error and said[-1] == b"[DONE]")


async def test_an_answer_without_usage_is_estimated_by_its_text(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        up = stage.up
        up.says = "word " * 40
        up.fault("no_usage")
        for path, body in DIALECTS:
            for stream in (True, False):
                await stage.post(path, {**body, "stream": stream})
                usage = stage.trace.usage
                assert usage.source is UsageSource.ESTIMATE, path
                assert 45 <= usage.output_tokens <= 55, (path, stream, usage)
                assert usage.input_tokens


async def test_a_chat_that_ends_without_its_mark_has_ended(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        stage.up.fault("no_done")
        answer = await stage.post("/v1/chat/completions", {**CHAT, "stream": True})
        assert b"error" not in answer.body
        assert stage.trace.end is End.COMPLETED


async def test_redirects_are_not_followed(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), max_retry=0) as stage:
        stage.up.fault("redirect", to="/v1/chat/completions?again")
        answer = await stage.post("/v1/chat/completions", CHAT)
        assert answer.status == 429
        assert {one.query for one in stage.up.turns} == {""}


async def test_a_refused_key_switches_an_upstream_off_until_a_check_passes(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), by_name={"a": {"priority": 1}}) as stage:
        a = stage.upstreams["a"]
        a.fault("status", status=401, message="canary")
        for _ in range(3):
            assert (await stage.ask()).status == 200
        assert len(a.turns) == 1
        state = stage.state("a")
        assert state["state"] == "disabled"
        assert "401" in state["reason"]
        results = {one["name"]: one for one in await stage.daemon.providers.check_all()}
        assert (results["a"]["ok"], results["a"]["state"]) == (False, "disabled")
        assert (results["b"]["ok"], results["b"]["state"]) == (True, "healthy")
        a.well()
        await stage.daemon.providers.check_all()
        assert (stage.state("a"))["state"] == "healthy"
        await stage.ask()
        assert stage.trace.upstream == "a"


async def test_a_429_is_a_rest_until_its_reset_and_no_ejection(tmp_path: Path) -> None:
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), by_name={"a": {"priority": 1}}) as stage:
        a = stage.upstreams["a"]
        a.fault("status", status=429, headers=headers, code="rate_limit_exceeded")
        for _ in range(7):
            assert (await stage.ask()).status == 200
        assert len(a.turns) == 1
        state = stage.state("a")
        assert state["state"] == "degraded"
        assert state["ejected"] == []
        assert 350 < state["resting"][0]["seconds"] <= 360


async def test_no_more_is_asked_of_one_that_fails_again_and_again(tmp_path: Path) -> None:
    async with staged(
        tmp_path, SimUpstream("a"), SimUpstream("b"), by_name={"a": {"priority": 1}}, max_retry=1
    ) as stage:
        a, b = stage.upstreams.values()
        a.fault("status", status=500)
        for _ in range(8):
            assert (await stage.ask()).status == 200
        assert len(a.turns) == 5
        state = stage.state("a")
        assert state["ejected"][0]["times"] == 1
        assert state["ejected"][0]["model"] == "gpt-5.5"
        # Another model of it is none the worse.
        await stage.ask(model="gpt-4o")
        assert len(a.turns) == 6
        # Now the other one fails too: it may not be ejected, and where nobody serves the least bad is asked.
        b.fault("status", status=500)
        for _ in range(3):
            assert (await stage.ask()).status == 429
        assert (stage.state("b"))["ejected"] == []
        b.well()
        assert (await stage.ask()).status == 200


# -- translation -------------------------------------------------------------------------


async def test_other_dialects_are_translated_where_responses_are_spoken(tmp_path: Path) -> None:
    up = SimUpstream(models=("gpt-5.5", "gpt-6.1-sol", "gpt-4o"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    bodies: list[tuple[str, dict[str, Any], int | None]] = [
        ("/v1/chat/completions", {**CHAT, "tools": [tool], "max_tokens": 5, "temperature": 0.1}, 16),
        ("/v1/messages", {**MESSAGES, "max_tokens": 300}, 300),
        ("/v1/completions", COMPLETION, None),
    ]
    async with staged(tmp_path, up, each={"capabilities": ["responses"]}) as stage:
        for model in up.models:
            for path, body, limit in bodies:
                for stream in (True, False):
                    answer = await stage.post(path, {**body, "model": model, "stream": stream})
                    assert answer.status == 200, answer.body
                    asked = up.turns[-1]
                    assert asked.path == "/v1/responses"
                    fields = asked.json
                    assert (fields["model"], fields["store"], fields["stream"]) == (model, False, True)
                    assert fields.get("max_output_tokens") == limit
                    # Others refuse to seal thoughts that they have not.
                    assert ("include" in fields) is (model != "gpt-4o")
                    assert "x-openai-internal-codex-responses-lite" not in asked.headers
                    assert stage.trace.usage.source is not UsageSource.NONE
                    assert stage.trace.decision.endswith("translated")


async def test_a_conversation_goes_on_from_an_answer_that_passed_as_it_was(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream("a"), SimUpstream("b"), accounts=1) as stage:
        stage.sim.set_all("usage_limit")
        first = await stage.post("/v1/responses", RESPONSES)
        home = stage.trace.upstream
        assert home
        body = {"model": "gpt-5.5", "input": "and now?", "previous_response_id": first.json["id"]}
        second = await stage.post("/v1/responses", body)
        assert second.status == 200
        assert stage.trace.upstream == home
        asked = stage.upstreams[home].turns[-1].json
        assert "previous_response_id" not in asked
        assert [one.get("role") for one in asked["input"]] == ["user", "assistant", "user"]
        assert second.json["previous_response_id"] == first.json["id"]
        # Also when it was streamed, and with the upstream gone.
        streamed = await stage.post("/v1/responses", {**RESPONSES, "stream": True})
        identity = streamed.events[-1].json["response"]["id"]
        stage.upstreams[stage.trace.upstream].fault("status", status=500)
        third = await stage.post("/v1/responses", {**body, "previous_response_id": identity})
        assert third.status == 200
        assert len(stage.trace.attempts) == 2


async def test_sealed_reasoning_of_one_target_breaks_no_other(tmp_path: Path) -> None:
    ups = [SimUpstream("a"), SimUpstream("b")]
    for one in ups:
        one.thinks = True
    async with staged(tmp_path, *ups, accounts=1, by_name={"a": {"priority": 1}}) as stage:
        stage.sim.set_all("usage_limit")
        first = (await stage.ask(stream=False)).json
        assert stage.trace.upstream == "a"
        items = [*question()["input"], *first["output"], *question("more")["input"]]
        body = {"model": "gpt-5.5", "input": items, "store": False}
        await stage.post("/v1/responses", body)
        # Its own it gets back.
        assert any("encrypted_content" in one for one in ups[0].turns[-1].json["input"])
        ups[0].fault("status", status=500)
        answer = await stage.post("/v1/responses", body)
        assert answer.status == 200
        assert stage.trace.upstream == "b"
        assert not any("encrypted_content" in one for one in ups[1].turns[-1].json["input"])
        assert len(ups[1].turns) == 1
        # What nobody knows is tried, refused, and left out.
        odd = {**body, "input": [{**items[1], "encrypted_content": "sealed-by-nobody"}, *items[2:]]}
        answer = await stage.post("/v1/responses", odd)
        assert answer.status == 200
        assert stage.trace.upstream == "b"
        assert [one.outcome for one in stage.trace.attempts][-2:] == ["encrypted", "ok"]
        # And an account is not shown it either.
        stage.sim.set_all("ok")
        stage.describe(priority=20)
        await stage.until(lambda: stage.daemon.pool.accounts()[0].state.value == "ready" or _rested(stage))
        answer = await stage.post("/v1/responses", body)
        assert (answer.status, stage.trace.upstream) == (200, "")
        assert not any("encrypted_content" in one for one in orjson.loads(stage.sim.turns[-1].body)["input"])


def _rested(stage: Stage) -> bool:
    """Have the accounts forget their limits, as their reset does."""
    for account in stage.daemon.pool.accounts():
        account.holds.clear()
        account.touch()
    return True


async def test_a_websocket_turn_goes_to_an_upstream_too(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(models=("gpt-5.5", "gpt-6.1-sol"))) as stage:
        async with stage.session.ws_connect("/v1/responses") as socket:
            for model in ("gpt-5.5", "gpt-6.1-sol"):
                await socket.send_json({"type": "response.create", "model": model, "input": "hello"})
                types: list[str] = []
                while not types or types[-1] not in ("response.completed", "error"):
                    types.append((await socket.receive_json(timeout=5))["type"])
                assert types[-1] == "response.completed"
        assert [one.path for one in stage.up.turns] == ["/v1/responses"] * 2
        assert stage.trace.upstream == "up"


async def test_a_codex_client_is_served_as_it_asks(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        answer = await stage.ask(codex=True, headers={"session-id": "s-1"}, store=False)
        assert answer.types[-1] == "response.completed"
        asked = stage.up.turns[-1]
        assert asked.headers["originator"] == CODEX_HEADERS["originator"]
        assert asked.headers["session-id"] == "s-1"
        stage.up.fault("fail", after=1, code="context_length_exceeded", message="too long")
        answer = await stage.ask(codex=True)
        # It reads the code there.
        assert answer.status == 200
        assert answer.types[-1] == "response.failed"
        assert answer.events[-1].json["response"]["error"]["code"] == "context_length_exceeded"
        answer = await stage.ask()
        assert answer.status == 400
        assert answer.json["error"]["code"] == "context_length_exceeded"


# -- callers who leave -------------------------------------------------------------------


async def leave(stage: Stage, path: str, body: dict[str, Any]) -> None:
    """Ask, and leave in the middle: of a stream at its first bytes, else when the upstream was asked."""
    asking = stage.daemon.background.spawn(stage.session.post(path, json=body), name="asking")
    await stage.until(lambda: bool(stage.up.turns))
    if body["stream"]:
        response = await asking
        await response.content.readany()
        response.close()
    else:
        asking.cancel()
    await stage.until(lambda: len(stage.traces) == 1)


async def test_who_leaves_is_not_waited_for_but_what_it_cost_is_known(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream()) as stage:
        for path, body in DIALECTS[:3]:
            for stream in (True, False):
                stage.afresh()
                stage.up.says, stage.up.delay = " ".join(["word"] * 30), 0.002
                if not stream:
                    stage.up.fault("stall", seconds=0.1)
                await leave(stage, path, {**body, "stream": stream})
                trace = stage.trace
                assert (trace.end, trace.upstream) == (End.CALLER_GONE, "up")
                assert trace.usage.source is UsageSource.BACKEND
                assert trace.usage.output_tokens == 30
                assert not stage.up.turns[-1].was_left
                assert stage.daemon.executor.drains == 0


async def test_one_that_is_to_be_cancelled_is(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), each={"on_client_disconnect": "cancel"}) as stage:
        for stream in (True, False):
            stage.afresh()
            stage.up.says, stage.up.delay = " ".join(["word"] * 500), 0.005
            if not stream:
                stage.up.fault("stall", seconds=5)
            await leave(stage, "/v1/chat/completions", {**CHAT, "stream": stream})
            assert stage.trace.end is End.CALLER_GONE
            assert stage.trace.usage.source is UsageSource.ESTIMATE
            await asyncio.wait_for(stage.up.turns[-1].gone.wait(), 2)
            assert stage.up.turns[-1].was_left


async def test_a_proxy_that_is_its_own_upstream_does_not_go_round(tmp_path: Path) -> None:
    async with staged(tmp_path, SimUpstream(), max_retry=0) as stage:
        stage.describe(base_url=stage.daemon.url)
        answer = await stage.ask()
        assert answer.status == 429
        await stage.stand.idle()
        # The caller's turn, and the one that came back.
        assert len(stage.traces) == 2
        assert (await stage.post("/v1/chat/completions", {**CHAT, "n": 2})).status in (400, 429)
        assert (await stage.post("/v1/embeddings", {"model": "m", "input": "x"})).status in (404, 429)
    other = tmp_path / "other"
    other.mkdir()
    async with staged(tmp_path / "other", SimUpstream()) as stage:
        await stage.ask(headers={"via": "1.1 nginx"})
        via = stage.up.turns[-1].headers["via"]
        assert via.startswith("1.1 nginx, 1.1 codex-proxy-")
        hops = ", ".join(f"1.1 codex-proxy-{n}" for n in range(5))
        assert (await stage.ask(headers={"via": hops})).status == 429
        assert len(stage.up.turns) == 1


async def test_an_upstream_that_dies_under_many_takes_no_more_with_it_than_it_had_begun(
    tmp_path: Path,
) -> None:
    ups = [SimUpstream("a"), SimUpstream("b")]
    for one in ups:
        one.says, one.delay = " ".join(["word"] * 20), 0.01
    async with staged(tmp_path, *ups, each={"priority": 0}) as stage:

        async def ask(number: int) -> bytes:
            body = {**CHAT, "stream": True, "prompt_cache_key": f"c{number}"}
            return (await stage.post("/v1/chat/completions", body)).body

        asking = asyncio.gather(*(ask(number) for number in range(40)))
        await stage.until(lambda: len(ups[0].turns) + len(ups[1].turns) == 40)
        await asyncio.sleep(0.05)
        await ups[0].aclose()
        answers = [*await asking, *await asyncio.gather(*(ask(number) for number in range(40)))]
        await stage.stand.idle()
        broken = [one for one in answers if b"[DONE]" not in one]
        assert all(b'"error"' in one for one in broken)
        assert 0 < len(broken) <= len(ups[0].turns)
        # Whatever came later was served elsewhere.
        assert all(b"[DONE]" in one for one in answers[40:])
        assert [one.in_flight for one in stage.daemon.providers.all()] == [0, 0]


# -- what its owner sees -----------------------------------------------------------------


async def test_it_is_told_of_everywhere_and_its_key_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with staged(tmp_path, SimUpstream(), records="on") as stage:
        key = stage.up.key
        assert (await stage.get("/readyz")).status == 200
        assert (await stage.get("/health")).json["upstreams_active"] == 1
        stage.up.fault("status", status=503, times=1, message=f"no room for {key}")
        answer = await stage.ask(stream=False)
        assert answer.status == 200
        identity = answer.headers["x-request-id"]
        told = (await stage.get(f"/why/{identity}")).json
        assert (told["account"], told["upstream"], told["strategy"]) == ("up", "up", "upstreams")
        tries = [attempt["outcome"] for step in told["steps"] for attempt in step["attempts"]]
        assert tries == ["overloaded", "ok"]
        stats = (await stage.get("/stats")).json
        assert [(one["name"], one["state"], one["requests"]) for one in stats["upstreams"]] == [
            ("up", "healthy", 2)
        ]
        metrics = (await stage.get("/metrics")).body.decode()
        for line in (
            'codex_proxy_upstream_state{state="healthy",upstream="up"} 1.0',
            'codex_proxy_upstream_attempts_total{outcome="overloaded",upstream="up"} 1.0',
            'codex_proxy_upstream_requests_total{upstream="up"} 1.0',
            "codex_proxy_drains_open 0.0",
        ):
            assert line in metrics
        assert 'account="up"' not in metrics
        shown = str((await stage.get(f"/requests/{identity}")).json)
        everything = [stats, metrics, told, shown, caplog.text, stage.daemon.providers.state()]
        assert not any(key in str(one) for one in everything)
        stage.up.fault("status", status=401, message=f"not {key}")
        await stage.ask()
        assert key not in caplog.text
        assert "upstream is not asked any more" in caplog.text
