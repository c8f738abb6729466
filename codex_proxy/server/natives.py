"""Requests for targets that need no translation: read as far as choosing one needs, and otherwise as they came.

Whatever a decoder cannot translate is refused only when no upstream takes it as it is.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from codex_proxy.errors import ProxyError, RequestError, UpstreamError
from codex_proxy.protocol.binding import bind
from codex_proxy.protocol.catalog import AUTO, EFFORTS, Catalog
from codex_proxy.protocol.dialect import Decoded, Surroundings
from codex_proxy.protocol.native import Native, passing_headers, read_native
from codex_proxy.protocol.request import BackendRequest, is_codex_client, parse_body
from codex_proxy.protocol.responses_request import LIMITS, Survey
from codex_proxy.protocol.sse import Batch
from codex_proxy.protocol.watchers import Watcher, watcher_for
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Caller, End, Usage
from codex_proxy.upstream.providers import Providers

Decode = Callable[[Catalog], Decoded]
"""Decodes a request by what is known of models."""


def no_embeddings() -> RequestError:
    """Return the error for embeddings that nobody makes."""
    return RequestError(
        "embeddings are not served here: no backend of this proxy has a model for them",
        param="model",
        code="model_not_found",
        status=404,
    )


MAX_HOPS = 5
"""How many proxies of this kind a request may come through."""

# Pictures and files in a body: bytes that are no text.
_OPAQUE = re.compile(rb'"(?:data:[^"]{64,}|[A-Za-z0-9+/=]{4096,})"')


class Natives:
    """Adds to requests what upstreams need of them.

    Args:
        is_priced: Whether it matters what a request costs, and so that it says that in one way only.
    """

    def __init__(self, providers: Providers, *, is_priced: bool) -> None:
        self._providers = providers
        self._is_priced = is_priced

    def _goes_round(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a request has been here before, or through too many of us: then it goes to no upstream."""
        via = headers.get("via", "")
        return "codex-proxy-" in via and (self._providers.via in via or via.count("codex-proxy-") >= MAX_HOPS)

    def takes(self, capability: str) -> bool:
        """Tell whether an upstream speaks a dialect."""
        return any(
            one.definition.enabled and capability in one.definition.capabilities
            for one in self._providers.all()
        )

    def read(
        self,
        capability: str,
        raw: bytes,
        headers: Mapping[str, str],
        decode: Decode,
        *,
        catalog: Catalog,
        caller: Caller,
        engine: str | None = None,
        query: str = "",
    ) -> Decoded:
        """Decode a request, for accounts and upstreams.

        Raises:
            RequestError: If it can be translated for nobody, and no upstream speaks its dialect.
        """
        if self._goes_round(headers):
            return decode(catalog)
        if self._is_priced and self.takes(capability):
            refuse_double(raw, engine)
        try:
            decoded = decode(catalog)
        except RequestError as exc:
            # What is too large is so for everybody.
            if exc.status != 400 or not self.takes(capability):
                raise
            return _untranslated(
                capability, raw, headers, exc, catalog=catalog, caller=caller, engine=engine, query=query
            )
        request = decoded.request
        native = Native(
            capability, raw, passing_headers(headers), request.asked_model, request.stream, caller=caller.id
        )
        native.query, native.via = query, _via(headers)
        # A Responses body may be asked for in Chat's place, and what goes on from an answer names what only we know.
        native.is_whole = request.previous_response_id is None and (
            capability != "chat" or b'"messages"' in raw
        )
        if capability == "chat" and request.stream:
            native.wants_usage = b"include_usage" in raw and read_native("chat", raw, {})[0].wants_usage
        native.standard = _standard(request, lambda: decode(catalog.as_standard()).request)
        request.native = native
        self._look_at_name(request)
        return decoded

    def translate(
        self,
        request: BackendRequest,
        headers: Mapping[str, str],
        caller: Caller,
        again: Callable[[], BackendRequest],
    ) -> None:
        """Let *request*, which is answered in frames of our own, go to upstreams too; *again* decodes it in the standard shape."""
        if self._goes_round(headers):
            return
        native = Native(
            "responses", b"", passing_headers(headers), request.asked_model, stream=True, caller=caller.id
        )
        native.via = _via(headers)
        native.is_whole = False
        native.standard = _standard(request, again)
        request.native = native
        self._look_at_name(request)

    def _look_at_name(self, request: BackendRequest) -> None:
        """Note whether an upstream may serve another model than the accounts do: one with another price."""
        native = request.native
        if native is not None and not _stands_for_itself(native.model, request.model):
            native.is_other = any(one.may_serve_as_named(request) for one in self._providers.all())

    def embedding(
        self, raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: Caller
    ) -> Decoded:
        """Read a request for embeddings.

        Raises:
            RequestError: If it is none, or no upstream has embeddings.
        """
        if not self.takes("embeddings") or self._goes_round(headers):
            raise no_embeddings()
        if self._is_priced:
            refuse_double(raw)
        return _untranslated(
            "embeddings", raw, headers, no_embeddings(), catalog=catalog, caller=caller, engine=None, query=""
        )


