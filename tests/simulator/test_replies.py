"""What the simulated backend says when all is well."""

import gzip
import sys
import zlib
from typing import TYPE_CHECKING, Any

import brotli
import pytest

from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.simulator import Script, Simulator

if TYPE_CHECKING:
    from tests.simulator.conftest import Answer, Caller

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TOOL = {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}}  # fmt: skip


async def test_a_plain_turn_has_the_events_of_a_recorded_one(caller: "Caller") -> None:
    answer = await caller.turn("hi there")
    assert answer.status == 200
    assert answer.kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert answer.text == "pong: hi there"
    numbers = [e["sequence_number"] for e in answer.events if "sequence_number" in e]
    assert numbers == list(range(len(answer.kinds)))
    assert all("obfuscation" in e for e in answer.events if e["type"].endswith(".delta"))
    message = answer.items[0]
    assert (message["phase"], message["status"], message["role"]) == (
        "final_answer",
        "completed",
        "assistant",
    )
    response = answer.last["response"]
    assert response["safety_identifier"] == caller.sim.account("a1").user_id
    assert response["output"] == []
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


async def test_every_frame_has_both_lines_and_the_answer_no_content_type(caller: "Caller") -> None:
    answer = await caller.turn()
    assert "content-type" not in answer.headers
    for frame in answer.body.decode().strip().split("\n\n"):
        event, data = frame.split("\n")
        assert event.removeprefix("event: ") == loads(data.removeprefix("data: "))["type"]


async def test_every_answer_tells_about_the_account(caller: "Caller") -> None:
    answer = await caller.turn()
    for name in ("x-oai-request-id", "cf-ray", "set-cookie", "x-models-etag", "x-codex-turn-state"):
        assert answer.headers[name]
    assert answer.headers["openai-model"] == "gpt-5.5"
    assert answer.headers["x-codex-plan-type"] == "plus"
    assert answer.headers["x-codex-primary-window-minutes"] == "300"
    assert answer.headers["x-codex-secondary-window-minutes"] == "10080"
    assert answer.headers["x-codex-bengalfox-limit-name"] == "GPT-5.3-Codex-Spark"


async def test_the_events_beside_the_answer_can_be_switched_off(caller: "Caller") -> None:
    first = await caller.turn()
    assert first.events[0]["type"] == "codex.rate_limits"
    assert first.events[3]["headers"]["openai-model"] == "gpt-5.5"
    caller.sim.extra_events = False
    second = await caller.turn()
    assert [e["type"] for e in second.events] == second.kinds


async def test_the_turn_state_is_given_once_per_turn(caller: "Caller") -> None:
    state = (await caller.turn()).headers["x-codex-turn-state"]
    again = await caller.turn(headers={"x-codex-turn-state": state})
    assert again.status == 200
    assert "x-codex-turn-state" not in again.headers


async def test_a_free_plan_has_the_week_in_its_first_window(caller: "Caller") -> None:
    caller.sim.add_account("free", plan="free")
    answer = await caller.turn(account="free")
    assert answer.headers["x-codex-primary-window-minutes"] == "10080"
    assert answer.headers["x-codex-secondary-window-minutes"] == "0"
    assert answer.headers["x-codex-secondary-reset-at"] == ""
    assert answer.events[0]["rate_limits"]["secondary"] is None


