"""What a conversation is known by: which name counts, whose it is, and how those without one begin."""

import itertools
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.protocol.binding import (
    BEGINNING,
    CHAIN,
    SESSION_HEADERS,
    SOURCES,
    Binding,
    bind,
)
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.completions import COMPLETIONS
from codex_proxy.protocol.dialect import Dialect
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import RESPONSES

FIXTURES = Path(__file__).parent / "fixtures_messages"
SESSION = "00000000-0000-4000-8000-000000000001"
OTHER = "00000000-0000-4000-8000-000000000002"
CLAUDE = "x-claude-code-session-id"
AGENT = "x-claude-code-agent-id"
CODE_TEXT = f"user_0a1b_account__session_{SESSION}"
CODE_JSON = json.dumps({"device_id": "d", "account_uuid": "", "session_id": SESSION})

Item = dict[str, Any]


def named(headers: dict[str, str] | None = None, caller: str = "key-a", **said: Any) -> Binding:
    """Return the binding of a request whose conversation is always the same."""
    binding = bind(caller, headers or {}, said, model="gpt-5.5", items="hello")
    assert binding is not None
    return binding


def begun(
    *items: Any, instructions: Any = None, model: str = "gpt-5.5", caller: str = "key-a", **said: Any
) -> Binding:
    """Return the binding of a conversation that nobody named."""
    binding = bind(caller, {}, said, model=model, instructions=instructions, items=list(items))
    assert binding is not None
    return binding


def user(content: Any) -> Item:
    return {"role": "user", "content": content}


def system(content: Any) -> Item:
    return {"role": "system", "content": content}


def answer(content: Any = "an answer") -> Item:
    return {"role": "assistant", "content": content}


# Names.


@pytest.mark.parametrize(
    ("headers", "said", "source"),
    [
        *(({name: SESSION}, {}, name) for name in SESSION_HEADERS),
        ({CLAUDE: SESSION}, {}, "claude session"),
        ({}, {"prompt_cache_key": SESSION}, "prompt_cache_key"),
        ({}, {"metadata": {"user_id": CODE_TEXT}}, "metadata.user_id"),
        ({}, {"metadata": {"user_id": CODE_JSON}}, "metadata.user_id"),
        # As a relay translates them.
        ({}, {"user": CODE_TEXT}, "metadata.user_id"),
        ({}, {"user": CODE_JSON}, "metadata.user_id"),
        ({}, {"conversation": SESSION}, "conversation"),
        ({}, {"conversation": {"id": SESSION}}, "conversation"),
    ],
)
def test_a_name_is_the_same_conversation_wherever_it_stands(
    headers: dict[str, str], said: dict[str, Any], source: str
) -> None:
    binding = named(headers, **said)
    assert binding == Binding(named({"session-id": SESSION}).key, source)
    assert not binding.is_guess
    assert source in SOURCES


IN_ORDER: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *((name, {name: f"by {name}"}, {}) for name in SESSION_HEADERS),
    ("claude session", {CLAUDE: "by claude"}, {}),
    ("prompt_cache_key", {}, {"prompt_cache_key": "by key"}),
    ("metadata.user_id", {}, {"metadata": {"user_id": CODE_TEXT}}),
    ("conversation", {}, {"conversation": "by conversation"}),
    ("user", {}, {"user": "anna"}),
    ("safety_identifier", {}, {"safety_identifier": "anna"}),
    ("beginning", {}, {}),
]


@pytest.mark.parametrize(("strong", "weak"), [*itertools.combinations(range(len(IN_ORDER)), 2)])
def test_of_two_names_the_stronger_counts(strong: int, weak: int) -> None:
    source, headers, said = IN_ORDER[strong]
    _, more_headers, more = IN_ORDER[weak]
    assert named({**more_headers, **headers}, **{**more, **said}) == named(headers, **said)
    assert named(headers, **said).source == source
    assert SOURCES.index(source) < SOURCES.index(IN_ORDER[weak][0])


