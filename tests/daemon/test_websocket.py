"""Responses over WebSocket, from socket to socket: turns, continuations, errors, and every way it ends."""

import asyncio
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.server import websocket
from codex_proxy.simulator import Script, Simulator
from codex_proxy.trace import End, Trace
from tests.daemon.sockets import (
    LITE_FLAG,
    Line,
    codex_fields,
    line,
    message,
    text_of,
    types_of,
)
from tests.harness import LITE, STANDARD, Stand, standing

TOOLS = [
    {
        "type": "function",
        "name": "lookup",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    }
]


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    async with standing(tmp_path) as stand:
        yield stand


def traces_of(stand: Stand) -> list[Trace]:
    traces: list[Trace] = []
    stand.daemon.executor.listen(traces.append)
    return traces


def transport_of(caller: Line) -> asyncio.Transport:
    connection = caller.ws._response.connection
    assert connection is not None
    transport = connection.transport
    assert isinstance(transport, asyncio.Transport)
    return transport


async def knock(
    stand: Stand, *, request: str = "GET /v1/responses HTTP/1.1", buffer: int = 65_536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """Ask for an upgrade as no client library would; return the connection and the answer's head."""
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    caller.setblocking(False)
    await asyncio.get_running_loop().sock_connect(caller, ("127.0.0.1", stand.daemon.port))
    reader, writer = await asyncio.open_connection(sock=caller)
    writer.write(
        f"{request}\r\nHost: 127.0.0.1:{stand.daemon.port}\r\nConnection: Upgrade\r\n"
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    return reader, writer, await reader.readuntil(b"\r\n\r\n")


# With a mask of zeros, as any mask will do.
PING = bytes([0x89, 0x80 | 100, 0, 0, 0, 0]) + b"x" * 100


def connections_of(stand: Stand) -> list[Any]:
    """Return the daemon's own connections to its callers."""
    server = stand.daemon._listener._places[0].runner.server
    assert server is not None
    return server.connections


def sent(stand: Stand, turn: int = -1) -> list[Any]:
    """Return the input of a turn as the backend got it, without what belongs to the wire shape."""
    items: list[Any] = stand.sim.turns[turn].json["input"]
    return [item for item in items if item["type"] != "additional_tools"]


def said(items: list[Any]) -> list[str]:
    """Return what each item says, in short."""
    found = []
    for item in items:
        if item["type"] == "message":
            found.append(f"{item['role']}: {item['content'][0]['text']}")
        else:
            found.append(item["type"])
    return found


# Turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/responses", "/v1/v1/responses", "/backend-api/codex/responses"]
)
async def test_a_turn_comes_as_one_frame_per_event(stand: Stand, path: str) -> None:
    async with line(stand, path) as caller:
        stand.sim.script("Hello from afar.")
        frames = await caller.ask("hi")
        assert types_of(frames)[0] == "response.created"
        assert types_of(frames)[-1] == "response.completed"
        assert text_of(frames) == "Hello from afar."
        assert frames[-1]["response"]["output"][0]["content"][0]["text"] == "Hello from afar."
        assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
    assert (await stand.stats())["summary"]["total_completions"] == 1


async def test_frames_are_the_events_of_http(stand: Stand) -> None:
    script = Script.reasoning("**Thinking**", "naïve 日本語 🎉")
    stand.sim.script(script, script)
    over_http = await stand.ask("hi")
    async with line(stand) as caller:
        frames = await caller.ask("hi")
    assert types_of(frames) == over_http.types
    assert text_of(frames) == over_http.text == "naïve 日本語 🎉"


async def test_the_answer_of_a_lite_model_is_put_back(stand: Stand) -> None:
    stand.sim.script(Script.tool("lookup", {"q": "x"}), "Found.")
    async with line(stand) as caller:
        first = await caller.complete("hi", model=LITE, tools=TOOLS, instructions="Be brief.")
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        assert "namespace" not in call
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
        second = await caller.complete(
            model=LITE,
            tools=TOOLS,
            instructions="Be long.",
            input=[output],
            previous_response_id=first["id"],
        )
        assert second["previous_response_id"] == first["id"]
    items = stand.sim.turns[-1].json["input"]
    # The tools and the instructions of this turn alone, not again those of the first one.
    assert [item["type"] for item in items].count("additional_tools") == 1
    assert said(items[1:]) == ["developer: Be long.", "user: hi", "function_call", "function_call_output"]


async def test_a_prewarm_is_answered_here_and_can_be_gone_on_from(stand: Stand) -> None:
    for account in stand.accounts:
        account.set("usage_limit", resets_in=3600)
    async with line(stand, codex=True) as caller:
        frames = await caller.ask(input=[], generate=False, **codex_fields())
        assert types_of(frames) == ["response.created", "response.completed"]
        created, completed = (frame["response"] for frame in frames)
        assert created["id"] == completed["id"]
        assert (created["status"], completed["status"]) == ("in_progress", "completed")
        assert completed["output"] == []
        assert completed["model"] == LITE
        usage = completed["usage"]
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (0, 0, 0)
        assert not stand.sim.requests
        for account in stand.accounts:
            account.set("ok")
        stand.sim.script("Warm.")
        answer = await caller.ask("hi", previous_response_id=completed["id"], **codex_fields())
        assert text_of(answer) == "Warm."
        assert said(sent(stand)) == ["user: hi"]


async def test_a_prewarm_with_items_begins_the_conversation(stand: Stand) -> None:
    async with line(stand) as caller:
        warm = await caller.complete("Remember this.", generate=False, store=False)
        again = await caller.complete(
            "And this.", generate=False, store=False, previous_response_id=warm["id"]
        )
        await caller.complete("hi", store=False, previous_response_id=again["id"])
    assert said(sent(stand)) == ["user: Remember this.", "user: And this.", "user: hi"]
    assert len(stand.sim.turns) == 1


async def test_a_turn_brings_only_what_is_new(stand: Stand) -> None:
    stand.sim.script(Script.reasoning("**One**", "First."), Script.reasoning("**Two**", "Second."), "Third.")
    async with line(stand, codex=True) as caller:
        one = await caller.complete("one", **codex_fields())
        two = await caller.complete("two", previous_response_id=one["id"], **codex_fields())
        await caller.complete("three", previous_response_id=two["id"], **codex_fields())
    assert said(sent(stand)) == [
        "user: one",
        "reasoning",
        "assistant: First.",
        "user: two",
        "reasoning",
        "assistant: Second.",
        "user: three",
    ]
    assert {turn.account for turn in stand.sim.turns} == {stand.sim.turns[0].account}
    assert all("previous_response_id" not in turn.json for turn in stand.sim.turns)


async def test_a_tool_loop_keeps_the_state_of_its_turn(stand: Stand) -> None:
    stand.sim.script(Script.of(Script.reasoning("**Look**", ""), Script.custom_tool("exec", "1")), "Done.")
    async with line(stand, codex=True) as caller:
        frames = await caller.ask("run it", **codex_fields())
        metadata = [frame for frame in frames if frame["type"] == "response.metadata"]
        wrapped = metadata[0]["headers"]["x-codex-turn-state"]
        first = frames[-1]["response"]
        (call,) = [item for item in first["output"] if item["type"] == "custom_tool_call"]
        output = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "42"}
        await caller.complete(
            input=[output],
            previous_response_id=first["id"],
            **codex_fields(**{"x-codex-turn-state": wrapped}),
        )
    one, two = stand.sim.turns
    assert (one.status, two.status) == (200, 200)
    assert one.account == two.account
    assert "x-codex-turn-state" not in one.headers
    # As over HTTP: a header, and the backend's own value.
    assert two.headers["x-codex-turn-state"] == wrapped.partition(".")[2]
    assert "x-codex-turn-state" not in two.json["client_metadata"]


async def test_a_frame_says_what_over_http_a_header_says(stand: Stand) -> None:
    upgrade = {"x-codex-turn-state": "not-of-this-turn", "x-openai-internal-codex-responses-lite": "true"}
    async with line(stand, codex=True, headers=upgrade) as caller:
        fields = codex_fields(
            STANDARD,
            **{
                "session_id": "session-2",
                "thread_id": "thread-2",
                "x-codex-window-id": "thread-2:1",
                "ws_request_header_traceparent": "00-abc-def-01",
                "ws_request_header_tracestate": "a=b",
                "ws_request_header_authorization": "Bearer smuggled",
            },
        )
        await caller.complete("hi", **fields)
    (turn,) = stand.sim.turns
    assert turn.headers["session-id"] == "session-2"
    assert turn.headers["thread-id"] == "thread-2"
    assert turn.headers["x-codex-window-id"] == "thread-2:1"
    assert json.loads(turn.headers["x-codex-turn-metadata"])["request_kind"] == "turn"
    assert turn.headers["traceparent"] == "00-abc-def-01"
    assert turn.headers["tracestate"] == "a=b"
    assert turn.headers["x-codex-beta-features"] == "remote_compaction_v2"
    assert turn.headers["originator"] == "codex_exec"
    assert "smuggled" not in str(turn.headers)
    for name in ("openai-beta", "sec-websocket-key", "upgrade", "x-codex-turn-state"):
        assert name not in turn.headers
    assert "x-openai-internal-codex-responses-lite" not in turn.headers
    assert not any(name.startswith(("ws_", "x-codex-ws-")) for name in turn.json["client_metadata"])
    assert turn.json["client_metadata"]["x-codex-installation-id"] == "installation-1"
    assert "type" not in turn.json


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_the_lite_flag_moves_from_the_frame_into_a_header(stand: Stand, model: str) -> None:
    async with line(stand, codex=True) as caller:
        await caller.complete("hi", **codex_fields(model))
    (turn,) = stand.sim.turns
    flag = turn.headers.get("x-openai-internal-codex-responses-lite")
    assert flag == ("true" if model == LITE else None)
    assert LITE_FLAG not in turn.json["client_metadata"]


async def test_a_codex_client_is_told_first_of_its_turn_and_of_the_pools_quota(stand: Stand) -> None:
    stand.sim.served_model = "gpt-of-another-name"
    stand.in_order()
    async with line(stand, codex=True) as caller:
        frames = await caller.ask("hi", **codex_fields(f"{STANDARD}-high"))
    # Before the backend's own events.
    assert types_of(frames)[:2] == ["response.metadata", "codex.rate_limits"]
    assert "response.created" in types_of(frames)[2:]
    headers = frames[0]["headers"]
    assert headers["openai-model"] == f"{STANDARD}-high"
    assert "chatgpt-account-id" not in headers
    assert "set-cookie" not in headers
    limits = (await stand.ask(codex=True)).headers
    assert str(frames[1]["rate_limits"]["primary"]["used_percent"]) == limits["x-codex-primary-used-percent"]


async def test_other_callers_get_the_public_events_alone(stand: Stand) -> None:
    stand.sim.extra_events = True
    async with line(stand) as caller:
        frames = await caller.ask("hi")
    assert all(kind.startswith("response.") for kind in types_of(frames))
    assert "response.metadata" not in types_of(frames)


async def test_requests_that_come_at_once_are_answered_in_order(stand: Stand) -> None:
    traces = traces_of(stand)
    stand.sim.script(Script.text("one", delay=0.01), "two", "three")
    async with line(stand) as caller:
        for word in ("one", "two", "three"):
            await caller.create(word)
        answers = [text_of(await caller.frames()) for _ in range(3)]
    assert answers == ["one", "two", "three"]
    await stand.until(lambda: len(traces) == 3)
    for earlier, later in itertools.pairwise(traces):
        assert earlier.finished is not None
        assert later.started >= earlier.finished
    assert len({trace.id for trace in traces}) == 3