SCRIPTS: dict[str, tuple[Script, str, list[str]]] = {
    "text": (Script.text("two words"), "response.completed", ["message"]),
    "long": (Script.long_text(300), "response.completed", ["message"]),
    "reasoning": (Script.reasoning(["a b", "c"]), "response.completed", ["reasoning", "message"]),
    "tool": (Script.tool("f", {"x": 1}), "response.completed", ["function_call"]),
    "parallel": (
        Script.parallel_tools([("f", {}), ("g", "{}")]),
        "response.completed",
        ["function_call"] * 2,
    ),
    "custom": (Script.custom_tool("exec", "code()"), "response.completed", ["custom_tool_call"]),
    "refusal": (Script.refusal("no"), "response.completed", ["message"]),
    "incomplete": (Script.incomplete("content_filter"), "response.incomplete", ["message"]),
    "empty": (Script.empty_output(), "response.completed", ["message"]),
    "nothing": (Script.nothing(), "response.completed", []),
    "unicode": (Script.unicode(), "response.completed", ["message"]),
    "unknown": (Script.unknown_events(), "response.completed", ["message", "future_item"]),
    "no usage": (Script.no_usage(), "response.completed", ["message"]),
    "search": (Script.web_search(), "response.completed", ["web_search_call", "message"]),
    "joined": (
        Script.of(Script.reasoning(text=""), Script.text("so"), Script.tool("f", {})),
        "response.completed",
        ["reasoning", "message", "function_call"],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
async def test_a_script_is_played(caller: "Caller", name: str) -> None:
    script, end, items = SCRIPTS[name]
    caller.sim.script(script)
    answer = await caller.turn(include=["reasoning.encrypted_content"])
    assert answer.last["type"] == end
    assert [item["type"] for item in answer.items] == items
    for kind in ("output_text", "function_call_arguments", "custom_tool_call_input", "refusal"):
        for done in (e for e in answer.events if e["type"] == f"response.{kind}.done"):
            whole = "".join(
                e["delta"]
                for e in answer.events
                if e["type"] == f"response.{kind}.delta" and e["item_id"] == done["item_id"]
            )
            assert whole in done.values()
    # The queue is empty now.
    assert (await caller.turn("x")).text == "pong: x"


async def test_an_account_s_own_scripts_come_first(caller: "Caller") -> None:
    caller.sim.script("for any")
    caller.sim.account("a1").script("for a1", Script.text("again a1"))
    said = [(await caller.turn(account=name)).text for name in ("a2", "a1", "a1", "a1")]
    assert said == ["for any", "for a1", "again a1", "pong: hello"]


async def test_incomplete_names_its_reason(caller: "Caller") -> None:
    caller.sim.script(Script.incomplete("content_filter"))
    response = (await caller.turn()).last["response"]
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "content_filter"},
    )


async def test_no_usage_has_none(caller: "Caller") -> None:
    caller.sim.script(Script.no_usage())
    assert (await caller.turn()).last["response"]["usage"] is None


async def test_completed_lists_the_items_when_told_to(caller: "Caller") -> None:
    caller.sim.full_output = True
    answer = await caller.turn()
    assert answer.last["response"]["output"] == answer.items
    caller.sim.script(Script.empty_output())
    assert (await caller.turn()).last["response"]["output"] == []


async def test_halves_of_a_character_come_as_two_deltas(caller: "Caller") -> None:
    caller.sim.script(Script.unicode("a🎉", sizes=(3, 5), halves=True))
    deltas = [e["delta"] for e in (await caller.turn()).events if e["type"] == "response.output_text.delta"]
    assert deltas == ["a", "\ud83c", "\udf89"]


async def test_raw_and_recorded_are_sent_as_they_are(caller: "Caller") -> None:
    stream = (
        b'event: response.created\r\ndata: {"type":"response.created","response":{"id":"r"}}\r\n\r\n: hm\n\n'
    )
    caller.sim.script(Script.recorded(stream, chunk=7), Script.raw([{"type": "odd", "n": 1}]))
    assert (await caller.turn()).body == stream
    assert (await caller.turn()).body == b'event: odd\ndata: {"type":"odd","n":1}\n\n'


async def test_a_tool_is_chosen_and_its_output_spoken_about(caller: "Caller") -> None:
    first = await caller.turn("sim:tool", tools=[TOOL])
    call = first.items[0]
    assert (call["name"], loads(call["arguments"])) == ("shell", {"cmd": "echo simulated"})
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "it is 7"}
    second = await caller.turn([{"role": "user", "content": "sim:tool"}, call, output], tools=[TOOL])
    assert second.text == "The tool said: it is 7"


async def test_a_tool_that_must_be_called_is(caller: "Caller") -> None:
    answer = await caller.turn(tools=[TOOL], tool_choice="required")
    assert answer.items[0]["type"] == "function_call"


async def test_a_schema_is_met(caller: "Caller") -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": schema}
    assert loads((await caller.turn(text={"format": form})).text) == {"a": 1}


async def test_a_lite_call_names_its_namespace(caller: "Caller") -> None:
    tools = {
        "type": "additional_tools",
        "role": "developer",
        "tools": [
            {"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "exec"}]},
            {"type": "namespace", "name": "clock", "tools": [{"type": "function", "name": "sleep"}]},
        ],
    }
    said = {"role": "user", "content": "sim:tools"}
    answer = await caller.lite([tools, said | {"content": "sim:tool"}])
    assert (answer.items[0]["type"], answer.items[0]["namespace"]) == ("custom_tool_call", "functions")
    answer = await caller.lite([tools, said | {"content": 'sim:tool sleep {"ms":1}'}])
    assert (answer.items[0]["name"], answer.items[0]["namespace"]) == ("sleep", "clock")


async def test_a_compaction_trigger_gives_one_sealed_item(caller: "Caller") -> None:
    items = [{"role": "user", "content": "long talk"}, {"type": "compaction_trigger"}]
    answer = await caller.turn(items)
    assert [item["type"] for item in answer.items] == ["compaction"]
    assert answer.last["type"] == "response.completed"
    again = await caller.turn([answer.items[0], {"role": "user", "content": "go on"}])
    assert again.text == "pong: go on"
    other = await caller.turn([answer.items[0], {"role": "user", "content": "go on"}], account="a2")
    assert (other.status, other.json["error"]["code"]) == (400, "invalid_encrypted_content")


async def test_a_repeated_cache_key_is_cached_on_the_account_that_saw_it(caller: "Caller") -> None:
    async def cached(account: str, key: str) -> tuple[int, int]:
        answer = await caller.turn(account=account, prompt_cache_key=key)
        usage = answer.last["response"]["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]

    size, first = await cached("a1", "k")
    assert first == 0
    assert await cached("a1", "k") == (size, size)
    assert await cached("a1", "j") == (size, 0)
    assert await cached("a2", "k") == (size, 0)


PACKED: dict[str, Any] = {
    "zstd": zstd.compress,
    "gzip": gzip.compress,
    "br": brotli.compress,
    "deflate": zlib.compress,
    "identity": bytes,
}


@pytest.mark.parametrize("encoding", PACKED)
async def test_compressed_bodies_are_read(caller: "Caller", encoding: str) -> None:
    body = dumps({
        "model": "gpt-5.5",
        "stream": True,
        "store": False,
        "input": [{"role": "user", "content": "z"}],
    })
    packed = PACKED[encoding](body)
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    answer = await caller.ask("POST", "/codex/responses", data=packed, headers=headers)
    assert answer.text == "pong: z"
    received = caller.sim.turns[0]
    assert (received.wire, received.body, received.json["model"]) == (packed, body, "gpt-5.5")


async def test_a_body_that_is_not_what_it_says_is_refused(caller: "Caller") -> None:
    headers = {"content-encoding": "zstd", "content-type": "application/json"}
    answer = await caller.ask("POST", "/codex/responses", data=b"{}", headers=headers)
    assert answer.status == 400


MAGIC = {
    "sim:reasoning": ["reasoning", "message"],
    "please sim:long 30 now": ["message"],
    "sim:search the weather": ["web_search_call", "message"],
    "sim:custom exec": ["custom_tool_call"],
    "sim:tools f g": ["function_call", "function_call"],
    "sim:nothing": [],
    "sim:unknown_word": ["message"],
}


@pytest.mark.parametrize("said", MAGIC)
async def test_magic_words_are_obeyed(caller: "Caller", said: str) -> None:
    answer = await caller.turn(said)
    assert [item["type"] for item in answer.items] == MAGIC[said]


async def test_magic_words_cause_failures_too(caller: "Caller") -> None:
    assert (await caller.turn("sim:fail invalid_prompt")).last["response"]["error"][
        "code"
    ] == "invalid_prompt"
    assert (await caller.turn("sim:status 502")).status == 502
    assert (await caller.turn("sim:limit 60")).json["error"]["resets_in_seconds"] == 60
    assert (await caller.turn("sim:cut 4")).broken
    # They are for one turn.
    assert (await caller.turn("hello")).text == "pong: hello"


async def test_another_model_may_answer(caller: "Caller") -> None:
    caller.sim.served_model = "gpt-other"
    answer = await caller.turn()
    assert answer.headers["openai-model"] == "gpt-other"
    assert answer.last["response"]["model"] == "gpt-other"


async def test_the_other_routes_answer(caller: "Caller") -> None:
    search = await caller.post(
        "/backend-api/codex/alpha/search", {"commands": {"search_query": [{"q": "weather"}]}}
    )
    assert "weather" in search.json["output"]
    image = await caller.post("/backend-api/codex/images/generations", {"prompt": "a dot"})
    assert image.json["data"][0]["b64_json"].startswith("iVBOR")
    check = await caller.ask("GET", "/backend-api/wham/accounts/check")
    assert [a["id"] for a in check.json["accounts"]] == [caller.sim.account("a1").account_id]
    assert (
        await caller.ask("GET", "/backend-api/codex/responses", headers={"upgrade": "websocket"})
    ).status == 426
    assert (await caller.post("/backend-api/codex/responses/input_tokens", {})).status == 404
    assert (await caller.ask("GET", "/backend-api/ps/plugins/installed")).json == {"detail": "Not Found"}


async def test_compact_v1_is_one_json_answer(caller: "Caller") -> None:
    items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answer = await caller.post("/backend-api/codex/responses/compact", {"model": "gpt-5.5", "input": items})
    assert answer.json["object"] == "response.compaction"
    assert [item.get("type") for item in answer.json["output"]] == [None, "compaction"]
    assert answer.headers["x-codex-turn-state"]
    lacking = await caller.post("/backend-api/codex/responses/compact", {"input": items})
    assert (lacking.status, lacking.json["error"]["param"]) == (400, "model")


async def test_model_lists_differ_by_plan_and_have_a_tag(caller: "Caller") -> None:
    caller.sim.add_account("free", plan="free")
    caller.sim.add_account("own", models=["gpt-5.5"])

    async def listed(account: str) -> "Answer":
        return await caller.ask("GET", "/backend-api/codex/models?client_version=0.169.0", account=account)

    plus, free, own = [await listed(name) for name in ("a1", "free", "own")]
    assert len(plus.json["models"]) > len(free.json["models"]) > len(own.json["models"]) == 1
    assert len({answer.headers["etag"] for answer in (plus, free, own)}) == 3
    same = await caller.ask(
        "GET", "/backend-api/codex/models", headers={"if-none-match": plus.headers["etag"]}
    )
    assert same.status == 304
    assert plus.headers["etag"] == (await caller.turn()).headers["x-models-etag"]


async def test_two_simulators_play_the_same(sim: Simulator, caller: "Caller") -> None:
    """A reply is a function of the request, so a test may compare bytes."""
    first = await caller.turn("same")
    sim.clear()
    second = await caller.turn("same")
    assert [e.get("delta") for e in first.events] == [e.get("delta") for e in second.events]
    assert len(sim.requests) == 1


MODEL_KEYS = {
    "slug", "display_name", "description", "default_reasoning_level", "supported_reasoning_levels",
    "shell_type", "visibility", "supported_in_api", "priority", "additional_speed_tiers", "service_tiers",
    "default_service_tier", "available_access_programs", "model_specialty", "availability_nux", "upgrade",
    "base_instructions", "model_messages", "include_skills_usage_instructions",
    "include_plugin_usage_instructions", "include_apps_usage_instructions",
    "supports_reasoning_summary_parameter", "default_reasoning_summary", "support_verbosity",
    "default_verbosity", "apply_patch_tool_type", "web_search_tool_type", "truncation_policy",
    "supports_parallel_tool_calls", "supports_image_detail_original", "context_window",
    "max_context_window", "auto_compact_token_limit", "comp_hash", "effective_context_window_percent",
    "experimental_supported_tools", "input_modalities", "supports_search_tool",
    "supports_experimental_context", "use_responses_lite", "supports_reasoning_effort_updates",
    "node_repl_auto_review_required", "node_repl_disabled", "tool_mode", "multi_agent_version",
    "multi_agent_reasoning_effort",
}  # fmt: skip


async def test_every_model_is_listed_with_every_key(caller: "Caller") -> None:
    """The Codex CLI drops the whole list for one object that lacks one."""
    caller.sim.add_account("pro", plan="pro")
    answer = await caller.ask("GET", "/backend-api/codex/models?client_version=0.169.0", account="pro")
    models = answer.json["models"]
    assert len(models) == 13
    assert [model["slug"] for model in models if not set(model) >= MODEL_KEYS] == []
    assert [model["slug"] for model in models if not model["use_responses_lite"]] == [
        "gpt-5.5",
        "gpt-5.3-codex-spark",
    ]
