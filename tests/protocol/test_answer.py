"""The reader of answers that all translated dialects share: each thing once, in order, one item at a time."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.errors import BackendFault, ProxyError, UpstreamError, Verdict
from codex_proxy.protocol.answer import (
    BYTES_PER_TOKEN,
    OUTPUT_LIMIT,
    PART_BREAK,
    STOP_SEQUENCE,
    AnswerEncoder,
    OutputRoom,
    Slot,
    StopSequences,
)
from codex_proxy.protocol.dialect import Surroundings
from codex_proxy.protocol.fields import MAX_STOPS
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.sse import Event
from codex_proxy.protocol.wire import JsonObject, Pieces
from codex_proxy.trace import End, UsageSource

Told = tuple[Any, ...]


class Recorder(AnswerEncoder):
    """A dialect that writes down what it is told, and objects to what it may not be told."""

    def __init__(self, limit: int | None = None, stop: tuple[str, ...] = ()) -> None:
        request = BackendRequest("responses", "m", "m", b"", max_output_tokens=limit, input_bytes=40)
        super().__init__(request, Surroundings(lambda: 1_800_000_000.0, "u"), stop=stop)
        self.told: list[Told] = []
        self.open: Slot | None = None
        self.done: set[Slot] = set()
        """Items of which all has been told."""
        self.texts: dict[Slot, list[str]] = {}
        self.end: str | ProxyError | None = None

    def _tell(self, what: str, slot: Slot, *rest: Any) -> None:
        assert self.end is None, "told after the end"
        assert self.told, "told before the start"
        assert self.open in (None, slot), "two items at once"
        assert slot not in self.done, "told after its end"
        self.open = slot
        self.told.append((what, slot, *rest))

    def tell_start(self) -> None:
        assert not self.told
        self.told.append(("start",))

    def tell_text(self, slot: Slot, text: Pieces) -> None:
        assert text
        assert slot.kind == "message"
        self._tell("text", slot, text.text)
        self.texts.setdefault(slot, []).append(text.text)

    def tell_refusal(self, slot: Slot, text: Pieces) -> None:
        assert text
        assert slot.kind == "message"
        self._tell("refusal", slot, text.text)
        self.texts.setdefault(slot, []).append(text.text)

    def tell_annotation(self, slot: Slot, annotation: JsonObject) -> None:
        self._tell("annotation", slot, annotation.get("url"))

    def tell_thought(self, slot: Slot, text: Pieces) -> None:
        assert text
        assert slot.kind == "reasoning"
        self._tell("thought", slot, text.text)
        self.texts.setdefault(slot, []).append(text.text)

    def tell_call(self, slot: Slot) -> None:
        assert slot.name
        assert slot not in self.texts, "a call begins once"
        assert self.open is None
        self._tell("call", slot, slot.name)
        self.texts[slot] = []

    def tell_arguments(self, slot: Slot, text: Pieces) -> None:
        assert text
        assert self.open is slot, "arguments outside their call"
        self._tell("arguments", slot, text.text)
        self.texts[slot].append(text.text)

    def tell_picture(self, slot: Slot, data: str, media: str) -> None:
        self._tell("picture", slot, data)

    def tell_close(self, slot: Slot) -> None:
        self._tell("close", slot)
        self.open = None
        if slot.is_told or slot.is_call:
            self.done.add(slot)

    def end_well(self, reason: str) -> None:
        assert self.end is None
        assert self.told
        assert self.open is None, "ended well with an open item"
        self.end = reason

    def end_badly(self, error: ProxyError) -> None:
        assert self.end is None
        self.end = error

    def contents(self) -> "Counter[Told]":
        """Return every item that was told, whole."""
        items: Counter[Told] = Counter()
        for slot, texts in self.texts.items():
            text = "".join(texts)
            if slot.is_call:
                items["call", slot.name, slot.call_id, text] += 1
            elif text:
                items[slot.kind, text] += 1
        items.update((what, *rest) for what, _, *rest in self.told[1:] if what in ("annotation", "picture"))
        return items


def run(encoder: AnswerEncoder, events: list[JsonObject]) -> None:
    """Feed the events one read each."""
    for number, event in enumerate(events):
        encoder.encode([Event.of({**event, "sequence_number": number})])


# Answers, and the many ways in which a backend may tell them --------------------------------------


@dataclass
class Item:
    """One item of an answer, and the events that tell it."""

    index: int
    kind: str
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Type and text of each part; of a call, its only text."""
    notes: list[str] = field(default_factory=list)
    id: str = ""
    name: str = ""
    final_id: str = ""

    @property
    def call_id(self) -> str:
        return f"call_{self.index}"

    def json(self, identity: str, *, empty: bool = False) -> JsonObject:
        item: JsonObject = {"id": identity, "type": self.kind}
        match self.kind:
            case "message":
                item["role"] = "assistant"
                item["content"] = [] if empty else [self.part(i) for i in range(len(self.parts))]
            case "reasoning":
                item["summary"] = [] if empty else [self.part(i) for i in range(len(self.parts))]
            case "function_call" | "custom_tool_call":
                key = "arguments" if self.kind == "function_call" else "input"
                item |= {"call_id": self.call_id, "name": self.name}
                item[key] = "" if empty else self.parts[0][1]
            case "image_generation_call":
                item |= {"result": None if empty else self.parts[0][1], "output_format": "webp"}
            case _:
                pass
        return item

    def part(self, number: int) -> JsonObject:
        kind, text = self.parts[number]
        part: JsonObject = {"type": kind, "refusal" if kind == "refusal" else "text": text}
        if kind == "output_text":
            part["annotations"] = [self.note(url) for url in self.notes] if number == 0 else []
        return part

    @staticmethod
    def note(url: str) -> JsonObject:
        return {"type": "url_citation", "url": url, "start_index": 0, "end_index": 1}

    def expected(self) -> "Counter[Told]":
        texts = [text for _, text in self.parts]
        match self.kind:
            case "message":
                told: Counter[Told] = Counter({(self.kind, "".join(texts)): 1} if any(texts) else {})
                told.update(("annotation", url) for url in self.notes)
                return told
            case "reasoning":
                text = PART_BREAK.join(text for text in texts if text)
                return Counter({(self.kind, text): 1} if text else {})
            case "function_call" | "custom_tool_call":
                return Counter({("call", self.name, self.call_id, texts[0]): 1})
            case "image_generation_call":
                return Counter({("picture", texts[0]): 1} if texts[0] else {})
            case _:
                return Counter()