async def test_each_turn_has_a_story_of_its_own(stand: Stand) -> None:
    traces = traces_of(stand)
    async with line(stand, codex=True, headers={"x-request-id": "mine"}) as caller:
        await caller.complete("one", **codex_fields())
        await caller.complete("two", **codex_fields())
    await stand.until(lambda: len(traces) == 2)
    assert [trace.id for trace in traces] == ["mine-1", "mine-2"]
    assert {trace.route for trace in traces} == {"responses"}
    assert {trace.client for trace in traces} == {"codex"}
    assert {trace.status for trace in traces} == {200}
    assert {trace.end for trace in traces} == {End.COMPLETED}
    assert all(trace.usage.input_tokens > 0 for trace in traces)
    assert all(trace.request_bytes > 100 and trace.answer_bytes > 100 for trace in traces)


# Lanes -------------------------------------------------------------------------------------


async def test_a_lane_is_named_in_each_of_its_frames(stand: Stand) -> None:
    async with line(stand) as caller:
        await caller.create("a", stream_id="planner", store=False)
        await caller.create("b", store=False)
        await caller.create("c", stream_id="research-1.0_x", previous_response_id="resp_none")
        planner, unnamed, failed = [await caller.frames() for _ in range(3)]
    assert {frame.get("stream_id") for frame in planner} == {"planner"}
    assert all("stream_id" not in frame for frame in unnamed)
    assert (failed[0]["type"], failed[0]["stream_id"]) == ("error", "research-1.0_x")
    assert all("stream_id" not in turn.json for turn in stand.sim.turns)


async def test_a_conversation_forks_into_another_lane(stand: Stand) -> None:
    stand.sim.script("The plan.", "A gap.", "More of it.")
    async with line(stand) as caller:
        plan = await caller.complete("Plan.", stream_id="planner", store=False)
        await caller.complete("Gaps?", stream_id="critic", store=False, previous_response_id=plan["id"])
        # The other lane took nothing away from the first one.
        await caller.complete("More.", stream_id="planner", store=False, previous_response_id=plan["id"])
        assert said(sent(stand)) == ["user: Plan.", "assistant: The plan.", "user: More."]
        # A fork that fails leaves the lane it came from alone.
        last = await caller.complete("Plan.", stream_id="planner", store=False)
        orphan = {"type": "function_call_output", "call_id": "call_none", "output": "x"}
        await caller.refuse(input=[orphan], stream_id="critic", store=False, previous_response_id=last["id"])
        await caller.complete("On.", stream_id="planner", store=False, previous_response_id=last["id"])


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 257, 7, [], {}, True])
async def test_a_lane_needs_a_sound_name(stand: Stand, name: object) -> None:
    async with line(stand) as caller:
        frame = await caller.refuse("hi", stream_id=name)
        assert (frame["status"], frame["error"]["code"]) == (400, "invalid_stream_id")
        assert frame["error"]["param"] == "stream_id"
        assert "stream_id" not in frame
        await caller.complete("hi")


async def test_a_socket_has_only_so_many_lanes(stand: Stand) -> None:
    async with line(stand) as caller:
        for number in range(websocket.MAX_LANES):
            await caller.complete("hi", stream_id=f"lane-{number}", generate=False)
        frame = await caller.refuse("hi", stream_id="one-more")
        assert frame["error"]["code"] == "websocket_stream_limit_reached"
        await caller.complete("hi", stream_id="lane-0", generate=False)
        await caller.complete("hi", generate=False)


# Continuations -----------------------------------------------------------------------------


async def test_store_false_goes_on_from_the_latest_answer_of_the_socket_alone(stand: Stand) -> None:
    async with line(stand) as caller:
        one = await caller.complete("one", store=False)
        two = await caller.complete("two", store=False, previous_response_id=one["id"])
        assert two["previous_response_id"] == one["id"]
        frame = await caller.refuse("three", store=False, previous_response_id=one["id"])
        assert (frame["status"], frame["error"]["code"]) == (400, "previous_response_not_found")
        assert frame["error"]["param"] == "previous_response_id"
        assert frame["error"]["type"] == "invalid_request_error"
        await caller.complete("three", store=False, previous_response_id=two["id"])


async def test_a_failed_continuation_forgets_what_it_went_on_from(stand: Stand) -> None:
    async with line(stand) as caller:
        seed = await caller.complete("Remember: ember.", store=False)
        orphan = {"type": "function_call_output", "call_id": "call_orphan", "output": "x"}
        failed = await caller.refuse(input=[orphan], store=False, previous_response_id=seed["id"])
        assert failed["status"] == 400
        frame = await caller.refuse("Which word?", store=False, previous_response_id=seed["id"])
        assert frame["error"]["code"] == "previous_response_not_found"
        # Sending everything again is the way out.
        await caller.complete("Remember: ember. Which word?", store=False)


async def test_a_continuation_that_fails_in_the_middle_forgets_too(stand: Stand) -> None:
    async with line(stand) as caller:
        seed = await caller.complete("one", store=False)
        stand.sim.script(Script.state("failed", code="server_error", after=4))
        frames = await caller.ask("two", store=False, previous_response_id=seed["id"])
        assert frames[-1]["type"] == "response.failed"
        frame = await caller.refuse("two", store=False, previous_response_id=seed["id"])
        assert frame["error"]["code"] == "previous_response_not_found"


async def test_a_stored_answer_survives_a_failed_continuation(stand: Stand) -> None:
    async with line(stand) as caller:
        seed = await caller.complete("one")
        stand.sim.script(Script.state("context_length", how="status"))
        await caller.ask("two", previous_response_id=seed["id"])
        await caller.complete("two", previous_response_id=seed["id"])


