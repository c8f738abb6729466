"""Every setting that counts at once: an edit of the real file, and its effect on what callers get."""

import asyncio
import contextlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from codex_proxy import config, logs
from codex_proxy.config import KEYS, TRANSPORTS
from codex_proxy.net import http as net
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.book import Book
from codex_proxy.simulator import Simulator
from codex_proxy.simulator.upstream import SimUpstream
from codex_proxy.storage import store
from codex_proxy.upstream.packing import PACKED_FROM
from tests.daemon.sockets import line
from tests.harness import LITE, STANDARD, TRANSPORT, Stand, standing
from tests.net.peers import serving
from tests.process import client, running, write_config

TURN = {"model": STANDARD, "input": "hi"}


@pytest.fixture(autouse=True)
def level_is_kept() -> Iterator[None]:
    """The level of our loggers is the process's, not the test's."""
    ours = logging.getLogger("codex_proxy")
    before = ours.level
    yield
    ours.setLevel(before)


class Edits:
    """The daemon's configuration file, in the hands of its owner."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._file = stand.folder / "config.yaml"

    async def edit(self, **settings: object) -> None:
        """Change keys (`_` for `-`) and wait until they count."""
        text = await asyncio.to_thread(self._file.read_text, encoding="utf-8")
        names = {name.replace("_", "-"): value for name, value in settings.items()}
        lines = [line for line in text.splitlines() if line.partition(":")[0] not in names]
        lines += [f"{name}: {value}" for name, value in names.items()]
        live = self._stand.daemon.live
        before = live.current
        await asyncio.to_thread(self._file.write_text, "\n".join(lines) + "\n", encoding="utf-8")
        await self._stand.until(lambda: live.current is not before, 3.0)


@contextlib.asynccontextmanager
async def way_out(port: int) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Run a proxy that sends everything to *port*; yields its URL and the first line of each request."""
    seen: list[bytes] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, notes: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65_536):
                    if notes:
                        seen.append(data.partition(b"\r\n")[0])
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, back, notes=True), pump(there, writer, notes=False))

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        await server.wait_closed()


async def status(stand: Stand, **headers: str) -> int:
    return (await stand.post(body=TURN, headers=headers)).status


# --- one check for each key: before the edit, the edit, after it

Check = Callable[[Stand, Edits], Awaitable[None]]
CHECKS: dict[str, Check] = {}


def checks(key: str) -> Callable[[Check], Check]:
    def remember(check: Check) -> Check:
        CHECKS[key] = check
        return check

    return remember


@checks("proxy-url")
async def _(stand: Stand, edits: Edits) -> None:
    assert await status(stand) == 200
    async with way_out(stand.sim.port) as (url, seen):
        await edits.edit(proxy_url=url)
        assert await status(stand) == 200
        # A proxy is asked for the whole address.
        assert seen[-1].startswith(b"POST http://127.0.0.1:")
        count = len(seen)
        await edits.edit(proxy_url='""')
        assert await status(stand) == 200
        assert len(seen) == count
        await stand.daemon.outbound.aclose()


@checks("upstream-transport")
async def _(stand: Stand, edits: Edits) -> None:
    outbound = stand.daemon.outbound
    for name in sorted(TRANSPORTS, key=lambda name: name != TRANSPORT):
        if name != TRANSPORT:
            await edits.edit(upstream_transport=name)
        await outbound.aclose()
        assert await status(stand) == 200
        assert bool(outbound.native.statistics()["open"]) is (name == "native")


@checks("upstreams")
async def _(stand: Stand, edits: Edits) -> None:
    async with SimUpstream() as upstream:
        said = {"name": "up", "base-url": upstream.base_url, "api-key": upstream.key, "priority": -1}
        await edits.edit(upstreams=json.dumps([said]))
        assert await status(stand) == 200
        assert len(upstream.turns) == 1
        await edits.edit(upstreams="[]")
        assert await status(stand) == 200
        assert len(upstream.turns) == 1