# What a name may end in and still mean the same: words and a number for the effort, but no date.
_SUFFIXES = re.compile(rf"(?:-(?:{'|'.join((*EFFORTS, AUTO, 'fast'))}))*(?:-[0-9]+)?(?:\([^()]*\))?")

_PRICED = ("model", "service_tier")
"""What the price of a request depends on."""

# Letters that are written in another way than any encoder does, and one that some take for an s.
_ODD_LETTERS = (rb"\u004", rb"\u005", rb"\u006", rb"\u007", rb"\u017f", "\u017f".encode())


def refuse_double(raw: bytes, engine: str | None = None) -> None:
    """Refuse a body that is to pass as it is and says twice, or in odd letters, what its price depends on.

    Which of two counts, and whether `Model` is one, each server sees in its own way: one could be paid, and another
    be served. The path may name the model too (*engine*).

    Raises:
        RequestError: If it does.
    """
    lowered = raw.lower()
    names = [b'"%b"' % name.encode() for name in _PRICED]
    most = 2 if engine is None else 1
    if all(lowered.count(name) == raw.count(name) < most for name in names) and not any(
        odd in lowered for odd in _ODD_LETTERS
    ):
        return
    try:
        pairs: Any = json.loads(raw, object_pairs_hook=list)
    except (ValueError, RecursionError):
        # What is wrong with it; or it is only too odd to look into, and so to let pass.
        _ = parse_body(raw)
        raise RequestError("the body is nested too deeply, or has a number that is too long") from None
    # An object, not a list of anything.
    said = [pair[0] for pair in pairs] if raw.lstrip()[:1] == b"{" else []
    if engine is not None and said.count("model") == 1 and dict(pairs)["model"] != engine:
        raise RequestError("model is another one than that of the path", param="model", code="invalid_value")
    for name in _PRICED:
        if [one for one in said if one.casefold() == name] not in ([], [name]):
            raise RequestError(
                f"{name} is there more than once, or in other letters", param=name, code="invalid_value"
            )


def _stands_for_itself(asked: str, model: str) -> bool:
    """Tell whether a name means *model* itself, with an effort at its end perhaps, and not another one's place."""
    name, own = asked.lower(), model.lower()
    return name.startswith(own) and _SUFFIXES.fullmatch(name, len(own)) is not None


def _via(headers: Mapping[str, str]) -> str:
    """Return the proxies that a request came through."""
    via = headers.get("via", "").strip()
    return via if via.isascii() and via.isprintable() else ""


def _standard(request: BackendRequest, again: Callable[[], BackendRequest]) -> Callable[[], BackendRequest]:
    """Return what makes *request* in the standard shape, which it mostly has already."""
    return again if request.was_lite_encoded else lambda: request


