"""Health checks: what an answer to a check means, and when one is due."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings, read_upstream
from codex_proxy.net import NetError, NetKind, Outbound, Reply
from codex_proxy.tasks import Background
from codex_proxy.upstream.providers import CHECK_SECONDS, Providers

LIST = b'{"data":[{"id":"a"},{"id":"b"},{"id":"a"},{"id":7},{"no":1},"x"]}'


class Calls:
    """The way out, played."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.says: Reply | NetError = Reply(200, {}, LIST)
        self.wait = asyncio.Event()
        self.wait.set()

    async def fetch(self, method: str, url: str, *, headers: dict[str, str], **options: Any) -> Reply:
        assert (method, options["is_guarded"]) == ("GET", True)
        self.asked.append((url, headers))
        await self.wait.wait()
        if isinstance(self.says, NetError):
            raise self.says
        return self.says


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.calls = Calls()
        self.background = Background()
        self.providers = Providers(
            live=Live(Settings()),
            clock=self.clock,
            background=self.background,
            outbound=cast("Outbound", self.calls),
            origins=Origins(),
            rng=random.Random(1),
        )

    def describe(self, *entries: dict[str, Any]) -> None:
        upstreams = [read_upstream({"base-url": "http://127.0.0.1:1/v1", **one}) for one in entries]
        self.providers.replace(upstreams, source="config")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.background.aclose()


NAMED = {"name": "a", "api-key": "sk-canary-0123456789"}


@pytest.mark.parametrize(
    ("says", "ok", "state", "words"),
    [
        (Reply(200, {}, LIST), True, "healthy", "2 models"),
        (Reply(200, {}, b'{"models":[{"slug":"m"}]}'), True, "healthy", "it lists 1 model"),
        (Reply(200, {}, b"<html>"), False, "degraded", "no list of models"),
        (Reply(200, {}, b'{"data":{}}'), False, "degraded", "no list of models"),
        (Reply(401, {}, b"{}"), False, "disabled", "status 401"),
        # Keys of narrow rights may ask, and not list.
        (Reply(403, {}, b"<html>"), False, "healthy", "status 403"),
        (Reply(404, {}, b""), False, "healthy", "base-url"),
        (Reply(308, {}, b""), False, "degraded", "redirects"),
        (Reply(500, {}, b'{"error":{"message":"sk-canary-0123456789 broke"}}'), False, "degraded", "broke"),
        (NetError(NetKind.DNS, "dns failed for h"), False, "degraded", "dns failed"),
    ],
)
async def test_what_an_answer_means(
    bench: Bench, says: Reply | NetError, ok: bool, state: str, words: str
) -> None:
    bench.describe(NAMED)
    bench.calls.says = says
    (result,) = await bench.providers.check_all()
    assert (result["ok"], result["state"]) == (ok, state)
    assert words in result["message"]
    assert "canary" not in str(bench.providers.state())
    assert bench.calls.asked[0][0] == "http://127.0.0.1:1/v1/models"
    assert bench.calls.asked[0][1]["authorization"] == "Bearer sk-canary-0123456789"


async def test_anthropics_key_stands_where_it_looks_for_it(bench: Bench) -> None:
    bench.describe({**NAMED, "capabilities": ["messages"]})
    await bench.providers.check_all()
    headers = bench.calls.asked[0][1]
    assert headers["x-api-key"] == "sk-canary-0123456789"
    assert "authorization" not in headers
    assert headers["anthropic-version"]


async def test_each_is_checked_once_a_minute_more_or_less(bench: Bench) -> None:
    bench.describe(NAMED, {"name": "b"}, {"name": "off", "enabled": False})
    (job,) = bench.providers.jobs()
    times: list[float] = []
    for _ in range(200):
        before = len(bench.calls.asked)
        await job.run()
        times += [bench.clock.monotonic()] * (len(bench.calls.asked) - before)
        bench.clock.advance(job.every())
    span = times[-1] - times[0]
    assert len(times) == pytest.approx(2 * span / CHECK_SECONDS, rel=0.15)
    # Not all in one moment.
    assert len(set(times)) > len(times) / 2


async def test_a_change_is_looked_at_soon_and_none_is_asked_for_nothing(bench: Bench) -> None:
    (job,) = bench.providers.jobs()
    assert job.every() == 0
    bench.describe(NAMED)
    await job.run()
    await job.run()
    assert len(bench.calls.asked) == 1
    bench.describe({**NAMED, "api-key": "another"})
    await job.run()
    assert bench.calls.asked[-1][1]["authorization"] == "Bearer another"


async def test_who_asks_while_a_check_runs_joins_it(bench: Bench) -> None:
    bench.describe(NAMED)
    bench.calls.wait.clear()
    asking = [bench.background.spawn(bench.providers.check_all(), name=f"ask{n}") for n in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    bench.calls.wait.set()
    results = [await one for one in asking]
    assert len(bench.calls.asked) == 1
    assert all(one[0]["ok"] for one in results)
    # One that stops waiting stops nobody else.
    bench.calls.wait.clear()
    first = bench.background.spawn(bench.providers.check_all(), name="first")
    second = bench.background.spawn(bench.providers.check_all(), name="second")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    bench.calls.wait.set()
    assert (await second)[0]["ok"]


async def test_one_can_be_asked_for_by_name_or_before_it_is_there(bench: Bench) -> None:
    bench.describe(NAMED, {"name": "b"})
    assert await bench.providers.check_one("nobody") is None
    result = await bench.providers.check_one("a")
    assert result is not None
    assert result["ok"]
    tried = await bench.providers.try_out(read_upstream({"name": "new", "base-url": "http://h"}))
    assert (tried["name"], tried["ok"], tried["models"]) == ("new", True, 2)
    assert bench.providers.get("new") is None
    assert bench.providers.state()[1]["state"] == "unknown"


async def test_what_they_list_is_what_there_is(bench: Bench) -> None:
    bench.describe(NAMED, {"name": "b", "models": ["mine", "a*"]})
    version = bench.providers.version
    await bench.providers.check_all()
    assert bench.providers.listed() == ["a", "b", "mine"]
    assert bench.providers.version > version
    version = bench.providers.version
    await bench.providers.check_all()
    assert bench.providers.version == version
    assert bench.providers.count() == (2, 2)