WORDS = st.text(alphabet="ab <é🦊\n", max_size=12)
NAMES = {
    "output_text": ("response.output_text", "text", "content_index"),
    "refusal": ("response.refusal", "refusal", "content_index"),
    "summary_text": ("response.reasoning_summary_text", "text", "summary_index"),
    "function_call": ("response.function_call_arguments", "arguments", ""),
    "custom_tool_call": ("response.custom_tool_call_input", "input", ""),
}


@st.composite
def items(draw: st.DrawFn, index: int) -> Item:
    kind = draw(
        st.sampled_from([
            "message",
            "reasoning",
            "function_call",
            "custom_tool_call",
            "image_generation_call",
            "web_search_call",
        ])
    )
    item = Item(index, kind, id=f"item_{index}", final_id=f"item_{index}")
    match kind:
        case "message":
            kinds = draw(st.lists(st.sampled_from(["output_text", "refusal"]), min_size=1, max_size=3))
            item.parts = [(one, draw(WORDS)) for one in kinds]
            if kinds[0] == "output_text":
                item.notes = draw(st.lists(st.sampled_from(["https://a", "https://b"]), max_size=2))
        case "reasoning":
            item.parts = [("summary_text", text) for text in draw(st.lists(WORDS, max_size=3))]
        case "web_search_call":
            pass
        case _:
            item.parts = [(kind, draw(WORDS))]
            item.name = draw(st.sampled_from(["look", "run"]))
    return item


@dataclass
class Telling:
    """How an item is told."""

    item: Item
    events: list[JsonObject]
    is_whole: bool
    """Whether its events say all of it, so that the end need not."""