def _untranslated(
    capability: str,
    raw: bytes,
    headers: Mapping[str, str],
    refusal: RequestError,
    *,
    catalog: Catalog,
    caller: Caller,
    engine: str | None,
    query: str,
) -> Decoded:
    """Return a request that goes as it came or not at all.

    Raises:
        RequestError: If nothing can be made of it at all.
    """
    try:
        native, fields = read_native(capability, raw, headers, engine=engine)
    except RequestError:
        if capability == "embeddings":
            raise
        raise refusal from None
    if (capability == "edits" and fields.get("stream")) or (
        capability == "responses" and fields.get("background")
    ):
        # Nobody streams the one; and an answer that is to be fetched later cannot be fetched here.
        raise refusal
    native.refusal, native.caller, native.query = refusal, caller.id, query
    native.via = _via(headers)
    items = fields.get("messages", fields.get("input", fields.get("prompt")))
    resolved = catalog.resolve(native.model).model
    # It is not translated, and so not asked of the accounts' model that may stand for it.
    model = resolved if _stands_for_itself(native.model, resolved) else native.model
    survey = Survey.of(items) if capability == "responses" else Survey()
    request = BackendRequest(
        endpoint=capability,
        asked_model=native.model,
        model=model,
        body=b"",
        stream=native.stream,
        is_codex=is_codex_client(headers),
        binding=bind(
            caller.id,
            headers,
            fields,
            model=model,
            instructions=fields.get("instructions", fields.get("system")),
            # What is embedded is no conversation: one caller's requests stay together.
            items=None if capability == "embeddings" else items if isinstance(items, list | str) else [],
        ),
        # Its price depends on it; what is no word has none.
        service_tier=tier
        if isinstance(tier := fields.get("service_tier"), str | None)
        else type(tier).__name__,
        max_output_tokens=None if (limit := _limit_in(fields)) is None else limit * _answers_in(fields),
        encrypted=tuple(survey.encrypted),
        compacted=tuple(survey.compacted),
        input_bytes=len(raw) - sum(map(len, _OPAQUE.findall(raw))),
        context_window=facts.context_window if (facts := catalog.facts(model)) is not None else 0,
        native=native,
    )
    wants_usage = native.wants_usage

    def make(around: Surroundings) -> Silent:
        return Silent(watcher_for(capability, around.now, wants_usage=wants_usage), request)

    return Decoded(request, make)


def _limit_in(fields: JsonObject) -> int | None:
    for name in LIMITS:
        value: Any = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _answers_in(fields: JsonObject) -> int:
    """Return how many answers a request has, each of which may grow up to its limit."""
    counts = [fields.get("n"), fields.get("best_of")]
    prompts = fields.get("prompt")
    each = max([one for one in counts if isinstance(one, int)], default=1)
    # Of several prompts each is a text, or a list of tokens; a list of numbers is one prompt.
    is_many = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return max(each, 1) * (len(prompts) if isinstance(prompts, list) and is_many else 1)


class Silent:
    """The encoder of a request that nobody can translate: it only knows how its dialect waits, and breaks off."""

    def __init__(self, watcher: Watcher, request: BackendRequest) -> None:
        self._watcher = watcher
        self._request = request
        self.usage = Usage()
        self.ended: End | None = None
        self.failure: UpstreamError | None = None
        self.ended_early = False
        self.delivered = 0

    @property
    def finished(self) -> bool:
        """Whether it has been broken off."""
        return self.ended is not None

    def encode(self, batch: Batch) -> bytes:
        """Take no events."""
        raise AssertionError("nothing is translated for this request")

    def whole(self) -> bytes:
        """Have no answer."""
        raise AssertionError("nothing is translated for this request")

    def keepalive(self) -> bytes:
        """Return the dialect's sign of life."""
        return self._watcher.keepalive()

    def cut(self, error: ProxyError) -> bytes:
        """Return the dialect's own end for *error*."""
        self.ended = End.FAILED
        return self._watcher.cut(error)

    def estimate(self) -> Usage:
        """Return what was sent, as an estimate."""
        self.usage = self._watcher.estimate(self._request.input_bytes)
        return self.usage
