"""What goes upstream, as golden cases show it."""

from typing import Any

from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.wire import loads_lenient

DERIVED = "conv_..."
"""What stands for a name that was made for a conversation: a digest says nothing to a reader."""


def shown(request: BackendRequest) -> dict[str, Any]:
    """Return the body that goes upstream, with `DERIVED` for a name that we made."""
    body: dict[str, Any] = loads_lenient(request.body)
    if request.binding is not None and body.get("prompt_cache_key") == request.binding.key:
        body["prompt_cache_key"] = DERIVED
    return body