@st.composite
def tellings(draw: st.DrawFn, item: Item, *, rotates: bool, keeps_index: bool) -> Telling:
    """Draw the events of one item: some are missing, some come twice, some come under another id."""
    if rotates:
        item.final_id = f"{item.id}_final"
    place: JsonObject = {"output_index": item.index} if keeps_index else {}
    where: JsonObject = {"item_id": item.id, **place}
    events: list[JsonObject] = []

    def some(event: JsonObject, *, surely: bool = False) -> bool:
        times = draw(st.sampled_from([1, 1, 1, 2] if surely else [1, 1, 1, 0, 2]))
        events.extend([event] * times)
        return times > 0

    # Neither announced nor in its place, nobody could tell it from another.
    announced = some(
        {"type": "response.output_item.added", **place, "item": item.json(item.id, empty=True)},
        surely=not keeps_index,
    )
    is_whole = announced
    for number, (kind, text) in enumerate(item.parts):
        if kind == "image_generation_call":
            if text and some({
                "type": "response.image_generation_call.partial_image",
                **where,
                "partial_image_b64": text,
                "output_format": "webp",
            }):
                continue
            is_whole = False
            continue
        name, key, index = NAMES[kind]
        at = {**where, **({index: number} if index else {})}
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        said = draw(st.sampled_from([len(pieces), len(pieces), 0, max(len(pieces) - 1, 0)]))
        events += [{"type": f"{name}.delta", **at, "delta": piece} for piece in pieces[:said]]
        whole = some({"type": f"{name}.done", **at, key: text})
        if item.kind == "message":
            if number == 0:
                for url in item.notes:
                    events.append({
                        "type": "response.output_text.annotation.added",
                        **at,
                        "annotation": item.note(url),
                    })
            whole = some({"type": "response.content_part.done", **at, "part": item.part(number)}) or whole
        if not whole and "".join(pieces[:said]) != text:
            # What is left out here cannot be told once what follows has been.
            is_whole = False
            break
    done = some({"type": "response.output_item.done", **place, "item": item.json(item.final_id)})
    return Telling(item, events, is_whole or done)


@dataclass
class Story:
    """A whole answer as events."""

    items: list[Item]
    events: list[JsonObject]


@st.composite
def stories(draw: st.DrawFn, *, ends: tuple[str, ...] = ("completed", "incomplete")) -> Story:
    """Draw an answer: what its events leave out, the end says."""
    rotates = draw(st.booleans())
    keeps_index = rotates or draw(st.booleans())
    answer = [draw(items(index)) for index in range(draw(st.integers(0, 4)))]
    told = [draw(tellings(item, rotates=rotates, keeps_index=keeps_index)) for item in answer]
    queues = [list(one.events) for one in told]
    events: list[JsonObject] = []
    interleaved = draw(st.booleans())
    while any(queues):
        full = [queue for queue in queues if queue]
        queue = full[draw(st.integers(0, len(full) - 1))] if interleaved else full[0]
        events.append(queue.pop(0))
    if draw(st.booleans()):
        response = {"id": "resp_1", "created_at": 7, "service_tier": "default"}
        events = [
            {"type": "response.created", "response": response},
            {"type": "response.in_progress", "response": response},
            *events,
        ]
    for _ in range(draw(st.integers(0, 2))):
        odd: JsonObject = draw(
            st.sampled_from([{"type": "response.of_tomorrow", "output_index": 0}, {"type": "keepalive"}])
        )
        events.insert(draw(st.integers(0, len(events))), odd)
    listed = answer
    if all(one.is_whole for one in told):
        # The end need say nothing, or not all of it.
        listed = [item for item in answer if draw(st.booleans())]
    final = {"id": "resp_1", "output": [item.json(item.final_id) for item in listed]}
    match draw(st.sampled_from(ends)):
        case "completed":
            events.append({"type": "response.completed", "response": final})
        case "incomplete":
            details = {"reason": "content_filter"}
            events.append({
                "type": "response.incomplete",
                "response": {**final, "incomplete_details": details},
            })
        case "failed":
            del events[draw(st.integers(0, len(events))) :]
            error = {"code": "server_error", "message": "x"}
            events.append({"type": "response.failed", "response": {"error": error}})
        case _:
            del events[draw(st.integers(0, len(events))) :]
    return Story(answer, events)


