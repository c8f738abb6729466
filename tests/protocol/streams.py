"""Streams of a backend that says anything: every kind of text, in every spelling, whole or cut, in any order."""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import JsonObject, dumps

Manner = Callable[[JsonObject], bytes]


@dataclass(frozen=True)
class Kind:
    """One kind of text: the item that it is in, and how its events are called."""

    item: str
    name: str
    field: str
    part: str | None = None


KINDS = (
    Kind("message", "response.output_text", "text", "content_index"),
    Kind("message", "response.refusal", "refusal", "content_index"),
    Kind("reasoning", "response.reasoning_summary_text", "text", "summary_index"),
    Kind("reasoning", "response.reasoning_text", "text", "content_index"),
    Kind("function_call", "response.function_call_arguments", "arguments"),
    Kind("custom_tool_call", "response.custom_tool_call_input", "input"),
)


# How a frame is written ---------------------------------------------------------------------


def own(event: JsonObject) -> bytes:
    """Write as the backend does: names in order, the type before them."""
    return frame(event["type"], dumps(_ordered(event)))


def _ordered(event: JsonObject) -> JsonObject:
    return {"type": event["type"], **dict(sorted((k, v) for k, v in event.items() if k != "type"))}


def _json(event: JsonObject, **how: Any) -> bytes:
    return json.dumps(_ordered(event), **{"separators": (",", ":"), "ensure_ascii": False, **how}).encode(
        "utf-8", "surrogatepass"
    )


def _changed(**fields: Any) -> Manner:
    return lambda event: own({**event, **fields})


def _without(name: str) -> Manner:
    return lambda event: own({key: value for key, value in event.items() if key != name})


def _replaced(old: bytes, new: bytes) -> Manner:
    return lambda event: own(event).replace(old, new)


MANNERS: Mapping[str, Manner] = {
    "in escapes": lambda event: frame(event["type"], _json(event, ensure_ascii=True)),
    "with spaces": lambda event: frame(event["type"], _json(event, separators=(", ", ": "))),
    "in other order": lambda event: frame(event["type"], dumps(dict(reversed(_ordered(event).items())))),
    "as it was put together": lambda event: frame(event["type"], dumps(event)),
    "with slashes": _replaced(b"/", rb"\/"),
    "with an unknown field": _changed(novelty={"delta": "x"}),
    "with logprobs": _changed(logprobs=[{"token": "x", "delta": "y"}]),
    "without padding": _without("obfuscation"),
    "without an id": _without("item_id"),
    "without a place": _without("output_index"),
    "without a number": _without("sequence_number"),
    "without logprobs": _without("logprobs"),
    "with another id": _changed(item_id="other"),
    "with an odd id": _changed(item_id='a"b\\'),
    "with an empty id": _changed(item_id=""),
    "in another place": _changed(output_index=7),
    "with an odd place": _changed(output_index="0"),
    "in a far place": _changed(output_index=10**12),
    "below all numbers": _changed(sequence_number=-1),
    "with a fraction": _changed(sequence_number=1.5),
    "with no text": _changed(delta=""),
    "with null": _changed(delta=None),
    "with odd padding": _changed(obfuscation='a"b'),
    "with a zero too many": _replaced(b'"sequence_number":', b'"sequence_number":0'),
    "with an endless number": _replaced(b'"sequence_number":', b'"sequence_number":' + b"9" * 400),
    "with a zero before its place": _replaced(b'"output_index":', b'"output_index":0'),
    "breaking off in its padding": lambda event: re.sub(
        rb'"obfuscation":"[^}]*\}', b'"obfuscation":"7}', own(event)
    ),
    "with a name twice": _replaced(b'"output_index":', b'"output_index":3,"output_index":'),
    "with a type twice": _replaced(b'"sequence_number":', b'"type":"other","sequence_number":'),
    "with a number twice": _replaced(b'"sequence_number":', b'"sequence_number":3,"sequence_number":'),
    "with a text twice": _replaced(b'"delta":', b'"delta":"first","delta":'),
    "with an id twice": _replaced(b'"item_id":', b'"item_id":"first","item_id":'),
    "with half a character": _replaced(b'"delta":"', rb'"delta":"\ud83d'),
    "with the other half": _replaced(b'"delta":"', rb'"delta":"\udd8a'),
    "with ending in a half": _replaced(b'","item_id"', rb'\ud83d","item_id"'),
    "in no UTF-8": _replaced(b'"delta":"', b'"delta":"\xff\xe9'),
    "with a raw tab": _replaced(b'"delta":"', b'"delta":"\t'),
    "with a wrong escape": _replaced(b'"delta":"', rb'"delta":"\x'),
    "with a comma too many": _replaced(b"}\n\n", b",}\n\n"),
    "with words behind": _replaced(b"}\n\n", b"} \n\n"),
    "cut off": _replaced(b"}\n\n", b"\n\n"),
    "in CRLF": lambda event: own(event).replace(b"\n", b"\r\n"),
    "in CR": lambda event: own(event).replace(b"\n", b"\r"),
    "with a stray CR": _replaced(b'"delta":"', b'"delta":"\r'),
    "ending in CR": _replaced(b"}\n\n", b"}\r\n\n"),
    "nameless": lambda event: own(event).partition(b"\n")[2],
    "under another name": lambda event: b"event: other\n" + own(event).partition(b"\n")[2],
    "close": _replaced(b"\ndata: ", b"\ndata:"),
    "in two lines": _replaced(b',"delta"', b'\ndata: ,"delta"'),
    "without its blank line": lambda event: own(event)[:-1],
    "with too many blank lines": lambda event: own(event) + b"\n\n",
    "with other lines": lambda event: b"id: 7\nretry: 9\n" + own(event),
    "behind a comment": lambda event: b": a comment\n\n" + own(event),
    "behind its comment": lambda event: b": a comment\n" + own(event),
    "twice": lambda event: own(event) * 2,
}
NOISE = (
    b": keep-alive\n\n",
    b"\n",
    b"data: [DONE]\n\n",
    b'data: {"type":"keepalive"}\n\n',
    b'event: codex.rate_limits\ndata: {"type":"codex.rate_limits","rate_limits":{}}\n\n',
    b'event: response.of_tomorrow\ndata: {"type":"response.of_tomorrow","delta":"?"}\n\n',
    b"event: response.output_text.delta\n",
    b"data: nothing that anybody could read\n\n",
    b"\r",
)


