"""What every dialect decodes into: a request as the backend takes it, and the headers that go with it.

The body is rendered once, before the first attempt, and the bytes are what an account gets.
Two things in it belong to one account: the turn-state and the encrypted reasoning. `body_for`
takes them out or puts the account's own value in; the body is parsed again only then, so a
long stream holds no second copy of a long conversation.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import Binding
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads, loads_lenient

if TYPE_CHECKING:
    from codex_proxy.protocol.native import Native

TURN_STATE = "x-codex-turn-state"
"""The header, and the key in `client_metadata`, that binds a turn to a node of one account."""

LITE_HEADER = "x-openai-internal-codex-responses-lite"
LITE_METADATA = "ws_request_header_x_openai_internal_codex_responses_lite"
"""Where the lite flag travels when there are no headers per request."""

ROUTING_HINT = "x-codex-routing-hint"


Refused = Callable[[str], bool]
"""Whether an encrypted content is one that a target cannot read."""


def never(_: str) -> bool:
    """Refuse nothing."""
    return False


@dataclass(slots=True)
class BackendRequest:
    """One caller's request, ready for any account."""

    endpoint: str
    """The path below the base URL: "responses", "responses/compact", "alpha/search", ..."""
    asked_model: str
    """What the caller typed; echoed back."""
    model: str
    """The slug that goes upstream; empty when the body names none."""
    body: bytes
    content_type: str = "application/json"
    stream: bool = False
    """Whether the caller wants a stream."""
    is_codex: bool = False
    """Whether the caller is a real Codex client."""
    lite: bool = False
    """Whether the body has the lite wire shape."""
    was_lite_encoded: bool = False
    """Whether the lite shape is our doing, so that replies are decoded back."""
    binding: Binding | None = None
    """What the conversation is known by; None when there is none, as for a search without a session."""
    service_tier: str | None = None
    asked_tier: str | None = None
    """What the caller says of it: an upstream that takes the body as it is gets that, where accounts get a word they know."""
    max_output_tokens: int | None = None
    """The caller's limit; the backend takes none, so it is enforced here."""
    headers: dict[str, str] = field(default_factory=dict)
    """The caller's headers that go upstream, lower-case names, without the turn-state."""
    turn_state: str | None = None
    """The caller's turn-state, as we wrapped it."""
    encrypted: tuple[str, ...] = ()
    """The encrypted contents of the reasoning items in the input."""
    compacted: tuple[str, ...] = ()
    """The encrypted contents of history in the input; only the account that wrote one can read it."""
    input_bytes: int = 0
    """How much text the model reads, for an estimate."""
    has_body_turn_state: bool = False
    """Whether the turn-state also stands in the body's `client_metadata`."""
    keeps: bool = False
    """Whether the caller lets the answer be remembered, so that a later request may go on from it."""
    previous_response_id: str | None = None
    """The answer that this request went on from; echoed back."""
    context_window: int = 0
    """How many tokens the model reads at most; 0 when nobody knows."""
    packed: tuple[bytes, bytes] | None = None
    """A body as an account got it, and what it is compressed; for the attempts after the first."""
    native: "Native | None" = None
    """The request as its caller wrote it, where there are upstreams that may take it so."""

    @property
    def session(self) -> str | None:
        """What binds the conversation to an account."""
        return self.binding.key if self.binding is not None else None

    @property
    def is_opening(self) -> bool:
        """Whether `session` is only to be remembered; see `Binding.is_opening`."""
        return self.binding is not None and self.binding.is_opening

    def body_for(self, turn_state: str | None, refused: Callable[[str], bool] = never) -> bytes:
        """Render what one account gets; the very same bytes when nothing differs.

        Args:
            turn_state: The account's own, unwrapped value; None removes it from the body.
            refused: Whether an encrypted content is one that this account cannot read; its
                reasoning item is dropped. Compaction items stay: they are the history itself.
        """
        strip = refused is not never and any(map(refused, self.encrypted))
        if not strip and not self.has_body_turn_state:
            return self.body
        body = self._parse()
        if body is None:
            return self.body
        changed = _drop_reasoning(body, refused) if strip else False
        if self.has_body_turn_state:
            changed = _set_turn_state(body, turn_state) or changed
        return render_body(body) if changed else self.body

    def release(self) -> None:
        """Forget the body: no attempt will follow. What the answer needs stays."""
        self.body = b""
        self.packed = None
        self.encrypted = ()
        self.compacted = ()
        if self.native is not None:
            self.native.release()

    def _parse(self) -> JsonObject | None:
        try:
            body = loads_lenient(self.body)
        except BadJson:
            return None
        return body if isinstance(body, dict) else None


def without_reasoning(body: bytes, refused: Callable[[str], bool]) -> bytes:
    """Return *body* without the reasoning that is refused; the very same bytes when there is none."""
    fields = parse_body(body)
    return render_body(fields) if _drop_reasoning(fields, refused) else body


def _drop_reasoning(body: JsonObject, refused: Callable[[str], bool]) -> bool:
    items = body.get("input")
    if not isinstance(items, list):
        return False
    kept = [item for item in items if not _is_refused(item, refused)]
    if len(kept) == len(items):
        return False
    body["input"] = kept
    return True


