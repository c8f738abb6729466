"""A local output limit: the backend takes none, so an answer that grows past it is ended here.

`OutputLimit` watches the events of one answer, counts what the caller can see (text, refusals,
arguments) and, when there is no room left, closes whatever is open the way the backend would
have closed it. Only turns with a limit pay for it: every event is parsed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from codex_proxy.protocol.sse import Batch, Event
from codex_proxy.protocol.wire import JsonObject


@dataclass(slots=True, frozen=True)
class _Kind:
    """How one sort of text travels: the events' common name, its field, the index beside it."""

    name: str
    field: str
    index: str | None = None
    part: str | None = None
    """The type of the content part that holds it."""
    is_visible: bool = True


_KINDS = (
    _Kind("response.output_text", "text", "content_index", "output_text"),
    _Kind("response.refusal", "refusal", "content_index", "refusal"),
    _Kind("response.function_call_arguments", "arguments"),
    _Kind("response.custom_tool_call_input", "input"),
    _Kind("response.reasoning_summary_text", "text", "summary_index", "summary_text", is_visible=False),
    _Kind("response.reasoning_text", "text", "content_index", "reasoning_text", is_visible=False),
)
_DELTAS = {f"{kind.name}.delta": kind for kind in _KINDS}
_DONES = {f"{kind.name}.done": kind for kind in _KINDS}
_BY_PART = {kind.part: kind for kind in _KINDS if kind.part is not None}
_BY_ITEM = {"function_call": _DELTAS["response.function_call_arguments.delta"],
            "custom_tool_call": _DELTAS["response.custom_tool_call_input.delta"]}  # fmt: skip
_PART_EVENTS = {
    "response.content_part.added": "content_index",
    "response.content_part.done": "content_index",
    "response.reasoning_summary_part.added": "summary_index",
    "response.reasoning_summary_part.done": "summary_index",
}
_VISIBLE_ITEMS = frozenset({"message", "function_call", "custom_tool_call"})


@dataclass(slots=True)
class _Piece:
    """One run of text inside an item, as far as the caller has it."""

    kind: _Kind
    index: int
    text: list[str] = field(default_factory=list)
    annotations: list[Any] = field(default_factory=list)
    is_done: bool = False
    """The text's own `done` has gone out."""
    is_closed: bool = False
    """The part's `done` has gone out."""

    def part(self) -> JsonObject:
        part: JsonObject = {"type": self.kind.part, self.kind.field: "".join(self.text)}
        if self.kind.part == "output_text":
            part |= {"annotations": self.annotations, "logprobs": []}
        return part


@dataclass(slots=True)
class _Item:
    """One output item that is still open."""

    item: JsonObject
    is_announced: bool = True
    """Its `added` has gone out, so its texts are closed one by one."""
    pieces: dict[tuple[str, int], _Piece] = field(default_factory=dict)

    def piece(self, kind: _Kind, index: int) -> _Piece:
        return self.pieces.setdefault((kind.name, index), _Piece(kind, index))

    def closed(self) -> JsonObject:
        """Return the item as far as it came, saying that it is not whole."""
        item = {**self.item, "status": "incomplete"}
        pieces = sorted(self.pieces.values(), key=lambda piece: piece.index)
        content = [piece.part() for piece in pieces if piece.kind.index == "content_index"]
        summary = [piece.part() for piece in pieces if piece.kind.index == "summary_index"]
        if content:
            item["content"] = content
        if summary:
            item["summary"] = summary
        for piece in pieces:
            if piece.kind.index is None:
                item[piece.kind.field] = "".join(piece.text)
        return item


