"""The usage endpoint, for tools that read the backend's: the quota of the pool, of no account.

It is there for status lines and the like. A Codex CLI whose `chatgpt_base_url` points here needs
more than this of that address, and does not work (docs/clients.md).
"""

from aiohttp import web

from codex_proxy.accounts.pool import Pool
from codex_proxy.config import Live
from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import dumps
from codex_proxy.server.front import Handler


class PoolUsage:
    """Answers what is left of the pool."""

    def __init__(self, pool: Pool, *, live: Live) -> None:
        self._pool = pool
        self._live = live

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by the names in `app.ROUTES`."""
        return {"usage": self.usage}

    async def usage(self, request: web.Request) -> web.StreamResponse:
        """Show the pool's quota in the shape of the backend.

        Raises:
            RequestError: If the pool's quota is not to be shown (`pool-limits: hide`).
        """
        if self._live.current.pool_limits != "show":
            raise RequestError("this proxy does not show its quota", code="not_found", status=404)
        return web.Response(
            body=dumps(self._pool.usage_page()),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )
