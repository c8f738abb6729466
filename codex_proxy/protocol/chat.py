"""The Chat Completions dialect, outwards: the backend's events become chunks, or one completion.

A stream is what OpenAI's is: `data:` lines only, the role once in the first chunk, one id for all, the reason
in a chunk of its own, the usage in a last one when it was asked for, and `[DONE]` after success only.
What Chat has no place for comes beside, under the names that other servers and clients use:

| of the answer                     | where it is told                                                    |
|-----------------------------------|---------------------------------------------------------------------|
| reasoning                         | `reasoning_content`                                                 |
| its sealed form                   | `reasoning_details`; sent back, the model goes on from its thoughts |
| a picture                         | `images`                                                            |
| a custom tool's call              | type `custom` if the tool was declared so, else a function's call   |

Entries of lists carry an `index` in a stream: readers that put deltas together go by it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from codex_proxy.errors import ProxyError
from codex_proxy.protocol import chat_request
from codex_proxy.protocol.answer import OUTPUT_LIMIT, PART_BREAK, STOP_SEQUENCE, AnswerEncoder, Slot
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat_request import Ask
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.responses import render_error, stream_error
from codex_proxy.protocol.wire import JsonObject, Pieces, dumps
from codex_proxy.trace import Usage

__all__ = ["CHAT", "ChatEncoder", "decode", "render_error"]

_KEEPALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"

SEALED = "reasoning.encrypted"
SEAL_FORMAT = "openai-responses-v1"
"""The name under which readers of `reasoning_details` know the backend's seal."""

FINISH = {
    OUTPUT_LIMIT: "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
}
"""The ends that are told whatever was called: the last call may be cut off. Any other that is not good is `stop`."""

_GOOD = frozenset({"completed", STOP_SEQUENCE})
_MEDIA = frozenset({"png", "jpeg", "webp", "gif"})


