"""Compresses what goes up, for owners whose way up is narrow: an agent's body is 100 KB to 10 MB, and sent every turn.

The backend takes zstd, for so the Codex CLI sends its own turns. Nothing is known of its other endpoints, so they
get what they always got.
"""

import asyncio

from codex_proxy.compression import zstd
from codex_proxy.protocol.request import BackendRequest

PACKED_FROM = 64 * 1024
"""Which bodies are worth it: a shorter one is a few packets either way."""

# What is done at once takes 2 ms or so. A longer body would hold up every stream, and goes to a thread.
_AT_ONCE = 256 * 1024

# The library's own choice: level 6 takes three times as long, for a tenth less.
_LEVEL = 3


def is_worth_packing(request: BackendRequest, body: bytes) -> bool:
    """Tell whether *body*, as an account gets it, is one to compress."""
    return len(body) >= PACKED_FROM and request.endpoint == "responses"


async def packed(request: BackendRequest, body: bytes) -> bytes:
    """Return *body* compressed; a further attempt with the same body does not do it again."""
    kept = request.packed
    if kept is not None and kept[0] is body:
        return kept[1]
    if len(body) <= _AT_ONCE:
        data = zstd.compress(body, _LEVEL)
    else:
        data = await asyncio.to_thread(zstd.compress, body, _LEVEL)
    request.packed = (body, data)
    return data