def _is_refused(item: object, refused: Callable[[str], bool]) -> bool:
    if not isinstance(item, dict) or item.get("type") != "reasoning":
        return False
    value = item.get("encrypted_content")
    return isinstance(value, str) and refused(value)


def _set_turn_state(body: JsonObject, turn_state: str | None) -> bool:
    metadata = body.get("client_metadata")
    if not isinstance(metadata, dict) or TURN_STATE not in metadata:
        return False
    if turn_state is None:
        del metadata[TURN_STATE]
        return True
    if metadata[TURN_STATE] == turn_state:
        return False
    metadata[TURN_STATE] = turn_state
    return True


# codex_exec, codex_cli_rs, codex-tui, codex_vscode, "Codex Desktop", codex_sdk_ts, ...
# but not our own name, which a proxy in front of us sends for its other callers.
_CODEX = re.compile(r"codex(?![_-]proxy)(?:[_\-/ ]|$)", re.IGNORECASE)


def is_codex_client(headers: Mapping[str, str]) -> bool:
    """Tell whether a real Codex client is asking; *headers* have lower-case names."""
    for name in ("originator", "user-agent"):
        value = headers.get(name)
        if value is not None and _CODEX.match(value) is not None:
            return True
    return False


_FORWARDED = frozenset({
    "originator",
    "user-agent",
    "version",
    "session-id",
    "thread-id",
    "session_id",
    "conversation_id",
    "x-client-request-id",
    "x-openai-subagent",
    "x-openai-memgen-request",
    LITE_HEADER,
    "x-responsesapi-include-timing-metrics",
    "traceparent",
    "tracestate",
})

_OURS = frozenset({TURN_STATE, ROUTING_HINT})

MAX_SESSION_LENGTH = 256
"""What the name of a conversation may measure to go out as a header."""


def forwardable(headers: Mapping[str, str], is_codex: bool) -> dict[str, str]:
    """Return which of the caller's headers go upstream.

    A list of what may pass, not of what may not: a credential under a name we have never
    heard of stays here. The turn-state is not among them, because it is another value for
    each account; the routing hint is set by `set_routing_hint`.
    """
    if not is_codex:
        session = headers.get("session-id", "")
        return {"session-id": session} if session and session.isprintable() else {}
    return {
        name: value
        for name, value in headers.items()
        # Bytes that are no UTF-8 come in as surrogates and could not be sent.
        if (name in _FORWARDED or (name.startswith("x-codex-") and name not in _OURS)) and value.isprintable()
    }


def set_routing_hint(headers: dict[str, str], model: str, service_tier: str | None) -> None:
    """Let the routing hint name the model and tier that go upstream.

    A Codex client that knows the proxy by a key sends none, so it is set for each of them.
    """
    tier = ";tier=priority" if service_tier == "priority" else ""
    headers[ROUTING_HINT] = f"model={model}{tier}"


def set_session(headers: dict[str, str], prompt_cache_key: str | None, binding: Binding | None) -> None:
    """Name the conversation in a header too, for the backend looks in its cache by both.

    The caller's own header stays, then its `prompt_cache_key` counts, if a header can hold it.
    """
    key = prompt_cache_key
    if not key or not key.isascii() or not key.isprintable() or len(key) > MAX_SESSION_LENGTH:
        key = binding.key if binding is not None else None
    if key:
        headers.setdefault("session-id", key)


_MODEL_NAME = re.compile(r"[\x21-\x7e]{1,256}")


def parse_body(raw: bytes) -> JsonObject:
    """Parse a caller's body, which must be one JSON object.

    A lone half of a surrogate pair, which JavaScript callers cut off now and then, is kept.

    Raises:
        RequestError: If it is anything else.
    """
    try:
        body = loads(raw)
    except BadJson as exc:
        body = _parse_odd(raw, exc)
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    return body


def _parse_odd(raw: bytes, cause: BadJson) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as exc:
        raise RequestError("the body is not UTF-8") from exc
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply") from exc
    except ValueError as exc:
        raise RequestError(f"the body is no JSON: {cause}") from exc


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _finite(word: str) -> float:
    value = float(word)
    if math.isinf(value):
        # It would go on as null.
        raise ValueError("a number is too large")
    return value


def render_body(body: JsonObject) -> bytes:
    """Render a body that was changed.

    Raises:
        RequestError: If it is nested deeper than any renderer follows.
    """
    try:
        return dumps(body)
    except (RecursionError, ValueError) as exc:
        raise RequestError("the body is nested too deeply") from exc


def model_of(body: JsonObject) -> str:
    """Return the model that a body names.

    It goes into headers, so it is held to what a header may contain.

    Raises:
        RequestError: If there is none, or it is no name.
    """
    model = body.get("model")
    if model is None:
        raise RequestError("model is missing", param="model", code="missing_required_parameter")
    if not isinstance(model, str) or not _MODEL_NAME.fullmatch(model):
        raise RequestError("model is no model name", param="model", code="invalid_value")
    return model
