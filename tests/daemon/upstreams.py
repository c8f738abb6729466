"""The daemon between simulated accounts and simulated upstreams."""

import contextlib
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
    said = {"name": upstream.name, "base-url": upstream.base_url, "api-key": upstream.key}
    said["capabilities"] = ALL
    return {**said, **{name.replace("_", "-"): value for name, value in more.items()}}


class Stage(Stand):
    """A stand whose finished turns are kept."""

    traces: list[Trace]
    upstreams: dict[str, SimUpstream]

    @property
    def trace(self) -> Trace:
        """The last turn's story."""
        return self.traces[-1]

    async def state(self, name: str = "up") -> dict[str, Any]:
        """Return what the daemon says of one upstream."""
        return next(one for one in self.daemon.providers.state() if one["name"] == name)


@contextlib.asynccontextmanager
async def staged(
    folder: Path,
    *upstreams: SimUpstream,
    accounts: int = 0,
    each: dict[str, Any] | None = None,
    by_name: dict[str, dict[str, Any]] | None = None,
    **settings: object,
) -> AsyncIterator[Stage]:
    """Start everything; *each* is said of every upstream, *by_name* of one."""
    async with contextlib.AsyncExitStack() as stack:
        for one in upstreams:
            await stack.enter_async_context(one)
        entries = [entry(one, **(each or {}), **(by_name or {}).get(one.name, {})) for one in upstreams]
        stand = await stack.enter_async_context(
            standing(folder, accounts=accounts, upstreams=json.dumps(entries), **settings)
        )
        stand.__class__ = Stage
        assert isinstance(stand, Stage)
        stand.traces = []
        stand.upstreams = {one.name: one for one in upstreams}
        stand.daemon.executor.listen(stand.traces.append)
        await stand.until(lambda: all(one.check is not None for one in stand.daemon.providers.all()))
        for one in upstreams:
            one.clear()
        yield stand