@checks("accounts-priority")
async def _(stand: Stand, edits: Edits) -> None:
    async with SimUpstream() as upstream:
        said = {"name": "up", "base-url": upstream.base_url, "api-key": upstream.key}
        await edits.edit(upstreams=json.dumps([said]))
        for priority, turns in ((20, 1), (0, 1)):
            await edits.edit(accounts_priority=priority)
            assert await status(stand) == 200
            assert len(upstream.turns) == turns


@checks("compress-uploads")
async def _(stand: Stand, edits: Edits) -> None:
    long = {**TURN, "input": "hi" * PACKED_FROM}
    # Without quotes it is no text but false.
    for value, coding in (("zstd", "zstd"), ("off", None)):
        await edits.edit(compress_uploads=value)
        assert (await stand.post(body=long)).status == 200
        assert stand.sim.turns[-1].headers.get("content-encoding") == coding


@checks("log-level")
async def _(stand: Stand, edits: Edits) -> None:
    edge = logging.getLogger("codex_proxy.server.middleware")
    assert not edge.isEnabledFor(logging.DEBUG)
    await edits.edit(log_level="debug")
    assert edge.isEnabledFor(logging.DEBUG)
    await edits.edit(log_level="error")
    assert not edge.isEnabledFor(logging.WARNING)


@checks("log-format")
async def _(stand: Stand, edits: Edits) -> None:
    stream = io.StringIO()
    handler = logs.setup("info", stream)
    try:
        await status(stand)
        await edits.edit(log_format="json")
        await status(stand)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.captureWarnings(False)
        logging.getLogger("aiohttp.access").disabled = False
    turns = [line for line in stream.getvalue().splitlines() if "responses" in line]
    assert " turn id=req_" in turns[0]
    assert json.loads(turns[1])["event"] == "turn"


@checks("alerts")
async def _(stand: Stand, edits: Edits) -> None:
    alerts = stand.daemon.alerts
    stand.known(stand.accounts[0]).login_lost = "invalid_grant"
    await alerts.look()
    assert alerts.firing() == []
    await edits.edit(alerts="{account-needs-login: {for: 0}}")
    await alerts.look()
    assert [told["name"] for told in alerts.firing()] == ["account-needs-login"]
    await edits.edit(alerts="{account-needs-login: off}")
    await alerts.look()
    await alerts.look()
    assert alerts.firing() == []


@checks("alert-webhooks")
async def _(stand: Stand, edits: Edits) -> None:
    got: list[bytes] = []

    async def take(request: web.Request) -> web.StreamResponse:
        got.append(await request.read())
        return web.Response()

    stand.known(stand.accounts[0]).login_lost = "invalid_grant"
    async with serving(take) as url:
        await edits.edit(alert_webhooks=f"[{url}/token]", alerts="{account-needs-login: {for: 0}}")
        await stand.daemon.alerts.look()
        await stand.until(lambda: len(got) == 1)
        await edits.edit(alert_webhooks="[]")
        stand.known(stand.accounts[1]).login_lost = "invalid_grant"
        await stand.daemon.alerts.look()
        await asyncio.sleep(0.05)
    assert len(got) == 1
    assert b"account-needs-login" in got[0]


@checks("metrics")
async def _(stand: Stand, edits: Edits) -> None:
    assert (await stand.get("/metrics")).status == 200
    await edits.edit(metrics="off")
    assert (await stand.get("/metrics")).status == 404
    await edits.edit(metrics="open", api_keys="[first-client-key]")
    assert (await stand.get("/metrics")).status == 200
    await edits.edit(metrics="keyed")
    assert (await stand.get("/metrics")).status == 401


@checks("refresh-interval")
async def _(stand: Stand, edits: Edits) -> None:
    assert stand.daemon.keeper.exchanges.seconds_to_next() == 3000
    await edits.edit(refresh_interval="500ms")
    assert stand.daemon.keeper.exchanges.seconds_to_next() == 0.5


