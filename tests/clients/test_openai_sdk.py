"""The openai SDK as a caller: every answer held to its types, every failure to its exceptions."""

import asyncio
import contextlib
import typing
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from codex_proxy.protocol.sse import Event
from codex_proxy.simulator import Script
from tests.harness import LITE, STANDARD, Answer, Stand, standing

KEY = "the-key-of-the-caller"

LOOSE: dict[str, Any] = {"_strict_response_validation": False}
"""As clients are unless told otherwise: what they do not know, they take as it is."""

PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

LOOKUP: dict[str, Any] = {
    "type": "function",
    "name": "lookup",
    "description": "Look a word up.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"word": {"type": "string"}},
        "required": ["word"],
        "additionalProperties": False,
    },
}
PATCH: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Apply a patch."}

EVENT_TYPES: dict[str, type[BaseModel]] = {
    typing.get_args(model.model_fields["type"].annotation)[0]: model
    for model in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
}
"""The SDK's class of every event it knows."""


class Weather(BaseModel):
    """What a structured answer is held to."""

    city: str
    degrees: int
    is_raining: bool


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
    "a custom tool": lambda: Script.custom_tool("patch", "*** Begin Patch"),
    "all in one": lambda: Script.of(
        Script.reasoning("**Plan**", "On it."),
        Script.tool("lookup", {"word": "x"}),
        Script.custom_tool("patch"),
    ),
    "a refusal": lambda: Script.refusal(),
    "a web search": lambda: Script.web_search(),
    "an early end": lambda: Script.incomplete(),
    "output listed at the end": lambda: Script.text("Listed.", full_output=True),
    "output not listed at the end": lambda: Script.empty_output("Not listed."),
    "no items": lambda: Script.nothing(),
    "no usage": lambda: Script.no_usage(),
    "cut characters": lambda: Script.unicode(),
}

FAILURES: dict[str, Callable[[], Script]] = {
    "a failure after the first word": lambda: Script.state("failed", code="server_error", after=3),
    "an overload after the first word": lambda: Script.state("overloaded_in_stream", after=3),
    "an error event after the first word": lambda: Script.state(
        "failed", code="server_error", how="error", after=3
    ),
    "a cut after the first word": lambda: Script.state("cut", after=6),
}


class Bench:
    """A standing proxy, and SDK clients of it that check whole answers against their types."""

    def __init__(self, stand: Stand, opened: contextlib.AsyncExitStack) -> None:
        self.stand = stand
        self.sim = stand.sim
        self._opened = opened

    def sync(self, base: str = "/v1", **options: Any) -> openai.OpenAI:
        """Return a client; it blocks, so it belongs in a thread."""
        client = openai.OpenAI(**self._options(base, options))
        self._opened.callback(client.close)
        return client

    def aio(self, base: str = "/v1", **options: Any) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(**self._options(base, options))
        self._opened.push_async_callback(client.close)
        return client

    def _options(self, base: str, options: dict[str, Any]) -> dict[str, Any]:
        common = {"api_key": KEY, "max_retries": 0, "_strict_response_validation": True}
        return {"base_url": self.stand.url + base, **common, **options}

    async def ask(self, **body: Any) -> Answer:
        """Ask without an SDK, to see the bytes."""
        return await self.stand.ask(headers={"Authorization": f"Bearer {KEY}"}, **body)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with standing(tmp_path, api_keys=[KEY]) as stand, contextlib.AsyncExitStack() as opened:
        yield Bench(stand, opened)


def strictly(event: Event) -> BaseModel:
    """Return *event* as the SDK's class for it, every field checked and none converted."""
    return EVENT_TYPES[event.type].model_validate_json(event.data, strict=True)