class OutputLimit:
    """Count visible output; at the limit, end what is open.

    An answer that ends by itself exactly at the limit is whole: the limit is reached only
    when more would come.
    """

    def __init__(self, limit: int, count: Callable[[str], int]) -> None:
        self._limit = limit
        self._count = count
        self._open: dict[int, _Item] = {}
        self.used = 0
        """Visible tokens that went out."""
        self.is_reached = False

    def take(self, event: Event) -> Batch:
        """Return what goes out for *event*: itself, or its fitting part and all the closings."""
        json = event.json
        index = _int(json.get("output_index"))
        if event.type == "response.output_item.added":
            return self._on_added(event, index)
        if event.type == "response.output_item.done":
            return self._on_done(event, index)
        item = self._open.get(index)
        kind = _DELTAS.get(event.type)
        if kind is not None:
            item = item or self._open.setdefault(index, _Item({"id": json.get("item_id")}))
            return self._on_delta(event, item.piece(kind, _int(json.get(kind.index or ""))))
        if item is None:
            return [event]
        kind = _DONES.get(event.type)
        if kind is not None:
            piece = item.piece(kind, _int(json.get(kind.index or "")))
            if not self._is_whole(piece, json.get(kind.field)):
                return self._end(event)
            piece.is_done = True
        elif event.type in _PART_EVENTS:
            return self._on_part(event, item, _int(json.get(_PART_EVENTS[event.type])))
        elif event.type == "response.output_text.annotation.added":
            text = _DELTAS["response.output_text.delta"]
            item.piece(text, _int(json.get("content_index"))).annotations.append(json.get("annotation"))
        return [event]

    def _on_added(self, event: Event, index: int) -> Batch:
        item = event.json.get("item")
        item = dict(item) if isinstance(item, dict) else {}
        if self.used >= self._limit and _word(item.get("type")) in _VISIBLE_ITEMS:
            return self._end(event)
        self._open[index] = _Item(item)
        return [event]

    def _on_delta(self, event: Event, piece: _Piece) -> Batch:
        delta = event.json.get("delta")
        if not isinstance(delta, str):
            return [event]
        if not piece.kind.is_visible:
            piece.text.append(delta)
            return [event]
        fitting = self._fit(delta)
        if fitting:
            piece.text.append(fitting)
        if len(fitting) == len(delta):
            return [event]
        if not fitting:
            return self._end(event)
        shorter = {**event.json, "delta": fitting}
        if shorter.get("logprobs"):
            shorter["logprobs"] = []
        return [Event.of(shorter), *self._end(event, after=1)]

    def _on_part(self, event: Event, item: _Item, index: int) -> Batch:
        part = event.json.get("part")
        part = part if isinstance(part, dict) else {}
        kind = _BY_PART.get(_word(part.get("type")))
        if kind is None:
            return [event]
        piece = item.piece(kind, index)
        if event.type.endswith(".done"):
            if not self._is_whole(piece, part.get(kind.field)):
                return self._end(event)
            piece.is_closed = True
        return [event]

    def _on_done(self, event: Event, index: int) -> Batch:
        item = event.json.get("item")
        if not isinstance(item, dict):
            return [event]
        # Some backends send an item whole, without a delta before it.
        opened = self._open.setdefault(index, _Item({**item, **_empty(item)}, is_announced=False))
        for piece, text in _texts(opened, item):
            if not self._is_whole(piece, text):
                return self._end(event)
        del self._open[index]
        return [event]

    def _is_whole(self, piece: _Piece, text: Any) -> bool:
        """Take a text that came at once; what came by deltas is counted already."""
        if piece.text or not piece.kind.is_visible or not isinstance(text, str):
            return True
        fitting = self._fit(text)
        piece.text.append(fitting)
        return len(fitting) == len(text)

    def _fit(self, text: str) -> str:
        """Return as much of *text* as there is room for, and count it."""
        if not text:
            return text
        room = self._limit - self.used
        tokens = self._count(text)
        if tokens <= room:
            self.used += tokens
            return text
        low, high = 0, len(text)
        while low < high - 1:
            middle = (low + high) // 2
            if self._count(text[:middle]) <= room:
                low = middle
            else:
                high = middle
        self.used += self._count(text[:low]) if low else 0
        return text[:low]

    def _end(self, event: Event, *, after: int = 0) -> Batch:
        """Close all that is open, in order; numbered from *event* on, which does not go out itself."""
        self.is_reached = True
        events: list[JsonObject] = []
        for index, opened in sorted(self._open.items()):
            for piece in opened.pieces.values() if opened.is_announced else ():
                events.extend(_closings(opened.item, index, piece))
            events.append({
                "type": "response.output_item.done",
                "output_index": index,
                "item": opened.closed(),
            })
        self._open.clear()
        first = _int(event.json.get("sequence_number")) + after
        return [Event.of({**value, "sequence_number": first + i}) for i, value in enumerate(events)]


def _closings(item: JsonObject, output_index: int, piece: _Piece) -> list[JsonObject]:
    kind = piece.kind
    where: JsonObject = {"item_id": item.get("id"), "output_index": output_index}
    if kind.index is not None:
        where[kind.index] = piece.index
    events: list[JsonObject] = []
    if not piece.is_done:
        done: JsonObject = {"type": f"{kind.name}.done", **where, kind.field: "".join(piece.text)}
        if kind.part == "output_text":
            done["logprobs"] = []
        events.append(done)
    if kind.part is not None and not piece.is_closed:
        name = "reasoning_summary_part" if kind.index == "summary_index" else "content_part"
        events.append({"type": f"response.{name}.done", **where, "part": piece.part()})
    return events


def _texts(opened: _Item, item: JsonObject) -> list[tuple[_Piece, Any]]:
    """Return the visible texts of a whole item, each beside the piece that counts it."""
    kind = _BY_ITEM.get(_word(item.get("type")))
    if kind is not None:
        return [(opened.piece(kind, 0), item.get(kind.field))]
    content = item.get("content")
    if item.get("type") != "message" or not isinstance(content, list):
        return []
    texts: list[tuple[_Piece, Any]] = []
    for index, part in enumerate(content):
        part_kind = _BY_PART.get(_word(part.get("type"))) if isinstance(part, dict) else None
        if part_kind is not None:
            texts.append((opened.piece(part_kind, index), part.get(part_kind.field)))
    return texts


def _empty(item: JsonObject) -> JsonObject:
    kind = _BY_ITEM.get(_word(item.get("type")))
    if kind is not None:
        return {kind.field: ""}
    return {"content": []} if item.get("type") == "message" else {}


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