async def test_after_a_reconnect_an_unstored_answer_is_gone(stand: Stand) -> None:
    async with line(stand, codex=True) as caller:
        first = await caller.complete("one", **codex_fields())
    async with line(stand, codex=True) as caller:
        frame = await caller.refuse("two", previous_response_id=first["id"], **codex_fields())
        assert (frame["status"], frame["error"]["code"]) == (400, "previous_response_not_found")
        everything = [message("one"), *first["output"], message("two")]
        await caller.complete(input=everything, **codex_fields())
    assert said(sent(stand)) == ["user: one", "assistant: pong: one", "user: two"]


async def test_an_incomplete_answer_can_be_gone_on_from(stand: Stand) -> None:
    stand.sim.script(Script.incomplete(text="half"))
    async with line(stand) as caller:
        frames = await caller.ask("one", store=False)
        assert frames[-1]["type"] == "response.incomplete"
        await caller.complete("go on", store=False, previous_response_id=frames[-1]["response"]["id"])
    assert said(sent(stand)) == ["user: one", "assistant: half", "user: go on"]


async def test_a_conversation_that_outgrows_the_limit_is_told_so(tmp_path: Path) -> None:
    async with standing(tmp_path, max_body_bytes="8KiB") as stand, line(stand) as caller:
        first = await caller.complete("x" * 5000)
        frame = await caller.refuse("y" * 5000, previous_response_id=first["id"])
        assert (frame["status"], frame["error"]["code"]) == (413, "request_too_large")
        assert "max-body-bytes" in frame["error"]["message"]
        await caller.complete("y" * 5000)


async def test_lanes_share_one_bound_on_what_a_socket_keeps(tmp_path: Path) -> None:
    async with standing(tmp_path, max_body_bytes="8KiB") as stand, line(stand) as caller:
        first = await caller.complete("x" * 5000, stream_id="a", store=False)
        second = await caller.complete("y" * 5000, stream_id="b", store=False)
        frame = await caller.refuse("hi", stream_id="a", store=False, previous_response_id=first["id"])
        assert frame["error"]["code"] == "previous_response_not_found"
        await caller.complete("hi", stream_id="b", store=False, previous_response_id=second["id"])


async def test_the_path_of_a_wrong_field_is_the_callers_own(stand: Stand) -> None:
    async with line(stand) as caller:
        first = await caller.complete("one")
        wrong = [message("two"), {"type": "message", "role": "user", "content": 7}]
        frame = await caller.refuse(input=wrong, previous_response_id=first["id"])
        assert frame["error"]["param"] == "input.1.content"
        assert frame["error"]["message"].startswith("input.1.content ")


@pytest.mark.parametrize("value", [7, [], {}, True])
async def test_what_is_gone_on_from_is_named_by_a_text(stand: Stand, value: object) -> None:
    async with line(stand) as caller:
        frame = await caller.refuse("hi", previous_response_id=value)
        assert (frame["status"], frame["error"]["param"]) == (400, "previous_response_id")


@pytest.mark.parametrize("value", [None, ""])
async def test_going_on_from_nothing_begins_anew(stand: Stand, value: str | None) -> None:
    async with line(stand) as caller:
        await caller.complete("hi", previous_response_id=value)
    assert said(sent(stand)) == ["user: hi"]


# Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        ('{"model": NaN}', None),
        ("[" * 100_000, None),
        ("{}", "unknown_event_type"),
        ('{"type": 7}', "unknown_event_type"),
        ('{"type": ["response.create"]}', "unknown_event_type"),
        ('{"type": "response.append", "input": []}', "unknown_event_type"),
        ('{"type": "response.create"}', "missing_required_parameter"),
        ('{"type": "response.create", "model": "gpt-5.5"}', "missing_required_parameter"),
        ('{"type": "response.create", "model": 7, "input": "hi"}', "invalid_value"),
        ('{"type": "response.create", "model": "gpt-5.5", "input": 7}', "invalid_type"),
        ('{"type": "response.create", "model": "gpt-5.5", "input": ["hi"]}', "invalid_type"),
        ('{"type": "response.create", "model": "gpt-5.5", "input": "hi", "generate": 1}', "invalid_type"),
        (
            '{"type": "response.create", "model": "gpt-5.5", "input": "hi", "client_metadata": []}',
            "invalid_type",
        ),
        (
            '{"type": "response.create", "model": "gpt-5.5", "input": "hi", "background": true}',
            "unsupported_parameter",
        ),
    ],
)
async def test_a_frame_that_is_no_request_is_refused_and_the_socket_stays(
    stand: Stand, frame: str, code: str | None
) -> None:
    async with line(stand) as caller:
        await caller.ws.send_str(frame)
        error = await caller.frame()
        assert (error["type"], error["status"]) == ("error", 400)
        assert error["error"]["type"] == "invalid_request_error"
        assert error["error"]["code"] == code
        assert error["headers"]["x-request-id"]
        await caller.complete("hi")
    assert len(stand.sim.turns) == 1


async def test_an_unknown_type_is_named(stand: Stand) -> None:
    async with line(stand) as caller:
        await caller.ws.send_str('{"type": "response.steer", "input": []}')
        assert "'response.steer'" in (await caller.frame())["error"]["message"]


async def test_metadata_of_any_kind_harms_nobody(stand: Stand) -> None:
    async with line(stand, codex=True) as caller:
        fields = codex_fields()
        fields["client_metadata"] |= {"session_id": 7, "thread_id": None, "x-codex-turn-state": ["x"]}
        fields["client_metadata"]["x-codex-turn-metadata"] = "\0 ä \n"
        await caller.ws.send_str(json.dumps({"type": "response.create", "input": [message("hi")], **fields}))
        assert (await caller.frames())[-1]["type"] == "response.completed"


async def test_metadata_that_no_header_holds_stays_in_the_body(stand: Stand) -> None:
    async with line(stand, codex=True) as caller:
        long = {"x-codex-turn-metadata": "ä" * 5000, "session_id": "y" * 9000}
        fields = codex_fields(STANDARD, **long, ws_request_header_traceparent="z" * 9000)
        await caller.complete("hi", **fields)
    (turn,) = stand.sim.turns
    assert turn.json["client_metadata"].items() >= long.items()
    # Nor does what the upgrade said of them hold on.
    for name in ("x-codex-turn-metadata", "session-id", "traceparent"):
        assert name not in turn.headers