def test_every_source_is_tried_here() -> None:
    assert {*(source for source, _, _ in IN_ORDER), "claude agent", CHAIN} == set(SOURCES)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"session-id": ""}, {}),
        ({"session-id": "  "}, {}),
        ({CLAUDE: "", AGENT: "a1"}, {}),
        ({}, {"prompt_cache_key": ""}),
        ({}, {"prompt_cache_key": 7}),
        ({}, {"metadata": None}),
        ({}, {"metadata": "x"}),
        ({}, {"metadata": {"user_id": None}}),
        ({}, {"metadata": {"user_id": "somebody"}}),
        ({}, {"metadata": {"user_id": "{"}}),
        ({}, {"metadata": {"user_id": "{}"}}),
        ({}, {"metadata": {"user_id": '{"session_id":5}'}}),
        ({}, {"metadata": {"user_id": '{"session_id":""}'}}),
        ({}, {"metadata": {"user_id": '["session_id"]'}}),
        # What only sounds like Claude Code's would be one name for all that a tool ever asks.
        ({}, {"metadata": {"user_id": "my_session_user"}}),
        ({}, {"metadata": {"user_id": f"{CODE_TEXT} and more"}}),
        ({}, {"metadata": {"user_id": f'{{"session_id":"{SESSION}","x":"{"y" * 5000}"}}'}}),
        ({}, {"conversation": ""}),
        ({}, {"conversation": {}}),
        ({}, {"conversation": {"id": 5}}),
        ({}, {"user": ""}),
        ({}, {"user": 5, "safety_identifier": ["x"]}),
    ],
)
def test_what_is_no_name_is_none(headers: dict[str, str], said: dict[str, Any]) -> None:
    assert named(headers, **said) == named()
    assert named().source == "beginning"


@pytest.mark.parametrize(
    "value",
    ["\udcff", "é\ud800", "x" * 100_000, "two\nlines", "\0"],
    ids=["byte", "half", "long", "lines", "nul"],
)
def test_any_text_is_a_name(value: str) -> None:
    for one in (named({"x-session-id": f"a{value}b"}), named(prompt_cache_key=value), named(user=value)):
        assert one.key != named().key
        assert one.key.isascii()
        assert len(one.key) == len(named().key)


def test_the_space_around_a_header_is_not_part_of_it() -> None:
    assert named({"session-id": " s "}) == named({"session-id": "s"})


# Agents.


@pytest.mark.parametrize("source", [CLAUDE, "session-id", "metadata.user_id"])
def test_an_agent_is_a_conversation_of_its_own_whoever_names_the_session(source: str) -> None:
    def of(session: str, **agent: str) -> Binding:
        headers = {AGENT: agent["agent"]} if agent else {}
        if source == "metadata.user_id":
            return named(headers, metadata={"user_id": CODE_TEXT.replace(SESSION, session)})
        return named({**headers, source: session})

    found = [of(SESSION), of(SESSION, agent="a1"), of(SESSION, agent="a2"), of(OTHER), of(OTHER, agent="a1")]
    assert len({binding.key for binding in found}) == len(found)
    assert of(SESSION, agent="a1") == found[1]


def test_claude_codes_agents_are_counted_apart() -> None:
    assert named({CLAUDE: SESSION, AGENT: "a1"}).source == "claude agent"


def test_session_and_agent_do_not_run_into_each_other() -> None:
    assert named({CLAUDE: "ab", AGENT: "c"}).key != named({CLAUDE: "a", AGENT: "bc"}).key
    assert named({CLAUDE: "ab"}).key != named({CLAUDE: "a", AGENT: "b"}).key


def test_threads_of_a_codex_session_are_one_conversation() -> None:
    """The backend's cache is asked by the session, so a thread elsewhere would begin without it."""
    main = named({"session-id": "s", "thread-id": "s"}, prompt_cache_key="s")
    helper = named({"session-id": "s", "thread-id": "t", "x-openai-subagent": "review"}, prompt_cache_key="s")
    assert main == helper
    assert named({"thread-id": "t"}).source == "thread-id"