# Types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [STANDARD, LITE])
@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_event_and_every_answer_fits_the_types_of_the_sdk(
    bench: Bench, name: str, model: str
) -> None:
    tools = [] if name == "a web search" else [LOOKUP, PATCH]
    bench.sim.script(SCRIPTS[name](), SCRIPTS[name]())
    streamed = await bench.ask(model=model, tools=tools, instructions="Be brief.")
    collected = await bench.ask(model=model, tools=tools, instructions="Be brief.", stream=False)

    assert streamed.types[0] == "response.created"
    assert streamed.types[-1] in ("response.completed", "response.incomplete")
    for event in streamed.events:
        strictly(event)
        assert event.json.get("item", {}).get("namespace") is None
    final = Response.model_validate(streamed.events[-1].json["response"], strict=True)
    whole = Response.model_validate_json(collected.body, strict=True)
    assert whole.output_text == final.output_text == streamed.text
    assert [item.type for item in whole.output] == [item.type for item in final.output]
    assert final.model == whole.model == model
    numbers = [event.json["sequence_number"] for event in streamed.events]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("model", [STANDARD, LITE])
@pytest.mark.parametrize("name", FAILURES)
async def test_every_failing_stream_ends_in_an_event_that_fits_its_type(
    bench: Bench, name: str, model: str
) -> None:
    bench.sim.script(FAILURES[name]())
    streamed = await bench.ask(model=model)
    assert streamed.status == 200
    assert streamed.types.count("response.failed") == 1
    assert streamed.types[-1] == "response.failed"
    for event in streamed.events:
        strictly(event)


# The SDK copies the answer into its own types, and warns of an item it has no type for.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_events_of_the_future_pass_and_disturb_no_helper(bench: Bench, model: str) -> None:
    bench.sim.script(Script.unknown_events("Still here."))

    def use() -> tuple[list[str], str]:
        with bench.sync(**LOOSE).responses.stream(model=model, input="hi") as stream:
            types: list[str] = [event.type for event in stream]
            return types, stream.get_final_response().output_text

    types, text = await asyncio.to_thread(use)
    assert text == "Still here."
    assert "response.future_feature.delta" in types


# Answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "", "/v1/v1", "/backend-api/codex"])
async def test_the_base_url_may_end_as_users_write_it(bench: Bench, base: str) -> None:
    bench.sim.script("Found it.")
    answer = await bench.aio(base).responses.create(model=STANDARD, input="hi")
    assert answer.output_text == "Found it."
    listed = await bench.stand.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert listed.status == 200


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_plain_answer_and_a_streamed_one_agree(bench: Bench, model: str) -> None:
    def use() -> tuple[Response, str, Response]:
        sync = bench.sync()
        bench.sim.script(*(Script.reasoning("**Hm**", "Forty-two.") for _ in range(3)))
        plain = sync.responses.create(model=model, input="hi", reasoning={"summary": "auto"})
        text = ""
        for event in sync.responses.create(model=model, input="hi", stream=True):
            assert type(event) is EVENT_TYPES[event.type]
            if event.type == "response.output_text.delta":
                text += event.delta
        with sync.responses.stream(model=model, input="hi") as stream:
            final = stream.get_final_response()
        return plain, text, final

    plain, text, final = await asyncio.to_thread(use)
    assert plain.output_text == final.output_text == text == "Forty-two."
    assert plain.status == final.status == "completed"
    assert [item.type for item in plain.output] == [item.type for item in final.output]
    assert plain.usage is not None
    assert final.usage is not None
    assert plain.usage.output_tokens == final.usage.output_tokens > 0
    assert plain.usage.output_tokens_details.reasoning_tokens > 0


