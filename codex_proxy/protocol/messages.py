"""The Messages dialect, outwards: the backend's answer as Anthropic's stream or message, errors in its words.

A stream is a row of content blocks, one open at a time:

| of the backend                | in the answer                                                            |
|-------------------------------|--------------------------------------------------------------------------|
| reasoning                     | a `thinking` block, if the caller asked for thinking; its signature is   |
|                               | the encrypted content, which brings the reasoning back in the next turn  |
| text, refusal                 | a `text` block; a refusal also is the stop reason                        |
| a note of a web page          | `citations_delta`; what only Anthropic could say of it stays empty       |
| `function_call`               | `tool_use`                                                               |
| `custom_tool_call`            | `tool_use` with the input `{"input": "..."}`                             |
| `web_search_call`             | `server_tool_use` and `web_search_tool_result`                           |
| a picture                     | words that say so: there is no block for one                             |

A plain answer is made of the same blocks. Arguments must be a JSON object there: what is none is kept in one,
as `{"_raw": "..."}`. In a stream this can be seen only by how they begin; what breaks off later goes out as it
came.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from codex_proxy.errors import (
    BudgetUsedUp,
    ConfigError,
    KeyRefused,
    LedgerAway,
    NotAllowed,
    OutOfFunds,
    PoolEmpty,
    PoolError,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RateLimited,
    RequestError,
    TooManyGuesses,
    UpstreamError,
    Verdict,
)
from codex_proxy.protocol.allowance import anthropic_headers
from codex_proxy.protocol.answer import BYTES_PER_TOKEN, CALL_KINDS, STOP_SEQUENCE, AnswerEncoder, Slot
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.dialect import Decoded, Dialect, Surroundings
from codex_proxy.protocol.messages_request import NO_THREADS, Thinking, decode
from codex_proxy.protocol.names import ToolNames, fit_call_id, shorten
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses import set_exact_retry, set_retry
from codex_proxy.protocol.sse import frame
from codex_proxy.protocol.wire import BadJson, JsonObject, Pieces, dumps, loads_lenient
from codex_proxy.trace import UsageSource

__all__ = ["MESSAGES", "PING", "MessagesEncoder", "error_event", "render_error", "reword"]

PING = b'event: ping\ndata: {"type": "ping"}\n\n'

RAW = "_raw"
"""The key under which arguments are kept that are no JSON object."""

PICTURE = "[a picture was made, for which this API has no place]"

_STOP_REASONS = {
    "max_output_tokens": "max_tokens",
    "max_tokens": "max_tokens",
    "content_filter": "refusal",
    "refusal": "refusal",
    STOP_SEQUENCE: "stop_sequence",
    "pause_turn": "pause_turn",
    "model_context_window_exceeded": "model_context_window_exceeded",
}
"""Why an answer ended, in the API's words; any other reason is `end_turn`."""

# What is no object goes out as one string of an object.
_NOTHING = Pieces.of("")
_CUSTOM_HEAD = Pieces.of('{"input":"')
_RAW_HEAD = Pieces.of(f'{{"{RAW}":"')
_STRING_TAIL = Pieces.of('"}')
_NO_INPUT = Pieces.of("{}")

_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":"'
)
_DELTA_END = b'"}}\n\n'


class MessagesEncoder(AnswerEncoder):
    """Turn backend events into the frames of a Messages stream, or into one message.

    Args:
        names: The tools' names as the caller wrote them.
        thinking: What the caller gets of the reasoning.
    """

    def __init__(
        self,
        request: BackendRequest,
        around: Surroundings,
        *,
        names: ToolNames,
        thinking: Thinking = Thinking.OFF,
        stop: Sequence[str] = (),
    ) -> None:
        super().__init__(request, around, stop=stop, collect=not request.stream)
        self._names = names
        self._thinking = thinking
        self._blocks = 0
        self._open = ""
        """The type of the block that is open."""
        self._content: list[JsonObject] = []
        self._pieces: list[str] = []
        """The text of the open block, when it is collected."""
        self._tail: Pieces | None = None
        """What the input of the open call still needs; None as long as nothing of it has come."""
        self._calls: list[Slot] = []
        self._searches = 0
        self._has_refused = False
        self._final: JsonObject = {}

    # -- blocks ----------------------------------------------------------------------------

    def _emit(self, kind: str, **fields: Any) -> None:
        if not self.collect:
            self.out.append(frame(kind, dumps({"type": kind, **fields})))

    def _begin(self, block: JsonObject) -> None:
        self._end()
        self._emit("content_block_start", index=self._blocks, content_block=block)
        if self.collect:
            self._content.append(dict(block))
        self._open = block["type"]

    def _add(self, kind: bytes, key: bytes, text: Pieces) -> None:
        """Add text to the open block, a delta for each of its pieces; their spelling is copied."""
        if self.collect:
            self._pieces.append(text.text)
            return
        head = _DELTA % (self._blocks, kind, key)
        self.out += (head, (_DELTA_END + head).join(text.spelled), _DELTA_END)

    def _end(self) -> None:
        if not self._open:
            return
        if self.collect:
            text = "".join(self._pieces)
            self._pieces.clear()
            block = self._content[-1]
            match self._open:
                case "tool_use" | "server_tool_use":
                    block["input"] = _input_of(text)
                case "text" | "thinking":
                    block[self._open] = text
                case _:
                    pass
        self._emit("content_block_stop", index=self._blocks)
        self._blocks += 1
        self._open = ""

    # -- what is told ----------------------------------------------------------------------

    def tell_start(self) -> None:
        """Begin the message, with an estimate of what its input costs."""
        message = self._message() | {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {
            "input_tokens": math.ceil(self.request.input_bytes / BYTES_PER_TOKEN),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 1,
        }
        self._emit("message_start", message=message | {"usage": usage})

    def tell_text(self, slot: Slot, text: Pieces) -> None:
        """Add words."""
        self._want_text()
        self._add(b"text_delta", b"text", text)

    def tell_refusal(self, slot: Slot, text: Pieces) -> None:
        """Add words of a refusal, which are all that the caller gets."""
        self._has_refused = True
        self.tell_text(slot, text)

    def tell_annotation(self, slot: Slot, annotation: JsonObject) -> None:
        """Say which page the text is from; notes of files, which nobody here could open, are dropped."""
        url, title = annotation.get("url"), annotation.get("title")
        if annotation.get("type") != "url_citation" or not isinstance(url, str) or not url:
            return
        self._want_text()
        citation: JsonObject = {
            "type": "web_search_result_location",
            "cited_text": "",
            "encrypted_index": "",
            "title": title if isinstance(title, str) else None,
            "url": url,
        }
        if self.collect:
            self._content[-1].setdefault("citations", []).append(citation)
        delta = {"type": "citations_delta", "citation": citation}
        self._emit("content_block_delta", index=self._blocks, delta=delta)

    def tell_thought(self, slot: Slot, text: Pieces) -> None:
        """Add words of the summary, if the caller wants them."""
        if self._thinking is Thinking.SHOWN:
            self._want_thinking()
            self._add(b"thinking_delta", b"thinking", text)

    def tell_call(self, slot: Slot) -> None:
        """Begin a call."""
        self._calls.append(slot)
        call_id = slot.call_id or f"call_{self.around.unique}_{slot.index}"
        name = self._names.asked(slot.name or "")
        self._begin({"type": "tool_use", "id": fit_call_id(call_id), "name": name, "input": {}})
        self._tail = _STRING_TAIL if _is_custom(slot) else None
        self._add_input(_CUSTOM_HEAD if _is_custom(slot) else _NOTHING)

    def tell_arguments(self, slot: Slot, text: Pieces) -> None:
        """Add to what the tool is called with."""
        if self._tail is None:
            said = text.text.lstrip(" \t\r\n")
            if not said:
                return
            if len(said) < len(text.text):
                text = text.part(len(text.text) - len(said), len(text.text))
            self._tail = _NOTHING if said.startswith("{") else _STRING_TAIL
            if self._tail:
                self._add_input(_RAW_HEAD)
        self._add_input(text.nested() if self._tail else text)

    def _add_input(self, text: Pieces) -> None:
        self._add(b"input_json_delta", b"partial_json", text)

    def tell_close(self, slot: Slot) -> None:
        """End the block of an item; some items are said only now."""
        match slot.kind:
            case "reasoning":
                self._sign(slot)
            case "function_call" | "custom_tool_call":
                self._end_input(slot)
            case "web_search_call" if slot.is_told:
                self._show_search(slot)
            case "image_generation_call" if slot.picture:
                self._want_text()
                self._add(b"text_delta", b"text", Pieces.of(PICTURE))
            case _:
                pass
        self._end()

    def _end_input(self, slot: Slot) -> None:
        """Let the pieces of the input make an object, if anything can."""
        if self._tail is None and slot.is_told:
            self._tail = _NO_INPUT
        if self._tail:
            self._add_input(self._tail)

    def _want_text(self) -> None:
        if self._open != "text":
            self._begin({"type": "text", "text": ""})

    def _want_thinking(self) -> None:
        if self._open != "thinking":
            self._begin({"type": "thinking", "thinking": "", "signature": ""})

    def _sign(self, slot: Slot) -> None:
        """Seal the thinking; what was only left has not got its seal yet."""
        seal = slot.item.get("encrypted_content") if slot.is_told else None
        if self._thinking is Thinking.OFF or not isinstance(seal, str) or not seal:
            return
        self._want_thinking()
        if self.collect:
            self._content[-1]["signature"] = seal
        delta = {"type": "signature_delta", "signature": seal}
        self._emit("content_block_delta", index=self._blocks, delta=delta)

    def _show_search(self, slot: Slot) -> None:
        """Say what was searched for and found; steps that only opened a page found nothing new."""
        query, results = _search_of(slot.item)
        if not query and not results:
            return
        self._searches += 1
        identity = _identity(slot, self.around.unique)
        self._begin({"type": "server_tool_use", "id": identity, "name": "web_search", "input": {}})
        self._add_input(Pieces.of(dumps({"query": query}).decode()))
        content: Any = results
        if slot.item.get("status") == "failed":
            content = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
        self._begin({"type": "web_search_tool_result", "tool_use_id": identity, "content": content})

    # -- ends ------------------------------------------------------------------------------

    def end_well(self, reason: str) -> None:
        """Say why the answer ended and what it cost."""
        if self.usage.source is not UsageSource.BACKEND:
            self.estimate()
        stop = self._stop_reason(reason)
        delta = {
            "stop_reason": stop,
            "stop_sequence": self.stop_sequence if stop == "stop_sequence" else None,
        }
        usage = self._usage()
        if self.collect:
            self._final = self._message() | {"content": self._content} | delta | {"usage": usage}
            return
        self._emit("message_delta", delta=delta, usage=usage)
        self._emit("message_stop")

    def _stop_reason(self, reason: str) -> str:
        stop = _STOP_REASONS.get(reason, "end_turn")
        # A call that is whole is there to be answered; half a call nobody could answer.
        if self._calls and not (stop == "max_tokens" and any(map(_is_cut, self._calls))):
            return "tool_use"
        return "refusal" if self._has_refused and stop == "end_turn" else stop

    def _usage(self) -> JsonObject:
        usage = self.usage
        fresh = usage.input_tokens - usage.cached_tokens - usage.cache_write_tokens
        said: JsonObject = {
            "input_tokens": max(fresh, 0),
            "cache_creation_input_tokens": usage.cache_write_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }
        if self._searches:
            said["server_tool_use"] = {"web_search_requests": self._searches, "web_fetch_requests": 0}
        return said

    def end_badly(self, error: ProxyError) -> None:
        """End the stream with an error: nothing is closed, and no `message_stop` follows."""
        kind, message = _stream_words(reword(error, self.request))
        self._emit("error", error={"type": kind, "message": message})

    def whole(self) -> bytes:
        """Return the answer as one message."""
        return dumps(self._final)

    def keepalive(self) -> bytes:
        """Return a ping, which may come anywhere in a stream, before its beginning too."""
        return PING

    def _message(self) -> JsonObject:
        return {
            "id": f"msg_{self.response_id.removeprefix('resp_')}",
            "type": "message",
            "role": "assistant",
            "model": self.request.asked_model,
        }


def _is_custom(slot: Slot) -> bool:
    return slot.kind == "custom_tool_call"


def _arguments(slot: Slot) -> str:
    return "".join(slot.pieces.get((CALL_KINDS[slot.kind], 0), ()))


def _is_cut(slot: Slot) -> bool:
    """Tell whether a call has not come to its end."""
    if not slot.is_told or slot.item.get("status") == "incomplete":
        return True
    return not _is_custom(slot) and RAW in _input_of(_arguments(slot))


def _input_of(arguments: str) -> JsonObject:
    """Return arguments as an object; what is none is kept as it is, because its words may matter."""
    if not arguments:
        return {}
    try:
        value = loads_lenient(arguments.encode("utf-8", "surrogatepass"))
    except BadJson:
        value = arguments
    return value if isinstance(value, dict) else {RAW: arguments}


def _search_of(item: JsonObject) -> tuple[str, list[JsonObject]]:
    """Return what a search asked for and the pages that it found."""
    action = item.get("action")
    action = action if isinstance(action, dict) else {}
    query, queries = action.get("query"), action.get("queries")
    if not isinstance(query, str) or not query:
        several = queries if isinstance(queries, list) else []
        query = ", ".join(one for one in several if isinstance(one, str))
    results: dict[str, JsonObject] = {}
    for pages in (item.get("results"), action.get("sources")):
        for page in pages if isinstance(pages, list) else ():
            url = page.get("url") if isinstance(page, dict) else None
            if isinstance(url, str) and url and url not in results:
                title = page.get("title")
                results[url] = {
                    "type": "web_search_result",
                    "url": url,
                    "title": title if isinstance(title, str) and title else url,
                    "encrypted_content": "",
                    "page_age": None,
                }
    return query, list(results.values())


def _identity(slot: Slot, unique: str) -> str:
    """Return the id of a search, in the one form that the API takes for it."""
    identity = f"srvtoolu_{slot.id or f'{unique}_{slot.index}'}"
    fits = fit_call_id(identity) == identity and "-" not in identity
    return identity if fits else shorten(identity, "srvtoolu")


# Failures in the caller's words ------------------------------------------------------------

_BUSY = "the backend has no room for this just now, please try again in a moment"

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

# What is said of a window that nobody knows.
_WINDOW = 200_000


def reword(error: ProxyError, request: BackendRequest) -> ProxyError:
    """Say that a conversation is too long in the words by which Claude Code knows that it must compact it."""
    if (
        not isinstance(error, UpstreamError)
        or error.verdict is not Verdict.CALLER
        or error.fault.code != "context_length_exceeded"
    ):
        return error
    window = request.context_window or _WINDOW
    tokens = max(math.ceil(request.input_bytes / BYTES_PER_TOKEN), window + 1)
    return RequestError(
        f"prompt is too long: {tokens} tokens > {window} maximum", code="context_length_exceeded"
    )


def render_error(error: ProxyError, *, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Render *error* as an HTTP answer in Anthropic's shape: status, headers, body."""
    headers = {"content-type": "application/json", "request-id": request_id, "x-request-id": request_id}
    status, message = error.status, error.message
    match error:
        case RequestError():
            message = _with_path(error)
            if error.allow is not None:
                headers["allow"] = error.allow
        case KeyRefused():
            headers["www-authenticate"] = "Bearer"
            # Claude Code would try ten times, for minutes.
            headers["x-should-retry"] = "false"
        case NotAllowed():
            status = 403
        case PoolExhausted() | BudgetUsedUp():
            # An SDK obeys any wait, and would sleep until the limit ends.
            set_retry(headers, error.retry_after)
            headers["x-should-retry"] = "false"
        case PoolShortage():
            status = 529
            set_retry(headers, error.retry_after)
        case OutOfFunds():
            status = 402
            headers["x-should-retry"] = "false"
        case RateLimited():
            set_exact_retry(headers, error.retry_after)
        case LedgerAway() | TooManyGuesses():
            set_retry(headers, error.retry_after)
        case PoolEmpty():
            headers["x-should-retry"] = "false"
        case UpstreamError():
            status, message = _upstream_words(error)
            if status == 529:
                set_retry(headers, 1)
        case ConfigError():
            # It quotes the configuration, which is its owner's business.
            message = "the proxy has a wrong setting; its log says which"
        case _:
            pass
    said: JsonObject = {"type": _type_of(status), "message": message}
    if isinstance(error, RequestError) and error.code == NO_THREADS:
        said["details"] = {"error_code": NO_THREADS}
    return (
        status,
        {**headers, **error.headers},
        dumps({"type": "error", "error": said, "request_id": request_id}),
    )


def _type_of(status: int) -> str:
    return _TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")


def _with_path(error: RequestError) -> str:
    """Return a message that begins with the path of the field, as the API's own do."""
    if not error.param:
        return error.message
    return f"{error.param}: {error.message.removeprefix(error.param).lstrip()}"


def _upstream_words(error: UpstreamError) -> tuple[int, str]:
    if error.verdict is not Verdict.CALLER:
        # The trouble of one account, and no other was left.
        return 529, _BUSY
    return error.callers_status, error.fault.message


def _stream_words(error: ProxyError) -> tuple[str, str]:
    """Return type and message of an `error` event."""
    match error:
        case UpstreamError():
            fault = error.fault
            match error.verdict:
                case Verdict.CALLER:
                    return "invalid_request_error", fault.message
                case Verdict.CUT | Verdict.SILENT:
                    # Our own words.
                    return "api_error", fault.message
                case Verdict.SERVER:
                    return "api_error", error.servers_words
                case _:
                    return "overloaded_error", _BUSY
        case RequestError():
            return _type_of(error.status), _with_path(error)
        case PoolExhausted() | PoolEmpty() | BudgetUsedUp() | RateLimited():
            return "rate_limit_error", error.message
        case NotAllowed():
            return "permission_error", error.message
        case OutOfFunds():
            return "billing_error", error.message
        case PoolError():
            return "overloaded_error", error.message
        case ConfigError():
            return "api_error", "the proxy has a wrong setting; its log says which"
        case _:
            return _type_of(error.status), error.message


def error_event(error: ProxyError) -> bytes:
    """Return the event that ends a stream with *error*."""
    kind, message = _stream_words(error)
    return frame("error", dumps({"type": "error", "error": {"type": kind, "message": message}}))


# The dialect ------------------------------------------------------------------------------


def _decode(raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = "") -> Decoded:
    asked = decode(raw, headers, catalog=catalog, caller=caller)
    make_encoder = functools.partial(
        MessagesEncoder, asked.request, names=asked.names, thinking=asked.thinking, stop=asked.stop
    )
    return Decoded(asked.request, make_encoder)


MESSAGES = Dialect(
    "anthropic",
    _decode,
    render_error,
    keeps_alive_early=True,
    allowance_headers=anthropic_headers,
    reword=reword,
)