# Whose.


@pytest.mark.parametrize(
    ("headers", "said"), [(headers, said) for _, headers, said in IN_ORDER], ids=[s for s, _, _ in IN_ORDER]
)
def test_two_callers_share_nothing_whatever_they_send(headers: dict[str, str], said: dict[str, Any]) -> None:
    keys = {named(headers, caller, **said).key for caller in ("", "local", "key-a", "key-b")}
    assert len(keys) == 4


def test_no_caller_can_make_itself_out_to_be_another() -> None:
    assert named({"session-id": "b"}, "a").key != named({"session-id": ""}, "ab").key
    assert named({"session-id": "4:nameb"}, "a").key != named({"session-id": "b"}, "a4:name").key
    # Nor can a name be chosen that another conversation's beginning has.
    beginning = begun(user("hello"))
    assert named(prompt_cache_key=beginning.key).key != beginning.key
    assert named(prompt_cache_key="hello").key != beginning.key


def test_a_key_says_nothing_of_what_it_was_made_of() -> None:
    binding = named({"session-id": "secret-session", AGENT: "agent-7"}, "key-0123abcd", user="anna")
    for word in ("secret", "agent-7", "0123abcd", "anna"):
        assert word not in str(binding)


# Beginnings.


def test_the_next_turns_find_the_first() -> None:
    head = [system("be brief"), user("hello")]
    first = begun(*head)
    assert first == Binding(first.key, BEGINNING, is_opening=True)
    assert first.is_guess
    more: list[Item] = []
    for turn in range(3):
        more += [answer(f"answer {turn}"), user(f"and {turn}?")]
        assert begun(*head, *more) == Binding(first.key, BEGINNING)


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(user([{"type": "input_text", "text": "hello"}]), id="parts"),
        pytest.param(
            user([{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]), id="mark"
        ),
        pytest.param(
            user([{"type": "input_text", "text": "hello"}, {"type": "input_text", "text": ""}]), id="empty"
        ),
        pytest.param({**user("hello"), "type": "message", "id": "msg_1", "status": "completed"}, id="item"),
    ],
)
def test_the_form_of_a_message_makes_no_difference(again: Item) -> None:
    assert begun(user("hello")).key == begun(again, answer(), user("and?")).key
    whole = bind("key-a", {}, {}, model="gpt-5.5", items="hello")
    assert whole is not None
    assert whole.key == begun(again).key


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ("It is 9:59 on 2026-11-25.", "It is 10:00 on 2026-11-25."),
        ("Current time: 2026-11-25T23:59:59Z", "Current time: 2026-11-26T00:00:00Z"),
        # The head of a long one does not move with the number of digits before its end.
        ("At 9:59. " + "Rules. " * 100, "At 10:00. " + "Rules. " * 100),
        (
            "You help. " + "Rules. " * 100 + "Found: apples",
            "You help. " + "Rules. " * 100 + "Found: pears and plums",
        ),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_system_prompt_that_is_written_anew_each_turn_makes_no_difference(
    first: str, later: str, apart: bool
) -> None:
    if apart:
        assert (
            begun(user("hello"), instructions=first).key
            == begun(user("hello"), answer(), instructions=later).key
        )
    assert begun(system(first), user("hello")).key == begun(system(later), user("hello"), answer()).key