PROPERTY = settings(derandomize=True, deadline=None, max_examples=200, database=None)
LONG = settings(PROPERTY, max_examples=5000)
WHOLE, BROKEN = stories(), stories(ends=("failed", "cut"))
LIMITS = st.none() | st.integers(1, 12)
STOPS = st.lists(st.text(alphabet="ab <é", min_size=1, max_size=4), max_size=3).map(tuple)


@PROPERTY
@given(WHOLE)
def test_everything_is_told_exactly_once_in_one_piece_per_item(story: Story) -> None:
    tells_everything_once(story)


@PROPERTY
@given(BROKEN)
def test_a_broken_answer_ends_once_and_badly(story: Story) -> None:
    ends_badly(story)


@PROPERTY
@given(WHOLE, LIMITS, STOPS)
def test_the_callers_limits_end_an_answer_well(
    story: Story, limit: int | None, stop: tuple[str, ...]
) -> None:
    keeps_limits(story, limit, stop)


@pytest.mark.long
@LONG
@given(WHOLE, BROKEN, LIMITS, STOPS)
def test_thousands_of_answers_are_told_well(
    story: Story, broken: Story, limit: int | None, stop: tuple[str, ...]
) -> None:
    tells_everything_once(story)
    ends_badly(broken)
    keeps_limits(story, limit, stop)


def tells_everything_once(story: Story) -> None:
    out = Recorder()
    run(out, story.events)
    assert out.told[0] == ("start",)
    assert out.end in ("completed", "content_filter")
    assert out.ended in (End.COMPLETED, End.INCOMPLETE)
    expected: Counter[Told] = Counter()
    for item in story.items:
        expected += item.expected()
    assert out.contents() == expected
    assert out.has_calls == any(item.kind in ("function_call", "custom_tool_call") for item in story.items)


def ends_badly(story: Story) -> None:
    out = Recorder()
    run(out, story.events)
    if out.ended is None:
        out.cut(UpstreamError(Verdict.CUT, BackendFault("cut")))
    assert out.ended is End.FAILED
    assert isinstance(out.end, ProxyError)
    said = len(out.told)
    run(out, [{"type": "response.completed", "response": {"id": "late"}}, *story.events])
    assert out.cut(UpstreamError(Verdict.CUT, BackendFault("cut"))) == b""
    assert len(out.told) == said


def keeps_limits(story: Story, limit: int | None, stop: tuple[str, ...]) -> None:
    free, held = Recorder(), Recorder(limit, stop)
    run(free, story.events)
    run(held, story.events)
    assert held.end is not None
    assert not isinstance(held.end, ProxyError)
    if held.ended_early:
        assert held.end in (STOP_SEQUENCE, OUTPUT_LIMIT)
        assert held.usage.source is UsageSource.ESTIMATE
    else:
        assert held.contents() == free.contents()
    if held.end == STOP_SEQUENCE:
        assert held.stop_sequence in stop
    told = {(slot.index, slot.kind): "".join(one) for slot, one in free.texts.items()}
    for slot, one in held.texts.items():
        assert told.get((slot.index, slot.kind), "").startswith("".join(one))
    if limit is not None:
        visible = [text for slot, one in held.texts.items() if slot.kind != "reasoning" for text in one]
        assert len("".join(visible).encode()) <= BYTES_PER_TOKEN * limit


# Stop sequences and the limit ---------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=500, database=None)
@given(
    st.text(alphabet="ab<é", max_size=20),
    st.lists(st.text(alphabet="ab<é", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 20), max_size=4),
)
def test_a_stop_sequence_is_found_however_the_text_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    places = sorted(min(cut, len(text)) for cut in cuts)
    stops = StopSequences(stop)
    shown = ""
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        shown += stops.feed(text[start:end])
        if stops.hit is not None:
            break
        held = text[len(shown) : end]
        # Never more than what may still become a sequence.
        assert not held or any(one.startswith(held) for one in stop)
    # The one that is complete first ends the text.
    ends = [
        (end, end - len(one), one) for end in range(len(text) + 1) for one in stop if text[:end].endswith(one)
    ]
    if ends:
        _, place, found = min(ends)
        assert (stops.hit, shown) == (found, text[:place])
        assert stops.flush() == ""
    else:
        assert stops.hit is None
        assert shown + stops.flush() == text


