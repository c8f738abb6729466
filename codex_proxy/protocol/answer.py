"""One answer of the backend, followed event by event: what the encoders of translated dialects share.

The backend tells most things several times (a delta, the whole text when it is done, the whole part,
the whole item, and all items at the end), and any of them may be missing. `AnswerEncoder` tells a
dialect each thing once, in order, one item at a time, and always closes what it has opened.

An item is followed in a `Slot`. A call holds its place until it is done, because its arguments
must arrive in one piece; what comes for other items meanwhile waits. Text and reasoning give way
to whatever comes next. A call whose name is not known yet waits without holding anything.

Limits of the caller's that the backend does not take are kept here: stop sequences in visible
text, and the number of output tokens.

Deltas that came in a row are told at once, in their own pieces and spelling; a dialect copies those.
"""

import hashlib
import heapq
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import msgspec

from codex_proxy.errors import ProxyError, UpstreamError
from codex_proxy.protocol.dialect import Surroundings
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import failure_of, read_usage
from codex_proxy.protocol.sse import Batch, Event, Run
from codex_proxy.protocol.wire import JsonObject, Pieces
from codex_proxy.trace import End, Usage, UsageSource

BYTES_PER_TOKEN = 4
"""The rule of thumb by which output limits and estimates are kept: UTF-8 bytes a token."""

PART_BREAK = "\n\n"
"""What stands between two parts of one item's reasoning."""

STOP_SEQUENCE = "stop_sequence"
OUTPUT_LIMIT = "max_output_tokens"

CALL_KINDS = {"function_call": "arguments", "custom_tool_call": "input"}
"""The items that are calls, and where each has what it is called with."""

Act = Callable[..., None]


class _Sort(NamedTuple):
    """One sort of text, and where the events have what they say of it."""

    kind: str
    """The type of the item that it is in."""
    key: str
    """Its name among the item's texts."""
    field: str
    """What is all of it, when it is done."""
    part: str
    """The number of its part; empty when there is only one."""
    act: str
    """What is done with it."""


_SORTS = {
    "response.output_text": _Sort("message", "text", "text", "content_index", "_say"),
    "response.refusal": _Sort("message", "refusal", "refusal", "content_index", "_refuse"),
    "response.reasoning_summary_text": _Sort("reasoning", "summary", "text", "summary_index", "_think"),
    "response.reasoning_text": _Sort("reasoning", "thought", "text", "content_index", "_think"),
    "response.function_call_arguments": _Sort("function_call", "arguments", "arguments", "", "_argue"),
    "response.custom_tool_call_input": _Sort("custom_tool_call", "input", "input", "", "_argue"),
}
_DELTAS = {f"{name}.delta": sort for name, sort in _SORTS.items()}
_DONES = {f"{name}.done": sort for name, sort in _SORTS.items()}


class _Essence(msgspec.Struct, gc=False):
    """What of a response object makes an answer; the rest repeats the request, and may be large."""

    id: Any = None
    created_at: Any = None
    service_tier: Any = None
    output: Any = None
    usage: Any = None
    incomplete_details: Any = None

    @classmethod
    def of(cls, event: Event) -> "_Essence | None":
        """Read the response object in *event*; None when the event cannot be read."""
        try:
            return _read_essence(event.data).response
        except (ValueError, RecursionError):
            # Odd, or broken.
            response = event.json.get("response")
            if not isinstance(response, dict):
                return cls() if event.json else None
            return cls(**{name: response[name] for name in cls.__struct_fields__ if name in response})


class _WithEssence(msgspec.Struct, gc=False):
    response: _Essence


_read_essence = msgspec.json.Decoder(_WithEssence).decode