def decode(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Decoded:
    """Decode the body of `POST /v1/chat/completions`; *headers* have lower-case names.

    Raises:
        RequestError: With the path of the field that cannot be served.
    """
    ask = chat_request.read(raw, headers, catalog=catalog, caller=caller)
    return Decoded(ask.request, functools.partial(ChatEncoder, ask))


@dataclass(slots=True)
class _Call:
    """A call as it was told."""

    id: str
    name: str
    form: str
    """Its type: "function" or "custom"."""
    key: str
    """Where in that form its input stands."""
    is_legacy: bool
    """Whether it is told as `function_call`."""
    pieces: list[str] = field(default_factory=list)

    @property
    def whole(self) -> JsonObject:
        inner = {"name": self.name, self.key: "".join(self.pieces)}
        return inner if self.is_legacy else {"id": self.id, "type": self.form, self.form: inner}


class ChatEncoder(AnswerEncoder):
    """Turn the backend's events into `chat.completion.chunk` frames, or collect one `chat.completion`.

    The unchanging part of every chunk is rendered once, and the text of a delta is copied as it is spelled.
    """

    def __init__(self, ask: Ask, around: Surroundings) -> None:
        super().__init__(ask.request, around, stop=ask.stop, collect=not ask.request.stream)
        self._ask = ask
        self._head = b""
        """Every chunk up to its delta."""
        self._tail = b""
        """What follows the delta of every chunk but the last ones."""
        self._around: dict[bytes, tuple[bytes, bytes, bytes]] = {}
        """What stands before the pieces of a text, between and behind them, by the name of its field."""
        self._around_input = (b"", b"", b"")
        """The same for what the current call is called with."""
        self._calls: list[_Call] = []
        self._texts: dict[bytes, list[str]] = {}
        """What is collected, by the name of its field."""
        self._lists: dict[str, list[JsonObject]] = {}
        self._counts = {"annotations": 0, "images": 0, "reasoning_details": 0}
        self._pictures: dict[Slot, JsonObject] = {}
        self._length = 0
        self._beginnings: dict[Slot, int] = {}
        """Where in the visible text an item begins: its notes count from there, the caller from the start."""
        self._thinking: Slot | None = None
        self._finish = ""

    # -- what the answer is made of ----------------------------------------------------------

    def tell_start(self) -> None:
        """Open the stream: the role, once."""
        self._head = self._envelope() + b',"choices":[{"index":0,"delta":'
        self._tail = b',"logprobs":null,"finish_reason":null}]' + self._closing()
        self._send(b'{"role":"assistant","content":""}')

    def tell_text(self, slot: Slot, text: Pieces) -> None:
        """Add visible text."""
        self._beginnings.setdefault(slot, self._length)
        self._length += len(text.text)
        self._write(b"content", text)

    def tell_refusal(self, slot: Slot, text: Pieces) -> None:
        """Add words of a refusal."""
        self._write(b"refusal", text)

    def tell_thought(self, slot: Slot, text: Pieces) -> None:
        """Add words of the reasoning; thoughts are set apart as the parts of one are."""
        if self._thinking is not None and self._thinking is not slot:
            text = text.after(PART_BREAK)
        self._thinking = slot
        self._write(b"reasoning_content", text)

    def tell_annotation(self, slot: Slot, annotation: JsonObject) -> None:
        """Add a note, with its place in the whole text."""
        note = {key: value for key, value in annotation.items() if key != "type"}
        beginning = self._beginnings.setdefault(slot, self._length)
        for key in ("start_index", "end_index"):
            if isinstance(note.get(key), int):
                note[key] += beginning
        kind = str(annotation.get("type", "url_citation"))
        self._add("annotations", {"type": kind, kind: note})

    def tell_picture(self, slot: Slot, data: str, media: str) -> None:
        """Add a picture; a stream shows the unfinished ones too, a collected answer the last of each item."""
        kind = media if media in _MEDIA else "png"
        picture = {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
        if self.collect:
            self._pictures[slot] = picture
        else:
            self._add("images", picture)

    def tell_close(self, slot: Slot) -> None:
        """Give away the seal of a thought that is complete."""
        sealed = slot.item.get("encrypted_content")
        if slot.kind == "reasoning" and slot.is_told and isinstance(sealed, str) and sealed:
            identity = {} if slot.id is None else {"id": slot.id}
            self._add(
                "reasoning_details", {"type": SEALED, "data": sealed, **identity, "format": SEAL_FORMAT}
            )

    def tell_call(self, slot: Slot) -> None:
        """Begin a call, under the name that the caller gave its tool."""
        name = self._ask.names.asked(slot.name or "")
        # The older form has room for one call; should there be more, they are told in the newer one.
        is_legacy = self._ask.uses_functions and not self._calls
        # The older form stands beside the list.
        index = len(self._calls) - (self._ask.uses_functions and not is_legacy)
        is_custom = slot.kind == "custom_tool_call" and name in self._ask.customs
        form, key = ("custom", "input") if is_custom and not is_legacy else ("function", "arguments")
        identity = slot.call_id or slot.id or f"call_{self.around.unique}_{index}"
        call = _Call(identity, name, form, key, is_legacy)
        self._calls.append(call)
        if is_legacy:
            self._around_input = self._rendered(b'{"function_call":{"arguments":"', b'"}}')
            self._send(b'{"function_call":%b}' % dumps(call.whole))
        else:
            self._around_input = self._rendered(
                b'{"tool_calls":[{"index":%d,"%b":{"%b":"' % (index, form.encode(), key.encode()), b'"}}]}'
            )
            self._send(b'{"tool_calls":[%b]}' % dumps({"index": index, **call.whole}))

    def tell_arguments(self, slot: Slot, text: Pieces) -> None:
        """Add to what the current call is called with."""
        if self.collect:
            self._calls[-1].pieces.append(text.text)
        else:
            before, between, after = self._around_input
            self.out += (before, between.join(text.spelled), after)

    # -- its ends ----------------------------------------------------------------------------

    def end_well(self, reason: str) -> None:
        """End the answer with the reason in Chat's words, the usage if it was asked for, and `[DONE]`."""
        self._finish = FINISH.get(reason, "stop")
        if self.has_calls and reason in _GOOD:
            self._finish = "function_call" if self._ask.uses_functions else "tool_calls"
        if self.collect:
            return
        self.out.append(
            b'%b{},"logprobs":null,"finish_reason":"%b"}]%b'
            % (self._head, self._finish.encode(), self._closing())
        )
        if self._ask.shows_usage:
            self.out.append(self._envelope() + b',"choices":[]' + self._closing(self._usage()))
        self.out.append(_DONE)

    def end_badly(self, error: ProxyError) -> None:
        """End with the error, and without `[DONE]`."""
        self.out.append(b"data: " + stream_error(error) + b"\n\n")

    def whole(self) -> bytes:
        """Return the collected `chat.completion`."""
        texts = {key.decode(): "".join(pieces) for key, pieces in self._texts.items()}
        content, refusal = texts.pop("content", ""), texts.pop("refusal", None)
        message: JsonObject = {
            "role": "assistant",
            "content": content if content or not (self._calls or refusal) else None,
            "refusal": refusal,
            **texts,
            **self._lists,
        }
        if self._pictures:
            message["images"] = list(self._pictures.values())
        for call in self._calls:
            if call.is_legacy:
                message["function_call"] = call.whole
            else:
                message.setdefault("tool_calls", []).append(call.whole)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish}
        return dumps({
            **self._identity("chat.completion"),
            "choices": [choice],
            **({"service_tier": self.service_tier} if self.service_tier is not None else {}),
            "usage": self._usage(),
        })

    def keepalive(self) -> bytes:
        """Return a comment, which says nothing."""
        return _KEEPALIVE

    # -- chunks ------------------------------------------------------------------------------

    def _send(self, delta: bytes) -> None:
        if not self.collect:
            self.out.append(b"%b%b%b" % (self._head, delta, self._tail))

    def _write(self, key: bytes, text: Pieces) -> None:
        if self.collect:
            self._texts.setdefault(key, []).append(text.text)
            return
        around = self._around.get(key)
        if around is None:
            around = self._around[key] = self._rendered(b'{"%b":"' % key, b'"}')
        before, between, after = around
        self.out += (before, between.join(text.spelled), after)

    def _rendered(self, before: bytes, after: bytes) -> tuple[bytes, bytes, bytes]:
        """Return what stands before, between and behind the pieces of a text that has these around it in its deltas."""
        head, tail = self._head + before, after + self._tail
        return head, tail + head, tail

    def _add(self, key: str, entry: JsonObject) -> None:
        if self.collect:
            self._lists.setdefault(key, []).append(entry)
            return
        index = self._counts[key]
        self._counts[key] += 1
        self._send(dumps({key: [{**entry, "index": index}]}))

    def _identity(self, kind: str) -> JsonObject:
        return {
            "id": f"chatcmpl-{self.response_id.removeprefix('resp_')}",
            "object": kind,
            "created": self.created,
            "model": self.request.asked_model,
        }

    def _envelope(self) -> bytes:
        """Return a chunk as far as all are alike."""
        return b"data: " + dumps(self._identity("chat.completion.chunk"))[:-1]

    def _closing(self, usage: JsonObject | None = None) -> bytes:
        """Return what follows the choices; with `include_usage` every chunk has a usage, mostly null."""
        rest: JsonObject = {} if self.service_tier is None else {"service_tier": self.service_tier}
        if self._ask.shows_usage:
            rest["usage"] = usage
        return (b"," + dumps(rest)[1:] if rest else b"}") + b"\n\n"

    # -- usage -------------------------------------------------------------------------------

    def _usage(self) -> JsonObject:
        return chat_usage(self.estimate(), counts_writes=self.counts_writes)


def chat_usage(usage: Usage, *, counts_writes: bool = False) -> JsonObject:
    """Return tokens as OpenAI's older dialects name them; those of the prompt include the cached ones."""
    read: JsonObject = {"cached_tokens": usage.cached_tokens}
    if counts_writes:
        read["cache_write_tokens"] = usage.cache_write_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": read,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


CHAT = Dialect(name="openai", decode=decode, render_error=render_error, keeps_alive_early=True)