def test_words_that_nearly_are_a_stop_sequence_cost_no_more_than_others() -> None:
    # The caller chooses the sequences, and what the model is to repeat.
    stops = StopSequences(["a" * 250 + str(number) for number in range(MAX_STOPS)])
    text = ("a" * 249 + "c") * 2000
    started = time.process_time()
    shown = [stops.feed(text[place : place + 100]) for place in range(0, len(text), 100)]
    assert time.process_time() - started < 2
    assert "".join(shown) + stops.flush() == text
    assert stops.hit is None


def test_the_room_is_counted_in_bytes_and_cut_between_characters() -> None:
    room = OutputRoom(2)
    assert room.fit("ab") == "ab"
    assert room.fit("é🦊x") == "é🦊"
    assert room.is_full
    assert room.fit("x") == ""
    room = OutputRoom(1)
    assert room.fit("ab🦊") == "ab"
    assert room.is_full, "what does not fit ends the answer"


# Single stories -----------------------------------------------------------------------------------


def test_thousands_of_interleaved_calls_take_linear_time() -> None:
    numbers = range(10_000)
    calls = [added(n, "function_call", call_id=f"c{n}", name="f") for n in numbers]
    pieces = [delta(n, text, ARGUMENTS) for text in ('{"a":', "1}") for n in numbers]
    ends = [done(n, "function_call", call_id=f"c{n}", name="f", arguments='{"a":1}') for n in numbers]
    out = Recorder()
    started = time.process_time()
    run(out, [*calls, *pieces, *reversed(ends), completed(*(end["item"] for end in ends))])
    assert time.process_time() - started < 4
    assert out.contents() == Counter({("call", "f", f"c{n}", '{"a":1}'): 1 for n in numbers})


def added(index: int, kind: str, identity: str | None = None, **fields: Any) -> JsonObject:
    item = {"id": identity or f"i{index}", "type": kind, **fields}
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def done(index: int, kind: str, identity: str | None = None, **fields: Any) -> JsonObject:
    return {**added(index, kind, identity, **fields), "type": "response.output_item.done"}


def delta(index: int, text: str, name: str = "output_text", identity: str | None = None) -> JsonObject:
    where = {"item_id": identity or f"i{index}", "output_index": index, "content_index": 0}
    return {"type": f"response.{name}.delta", **where, "delta": text}


def completed(*output: JsonObject, kind: str = "completed", **fields: Any) -> JsonObject:
    return {"type": f"response.{kind}", "response": {"id": "r", "output": list(output), **fields}}


def content(text: str) -> list[JsonObject]:
    return [{"type": "output_text", "text": text}]


def told(out: Recorder) -> list[Told]:
    """Return what was told, with the kind of the item in place of its slot."""
    return [(what, *(one.kind if isinstance(one, Slot) else one for one in rest)) for what, *rest in out.told]


ARGUMENTS = "function_call_arguments"


def test_what_comes_during_a_call_waits_for_its_end() -> None:
    out = Recorder()
    run(
        out,
        [
            added(0, "function_call", call_id="c", name="look"),
            delta(0, "{", ARGUMENTS),
            added(1, "message"),
            delta(1, "seen"),
            delta(0, "}", ARGUMENTS),
        ],
    )
    assert told(out)[1:] == [
        ("call", "function_call", "look"),
        ("arguments", "function_call", "{"),
        ("arguments", "function_call", "}"),
    ]
    run(out, [done(0, "function_call", call_id="c", name="look", arguments="{}")])
    assert told(out)[4:] == [("close", "function_call"), ("text", "message", "seen")]
    run(out, [completed()])
    assert told(out)[6:] == [("close", "message")]
    assert out.end == "completed"


def test_thousands_of_calls_may_wait_for_one() -> None:
    out = Recorder()
    number = 2000
    run(out, [added(0, "function_call", call_id="c0", name="first")])
    for index in range(1, number):
        run(out, [done(index, "function_call", call_id=f"c{index}", name="look", arguments="{}")])
    assert len(out.told) == 2
    run(out, [completed()])
    assert [name for what, *rest in out.told if what == "call" for name in rest[1:]] == [
        "first",
        *["look"] * (number - 1),
    ]


