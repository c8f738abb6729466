"""Calls and outputs: every one finds its counterpart, and nothing vanishes."""

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.protocol.calls import NO_OUTPUT, repair_calls
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator.checks import check_shape


def call(identity: str | None = None, name: str = "f", *, custom: bool = False) -> JsonObject:
    kind, key = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
    return {"type": kind, "name": name, key: "{}", **({"call_id": identity} if identity is not None else {})}


def output(identity: str | None = None, text: Any = "out") -> JsonObject:
    item: JsonObject = {"type": "function_call_output", "output": text}
    return item | ({"call_id": identity} if identity is not None else {})


def said(role: str = "user") -> JsonObject:
    return {"type": "message", "role": role, "content": "hi"}


def thought() -> JsonObject:
    return {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}


def repair(*rounds: list[JsonObject]) -> list[JsonObject]:
    """Repair the items of several messages."""
    items = [item for one in rounds for item in one]
    return repair_calls(items, list(itertools.accumulate(map(len, rounds))))


def shown(items: list[JsonObject]) -> list[str]:
    """Return a word per item: what it is, its id or text, what it holds."""
    words = []
    for item in items:
        match item["type"]:
            case "message":
                content = item["content"]
                words.append(f"said {content}" if isinstance(content, str) else f"said {content[0]['text']}")
            case "reasoning":
                words.append("thought")
            case kind:
                held = f" {item['output']}" if "output" in item else ""
                words.append(f"{kind.replace('_tool', '').replace('function_', '')} {item['call_id']}{held}")
    return words


def test_what_is_in_order_stays_as_it_is() -> None:
    rounds = [[said()], [call("a"), call("b", custom=True)], [output("a", "1")], [output("b", "2")], [said()]]
    assert shown(repair(*rounds)) == [
        "said hi",
        "call a",
        "custom_call b",
        "call_output a 1",
        "custom_call_output b 2",
        "said hi",
    ]


def test_outputs_keep_the_order_in_which_they_were_sent() -> None:
    items = repair(
        [call("a"), call("b"), call("c")], [output("c", "3")], [output("a", "1")], [output("b", "2")]
    )
    assert shown(items)[3:] == ["call_output c 3", "call_output a 1", "call_output b 2"]


def test_a_reused_id_belongs_to_the_newest_call_and_gets_another_name() -> None:
    items = repair(
        [call("a")], [output("a", "1")], [call("a")], [output("a", "2")], [call("a")], [output("a", "3")]
    )
    assert shown(items) == [
        "call a",
        "call_output a 1",
        "call a_2",
        "call_output a_2 2",
        "call a_3",
        "call_output a_3 3",
    ]


def test_a_reused_id_of_an_unanswered_call_is_the_newest_ones() -> None:
    items = repair([call("a", "old")], [said()], [call("a", "new")], [output("a", "1")])
    assert shown(items) == [
        "call a",
        f"call_output a {NO_OUTPUT}",
        "said hi",
        "call a_2",
        "call_output a_2 1",
    ]


def test_a_made_up_id_meets_none_that_is_there() -> None:
    items = repair([call("a"), call(), call()], [output("a")], [call("a")], [call("a_2"), call("call_1")])
    ids = [item["call_id"] for item in items if item["type"] == "function_call"]
    assert ids == ["a", "call_1_2", "call_2", "a_3", "a_2", "call_1"]


def test_outputs_without_an_id_belong_to_the_first_open_calls_of_the_newest_round() -> None:
    items = repair(
        [call("old")], [call("a"), call("b")], [output(text="1")], [output("", "2")], [output(text="3")]
    )
    assert shown(items) == [
        "call old",
        "call a",
        "call b",
        "call_output a 1",
        "call_output b 2",
        "call_output old 3",
    ]


def test_an_id_given_twice_in_one_round_says_nothing() -> None:
    items = repair(
        [call("a", "one"), call("a", "two"), call("b")], [output("a", "whose")], [output("b", "1")]
    )
    assert shown(items) == [
        "call a",
        "call a_2",
        "call b",
        f"call_output a {NO_OUTPUT}",
        f"call_output a_2 {NO_OUTPUT}",
        "said [output of an unknown tool call a]\nwhose",
        "call_output b 1",
    ]


def test_an_id_given_twice_in_the_newest_round_means_no_earlier_call_either() -> None:
    items = repair([call("a")], [said()], [call("a"), call("a")], [output("a", "1")])
    assert shown(items) == [
        "call a",
        "call_output a (no output)",
        "said hi",
        "call a_2",
        "call a_3",
        "call_output a_2 (no output)",
        "call_output a_3 (no output)",
        "said [output of an unknown tool call a]\n1",
    ]