async def test_the_async_client_does_all_the_same(bench: Bench) -> None:
    bench.sim.script("one", "two", "three")
    async with bench.aio() as sdk:
        plain = await sdk.responses.create(model=STANDARD, input="hi")
        text = ""
        async for event in await sdk.responses.create(model=STANDARD, input="hi", stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
        async with sdk.responses.stream(model=STANDARD, input="hi") as stream:
            final = await stream.get_final_response()
    assert [plain.output_text, text, final.output_text] == ["one", "two", "three"]


async def test_many_streams_of_one_client_do_not_mix(bench: Bench) -> None:
    async with bench.aio() as sdk:

        async def ask(number: int) -> str:
            async with sdk.responses.stream(model=STANDARD, input=f"number {number}") as stream:
                return (await stream.get_final_response()).output_text

        answers = await asyncio.gather(*(ask(number) for number in range(20)))
    assert answers == [f"pong: number {number}" for number in range(20)]


async def test_knobs_that_the_backend_refuses_do_not_reach_it(bench: Bench) -> None:
    bench.sim.script("Fine.")
    answer = await bench.aio().responses.create(
        model=STANDARD,
        input=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        temperature=0.2,
        top_p=0.9,
        metadata={"a": "b"},
        user="me",
        truncation="auto",
        store=True,
        service_tier="auto",
    )
    assert answer.output_text == "Fine."
    received = bench.sim.turns[-1].json
    assert received["store"] is False
    assert received["stream"] is True
    assert not {"temperature", "top_p", "metadata", "user", "truncation"} & received.keys()
    assert [item["role"] for item in received["input"]] == ["developer", "user"]


async def test_an_output_limit_is_kept_here(bench: Bench) -> None:
    bench.sim.script(Script.long_text(200), Script.long_text(200))
    sdk = bench.aio()
    answer = await sdk.responses.create(model=STANDARD, input="hi", max_output_tokens=20)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    types = [
        event.type
        async for event in await sdk.responses.create(
            model=STANDARD, input="hi", max_output_tokens=20, stream=True
        )
    ]
    assert types[-1] == "response.incomplete"
    assert types.count("response.output_text.delta") < 50
    assert all("max_output_tokens" not in turn.json for turn in bench.sim.turns)


async def test_a_closed_stream_frees_the_account_at_once(bench: Bench) -> None:
    bench.sim.script(Script.long_text(400, delay=0.01))
    async with bench.aio() as sdk:
        stream = await sdk.responses.create(model=STANDARD, input="hi", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
    turn = bench.sim.turns[-1]
    await asyncio.wait_for(turn.closed.wait(), 3)
    assert turn.cancelled


async def test_raw_and_streaming_access_give_the_request_id(bench: Bench) -> None:
    bench.sim.script("one", "two")
    sdk = bench.aio()
    raw = await sdk.responses.with_raw_response.create(model=STANDARD, input="hi")
    assert raw.parse().output_text == "one"
    async with sdk.responses.with_streaming_response.create(model=STANDARD, input="hi") as response:
        parsed = await response.parse()
    assert parsed.output_text == "two"
    assert raw.request_id
    assert response.request_id
    assert raw.request_id != response.request_id


async def test_a_picture_arrives_as_it_was_sent(bench: Bench) -> None:
    bench.sim.script("A pixel.", "A pixel.")
    for model in (STANDARD, LITE):
        answer = await bench.aio().responses.create(
            model=model,
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "What is this?"},
                        {"type": "input_image", "image_url": PIXEL, "detail": "high"},
                    ],
                }
            ],
        )
        assert answer.output_text == "A pixel."
        message = bench.sim.turns[-1].json["input"][-1]
        assert message["content"][1] == {"type": "input_image", "image_url": PIXEL, "detail": "high"}


# Tools and structure -----------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_tool_is_called_and_its_output_comes_back(bench: Bench, model: str, streamed: bool) -> None:
    bench.sim.script(
        Script.of(
            Script.reasoning("**Plan**", "Looking it up."),
            Script.tool("lookup", {"word": "proxy"}),
            Script.custom_tool("patch", "*** Begin Patch"),
        )
    )

    def ask(history: Any) -> Response:
        common: dict[str, Any] = {
            "model": model,
            "input": history,
            "tools": [LOOKUP, PATCH],
            "include": ["reasoning.encrypted_content"],
        }
        if not streamed:
            answer: Response = bench.sync().responses.create(**common)
            return answer
        with bench.sync().responses.stream(**common) as stream:
            return stream.get_final_response()

    history: list[Any] = [{"role": "user", "content": "What is a proxy?"}]
    first = await asyncio.to_thread(ask, history)
    assert [item.type for item in first.output] == [
        "reasoning",
        "message",
        "function_call",
        "custom_tool_call",
    ]
    call, custom = first.output[2], first.output[3]
    assert call.type == "function_call"
    assert custom.type == "custom_tool_call"
    assert (call.name, call.arguments) == ("lookup", '{"word":"proxy"}')
    assert (custom.name, custom.input) == ("patch", "*** Begin Patch")

    # Whole items go back, as the SDK's guide has it.
    history += [item.to_dict() for item in first.output]
    history += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "one who speaks for another"},
        {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "patched"},
    ]
    second = await asyncio.to_thread(ask, history)
    assert second.output_text == "The tool said: patched"
    received = [
        item for item in bench.sim.turns[-1].json["input"] if item.get("type", "").endswith("_output")
    ]
    assert [item["output"] for item in received] == ["one who speaks for another", "patched"]