def test_a_call_whose_name_comes_late_holds_nothing_up() -> None:
    out = Recorder()
    call = {"call_id": "c", "name": "look", "arguments": "{}"}
    run(out, [added(0, "function_call"), delta(0, "{}", ARGUMENTS), delta(1, "text", identity="m")])
    assert told(out)[1:] == [("text", "message", "text")]
    run(out, [done(0, "function_call", **call)])
    assert told(out)[2:] == [
        ("close", "message"),
        ("call", "function_call", "look"),
        ("arguments", "function_call", "{}"),
        ("close", "function_call"),
    ]


def test_a_name_may_come_with_the_end_of_the_answer_or_never() -> None:
    for output in (
        [{"type": "function_call", "id": "i0", "call_id": "c", "name": "look", "arguments": "{}"}],
        [],
    ):
        out = Recorder()
        run(out, [added(0, "function_call"), done(0, "function_call", arguments="{}"), completed(*output)])
        assert out.has_calls is bool(output)
        assert [what for what, *_ in out.told] == (
            ["start", "call", "arguments", "close"] if output else ["start"]
        )


def test_two_items_that_claim_one_place_are_told_both() -> None:
    out = Recorder()
    run(
        out,
        [
            added(0, "reasoning", "rs", summary=[]),
            delta(0, "first", identity="m1"),
            done(0, "message", "m1", content=content("first")),
            done(0, "message", "m2", content=content("second")),
            completed(),
        ],
    )
    assert told(out)[1:] == [
        ("text", "message", "first"),
        ("close", "message"),
        ("text", "message", "second"),
        ("close", "message"),
    ]


def test_an_end_that_renames_items_and_leaves_some_out_repeats_nothing() -> None:
    out = Recorder()
    final = {"type": "message", "id": "renamed", "content": content("hello")}
    summary = [{"type": "summary_text", "text": "hm"}]
    run(
        out,
        [
            done(0, "reasoning", summary=summary),
            added(1, "message"),
            delta(1, "hello"),
            done(1, "message", "renamed_too", content=content("hello")),
            completed(final),
        ],
    )
    assert out.contents() == {("message", "hello"): 1, ("reasoning", "hm"): 1}


def test_an_item_that_only_the_end_knows_is_told_beside_renamed_ones() -> None:
    out = Recorder()
    one = {"type": "message", "id": "x", "content": content("one")}
    two = {"type": "message", "id": "y", "content": content("two")}
    run(out, [added(1, "message"), delta(1, "two"), completed(one, two)])
    assert out.contents() == {("message", "one"): 1, ("message", "two"): 1}


def test_a_repetition_that_contradicts_what_was_told_is_not_believed() -> None:
    out = Recorder()
    run(out, [delta(0, "hello"), done(0, "message", content=content("goodbye")), completed()])
    assert out.contents() == {("message", "hello"): 1}


def test_raw_reasoning_is_told_unless_there_is_a_summary() -> None:
    raw = [{"type": "reasoning_text", "text": "raw"}]
    for summary, said in (([], "raw"), ([{"type": "summary_text", "text": "short"}], "short")):
        out = Recorder()
        run(out, [done(0, "reasoning", summary=summary, content=raw), completed()])
        assert out.contents() == {("reasoning", said): 1}
    out = Recorder()
    run(out, [delta(0, "raw", "reasoning_text"), done(0, "reasoning", summary=[], content=raw), completed()])
    assert out.contents() == {("reasoning", "raw"): 1}


def test_held_back_words_that_meet_the_limit_close_their_item_first() -> None:
    out = Recorder(limit=1, stop=("<stop>",))
    run(out, [delta(0, "abc<st"), added(1, "function_call", call_id="c", name="look")])
    assert told(out)[1:] == [("text", "message", "abc"), ("text", "message", "<"), ("close", "message")]
    assert out.end == OUTPUT_LIMIT
    assert out.ended is End.INCOMPLETE
    assert out.ended_early


def test_held_back_words_come_before_a_refusal() -> None:
    out = Recorder(stop=("<stop>",))
    run(out, [delta(0, "a<"), delta(0, "no", "refusal"), completed()])
    assert [text for what, *rest in out.told if what in ("text", "refusal") for text in rest[1:]] == [
        "a",
        "<",
        "no",
    ]


