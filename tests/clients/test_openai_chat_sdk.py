"""The openai SDK as a caller of Chat Completions and the legacy completions.

Every chunk is held to the SDK's types, every failure to its exceptions.
"""

import asyncio
import contextlib
import itertools
import json
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from pydantic import BaseModel, ValidationError

from codex_proxy.simulator import Script
from codex_proxy.trace import End
from tests.clients.sdk_bench import (
    KEY,
    LOOSE,
    PDF,
    PIXEL_URL,
    WEATHER,
    SdkBench,
    Weather,
    datas,
    read,
    sealed,
    told,
    unnamed,
)
from tests.harness import LITE, STANDARD, Answer, standing

PATH = "/v1/chat/completions"

LOOKUP: Any = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look a word up.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}
PATCH: Any = {"type": "custom", "custom": {"name": "patch", "description": "Apply a patch."}}

OURS = {"reasoning_content", "reasoning_details", "annotations", "images"}
"""What a message or a delta may have beside the SDK's own fields."""

SCRIPTS: dict[str, Callable[[], Script]] = {
    "text": lambda: Script.text("Hello there, **you**."),
    "long text": lambda: Script.long_text(300),
    "reasoning": lambda: Script.reasoning(["**First**\n\nthought", "**Second**"], "Here it is."),
    "reasoning alone": lambda: Script.reasoning(text=""),
    "a tool": lambda: Script.tool("lookup", {"word": "proxy"}),
    "two tools at once": lambda: Script.parallel_tools([
        ("lookup", {"word": "a"}),
        ("lookup", {"word": "b"}),
    ]),
    "thought, text and tools": lambda: Script.of(
        Script.reasoning("**Plan**", "On it."),
        Script.tool("lookup", {"word": "x"}),
        Script.tool("lookup", {"word": "y"}),
    ),
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

FAILURES: dict[str, Callable[[], Script]] = {
    "a failure after the first word": lambda: Script.state("failed", code="server_error", after=3),
    "an overload after the first word": lambda: Script.state("overloaded_in_stream", after=3),
    "an error event after the first word": lambda: Script.state(
        "failed", code="server_error", how="error", after=3
    ),
    "a cut after the first word": lambda: Script.state("cut", after=6),
    "a clean cut after the first word": lambda: Script.state("cut", after=6, clean=True),
    "a reset after the first word": lambda: Script.state("cut", after=6, reset=True),
}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[SdkBench]:
    async with standing(tmp_path, api_keys=[KEY]) as stand, contextlib.AsyncExitStack() as opened:
        yield SdkBench(stand, opened)


def say(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """Return the fields of a request that says *text*."""
    return {"model": STANDARD, "messages": [{"role": "user", "content": text}], **fields}


async def begin(sdk: openai.AsyncOpenAI, **fields: Any) -> openai.AsyncStream[ChatCompletionChunk]:
    """Ask for a stream."""
    create = typing.cast("Callable[..., Awaitable[Any]]", sdk.chat.completions.create)
    stream = await create(**say(stream=True, **fields))
    assert isinstance(stream, openai.AsyncStream)
    return stream


async def chunks_to_end(sdk: openai.AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    """Ask for a stream and read it to its end."""
    chunks: list[ChatCompletionChunk] = []
    await read(await begin(sdk, **fields), chunks)
    return chunks


def chunks_of(answer: Answer) -> list[ChatCompletionChunk]:
    """Return the chunks of a stream that ends well, each held to the SDK's class, nothing converted."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, done = datas(answer)
    assert done == b"[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(data, strict=True) for data in found]
    for chunk in chunks:
        extra = {path.removeprefix("choices.delta.") for path in unnamed(chunk)}
        assert extra <= OURS
    return chunks


def join(chunks: list[ChatCompletionChunk], field: str = "content") -> str:
    """Return a text that came in pieces."""
    return "".join(getattr(c.delta, field, None) or "" for chunk in chunks for c in chunk.choices)


def calls_of(message: ChatCompletionMessage) -> list[tuple[str, str]]:
    """Return names and arguments of the functions that a message calls."""
    return [
        (call.function.name, call.function.arguments)
        for call in message.tool_calls or []
        if call.type == "function"
    ]


# Types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_chunk_and_every_answer_fits_the_types_of_the_sdk(
    bench: SdkBench, name: str, model: str
) -> None:
    bench.sim.script(SCRIPTS[name](), SCRIPTS[name]())
    body = say(model=model, tools=[LOOKUP], stream_options={"include_usage": True})
    chunks = chunks_of(await bench.post(PATH, {**body, "stream": True}))
    plain = await bench.post(PATH, body)

    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].model == model
    assert [c.delta.role for chunk in chunks for c in chunk.choices if c.delta.role] == ["assistant"]
    assert chunks[0].choices[0].delta.role == "assistant"
    *middle, end, last = chunks
    assert [c.choices[0].finish_reason for c in middle] == [None] * len(middle)
    assert all(chunk.usage is None for chunk in (*middle, end))
    assert last.choices == []
    assert last.usage is not None
    (ending,) = end.choices

    whole = ChatCompletion.model_validate_json(plain.body, strict=True)
    assert {path.removeprefix("choices.message.") for path in unnamed(whole)} <= OURS
    (choice,) = whole.choices
    assert choice.finish_reason == ending.finish_reason
    assert (choice.message.content or "") == join(chunks)
    assert (choice.message.refusal or "") == join(chunks, "refusal")
    assert getattr(choice.message, "reasoning_content", "") == join(chunks, "reasoning_content")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == last.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    streamed: dict[int, list[str]] = {}
    for call in (call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or ()):
        assert call.function is not None
        pieces = streamed.setdefault(call.index, [call.function.name or "", ""])
        pieces[1] += call.function.arguments or ""
    assert [(name, arguments) for name, arguments in streamed.values()] == calls_of(choice.message)


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_stream_that_breaks_raises_and_never_looks_complete(
    bench: SdkBench, name: str, model: str
) -> None:
    bench.sim.script(*(FAILURES[name]() for _ in range(3)))
    answer = await bench.post(PATH, say(model=model, stream=True))
    assert answer.status == 200
    *before, last = datas(answer)
    assert b"[DONE]" not in answer.body
    chunks = [ChatCompletionChunk.model_validate_json(data, strict=True) for data in before]
    assert all(c.finish_reason is None for chunk in chunks for c in chunk.choices)
    assert set(json.loads(last)) == {"error"}

    def use() -> tuple[list[Any], list[str]]:
        sync = bench.sync_openai()
        seen: list[Any] = []
        with pytest.raises(openai.APIError):
            seen.extend(sync.chat.completions.create(**say(model=model, stream=True)))
        types: list[str] = []
        with sync.chat.completions.stream(**say(model=model)) as stream, pytest.raises(openai.APIError):
            types.extend(event.type for event in stream)
        return seen, types

    seen, types = await asyncio.to_thread(use)
    assert len(seen) == len(chunks) > 1
    assert "content.delta" in types
    assert "content.done" not in types


async def test_a_proxy_that_stops_in_the_middle_of_a_stream_raises(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as opened, contextlib.AsyncExitStack() as standing_up:
        stand = await standing_up.enter_async_context(standing(tmp_path, api_keys=[KEY], drain_timeout=0))
        bench = SdkBench(stand, opened)
        bench.sim.script(Script.long_text(2000, delay=0.01))
        stream = await begin(bench.aio_openai())
        seen = [await anext(stream)]
        stopping = asyncio.gather(standing_up.aclose())
        with pytest.raises(openai.APIError):
            await read(stream, seen)
        assert all(chunk.choices[0].finish_reason is None for chunk in seen)
        await stopping


async def test_comments_while_the_backend_is_silent_are_no_chunks_of_the_answer(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], keep_alive_after=0.1) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        bench.sim.script(*(Script.state("stall", where="created", seconds=0.5) for _ in range(2)))
        assert join(await chunks_to_end(bench.aio_openai())).startswith("The answer")
        answer = await bench.post(PATH, say(stream=True))
        assert answer.body.startswith(b": ")
        assert join(chunks_of(answer)).startswith("The answer")


async def test_behind_comments_another_account_serves_and_a_failure_is_told_in_the_stream(
    tmp_path: Path,
) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], keep_alive_after=0.1) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        bench = SdkBench(stand, opened)
        bench.sim.latency = 0.3
        bench.sim.script(Script.state("usage_limit"), "Served all the same.")
        assert join(await chunks_to_end(bench.aio_openai())) == "Served all the same."
        bench.sim.set_all("usage_limit", resets_in=3600)
        late = await begin(bench.aio_openai(max_retries=2))
        with pytest.raises(openai.APIError) as caught:
            await read(late, [])
        assert caught.value.type == "usage_limit_reached"
        assert len(bench.sent) == 2


# Answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "", "/v1/v1"])
async def test_the_base_url_may_end_as_users_write_it(bench: SdkBench, base: str) -> None:
    bench.sim.script("Found it.")
    answer = await bench.aio_openai(base).chat.completions.create(**say())
    assert answer.choices[0].message.content == "Found it."


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_every_way_to_ask_gives_the_same_answer(bench: SdkBench, model: str) -> None:
    bench.sim.script(*(Script.reasoning("**Hm**", "Forty-two.") for _ in range(6)))

    def use() -> list[str | None]:
        completions = bench.sync_openai().chat.completions
        plain = completions.create(**say(model=model))
        pieces = [chunk.choices[0].delta.content or "" for chunk in completions.create(**say(stream=True))]
        with completions.stream(**say(model=model)) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == "stop"
        return [
            plain.choices[0].message.content,
            "".join(pieces),
            "".join(deltas),
            final.choices[0].message.content,
        ]

    async def use_async() -> list[str | None]:
        completions = bench.aio_openai().chat.completions
        plain = await completions.create(**say(model=model))
        pieces = join(await chunks_to_end(bench.aio_openai(), model=model))
        async with completions.stream(**say(model=model)) as stream:
            final = await stream.get_final_completion()
        return [plain.choices[0].message.content, pieces, final.choices[0].message.content]

    answers = [*await asyncio.to_thread(use), *await use_async()]
    assert answers == ["Forty-two."] * 7
    assert [trace.end for trace in bench.traces] == [End.COMPLETED] * 6


async def test_raw_and_streaming_access_give_the_request_id(bench: SdkBench) -> None:
    bench.sim.script("one", "two")
    completions = bench.aio_openai().chat.completions
    raw = await completions.with_raw_response.create(**say())
    assert raw.parse().choices[0].message.content == "one"
    async with completions.with_streaming_response.create(**say(stream=True)) as response:
        lines = [line async for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert raw.request_id == bench.traces[0].id
    assert response.request_id == bench.traces[1].id


async def test_many_streams_of_one_client_do_not_mix(bench: SdkBench) -> None:
    sdk = bench.aio_openai()

    async def ask(number: int) -> str | None:
        async with sdk.chat.completions.stream(**say(f"number {number}")) as stream:
            return (await stream.get_final_completion()).choices[0].message.content

    answers = await asyncio.gather(*(ask(number) for number in range(20)))
    assert answers == [f"pong: number {number}" for number in range(20)]


async def test_a_closed_stream_frees_the_account_at_once(bench: SdkBench) -> None:
    bench.sim.script(Script.long_text(400, delay=0.01))
    stream = await begin(bench.aio_openai())
    while not (await anext(stream)).choices[0].delta.content:
        pass
    await stream.close()
    (turn,) = bench.sim.turns
    await asyncio.wait_for(turn.closed.wait(), 3)
    assert turn.cancelled


async def test_usage_ends_a_stream_only_when_it_is_asked_for(bench: SdkBench) -> None:
    bench.sim.script(*(Script.reasoning("**Hm**", "Counted.") for _ in range(3)))
    sdk = bench.aio_openai()
    talk = {"prompt_cache_key": "one conversation"}
    plain = (await sdk.chat.completions.create(**say(**talk))).usage
    assert plain is not None
    assert plain.completion_tokens_details is not None
    assert (plain.completion_tokens_details.reasoning_tokens or 0) > 0
    without = await chunks_to_end(sdk, **talk)
    assert all("usage" not in chunk.model_fields_set for chunk in without)
    *chunks, last = await chunks_to_end(sdk, stream_options={"include_usage": True}, **talk)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == plain.prompt_tokens
    assert last.usage.prompt_tokens_details is not None
    # The very same conversation is in the backend's cache by now.
    assert (last.usage.prompt_tokens_details.cached_tokens or 0) > 0
    assert last.usage.completion_tokens == plain.completion_tokens


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_sequence_ends_the_answer_here(bench: SdkBench, streamed: bool) -> None:
    bench.sim.script("One, two, three END four.")
    sdk = bench.aio_openai()
    asked = say(stop=["nowhere", "END"])
    if streamed:
        async with sdk.chat.completions.stream(**asked) as stream:
            answer: ChatCompletion = await stream.get_final_completion()
    else:
        answer = await sdk.chat.completions.create(**asked)
    assert answer.choices[0].message.content == "One, two, three "
    assert answer.choices[0].finish_reason == "stop"
    assert "stop" not in bench.last


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_an_output_limit_is_kept_here(bench: SdkBench, name: str) -> None:
    bench.sim.script(Script.long_text(200), Script.long_text(200), Script.long_text(200))
    sdk = bench.aio_openai()
    limit: dict[str, Any] = {name: 20}
    answer = await sdk.chat.completions.create(**say(**limit))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 20
    assert 0 < len(answer.choices[0].message.content or "") <= 80
    chunks = await chunks_to_end(sdk, **limit)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert join(chunks) == answer.choices[0].message.content
    # The helpers do not take half an answer for a structured one.
    with pytest.raises(openai.LengthFinishReasonError):
        await sdk.chat.completions.parse(**say(response_format=Weather, **limit))
    assert all(name not in turn.json for turn in bench.sim.turns)


async def test_what_ends_an_answer_is_named_in_the_sdks_words(bench: SdkBench) -> None:
    bench.sim.script(
        Script.incomplete("content_filter"), Script.incomplete(), Script.incomplete("content_filter")
    )
    sdk = bench.aio_openai()
    filtered = await sdk.chat.completions.create(**say())
    cut = await sdk.chat.completions.create(**say())
    assert [filtered.choices[0].finish_reason, cut.choices[0].finish_reason] == ["content_filter", "length"]
    with pytest.raises(openai.ContentFilterFinishReasonError):
        await sdk.chat.completions.parse(**say(response_format=Weather))


async def test_a_refusal_is_no_content_and_goes_back_as_one(bench: SdkBench) -> None:
    bench.sim.script(*(Script.refusal("I will not.") for _ in range(3)), "As you wish.")
    sdk = bench.aio_openai()
    answer = await sdk.chat.completions.create(**say())
    message = answer.choices[0].message
    assert (message.content, message.refusal) == (None, "I will not.")
    async with sdk.chat.completions.stream(**say()) as stream:
        types = [event.type async for event in stream]
        final = (await stream.get_final_completion()).choices[0].message
    assert types.count("refusal.done") == 1
    assert (final.content or None, final.refusal) == (None, "I will not.")
    parsed = await sdk.chat.completions.parse(**say(response_format=Weather))
    assert (parsed.choices[0].message.parsed, parsed.choices[0].message.refusal) == (None, "I will not.")
    history = [*say()["messages"], message.to_dict(), {"role": "user", "content": "Fine."}]
    await sdk.chat.completions.create(model=STANDARD, messages=history)
    assert told(bench.sim.turns[-1]) == [("user", "hi"), ("assistant", "I will not."), ("user", "Fine.")]


async def test_a_web_search_cites_its_pages(bench: SdkBench) -> None:
    bench.sim.script(Script.web_search("news"), Script.web_search("news"))
    for model in (STANDARD, LITE):
        asked = say(model=model, web_search_options={"search_context_size": "low"})
        answer = await bench.aio_openai().chat.completions.create(**asked)
        message = answer.choices[0].message
        assert message.content == "It is sunny."
        (note,) = message.annotations or []
        assert note.url_citation.url == "https://example.com/simulated"
        cited = message.content[note.url_citation.start_index : note.url_citation.end_index]
        assert cited == "It is sunny."
        assert bench.last["tools"] == [{"type": "web_search", "search_context_size": "low"}]


async def test_knobs_that_the_backend_refuses_do_not_reach_it(bench: SdkBench) -> None:
    bench.sim.script("Fine.")
    answer = await bench.aio_openai().chat.completions.create(
        model=STANDARD,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi", "name": "me"},
        ],
        temperature=0.2,
        top_p=0.9,
        seed=7,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={"50256": -100},
        logprobs=True,
        top_logprobs=2,
        n=1,
        metadata={"a": "b"},
        user="me",
        store=True,
        prediction={"type": "content", "content": "Fine"},
        reasoning_effort="low",
        verbosity="high",
        service_tier="priority",
    )
    assert answer.choices[0].message.content == "Fine."
    received = bench.last
    assert received["reasoning"]["effort"] == "low"
    assert received["text"]["verbosity"] == "high"
    assert received["service_tier"] == "priority"
    assert told(bench.sim.turns[-1]) == [("developer", "Be brief."), ("user", "hi")]


# Pictures and files ------------------------------------------------------------------------


async def test_pictures_and_files_arrive_as_they_were_sent(bench: SdkBench) -> None:
    bench.sim.script("Seen.", "Seen.")
    for model in (STANDARD, LITE):
        answer = await bench.aio_openai().chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What are these?"},
                        {"type": "image_url", "image_url": {"url": PIXEL_URL, "detail": "high"}},
                        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
                        {
                            "type": "file",
                            "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
                        },
                        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                    ],
                }
            ],
        )
        assert answer.choices[0].message.content == "Seen."
        assert bench.last["input"][-1]["content"] == [
            {"type": "input_text", "text": "What are these?"},
            {"type": "input_image", "image_url": PIXEL_URL, "detail": "high"},
            {"type": "input_image", "image_url": "https://example.com/cat.png"},
            {
                "type": "input_file",
                "file_data": f"data:application/pdf;base64,{PDF}",
                "filename": "a.pdf",
            },
            {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        ]


# Tools -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_tool_loop_keeps_its_thoughts_its_calls_and_its_pictures(
    bench: SdkBench, model: str, streamed: bool
) -> None:
    bench.sim.script(
        Script.of(
            Script.reasoning("**Plan**", "Looking both up."),
            Script.tool("lookup", {"word": "proxy"}),
            Script.tool("lookup", {"word": "relay"}),
        )
    )

    def ask(history: list[Any]) -> ChatCompletionMessage:
        completions = bench.sync_openai().chat.completions
        if streamed:
            with completions.stream(model=model, messages=history, tools=[LOOKUP]) as stream:
                done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
                message: ChatCompletionMessage = stream.get_final_completion().choices[0].message
            assert [(e.name, e.arguments) for e in done] == calls_of(message)
            return message
        return completions.create(model=model, messages=history, tools=[LOOKUP]).choices[0].message

    history: list[Any] = [{"role": "user", "content": "What is a proxy?"}]
    first = await asyncio.to_thread(ask, history)
    assert calls_of(first) == [("lookup", '{"word":"proxy"}'), ("lookup", '{"word":"relay"}')]
    assert first.content == "Looking both up."

    # The message goes back whole, as the SDK's guide has it.
    one, other = first.tool_calls or []
    history += [
        first.to_dict(),
        {
            "role": "tool",
            "tool_call_id": other.id,
            "content": [
                {"type": "text", "text": "a relay looks so:"},
                {"type": "image_url", "image_url": {"url": PIXEL_URL}},
            ],
        },
        {"role": "tool", "tool_call_id": one.id, "content": "one who speaks for another"},
    ]
    second = await asyncio.to_thread(ask, history)
    assert second.content == "The tool said: one who speaks for another"
    before, after = bench.sim.turns
    assert (before.status, after.status, after.account) == (200, 200, before.account)
    # The very thought that the backend sealed, and not another one.
    details = first.to_dict()["reasoning_details"]
    assert sealed(after) == [detail["data"] for detail in typing.cast("list[Any]", details)]
    assert told(after) == [
        ("user", "What is a proxy?"),
        ("thought", "**Plan**"),
        ("assistant", "Looking both up."),
        ("call", "lookup", {"word": "proxy"}),
        ("call", "lookup", {"word": "relay"}),
        ("output", "a relay looks so:", PIXEL_URL),
        ("output", "one who speaks for another"),
    ]
    outputs = [item["call_id"] for item in after.json["input"] if item["type"] == "function_call_output"]
    assert outputs == [other.id, one.id]


async def test_a_custom_tool_is_called_with_plain_text_and_answered(bench: SdkBench) -> None:
    patch = '*** Begin Patch\n"quoted"'
    bench.sim.script(Script.custom_tool("patch", patch), Script.custom_tool("patch", patch), "Patched.")
    sdk = bench.aio_openai()
    asked = say(tools=[PATCH])
    answer = await sdk.chat.completions.create(**asked)
    message = answer.choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "custom"
    assert (call.custom.name, call.custom.input) == ("patch", patch)
    assert answer.choices[0].finish_reason == "tool_calls"

    # The SDK has no class for a custom call in a stream, though the API sends them so.
    streamed = [
        json.loads(data)["choices"][0]["delta"].get("tool_calls")
        for data in datas(await bench.post(PATH, {**asked, "stream": True}))[:-1]
    ]
    with pytest.raises(ValidationError):
        ChatCompletionChunk.model_validate({
            **answer.to_dict(),
            "choices": [{"delta": {"tool_calls": [call.to_dict()]}}],
        })
    opened, *pieces = [calls[0] for calls in streamed if calls]
    assert (opened["type"], opened["custom"]["name"], opened["index"]) == ("custom", "patch", 0)
    assert "".join(piece["custom"]["input"] for piece in pieces) == patch

    history = [
        *asked["messages"],
        message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    last = await sdk.chat.completions.create(model=STANDARD, messages=history, tools=[PATCH])
    assert last.choices[0].message.content == "Patched."
    assert told(bench.sim.turns[-1]) == [("user", "hi"), ("custom", "patch", patch), ("output", "done")]


async def test_a_forced_tool_is_called_with_arguments_that_parse(bench: SdkBench) -> None:
    class Lookup(BaseModel):
        word: str

    tool = openai.pydantic_function_tool(Lookup, name="lookup")
    for model in (STANDARD, LITE):
        asked = say(
            model=model, tools=[tool], tool_choice={"type": "function", "function": {"name": "lookup"}}
        )
        answer = await bench.aio_openai().chat.completions.parse(**asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.parsed_arguments == Lookup(word="simulated")
        assert bench.last["tool_choice"]["name"] == "lookup"


async def test_tools_may_be_narrowed_to_some(bench: SdkBench) -> None:
    bench.sim.script(Script.tool("lookup", {"word": "x"}))
    await bench.aio_openai().chat.completions.create(
        **say(
            tools=[LOOKUP, PATCH],
            parallel_tool_calls=False,
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "lookup"}}],
                },
            },
        )
    )
    assert bench.last["parallel_tool_calls"] is False
    assert bench.last["tool_choice"] == {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "lookup"}],
    }


async def test_a_name_that_the_backend_refuses_comes_back_as_the_caller_wrote_it(bench: SdkBench) -> None:
    name = "files.read/" + "deep_" * 20
    tool = {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {}}},
    }
    answer = await bench.aio_openai().chat.completions.create(**say(tools=[tool], tool_choice="required"))
    (called, _) = calls_of(answer.choices[0].message)[0]
    assert called == name
    assert bench.last["tools"][0]["name"] != name


async def test_the_older_functions_are_called_in_their_older_shape(bench: SdkBench) -> None:
    bench.sim.script(*(Script.tool("lookup", {"word": "old"}) for _ in range(2)), "As ever.")
    sdk = bench.aio_openai()
    asked = say(functions=[LOOKUP["function"]], function_call="auto")
    answer = await sdk.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "function_call"
    assert message.function_call is not None
    assert (message.function_call.name, message.function_call.arguments) == ("lookup", '{"word":"old"}')
    chunks = await chunks_to_end(sdk, **asked)
    pieces = [c.choices[0].delta.function_call for c in chunks if c.choices[0].delta.function_call]
    assert [piece.name for piece in pieces if piece.name] == ["lookup"]
    assert "".join(piece.arguments or "" for piece in pieces) == '{"word":"old"}'
    history = [
        *asked["messages"],
        message.to_dict(),
        {"role": "function", "name": "lookup", "content": "found"},
    ]
    last = await sdk.chat.completions.create(**{**asked, "messages": history})
    assert last.choices[0].message.content == "As ever."
    assert told(bench.sim.turns[-1]) == [
        ("user", "hi"),
        ("call", "lookup", {"word": "old"}),
        ("output", "found"),
    ]


# Structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_structured_answer_is_parsed(bench: SdkBench, model: str) -> None:
    bench.sim.script(*[WEATHER] * 3)

    def use() -> list[Weather | None]:
        sync = bench.sync_openai()
        plain = sync.chat.completions.parse(**say(model=model, response_format=Weather))
        with sync.chat.completions.stream(**say(model=model, response_format=Weather)) as stream:
            done = [event.parsed for event in stream if event.type == "content.done"]
            final = stream.get_final_completion()
        return [plain.choices[0].message.parsed, *done, final.choices[0].message.parsed]

    parsed = await asyncio.to_thread(use)
    aio = await bench.aio_openai().chat.completions.parse(**say(model=model, response_format=Weather))
    expected = Weather(city="Oslo", degrees=3, is_raining=True)
    assert [*parsed, aio.choices[0].message.parsed] == [expected] * 4
    form = bench.last["text"]["format"]
    assert (form["type"], form["name"], form["strict"]) == ("json_schema", "Weather", True)
    assert form["schema"]["required"] == ["city", "degrees", "is_raining"]


async def test_an_answer_may_be_any_json(bench: SdkBench) -> None:
    answer = await bench.aio_openai().chat.completions.create(**say(response_format={"type": "json_object"}))
    assert json.loads(answer.choices[0].message.content or "") == {"answer": "pong"}


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
        Script.of(Script.reasoning("**Three**", "And a patch."), Script.custom_tool("patch", "+ line")),
        Script.reasoning("**Four**", "Done with it."),
        Script.refusal("Not that."),
        Script.text("The end."),
    )
    loose = bench.aio_openai(**LOOSE)
    strict = bench.aio_openai()
    history: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look at this"},
                {"type": "image_url", "image_url": {"url": PIXEL_URL}},
            ],
        },
    ]

    async def turn(*new: Any) -> dict[str, Any]:
        history.extend(new)
        asked: dict[str, Any] = {"model": model, "messages": history, "tools": [LOOKUP, PATCH]}
        if streamed:
            # Only a loose client takes a custom call in a stream.
            message = await collect(loose, asked)
        else:
            message = (await strict.chat.completions.create(**asked)).choices[0].message.to_dict()
        history.append(message)
        return message

    first = await turn()
    a, b = first["tool_calls"]
    second = await turn(
        {"role": "tool", "tool_call_id": a["id"], "content": "A is first"},
        {
            "role": "tool",
            "tool_call_id": b["id"],
            "content": [
                {"type": "text", "text": "B is"},
                {"type": "image_url", "image_url": {"url": PIXEL_URL}},
            ],
        },
    )
    (custom,) = second["tool_calls"]
    await turn({"role": "tool", "tool_call_id": custom["id"], "content": "patched"})
    await turn({"role": "user", "content": "Something bad"})
    last = await turn({"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Bye"})
    assert last["content"] == "The end."

    assert [turn.status for turn in bench.sim.turns] == [200] * 5
    assert len({turn.account for turn in bench.sim.turns}) == 1
    assert len({turn.json["prompt_cache_key"] for turn in bench.sim.turns}) == 1
    assert told(bench.sim.turns[-1]) == [
        ("developer", "Be brief."),
        ("user", "Look at this", PIXEL_URL),
        ("thought", "**One**", "**Two**"),
        ("assistant", "Both at once."),
        ("call", "lookup", {"word": "a"}),
        ("call", "lookup", {"word": "b"}),
        ("output", "A is first"),
        ("output", "B is", PIXEL_URL),
        ("thought", "**Three**"),
        ("assistant", "And a patch."),
        ("custom", "patch", "+ line"),
        ("output", "patched"),
        ("thought", "**Four**"),
        ("assistant", "Done with it."),
        ("user", "Something bad"),
        ("assistant", "Not that."),
        ("developer", "Be kind."),
        ("user", "Bye"),
    ]
    # Each turn begins with what the one before it sent: so the backend's cache can help.
    for before, after in itertools.pairwise(bench.sim.turns):
        sent = before.json["input"]
        assert after.json["input"][: len(sent)] == sent


async def collect(sdk: openai.AsyncOpenAI, asked: dict[str, Any]) -> dict[str, Any]:
    """Put a streamed message together as people do who go by `index`, custom calls too."""
    message: dict[str, Any] = {"role": "assistant"}
    async for chunk in await sdk.chat.completions.create(**asked, stream=True):
        for key, value in chunk.choices[0].delta.to_dict().items() if chunk.choices else ():
            if isinstance(value, str) and key != "role":
                message[key] = message.get(key, "") + value
            elif isinstance(value, list):
                for entry in value:
                    entries = message.setdefault(key, [])
                    if entry["index"] == len(entries):
                        entries.append(entry)
                        continue
                    known = entries[entry["index"]]
                    for form in ("function", "custom"):
                        for name, piece in entry.get(form, {}).items():
                            known[form][name] += piece
    return message


# Legacy completions ------------------------------------------------------------------------


async def test_a_text_is_completed_streamed_and_not(bench: SdkBench) -> None:
    bench.sim.script(*[" upon a time."] * 4)

    def use() -> tuple[Completion, list[Completion]]:
        plain = bench.sync_openai().completions.create(model=STANDARD, prompt="Once")
        wanted: Any = {"include_usage": True}
        # The SDK's class needs a reason in every chunk, though the API has none but in the last.
        stream = bench.sync_openai(**LOOSE).completions.create(
            model=STANDARD, prompt="Once", stream=True, stream_options=wanted
        )
        return plain, list(stream)

    plain, chunks = await asyncio.to_thread(use)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (" upon a time.", "stop")
    *pieces, last = chunks
    assert "".join(c.choices[0].text for c in pieces) == " upon a time."
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert plain.usage is not None
    assert last.usage.completion_tokens == plain.usage.completion_tokens
    aio = await bench.aio_openai().completions.create(model=STANDARD, prompt=["Once"], echo=True)
    assert aio.choices[0].text == "Once upon a time."
    assert bench.last["input"][-1]["content"][-1]["text"] == "Once"


async def test_every_chunk_of_a_completion_fits_but_for_the_reason_that_comes_last(bench: SdkBench) -> None:
    bench.sim.script(Script.reasoning("**Hm**", " upon a time."))
    answer = await bench.post("/v1/completions", {"model": STANDARD, "prompt": "Once", "stream": True})
    *found, done = datas(answer)
    assert done == b"[DONE]"
    for data in found:
        chunk = json.loads(data)
        (choice,) = chunk["choices"]
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        assert list(unnamed(Completion.model_validate_json(json.dumps(chunk), strict=True))) == []
    reasons = [json.loads(data)["choices"][0]["finish_reason"] for data in found]
    assert reasons == [None] * (len(found) - 1) + ["stop"]


async def test_limits_of_a_completion_are_kept_here(bench: SdkBench) -> None:
    bench.sim.script("One two. Three", Script.long_text(100), Script.refusal("No."))
    sdk = bench.aio_openai()
    stopped = await sdk.completions.create(model=STANDARD, prompt="Count:", stop=".", suffix="five")
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("One two", "stop")
    assert "five" in json.dumps(bench.last["input"])
    long = await sdk.completions.create(model=STANDARD, prompt="Count:", max_tokens=5)
    assert long.choices[0].finish_reason == "length"
    assert len(long.choices[0].text) <= 20
    refused = await sdk.completions.create(model=STANDARD, prompt="Count:")
    assert (refused.choices[0].text, refused.choices[0].finish_reason) == ("No.", "content_filter")


async def test_a_completion_that_breaks_raises(bench: SdkBench) -> None:
    bench.sim.script(Script.state("cut", after=6))
    stream = await bench.aio_openai(**LOOSE).completions.create(model=STANDARD, prompt="Once", stream=True)
    seen: list[Completion] = []
    with pytest.raises(openai.APIError):
        await read(stream, seen)
    assert seen
    assert not any(chunk.choices[0].finish_reason for chunk in seen)


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_callers_fault_is_a_bad_request_that_names_the_field(
    bench: SdkBench, streamed: bool
) -> None:
    sdk = bench.aio_openai(max_retries=2)
    picture = {"type": "image_url", "image_url": 3}
    for fields, param in (
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [picture]}]}, "messages.0.content.0.image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.chat.completions.create(
                **say(stream=streamed, **{"messages": say()["messages"], **fields})
            )
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id
    assert len(bench.sent) == 6
    assert not bench.sim.turns


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_the_backend_refuses_of_a_request_is_a_bad_request(
    bench: SdkBench, streamed: bool
) -> None:
    bench.sim.script(Script.state("context_length"))
    with pytest.raises(openai.BadRequestError) as caught:
        await bench.aio_openai(max_retries=2).chat.completions.create(**say(stream=streamed))
    assert caught.value.code == "context_length_exceeded"
    assert len(bench.sim.turns) == 1


async def test_a_wrong_key_is_an_authentication_error(bench: SdkBench) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await bench.aio_openai(api_key="another").chat.completions.create(**say())
    assert "another" not in str(caught.value)
    assert not bench.sim.turns


async def test_what_is_not_there_is_not_found(bench: SdkBench) -> None:
    sdk = bench.aio_openai()
    with pytest.raises(openai.NotFoundError) as caught:
        await sdk.models.retrieve("gpt-that-is-not")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await sdk.embeddings.create(model="text-embedding-3-small", input="hi")
    with pytest.raises(openai.NotFoundError):
        await bench.aio_openai("/nowhere").chat.completions.create(**say())


async def test_a_body_that_is_too_large_is_refused_with_its_status(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, api_keys=[KEY], max_body_bytes=10_000) as stand,
        contextlib.AsyncExitStack() as opened,
    ):
        sdk = SdkBench(stand, opened).aio_openai()
        with pytest.raises(openai.APIStatusError) as caught:
            await sdk.chat.completions.create(**say("x" * 20_000))
        assert caught.value.status_code == 413


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_exhausted_pool_is_a_rate_limit_error_that_no_retry_follows(
    bench: SdkBench, streamed: bool
) -> None:
    # A reset so near that the SDK would wait for it if it were not told otherwise.
    for account, resets_in in zip(bench.sim.accounts, (7200, 90, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    with pytest.raises(openai.RateLimitError) as caught:
        await bench.aio_openai(max_retries=2).chat.completions.create(**say(stream=streamed))
    assert caught.value.type == "usage_limit_reached"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert [trace.status for trace in bench.traces] == [429]
    assert len(bench.sent) == 1
    assert sorted(str(turn.account) for turn in bench.sim.turns) == ["a1", "a2", "a3"]


async def test_a_passing_shortage_is_retried_by_the_sdk_until_it_is_over(bench: SdkBench) -> None:
    for account in bench.sim.accounts:
        account.set("server_error", status=500, times=1)
    bench.sim.script("Back again.")
    answer = await bench.aio_openai(max_retries=3).chat.completions.create(**say())
    assert answer.choices[0].message.content == "Back again."
    assert len(bench.sent) == len(bench.traces) > 1


@pytest.mark.parametrize(
    "state", ["usage_limit", "rate_limit", "overloaded_in_stream", "cloudflare", "unauthorized"]
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_one_accounts_failure_is_not_seen_by_the_sdk(
    bench: SdkBench, state: str, streamed: bool
) -> None:
    bench.sim.script(Script.state(state), "Served all the same.")
    sdk = bench.aio_openai()
    if streamed:
        async with sdk.chat.completions.stream(**say()) as stream:
            answer: ChatCompletion = await stream.get_final_completion()
    else:
        answer = await sdk.chat.completions.create(**say())
    assert answer.choices[0].message.content == "Served all the same."
    assert len(bench.sim.turns) == 2