class StopSequences:
    """Finds the first stop sequence in a text that comes in pieces.

    The longest end of the text that could still become a sequence is held back, never more. All
    sequences are looked for at once (the automaton of Aho and Corasick), so that the time depends on nothing but
    the text: the caller chooses the sequences, and can have the model write what nearly is one, again and again.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        # A node stands for a beginning of some sequences; 0 is the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._hit: list[str | None] = [None]
        """The longest sequence that is complete at a node."""
        for sequence in sequences:
            node = 0
            for char in sequence:
                node = self._next[node].get(char) or self._grow(node, char)
            self._hit[node] = sequence
        self._fallback = [0] * len(self._next)
        """For each node the longest end of it that is another one."""
        self._connect()
        self._first = re.compile("|".join(map(re.escape, self._next[0])))
        self._node = 0
        self._held = ""
        self.hit: str | None = None
        """The sequence that was found."""

    def _grow(self, node: int, char: str) -> int:
        self._next[node][char] = new = len(self._next)
        self._next.append({})
        self._depth.append(self._depth[node] + 1)
        self._hit.append(None)
        return new

    def _connect(self) -> None:
        """Find the fallbacks, from the short beginnings to the long ones."""
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            shorter = self._fallback[node]
            self._hit[node] = self._hit[node] or self._hit[shorter]
            for char, child in self._next[node].items():
                self._fallback[child] = self._follow(shorter, char)
                waiting.append(child)

    def _follow(self, node: int, char: str) -> int:
        """Return the node for the longest end, of what *node* stands for and *char*, that there is one for."""
        while node and char not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(char, 0)

    def feed(self, text: str) -> str:
        """Return what may go out of the text so far; all before the sequence once one is found."""
        place = len(self._held)
        text = self._held + text
        node = self._node
        while place < len(text):
            if not node:
                start = self._first.search(text, place)
                if start is None:
                    break
                place = start.start()
            node = self._follow(node, text[place])
            place += 1
            # The one that is complete first, so that it does not matter how the text was cut.
            hit = self._hit[node]
            if hit is not None:
                self.hit = hit
                self.flush()
                return text[: place - len(hit)]
        self._node = node
        end = len(text) - self._depth[node]
        self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return what was held back: no sequence came of it."""
        held, self._held, self._node = self._held, "", 0
        return held


class OutputRoom:
    """How much visible output still fits, by the rule of thumb."""

    def __init__(self, tokens: int) -> None:
        self._bytes = tokens * BYTES_PER_TOKEN

    @property
    def is_full(self) -> bool:
        return self._bytes <= 0

    def fit(self, text: str) -> str:
        """Return as much of *text* as there is room for, in whole characters, and count it."""
        size = len(text.encode("utf-8", "surrogatepass"))
        if size <= self._bytes:
            self._bytes -= size
            return text
        fitting: list[str] = []
        for char in text:
            self._bytes -= len(char.encode("utf-8", "surrogatepass"))
            if self._bytes < 0:
                break
            fitting.append(char)
        self._bytes = 0
        return "".join(fitting)


@dataclass(slots=True, eq=False)
class Slot:
    """One item of the answer, as far as it has come."""

    index: int
    """Its `output_index`; by arrival when the backend gives none."""
    kind: str
    """The item's type."""
    arrival: int
    """How many items came before it."""
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    """The tool's name, as the backend says it."""
    item: JsonObject = field(default_factory=dict)
    """The item as it was said last: when it was added, at the end when it is done."""
    is_told: bool = False
    """All of it has come; more is only repetition."""
    is_open: bool = False
    """The dialect has been told of it, and not yet of its end."""
    is_closed: bool = False
    """The dialect has been told of its end."""
    waiting: list[tuple[Act, tuple[Any, ...]]] = field(default_factory=list)
    """What came while another item held the place."""
    pieces: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """The texts so far, to tell what is new in a repetition."""
    halves: dict[tuple[str, int], str] = field(default_factory=dict)
    """The first half of a character whose second half is still to come, for each text."""
    thought: tuple[str, int] | None = None
    """The part of the reasoning that was told last."""
    picture: bytes = b""
    """The digest of the last picture."""

    @property
    def is_call(self) -> bool:
        return self.kind in CALL_KINDS


