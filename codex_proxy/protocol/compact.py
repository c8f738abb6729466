"""The endpoints whose bodies pass as they are, and the one that is answered here.

Compaction, the Codex client's web search and its pictures go upstream as they came; they are
read only for what choosing an account needs. A token count needs no account at all.
"""

from collections.abc import Mapping

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import bind
from codex_proxy.protocol.catalog import AUTO, PRIORITY, Catalog, Resolved
from codex_proxy.protocol.request import (
    LITE_HEADER,
    ROUTING_HINT,
    TURN_STATE,
    BackendRequest,
    forwardable,
    is_codex_client,
    model_of,
    parse_body,
    render_body,
    set_routing_hint,
    set_session,
)
from codex_proxy.protocol.responses_request import Survey, check_countable
from codex_proxy.protocol.wire import JsonObject

COMPACT = "responses/compact"
SEARCH = "alpha/search"
IMAGES = ("images/generations", "images/edits")
PASSTHROUGH = (COMPACT, SEARCH, *IMAGES)
"""The endpoints that `decode_passthrough` knows."""

_JSON = "application/json"


def decode_passthrough(
    endpoint: str, raw: bytes, headers: Mapping[str, str], *, catalog: Catalog, caller: str = ""
) -> BackendRequest:
    """Decode a request whose body is not ours to change; *headers* have lower-case names.

    Only a suffix in the model of a compaction is resolved, because the backend knows none.

    Raises:
        RequestError: If a body that calls itself JSON is no JSON object, or a compaction
            names no model or wants a stream.
    """
    content_type = headers.get("content-type") or _JSON
    is_codex = is_codex_client(headers)
    body: JsonObject = {}
    model = asked = ""
    sent = raw
    if endpoint == COMPACT:
        body = parse_body(raw)
        asked = model_of(body)
        resolved = catalog.resolve(asked)
        model = resolved.model
        if _prepare_compaction(body, resolved, asked, catalog):
            sent = render_body(body)
    elif _is_json(content_type):
        body = parse_body(raw)
        if body.get("model") is not None:
            model = asked = model_of(body)

    lite = headers.get(LITE_HEADER, "").strip().lower() == "true"
    tier = body.get("service_tier")
    tier = tier if isinstance(tier, str) else None
    forwarded = forwardable(headers, is_codex)
    if is_codex and (endpoint == COMPACT or (model and ROUTING_HINT in headers)):
        set_routing_hint(forwarded, model, tier)
    if lite:
        forwarded[LITE_HEADER] = "true"
    binding = bind(
        caller,
        headers,
        body,
        model=model,
        instructions=body.get("instructions"),
        # The turns of the conversation begin in the same way, and are in their account's cache.
        items=body.get("input") if endpoint == COMPACT else None,
    )
    if endpoint == COMPACT and not is_codex:
        cache_key = body.get("prompt_cache_key")
        set_session(forwarded, cache_key if isinstance(cache_key, str) else None, binding)
    survey = Survey.of(body.get("input"))
    metadata = body.get("client_metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    turn_state = metadata.get(TURN_STATE)
    return BackendRequest(
        endpoint=endpoint,
        asked_model=asked,
        model=model,
        body=sent,
        content_type=content_type,
        stream=endpoint in IMAGES and body.get("stream") is True,
        is_codex=is_codex,
        lite=lite,
        binding=binding,
        service_tier=tier,
        headers=forwarded,
        turn_state=headers.get(TURN_STATE) or (turn_state if isinstance(turn_state, str) else None),
        encrypted=tuple(survey.encrypted),
        compacted=tuple(survey.compacted),
        input_bytes=max(len(sent) - survey.opaque_bytes, 0) if body else 0,
        has_body_turn_state=TURN_STATE in metadata,
    )


def _prepare_compaction(body: JsonObject, resolved: Resolved, asked: str, catalog: Catalog) -> bool:
    """Check a compaction and resolve its model; tell whether the body was changed."""
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise RequestError("stream must be a boolean", param="stream", code="invalid_type")
    if stream:
        raise RequestError(
            "a compaction is answered as one object; leave stream out",
            param="stream",
            code="unsupported_value",
        )
    if body.get("previous_response_id"):
        raise RequestError(
            "previous responses are not stored here; send the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    changed = False
    if "stream" in body:
        # The backend's endpoint has no such field.
        del body["stream"]
        changed = True
    if resolved.model != asked:
        body["model"] = resolved.model
        changed = True
    if resolved.fast and catalog.has_fast(resolved.model):
        body["service_tier"] = PRIORITY
        changed = True
    if resolved.effort is not None:
        reasoning = body.get("reasoning")
        reasoning = dict(reasoning) if isinstance(reasoning, dict) else {}
        reasoning.pop("effort", None)
        if resolved.effort != AUTO:
            reasoning["effort"] = catalog.nearest(resolved.model, resolved.effort)
        body.pop("reasoning", None)
        if reasoning:
            body["reasoning"] = reasoning
        changed = True
    return changed


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == _JSON or kind.endswith("+json")


def decode_count(raw: bytes) -> JsonObject:
    """Read the body of `POST /v1/responses/input_tokens`; the backend has no such endpoint.

    Raises:
        RequestError: If the body is not what the API says.
    """
    body = parse_body(raw)
    check_countable(body)
    return body


def render_count(tokens: int) -> JsonObject:
    """Return the answer to it."""
    return {"object": "response.input_tokens", "input_tokens": tokens}
