"""Upstreams over HTTP: how they do, and those that are added while the daemon runs.

What the configuration says is read only here. What is added is kept in the ledger's database, so it needs one.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from codex_proxy.config import BadUpstream, Upstream, read_upstream
from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.server.gateway import shapes
from codex_proxy.server.gateway.desk import Call, Desk, maybe_when
from codex_proxy.server.gateway.shapes import (
    HealthCheck,
    HealthResult,
    NewUpstream,
    Nothing,
    UpstreamChange,
    UpstreamList,
)


async def list_upstreams(desk: Desk, call: Call[Nothing, Nothing]) -> UpstreamList:
    """List the upstreams, and how they do."""
    return UpstreamList(
        upstreams=[_shape(one) for one in desk.providers.state()],
        can_add=desk.has_ledger,
    )


async def get_upstream(desk: Desk, call: Call[Nothing, Nothing]) -> shapes.Upstream:
    """Return one upstream."""
    return _one(desk, call.name)


async def add_upstream(desk: Desk, call: Call[Nothing, NewUpstream]) -> shapes.Upstream:
    """Add an upstream; it serves from the next request on."""
    _ = desk.kept
    definition = _defined(_said(call.body))
    if definition.name == "health":
        raise RequestError("name: 'health' is what the path of all checks is called", param="name")
    if desk.providers.get(definition.name) is not None:
        raise RequestError(
            f"there is an upstream {definition.name!r} already", param="name", status=409, code="name_taken"
        )
    await desk.kept.put(definition, None, actor=call.actor)
    return _one(desk, definition.name)


async def update_upstream(desk: Desk, call: Call[Nothing, UpstreamChange]) -> shapes.Upstream:
    """Change an upstream that was added here; what is left out stays."""
    before = _editable(desk, call.name)
    news = _said(call.body)
    definition = _defined({**_as_said(before), **news, "name": before.name})
    if before.api_key and "api-key" not in news and _place(definition.base_url) != _place(before.base_url):
        raise RequestError(
            "api_key: has to be given again, because with this base_url it would be sent to another server",
            param="api_key",
        )
    await desk.kept.put(definition, before, actor=call.actor)
    return _one(desk, definition.name)


async def remove_upstream(desk: Desk, call: Call[Nothing, Nothing]) -> Nothing:
    """Take away an upstream that was added here; turns under way go on."""
    before = _editable(desk, call.name)
    await desk.kept.drop(before, actor=call.actor)
    return Nothing()


async def upstreams_health(desk: Desk, call: Call[Nothing, Nothing]) -> HealthCheck:
    """Tell what the last checks have found."""
    results = [_result(one["check"]) for one in desk.providers.state()]
    asked = sum(one.checked_at is not None for one in results)
    return HealthCheck(checked=asked, total=len(results), results=results)


async def check_upstreams(desk: Desk, call: Call[Nothing, Nothing]) -> HealthCheck:
    """Check all upstreams now."""
    results = [_result(one) for one in await desk.providers.check_all()]
    return HealthCheck(checked=len(results), total=len(results), results=results)


async def check_upstream(desk: Desk, call: Call[Nothing, Nothing]) -> HealthResult:
    """Check one upstream now."""
    found = await desk.providers.check_one(call.name)
    if found is None:
        raise _unknown(call.name)
    return _result(found)


# -- what is said of one ------------------------------------------------------------------


def _said(body: msgspec.Struct) -> dict[str, Any]:
    """Return what a body says, by the names that the configuration has for it."""
    said = msgspec.to_builtins(body)
    return {name.replace("_", "-"): value for name, value in said.items()}


def _as_said(definition: Upstream) -> dict[str, Any]:
    """Return an upstream as one would write it, its key too."""
    return {
        "name": definition.name,
        "base-url": definition.base_url,
        "api-key": definition.api_key,
        "priority": definition.priority,
        "weight": definition.weight,
        "max-retries": definition.max_retries,
        "timeout": definition.timeout,
        "enabled": definition.enabled,
        "models": [name if not theirs else {name: theirs} for name, theirs in definition.models],
        "capabilities": list(definition.capabilities),
        "on-client-disconnect": definition.on_client_disconnect,
    }


def _defined(said: Mapping[str, Any]) -> Upstream:
    """Return the upstream that is said.

    Raises:
        RequestError: If it does not fit; it names the field.
    """
    try:
        return read_upstream(said)
    except BadUpstream as exc:
        raise RequestError(exc.message, param=exc.field.replace("-", "_")) from None


def _place(url: str) -> tuple[str, str]:
    """Return where a URL leads to, as far as it matters who reads what is sent there."""
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.lower()


def _editable(desk: Desk, name: str) -> Upstream:
    provider = desk.providers.get(name)
    if provider is None:
        raise _unknown(name)
    if provider.source == "config":
        raise RequestError(
            f"the upstream {name!r} stands in the configuration (upstreams), and is changed there",
            status=409,
            code="read_only",
        )
    return provider.definition


def _one(desk: Desk, name: str) -> shapes.Upstream:
    for one in desk.providers.state():
        if one["name"] == name:
            return _shape(one)
    raise _unknown(name)


def _unknown(name: str) -> RequestError:
    return RequestError(f"there is no upstream {name[:64]!r}", status=404, code="upstream_not_found")


def _shape(told: JsonObject) -> shapes.Upstream:
    check = told["check"]
    return shapes.Upstream(
        name=told["name"],
        base_url=told["base_url"],
        effective_url=told["effective_url"],
        has_key=bool(told["api_key"]),
        is_editable=not told["is_read_only"],
        priority=told["priority"],
        weight=told["weight"],
        max_retries=told["max_retries"],
        timeout=told["timeout"],
        enabled=told["enabled"],
        models=told["models"],
        capabilities=told["capabilities"],
        on_client_disconnect=told["on_client_disconnect"],
        state=told["state"],
        reason=told["reason"],
        checked_at=maybe_when(check["checked_at"]),
        check=_result(check),
        served_models=told["served_models"],
        in_flight=told["in_flight"],
        requests=told["requests"],
        errors=told["errors"],
        last_error=told["last_error"],
        last_used_at=maybe_when(told["last_used_at"]),
    )


def _result(told: JsonObject) -> HealthResult:
    return HealthResult(
        name=told["name"],
        state="unknown" if told["checked_at"] is None else "normal" if told["ok"] else "abnormal",
        standing=told["state"],
        status=told["status"],
        seconds=told["seconds"],
        message=told["message"],
        models=told["models"],
        checked_at=maybe_when(told["checked_at"]),
    )