@pytest.mark.parametrize("identity", ["lost", "", None])
def test_an_orphan_becomes_labelled_words(identity: str | None) -> None:
    picture = {"type": "input_image", "image_url": "u"}
    label = "[output of an unknown tool call lost]" if identity else "[output of an unknown tool call]"
    (text, parts, nothing) = repair([
        output(identity, "words"),
        output(identity, [picture]),
        output(identity, ""),
    ])
    assert text["content"] == [{"type": "input_text", "text": f"{label}\nwords"}]
    assert parts["content"] == [{"type": "input_text", "text": label}, picture]
    assert nothing["content"] == [{"type": "input_text", "text": label}]
    assert {item["role"] for item in (text, parts, nothing)} == {"user"}


def test_a_second_output_and_one_before_its_call_are_orphans() -> None:
    items = repair([output("a", "early")], [call("a")], [output("a", "1")], [output("a", "again")])
    assert shown(items) == [
        "said [output of an unknown tool call a]\nearly",
        "call a",
        "call_output a 1",
        "said [output of an unknown tool call a]\nagain",
    ]


def test_a_call_without_an_output_gets_a_note_behind_the_calls_of_its_round() -> None:
    items = repair([call("a"), thought(), call("b", custom=True)], [said()], [call("c")])
    assert shown(items) == [
        "call a",
        "thought",
        "custom_call b",
        f"call_output a {NO_OUTPUT}",
        f"custom_call_output b {NO_OUTPUT}",
        "said hi",
        "call c",
        f"call_output c {NO_OUTPUT}",
    ]


def test_an_output_is_of_the_kind_of_its_call() -> None:
    wrong = {**output("a"), "type": "custom_tool_call_output"}
    items = repair([call("a"), call("b", custom=True)], [wrong, output("b")])
    assert [item["type"] for item in items[2:]] == ["function_call_output", "custom_tool_call_output"]


def test_ids_are_made_to_fit_on_both_sides() -> None:
    odd = ["x" * 80, "call.1/ü"]
    items = repair([call(one) for one in odd], [output(one) for one in reversed(odd)])
    ids = [item["call_id"] for item in items]
    assert ids[:2] == ids[3:1:-1]
    assert all(len(one) <= 64 and one.isascii() for one in ids)


def test_ids_that_are_no_text_count_as_missing() -> None:
    items = repair([{**call(), "call_id": 5}], [{**output(), "call_id": None}])
    assert items[0]["call_id"] == items[1]["call_id"] == "call_0"


IDS = st.sampled_from(["a", "b", "a_2", "call_1", "", None, "x" * 70])
ITEMS = st.one_of(
    st.builds(call, IDS, custom=st.booleans()),
    st.builds(output, IDS, st.sampled_from(["one", "two", "three"])),
    st.builds(said),
    st.builds(thought),
)


@settings(derandomize=True, deadline=None, max_examples=500, database=None)
@given(st.lists(st.lists(ITEMS, max_size=4), max_size=6))
def test_the_backend_takes_what_was_repaired_and_no_word_is_lost(rounds: list[list[JsonObject]]) -> None:
    before = [dict(item) for one in rounds for item in one]
    items = repair(*rounds)
    body = {"model": "m", "stream": True, "store": False, "input": items}
    assert check_shape(body, {}, "lenient") is None
    ids = [item["call_id"] for item in items if item["type"].endswith("_call")]
    assert len(ids) == len(set(ids)) == sum(item["type"].endswith("_call") for item in before)
    outputs = [item["output"] for item in items if item["type"].endswith("_output")]
    labelled = [
        item["content"][0]["text"].partition("\n")[2]
        for item in items
        if item["type"] == "message" and not isinstance(item["content"], str)
    ]
    told = sorted([text for text in [*outputs, *labelled] if text != NO_OUTPUT])
    assert told == sorted(item["output"] for item in before if item["type"].endswith("_output"))
    # The calls, thoughts and words stand in their order.
    order = [item for item in items if item["type"] != "message" and "output" not in item]
    assert [item["type"] for item in order] == [
        item["type"] for item in before if item["type"] != "message" and "output" not in item
    ]
    assert len(outputs) == len(ids)


def test_thousands_of_reused_ids_and_orphans_take_linear_time() -> None:
    def seconds(number: int) -> float:
        rounds = [
            [call("a"), call()] if index % 2 else [output("lost"), output("a")] for index in range(number)
        ]
        started = time.process_time()
        repair(*rounds)
        return time.process_time() - started

    seconds(100)
    assert min(seconds(20_000) for _ in range(2)) < min(seconds(5_000) for _ in range(3)) * 4 * 3