@checks("max-retry")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(max_retry=0)
    stand.sim.set_all("server_error")
    assert await status(stand) == 429
    assert len(stand.sim.turns) == 1
    await edits.edit(max_retry=1)
    assert await status(stand) == 429
    assert len(stand.sim.turns) == 3


@checks("health-check-interval")
async def _(stand: Stand, edits: Edits) -> None:
    assert not stand.sim.requests
    for account in stand.daemon.pool:
        account.quota.seen_at = None
    await edits.edit(health_check_interval="10ms")
    await stand.until(lambda: any(r.path.endswith("/wham/usage") for r in stand.sim.requests), 2.0)


@checks("health-check-max-failures")
async def _(stand: Stand, edits: Edits) -> None:
    # Refused whatever is sent, fresh tokens too.
    stand.sim.set_all("unauthorized", times=1000)
    await stand.post("/check-quota")
    assert (await stand.stats())["summary"]["needs_login"] == 0
    await edits.edit(health_check_max_failures=1)
    await stand.post("/check-quota")
    assert (await stand.stats())["summary"]["needs_login"] == len(stand.accounts)


@checks("health-check-concurrency")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(health_check_concurrency=1)
    assert await most_at_once(stand, "/check-quota") == 1
    await edits.edit(health_check_concurrency=3)
    assert await most_at_once(stand, "/check-quota") == 3


@checks("refresh-concurrency")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(refresh_concurrency=1)
    for account in stand.accounts:
        account.set("ok", refresh="slow", refresh_seconds=0.05)
    begun = time.monotonic()
    await stand.post("/refresh")
    assert time.monotonic() - begun >= 0.05 * len(stand.accounts)


async def most_at_once(stand: Stand, path: str) -> int:
    """Return how many requests of a round the backend had at a time, at most."""
    stand.sim.latency = 0.03
    for account in stand.accounts:
        account.set("slow", delay=0.03, everywhere=True)
    done = asyncio.get_running_loop().create_task(stand.post(path))
    most = 0
    before = len(stand.sim.requests)
    while not done.done():
        most = max(most, sum(not r.closed.is_set() for r in stand.sim.requests[before:]))
        await asyncio.sleep(0.001)
    assert (await done).status == 200
    return most


@checks("api-keys")
async def _(stand: Stand, edits: Edits) -> None:
    assert await status(stand) == 200
    await edits.edit(api_keys="[first-client-key]")
    assert await status(stand) == 401
    assert await status(stand, Authorization="Bearer first-client-key") == 200
    await edits.edit(api_keys="[other-client-key]")
    assert await status(stand, Authorization="Bearer first-client-key") == 401
    assert await status(stand, **{"x-api-key": "other-client-key"}) == 200
    await edits.edit(api_keys="[]")
    assert await status(stand) == 200


@checks("admin-key")
async def _(stand: Stand, edits: Edits) -> None:
    owner = {"Authorization": "Bearer an-admin-key-of-ours"}
    assert (await stand.get("/stats")).status == 200
    await edits.edit(admin_key="an-admin-key-of-ours")
    assert (await stand.get("/stats")).status == 401
    assert (await stand.get("/stats", headers=owner)).status == 200
    assert await status(stand) == 200
    await edits.edit(admin_key='""')
    assert (await stand.get("/stats")).status == 200


@checks("ui")
async def _(stand: Stand, edits: Edits) -> None:
    assert (await stand.get("/ui")).status == 200
    await edits.edit(ui="off")
    assert (await stand.get("/ui")).status == 404
    await edits.edit(ui="on")
    assert (await stand.get("/ui")).status == 200


async def on_record(stand: Stand, count: int) -> list[str]:
    """Wait until so many requests are on record, and return their ids."""
    found: list[str] = []

    async def look() -> bool:
        found[:] = [one["id"] for one in (await stand.get("/requests")).json["requests"]]
        return len(found) == count

    deadline = time.monotonic() + 8.0
    while not await look():
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


async def tend_now(stand: Stand) -> None:
    """Have old records looked for now."""
    kept = stand.daemon.records._store
    assert kept is not None
    kept._tend_at = 0.0