# What is said -------------------------------------------------------------------------------

TEXTS = (
    st.sampled_from((
        " word", "Hello", "{", '{"a', '":', ' 1}', " ", "\n", "\n\n", "\t", '"', "\\", '\\"', "\\n", "/", "</s>", "",
        "é", "🦊", "\u2028", "\x7f", "\x00", "\x1b[0m", "\r\n", '"delta":"', '","item_id":"', "stop", "STO", "P",
        "word" * 40,
    ))
    | st.text(max_size=6)
    | st.text(alphabet='ab"\\\n\x01é🦊{} ', max_size=8)
)  # fmt: skip


@st.composite
def streams(draw: st.DrawFn, odd: int = 2) -> list[bytes]:
    """Draw the frames of a stream; *odd* of ten steps are said in another manner than the backend's own."""
    # Mostly one text in a row: that is what a backend says.
    chosen = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    items = [(kind, f"item_{place}", place) for place, kind in enumerate(chosen)]
    frames: list[bytes] = []
    said: dict[tuple[str, int], str] = {}
    # What an agent sends is long, and is repeated to it.
    words = 'Say "yes"/"no".\nNo more. é🦊' * (draw(st.sampled_from((1, 1, 400))))

    def say(event: JsonObject, manner: Manner = own) -> None:
        frames.append(manner({**event, "sequence_number": len(frames)}))

    def manner() -> Manner:
        if draw(st.integers(0, 9)) >= odd:
            return own
        return MANNERS[draw(st.sampled_from(sorted(MANNERS)))]

    if draw(st.integers(0, 9)):
        say({"type": "response.created", "response": _response("in_progress", words)}, manner())
        say({"type": "response.in_progress", "response": _response("in_progress", words)})
    for kind, identity, place in items:
        if draw(st.integers(0, 4)):
            item = {**_item(kind, identity, place, ""), "status": "in_progress"}
            say({"type": "response.output_item.added", "item": item, "output_index": place}, manner())
    for _ in range(draw(st.integers(1, 8))):
        kind, identity, place = draw(st.sampled_from(items))
        part = draw(st.sampled_from((0, 0, 0, 1)))
        where: JsonObject = {"item_id": identity, "output_index": place}
        if kind.part is not None:
            where[kind.part] = part
        match draw(st.sampled_from(("deltas", "deltas", "deltas", "text", "part", "item", "note", "noise"))):
            case "deltas":
                padding = draw(st.sampled_from(("x7", "", "abcDEF0123456789")))
                for text in draw(st.lists(TEXTS, min_size=1, max_size=6)):
                    said[identity, part] = said.get((identity, part), "") + text
                    event = {"type": f"{kind.name}.delta", "delta": text, **where, "obfuscation": padding}
                    if kind.name == "response.output_text":
                        event["logprobs"] = []
                    say(event, manner())
            case "text":
                whole = _whole(draw, said.get((identity, part), ""))
                say({"type": f"{kind.name}.done", kind.field: whole, **where}, manner())
            case "part" if kind.item == "message":
                told = _part(kind, _whole(draw, said.get((identity, part), "")))
                say({"type": "response.content_part.done", "part": told, **where}, manner())
            case "item":
                item = _item(kind, identity, place, _whole(draw, said.get((identity, 0), "")))
                say({"type": "response.output_item.done", "item": item, "output_index": place}, manner())
            case "note" if kind.name == "response.output_text":
                note = {"type": "url_citation", "url": "https://a.example", "start_index": 1, "end_index": 2}
                say({"type": "response.output_text.annotation.added", "annotation": note, **where}, manner())
            case _:
                frames.append(draw(st.sampled_from(NOISE)))
    output = [_item(kind, identity, place, said.get((identity, 0), "")) for kind, identity, place in items]
    match draw(st.sampled_from(("completed", "completed", "completed", "incomplete", "failed", "error", ""))):
        case "completed" | "incomplete" as status:
            response = _response(status, words) | {"output": output if draw(st.booleans()) else []}
            if draw(st.booleans()):
                response["usage"] = {
                    "input_tokens": 9,
                    "input_tokens_details": {"cached_tokens": 3},
                    "output_tokens": 5,
                    "total_tokens": 14,
                }
            if status == "incomplete":
                response["incomplete_details"] = {"reason": "max_output_tokens"}
            say({"type": f"response.{status}", "response": response}, manner())
        case "failed":
            error = {"code": "server_is_overloaded", "message": "later"}
            say({"type": "response.failed", "response": _response("failed", words) | {"error": error}})
        case "error":
            say({"type": "error", "error": {"type": "server_error", "message": "no"}})
        case _:
            pass
    return frames