class AnswerEncoder:
    """Follow one answer; a dialect overrides the methods named `tell_*` and `end_*`.

    Those append to `out` what goes to the caller. They are called in this order: `tell_start`
    once; per item, one at a time, what it is made of, then `tell_close`; at last one of
    `end_well` and `end_badly`. A text or reasoning item that was left before its end may come back
    after another one: then it is told, and closed, again.

    Args:
        request: What was asked.
        around: Time, ids.
        stop: Texts at which the visible answer ends.
        collect: Whether `whole` will be asked for; else nothing needs to be remembered.
    """

    def __init__(
        self,
        request: BackendRequest,
        around: Surroundings,
        *,
        stop: Sequence[str] = (),
        collect: bool = False,
    ) -> None:
        self.usage = Usage()
        self.ended: End | None = None
        self.failure: UpstreamError | None = None
        self.ended_early = False
        self.delivered = 0
        self.request = request
        self.around = around
        self.collect = collect
        self.out: list[bytes] = []
        """What goes to the caller for this read."""
        self.response_id = f"resp_{around.unique}"
        """The backend's id of the answer; our own when it gave none."""
        self.created = 0
        """When the answer began, seconds since the epoch."""
        self.service_tier: str | None = None
        self.stop_sequence: str | None = None
        """The stop sequence that ended the answer."""
        self.has_calls = False
        """Whether a call has been told."""
        self.counts_writes = False
        """Whether the backend counts what it writes into its cache: else it has not said that it is nothing."""
        self._started = False
        self._stops = StopSequences(stop) if stop else None
        self._room = OutputRoom(request.max_output_tokens) if request.max_output_tokens is not None else None
        self._slots: list[Slot] = []
        self._by_index: dict[int, Slot] = {}
        self._by_id: dict[str, Slot] = {}
        self._current: Slot | None = None
        self._waiting: list[int] = []
        """A heap of the slots that wait for their turn, by their arrival."""
        self._is_catching_up = False
        self._place: JsonObject | None = None
        """What the last run said of its place, when no other item can be meant by it; with what follows from it."""
        self._at: tuple[Slot, tuple[str, int], list[str], Act] | None = None

    # -- for the dialect -------------------------------------------------------------------

    def tell_start(self) -> None:
        """Begin the answer; `response_id` and `created` are known."""

    def tell_text(self, slot: Slot, text: Pieces) -> None:
        """Add visible text."""

    def tell_refusal(self, slot: Slot, text: Pieces) -> None:
        """Add words of a refusal."""

    def tell_annotation(self, slot: Slot, annotation: JsonObject) -> None:
        """Add a note (a citation) to the text."""

    def tell_thought(self, slot: Slot, text: Pieces) -> None:
        """Add words of the reasoning; parts are already separated."""

    def tell_call(self, slot: Slot) -> None:
        """Begin a call: its name is known, and its id as far as it ever will be."""

    def tell_arguments(self, slot: Slot, text: Pieces) -> None:
        """Add to the arguments of the call."""

    def tell_picture(self, slot: Slot, data: str, media: str) -> None:
        """Add a picture: base64, and its format (`png`)."""

    def tell_close(self, slot: Slot) -> None:
        """End an item; `slot.is_told` says whether `slot.item` is all of it, or it was only left."""

    def end_well(self, reason: str) -> None:
        """End the answer.

        Args:
            reason: `completed`, the backend's reason for an incomplete answer, `stop_sequence` or
                `max_output_tokens`.
        """
        raise NotImplementedError

    def end_badly(self, error: ProxyError) -> None:
        """End the answer with an error, which never looks like a finished one."""
        raise NotImplementedError

    def whole(self) -> bytes:
        """Return the collected answer as JSON."""
        raise NotImplementedError

    def keepalive(self) -> bytes:
        """Return a sign of life."""
        raise NotImplementedError

    # -- what the sinks use ----------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the caller has its end."""
        return self.ended is not None

    def encode(self, batch: Batch) -> bytes:
        """Return the caller's bytes for *batch*."""
        handlers = self._handlers
        for event in batch:
            if self.ended is not None:
                break
            if isinstance(event, Run):
                self._on_run(event)
                continue
            handler = handlers.get(event.type)
            if handler is not None:
                handler(self, event)
            elif not event.type.startswith("response.") or event.type == "response.failed":
                self._on_foreign(event)
        return self._take_out()

    def cut(self, error: ProxyError) -> bytes:
        """Return the end for *error*; empty when the answer has already ended."""
        if self.ended is None:
            self._fail(error)
        return self._take_out()

    def estimate(self) -> Usage:
        """Return the usage, estimated unless the backend said it."""
        if self.usage.source is not UsageSource.BACKEND:
            self.usage = Usage(
                input_tokens=math.ceil(self.request.input_bytes / BYTES_PER_TOKEN),
                output_tokens=math.ceil(self.delivered / BYTES_PER_TOKEN),
                source=UsageSource.ESTIMATE,
            )
        return self.usage

    def _take_out(self) -> bytes:
        out, self.out = self.out, []
        return b"".join(out)

    # -- events: the answer ----------------------------------------------------------------

    def _on_progress(self, event: Event) -> None:
        if not self._started:
            self._start(_Essence.of(event) or _Essence())

    def _start(self, response: _Essence) -> None:
        self._started = True
        identity, created = response.id, response.created_at
        if isinstance(identity, str) and identity:
            self.response_id = identity
        if not isinstance(created, int) and not (isinstance(created, float) and math.isfinite(created)):
            created = self.around.now()
        self.created = int(created)
        self._read_tier(response)
        self.tell_start()

    def _read_tier(self, response: _Essence) -> None:
        tier = response.service_tier
        if isinstance(tier, str):
            self.service_tier = tier

    def _on_end(self, event: Event) -> None:
        response = _Essence.of(event)
        if response is None:
            # Broken on its way: an end that nobody can read is none.
            return
        if not self._started:
            self._start(response)
        self._read_tier(response)
        usage = response.usage
        details = usage.get("input_tokens_details") if isinstance(usage, dict) else None
        self.counts_writes = isinstance(details, dict) and "cache_write_tokens" in details
        self._tell_rest(response.output)
        if self.ended is not None:
            return
        if isinstance(usage, dict):
            self.usage = read_usage(usage)
        reason = "completed"
        if event.type == "response.incomplete":
            details = response.incomplete_details
            reason = _word(details.get("reason") if isinstance(details, dict) else None) or "incomplete"
        self.ended = End.COMPLETED if event.type == "response.completed" else End.INCOMPLETE
        self.end_well(reason)

    def _on_foreign(self, event: Event) -> None:
        failure = failure_of(event, now=self.around.now())
        if failure is None:
            return
        self.failure = failure
        response = event.json.get("response")
        if isinstance(response, dict) and isinstance(response.get("usage"), dict):
            self.usage = read_usage(response["usage"])
        self._fail(failure)

    def _fail(self, error: ProxyError) -> None:
        # Set first: what is left open stays open in front of an error, whatever is held back stays back.
        self.ended = End.FAILED
        self.end_badly(error)

    def _end_here(self, reason: str) -> None:
        """End the answer at a limit of the caller's."""
        if self._stops is not None:
            # What was held back comes after the end.
            self._stops.flush()
        self._leave()
        self.ended_early = True
        self.ended = End.COMPLETED if reason == STOP_SEQUENCE else End.INCOMPLETE
        self.estimate()
        self.end_well(reason)

    # -- events: items ---------------------------------------------------------------------

    def _on_added(self, event: Event) -> None:
        item = event.json.get("item")
        if isinstance(item, dict):
            self._slot_of_item(item, event.json.get("output_index"))

    def _on_done(self, event: Event) -> None:
        item = event.json.get("item")
        if isinstance(item, dict):
            self._tell_item(self._slot_of_item(item, event.json.get("output_index")), item)

    def _tell_item(self, slot: Slot, item: JsonObject) -> None:
        """Tell what is new in a whole item, and its end."""
        if slot.is_told and not (slot.is_call and slot.name is None):
            return
        if not item.get("encrypted_content") and slot.item.get("encrypted_content"):
            # Its end leaves out what its beginning said.
            item = {**item, "encrypted_content": slot.item["encrypted_content"]}
        slot.item = item
        self._learn(slot, item)
        match slot.kind:
            case "message":
                for index, part in enumerate(_objects(item.get("content"))):
                    self._tell_part(slot, index, part)
            case "reasoning":
                self._tell_reasoning(slot, item)
            case "function_call" | "custom_tool_call":
                key = CALL_KINDS[slot.kind]
                self._tell_whole(slot, (key, 0), item.get(key), self._argue)
            case "image_generation_call":
                result = item.get("result")
                if isinstance(result, str) and result:
                    self._do(slot, self._show, result, _word(item.get("output_format")) or "png")
            case _:
                pass
        slot.is_told = True
        self._do(slot, self._close)

    def _tell_part(self, slot: Slot, index: int, part: JsonObject) -> None:
        match part.get("type"):
            case "output_text":
                self._tell_whole(slot, ("text", index), part.get("text"), self._say)
                told = len(slot.pieces.setdefault(("annotations", index), []))
                for annotation in _objects(part.get("annotations"))[told:]:
                    self._annotate(slot, index, annotation)
            case "refusal":
                self._tell_whole(slot, ("refusal", index), part.get("refusal"), self._refuse)
            case _:
                pass

    def _tell_reasoning(self, slot: Slot, item: JsonObject) -> None:
        summary = item.get("summary")
        for index, part in enumerate(_objects(summary)):
            self._tell_whole(slot, ("summary", index), part.get("text"), self._think)
        if isinstance(summary, str):
            self._tell_whole(slot, ("summary", 0), summary, self._think)
        if any(key == "summary" and parts for (key, _), parts in slot.pieces.items()):
            return
        for index, part in enumerate(_objects(item.get("content"))):
            self._tell_whole(slot, ("thought", index), part.get("text"), self._think)

    def _tell_whole(self, slot: Slot, key: tuple[str, int], text: Any, act: Act) -> None:
        """Tell what a repetition adds to the deltas; where it contradicts them, they stand."""
        if not isinstance(text, str) or not text:
            return
        parts = slot.pieces.setdefault(key, [])
        seen = "".join(parts)
        if len(text) > len(seen) and text.startswith(seen):
            parts[:] = [text]
            self._do(slot, act, key, Pieces.of(text[len(seen) :]))

    def _tell_rest(self, said: Any) -> None:
        """Tell what only the terminal event says, and end every item in order."""
        output = _objects(said)
        for item, slot in zip(output, self._slots_of(output), strict=True):
            self._tell_item(slot if slot is not None else self._slot_of_item(item, None), item)
        for slot in self._slots:
            if not slot.is_told:
                # What was begun and never ended is told as far as it came.
                self._do(slot, self._close)
        self._leave()

    # -- events: pieces --------------------------------------------------------------------

    def _on_delta(self, event: Event) -> None:
        json = event.json
        delta = json.get("delta")
        if not isinstance(delta, str) or not delta:
            return
        sort = _DELTAS[event.type]
        slot = self._slot(json, sort.kind)
        if slot.is_told:
            return
        place = (sort.key, _number(json.get(sort.part)))
        if slot.halves:
            delta = _join_halves(slot.halves.pop(place, "") + delta)
        if "\ud800" <= delta[-1] <= "\udbff":
            # No caller can read half a character; should the other half never come, the repetition has it.
            slot.halves[place] = delta[-1]
            delta = delta[:-1]
            if not delta:
                return
        slot.pieces.setdefault(place, []).append(delta)
        self._do(slot, getattr(self, sort.act), place, Pieces.of(delta))

    def _on_run(self, run: Run) -> None:
        """Take deltas in a row as what they are together: one text, in pieces."""
        pieces = run.pieces
        if not all(pieces.spelled):
            self._on_each(run)
            return
        if run.place is not self._place or self._at is None:
            self._at = self._find(run)
        slot, place, told, act = self._at
        if slot.is_told:
            return
        if slot.halves:
            self._on_each(run)
            return
        told.append(pieces.text)
        self._do(slot, act, place, pieces)

    def _on_each(self, run: Run) -> None:
        for event in run.events():
            if self.ended is None:
                self._on_delta(event)

    def _find(self, run: Run) -> tuple[Slot, tuple[str, int], list[str], Act]:
        sort = _DELTAS[run.type]
        slot = self._slot(run.place, sort.kind)
        # What has no id of its own is found by what else there is, and that changes.
        is_sure = self._by_id.get(run.place.get("item_id", "")) is slot
        self._place = run.place if is_sure else None
        place = (sort.key, _number(run.place.get(sort.part)))
        return slot, place, slot.pieces.setdefault(place, []), getattr(self, sort.act)

    def _on_text_done(self, event: Event) -> None:
        sort = _DONES[event.type]
        slot = self._slot(event.json, sort.kind)
        if not slot.is_told:
            self._learn(slot, event.json)
            place = (sort.key, _number(event.json.get(sort.part)))
            self._tell_whole(slot, place, event.json.get(sort.field), getattr(self, sort.act))

    def _on_part_done(self, event: Event) -> None:
        part = event.json.get("part")
        if isinstance(part, dict) and part.get("type") in ("output_text", "refusal"):
            slot = self._slot(event.json, "message")
            if not slot.is_told:
                self._tell_part(slot, _number(event.json.get("content_index")), part)

    def _on_annotation(self, event: Event) -> None:
        annotation = event.json.get("annotation")
        slot = self._slot(event.json, "message")
        if isinstance(annotation, dict) and not slot.is_told:
            self._annotate(slot, _number(event.json.get("content_index")), annotation)

    def _annotate(self, slot: Slot, index: int, annotation: JsonObject) -> None:
        slot.pieces.setdefault(("annotations", index), []).append("")
        # Its place is said within its part, and told within its item.
        before = sum(
            len(piece)
            for (key, part), pieces in slot.pieces.items()
            if key == "text" and part < index
            for piece in pieces
        )
        places = {
            key: annotation[key] + before
            for key in ("start_index", "end_index")
            if isinstance(annotation.get(key), int)
        }
        self._do(slot, self._note, {**annotation, **places} if before else annotation)

    def _on_picture(self, event: Event) -> None:
        data = event.json.get("partial_image_b64")
        if isinstance(data, str) and data:
            slot = self._slot(event.json, "image_generation_call")
            self._do(slot, self._show, data, _word(event.json.get("output_format")) or "png")

    # -- slots -----------------------------------------------------------------------------

    def _slot(self, json: JsonObject, kind: str) -> Slot:
        """Return the slot that an event of a piece is about: by id, by place, else the newest of its kind."""
        identity = json.get("item_id")
        slot = self._by_id.get(identity) if isinstance(identity, str) else None
        if slot is None and isinstance(json.get("call_id"), str):
            slot = self._by_id.get(json["call_id"])
        if slot is None or slot.kind != kind:
            # An item of another kind is not meant: the piece would end up in the midst of it.
            index = json.get("output_index")
            slot = self._by_index.get(index) if isinstance(index, int) else None
            if slot is not None and slot.kind != kind:
                # Two items claim one place.
                slot = None
            if slot is None and not isinstance(index, int):
                slot = next((s for s in reversed(self._slots) if s.kind == kind and not s.is_told), None)
            if slot is None:
                slot = self._new_slot({"type": kind, "id": identity}, index)
        return slot

    def _slot_of_item(self, item: JsonObject, index: Any) -> Slot:
        slot = self._known(item)
        if slot is None and isinstance(index, int):
            slot = self._by_index.get(index)
            # Some backends give an item another id at its end. Two items may also claim one place.
            if slot is not None and (slot.is_told or slot.kind != item.get("type")):
                slot = None
        if slot is None:
            return self._new_slot(item, index)
        self._learn(slot, item)
        return slot

    def _slots_of(self, output: list[JsonObject]) -> list[Slot | None]:
        """Return for each item of the whole answer its slot; None for one that nobody has heard of.

        Some backends give items other ids at the end: then it is the one that has said the same, or the
        one in its place, or the next of its kind as long as there are enough of them.
        """
        slots = [self._known(item) for item in output]
        if None not in slots:
            return slots
        kinds = [_word(item.get("type")) for item in output]
        self._match_words(output, kinds, slots)
        known = set(slots)
        free = sorted((slot for slot in self._slots if slot not in known), key=lambda slot: slot.index)
        missing = Counter(kind for kind, slot in zip(kinds, slots, strict=True) if slot is None)
        for place, kind in enumerate(kinds):
            if slots[place] is not None:
                continue
            alike = [slot for slot in free if slot.kind == kind]
            slot = next((slot for slot in alike if slot.index == place), None)
            if slot is None and len(alike) >= missing[kind]:
                slot = alike[0]
            missing[kind] -= 1
            if slot is not None:
                free.remove(slot)
                slots[place] = slot
        return slots

    def _match_words(self, output: list[JsonObject], kinds: list[str], slots: list[Slot | None]) -> None:
        """Find the slots of items that say what one of their kind has said, in place."""
        known = set(slots)
        said: dict[tuple[str, tuple[str, ...]], list[Slot]] = {}
        for slot in reversed(self._slots):
            if slot not in known:
                said.setdefault((slot.kind, _words_told(slot)), []).append(slot)
        for place, item in enumerate(output):
            words = _words_of(item)
            if slots[place] is None and words:
                alike = said.get((kinds[place], words))
                if alike:
                    slots[place] = alike.pop()

    def _known(self, item: JsonObject) -> Slot | None:
        for key in ("id", "call_id"):
            value = item.get(key)
            if isinstance(value, str) and value in self._by_id:
                return self._by_id[value]
        return None

    def _new_slot(self, item: JsonObject, index: Any) -> Slot:
        if not self._started:
            self._start(_Essence())
        place = index if isinstance(index, int) and not isinstance(index, bool) else len(self._slots)
        slot = Slot(place, _word(item.get("type")) or "unknown", len(self._slots), item=item)
        self._slots.append(slot)
        self._by_index[place] = slot
        self._learn(slot, item)
        return slot

    def _learn(self, slot: Slot, source: JsonObject) -> None:
        """Take in who the item is; a call begins when its name is known."""
        for key in ("id", "item_id", "call_id"):
            known = source.get(key)
            if not isinstance(known, str) or not known:
                continue
            if key == "call_id":
                slot.call_id = slot.call_id or known
            else:
                slot.id = slot.id or known
            # Also another id that it gets later: its end may be told twice.
            self._by_id.setdefault(known, slot)
        name = source.get("name")
        if slot.is_call and slot.name is None and isinstance(name, str) and name:
            slot.name = name
            waiting, slot.waiting = slot.waiting, []
            self._do(slot, self._begin_call)
            for act, args in waiting:
                self._do(slot, act, *args)

    # -- one at a time ---------------------------------------------------------------------

    def _do(self, slot: Slot, act: Act, *args: Any) -> None:
        """Let *act* happen to *slot* now, or when its turn has come."""
        if self.ended is not None:
            return
        current = self._current
        if slot is not current:
            if slot.is_call and slot.name is None:
                if act != self._close:
                    slot.waiting.append((act, args))
                return
            if current is not None and current.is_call:
                if not slot.waiting:
                    heapq.heappush(self._waiting, slot.arrival)
                slot.waiting.append((act, args))
                return
            self._leave()
            if self.finished:
                # What was held back met a limit.
                return
            self._current = slot
        act(slot, *args)

    def _leave(self) -> None:
        """Close what is open, so that another item can be told."""
        slot = self._current
        if slot is None:
            return
        # What was held back may meet a limit, and then the end of the answer closes the slot.
        self._flush(slot)
        self._current = None
        if self.ended is None and slot.is_open:
            slot.is_open = False
            self.tell_close(slot)

    def _close(self, slot: Slot) -> None:
        """End *slot*, and let those that waited have their turn."""
        if not slot.is_closed and self.ended is None:
            slot.is_closed = True
            if slot.is_told:
                # Also one that came with nothing to tell: its end may have something.
                slot.is_open = True
            self._leave()
        if self._is_catching_up:
            # One loop, however many wait for each other.
            return
        self._is_catching_up = True
        while (other := self._next_waiting()) is not None:
            waiting, other.waiting = other.waiting, []
            for act, args in waiting:
                self._do(other, act, *args)
        self._is_catching_up = False

    def _next_waiting(self) -> Slot | None:
        if self.ended is not None or (self._current is not None and self._current.is_call):
            return None
        return self._slots[heapq.heappop(self._waiting)] if self._waiting else None

    def _flush(self, slot: Slot) -> None:
        if self._stops is not None:
            held = self._stops.flush()
            if held:
                self._tell_fitting(slot, self.tell_text, Pieces.of(held))

    # -- acts ------------------------------------------------------------------------------

    def _say(self, slot: Slot, _place: tuple[str, int], pieces: Pieces) -> None:
        stops = self._stops
        if stops is None:
            self._tell_fitting(slot, self.tell_text, pieces)
            return
        for text in pieces.texts:
            text = stops.feed(text)
            if text:
                self._tell_fitting(slot, self.tell_text, Pieces.of(text))
            if self.ended is not None:
                return
            if stops.hit is not None:
                self.stop_sequence = stops.hit
                self._end_here(STOP_SEQUENCE)
                return

    def _refuse(self, slot: Slot, _place: tuple[str, int], pieces: Pieces) -> None:
        # The words before it come first, also those that were held back.
        self._flush(slot)
        if self.ended is None:
            self._tell_fitting(slot, self.tell_refusal, pieces)

    def _note(self, slot: Slot, annotation: JsonObject) -> None:
        slot.is_open = True
        self.tell_annotation(slot, annotation)

    def _think(self, slot: Slot, place: tuple[str, int], pieces: Pieces) -> None:
        if slot.thought is not None and slot.thought != place:
            pieces = pieces.after(PART_BREAK)
        slot.thought = place
        slot.is_open = True
        self.delivered += _size(pieces.text)
        self.tell_thought(slot, pieces)

    def _begin_call(self, slot: Slot) -> None:
        if self._room is not None and self._room.is_full:
            self._end_here(OUTPUT_LIMIT)
            return
        slot.is_open = True
        self.has_calls = True
        self.tell_call(slot)

    def _argue(self, slot: Slot, _place: tuple[str, int], pieces: Pieces) -> None:
        self._tell_fitting(slot, self.tell_arguments, pieces)

    def _show(self, slot: Slot, data: str, media: str) -> None:
        digest = _digest(data)
        if digest != slot.picture:
            # The last of the partial ones is often the final one again.
            slot.picture = digest
            slot.is_open = True
            self.tell_picture(slot, data, media)

    def _tell_fitting(self, slot: Slot, tell: Callable[[Slot, Pieces], None], pieces: Pieces) -> None:
        """Tell as much as there is room for, and count it; end the answer if that is not all."""
        fitting, text = pieces, pieces.text
        if self._room is not None:
            length = len(self._room.fit(text))
            if length < len(text):
                fitting = pieces.part(0, length)
                text = fitting.text
        if text:
            slot.is_open = True
            self.delivered += len(text) if text.isascii() else _size(text)
            tell(slot, fitting)
        if fitting is not pieces and self.ended is None:
            self._end_here(OUTPUT_LIMIT)

    # -- what happens at which event ---------------------------------------------------------

    _handlers: ClassVar[Mapping[str, Callable[["AnswerEncoder", Event], None]]] = {
        "response.created": _on_progress,
        "response.queued": _on_progress,
        "response.in_progress": _on_progress,
        "response.output_item.added": _on_added,
        "response.output_item.done": _on_done,
        **dict.fromkeys(_DELTAS, _on_delta),
        **dict.fromkeys(_DONES, _on_text_done),
        "response.content_part.done": _on_part_done,
        "response.output_text.annotation.added": _on_annotation,
        "response.image_generation_call.partial_image": _on_picture,
        "response.completed": _on_end,
        "response.incomplete": _on_end,
    }


def _size(text: str) -> int:
    """Return the length in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def _join_halves(text: str) -> str:
    """Return *text* with the halves of characters that meet in it put together."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _digest(data: str) -> bytes:
    return hashlib.sha256(data.encode("utf-8", "surrogatepass")).digest()


def _words_told(slot: Slot) -> tuple[str, ...]:
    """Return all that was said of an item, part by part; in which order does not matter."""
    texts = ["".join(parts) for (key, _), parts in slot.pieces.items() if key != "annotations"]
    return tuple(sorted(filter(None, [*texts, slot.picture.hex()])))


def _words_of(item: JsonObject) -> tuple[str, ...]:
    """Return the same of a whole item."""
    texts = [item.get("arguments"), item.get("input")]
    for key in ("content", "summary"):
        texts += [part.get("text") or part.get("refusal") for part in _objects(item.get(key))]
    picture = item.get("result")
    if item.get("type") == "image_generation_call" and isinstance(picture, str) and picture:
        texts.append(_digest(picture).hex())
    return tuple(sorted(text for text in texts if isinstance(text, str) and text))


def _objects(value: Any) -> list[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