async def test_odd_characters_pass_as_they_came(stand: Stand) -> None:
    async with line(stand) as caller:
        first = await caller.complete("NUL \0 and 🎉", store=False)
        await caller.complete("on", store=False, previous_response_id=first["id"])
        assert sent(stand)[0]["content"][0]["text"] == "NUL \0 and 🎉"
        # Half a pair, as JavaScript callers cut it off; what it means is the backend's to say.
        body = {"type": "response.create", "model": STANDARD, "input": "half \ud83d"}
        await caller.ws.send_str(json.dumps(body))
        assert (await caller.frame())["status"] == 400
        assert b"half \\ud83d" in stand.sim.requests[-1].body


async def test_an_exhausted_pool_is_a_frame_with_status_and_reset(stand: Stand) -> None:
    traces = traces_of(stand)
    for account, resets_in in zip(stand.accounts, (7200, 3600, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    async with line(stand, codex=True) as caller:
        frame = await caller.refuse("hi", **codex_fields())
        assert frame["status"] == 429
        error = frame["error"]
        assert error["type"] == error["code"] == "usage_limit_reached"
        assert abs(error["resets_at"] - time.time() - 3600) < 30
        assert frame["headers"]["retry-after"] == str(error["resets_in_seconds"])
        assert frame["headers"]["x-should-retry"] == "false"
        assert all(isinstance(value, str) for value in frame["headers"].values())
        assert [trace.status for trace in traces] == [429]
        # The socket stays.
        assert (await caller.refuse("hi", **codex_fields()))["status"] == 429


async def test_an_empty_pool_does_not_refuse_the_upgrade(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=0) as stand, line(stand) as caller:
        frame = await caller.refuse("hi")
        assert (frame["status"], frame["error"]["code"]) == (429, "no_account_available")
        assert "retry-after" not in frame["headers"]


async def test_a_passing_shortage_says_how_long_to_wait(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0) as stand:
        stand.sim.script(Script.state("overloaded"))
        async with line(stand) as caller:
            frame = await caller.refuse("hi")
            assert (frame["status"], frame["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(frame["headers"]["retry-after"]) >= 1


async def test_a_model_that_nobody_has_is_the_callers_error(stand: Stand) -> None:
    stand.sim.set_all("bad_model")
    async with line(stand) as caller:
        frame = await caller.refuse("hi", model="gpt-0-imaginary")
        assert frame["status"] == 400
        assert frame["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("usage_limit", {"resets_in": 3600}),
        ("unauthorized", {}),
        ("payment", {}),
        ("cloudflare", {}),
        ("refuse", {}),
        ("overloaded_in_stream", {}),
        ("server_error", {"status": 502}),
    ],
)
async def test_an_accounts_failure_is_not_seen(stand: Stand, state: str, options: dict[str, Any]) -> None:
    stand.sim.script(Script.state(state, **options), "Nothing happened.")
    async with line(stand, codex=True) as caller:
        frames = await caller.ask("hi", **codex_fields())
    assert text_of(frames) == "Nothing happened."
    assert types_of(frames).count("response.created") == 1
    assert "error" not in types_of(frames)


async def test_a_failover_in_the_middle_of_a_conversation_takes_it_along(stand: Stand) -> None:
    stand.sim.script(Script.reasoning("**One**", "First."))
    async with line(stand, codex=True) as caller:
        one = await caller.complete("one", **codex_fields())
        served = stand.sim.turns[0].account
        stand.sim.account(str(served)).set("usage_limit", resets_in=3600)
        await caller.complete("two", previous_response_id=one["id"], **codex_fields())
    last = stand.sim.turns[-1]
    assert last.account != served
    # What only the other account can read is left out, and nothing else.
    assert said(sent(stand)) == ["user: one", "assistant: First.", "user: two"]


@pytest.mark.parametrize("codex", [True, False])
async def test_a_failure_after_content_ends_the_answer_as_over_http(stand: Stand, codex: bool) -> None:
    stand.sim.script(Script.state("cut", after=6))
    async with line(stand, codex=codex) as caller:
        fields = codex_fields(STANDARD) if codex else {}
        frames = await caller.ask("hi", **fields)
        assert frames[-1]["type"] == "response.failed"
        assert frames[-1]["response"]["status"] == "failed"
        assert frames[-1]["response"]["error"]["code"] == "server_error"
        assert types_of(frames).count("response.failed") == 1
        # One failure is one turn's matter.
        assert text_of(await caller.ask("hi", **fields)) == "pong: hi"


async def test_an_error_inside_a_frame_of_the_backend_is_one_proper_end(stand: Stand) -> None:
    delta = {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0}
    stand.sim.script(
        Script.raw([
            {"type": "response.created", "response": {"id": "resp_1"}, "sequence_number": 0},
            {**delta, "delta": "be", "sequence_number": 1},
            {"error": {"message": "the model fell over", "code": "server_error"}},
            {**delta, "delta": "gone", "sequence_number": 2},
            {"type": "response.completed", "response": {"id": "resp_1"}, "sequence_number": 3},
        ])
    )
    async with line(stand, codex=True) as caller:
        frames = await caller.ask("hi", **codex_fields(STANDARD))
        assert frames[-1]["type"] == "response.failed"
        assert frames[-1]["response"]["error"] == {"code": "server_error", "message": "the model fell over"}
        assert text_of(frames) == "be"
        # Nothing follows a terminal event: the next frame is the next answer's.
        assert text_of(await caller.ask("hi", **codex_fields(STANDARD))) == "pong: hi"


async def test_a_refusal_of_the_request_comes_as_the_event_that_codex_reads(stand: Stand) -> None:
    stand.sim.script(Script.state("context_length"), Script.state("context_length"))
    async with line(stand, codex=True) as caller:
        frames = await caller.ask("hi", **codex_fields())
        assert frames[-1]["type"] == "response.failed"
        assert frames[-1]["response"]["error"]["code"] == "context_length_exceeded"
    async with line(stand) as other:
        frame = await other.refuse("hi")
        assert (frame["status"], frame["error"]["code"]) == (400, "context_length_exceeded")


# Waiting -----------------------------------------------------------------------------------


async def test_a_caller_who_waits_gets_signs_of_life_before_and_in_an_answer(tmp_path: Path) -> None:
    async with standing(tmp_path, keep_alive_after="50ms") as stand:
        stand.sim.script(Script.state("stall", where="created", seconds=0.4))
        async with line(stand, codex=True) as caller:
            frames = await caller.ask("hi", **codex_fields())
        kinds = types_of(frames)
        # Before anything of an answer: a sign of life is none of it.
        assert kinds[0] == "keepalive"
        assert kinds.index("response.created") > 1
        assert kinds[-1] == "response.completed"

        stand.sim.script(Script.state("stall", where="middle", seconds=0.4))
        async with line(stand) as caller:
            frames = await caller.ask("hi", stream_id="planner")
        kinds = types_of(frames)
        assert kinds[0] == "response.created"
        assert "keepalive" in kinds[2:]
        assert {frame.get("stream_id") for frame in frames} == {"planner"}


async def test_failover_goes_on_behind_a_sign_of_life(tmp_path: Path) -> None:
    async with standing(tmp_path, keep_alive_after="50ms", first_byte_timeout="300ms") as stand:
        stand.sim.script(Script.state("stall", seconds=5), "From another account.")
        async with line(stand) as caller:
            frames = await caller.ask("hi")
        assert frames[0] == {"type": "keepalive"}
        assert text_of(frames) == "From another account."
        assert len(set(stand.tried())) == 2


async def test_after_a_sign_of_life_a_failure_still_has_its_status(tmp_path: Path) -> None:
    async with standing(
        tmp_path, accounts=1, keep_alive_after="50ms", first_byte_timeout="300ms", max_retry=0
    ) as stand:
        stand.sim.set_all("stall", seconds=5)
        async with line(stand, codex=True) as caller:
            frames = await caller.ask("hi", **codex_fields())
        assert types_of(frames)[:1] == ["keepalive"]
        assert (frames[-1]["type"], frames[-1]["status"]) == ("error", 429)


# The caller leaves -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_caller_who_leaves_frees_the_account_at_once(stand: Stand, how: str) -> None:
    traces = traces_of(stand)
    stand.sim.script(Script.long_text(2000, delay=0.01))
    async with line(stand) as caller:
        await caller.create("talk")
        while (await caller.frame())["type"] != "response.output_text.delta":
            pass
        if how == "abort":
            transport_of(caller).abort()
    (turn,) = stand.sim.turns
    await asyncio.wait_for(turn.closed.wait(), 5)
    assert turn.cancelled
    await stand.until(lambda: bool(traces))
    assert traces[0].end is End.CALLER_GONE
    assert traces[0].usage.output_tokens > 0
    assert stand.known(stand.sim.account(str(turn.account))).in_flight == 0


async def test_a_caller_who_pings_and_leaves_is_nothing_to_write_home_about(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        _, writer, _ = await knock(stand)
        writer.write(PING * 200)
        writer.transport.abort()
    await stand.until(lambda: not connections_of(stand))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_prewarm_whose_caller_has_left_has_its_story_too(
    stand: Stand, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(*_: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(websocket.Wire, "write", write)
    with caplog.at_level(logging.INFO, "codex_proxy.server.public"):
        async with line(stand) as caller:
            await caller.create("hi", generate=False)
            await stand.until(lambda: "turn id=" in caplog.text)
    assert "end=completed" in caplog.text


async def test_what_waits_is_dropped_with_its_caller(stand: Stand) -> None:
    stand.sim.script(Script.long_text(2000, delay=0.01))
    async with line(stand) as caller:
        await caller.create("talk")
        await caller.create("more")
        await caller.frame()
    await stand.idle()
    assert len(stand.sim.turns) == 1


# Limits of a socket ------------------------------------------------------------------------


async def test_a_frame_beyond_the_limit_closes_the_socket(tmp_path: Path) -> None:
    async with standing(tmp_path, max_body_bytes="8KiB") as stand:
        async with line(stand, max_msg_size=0) as caller:
            await caller.create("x" * 10_000)
            assert await caller.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        # A small one can be large when it is inflated.
        async with line(stand, compress=15) as caller:
            await caller.create("x" * 1_000_000)
            assert await caller.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG
        assert not stand.sim.turns


async def test_a_binary_frame_closes_the_socket(stand: Stand) -> None:
    async with line(stand) as caller:
        await caller.ws.send_bytes(b'{"type":"response.create"}')
        frame = await caller.frame()
        assert (frame["status"], frame["error"]["code"]) == (400, "unsupported_frame")
        assert await caller.closed() == aiohttp.WSCloseCode.UNSUPPORTED_DATA


async def test_too_many_waiting_requests_close_the_socket(stand: Stand) -> None:
    stand.sim.script(Script.state("stall", seconds=30))
    async with line(stand) as caller:
        for _ in range(websocket.MAX_WAITING + 3):
            await caller.create("hi")
        frame = await caller.frame()
        assert (frame["status"], frame["error"]["code"]) == (429, "too_many_requests")
        assert await caller.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_too_much_that_waits_closes_the_socket(tmp_path: Path) -> None:
    async with standing(tmp_path, max_body_bytes="64KiB") as stand:
        stand.sim.script(Script.state("stall", seconds=30))
        async with line(stand) as caller:
            for _ in range(4):
                await caller.create("x" * 30_000)
            assert (await caller.frame())["error"]["code"] == "too_many_requests"
            assert await caller.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION


@pytest.mark.parametrize("compress", [0, 15])
async def test_frames_are_deflated_when_the_caller_offers_it(stand: Stand, compress: int) -> None:
    async with line(stand, compress=compress) as caller:
        assert bool(caller.ws.compress) is bool(compress)
        text = "naïve 日本語 🎉 " * 2000
        stand.sim.script(text)
        first = await caller.ask(text, store=False)
        assert text_of(first).strip() == text.strip()
        await caller.complete("on", store=False, previous_response_id=first[-1]["response"]["id"])
    assert sent(stand)[0]["content"][0]["text"] == text


async def test_a_caller_who_reads_nothing_is_given_up(tmp_path: Path) -> None:
    async with standing(tmp_path, idle_timeout="500ms") as stand:
        traces = traces_of(stand)
        stand.sim.script(Script.long_text(600, text="x" * 20_000))
        async with line(stand) as caller:
            transport = transport_of(caller)
            transport.pause_reading()
            await caller.create("talk")
            await stand.until(lambda: bool(traces), 20)
            transport.abort()
        assert traces[0].end is End.CALLER_GONE
        (turn,) = stand.sim.turns
        await asyncio.wait_for(turn.closed.wait(), 5)


# Time --------------------------------------------------------------------------------------


@pytest.fixture
async def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """A daemon that looks at its sockets all the time."""
    monkeypatch.setattr(websocket, "LOOK_SECONDS", 0.02)
    async with standing(tmp_path) as stand:
        yield stand


def later(stand: Stand, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(stand.daemon.clock, "monotonic", lambda: time.monotonic() + seconds)


async def test_a_socket_on_which_nothing_is_asked_is_closed(
    hasty: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with line(hasty) as caller:
        await caller.complete("hi")
        later(hasty, monkeypatch, websocket.IDLE_SECONDS + 5)
        assert await caller.closed() == aiohttp.WSCloseCode.OK


async def test_an_old_socket_says_so_and_is_closed(hasty: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    async with line(hasty) as caller:
        await caller.complete("hi")
        later(hasty, monkeypatch, websocket.MAX_AGE_SECONDS + 5)
        frame = await caller.frame()
        assert (frame["type"], frame["status"]) == ("error", 400)
        assert frame["error"]["code"] == "websocket_connection_limit_reached"
        assert await caller.closed() == aiohttp.WSCloseCode.OK


async def test_a_turn_may_outlast_its_socket_and_nothing_after_it(
    hasty: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty.sim.script(Script.long_text(20, delay=0.02))
    async with line(hasty) as caller:
        await caller.create("talk")
        assert (await caller.frame())["type"] == "response.created"
        later(hasty, monkeypatch, websocket.MAX_AGE_SECONDS + 5)
        await caller.create("more")
        frames = await caller.frames()
        assert frames[-1]["type"] == "response.completed"
        frame = await caller.frame()
        assert frame["error"]["code"] == "websocket_connection_limit_reached"
        assert await caller.closed() == aiohttp.WSCloseCode.OK
    assert len(hasty.sim.turns) == 1


async def test_a_turn_under_way_is_not_idleness(hasty: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    hasty.sim.script(Script.long_text(20, delay=0.02))
    async with line(hasty) as caller:
        await caller.create("talk")
        assert (await caller.frame())["type"] == "response.created"
        later(hasty, monkeypatch, websocket.IDLE_SECONDS + 5)
        assert (await caller.frames())[-1]["type"] == "response.completed"
        # And it is counted from its end.
        await asyncio.sleep(0.1)
        await caller.complete("hi")


@pytest.mark.parametrize("is_pong_waiting", [False, True])
async def test_a_caller_who_reads_nothing_does_not_hold_an_end_up(
    hasty: Stand, monkeypatch: pytest.MonkeyPatch, is_pong_waiting: bool
) -> None:
    monkeypatch.setattr(websocket, "_GIVE_UP_SECONDS", 0.1)
    _, writer, _ = await knock(hasty, buffer=4096)
    (connection,) = connections_of(hasty)
    transport = writer.transport
    assert isinstance(transport, asyncio.Transport)
    transport.pause_reading()
    async with asyncio.timeout(20):
        while not connection._paused:
            writer.write(PING * 4)
            await asyncio.sleep(0)
        if is_pong_waiting:
            while connection._drain_waiter is None:
                writer.write(PING * 40)
                await asyncio.sleep(0)
    later(hasty, monkeypatch, websocket.IDLE_SECONDS + 5)
    await hasty.until(lambda: connection not in connections_of(hasty))
    transport.abort()


# Who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "https://evil.example"}, "forbidden_origin"),
        ({"Origin": "null"}, "forbidden_origin"),
        ({"Sec-Fetch-Site": "cross-site"}, "forbidden_origin"),
        ({"Host": "evil.example"}, "forbidden_host"),
    ],
)
async def test_a_page_of_another_site_opens_no_socket(
    stand: Stand, headers: dict[str, str], code: str
) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = await stand.get("/v1/responses", headers={**upgrade, **headers})
    assert (answer.status, answer.json["error"]["code"]) == (403, code)
    assert not stand.sim.requests


async def test_a_page_of_our_own_may_open_one(stand: Stand) -> None:
    async with line(stand, headers={"Origin": stand.url}) as caller:
        await caller.complete("hi")


async def test_without_a_key_there_is_no_socket(tmp_path: Path) -> None:
    async with standing(tmp_path, api_keys='["some-client-key-1"]') as stand:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Origin": stand.url}):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with line(stand, headers=headers):
                    raise AssertionError("it opened")
            assert caught.value.status == 401
        for headers in ({"Authorization": "Bearer some-client-key-1"}, {"x-api-key": "some-client-key-1"}):
            async with line(stand, headers=headers) as caller:
                await caller.complete("hi")


async def test_a_key_that_is_taken_back_ends_its_sockets(tmp_path: Path) -> None:
    async with standing(tmp_path, api_keys='["some-client-key-1", "some-client-key-2"]') as stand:
        async with line(stand, headers={"x-api-key": "some-client-key-1"}) as caller:
            await caller.complete("hi")
            file = stand.folder / "config.yaml"
            text = file.read_text(encoding="utf-8")
            live, before = stand.daemon.live, stand.daemon.live.current
            file.write_text(text.replace('"some-client-key-1", ', ""), encoding="utf-8")
            await stand.until(lambda: live.current is not before)
            frame = await caller.refuse("hi")
            assert (frame["status"], frame["error"]["code"]) == (401, "invalid_api_key")
            assert await caller.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
        assert len(stand.sim.turns) == 1


async def test_what_is_no_upgrade_is_told_what_to_send(stand: Stand) -> None:
    answer = await stand.get("/v1/responses")
    assert (answer.status, answer.json["error"]["code"]) == (426, "upgrade_required")
    # A key of the wrong length.
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    answer = await stand.get("/v1/responses", headers={**upgrade, "Sec-WebSocket-Key": "eA=="})
    assert answer.status == 400
    answer = await stand.get("/v1/responses", headers={**upgrade, "Sec-WebSocket-Version": "1"})
    assert answer.status == 400


@pytest.mark.parametrize("request_line", ["HEAD /v1/responses HTTP/1.1", "GET /v1/responses HTTP/1.0"])
async def test_only_get_of_http_1_1_is_an_upgrade(stand: Stand, request_line: str) -> None:
    _, writer, head = await knock(stand, request=request_line)
    assert b" 426 " in head
    writer.close()


async def test_what_is_offered_as_a_subprotocol_is_not_written_down(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients of another of OpenAI's APIs send their key there."""
    async with line(stand, protocols=["realtime", "openai-insecure-api-key.some-client-key"]) as caller:
        assert caller.ws.protocol is None
        await caller.complete("hi")
    assert "some-client-key" not in caplog.text


async def test_websocket_can_be_switched_off(tmp_path: Path) -> None:
    async with standing(tmp_path, enable_websocket=False) as stand:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with line(stand):
                raise AssertionError("it opened")
        assert caught.value.status == 426
        assert (await stand.ask("hi")).status == 200


# The end of the daemon ---------------------------------------------------------------------


async def stop(stand: Stand) -> None:
    """End the daemon, once: whoever made the stand wants to as well."""
    end = stand.daemon.stop

    async def ended(hurry: asyncio.Event | None = None) -> None:
        """Do nothing more."""

    stand.daemon.stop = ended  # type: ignore[method-assign]
    await end()


async def test_an_idle_socket_does_not_keep_a_daemon_that_ends(tmp_path: Path) -> None:
    async with standing(tmp_path, drain_timeout=60) as stand:
        async with line(stand) as caller, line(stand) as other:
            await caller.complete("hi")
            started = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stop(stand))
                assert await caller.closed() == aiohttp.WSCloseCode.SERVICE_RESTART
                assert await other.closed() == aiohttp.WSCloseCode.SERVICE_RESTART
        assert time.monotonic() - started < 5


async def test_a_peer_that_does_not_answer_the_close_keeps_it_for_a_moment_only(tmp_path: Path) -> None:
    async with standing(tmp_path, drain_timeout=60) as stand:
        _, writer, head = await knock(stand)
        assert b" 101 " in head
        started = time.monotonic()
        await stop(stand)
        assert time.monotonic() - started < 10
        writer.close()


async def test_a_turn_under_way_may_end_before_its_socket_does(tmp_path: Path) -> None:
    async with standing(tmp_path, drain_timeout=60) as stand:
        stand.sim.script(Script.long_text(30, delay=0.02))
        async with line(stand) as caller:
            await caller.create("talk")
            assert (await caller.frame())["type"] == "response.created"
            await caller.create("more")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stop(stand))
                frames = await caller.frames()
                assert frames[-1]["type"] == "response.completed"
                assert text_of(frames) == "word " * 30
                assert await caller.closed() == aiohttp.WSCloseCode.SERVICE_RESTART
        assert len(stand.sim.turns) == 1


@pytest.mark.parametrize("where", ["headers", "middle"])
async def test_a_turn_that_outlasts_the_drain_gets_a_proper_end(tmp_path: Path, where: str) -> None:
    async with standing(tmp_path, drain_timeout="300ms") as stand:
        stand.sim.script(Script.state("stall", where=where, seconds=60))
        async with line(stand) as caller:
            await caller.create("talk")
            await stand.until(lambda: len(stand.sim.turns) == 1)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stop(stand))
                end = (await caller.frames())[-1]
                if where == "middle":
                    assert end["type"] == "response.failed"
                    assert end["response"]["error"]["code"] == "rate_limit_exceeded"
                else:
                    assert (end["type"], end["status"]) == ("error", 429)
                assert await caller.closed() == aiohttp.WSCloseCode.SERVICE_RESTART


# Many at once ------------------------------------------------------------------------------


async def test_many_sockets_keep_their_conversations_apart(tmp_path: Path) -> None:
    sim = Simulator(accounts=4)

    async def talk(stand: Stand, name: str) -> list[str]:
        async with line(stand) as caller:
            first = await caller.complete(f"I am {name}.", store=False)
            second = await caller.complete("Who?", store=False, previous_response_id=first["id"])
            await caller.complete("Again?", store=False, previous_response_id=second["id"])
            return [name, first["id"], second["id"]]

    async with standing(tmp_path, simulator=sim) as stand:
        told = await asyncio.gather(*(talk(stand, f"caller-{os.urandom(4).hex()}") for _ in range(30)))
        assert len({ids[1] for ids in told}) == 30
        last = [turn for turn in sim.turns if len(turn.json["input"]) == 5]
        assert sorted(said(turn.json["input"])[0] for turn in last) == sorted(
            f"user: I am {name}." for name, *_ in told
        )
        assert all(said(turn.json["input"])[4] == "user: Again?" for turn in last)
