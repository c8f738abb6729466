"""The stream of somebody who looks on: frames as there are any, until they leave or sleep, or the daemon ends."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from aiohttp import web

from codex_proxy.server.front import Incoming

# Whoever takes nothing for so long is gone, or asleep, and comes back by itself.
_STALL_SECONDS = 30.0

Pause = Callable[[float], Awaitable[bool]]
"""Waits so many seconds; False at once when it is time to end."""


async def tell(
    request: Incoming, headers: Mapping[str, str], frames: Callable[[Pause], AsyncGenerator[bytes, None]]
) -> web.StreamResponse:
    """Write *frames* as they come; what makes them ends when `Pause` says so."""
    response = web.StreamResponse(
        headers={
            **headers,
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            # nginx would hold the frames back.
            "X-Accel-Buffering": "no",
        }
    )
    if request.method == "HEAD":
        return response
    ending = asyncio.Event()

    def end() -> None:
        ending.set()
        if request.protocol.writing_paused:
            # It takes nothing, so it would not take its end either.
            _abort(request)

    async def pause(seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), seconds)
        return not ending.is_set()

    request.in_work.on_closing(end)
    if request.in_work.is_closing:
        # It came over a connection from before that.
        ending.set()
    try:
        await response.prepare(request)
        async with contextlib.aclosing(frames(pause)) as made:
            async for data in made:
                async with asyncio.timeout(_STALL_SECONDS):
                    await response.write(data)
        await response.write_eof()
    except ConnectionError:
        # Nobody looks any more.
        pass
    except TimeoutError:
        _abort(request)
    finally:
        request.in_work.forget(end)
    return response


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
