"""The anthropic SDK as a caller: every event held to its types, every failure to its exceptions."""

import asyncio
import base64
import contextlib
import itertools
import json
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel

from codex_proxy.simulator import Script
from codex_proxy.trace import End
from tests.clients.sdk_bench import (
    KEY,
    PDF,
    PIXEL,
    PIXEL_URL,
    WEATHER,
    SdkBench,
    Weather,
    read,
    sealed,
    told,
    unnamed,
)
from tests.harness import LITE, STANDARD, Answer, standing

PATH = "/v1/messages"

LOOKUP: Any = {
    "name": "lookup",
    "description": "Look a word up.",
    "input_schema": {
        "type": "object",
        "properties": {"word": {"type": "string"}},
        "required": ["word"],
        "additionalProperties": False,
    },
}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
PICTURE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
}
ADAPTIVE: Any = {"type": "adaptive"}

EVENT_TYPES: dict[str, type[BaseModel]] = {
    typing.get_args(model.model_fields["type"].annotation)[0]: model
    for model in typing.get_args(typing.get_args(RawMessageStreamEvent)[0])
}
"""The SDK's class of every event it knows."""

SCRIPTS: dict[str, Callable[[], Script]] = {
    "text": lambda: Script.text("Hello there, **you**."),
    "long text": lambda: Script.long_text(300),
    "reasoning": lambda: Script.reasoning(["**First**\n\nthought", "**Second**"], "Here it is."),
    "reasoning alone": lambda: Script.reasoning(text=""),
    "a tool": lambda: Script.tool("lookup", {"word": "proxy"}),
    "a tool without arguments": lambda: Script.tool("lookup", {}),
    "two tools at once": lambda: Script.parallel_tools([
        ("lookup", {"word": "a"}),
        ("lookup", {"word": "b"}),
    ]),
    "thought, text and tools": lambda: Script.of(
        Script.reasoning("**Plan**", "On it."),
        Script.tool("lookup", {"word": "x"}),
        Script.tool("lookup", {"word": "y"}),
    ),
    "two thoughts": lambda: Script.of(
        Script.reasoning("**One**", "First."), Script.reasoning("**Two**", "Second.")
    ),
    "a free-form tool": lambda: Script.custom_tool("patch", '*** Begin "Patch"\n'),
    "a refusal": lambda: Script.refusal(),
    "a web search": lambda: Script.web_search(),
    "an early end": lambda: Script.incomplete(),
    "an end by a filter": lambda: Script.incomplete("content_filter"),
    "output listed at the end": lambda: Script.text("Listed.", full_output=True),
    "output not listed at the end": lambda: Script.empty_output("Not listed."),
    "no items": lambda: Script.nothing(),
    "no usage": lambda: Script.no_usage(),
    "cut characters": lambda: Script.unicode(halves=True),
    "events of the future": lambda: Script.unknown_events(),
}

FAILURES: dict[str, tuple[Callable[[], Script], str]] = {
    "a failure": (lambda: Script.state("failed", code="server_error", after=3), "api_error"),
    "an overload": (lambda: Script.state("overloaded_in_stream", after=3), "overloaded_error"),
    "an error event": (
        lambda: Script.state("failed", code="server_error", how="error", after=3),
        "api_error",
    ),
    "a cut": (lambda: Script.state("cut", after=6), "api_error"),
    "a clean cut": (lambda: Script.state("cut", after=6, clean=True), "api_error"),
    "a reset": (lambda: Script.state("cut", after=6, reset=True), "api_error"),
}
"""What goes wrong after the first word, and what the caller is told that it is."""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[SdkBench]:
    async with standing(tmp_path, api_keys=[KEY]) as stand, contextlib.AsyncExitStack() as opened:
        yield SdkBench(stand, opened)


def say(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """Return the fields of a request that says *text*."""
    return {"model": STANDARD, "max_tokens": 4096, "messages": [{"role": "user", "content": text}], **fields}


async def begin(sdk: anthropic.AsyncAnthropic, **fields: Any) -> anthropic.AsyncStream[RawMessageStreamEvent]:
    """Ask for a stream."""
    create = typing.cast("Callable[..., Awaitable[Any]]", sdk.messages.create)
    stream = await create(**say(stream=True, **fields))
    assert isinstance(stream, anthropic.AsyncStream)
    return stream


def strictly(answer: Answer) -> list[Any]:
    """Return the events of a stream as the SDK's classes for them, nothing converted and nothing unnamed."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for event in answer.events:
        assert b"event: " + event.json["type"].encode() + b"\n" in answer.body
        if event.type not in {"ping", "error"}:
            events.append(EVENT_TYPES[event.json["type"]].model_validate_json(event.data, strict=True))
            assert list(unnamed(events[-1])) == []
    return events


def check_grammar(events: list[Any]) -> None:
    """See that a stream is a message around blocks, each opened once and closed before the next one."""
    first, *middle, ending, last = events
    assert (first.type, ending.type, last.type) == ("message_start", "message_delta", "message_stop")
    opened: int | None = None
    count = 0
    for event in middle:
        match event.type:
            case "content_block_start":
                assert opened is None
                assert event.index == count
                opened = event.index
                count += 1
            case "content_block_delta":
                assert event.index == opened
            case "content_block_stop":
                assert event.index == opened
                opened = None
            case other:
                raise AssertionError(other)
    assert opened is None


# Types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_event_and_every_answer_fits_the_types_of_the_sdk(
    bench: SdkBench, name: str, model: str
) -> None:
    bench.sim.script(*(SCRIPTS[name]() for _ in range(3)))
    tools = [SEARCH] if name == "a web search" else [LOOKUP]
    body = say(model=model, tools=tools, thinking=ADAPTIVE)
    events = strictly(await bench.post(PATH, {**body, "stream": True}))
    check_grammar(events)
    plain = Message.model_validate_json((await bench.post(PATH, body)).body, strict=True)
    assert list(unnamed(plain)) == []
    async with bench.aio_anthropic().messages.stream(**body) as stream:
        final = await stream.get_final_message()

    assert events[0].message.model == plain.model == model
    assert (final.stop_reason, final.stop_sequence) == (plain.stop_reason, plain.stop_sequence)
    assert plain.stop_reason is not None
    assert final.usage.output_tokens == plain.usage.output_tokens
    assert [one.type for one in final.content] == [one.type for one in plain.content]
    # Seals and ids are another turn's.
    own = {"signature", "id", "tool_use_id", "parsed_output"}
    for one, other in zip(final.content, plain.content, strict=True):
        assert one.model_dump(exclude=own) == other.model_dump(exclude=own)


@pytest.mark.parametrize("model", [STANDARD, LITE])
@pytest.mark.parametrize("name", FAILURES)
async def test_a_stream_that_breaks_raises_and_never_looks_complete(
    bench: SdkBench, name: str, model: str
) -> None:
    make, kind = FAILURES[name]
    bench.sim.script(*(make() for _ in range(3)))
    answer = await bench.post(PATH, say(model=model, stream=True))
    assert answer.status == 200
    assert answer.types[-1] == "error"
    assert {"message_delta", "message_stop"}.isdisjoint(answer.types)
    events = strictly(answer)
    failure = answer.events[-1].json
    assert (failure["type"], failure["error"]["type"]) == ("error", kind)

    def use() -> tuple[list[Any], list[str]]:
        sync = bench.sync_anthropic()
        seen: list[Any] = []
        with pytest.raises(anthropic.APIStatusError) as caught:
            seen.extend(sync.messages.create(**say(model=model), stream=True))
        assert caught.value.type == kind
        types: list[str] = []
        with (
            sync.messages.stream(**say(model=model)) as stream,
            pytest.raises(anthropic.APIStatusError),
        ):
            types.extend(event.type for event in stream)
        return seen, types

    seen, types = await asyncio.to_thread(use)
    assert len(seen) == len(events) > 1
    assert "text" in types
    assert "message_stop" not in types


async def test_a_proxy_that_stops_in_the_middle_of_a_stream_raises(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as opened, contextlib.AsyncExitStack() as standing_up:
        stand = await standing_up.enter_async_context(standing(tmp_path, api_keys=[KEY], drain_timeout=0))
        bench = SdkBench(stand, opened)
        bench.sim.script(Script.long_text(2000, delay=0.01))
        stream = await begin(bench.aio_anthropic())
        seen = [await anext(stream)]
        stopping = asyncio.gather(standing_up.aclose())
        with pytest.raises(anthropic.APIError):
            await read(stream, seen)
        assert "message_stop" not in {event.type for event in seen}
        await stopping


async def test_pings_while_the_backend_is_silent_are_no_events_of_the_answer(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], keep_alive_after=0.1) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        bench.sim.script(
            Script.state("stall", where="created", seconds=0.5), Script.state("stall", seconds=0.5)
        )
        async with bench.aio_anthropic().messages.stream(**say()) as stream:
            types = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert "ping" not in types
        assert types[0] == "message_start"
        assert final.stop_reason == "end_turn"
        answer = await bench.post(PATH, say(stream=True))
        assert answer.types[0] == "ping"
        check_grammar(strictly(answer))


async def test_behind_pings_another_account_serves_and_a_failure_is_told_in_the_stream(
    tmp_path: Path,
) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], keep_alive_after=0.1) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        bench.sim.latency = 0.3
        bench.sim.script(Script.state("usage_limit"), "Served all the same.")
        async with bench.aio_anthropic().messages.stream(**say()) as stream:
            assert await stream.get_final_text() == "Served all the same."
        bench.sim.set_all("usage_limit", resets_in=3600)
        late = await begin(bench.aio_anthropic(max_retries=2))
        with pytest.raises(anthropic.APIStatusError) as caught:
            await read(late, [])
        assert caught.value.type == "rate_limit_error"
        assert len(bench.sent) == 2


# Answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["", "/", "/v1"])
async def test_the_base_url_may_end_as_users_write_it(bench: SdkBench, base: str) -> None:
    bench.sim.script("Found it.")
    answer = await bench.aio_anthropic(base).messages.create(**say())
    assert answer.content[0].to_dict() == {"type": "text", "text": "Found it."}


@pytest.mark.parametrize("how", ["api_key", "auth_token"])
async def test_a_key_may_come_in_either_header(bench: SdkBench, how: str) -> None:
    options: dict[str, Any] = {"api_key": None, "auth_token": None, how: KEY}
    answer = await bench.aio_anthropic(**options).messages.create(**say("hello"))
    assert text_of(answer) == "pong: hello"


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_every_way_to_ask_gives_the_same_answer(bench: SdkBench, model: str) -> None:
    bench.sim.script(*(Script.reasoning("**Hm**", "Forty-two.") for _ in range(8)))
    asked = say(model=model, thinking=ADAPTIVE)

    def use() -> list[str]:
        sync = bench.sync_anthropic()
        plain = sync.messages.create(**asked)
        with sync.messages.stream(**asked) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_text()
        beta = sync.beta.messages.create(**asked, betas=["interleaved-thinking-2025-05-14"])
        with sync.beta.messages.stream(**asked) as beta_stream:
            final_beta = beta_stream.get_final_text()
        return [text_of(plain), streamed, final, text_of(beta), final_beta]

    async def use_async() -> list[str]:
        aio = bench.aio_anthropic()
        plain = await aio.messages.create(**asked)
        async with aio.messages.stream(**asked) as stream:
            final = await stream.get_final_text()
        beta = await aio.beta.messages.create(**asked)
        async with aio.beta.messages.stream(**asked) as beta_stream:
            final_beta = await beta_stream.get_final_text()
        return [text_of(plain), final, text_of(beta), final_beta]

    answers = [*await asyncio.to_thread(use), *await use_async()]
    assert answers == ["Forty-two."] * 9
    assert [trace.end for trace in bench.traces] == [End.COMPLETED] * 8


def text_of(message: Any) -> str:
    """Return the text of a message."""
    return "".join(block.text for block in message.content if block.type == "text")


async def test_raw_and_streaming_access_give_the_request_id(bench: SdkBench) -> None:
    bench.sim.script("one", "two", "three")
    messages = bench.aio_anthropic().messages
    raw = await messages.with_raw_response.create(**say())
    assert text_of(await raw.parse()) == "one"
    async with messages.with_streaming_response.create(**say(), stream=True) as response:
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-2:] == ["event: message_stop", 'data: {"type":"message_stop"}']
    async with messages.stream(**say()) as stream:
        await stream.until_done()
    ids = [raw.headers.get("request-id"), response.headers.get("request-id"), stream.request_id]
    assert ids == [trace.id for trace in bench.traces]


async def test_many_streams_of_one_client_do_not_mix(bench: SdkBench) -> None:
    sdk = bench.aio_anthropic()

    async def ask(number: int) -> str:
        async with sdk.messages.stream(**say(f"number {number}")) as stream:
            return await stream.get_final_text()

    answers = await asyncio.gather(*(ask(number) for number in range(20)))
    assert answers == [f"pong: number {number}" for number in range(20)]


async def test_a_closed_stream_frees_the_account_at_once(bench: SdkBench) -> None:
    bench.sim.script(Script.long_text(400, delay=0.01))
    stream = await begin(bench.aio_anthropic())
    while (await anext(stream)).type != "content_block_delta":
        pass
    await stream.close()
    (turn,) = bench.sim.turns
    await asyncio.wait_for(turn.closed.wait(), 3)
    assert turn.cancelled


async def test_usage_is_estimated_at_first_and_true_at_the_end(bench: SdkBench) -> None:
    bench.sim.script(*(Script.reasoning("**Hm**", "Counted.") for _ in range(2)))
    session = json.dumps({"session_id": "5f0c1d5e-0000-4000-8000-000000000001"})
    asked = say("word " * 400, metadata={"user_id": session})
    first = (await bench.aio_anthropic().messages.create(**asked)).usage
    stream = await begin(bench.aio_anthropic(), messages=asked["messages"], metadata=asked["metadata"])
    seen: list[Any] = []
    await read(stream, seen)
    begun, ended = seen[0].message.usage, seen[-2].usage
    assert 300 < begun.input_tokens < 2000
    # The second time all of it is in the backend's cache, which the API counts apart.
    assert first.cache_read_input_tokens == 0
    assert ended.cache_read_input_tokens > 0
    assert ended.input_tokens + ended.cache_read_input_tokens == first.input_tokens
    assert ended.output_tokens == first.output_tokens
    assert ended.output_tokens_details.thinking_tokens > 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_sequence_ends_the_answer_here(bench: SdkBench, streamed: bool) -> None:
    bench.sim.script("One, two, three END four.")
    sdk = bench.aio_anthropic()
    asked = say(stop_sequences=["nowhere", "END"])
    if streamed:
        async with sdk.messages.stream(**asked) as stream:
            answer: Any = await stream.get_final_message()
    else:
        answer = await sdk.messages.create(**asked)
    assert text_of(answer) == "One, two, three "
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "END")


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_output_limit_is_kept_here(bench: SdkBench, streamed: bool) -> None:
    bench.sim.script(Script.long_text(200))
    sdk = bench.aio_anthropic()
    if streamed:
        async with sdk.messages.stream(**say(max_tokens=20)) as stream:
            answer: Any = await stream.get_final_message()
    else:
        answer = await sdk.messages.create(**say(max_tokens=20))
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert 0 < answer.usage.output_tokens <= 20
    assert 0 < len(text_of(answer)) <= 80


async def test_a_refusal_is_a_stop_reason_and_its_words_go_back(bench: SdkBench) -> None:
    bench.sim.script(Script.refusal("I will not."), Script.refusal("I will not."), "As you wish.")
    sdk = bench.aio_anthropic()
    answer = await sdk.messages.create(**say())
    async with sdk.messages.stream(**say()) as stream:
        final = await stream.get_final_message()
    assert answer.stop_reason == final.stop_reason == "refusal"
    assert text_of(answer) == text_of(final) == "I will not."
    history = [*say()["messages"], answer.to_param(), {"role": "user", "content": "Fine."}]
    await sdk.messages.create(**say(messages=history))
    assert told(bench.sim.turns[-1]) == [("user", "hi"), ("assistant", "I will not."), ("user", "Fine.")]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_web_search_shows_its_query_and_cites_its_pages(
    bench: SdkBench, model: str, streamed: bool
) -> None:
    bench.sim.script(Script.web_search("the news"), "No more.")
    sdk = bench.aio_anthropic()
    asked = say(model=model, tools=[SEARCH])
    if streamed:
        async with sdk.messages.stream(**asked) as stream:
            answer: Message = await stream.get_final_message()
    else:
        answer = await sdk.messages.create(**asked)
    use, result, text = answer.content
    assert use.type == "server_tool_use"
    assert (use.name, use.input) == ("web_search", {"query": "the news"})
    assert result.type == "web_search_tool_result"
    assert result.tool_use_id == use.id
    assert text.type == "text"
    assert text.text == "It is sunny."
    (note,) = text.citations or []
    assert note.type == "web_search_result_location"
    assert note.url == "https://example.com/simulated"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.server_tool_use is not None
    assert answer.usage.server_tool_use.web_search_requests == 1
    assert bench.last["tools"] == [{"type": "web_search"}]
    # And whole back again: what was found stays in the conversation.
    history = [*asked["messages"], answer.to_param(), {"role": "user", "content": "And?"}]
    await sdk.messages.create(**{**asked, "messages": history})
    _, (role, *words), _ = told(bench.sim.turns[-1])
    assert role == "assistant"
    assert "the news" in words[0]
    assert words[-1] == "It is sunny."


async def test_knobs_that_the_backend_refuses_do_not_reach_it(bench: SdkBench) -> None:
    bench.sim.script("Fine.")
    answer = await bench.aio_anthropic().messages.create(
        model=STANDARD,
        max_tokens=1000,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[{"role": "user", "content": "hi"}],
        metadata={"user_id": "me"},
        service_tier="auto",
        extra_body={"temperature": 0.2, "top_k": 5, "top_p": 0.9, "a_knob_of_tomorrow": {"on": True}},
        output_config={"effort": "low"},
    )
    assert text_of(answer) == "Fine."
    assert bench.last["reasoning"]["effort"] == "low"
    assert told(bench.sim.turns[-1]) == [("developer", "Be brief."), ("user", "hi")]


@pytest.mark.parametrize(
    ("asked", "model", "effort"),
    [
        ("claude-opus-5", LITE, None),
        ("claude-sonnet-5", LITE, None),
        ("claude-3-5-haiku-latest", "gpt-6-luna", "low"),
        (f"claude-{STANDARD}", STANDARD, None),
        (f"claude-{STANDARD}-high", STANDARD, "high"),
    ],
)
async def test_claudes_names_are_served_by_models_of_ours(
    bench: SdkBench, asked: str, model: str, effort: str | None
) -> None:
    answer = await bench.aio_anthropic().messages.create(**say(model=asked))
    assert answer.model == asked
    assert bench.last["model"] == model
    assert (bench.last.get("reasoning") or {}).get("effort") == effort


# Pictures and documents --------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_pictures_and_documents_arrive_whole(bench: SdkBench, model: str) -> None:
    content: list[Any] = [
        {"type": "text", "text": "What are these?"},
        PICTURE,
        {"type": "image", "source": {"type": "url", "url": "https://example.com/cat.png"}},
        {
            "type": "document",
            "title": "Report",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
        },
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {
            "type": "document",
            "title": "Notes",
            "context": "from the meeting",
            "source": {"type": "text", "media_type": "text/plain", "data": "All agreed."},
            "citations": {"enabled": True},
        },
        {
            "type": "document",
            "source": {"type": "content", "content": [{"type": "text", "text": "A part."}, PICTURE]},
        },
    ]
    bench.sim.script("Seen.")
    answer = await bench.aio_anthropic().messages.create(
        **say(model=model, messages=[{"role": "user", "content": content}])
    )
    assert text_of(answer) == "Seen."
    parts = bench.last["input"][-1]["content"]
    assert [part["image_url"] for part in parts if part["type"] == "input_image"] == [
        PIXEL_URL,
        "https://example.com/cat.png",
        PIXEL_URL,
    ]
    named, remote = [part for part in parts if part["type"] == "input_file"]
    assert named["file_data"] == f"data:application/pdf;base64,{PDF}"
    assert named["filename"] == "Report.pdf"
    assert remote["file_url"] == "https://example.com/a.pdf"
    words = "\n".join(part["text"] for part in parts if part["type"] == "input_text")
    for word in ("What are these?", "Notes", "from the meeting", "All agreed.", "A part."):
        assert word in words


async def test_what_a_search_of_the_callers_found_is_read(bench: SdkBench) -> None:
    bench.sim.script(Script.tool("lookup", {"word": "x"}), "Read.")
    sdk = bench.aio_anthropic()
    first = await sdk.messages.create(**say(tools=[LOOKUP]))
    (call,) = first.content
    assert call.type == "tool_use"
    found: Any = {
        "type": "search_result",
        "source": "https://example.com/found",
        "title": "A page",
        "content": [{"type": "text", "text": "X marks the spot."}],
        "citations": {"enabled": True},
    }
    document = {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
    }
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [found, document]}
    history = [*say()["messages"], first.to_param(), {"role": "user", "content": [result]}]
    await sdk.messages.create(**say(messages=history, tools=[LOOKUP]))
    _, _, (kind, words, file) = told(bench.sim.turns[-1])
    assert kind == "output"
    for word in ("https://example.com/found", "A page", "X marks the spot."):
        assert word in words
    assert file["file_data"] == f"data:application/pdf;base64,{PDF}"


async def test_a_file_of_anothers_server_is_refused_by_its_path(bench: SdkBench) -> None:
    picture = {"type": "image", "source": {"type": "file", "file_id": "file_1"}}
    with pytest.raises(anthropic.BadRequestError) as caught:
        await bench.aio_anthropic().beta.messages.create(
            **say(messages=[{"role": "user", "content": [picture]}])
        )
    assert "messages.0.content.0.source" in str(caught.value)


# Tools and thinking ------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_tool_loop_keeps_its_thoughts_its_calls_and_its_pictures(
    bench: SdkBench, model: str, streamed: bool
) -> None:
    bench.sim.script(
        Script.of(
            Script.reasoning(["**Plan**", "**Both**"], "Looking both up."),
            Script.tool("lookup", {"word": "proxy"}),
            Script.tool("lookup", {"word": "relay"}),
        )
    )

    def ask(history: list[Any]) -> Message:
        sync = bench.sync_anthropic()
        asked = say(model=model, messages=history, tools=[LOOKUP], thinking=ADAPTIVE)
        if streamed:
            with sync.messages.stream(**asked) as stream:
                return stream.get_final_message()
        answer: Message = sync.messages.create(**asked)
        return answer

    history: list[Any] = [{"role": "user", "content": "What is a proxy?"}]
    first = await asyncio.to_thread(ask, history)
    thinking, text, one, other = first.content
    assert first.stop_reason == "tool_use"
    assert thinking.type == "thinking"
    assert thinking.thinking == "**Plan**\n\n**Both**"
    assert text.type == "text"
    assert one.type == "tool_use"
    assert other.type == "tool_use"
    assert (one.name, one.input, other.input) == ("lookup", {"word": "proxy"}, {"word": "relay"})

    # The message goes back whole, as the SDK's guide has it.
    history += [
        first.to_param(),
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": one.id, "content": "not there", "is_error": True},
                {
                    "type": "tool_result",
                    "tool_use_id": other.id,
                    "content": [{"type": "text", "text": "a relay looks so:"}, PICTURE],
                },
                {"type": "text", "text": "Go on."},
            ],
        },
    ]
    bench.sim.script("So it is.")
    second = await asyncio.to_thread(ask, history)
    assert text_of(second) == "So it is."
    before, after = bench.sim.turns
    assert (before.status, after.status, after.account) == (200, 200, before.account)
    # The very thought that the backend sealed, and not another one.
    assert sealed(after) == [thinking.signature]
    assert told(after) == [
        ("user", "What is a proxy?"),
        ("thought", "**Plan**", "**Both**"),
        ("assistant", "Looking both up."),
        ("call", "lookup", {"word": "proxy"}),
        ("call", "lookup", {"word": "relay"}),
        ("output", "Error: not there"),
        ("output", "a relay looks so:", PIXEL_URL),
        ("user", "Go on."),
    ]


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_thought_that_is_not_shown_comes_back_all_the_same(bench: SdkBench, model: str) -> None:
    bench.sim.script(Script.reasoning("**Secret**", "One."), Script.reasoning("**Other**", "Two."))
    sdk = bench.aio_anthropic()
    asked = say(model=model, thinking={"type": "adaptive", "display": "omitted"})
    first = await sdk.messages.create(**asked)
    thinking = first.content[0]
    assert thinking.type == "thinking"
    assert thinking.thinking == ""
    history = [*asked["messages"], first.to_param(), {"role": "user", "content": "And?"}]
    async with sdk.messages.stream(**{**asked, "messages": history}) as stream:
        await stream.until_done()
    assert sealed(bench.sim.turns[-1]) == [thinking.signature]
    assert [turn.status for turn in bench.sim.turns] == [200, 200]


async def test_a_caller_who_wants_no_thinking_gets_none(bench: SdkBench) -> None:
    bench.sim.script(*(Script.reasoning("**Secret**", "Said.") for _ in range(2)))
    for fields in ({}, {"thinking": {"type": "disabled"}}):
        answer = await bench.aio_anthropic().messages.create(**say(), **typing.cast("Any", fields))
        assert [block.type for block in answer.content] == ["text"]
    # The least that this model has.
    assert bench.last["reasoning"]["effort"] == "low"


async def test_a_thought_of_another_model_is_left_out(bench: SdkBench) -> None:
    history: list[Any] = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": base64.b64encode(b"another's").decode()},
                {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix"},
                {"type": "text", "text": "Hello."},
            ],
        },
        {"role": "user", "content": "bye"},
    ]
    await bench.aio_anthropic().messages.create(**say(messages=history, thinking=ADAPTIVE))
    assert told(bench.sim.turns[-1]) == [("user", "hi"), ("assistant", "Hello."), ("user", "bye")]
    assert bench.sim.turns[-1].status == 200


async def test_the_sdks_own_tool_loop_runs_to_its_end(bench: SdkBench) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def lookup(word: str) -> str:
        """Look a word up.

        Args:
            word: What to look up.
        """
        asked.append(word)
        return f"{word} is known"

    @anthropic.beta_async_tool
    async def lookup_soon(word: str) -> str:
        """Look a word up, later."""
        return lookup(word)

    calls = [("lookup", {"word": "a"}), ("lookup", {"word": "b"})]
    bench.sim.script(Script.parallel_tools(calls), Script.tool("lookup", {"word": "c"}))

    def use() -> str:
        runner = bench.sync_anthropic().beta.messages.tool_runner(**say(tools=[lookup]))
        return text_of(runner.until_done())

    assert await asyncio.to_thread(use) == "The tool said: c is known"
    assert asked == ["a", "b", "c"]

    bench.sim.script(Script.reasoning("**Hm**", ""), "Nothing to look up.")
    bench.sim.scripts[0] = Script.of(bench.sim.scripts[0], Script.tool("lookup_soon", {"word": "d"}))
    runner = bench.aio_anthropic().beta.messages.tool_runner(**say(tools=[lookup_soon], thinking=ADAPTIVE))
    assert text_of(await runner.until_done()) == "Nothing to look up."
    assert asked[-1] == "d"
    assert len(sealed(bench.sim.turns[-1])) == 1


async def test_the_choice_of_tools_is_kept(bench: SdkBench) -> None:
    sdk = bench.aio_anthropic()
    for choice, sent, parallel in (
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "tool", "name": "lookup"}, {"type": "function", "name": "lookup"}, True),
        ({"type": "none"}, "none", True),
    ):
        answer = await sdk.messages.create(**say(tools=[LOOKUP], tool_choice=choice))
        assert bench.last["tool_choice"] == sent
        assert bench.last["parallel_tool_calls"] is parallel
        assert (answer.stop_reason == "tool_use") is (sent not in ("auto", "none"))


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_tools_that_anthropic_defines_and_the_caller_runs_are_called(
    bench: SdkBench, model: str
) -> None:
    edit = {"command": "view", "path": "/a.txt"}
    bench.sim.script(
        Script.parallel_tools([("bash", {"command": "ls"}), ("str_replace_based_edit_tool", edit)])
    )
    answer = await bench.aio_anthropic().messages.create(
        **say(
            model=model,
            tools=[
                {"type": "bash_20250124", "name": "bash"},
                {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            ],
        )
    )
    calls = [(block.name, block.input) for block in answer.content if block.type == "tool_use"]
    assert calls == [("bash", {"command": "ls"}), ("str_replace_based_edit_tool", edit)]


async def test_a_name_that_the_backend_refuses_comes_back_as_the_caller_wrote_it(bench: SdkBench) -> None:
    name = "mcp__a-very-long-server-name__" + "deep_" * 16
    tool = {"name": name, "input_schema": {"type": "object"}}
    answer = await bench.aio_anthropic().messages.create(**say(tools=[tool], tool_choice={"type": "any"}))
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.name == name
    assert bench.last["tools"][0]["name"] != name


# Structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_structured_answer_is_parsed(bench: SdkBench, model: str) -> None:
    bench.sim.script(*[WEATHER] * 5)

    def use() -> list[Any]:
        sync = bench.sync_anthropic()
        plain = sync.messages.parse(**say(model=model), output_format=Weather)
        with sync.messages.stream(**say(model=model), output_format=Weather) as stream:
            final = stream.get_final_message()
        beta = sync.beta.messages.parse(**say(model=model), output_format=Weather)
        return [plain.parsed_output, final.parsed_output, beta.parsed_output]

    parsed = await asyncio.to_thread(use)
    aio = await bench.aio_anthropic().messages.parse(**say(model=model), output_format=Weather)
    expected = Weather(city="Oslo", degrees=3, is_raining=True)
    assert [*parsed, aio.parsed_output] == [expected] * 4
    form = bench.last["text"]["format"]
    assert form["type"] == "json_schema"
    assert set(form["schema"]["required"]) == {"city", "degrees", "is_raining"}

    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    shape = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    bench.sim.clear()
    answer = await bench.aio_anthropic().messages.create(**say(model=model, output_config=shape))
    assert json.loads(text_of(answer)) == {"city": "simulated"}


# A whole conversation ----------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_conversation_keeps_every_word(bench: SdkBench, model: str, streamed: bool) -> None:
    """Thoughts, tools, pictures and parallel calls, over several turns, each sent whole."""
    bench.sim.script(
        Script.of(
            Script.reasoning(["**One**", "**Two**"], "Both at once."),
            Script.tool("lookup", {"word": "a"}),
            Script.tool("lookup", {"word": "b"}),
        ),
        Script.of(
            Script.reasoning("**Three**", "One more."),
            Script.reasoning("**Four**", ""),
            Script.tool("lookup", {"word": "c"}),
        ),
        Script.reasoning("**Five**", "Done with it."),
        Script.refusal("Not that."),
        Script.text("The end."),
    )
    sdk = bench.aio_anthropic()
    history: list[Any] = []

    async def turn(*blocks: Any, system: str = "") -> Message:
        history.append({"role": "user", "content": list(blocks)})
        if system:
            history.append({"role": "system", "content": system})
        asked = say(model=model, system="Be brief.", messages=history, tools=[LOOKUP], thinking=ADAPTIVE)
        if streamed:
            async with sdk.messages.stream(**asked) as stream:
                message: Message = await stream.get_final_message()
        else:
            message = await sdk.messages.create(**asked)
        history.append(message.to_param())
        return message

    def result(call: Any, *content: Any) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": call.id, "content": list(content)}

    def text(words: str) -> dict[str, Any]:
        return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}

    first = await turn(text("Look at this"), PICTURE)
    *_, a, b = first.content
    second = await turn(
        result(b, text("B is"), PICTURE), result(a, text("A is first")), text("And now?"), system="Hurry."
    )
    *_, c = second.content
    third = await turn(result(c, text("C is last")))
    assert third.stop_reason == "end_turn"
    await turn(text("Something bad"))
    last = await turn(text("Bye"))
    assert text_of(last) == "The end."

    assert [turn.status for turn in bench.sim.turns] == [200] * 5
    assert len({turn.account for turn in bench.sim.turns}) == 1
    assert len({turn.json["prompt_cache_key"] for turn in bench.sim.turns}) == 1
    signatures = [
        block.signature
        for message in (first, second, third)
        for block in message.content
        if block.type == "thinking"
    ]
    assert sealed(bench.sim.turns[-1]) == signatures
    assert told(bench.sim.turns[-1]) == [
        ("developer", "Be brief."),
        ("user", "Look at this", PIXEL_URL),
        ("thought", "**One**", "**Two**"),
        ("assistant", "Both at once."),
        ("call", "lookup", {"word": "a"}),
        ("call", "lookup", {"word": "b"}),
        ("output", "B is", PIXEL_URL),
        ("output", "A is first"),
        ("user", "And now?"),
        ("developer", "Hurry."),
        ("thought", "**Three**"),
        ("assistant", "One more."),
        ("thought", "**Four**"),
        ("call", "lookup", {"word": "c"}),
        ("output", "C is last"),
        ("thought", "**Five**"),
        ("assistant", "Done with it."),
        ("user", "Something bad"),
        ("assistant", "Not that."),
        ("user", "Bye"),
    ]
    # Each turn begins with what the one before it sent: so the backend's cache can help.
    for before, after in itertools.pairwise(bench.sim.turns):
        sent = before.json["input"]
        assert after.json["input"][: len(sent)] == sent


# Other endpoints ---------------------------------------------------------------------------


async def test_tokens_are_counted_without_an_account(bench: SdkBench) -> None:
    bench.sim.set_all("usage_limit", resets_in=3600)
    sdk = bench.aio_anthropic()
    asked: dict[str, Any] = {
        "model": STANDARD,
        "messages": say("Seven words are hardly more than ten tokens.")["messages"],
    }
    plain = (await sdk.messages.count_tokens(**asked)).input_tokens
    assert 5 <= plain <= 40
    beta = await sdk.beta.messages.count_tokens(**asked)
    assert beta.input_tokens == plain
    more = await sdk.messages.count_tokens(**asked, system="Be brief.", tools=[LOOKUP])
    assert more.input_tokens > plain + 10
    picture = {"role": "user", "content": [PICTURE]}
    seen = await sdk.messages.count_tokens(**{**asked, "messages": [*asked["messages"], picture]})
    assert seen.input_tokens > plain
    with pytest.raises(anthropic.BadRequestError):
        await sdk.messages.count_tokens(**{**asked, "messages": 3})
    assert not bench.sim.turns


async def test_the_models_come_in_pages_with_names_that_claude_code_lists(bench: SdkBench) -> None:
    def use() -> tuple[list[str], list[str], int]:
        sync = bench.sync_anthropic()
        paged = [model.id for model in sync.models.list(limit=7)]
        pages = len(bench.sent)
        whole = sync.models.list(limit=1000)
        assert not whole.has_more
        return paged, [model.id for model in whole.data], pages

    paged, whole, pages = await asyncio.to_thread(use)
    assert paged == whole
    assert pages == -(-len(whole) // 7) > 2
    assert len(whole) == len(set(whole))
    assert {STANDARD, LITE, f"claude-{STANDARD}", f"claude-{LITE}-high"} <= set(whole)

    sdk = bench.aio_anthropic()
    first = await sdk.models.list(limit=5)
    last = await sdk.models.list(limit=5, before_id=whole[10])
    assert [model.id for model in first.data] == whole[:5]
    assert [model.id for model in last.data] == whole[5:10]
    one = await sdk.models.retrieve(f"claude-{STANDARD}")
    assert (one.id, one.lifecycle) == (f"claude-{STANDARD}", "active")
    # Each of them is one that can be asked.
    answer = await sdk.messages.create(**say(model=f"claude-{LITE}-high"))
    assert text_of(answer) == "pong: hi"
    beta = await sdk.beta.models.list(limit=3)
    assert [model.id for model in beta.data] == whole[:3]


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_callers_fault_is_a_bad_request_that_names_the_field(
    bench: SdkBench, streamed: bool
) -> None:
    sdk = bench.aio_anthropic(max_retries=2)
    create = typing.cast("Callable[..., Awaitable[Any]]", sdk.messages.create)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    )
    for fields, path in cases:
        with pytest.raises(anthropic.BadRequestError) as caught:
            await create(**{**say(stream=streamed), **fields})
        assert caught.value.type == "invalid_request_error"
        assert (caught.value.api_message or "").startswith(path)
        body = typing.cast("dict[str, Any]", caught.value.body)
        assert body["request_id"] == caught.value.request_id
    assert len(bench.sent) == len(cases)
    assert not bench.sim.turns


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_conversation_that_is_too_long_is_told_in_the_apis_words(
    bench: SdkBench, streamed: bool
) -> None:
    bench.sim.script(Script.state("context_length"))
    create = typing.cast("Callable[..., Awaitable[Any]]", bench.aio_anthropic(max_retries=2).messages.create)
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        await create(**say(stream=streamed))
    assert len(bench.sent) == 1
    assert len(bench.sim.turns) == 1


async def test_a_wrong_key_is_an_authentication_error(bench: SdkBench) -> None:
    with pytest.raises(anthropic.AuthenticationError) as caught:
        await bench.aio_anthropic(api_key="another", max_retries=2).messages.create(**say())
    assert caught.value.type == "authentication_error"
    # No client is to try it again; Claude Code would for minutes.
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(bench.sent) == 1
    assert "another" not in str(caught.value)
    assert not bench.sim.turns


async def test_what_is_not_there_is_not_found(bench: SdkBench) -> None:
    sdk = bench.aio_anthropic()
    with pytest.raises(anthropic.NotFoundError) as caught:
        await sdk.models.retrieve("gpt-that-is-not")
    assert caught.value.type == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        await sdk.messages.batches.list()


async def test_a_body_that_is_too_large_is_refused_as_such(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], max_body_bytes=10_000) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        sdk = SdkBench(stand, opened).aio_anthropic()
        with pytest.raises(anthropic.ContentTooLargeError, match="request_too_large"):
            await sdk.messages.create(**say("x" * 20_000))


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_exhausted_pool_is_a_rate_limit_error_that_no_retry_follows(
    bench: SdkBench, streamed: bool
) -> None:
    # This SDK would wait for any reset, however far.
    for account, resets_in in zip(bench.sim.accounts, (7200, 30, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    create = typing.cast("Callable[..., Awaitable[Any]]", bench.aio_anthropic(max_retries=2).messages.create)
    with pytest.raises(anthropic.RateLimitError) as caught:
        await create(**say(stream=streamed))
    assert caught.value.type == "rate_limit_error"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 31
    assert len(bench.sent) == 1
    assert sorted(str(turn.account) for turn in bench.sim.turns) == ["a1", "a2", "a3"]


async def test_a_passing_shortage_is_an_overload_that_the_sdk_retries_until_it_is_over(
    tmp_path: Path,
) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], max_retry=0) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        for account in bench.sim.accounts:
            account.set("overloaded")
        with pytest.raises(anthropic.InternalServerError) as caught:
            await bench.aio_anthropic().messages.create(**say())
        assert (caught.value.status_code, caught.value.type) == (529, "overloaded_error")
        assert len(bench.sent) == 1
        for account in bench.sim.accounts:
            account.set("ok")
        bench.sim.script(Script.state("overloaded"), "There was room.")
        answer = await bench.aio_anthropic(max_retries=3).messages.create(**say())
        assert text_of(answer) == "There was room."
        assert len(bench.sent) > 2


async def test_an_empty_pool_ends_at_once(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], auths=lambda sim, folder: None) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        with pytest.raises(anthropic.RateLimitError):
            await bench.aio_anthropic(max_retries=2).messages.create(**say())
        assert len(bench.sent) == 1


@pytest.mark.parametrize(
    "state", ["usage_limit", "rate_limit", "overloaded_in_stream", "cloudflare", "unauthorized"]
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_one_accounts_failure_is_not_seen_by_the_sdk(
    bench: SdkBench, state: str, streamed: bool
) -> None:
    bench.sim.script(Script.state(state), "Served all the same.")
    sdk = bench.aio_anthropic()
    if streamed:
        async with sdk.messages.stream(**say()) as stream:
            text = await stream.get_final_text()
    else:
        text = text_of(await sdk.messages.create(**say()))
    assert text == "Served all the same."
    assert len(bench.sim.turns) == 2