@checks("records")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on")
    assert await status(stand) == 200
    await on_record(stand, 1)
    await edits.edit(records="off")
    assert await status(stand) == 200
    await edits.edit(records="on")
    # What was asked meanwhile is on no record.
    await on_record(stand, 1)


@checks("records-max-age")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on")
    assert await status(stand) == 200
    await on_record(stand, 1)
    await edits.edit(records_max_age="1ms")
    await tend_now(stand)
    await on_record(stand, 0)


@checks("records-max-size")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on")
    for _ in range(3):
        assert await status(stand) == 200
    await on_record(stand, 3)
    book = Book(stand.daemon.live, stand.daemon.clock)
    await edits.edit(records_max_size="5MiB")
    kept = stand.daemon.records._store
    assert kept is not None
    sizes: list[int] = []

    def size(connection: Any, *, max_bytes: int, **_: object) -> bool:
        sizes.append(max_bytes)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codex_proxy.records.book.prune", size)
        await asyncio.to_thread(kept.read, book.tend)
    assert sizes == [5 * 2**20]


async def said_of(stand: Stand, *, text: str) -> JsonObject | None:
    """Ask, and return what is kept of what was said."""
    answer = await stand.ask(text)
    request_id = answer.headers["x-request-id"]
    deadline = time.monotonic() + 8.0
    while True:
        told = (await stand.get(f"/requests/{request_id}")).json
        rows = [one["id"] for one in (await stand.get("/requests")).json["requests"]]
        if request_id in rows:
            told = (await stand.get(f"/requests/{request_id}")).json
            capture: JsonObject | None = told["capture"]
            return capture
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@checks("capture")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on")
    assert await said_of(stand, text="for nobody") is None
    await edits.edit(capture="[local]")
    kept = await said_of(stand, text="for its owner")
    assert kept is not None
    assert "for its owner" in kept["request"]
    await edits.edit(capture="[]")
    assert await said_of(stand, text="for nobody") is None


@checks("capture-limit")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on", capture="[local]", capture_limit="1KiB")
    kept = await said_of(stand, text="x" * 5_000)
    assert kept is not None
    assert (len(kept["request"]), kept["is_cut"]) == (1024, True)


@checks("capture-max-age")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(records="on", capture="[local]")
    assert await said_of(stand, text="for an hour") is not None
    await edits.edit(capture_max_age="1ms")
    await tend_now(stand)
    (request_id,) = await on_record(stand, 1)
    deadline = time.monotonic() + 8.0
    while (await stand.get(f"/requests/{request_id}")).json["capture"] is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@checks("allowed-hosts")
async def _(stand: Stand, edits: Edits) -> None:
    assert await status(stand, Host="proxy.lan") == 403
    await edits.edit(allowed_hosts="[proxy.lan]")
    assert await status(stand, Host="proxy.lan:8080") == 200
    assert await status(stand, Host="other.lan") == 403


@checks("trusted-proxies")
async def _(stand: Stand, edits: Edits) -> None:
    async def guess(address: str) -> int:
        body = {"key": "no key of anybody"}
        answer = await stand.post("/ui/api/session", body, headers={"X-Forwarded-For": address})
        return answer.status

    # Whoever says so is not believed, so all of them come from one address.
    assert 429 in [await guess(f"198.51.{number}.1") for number in range(30)]
    await edits.edit(trusted_proxies="[127.0.0.0/8]")
    assert await guess("203.0.113.1") == 401


