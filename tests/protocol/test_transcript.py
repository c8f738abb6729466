"""Conversations that grow by a link, and requests that go on from one."""

import gc
import time
from typing import Any

import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import CHAIN, Binding
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.transcript import (
    Transcript,
    decode_continued,
    go_on,
    not_found,
    take_previous,
)
from codex_proxy.protocol.wire import dumps, loads
from tests.harness import CODEX_HEADERS, LITE, STANDARD

ANSWER = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "pong", "annotations": []}],
}
CODEX = {name.lower(): value for name, value in CODEX_HEADERS.items()}


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def request(**fields: Any) -> BackendRequest:
    return BackendRequest(endpoint="responses", asked_model=STANDARD, model=STANDARD, body=b"", **fields)


def told(sent: bytes, before: Transcript | None = None, **fields: Any) -> Transcript:
    gone = go_on(request(**fields), sent, before, {"id": "resp_1", "output": [ANSWER]})
    assert gone is not None
    return gone[1]


def decode(
    before: Transcript,
    *,
    headers: dict[str, str] | None = None,
    limit: int = 2**20,
    new_bytes: int = 100,
    **fields: Any,
) -> BackendRequest:
    return decode_continued(
        {"model": STANDARD, **fields},
        headers or {},
        catalog=Catalog(),
        response_id="resp_1",
        before=before,
        new_bytes=new_bytes,
        limit=limit,
    )


# What is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b'{"model": "gpt-5.5", "tools": [{"type": "function"}], "input": "hi"}',
        dumps({"input": [user("hi")]}),
        dumps([user("hi")]),
    ],
    ids=["a body with a text", "a body with a list", "a list"],
)
def test_what_was_sent_is_taken_apart_when_it_is_needed(sent: bytes) -> None:
    assert told(sent).items() == [user("hi"), ANSWER]


@pytest.mark.parametrize("sent", [b'{"input": null}', b"{}", b"[]", b"null"])
def test_a_turn_may_have_sent_nothing(sent: bytes) -> None:
    assert told(sent).items() == [ANSWER]


def test_a_turn_adds_its_own_items_and_copies_nothing() -> None:
    one = told(dumps([user("one")]))
    two = told(dumps([user("two")]), one)
    assert two.before is one
    assert two.own_bytes == len(two.sent) + len(two.answered)
    assert two.size() == one.own_bytes + two.own_bytes
    assert two.items() == [user("one"), ANSWER, user("two"), ANSWER]
    # The older conversation is still what it was, and can be gone on from once more.
    assert told(dumps([user("other")]), one).items() == [user("one"), ANSWER, user("other"), ANSWER]


def test_a_request_for_compaction_is_no_part_of_the_conversation() -> None:
    sealed = {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAAA"}
    sent = dumps([user("one"), {"type": "compaction_trigger"}])
    gone = go_on(request(), sent, None, {"id": "resp_1", "output": [sealed]})
    assert gone is not None
    assert gone[1].items() == [user("one"), sealed]
    made = decode(gone[1], input="two")
    assert made.compacted == ("gAAAAA",)


def test_items_are_new_each_time() -> None:
    transcript = told(dumps([user("one")]))
    transcript.items()[0]["role"] = "changed"
    assert transcript.items()[0]["role"] == "user"


def test_odd_characters_are_kept() -> None:
    sent = b'{"input": "half \\ud83d and \\u0000"}'
    assert told(sent).items()[0]["content"][0]["text"] == "half \ud83d and \0"


def test_a_conversation_of_many_turns_is_no_burden() -> None:
    started = time.perf_counter()
    transcript: Transcript | None = None
    for _ in range(20_000):
        transcript = told(b"[]", transcript)
    assert transcript is not None
    assert len(transcript.items()) == 20_000
    del transcript
    gc.collect()
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("final", [{}, {"id": None}, {"id": ""}, {"id": 7, "output": []}])
def test_an_answer_without_an_id_cannot_be_gone_on_from(final: dict[str, Any]) -> None:
    assert go_on(request(), b"[]", None, final) is None


@pytest.mark.parametrize("output", [None, "text", {}])
def test_an_output_that_is_no_list_adds_nothing(output: Any) -> None:
    gone = go_on(request(binding=Binding("s", "session-id")), b"[]", None, {"id": "resp_1", "output": output})
    assert gone is not None
    assert (gone[0], gone[1].items(), gone[1].binding) == ("resp_1", [], Binding("s", CHAIN))


# Going on ----------------------------------------------------------------------------------


def test_the_whole_conversation_goes_to_the_backend() -> None:
    made = decode(told(dumps([user("one")])), input="two")
    body = loads(made.body)
    assert [item.get("role") for item in body["input"]] == ["user", "assistant", "user"]
    assert body["input"][0] == user("one")
    assert body["input"][2] == user("two")
    assert "previous_response_id" not in body
    assert made.previous_response_id == "resp_1"


def test_nothing_new_is_enough() -> None:
    body = loads(decode(told(dumps([user("one")]))).body)
    assert len(body["input"]) == 2


def test_instructions_and_tools_of_earlier_turns_do_not_come_along() -> None:
    tool = {"type": "function", "name": "old", "parameters": {"type": "object", "properties": {}}}
    sent = dumps({"model": LITE, "instructions": "Old.", "tools": [tool], "input": "one"})
    made = decode(told(sent), model=LITE, input="two", instructions="New.")
    body = loads(made.body)
    assert made.was_lite_encoded
    assert [item["type"] for item in body["input"]] == ["message"] * 4
    assert b"Old." not in made.body
    assert body["input"][0] == {
        "type": "message",
        "role": "developer",
        "content": [{"type": "input_text", "text": "New."}],
    }


def test_a_codex_clients_items_pass_as_they_are() -> None:
    before = told(dumps({"input": [user("one")]}))
    made = decode(before, headers=CODEX, input=[user("two")])
    assert made.is_codex
    assert loads(made.body)["input"] == [user("one"), ANSWER, user("two")]
    assert not made.keeps


def test_encrypted_items_of_the_conversation_are_known() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAA"}
    gone = go_on(request(), b"[]", None, {"id": "resp_1", "output": [thought, ANSWER]})
    assert gone is not None
    assert decode(gone[1], input="two").encrypted == ("gAAAAA",)


@pytest.mark.parametrize(
    ("fields", "kept", "found"),
    [
        ({}, Binding("conv_1", "prompt_cache_key"), CHAIN),
        ({}, Binding("conv_1", "beginning", is_opening=True), CHAIN),
        ({"user": "anna"}, Binding("conv_1", "beginning", is_opening=True), CHAIN),
        ({"prompt_cache_key": "mine"}, Binding("conv_1", "beginning"), "prompt_cache_key"),
        ({}, None, "beginning"),
    ],
)
def test_the_conversation_brings_its_binding_unless_the_turn_names_one(
    fields: dict[str, Any], kept: Binding | None, found: str
) -> None:
    made = decode(told(dumps([user("one")]), binding=kept), input="two", **fields)
    assert made.binding is not None
    assert made.binding.source == found
    assert (made.session == "conv_1") == (found == CHAIN)
    assert not made.is_opening


def test_a_chain_is_known_by_a_name_of_its_own_when_it_has_one() -> None:
    opening = Binding("conv_1", "beginning", is_opening=True, also="chain-1")
    before = told(dumps([user("one")]), binding=opening)
    assert decode(before, input="two").binding == Binding("chain-1", CHAIN)


def test_a_conversation_has_a_limit() -> None:
    before = told(dumps([user("x" * 1000)]))
    size = before.size()
    assert decode(before, input="y", new_bytes=50, limit=size + 50).body
    with pytest.raises(RequestError) as caught:
        decode(before, input="y", new_bytes=51, limit=size + 50)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
    assert "max-body-bytes" in caught.value.message


@pytest.mark.parametrize(
    ("new", "param"),
    [
        (7, "input"),
        ({}, "input"),
        ([7], "input.0"),
        ([user("fine"), {"type": 7}], "input.1.type"),
        ([{"type": "message", "role": "user", "content": [7]}], "input.0.content.0"),
        ([{"type": "function_call_output", "call_id": 7, "output": "x"}], "input.0.call_id"),
    ],
)
def test_a_wrong_field_is_named_as_the_caller_sent_it(new: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode(told(dumps([user("one")])), input=new)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert f"{param} " in f"{caught.value.message} " or param == "input.0"
    assert "input.2" not in caught.value.message


def test_an_error_elsewhere_keeps_its_path() -> None:
    with pytest.raises(RequestError) as caught:
        decode(told(b"[]"), input="two", tools=[7])
    assert caught.value.param == "tools.0"


# The id ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, None),
        ({"previous_response_id": None}, None),
        ({"previous_response_id": ""}, None),
        ({"previous_response_id": "resp_1"}, "resp_1"),
    ],
)
def test_the_id_is_taken_out(fields: dict[str, Any], found: str | None) -> None:
    fields = {**fields, "input": "hi"}
    assert take_previous(fields) == found
    assert fields == {"input": "hi"}


@pytest.mark.parametrize("value", [7, True, [], {}])
def test_an_id_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(RequestError) as caught:
        take_previous({"previous_response_id": value})
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "invalid_type")


def test_what_is_not_known_is_said_in_the_words_that_clients_know() -> None:
    error = not_found("resp_" + "x" * 5000)
    assert (error.status, error.code) == (400, "previous_response_not_found")
    assert (error.type, error.param) == ("invalid_request_error", "previous_response_id")
    assert len(error.message) < 400