def _response(status: str, words: str) -> JsonObject:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1_800_000_000,
        "status": status,
        "instructions": words,
        "model": "gpt-5.5",
        "output": [],
        "safety_identifier": "user-1",
        "service_tier": "auto",
        "temperature": 1.0,
        "tools": [],
        "usage": None,
        "user": None,
    }


def _item(kind: Kind, identity: str, place: int, text: str) -> JsonObject:
    item: JsonObject = {"id": identity, "type": kind.item, "status": "completed"}
    match kind.item:
        case "message":
            item |= {"content": [_part(kind, text)] if text else [], "role": "assistant"}
        case "reasoning":
            item |= {
                "summary": [{"type": "summary_text", "text": text}] if text else [],
                "encrypted_content": "s",
            }
        case _:
            item |= {"call_id": f"call_{place}", "name": "look", kind.field: text}
    return item


def _part(kind: Kind, text: str) -> JsonObject:
    part: JsonObject = {"type": kind.name.removeprefix("response."), kind.field: text}
    return part | {"annotations": [], "logprobs": []} if kind.field == "text" else part


def _whole(draw: st.DrawFn, said: str) -> str:
    """Return what a repetition says: mostly the same, sometimes more, less or something else."""
    return draw(st.sampled_from((said, said, said, said + " and more", said[:-1], "else")))


@st.composite
def reads(draw: st.DrawFn, frames: list[bytes]) -> list[bytes]:
    """Draw how the network cuts a stream."""
    data = b"".join(frames)
    match draw(st.sampled_from(("whole", "frames", "size", "places", "near"))):
        case "whole":
            return [data]
        case "frames":
            return frames
        case "size":
            size = max(draw(st.integers(1, 700)), len(data) // 300)
            return [data[start : start + size] for start in range(0, len(data), size)]
        case "places":
            places = draw(st.lists(st.integers(0, len(data)), max_size=8))
        case _:
            # At the ends of frames, give or take a byte.
            ends = [0]
            for one in frames:
                ends.append(ends[-1] + len(one))
            near = st.builds(
                lambda end, off: min(max(end + off, 0), len(data)), st.sampled_from(ends), st.integers(-2, 2)
            )
            places = draw(st.lists(near, max_size=8))
    edges = [0, *sorted(places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]