async def test_a_forced_tool_is_called_with_arguments_that_parse(bench: Bench) -> None:
    class Lookup(BaseModel):
        word: str

    def use() -> Any:
        return bench.sync().responses.parse(
            model=LITE,
            input="hi",
            tools=[openai.pydantic_function_tool(Lookup, name="lookup")],
            tool_choice={"type": "function", "name": "lookup"},
        )

    answer = await asyncio.to_thread(use)
    (call,) = answer.output
    assert call.parsed_arguments == Lookup(word="simulated")
    assert bench.sim.turns[-1].json["tool_choice"]["name"] == "lookup"


@pytest.mark.parametrize("model", [STANDARD, LITE])
async def test_a_structured_answer_is_parsed(bench: Bench, model: str) -> None:
    text = '{"city":"Oslo","degrees":3,"is_raining":true}'
    bench.sim.script(text, text)

    def use() -> tuple[Weather | None, Weather | None, list[Weather | None]]:
        sync = bench.sync()
        plain = sync.responses.parse(model=model, input="hi", text_format=Weather).output_parsed
        parsed: list[Weather | None] = []
        with sync.responses.stream(model=model, input="hi", text_format=Weather) as stream:
            parsed.extend(event.parsed for event in stream if event.type == "response.output_text.done")
            return plain, stream.get_final_response().output_parsed, parsed

    plain, streamed, parsed = await asyncio.to_thread(use)
    expected = Weather(city="Oslo", degrees=3, is_raining=True)
    assert plain == streamed == expected
    assert parsed == [expected]
    form = bench.sim.turns[-1].json["text"]["format"]
    assert form["type"] == "json_schema"
    assert form["schema"]["required"] == ["city", "degrees", "is_raining"]


# Other endpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", ""])
async def test_the_models_are_listed_and_described(bench: Bench, base: str) -> None:
    def use() -> tuple[list[str], str]:
        sync = bench.sync(base)
        return [model.id for model in sync.models.list()], sync.models.retrieve(LITE).id

    names, one = await asyncio.to_thread(use)
    assert {STANDARD, LITE, f"{STANDARD}-high"} <= set(names)
    assert len(names) == len(set(names))
    assert one == LITE
    with pytest.raises(openai.NotFoundError) as caught:
        await bench.aio(base).models.retrieve("gpt-that-is-not")
    assert caught.value.code == "model_not_found"


async def test_tokens_are_counted_without_an_account(bench: Bench) -> None:
    bench.sim.set_all("usage_limit", resets_in=3600)
    counted = await bench.aio().responses.input_tokens.count(
        model=STANDARD, input="Seven words are hardly more than ten tokens."
    )
    assert 5 <= counted.input_tokens <= 40
    assert not bench.sim.turns


