"""Connections to the backend that are open before a request needs one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import connector, web
from aiohttp.test_utils import TestServer

from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.store import Scan
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background
from tests.accounts.making import NOW, credential


class Backend:
    """A server that remembers who asked it for what, and on which connection."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.seen.append((request.method, request.path, request.transport.get_extra_info("peername")))
        return web.json_response({"models": []}, status=403 if request.method == "HEAD" else 200)

    @property
    def connections(self) -> list[Any]:
        return [peer for _, _, peer in self.seen]


@contextlib.asynccontextmanager
async def keeping(folder: Path, **settings: Any) -> AsyncIterator[tuple[Backend, Keeper]]:
    backend = Backend()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", backend.handle)
    async with TestServer(app) as server:
        live = Live(
            Settings(
                auth_dir=folder,
                data_dir=folder,
                base_url=str(server.make_url("/backend-api/codex")),
                **settings,
            )
        )
        clock, background, outbound = ManualClock(NOW), Background(), Outbound(live)
        pool = Pool(clock)
        pool.apply(Scan([credential("a")], []))
        try:
            yield backend, Keeper(pool, live=live, clock=clock, background=background, outbound=outbound)
        finally:
            await background.aclose()
            await outbound.aclose()


class Ahead:
    """The time by which idle connections are counted, which a test can move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real, self.seconds = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.seconds)
        monkeypatch.setattr(connector, "monotonic", lambda: real() + self.seconds)

    async def by(self, seconds: float) -> None:
        self.seconds += seconds
        # What was to be tidied up until then is.
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.mark.parametrize("interval", [60.0, 300.0])
async def test_the_next_request_finds_the_warm_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    async with keeping(tmp_path, keepalive_interval=interval) as (backend, keeper):
        ahead = Ahead(monkeypatch)
        await keeper.keep_connections()
        for _ in range(5):
            # A little late, as timers are.
            await ahead.by(interval + 5)
            await keeper.keep_connections()
        await ahead.by(interval)
        await keeper.fetch_models()
        assert [(method, path) for method, path, _ in backend.seen] == [
            *[("HEAD", "/backend-api")] * 6,
            ("GET", "/backend-api/codex/models"),
        ]
        assert len(set(backend.connections)) == 1


async def test_a_connection_that_is_not_kept_warm_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with keeping(tmp_path, keepalive_interval=60.0) as (backend, keeper):
        ahead = Ahead(monkeypatch)
        await keeper.keep_connections()
        await ahead.by(1_000)
        await keeper.keep_connections()
        assert len(set(backend.connections)) == 2
