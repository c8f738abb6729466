"""What decoding costs, counted in calls of our own functions: that depends on neither the machine nor its load.

The bounds are what it takes today and a little more. Who passes one has made every request dearer.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.protocol import responses_request
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.completions import COMPLETIONS
from codex_proxy.protocol.dialect import Dialect
from codex_proxy.protocol.fields import FieldError
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import RESPONSES
from tests.counting import Calls

HERE = Path(__file__).parent
CATALOG = Catalog()
SYSTEM, USER = "You are a helpful assistant.", "Say hello in one short line."
SAID = {"role": "user", "content": USER}
HEADERS = {
    "host": "127.0.0.1:8080",
    "content-type": "application/json",
    "accept": "*/*",
    "user-agent": "OpenAI/Python 2.8.0",
    "content-length": "200",
}

Body = dict[str, Any]


def decode(dialect: Dialect, body: Body, headers: dict[str, str] | None = None) -> BackendRequest:
    raw = json.dumps({"model": "gpt-5.5", "stream": True, **body}).encode()
    return dialect.decode(raw, headers or HEADERS, catalog=CATALOG, caller="c").request


def calls(work: Callable[[], object], name: str = "") -> int:
    """Return how many calls of our own functions *work* makes the second time, or of those called *name*."""
    work()
    with Calls() as counted:
        work()
    return sum(count for code, count in counted.ours().items() if name in ("", code.co_name))


def schema(number: int) -> Body:
    fields = {
        name: {"type": "string", "description": "what it is"} for name in ("path", "text", f"f{number}")
    }
    listed = {"type": "array", "items": {"type": "string"}}
    return {"type": "object", "properties": {**fields, "several": listed}, "required": ["path"]}


def chat(rounds: int = 0, tools: int = 0) -> Body:
    messages: list[Body] = [{"role": "system", "content": SYSTEM}, SAID]
    for n in range(rounds):
        call = {"id": f"call_{n}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        messages.append({"role": "assistant", "content": "I look.", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": f"call_{n}", "content": "what it says"})
    named = [{"name": f"tool_{n}", "description": "does it", "parameters": schema(n)} for n in range(tools)]
    listed = [{"type": "function", "function": one} for one in named]
    return {"messages": messages, **({"tools": listed} if tools else {})}


def messages(rounds: int = 0, tools: int = 0) -> Body:
    said: list[Body] = [SAID]
    for n in range(rounds):
        call = {"type": "tool_use", "id": f"call_{n}", "name": "read", "input": {"path": "a"}}
        said.append({"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]})
        result = {"type": "tool_result", "tool_use_id": f"call_{n}", "content": "what it says"}
        said.append({"role": "user", "content": [result]})
    listed = [
        {"name": f"tool_{n}", "description": "does it", "input_schema": schema(n)} for n in range(tools)
    ]
    return {"max_tokens": 1000, "system": SYSTEM, "messages": said, **({"tools": listed} if tools else {})}


def responses(rounds: int = 0, tools: int = 0) -> Body:
    items: list[Body] = [SAID]
    for n in range(rounds):
        content = [{"type": "output_text", "text": "I look."}]
        items.append({"type": "message", "role": "assistant", "content": content})
        items.append({"type": "function_call", "call_id": f"call_{n}", "name": "read", "arguments": "{}"})
        items.append({"type": "function_call_output", "call_id": f"call_{n}", "output": "what it says"})
    listed = [{"type": "function", "name": f"tool_{n}", "parameters": schema(n)} for n in range(tools)]
    return {"instructions": SYSTEM, "input": items, **({"tools": listed} if tools else {})}


KINDS = {"chat": (CHAT, chat), "messages": (MESSAGES, messages), "responses": (RESPONSES, responses)}


@pytest.mark.parametrize(("kind", "bound"), [("chat", 68), ("messages", 77), ("responses", 54)])
def test_a_small_request_takes_few_calls(kind: str, bound: int) -> None:
    dialect, make = KINDS[kind]
    assert calls(lambda: decode(dialect, make())) <= bound


@pytest.mark.parametrize(("kind", "bound"), [("chat", 20), ("messages", 24), ("responses", 4)])
def test_a_long_conversation_takes_few_calls_for_each_round(kind: str, bound: int) -> None:
    dialect, make = KINDS[kind]
    some, more = (make(rounds=number) for number in (100, 300))
    assert calls(lambda: decode(dialect, more)) - calls(lambda: decode(dialect, some)) <= 200 * bound


@pytest.mark.parametrize(("kind", "bound"), [("chat", 21), ("messages", 19), ("responses", 1)])
def test_each_tool_takes_few_calls(kind: str, bound: int) -> None:
    dialect, make = KINDS[kind]
    some, more = (make(tools=number) for number in (10, 30))
    assert calls(lambda: decode(dialect, more)) - calls(lambda: decode(dialect, some)) <= 20 * bound


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_path_is_made_for_a_body_that_is_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: FieldError, outer: str) -> None:
        raise AssertionError(outer)

    monkeypatch.setattr(FieldError, "within", never)
    dialect, make = KINDS[kind]
    assert decode(dialect, make(rounds=3, tools=3)).body


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_body_is_parsed_once_and_rendered_once(kind: str) -> None:
    dialect, make = KINDS[kind]
    body = make(rounds=3, tools=3)
    for name in ("parse_body", "render_body"):
        assert calls(lambda: decode(dialect, body), name) == 1


def test_a_codex_clients_body_that_is_right_is_not_rendered_at_all() -> None:
    body = {**responses(rounds=3), "store": False, "include": ["reasoning.encrypted_content"]}
    codex = {**HEADERS, "originator": "codex_exec"}
    assert calls(lambda: decode(RESPONSES, body, codex), "render_body") == 0
    raw = json.dumps({"model": "gpt-5.5", "stream": True, **body}).encode()
    assert RESPONSES.decode(raw, codex, catalog=CATALOG, caller="c").request.body is raw


def test_a_body_goes_to_an_account_without_being_copied() -> None:
    request = decode(RESPONSES, responses(rounds=3), {**HEADERS, "originator": "codex_exec"})
    assert request.body_for("own turn state") is request.body


# What the shortest way leaves out must not be missing.


GOLDEN = [
    *((CHAT, path) for path in sorted((HERE / "golden" / "chat_request").glob("*.json"))),
    *((MESSAGES, path) for path in sorted((HERE / "golden" / "messages_request").glob("*.json"))),
]


def golden(path: Path) -> Body:
    case = json.loads(path.read_text(encoding="utf-8"))
    if "fixture" not in case:
        return dict(case["request"])
    recorded = json.loads((HERE / "fixtures_messages" / case["fixture"]).read_text(encoding="utf-8"))
    return dict(recorded["body"])


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        *(
            pytest.param(dialect, golden(path), id=f"{path.parent.name}-{path.stem}")
            for dialect, path in GOLDEN
        ),
        pytest.param(COMPLETIONS, {"prompt": "Once upon"}, id="completions"),
    ],
)
def test_what_a_translator_makes_is_normal_and_holds_what_it_says(dialect: Dialect, body: Body) -> None:
    """Its items are not looked at again; looked at as another caller's, they are found right and the same."""
    raw = json.dumps({**body, "model": "gpt-5.5"}).encode()
    request = dialect.decode(raw, {}, catalog=CATALOG, caller="c").request
    again = responses_request.decode(request.body, {}, catalog=CATALOG, caller="c")
    assert again.body == request.body
    assert (again.encrypted, again.compacted) == (request.encrypted, request.compacted)
    assert again.input_bytes == request.input_bytes