async def test_a_compacted_conversation_goes_on_where_it_was_compacted(bench: Bench) -> None:
    # The SDK has no type for a user's message in an output, though its docs say that there are some.
    sdk = bench.aio(**LOOSE)
    compacted = await sdk.responses.compact(
        model=STANDARD, input=[{"role": "user", "content": "Remember me."}], instructions="Be brief."
    )
    (compactor,) = [request.account for request in bench.sim.requests if request.path.endswith("/compact")]
    assert compacted.object == "response.compaction"
    assert compacted.output[-1].type == "compaction"
    # Only this account can read it, though every other one has more left.
    bench.sim.account(str(compactor)).use(primary=80)
    await bench.stand.post("/check-quota", headers={"Authorization": f"Bearer {KEY}"})
    history: list[Any] = [item.to_dict(warnings=False) for item in compacted.output]
    for number in range(3):
        answer = await sdk.responses.create(
            model=STANDARD,
            input=[*history, {"role": "user", "content": f"go on {number}"}],
        )
        assert answer.output_text == f"pong: go on {number}"
        (answered,) = {turn.account for turn in bench.sim.turns if turn.status == 200}
        assert answered == compactor
    kept = bench.sim.turns[-1].json["input"]
    assert [item["type"] for item in kept] == ["message", "compaction", "message"]


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_callers_fault_is_a_bad_request_that_names_the_field(bench: Bench, streamed: bool) -> None:
    sdk = bench.aio()
    create = typing.cast("Callable[..., Any]", sdk.responses.create)
    for fields, param, code in (
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "invalid_type"),
        ({"input": [{"role": "user", "content": [3]}]}, "input.0.content.0", "invalid_type"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await create(**{"model": STANDARD, "input": "hi", "stream": streamed, **fields})
        assert (caught.value.param, caught.value.code) == (param, code)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id
    assert not bench.sim.turns


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_the_backend_refuses_of_a_request_is_a_bad_request(bench: Bench, streamed: bool) -> None:
    bench.sim.script(Script.state("context_length"))
    create = typing.cast("Callable[..., Any]", bench.aio().responses.create)
    with pytest.raises(openai.BadRequestError) as caught:
        await create(model=STANDARD, input="hi", stream=streamed)
    assert caught.value.code == "context_length_exceeded"
    assert len(bench.sim.turns) == 1


async def test_a_wrong_key_is_an_authentication_error(bench: Bench) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await bench.aio(api_key="another").responses.create(model=STANDARD, input="hi")
    assert "another" not in str(caught.value)
    assert not bench.sim.turns


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_exhausted_pool_is_a_rate_limit_error_that_no_retry_follows(
    bench: Bench, streamed: bool
) -> None:
    for account, resets_in in zip(bench.sim.accounts, (7200, 3600, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    sdk = bench.aio(max_retries=2)
    create = typing.cast("Callable[..., Any]", sdk.responses.create)
    with pytest.raises(openai.RateLimitError) as caught:
        await create(model=STANDARD, input="hi", stream=streamed)
    assert caught.value.type == "usage_limit_reached"
    body = typing.cast("dict[str, Any]", caught.value.body)
    assert 3500 <= body["resets_in_seconds"] <= 3601
    assert abs(body["resets_at"] - (bench.sim.now() + 3600)) < 10
    assert 3500 <= int(caught.value.response.headers["retry-after"]) <= 3601
    # Each account was asked once, and the SDK did not come back.
    assert sorted(str(turn.account) for turn in bench.sim.turns) == ["a1", "a2", "a3"]


async def test_a_passing_shortage_is_retried_by_the_sdk_until_it_is_over(bench: Bench) -> None:
    for account in bench.sim.accounts:
        account.set("server_error", status=500, times=1)
    bench.sim.script("Back again.")
    answer = await bench.aio(max_retries=3).responses.create(model=STANDARD, input="hi")
    assert answer.output_text == "Back again."


async def test_a_failure_after_the_first_word_is_told_in_the_stream(bench: Bench) -> None:
    bench.sim.script(*(Script.state("failed", code="server_error", after=3) for _ in range(3)))

    def use() -> Response:
        *_, last = bench.sync().responses.create(model=STANDARD, input="hi", stream=True)
        assert last.type == "response.failed"
        with (
            bench.sync().responses.stream(model=STANDARD, input="hi") as stream,
            pytest.raises(RuntimeError, match=r"response\.completed"),
        ):
            # A broken stream must not look like a finished one.
            stream.get_final_response()
        return last.response

    failed = await asyncio.to_thread(use)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "server_error"
    # Collected, nothing had been said, so it is a status.
    with pytest.raises(openai.APIStatusError):
        await bench.aio().responses.create(model=STANDARD, input="hi")


@pytest.mark.parametrize(
    "state",
    [
        "usage_limit",
        "rate_limit",
        "overloaded",
        "overloaded_in_stream",
        "server_error",
        "cloudflare",
        "payment",
        "unauthorized",
        "refuse",
    ],
)
async def test_one_accounts_failure_is_not_seen_by_the_sdk(bench: Bench, state: str) -> None:
    bench.sim.script(Script.state(state), "Served all the same.")
    answer = await bench.aio().responses.create(model=STANDARD, input="hi")
    assert answer.output_text == "Served all the same."
    assert len(bench.sim.turns) == 2
