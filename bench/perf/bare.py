"""The bare row: aiohttp's server, our transport and our dialects, without accounts, keys, limits and logs.

    python -m bench.perf.bare BASE_URL

What the whole daemon costs beyond this is what it does for its owner. It knows one backend, gives up at the
first trouble, and serves nobody but the bench.
"""

import asyncio
import gc
import importlib
import signal
import sys
import time
from collections.abc import Mapping

from aiohttp import web

from codex_proxy.config import Live, load
from codex_proxy.net import Deadlines, Outbound
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.chat import CHAT
from codex_proxy.protocol.dialect import Dialect, Surroundings
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.sse import Parser
from codex_proxy.server.app import SERVER_OPTIONS
from codex_proxy.server.eventstream import EventStream
from codex_proxy.server.front import Front, Incoming, new_id

ROUTES: Mapping[str, Dialect] = {
    "/v1/responses": RESPONSES,
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
}
_HEADERS = {
    "authorization": "Bearer made-up",
    "content-type": "application/json",
    "accept": "text/event-stream",
}
_DEADLINES = Deadlines(10.0, 120.0, 300.0)
_STALL_SECONDS = 300.0


class Bare:
    """Translates, and nothing else."""

    def __init__(self, outbound: Outbound, base_url: str) -> None:
        self._outbound = outbound
        self._url = f"{base_url}/responses"
        self._catalog = Catalog()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one request."""
        assert isinstance(request, Incoming)
        dialect = ROUTES[request.path]
        decoded = dialect.decode(await request.content.read(), {}, catalog=self._catalog)
        answer = await self._outbound.open(
            "POST",
            self._url,
            headers=_HEADERS,
            body=decoded.request.body_for(None),
            deadlines=_DEADLINES,
            may_repeat=True,
        )
        try:
            encoder = decoded.make_encoder(Surroundings(now=time.time, unique=new_id()))
            stream = EventStream(request, {}, _STALL_SECONDS)
            parser = Parser(runs=True)
            while not encoder.finished:
                chunk = answer.read_nowait()
                if chunk is None:
                    chunk = await answer.read()
                if not chunk:
                    # An answer that was cut must not look like one that ended.
                    stream.abort()
                    break
                batch = parser.feed(chunk)
                # As in the daemon: while a slow reader is waited for, what it will get is held once.
                del chunk
                data = encoder.encode(batch)
                del batch
                stream.put(data, is_last=encoder.finished)
                del data
                await stream.caught_up()
            while answer.read_nowait():
                pass
        finally:
            answer.release()
        return stream


async def serve(base_url: str) -> None:
    """Serve until SIGTERM."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    outbound = Outbound(Live(load(None, {"CODEX_PROXY_CONFIG": "/dev/null"}).settings))
    front = Front(Bare(outbound, base_url).handle)
    runner = web.ServerRunner(front.server(**SERVER_OPTIONS))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    gc.collect()
    gc.freeze()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await over.wait()


def main() -> None:
    """Run on uvloop where the daemon would."""
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(sys.argv[1]))


if __name__ == "__main__":
    main()