def test_what_comes_later_makes_no_difference() -> None:
    """Context editing and compaction change what is old, tool loops add; the beginning stands."""
    plain = begun(user("hello"), answer("one"), user("two"))
    for more in (
        [answer("edited"), user("two")],
        [{"type": "reasoning", "encrypted_content": "gAAAA"}, answer("one"), user("two")],
        [{"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}],
        [{"type": "function_call_output", "call_id": "c", "output": "[cleared]"}],
        [{"type": "compaction", "encrypted_content": "sealed"}],
        [system("# Environment of this turn"), answer("one")],
    ):
        assert begun(user("hello"), *more) == plain


@pytest.mark.parametrize(
    "different",
    [
        begun(user("hello there")),
        begun(user(["x"])),
        begun(user("")),
        begun(system("be brief"), user("hello")),
        begun(user("hello"), instructions="be verbose"),
        begun(user("hello"), model="gpt-6-sol"),
        begun(user("hello"), user("hello")),
        begun(user("hell"), user("o")),
        begun(user([{"type": "input_text", "text": "hell"}, {"type": "input_text", "text": "o"}])),
        begun(answer("hello")),
        begun(),
    ],
)
def test_another_beginning_is_another_conversation(different: Binding) -> None:
    assert different.key != begun(user("hello")).key


def test_numbers_in_what_the_user_says_count() -> None:
    assert begun(user("task 1")).key != begun(user("task 2")).key


def test_all_that_the_user_says_before_the_first_answer_is_the_beginning() -> None:
    """An agent's first words are about its folder, and the same for all that it does there."""
    folder = user("<environment_context>/home/anna</environment_context>")
    one = begun(system("base"), folder, user("fix the bug"))
    assert one.key != begun(system("base"), folder, user("write the docs")).key
    assert begun(system("base"), folder, user("fix the bug"), {"type": "reasoning"}) == Binding(
        one.key, BEGINNING
    )


def test_tools_and_controls_say_nothing() -> None:
    tools = {"type": "additional_tools", "role": "developer", "tools": []}
    update = {"type": "configuration_update", "reasoning": {"effort": "high"}}
    assert begun(tools, system("base"), user("hello"), update).key == begun(system("base"), user("hello")).key
    assert begun(user("hello"), update, {"type": "compaction_trigger"}).is_opening


def test_a_greeting_is_no_answer() -> None:
    """Characters speak first; the conversation opens with what the user says to that."""
    opening = begun(system("You are a pirate"), answer("Ahoy!"), user("hello"))
    assert opening.is_opening
    assert opening.key != begun(system("You are a pirate"), user("hello")).key
    later = begun(system("You are a pirate"), answer("Ahoy!"), user("hello"), answer("Arr"), user("?"))
    assert later == Binding(opening.key, BEGINNING)


def test_compacted_history_is_a_beginning() -> None:
    one, other = ({"type": "compaction", "encrypted_content": text} for text in ("sealed", "sealed too"))
    assert begun(one, user("go on")).key != begun(other, user("go on")).key
    assert begun(one, user("go on")).key == begun(one, user("go on"), answer()).key


@pytest.mark.parametrize(
    "data",
    [
        lambda n: {"type": "input_image", "image_url": f"data:image/png;base64,{n}", "detail": "auto"},
        lambda n: {"type": "image_url", "image_url": {"url": f"https://x.test/{n}", "detail": "low"}},
        lambda n: {
            "type": "input_file",
            "file_data": f"data:application/pdf;base64,{n}",
            "filename": "a.pdf",
        },
        lambda n: {"type": "input_audio", "input_audio": {"data": f"{n}", "format": "wav"}},
        lambda n: {"type": "of tomorrow", "hologram": f"{n}"},
    ],
)
def test_pictures_and_files_count(data: Callable[[int], Item]) -> None:
    text = {"type": "input_text", "text": "what is this?"}
    one = begun(user([text, data(1)]))
    assert one.key != begun(user([text, data(2)])).key
    assert one.key != begun(user([text])).key
    assert one.key == begun(user([text, {**data(1), "prompt_cache_breakpoint": {"mode": "explicit"}}])).key


def test_a_user_alone_names_no_conversation() -> None:
    keys = {begun(user(f"question {number}"), user="anna").key for number in range(30)}
    assert len(keys) == 30
    first = begun(user("hello"), user="anna")
    assert first == Binding(first.key, "user", is_opening=True)
    assert begun(user("hello"), answer(), user("more"), user="anna") == Binding(first.key, "user")
    assert first.is_guess
    # It tells those apart who begin alike.
    assert first.key != begun(user("hello"), user="bert").key != begun(user("hello")).key


def test_where_there_is_no_conversation_there_is_no_binding() -> None:
    assert bind("key-a", {}, {"user": "anna"}) is None
    assert bind("key-a", {"session-id": "s"}, {}) == Binding(named({"session-id": "s"}).key, "session-id")


@pytest.mark.parametrize(
    "items",
    [
        None, 5, {}, [None], [[]], ["x"], [{}], [{"role": []}], [{"role": {}, "type": {}}],
        [user(None)], [user(5)], [user([None, 5, [], {}])], [user([{"text": 5, "x": [1], "y": {"z": 1}}])],
        [{"type": ["reasoning"], "encrypted_content": 5}],
    ],
)  # fmt: skip
def test_nothing_that_a_body_holds_is_a_crash(items: Any) -> None:
    odd: tuple[Any, ...] = (None, 5, [], {})
    for instructions in odd:
        binding = bind("key-a", {}, {}, model="m", instructions=instructions, items=items)
        assert (binding is None) == (items is None)


# What goes on from an answer.


def test_what_goes_on_is_known_by_the_chain() -> None:
    assert named({"session-id": "s"}).going_on() == Binding(named({"session-id": "s"}).key, CHAIN)
    opening = Binding("conv_1", BEGINNING, is_opening=True)
    assert opening.going_on() == Binding("conv_1", CHAIN)
    own = Binding("conv_1", BEGINNING, is_opening=True, also="chain-1")
    assert own.going_on() == Binding("chain-1", CHAIN)
    assert not own.going_on().is_guess


# Through the dialects.


CATALOG = Catalog()


def asked(
    dialect: Dialect, body: Item, headers: dict[str, str] | None = None, caller: str = ""
) -> BackendRequest:
    body = {"model": "gpt-5.5", **({"max_tokens": 9} if dialect is MESSAGES else {}), **body}
    return dialect.decode(json.dumps(body).encode(), headers or {}, catalog=CATALOG, caller=caller).request


def turns(dialect: Dialect, number: int) -> Item:
    """Return the body of one turn of a conversation, as callers of the dialect send it."""
    said = [
        user("hello"),
        *itertools.chain.from_iterable((answer(), user(f"more {n}")) for n in range(number)),
    ]
    if dialect is RESPONSES:
        # SDKs send a single text as such.
        return {"instructions": f"It is {number} o'clock.", "input": said if number else "hello"}
    if dialect is MESSAGES:
        return {"system": f"It is {number} o'clock.", "messages": said}
    return {"messages": [system(f"It is {number} o'clock."), *said]}


@pytest.mark.parametrize("dialect", [RESPONSES, CHAT, MESSAGES], ids=["responses", "chat", "messages"])
def test_a_conversation_without_a_name_is_known_in_every_dialect(dialect: Dialect) -> None:
    found = [asked(dialect, turns(dialect, number), caller="key-a") for number in range(3)]
    assert len({one.session for one in found}) == 1
    assert [one.is_opening for one in found] == [True, False, False]
    for one in found:
        assert json.loads(one.body)["prompt_cache_key"] == one.headers["session-id"] == one.session
    assert asked(dialect, turns(dialect, 0), caller="key-b").session != found[0].session


@pytest.mark.parametrize("dialect", [RESPONSES, CHAT, MESSAGES, COMPLETIONS])
@pytest.mark.parametrize("header", [*SESSION_HEADERS, CLAUDE])
def test_a_header_names_the_conversation_in_every_dialect(dialect: Dialect, header: str) -> None:
    body = {"prompt": "x"} if dialect is COMPLETIONS else turns(dialect, 1)
    request = asked(dialect, body, {header: SESSION}, "key-a")
    assert request.session == named({"session-id": SESSION}).key
    # What goes upstream is the caller's own word only where it always was.
    sent = SESSION if header == "session-id" else request.session
    assert request.headers["session-id"] == sent
    assert json.loads(request.body)["prompt_cache_key"] == request.session
    if header != "session-id":
        assert SESSION not in str(request.headers) + request.body.decode()


@pytest.mark.parametrize("dialect", [RESPONSES, CHAT])
def test_a_user_stays_here_and_tells_conversations_apart(dialect: Dialect) -> None:
    anna = asked(dialect, {**turns(dialect, 1), "user": "anna-7"})
    assert anna.binding is not None
    assert anna.binding.source == "user"
    assert anna.session != asked(dialect, {**turns(dialect, 1), "user": "bert"}).session
    assert b"anna-7" not in anna.body
    assert "anna-7" not in str(anna.headers)


def test_a_completion_is_always_an_opening() -> None:
    first = asked(COMPLETIONS, {"prompt": "Once upon a time"})
    assert first.is_opening
    assert first.session != asked(COMPLETIONS, {"prompt": "Once upon a time there was"}).session


def test_a_suffix_of_the_models_name_is_no_other_conversation() -> None:
    high = asked(CHAT, {**turns(CHAT, 0), "model": "gpt-5.5-high"})
    assert high.session == asked(CHAT, turns(CHAT, 1)).session


def test_claude_codes_turns_bind_by_its_session_and_its_agents_apart() -> None:
    found: dict[str, set[str | None]] = {}
    for path in sorted(FIXTURES.glob("claude_code_*.json")):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        headers = {name.lower(): value for name, value in recorded["headers"].items()}
        binding = asked(MESSAGES, recorded["body"], headers, "key-a").binding
        assert binding is not None
        assert binding.source == ("claude agent" if AGENT in headers else "claude session")
        found.setdefault(headers[CLAUDE] + headers.get(AGENT, ""), set()).add(binding.key)
    assert all(len(keys) == 1 for keys in found.values())
    assert len(set.union(*found.values())) == len(found)


def test_without_its_ids_claude_codes_turns_bind_by_how_they_begin() -> None:
    """A relay between may have taken them away; each turn then brings its context in another form."""
    first: Item = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.329.5aa;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            user([{"type": "text", "text": "<system-reminder>"}, {"type": "text", "text": "do it"}]),
            system([{"type": "text", "text": "# Environment", "cache_control": {"type": "ephemeral"}}]),
        ],
    }
    later = json.loads(json.dumps(first))
    later["messages"][1] = system("# Environment")
    later["messages"] += [
        answer([{"type": "tool_use", "id": "t1", "name": "Bash", "input": {}}]),
        user([{"type": "tool_result", "tool_use_id": "t1", "content": "done"}]),
    ]
    later["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1.329.74f;"
    one, two = asked(MESSAGES, first), asked(MESSAGES, later)
    assert one.session == two.session
    assert (one.is_opening, two.is_opening) == (True, False)


# What it costs.


def test_a_long_beginning_is_read_once_and_cheaply() -> None:
    text = "äöü and a picture " * 600_000
    item = user([{"type": "input_text", "text": text}])
    best = min(_seconds(lambda: begun(item)) for _ in range(3))
    # Ten million characters; parsing them takes longer.
    assert best < 0.25
    tracemalloc.start()
    begun(item)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One encoded copy, no rendering beside it.
    assert peak < 2 * len(text.encode())


def test_a_named_conversation_is_not_read() -> None:
    item = user("x" * 10_000_000)
    best = min(
        _seconds(lambda: bind("a", {"session-id": "s"}, {}, model="m", items=[item])) for _ in range(5)
    )
    assert best < 0.001


def test_what_comes_after_the_beginning_is_not_read() -> None:
    items = [user("hello"), *([answer(), user("x" * 1000)] * 50_000)]
    best = min(_seconds(lambda: bind("a", {}, {}, model="m", items=items)) for _ in range(5))
    assert best < 0.001


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started
