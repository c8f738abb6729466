"""Calls and their outputs, matched: the backend refuses a conversation in which one lacks the other.

Its rules (observed refusals): every output names a call that stands before it, every call has an
output, an id names one call. Callers break all of them: ids are left out, used again in a
later round, given twice; outputs come late, twice or without their call. Nothing is dropped: an
output that cannot be matched becomes the user's labelled words, a call without one gets a note.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

from codex_proxy.protocol.names import MAX_ID_LENGTH, fit_call_id, fits, shorten
from codex_proxy.protocol.wire import JsonObject

CALLS = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}
OUTPUTS = frozenset(CALLS.values())

NO_OUTPUT = "(no output)"
"""What a call that was never answered gets."""


def repair_calls(items: list[JsonObject], ends: Sequence[int]) -> list[JsonObject]:
    """Return *items* with every call answered once and every output behind its call.

    The items are changed in place. `call_id` may be missing or empty in either: a call gets an id of
    its own, an output belongs to the first unanswered call of the newest round. A reused id
    belongs to the newest call, which gets another name, as an id may stand for one call only.

    Args:
        items: The input of a Responses request.
        ends: For each of the caller's messages how many items there are up to its end: calls of one message
            are one round, in which an id given twice is ambiguous.
    """
    if _in_order(items):
        return items
    rounds: list[int] = []
    for number, end in enumerate(ends):
        rounds += [number] * (end - len(rounds))
    return _Matcher(items, rounds).run()


def _in_order(items: list[JsonObject]) -> bool:
    """Tell whether nothing is to be repaired, as in what most callers send; outputs get the type of their call's.

    Every call has a fitting id of its own, and every output stands behind the one call that it names.
    """
    # What the output of each call is to be; None once there was one.
    calls: dict[str, str | None] = {}
    waiting = 0
    for item in items:
        kind = item.get("type")
        if kind == "message":
            continue
        given: Any = item.get("call_id")
        if kind in CALLS:
            if not isinstance(given, str) or given in calls or not fits(given):
                return False
            calls[given] = CALLS[kind]
            waiting += 1
        elif kind in OUTPUTS:
            answers = calls.get(given) if isinstance(given, str) else None
            if answers is None:
                return False
            item["type"] = answers
            calls[given] = None
            waiting -= 1
    return not waiting


class _Matcher:
    def __init__(self, items: list[JsonObject], rounds: Sequence[int]) -> None:
        self._items = items
        self._rounds = rounds
        calls = [(r, item) for r, item in zip(rounds, items, strict=True) if item.get("type") in CALLS]
        self._taken = {fit_call_id(_id(item)) for _, item in calls if _id(item)}
        """The ids that stand in the request: no made-up one may meet them."""
        counts = Counter((r, _id(item)) for r, item in calls if _id(item))
        self._ambiguous = {key for key, count in counts.items() if count > 1}
        self._used: set[str] = set()
        self._by_id: dict[str, list[tuple[int, JsonObject]]] = {}
        """Unanswered calls by the id that the caller gave them, the newest last, with their round."""
        # Ordered ones, because a dict that was emptied from one end is slow to look into from there.
        self._open: OrderedDict[int, OrderedDict[str, JsonObject]] = OrderedDict()
        """Unanswered calls by round, the newest round last."""
        self._numbers: Counter[str] = Counter()

    def run(self) -> list[JsonObject]:
        out: list[JsonObject] = []
        for index, (number, item) in enumerate(zip(self._rounds, self._items, strict=True)):
            kind = item.get("type")
            if kind in CALLS:
                self._on_call(item, number, index)
            elif kind in OUTPUTS:
                item = self._on_output(item)
            out.append(item)
        return self._answer_all(out)

    def _on_call(self, item: JsonObject, number: int, index: int) -> None:
        given = _id(item)
        fitting = fit_call_id(given) if given else self._fresh(f"call_{index}")
        if fitting in self._used:
            fitting = self._fresh(fitting)
        self._used.add(fitting)
        self._taken.add(fitting)
        item["call_id"] = fitting
        if (number, given) in self._ambiguous:
            # No output of that name can be matched from here on, with an earlier call neither.
            self._by_id.pop(given, None)
        else:
            self._by_id.setdefault(given, []).append((number, item))
            self._open.setdefault(number, OrderedDict())[fitting] = item

    def _on_output(self, item: JsonObject) -> JsonObject:
        given = _id(item)
        found = self._take(given) if given else self._take_next()
        if found is None:
            return as_text(item, given)
        item["call_id"] = found["call_id"]
        item["type"] = CALLS[found["type"]]
        return item

    def _take(self, given: str) -> JsonObject | None:
        calls = self._by_id.get(given)
        while calls:
            number, call = calls.pop()
            if self._close(number, call):
                return call
        return None

    def _take_next(self) -> JsonObject | None:
        number = next(reversed(self._open), None)
        if number is None:
            return None
        call = next(iter(self._open[number].values()))
        self._close(number, call)
        return call

    def _close(self, number: int, call: JsonObject) -> bool:
        """Take a call out of its round; False when it was answered already."""
        calls = self._open.get(number)
        if calls is None:
            return False
        is_open = calls.pop(call["call_id"], None) is not None
        if not calls:
            self._open.pop(number, None)
        return is_open

    def _answer_all(self, items: list[JsonObject]) -> list[JsonObject]:
        answered = {item["call_id"] for item in items if item.get("type") in OUTPUTS}
        out: list[JsonObject] = []
        waiting: list[JsonObject] = []
        for item in items:
            if waiting and item.get("type") not in CALLS and item.get("type") != "reasoning":
                out += waiting
                waiting = []
            out.append(item)
            kind = item.get("type")
            if kind in CALLS and item["call_id"] not in answered:
                waiting.append({"type": CALLS[kind], "call_id": item["call_id"], "output": NO_OUTPUT})
        return out + waiting

    def _fresh(self, base: str) -> str:
        name = base
        while name in self._taken or name in self._used:
            self._numbers[base] += 1
            name = f"{base}_{self._numbers[base] + 1}"
            if len(name) > MAX_ID_LENGTH:
                name = shorten(name, "call")
        return name


def as_text(item: JsonObject, call_id: str) -> JsonObject:
    """Return an output that belongs to no call as words of the user; pictures and files stay what they are."""
    label = f"[output of an unknown tool call{f' {call_id}' if call_id else ''}]"
    output = item.get("output")
    content: list[Any] = [{"type": "input_text", "text": label}]
    if isinstance(output, list):
        content += output
    elif output:
        content[0]["text"] = f"{label}\n{output}"
    return {"type": "message", "role": "user", "content": content}


def _id(item: JsonObject) -> str:
    value = item.get("call_id")
    return value if isinstance(value, str) else ""
