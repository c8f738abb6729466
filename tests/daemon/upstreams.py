"""The daemon between simulated accounts and simulated upstreams."""

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from codex_proxy.simulator.upstream import SimUpstream
from codex_proxy.trace import Trace
from tests.harness import Stand, standing

ALL = ["responses", "chat", "completions", "engines", "edits", "embeddings", "messages"]


def entry(upstream: SimUpstream, **more: Any) -> dict[str, Any]:
    """Return what a configuration says of *upstream*; names with `_` for `-`."""
    said: dict[str, Any] = {
        "name": upstream.name,
        "base-url": upstream.base_url,
        "api-key": upstream.key,
        "capabilities": ALL,
    }
    return said | {name.replace("_", "-"): value for name, value in more.items()}


class Stage:
    """A stand with upstreams, whose finished turns are kept."""

    def __init__(self, stand: Stand, upstreams: dict[str, SimUpstream]) -> None:
        self.stand = stand
        self.upstreams = upstreams
        self.daemon = stand.daemon
        self.sim = stand.sim
        self.session = stand.session
        self.post = stand.post
        self.get = stand.get
        self.ask = stand.ask
        self.until = stand.until
        self.traces: list[Trace] = []
        stand.daemon.executor.listen(self.traces.append)

    @property
    def up(self) -> SimUpstream:
        """The upstream of that name."""
        return self.upstreams["up"]

    @property
    def trace(self) -> Trace:
        """The last turn's story."""
        return self.traces[-1]

    def state(self, name: str = "up") -> dict[str, Any]:
        """Return what the daemon says of one upstream."""
        return next(one for one in self.daemon.providers.state() if one["name"] == name)

    def afresh(self) -> None:
        """Let everybody be well, and nothing be known of what was."""
        providers = self.daemon.providers
        definitions = [one.definition for one in providers.all()]
        providers.replace([], source="config")
        providers.replace(definitions, source="config")
        for one in self.upstreams.values():
            one.well()
            one.clear()
            one.says, one.delay = None, 0.0
        self.traces.clear()

    def set(self, **settings: Any) -> None:
        """Have other settings count."""
        live = self.daemon.live
        live.current = dataclasses.replace(live.current, **settings)

    def describe(self, **fields: Any) -> None:
        """Say something else of every upstream."""
        providers = self.daemon.providers
        definitions = [dataclasses.replace(one.definition, **fields) for one in providers.all()]
        providers.replace(definitions, source="config")


@contextlib.asynccontextmanager
async def staged(
    folder: Path,
    *upstreams: SimUpstream,
    accounts: int = 0,
    each: dict[str, Any] | None = None,
    by_name: dict[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> AsyncIterator[Stage]:
    """Start everything; *each* is said of every upstream, *by_name* of one."""
    async with contextlib.AsyncExitStack() as stack:
        for one in upstreams:
            await stack.enter_async_context(one)
        entries = [entry(one, **(each or {}), **(by_name or {}).get(one.name, {})) for one in upstreams]
        stand = await stack.enter_async_context(
            standing(folder, accounts=accounts, upstreams=json.dumps(entries), **settings)
        )
        stage = Stage(stand, {one.name: one for one in upstreams})
        await stage.until(lambda: all(one.check is not None for one in stage.daemon.providers.all()))
        for one in upstreams:
            one.clear()
        yield stage
