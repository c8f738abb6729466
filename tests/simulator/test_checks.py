"""What the simulated backend refuses, as the live one does."""

from typing import TYPE_CHECKING, Any

import pytest

from codex_proxy.simulator import Script

if TYPE_CHECKING:
    from tests.simulator.conftest import Caller

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "1"}
USER = {"role": "user", "content": "hi"}

UNSUPPORTED = (
    "temperature", "top_p", "max_output_tokens", "max_completion_tokens", "previous_response_id", "truncation",
    "user", "safety_identifier", "context_management", "prompt_cache_retention", "metadata", "conversation",
    "background", "max_tool_calls",
)  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_unsupported_parameters_are_named(caller: "Caller", name: str) -> None:
    field: dict[str, Any] = {name: 1}
    answer = await caller.turn(**field)
    assert (answer.status, answer.json) == (400, {"detail": f"Unsupported parameter: {name}"})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "Store must be set to false"),
    ({"store": ...}, "Store must be set to false"),
    ({"stream": False}, "Stream must be set to true"),
    ({"model": ...}, "'model'"),
    ({"instructions": None}, "Instructions are not valid"),
    ({"input": "text"}, "Input must be a list"),
    ({"input": [{"role": "system", "content": "x"}]}, "System messages are not allowed"),
    ({"input": [{"role": "tool", "content": "x"}]}, "Invalid value: 'tool'"),
    ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "Invalid value: 'text'"),
    ({"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]}, "'output_text'"),
    ({"input": [USER, CALL]}, "No tool output found for function call c1"),
    ({"input": [USER, {**CALL, "type": "custom_tool_call", "input": ""}]}, "custom tool call c1"),
    ({"input": [USER, OUTPUT]}, "No tool call found for function call output with call_id c1"),
    ({"input": [OUTPUT, CALL]}, "No tool call found"),
    ({"input": [{**CALL, "call_id": "c" * 65}]}, "maximum length 64"),
    ({"input": [{**CALL, "id": "call_1"}, OUTPUT]}, "begins with 'fc'"),
    ({"input": [{**CALL, "name": "a.b"}, OUTPUT]}, "does not match pattern"),
    ({"input": [{**CALL, "arguments": {}}, OUTPUT]}, "input[0].arguments"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "not found"),
    ({"input": [{"type": "compaction_trigger"}, USER]}, "last input item"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": 5}]}, "input[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f" * 65}]}, "maximum length 64"),
    ({"tools": [{"type": "web_search_preview"}]}, "web_search_preview"),
    ({"tools": {}}, "'tools'"),
    ({"reasoning": {"effort": "ultra"}}, "Unsupported value: 'ultra'"),
    ({"reasoning": {"effort": "max"}}, "Unsupported value: 'max'"),
    ({"reasoning": {"summary": "none"}}, "reasoning.summary"),
    ({"reasoning": "high"}, "'reasoning'"),
    ({"service_tier": "fast"}, "Unsupported service_tier: fast"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"include": "all"}, "'include'"),
    ({"client_metadata": "x"}, "'client_metadata'"),
    ({"parallel_tool_calls": "no"}, "'parallel_tool_calls'"),
    ({"prompt_cache_key": 5}, "'prompt_cache_key'"),
    ({"stream_options": True}, "'stream_options'"),
    ({"text": []}, "'text'"),
    ({"tool_choice": 5}, "'tool_choice'"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
async def test_a_request_that_the_backend_refuses(
    caller: "Caller", fields: dict[str, Any], words: str
) -> None:
    answer = await caller.turn(**fields)
    assert answer.status == 400
    said = answer.json
    assert words in (
        said["detail"] if "detail" in said else f"{said['error']['message']} {said['error']['param']}"
    )


ACCEPTED: list[dict[str, Any]] = [
    {"instructions": "Be brief."},
    {"input": [USER, CALL, OUTPUT]},
    {"input": [USER, {"type": "future_item", "x": 1}]},
    {"input": [{"type": "message", "id": "msg_1", "role": "developer", "content": [{"type": "input_text", "text": "x"}]}, USER]},
    {"reasoning": {"effort": "xhigh", "summary": "auto"}, "service_tier": "priority"},
    {"tools": [{"type": "web_search"}, {"type": "custom", "name": "t"}], "tool_choice": "auto"},
    {"client_metadata": {"a": "b"}, "prompt_cache_key": "k", "text": {"verbosity": "low"}},
]  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED)
async def test_a_request_that_the_backend_accepts(caller: "Caller", fields: dict[str, Any]) -> None:
    assert (await caller.turn(**fields)).last["type"] == "response.completed"


@pytest.mark.parametrize("data", [b"{", b"[]", b"", b"\xff", b"null"])
async def test_what_is_no_request_is_a_400(caller: "Caller", data: bytes) -> None:
    answer = await caller.ask(
        "POST", "/backend-api/codex/responses", data=data, headers={"content-type": "application/json"}
    )
    assert answer.status == 400


async def test_a_body_of_another_type_is_refused(caller: "Caller") -> None:
    answer = await caller.ask(
        "POST", "/backend-api/codex/responses", data=b"{}", headers={"content-type": "text/plain"}
    )
    assert answer.json == {"detail": "Unsupported content type"}


async def test_lenient_takes_what_strict_refuses(caller: "Caller") -> None:
    caller.sim.strict = False
    assert (await caller.turn(temperature=1, store=True)).status == 200
    assert (await caller.turn(input="text")).status == 400


async def test_a_model_outside_the_account_s_list_is_refused(caller: "Caller") -> None:
    caller.sim.add_account("free", plan="free")
    answer = await caller.turn(account="free", model="gpt-5.3-codex-spark")
    expected = "The 'gpt-5.3-codex-spark' model is not supported when using Codex with a ChatGPT account."
    assert (answer.status, answer.json) == (400, {"detail": expected})
    caller.sim.account("a1").set("bad_model")
    assert "'gpt-5.5' model is not supported" in (await caller.turn()).json["detail"]


async def test_reasoning_belongs_to_its_account(caller: "Caller") -> None:
    caller.sim.script(Script.reasoning())
    first = await caller.turn(include=["reasoning.encrypted_content"])
    item = first.items[0]
    assert item["encrypted_content"].startswith("gAAAAA")
    assert (await caller.turn([USER, item])).status == 200
    bare = {key: value for key, value in item.items() if key != "encrypted_content"}
    for foreign in (item, bare):
        other = await caller.turn([USER, foreign], account="a2")
        assert (other.status, other.json["error"]["code"]) == (400, "invalid_encrypted_content")
    made_up = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAAfake"}
    assert (await caller.turn([USER, made_up])).json["error"]["code"] == "invalid_encrypted_content"
    assert (await caller.turn([USER, {"type": "reasoning", "summary": []}], account="a2")).status == 200


async def test_reasoning_is_sealed_only_when_asked_for(caller: "Caller") -> None:
    caller.sim.script(Script.reasoning())
    assert "encrypted_content" not in (await caller.turn()).items[0]


async def test_a_turn_state_belongs_to_its_account(caller: "Caller") -> None:
    state = (await caller.turn()).headers["x-codex-turn-state"]
    assert (await caller.turn(account="a2", headers={"x-codex-turn-state": state})).status == 400
    assert (await caller.turn(headers={"x-codex-turn-state": "made-up"})).status == 400


NAMESPACE = {"type": "namespace", "name": "functions", "tools": []}
CARRIED = {"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}
LITE = {"x-openai-internal-codex-responses-lite": "true"}


async def test_a_lite_model_wants_the_lite_shape(caller: "Caller") -> None:
    assert (await caller.lite([CARRIED, USER])).status == 200
    wrong: list[dict[str, Any]] = [
        {"headers": {"x-openai-internal-codex-responses-lite": "false"}},
        {"reasoning": {"effort": "low"}},
        {"reasoning": ...},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": ...},
        {"tools": [{"type": "function", "name": "f"}]},
    ]
    for fields in wrong:
        answer = await caller.lite(**fields)
        assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_request_shape")


async def test_hosted_tools_travel_in_the_standard_shape(caller: "Caller") -> None:
    assert (await caller.turn(model="gpt-6-sol", tools=[{"type": "web_search"}])).status == 200
    assert (await caller.turn(model="gpt-6-sol")).status == 400


async def test_a_standard_model_refuses_the_lite_shape(caller: "Caller") -> None:
    assert (await caller.turn(headers=LITE)).status == 400
    assert (await caller.turn([CARRIED, USER])).status == 400


async def test_any_wire_takes_both(caller: "Caller") -> None:
    caller.sim.wire = "any"
    assert (await caller.turn(headers=LITE)).status == 200
    assert (await caller.turn(model="gpt-6-sol")).status == 200