async def deadlines_of(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> list[net.Deadlines]:
    seen: list[net.Deadlines] = []
    real = net.Outbound.open

    async def spy(self: net.Outbound, method: str, url: str, **rest: object) -> net.Answer:
        deadlines = rest["deadlines"]
        assert isinstance(deadlines, net.Deadlines)
        seen.append(deadlines)
        return await real(self, method, url, **rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(net.Outbound, "open", spy)
        assert await status(stand) == 200
    return seen


@checks("connect-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    # A connection that takes its time cannot be had on loopback: what is asked for is looked at.
    with pytest.MonkeyPatch.context() as patch:
        assert [d.connect for d in await deadlines_of(stand, patch)] == [10.0]
        await edits.edit(connect_timeout="3s")
        assert [d.connect for d in await deadlines_of(stand, patch)] == [3.0]


@checks("first-byte-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(first_byte_timeout="50ms", max_retry=0)
    stand.sim.set_all("stall", where="headers")
    begun = time.monotonic()
    assert await status(stand) == 429
    assert time.monotonic() - begun < 2
    await stand.until(lambda: stand.sim.turns[0].cancelled)


@checks("compact-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(compact_timeout="50ms", max_retry=0)
    stand.sim.set_all("stall", where="headers")
    begun = time.monotonic()
    assert (await stand.post("/v1/responses/compact", {**TURN, "input": []})).status == 429
    assert time.monotonic() - begun < 2


@checks("idle-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(idle_timeout="50ms", max_retry=0)
    stand.sim.set_all("stall", where="middle")
    answer = await stand.ask("hi")
    assert answer.types[-1] == "response.failed"


@checks("keep-alive-after")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(keep_alive_after="20ms")
    stand.sim.set_all("stall", where="middle", seconds=0.15)
    answer = await stand.ask("hi", codex=True)
    assert "keepalive" in answer.types
    assert answer.types[-1] == "response.completed"


@checks("hold-created")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(hold_created="30ms", idle_timeout="200ms", max_retry=0)
    stand.sim.set_all("stall", where="created")
    answer = await stand.ask("hi")
    # Held until the silence ends it, it would have been a status.
    assert answer.status == 200
    assert answer.types[0] == "response.created"


@checks("max-body-bytes")
async def _(stand: Stand, edits: Edits) -> None:
    body = {**TURN, "input": "x" * 2000}
    assert (await stand.post(body=body)).status == 200
    await edits.edit(max_body_bytes="1KiB")
    assert (await stand.post(body=body)).status == 413
    await edits.edit(max_body_bytes="1MiB")
    assert (await stand.post(body=body)).status == 200


@checks("enable-websocket")
async def _(stand: Stand, edits: Edits) -> None:
    async with line(stand) as caller:
        await caller.complete("hi")
        await edits.edit(enable_websocket=False)
        # Who is there may stay.
        await caller.complete("hi")
    with pytest.raises(aiohttp.WSServerHandshakeError, match="426"):
        async with line(stand):
            raise AssertionError("it opened")
    await edits.edit(enable_websocket=True)
    async with line(stand) as caller:
        await caller.complete("hi")


@checks("strategy")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(strategy="fill-first")
    for number in range(6):
        assert (await stand.post(body={**TURN, "input": f"question {number}"})).status == 200
    assert len({turn.account for turn in stand.sim.turns[-6:]}) == 1
    await edits.edit(strategy="round-robin")
    for number in range(6):
        assert (await stand.post(body={**TURN, "input": f"further question {number}"})).status == 200
    assert len({turn.account for turn in stand.sim.turns[-6:]}) == len(stand.accounts)


@checks("session-affinity")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(strategy="round-robin")
    body = {**TURN, "prompt_cache_key": "one conversation"}
    for _ in range(6):
        assert (await stand.post(body=body)).status == 200
    assert len({turn.account for turn in stand.sim.turns[-6:]}) == 1
    await edits.edit(session_affinity=False)
    for _ in range(6):
        assert (await stand.post(body=body)).status == 200
    assert len({turn.account for turn in stand.sim.turns[-6:]}) == len(stand.accounts)


@checks("session-affinity-ttl")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(strategy="round-robin")
    body = {**TURN, "prompt_cache_key": "one conversation"}
    for _ in range(4):
        assert (await stand.post(body=body)).status == 200
    assert len({turn.account for turn in stand.sim.turns[-4:]}) == 1
    await edits.edit(session_affinity_ttl="1ms")
    for _ in range(6):
        assert (await stand.post(body=body)).status == 200
        # A fast machine asks again within the millisecond.
        await asyncio.sleep(0.005)
    assert len({turn.account for turn in stand.sim.turns[-6:]}) == len(stand.accounts)


@checks("max-concurrency")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(max_concurrency=1, queue_timeout=0)
    stand.sim.set_all("stall", where="middle")
    async with contextlib.AsyncExitStack() as stack:
        for number in range(len(stand.accounts)):
            body = {**TURN, "input": f"question {number}", "stream": True}
            answer = await stack.enter_async_context(stand.session.post("/v1/responses", json=body))
            assert answer.status == 200
        assert await status(stand) == 429
        stand.sim.set_all("ok")
        await edits.edit(max_concurrency=2)
        assert await status(stand) == 200


@checks("queue-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(max_concurrency=1, queue_timeout=0)
    stand.sim.set_all("slow", per_event=0.05)
    asks = [stand.post(body={**TURN, "input": f"question {n}"}) for n in range(len(stand.accounts) + 2)]
    assert sorted(answer.status for answer in await asyncio.gather(*asks))[-2:] == [429, 429]
    await edits.edit(queue_timeout=20)
    asks = [stand.post(body={**TURN, "input": f"question {n}"}) for n in range(len(stand.accounts) + 2)]
    assert {answer.status for answer in await asyncio.gather(*asks)} == {200}


@checks("keepalive-interval")
async def _(stand: Stand, edits: Edits) -> None:
    def knocks() -> int:
        return sum(request.method == "HEAD" for request in stand.sim.requests)

    await edits.edit(keepalive_interval="100ms")
    await stand.until(lambda: knocks() >= 2, 5.0)
    await edits.edit(keepalive_interval=0)
    await asyncio.sleep(0.2)
    before = knocks()
    await asyncio.sleep(0.4)
    assert knocks() == before


@checks("pool-limits")
async def _(stand: Stand, edits: Edits) -> None:
    codex = {"originator": "codex_exec", "User-Agent": "codex_exec/0.169.0"}
    assert (await stand.post(body={**TURN, "stream": True}, headers=codex)).status == 200
    shown = await stand.post(body={**TURN, "stream": True}, headers=codex)
    assert "x-codex-primary-used-percent" in shown.headers
    await edits.edit(pool_limits="hide")
    hidden = await stand.post(body={**TURN, "stream": True}, headers=codex)
    assert not [name for name in hidden.headers if name.startswith("x-codex-primary")]
    assert "codex.rate_limits" not in hidden.types


@checks("drain-timeout")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(drain_timeout="50ms")
    stand.sim.set_all("stall", where="middle")
    async with stand.session.post("/v1/responses", json={**TURN, "stream": True}) as answer:
        begun = time.monotonic()
        await asyncio.wait_for(stand.daemon.stop(), 2)
        assert time.monotonic() - begun >= 0.05
        assert b"event: response.failed" in await answer.read()


@checks("originator")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(originator="my_house")
    assert await status(stand) == 200
    assert stand.sim.turns[-1].headers["originator"] == "my_house"


@checks("user-agent")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(user_agent="my-house/7")
    assert await status(stand) == 200
    assert stand.sim.turns[-1].headers["user-agent"] == "my-house/7"


@checks("model-profiles")
async def _(stand: Stand, edits: Edits) -> None:
    lite = "x-openai-internal-codex-responses-lite"
    stand.sim.wire = "any"
    await edits.edit(model_profiles=f"{{{STANDARD}: lite, {LITE}: standard}}")
    assert (await stand.ask("hi", model=STANDARD)).status == 200
    assert stand.sim.turns[-1].headers[lite] == "true"
    assert (await stand.ask("hi", model=LITE)).status == 200
    assert lite not in stand.sim.turns[-1].headers


@checks("model-map")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(model_map=f"{{my-own-*: {LITE}-high}}")
    assert (await stand.ask("hi", model="my-own-name")).status == 200
    sent = json.loads(stand.sim.turns[-1].body)
    assert (sent["model"], sent["reasoning"]["effort"]) == (LITE, "high")


@checks("models-client-version")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(models_client_version='"7.8.9"')
    for account in stand.daemon.pool:
        account.models_at = None
    stand.daemon.keeper._models_after.clear()
    await stand.daemon.keeper.fetch_models()
    lists = [r for r in stand.sim.requests if r.path.endswith("/models")]
    assert [r.query for r in lists] == ["client_version=7.8.9"] * len(stand.accounts)


@checks("max-turns")
async def _(stand: Stand, edits: Edits) -> None:
    await edits.edit(max_turns=1, queue_timeout=0)
    stand.sim.set_all("stall", where="middle")
    async with stand.asking() as answer:
        assert answer.status == 200
        assert await status(stand) == 429
        stand.sim.set_all("ok")
        await edits.edit(max_turns=2)
        assert await status(stand) == 200


@checks("reserve-tokens")
async def _(stand: Stand, edits: Edits) -> None:
    assert stand.daemon.books is not None
    ledger = stand.daemon.books.ledger
    user = await ledger.create_user("ada", is_billed=True, actor="test")
    # A cent: enough for a short answer alone.
    await ledger.credit(user.id, 10_000_000, reason="test", idempotency_key="cent", actor="test")
    _, text = await ledger.create_key(user.id, "laptop", actor="test")
    assert await status(stand, authorization=f"Bearer {text}") == 429
    await edits.edit(reserve_tokens=256)
    assert await status(stand, authorization=f"Bearer {text}") == 200


NEEDS: dict[str, dict[str, Any]] = {
    "max-turns": {"ledger": "personal"},
    "reserve-tokens": {"ledger": "billing"},
}
"""What has to be on for a key to have an effect."""


@pytest.mark.parametrize("key", [key.name for key in KEYS.values() if key.live])
async def test_an_edit_of_the_file_counts(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(store, "GATHER_SECONDS", 0.01)
    monkeypatch.setattr(store, "LOOK_SECONDS", 0.05)
    async with standing(tmp_path, accounts=4, **NEEDS.get(key, {})) as stand:
        await CHECKS[key](stand, Edits(stand))


# --- a real process, at its own pace


async def test_a_running_daemon_follows_its_file_within_two_seconds(tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        sim.write_auth_files(tmp_path / "auths")
        config_file = write_config(tmp_path, sim)
        async with running(config_file) as daemon, client(daemon.url) as session:

            async def saw(code: int, text: str = "hi") -> float:
                """Wait until a turn is answered with *code*; return how long that took."""
                begun = time.monotonic()
                while True:
                    body = {**TURN, "input": text}
                    async with session.post("/v1/responses", json=body) as answer:
                        await answer.read()
                        if answer.status == code:
                            return time.monotonic() - begun
                    assert time.monotonic() - begun < 5
                    await asyncio.sleep(0.02)

            await saw(200)
            write_config(tmp_path, sim, max_body_bytes="1KiB", log_level="debug")
            assert await saw(413, "x" * 2000) < 2.0
            await daemon.logged(r"configuration read again changed=log-level,max-body-bytes")
            await daemon.logged(r"DEBUG codex_proxy\.")

            # A broken edit changes nothing, not even what is right in it, and names its line.
            good = config_file.read_text(encoding="utf-8")
            config_file.write_text(
                good + "api-keys: [some-client-key-1]\nmax-retry: many\n", encoding="utf-8"
            )
            line = len(good.splitlines()) + 2
            said = await daemon.logged("configuration is broken, the old settings stay: (.*)")
            assert f"{config_file}:{line}" in said[1]
            assert "max-retry" in said[1]
            assert await saw(413, "x" * 2000) < 1.0

            write_config(tmp_path, sim, api_keys="[some-client-key-1]", listen="127.0.0.1:1")
            assert await saw(401) < 2.0
            await daemon.logged("setting needs a restart key=listen")
            assert await daemon.stop() == 0
            assert "some-client-key-1" not in daemon.log
            assert json.dumps(TURN["input"]) not in daemon.log
