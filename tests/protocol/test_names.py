"""Names as the backend takes them: tools' names there and back, ids that fit."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.protocol.names import ItemIds, ToolNames, fit_call_id, shorten

FITTING = re.compile(r"[a-zA-Z0-9_-]{1,64}")
LONG = "a_tool_with_a_name_that_is_longer_than_the_backend_takes_by_some_letters"
MCP = "mcp__a_server_with_a_very_long_name_that_says_hardly_anything_at_all__"


def test_a_name_that_fits_keeps_itself() -> None:
    names = ToolNames(["look", "get-it", "A_1", "x" * 64])
    assert [names.sent(name) for name in ("look", "get-it", "A_1", "x" * 64)] == [
        "look",
        "get-it",
        "A_1",
        "x" * 64,
    ]
    assert names.sent("never_declared") == "never_declared"


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        (LONG, LONG[:64]),
        (f"{MCP}list_files", "mcp__list_files"),
        (f"{MCP}{'x' * 80}", f"mcp__{'x' * 59}"),
        ("mcp__short__list.files", "mcp__short__list_files"),
        ("files.read/all", "files_read_all"),
        ("größe", "gr__e"),
        ("🦊" * 70, "_" * 64),
        ("half \ud83e", "half__"),
        ("nul\0", "nul_"),
        ("", "tool"),
    ],
)
def test_a_name_is_made_to_fit_and_found_again(name: str, fitting: str) -> None:
    names = ToolNames([name])
    assert names.sent(name) == fitting
    assert names.asked(fitting) == name


def test_names_that_would_meet_are_numbered_in_the_order_of_the_tools() -> None:
    names = ToolNames([f"{LONG}1", "a.b", f"{LONG}2", "a/b", f"{LONG}3"])
    assert names.sent(f"{LONG}1") == LONG[:64]
    assert names.sent(f"{LONG}2") == f"{LONG[:62]}_1"
    assert names.sent(f"{LONG}3") == f"{LONG[:62]}_2"
    assert (names.sent("a.b"), names.sent("a/b")) == ("a_b", "a_b_1")


def test_a_real_name_is_never_given_to_another_tool() -> None:
    for order in (["a.b", "a_b"], ["a_b", "a.b"]):
        names = ToolNames(order)
        assert (names.sent("a_b"), names.sent("a.b")) == ("a_b", "a_b_1")
    names = ToolNames(["a.b", "a_b_1", "a/b"])
    assert (names.sent("a.b"), names.sent("a_b_1"), names.sent("a/b")) == ("a_b", "a_b_1", "a_b_2")


def test_a_tool_that_is_no_longer_declared_is_named_by_the_same_rule() -> None:
    names = ToolNames(["a.b"])
    assert names.sent("gone.tool") == "gone_tool"
    assert names.sent("a_b") == "a_b_1"
    assert names.asked("a_b_1") == "a_b"


def test_a_name_of_the_models_own_stays_what_it_is() -> None:
    assert ToolNames(["look"]).asked("invented") == "invented"


@settings(derandomize=True, deadline=None, max_examples=300, database=None)
@given(
    st.lists(
        st.text(alphabet="a_1.é-", max_size=5) | st.text(alphabet="ab_", min_size=62, max_size=67),
        max_size=12,
    ),
    st.lists(st.text(alphabet="a_1.é-", max_size=5), max_size=4),
)
def test_every_name_fits_is_one_tools_only_and_is_found_again(declared: list[str], others: list[str]) -> None:
    names, again = ToolNames(declared), ToolNames(declared)
    sent = {name: names.sent(name) for name in [*declared, *others]}
    assert all(FITTING.fullmatch(fitting) for fitting in sent.values())
    assert len(set(sent.values())) == len(sent)
    assert all(names.asked(fitting) == name for name, fitting in sent.items())
    assert {name: again.sent(name) for name in [*declared, *others]} == sent


def test_thousands_of_names_that_meet_take_linear_time() -> None:
    def seconds(number: int) -> float:
        declared = [chr(0x4E00 + index % 100) + chr(0x4E00 + index // 100) for index in range(number)]
        started = time.process_time()
        assert len({ToolNames(declared).sent(name) for name in declared[:1]}) == 1
        return time.process_time() - started

    seconds(100)
    assert min(seconds(8_000) for _ in range(2)) < min(seconds(2_000) for _ in range(3)) * 4 * 3


# Ids ------------------------------------------------------------------------------------------------


def test_a_calls_id_fits_and_the_same_text_gives_the_same_one() -> None:
    assert fit_call_id("call_1-a") == "call_1-a"
    assert fit_call_id("x" * 64) == "x" * 64
    for odd in ("x" * 65, "call.1", "a b", "ü", "\ud83e"):
        fitting = fit_call_id(odd)
        assert FITTING.fullmatch(fitting)
        assert fitting == fit_call_id(odd) == shorten(odd, "call")
    assert fit_call_id("x" * 65) != fit_call_id("x" * 66)


@pytest.mark.parametrize(
    ("kind", "value", "repaired"),
    [
        ("message", "msg_1", "msg_1"),
        ("message", "item_1", "msg_item_1"),
        ("function_call", "call_1", "fc_call_1"),
        ("reasoning", "x" * 70, shorten("x" * 70, "rs")),
        ("of_tomorrow", "anything", "anything"),
        ("of_tomorrow", "at_" + "x" * 70, shorten("at_" + "x" * 70, "at")),
    ],
)
def test_an_items_id_gets_the_prefix_of_its_type(kind: str, value: str, repaired: str) -> None:
    assert ItemIds([]).repair(value, kind) == repaired


def test_two_ids_never_become_one() -> None:
    items = [{"type": "message", "id": "msg_a"}, {"type": "message", "id": "a"}]
    ids = ItemIds(items)
    assert ids.repair("msg_a", "message") == "msg_a"
    assert ids.repair("a", "message") == shorten("a", "msg")
    assert ids.repair("b", "message") == "msg_b"
    assert ids.repair("b", "message") == "msg_b"