def test_a_call_for_which_there_is_no_room_is_not_begun() -> None:
    out = Recorder(limit=1)
    run(out, [delta(0, "four"), added(1, "function_call", call_id="c", name="look")])
    assert out.end == OUTPUT_LIMIT
    assert not out.has_calls


def test_the_usage_is_the_backends_or_an_estimate() -> None:
    out = Recorder()
    run(out, [delta(0, "12345678"), completed()])
    usage = out.estimate()
    assert (usage.input_tokens, usage.output_tokens, usage.source) == (10, 2, UsageSource.ESTIMATE)
    out = Recorder()
    run(out, [delta(0, "x"), completed(usage={"input_tokens": 7, "output_tokens": 3})])
    usage = out.estimate()
    assert (usage.input_tokens, usage.output_tokens, usage.source) == (7, 3, UsageSource.BACKEND)


def test_an_answer_knows_its_id_its_time_and_its_tier() -> None:
    out = Recorder()
    run(
        out,
        [
            {
                "type": "response.created",
                "response": {"id": "resp_7", "created_at": 5.5, "service_tier": "auto"},
            }
        ],
    )
    assert (out.response_id, out.created, out.service_tier) == ("resp_7", 5, "auto")
    run(out, [completed(service_tier="priority")])
    assert out.service_tier == "priority"
    out = Recorder()
    run(out, [delta(0, "x")])
    assert (out.response_id, out.created, out.service_tier) == ("resp_u", 1_800_000_000, None)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "x"}}},
        {"type": "error", "error": {"type": "server_error", "message": "x"}},
        {"error": {"message": "x"}},
    ],
)
def test_every_shape_of_a_failure_ends_the_answer(event: JsonObject) -> None:
    out = Recorder()
    run(out, [delta(0, "x"), event])
    assert out.end is out.failure is not None
    assert out.open is not None, "what was open is not closed as if it were whole"


def test_an_end_that_cannot_be_read_is_none() -> None:
    out = Recorder()
    out.encode([Event("response.completed", b'{"type":"response.completed",')])
    assert out.ended is None


def test_odd_events_are_passed_over() -> None:
    out = Recorder()
    odd: Iterator[Any] = iter([
        None,
        5,
        [],
        {},
        "x",
        {"type": 5},
        {"type": "message", "content": [5, {"type": 7}]},
    ])
    for item in odd:
        for index in (None, "x", True, -1):
            run(
                out,
                [
                    {"type": "response.output_item.added", "item": item, "output_index": index},
                    {"type": "response.output_item.done", "item": item, "output_index": index},
                    {
                        "type": "response.output_text.delta",
                        "delta": item,
                        "output_index": index,
                        "item_id": item,
                    },
                    {"type": "response.output_text.done", "text": 5, "content_index": item},
                    {"type": "response.content_part.done", "part": item},
                    {"type": "response.output_text.annotation.added", "annotation": item},
                ],
            )
    run(out, [{"type": "response.completed", "response": {"output": [None, 5], "usage": 5}}])
    assert out.end == "completed"


def test_an_end_that_renames_its_items_and_leaves_some_out_tells_no_word_again() -> None:
    out = Recorder()
    run(
        out,
        [
            added(0, "message"),
            added(1, "message"),
            added(2, "message"),
            delta(2, "once"),
            # In the place of another one, under a name that nobody has heard.
            completed(
                {"id": "x", "type": "web_search_call"},
                {"id": "y", "type": "message", "content": content("once")},
            ),
        ],
    )
    assert [one for one in told(out) if one[0] == "text"] == [("text", "message", "once")]
    assert out.end == "completed"


def test_a_picture_under_another_name_at_the_end_is_no_second_one() -> None:
    out = Recorder()
    partial = {"type": "response.image_generation_call.partial_image", "partial_image_b64": "aGk="}
    run(
        out,
        [
            added(0, "web_search_call"),
            added(1, "image_generation_call"),
            {**partial, "output_index": 1, "item_id": "i1", "partial_image_b64": "Zmlyc3Q="},
            added(2, "image_generation_call"),
            {**partial, "output_index": 2, "item_id": "i2"},
            completed({"id": "x", "type": "image_generation_call", "result": "aGk="}),
        ],
    )
    assert [one[2] for one in told(out) if one[0] == "picture"] == ["Zmlyc3Q=", "aGk="]
