"""A request as its caller wrote it, for upstreams that speak its dialect.

Its bytes go out as they came, but for two things that stand at the top of the body: the model, where the owner gave it
another name, and `stream_options.include_usage`, without which a streamed chat does not tell what it has cost. What is
changed is written anew by field, so that everything else keeps its spelling.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import msgspec

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import SESSION_HEADERS
from codex_proxy.protocol.fields import wants_usage
from codex_proxy.protocol.request import BackendRequest, model_of, parse_body, render_body
from codex_proxy.protocol.wire import Fields, JsonObject

PATHS: Mapping[str, str] = {
    "responses": "responses",
    "chat": "chat/completions",
    "completions": "completions",
    "edits": "edits",
    "embeddings": "embeddings",
    "messages": "messages",
}
"""Where below `/v1` a dialect is spoken; `engines` has its model there."""

LEAST_OUTPUT = 16
"""The smallest output limit that the Responses API takes; below it the limit is kept here alone."""

_STREAM_USAGE = b'"stream_options":{"include_usage":true},'


@dataclass(slots=True)
class Native:
    """What goes to an upstream that speaks the caller's own dialect."""

    capability: str
    """The dialect, as an upstream's `capabilities` name it."""
    body: bytes
    headers: dict[str, str]
    """The caller's headers that may pass, lower-case names."""
    model: str
    """As the caller wrote it."""
    stream: bool
    wants_usage: bool = True
    """Whether the caller asked for the usage at the end of its stream."""
    refusal: RequestError | None = None
    """Why it can be translated for nobody."""
    caller: str = ""
    """Who asks, by `Caller.id`: by that the request finds its upstream when its conversation has no name."""
    via: str = ""
    """The proxies that it came through, as the header of that name has them."""
    query: str = ""
    """What stands behind the path, with its question mark."""
    is_whole: bool = True
    """Whether it says all there is to say: one that goes on from an answer that is remembered here does not."""
    is_other: bool = False
    """Whether an upstream may serve it as the model that its caller names, where accounts serve another one for it."""
    standard: Callable[[], BackendRequest] | None = field(default=None, repr=False)
    """Makes the same request in the shape of the public Responses API."""
    _made: BackendRequest | None = field(default=None, repr=False)

    def as_standard(self) -> BackendRequest:
        """Return the same request in the shape of the public Responses API; made once."""
        if self._made is None:
            assert self.standard is not None
            self._made = self.standard()
        return self._made

    @property
    def path(self) -> str:
        """Where below `/v1` it goes; see `path_for` for another model."""
        return self.path_for(self.model)

    def path_for(self, model: str) -> str:
        """Return where below `/v1` it goes when its model is called *model* there."""
        if self.capability == "engines":
            return f"engines/{quote(model, safe='')}/completions"
        return PATHS[self.capability]

    @property
    def asks_usage(self) -> bool:
        """Whether the usage is asked for that its caller does not want."""
        return self.capability == "chat" and self.stream and not self.wants_usage

    def body_for(self, model: str, *, may_ask: bool = True) -> bytes:
        """Return the body for an upstream where its model is called *model*.

        Args:
            may_ask: Whether the upstream knows how to be asked for the usage of a stream.
        """
        asks = self.asks_usage and may_ask
        renames = model != self.model and self.capability != "engines"
        if asks and not renames and b'"stream_options"' not in self.body:
            start = self.body.index(b"{") + 1
            return self.body[:start] + _STREAM_USAGE + self.body[start:]
        if not asks and not renames:
            return self.body
        fields = _fields(self.body)
        if renames:
            fields.put("model", model)
        if asks:
            options = fields.get("stream_options")
            fields.put(
                "stream_options", {**(options if isinstance(options, dict) else {}), "include_usage": True}
            )
        return fields.render()

    def release(self) -> None:
        """Forget the body: no attempt will follow."""
        self.body = b""
        self.standard = self._made = None


_read_spelled = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def _fields(body: bytes) -> Fields:
    try:
        return Fields(_read_spelled(body), spelled=True)
    except (ValueError, RecursionError):
        # Odd, such as half a character.
        return Fields(parse_body(body))


def read_native(
    capability: str, raw: bytes, headers: Mapping[str, str], *, engine: str | None = None
) -> tuple[Native, JsonObject]:
    """Read a body only as far as one must to send it on; return it with its fields.

    Raises:
        RequestError: If it is no JSON object, or names no model.
    """
    fields = parse_body(raw)
    model = engine if engine is not None else model_of(fields)
    stream = fields.get("stream") is True and capability not in ("embeddings", "edits")
    native = Native(capability, raw, passing_headers(headers), model, stream)
    if capability == "chat" and stream:
        try:
            native.wants_usage = wants_usage(fields)
        except RequestError:
            # Odd options are the upstream's to judge, and what they say stays as it is.
            native.wants_usage = True
    return native, fields


_PASSING = frozenset({
    *SESSION_HEADERS,
    "anthropic-beta",
    "anthropic-version",
    "idempotency-key",
    "openai-beta",
    "originator",
    "traceparent",
    "tracestate",
    "user-agent",
    "version",
    "x-app",
    "x-client-request-id",
    "x-openai-internal-codex-responses-lite",
    "x-openai-memgen-request",
    "x-openai-subagent",
    "x-responsesapi-include-timing-metrics",
    "x-session-affinity",
})
_PASSING_PREFIXES = ("x-claude-code-", "x-codex-", "x-stainless-")

# What belongs to one account or node, and is bound to it by whoever sends the request.
_BOUND = frozenset({"x-codex-turn-state", "x-codex-routing-hint"})


def passing_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return which of the caller's headers an upstream gets; a list of what may pass, not of what may not.

    A credential under a name that nobody has heard of stays here.
    """
    return {
        name: value
        for name, value in headers.items()
        if (name in _PASSING or (name.startswith(_PASSING_PREFIXES) and name not in _BOUND))
        # Bytes that are no UTF-8 come in as surrogates and could not be sent.
        and value.isprintable()
        and value.isascii()
    }


def standard_body(request: BackendRequest, model: str, *, thinks: bool) -> bytes:
    """Return the body of *request*, which was decoded in the standard shape, for the public Responses API.

    What a Codex backend forces and that API takes too stays: nothing is stored, and thoughts come sealed. An output
    limit, which the Codex backend does not take, is told; it is kept here as well.

    Args:
        model: What the model is called there.
        thinks: Whether it is one that thinks: others refuse to seal thoughts that they have not.
    """
    fields = parse_body(request.body)
    fields["model"] = model
    if request.max_output_tokens is not None:
        fields["max_output_tokens"] = max(request.max_output_tokens, LEAST_OUTPUT)
    if not thinks and not request.is_codex:
        fields.pop("include", None)
    return render_body(fields)
