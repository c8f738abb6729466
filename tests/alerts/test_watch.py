"""Alerts on their way: over real sockets, with a clock that is moved, to webhooks that take, refuse and hang."""

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from codex_proxy.alerts import outbox
from codex_proxy.alerts.rules import Facts
from codex_proxy.alerts.watch import FILE, Alerts
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings, Webhook
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background
from tests.net.peers import listening, say_nothing, serving, until

WELL = Facts(accounts=2, ready=2, left=0.9)
DRY = Facts(accounts=2, ready=1, left=0.04)


class Hook:
    """A webhook that keeps what it is sent."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = "{}"

    async def take(self, request: web.Request) -> web.StreamResponse:
        self.got.append(await request.json())
        return web.Response(status=self.status, headers=self.headers, text=self.body)

    @property
    def said(self) -> list[tuple[str, str]]:
        """Status and name of each alert that it was told of."""
        return [(alert["status"], alert["name"]) for body in self.got for alert in body["alerts"]]


class Place:
    """A daemon's alerts, without the daemon."""

    def __init__(self, folder: Path, *hooks: Webhook) -> None:
        self.clock = ManualClock()
        self.facts = WELL
        self.may_act = True
        self.live = Live(Settings(data_dir=folder, alert_webhooks=hooks))
        # Real time between tries would make the tests slow, no time at all would make them spin.
        self.background = Background()
        self.outbound = Outbound(self.live)
        self.alerts = Alerts(
            lambda: self.facts,
            self.outbound.fetch,
            live=self.live,
            clock=self.clock,
            background=self.background,
            may_act=lambda: self.may_act,
            host="host-1",
        )

    async def look(self, seconds: float = 10.0) -> None:
        """Look again and again for *seconds*."""
        for _ in range(max(1, int(seconds / 10.0))):
            await self.alerts.look()
            self.clock.advance(10.0)

    async def sent(self) -> None:
        """Wait until nothing is on its way."""
        await until(lambda: not self.alerts.outbox._sending)


@contextlib.asynccontextmanager
async def place(folder: Path, *hooks: Webhook) -> AsyncIterator[Place]:
    made = Place(folder, *hooks)
    try:
        yield made
    finally:
        await made.background.aclose()
        await made.outbound.aclose()


async def test_an_episode_is_told_once_when_it_begins_and_once_when_it_ends(tmp_path: Path) -> None:
    hook = Hook()
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", f"{url}/token")) as it:
        await it.look(60)
        it.facts = DRY
        await it.look(1_000)
        await it.sent()
        assert hook.said == [("firing", "pool-nearly-dry")]
        assert it.alerts.firing()[0]["name"] == "pool-nearly-dry"
        assert it.alerts.count()["pool-nearly-dry"] == 1
        it.facts = WELL
        await it.look(1_000)
        await it.sent()
        assert hook.said == [("firing", "pool-nearly-dry"), ("resolved", "pool-nearly-dry")]
        assert it.alerts.firing() == []
        (over,) = it.alerts.recent()
        assert over["resolved_at"] > over["since"]
        assert it.alerts.outbox.results == {("h", "sent"): 2}


async def test_what_begins_together_is_one_message(tmp_path: Path) -> None:
    hook = Hook()
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", url)) as it:
        it.facts = dataclasses.replace(WELL, needs_login={f"acct-{n}": "gone" for n in range(100)})
        await it.look(120)
        await it.sent()
    assert len(hook.got) == 1
    assert len(hook.said) == 100


async def test_a_restart_in_the_middle_tells_nothing_again(tmp_path: Path) -> None:
    hook = Hook()
    async with serving(hook.take) as url:
        for seconds, facts in ((600, DRY), (600, DRY), (600, WELL)):
            async with place(tmp_path, Webhook("h", "generic", url)) as it:
                it.clock.advance(len(hook.got) * 10_000.0)
                it.facts = facts
                await it.look(seconds)
                await it.sent()
    assert hook.said == [("firing", "pool-nearly-dry"), ("resolved", "pool-nearly-dry")]


async def test_what_was_not_delivered_is_after_a_restart(tmp_path: Path) -> None:
    hook = Hook()
    async with serving(hook.take) as url:
        one = Webhook("h", "generic", url)
        async with place(tmp_path, dataclasses.replace(one, url="http://127.0.0.1:9/secret")) as it:
            it.facts = DRY
            await it.look(400)
            await until(lambda: it.alerts.outbox.results["h", "failed"] > 0)
        assert hook.got == []
        assert "secret" not in await asyncio.to_thread((tmp_path / FILE).read_text, encoding="utf-8")
        async with place(tmp_path, one) as it:
            it.facts = DRY
            it.clock.advance(500)
            await it.look(400)
            await it.sent()
    assert hook.said == [("firing", "pool-nearly-dry")]


async def test_one_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEND_SECONDS", 0.05)
    hook = Hook()
    async with (
        serving(hook.take) as url,
        listening(say_nothing) as port,
        place(
            tmp_path,
            Webhook("stuck", "generic", f"http://127.0.0.1:{port}/"),
            Webhook("well", "generic", url),
        ) as it,
    ):
        it.facts = DRY
        await it.look(400)
        await until(lambda: len(hook.got) == 1)
        it.facts = WELL
        await it.look(1_000)
        await until(lambda: len(hook.got) == 2)
        await until(lambda: it.alerts.outbox.results["stuck", "failed"] >= 2)
        assert len(it.alerts.outbox._queues["stuck"]) == 2


async def test_a_refused_message_is_tried_again_later_and_later(tmp_path: Path) -> None:
    hook = Hook()
    hook.status = 503
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", url)) as it:
        it.facts = DRY
        pauses: list[float] = []
        real = it.clock.sleep

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                hook.headers = {"Retry-After": "77"}
            if len(pauses) == 11:
                # In a day nobody would want to hear of it any more.
                hook.headers = {"Retry-After": "99999"}
            if len(pauses) == 12:
                hook.status = 200
            await real(seconds)

        it.clock.sleep = sleep  # type: ignore[method-assign]
        await it.look(400)
        await it.sent()
    assert len(hook.got) == 13
    assert pauses[0] <= 5.0 < pauses[2] <= 20.0
    assert pauses[3:] == [77.0] * 8 + [3600.0]
    assert it.alerts.outbox.results == {("h", "failed"): 12, ("h", "sent"): 1}


def test_pauses_end_at_ten_minutes(tmp_path: Path) -> None:
    async def pauses() -> list[float]:
        async with place(tmp_path) as it:
            return [it.alerts.outbox._pause(failures) for failures in range(1, 2_000)]

    found = asyncio.run(pauses())
    assert all(0 < pause <= 600.0 for pause in found)
    assert found[-1] >= 300.0


async def test_what_is_a_day_old_is_not_told_any_more(tmp_path: Path) -> None:
    hook = Hook()
    hook.status = 500
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", url)) as it:
        it.facts = DRY
        await it.look(400)
        await it.sent()
    assert it.alerts.outbox.results["h", "expired"] == 1
    assert it.alerts.outbox.results["h", "sent"] == 0


async def test_of_too_many_that_wait_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 3)
    async with place(tmp_path, Webhook("h", "generic", "http://127.0.0.1:9/")) as it:
        it.alerts.outbox.start = lambda: None  # type: ignore[method-assign]
        for number in range(10):
            it.facts = dataclasses.replace(WELL, needs_login={f"acct-{number}": "gone"})
            await it.look(140)
        assert len(it.alerts.outbox._queues["h"]) == 3
        assert it.alerts.outbox.results["h", "dropped"] > 5


async def test_a_redirect_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook, other = Hook(), Hook()
    hook.status = 307
    async with serving(other.take) as elsewhere, serving(hook.take) as url:
        hook.headers = {"Location": elsewhere}
        async with place(tmp_path, Webhook("h", "generic", f"{url}/bot123456:very-secret")) as it:
            it.facts = DRY
            with caplog.at_level(logging.DEBUG):
                await it.look(400)
                await until(lambda: len(hook.got) >= 2)
    assert other.got == []
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().split(" ", 3)[:3] for record in warnings][-1] == ["alert", "not", "delivered"]
    # Once, however often it is tried; and the secret never.
    assert sum("not delivered" in record.getMessage() for record in warnings) == 1
    # The other side's own log says what it was asked for.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("codex_proxy")]
    assert not [line for line in ours if "very-secret" in line]


async def test_an_address_that_was_mended_gets_what_waits(tmp_path: Path) -> None:
    hook = Hook()
    async with (
        serving(hook.take) as url,
        place(tmp_path, Webhook("h", "generic", "http://127.0.0.1:9/")) as it,
    ):
        it.facts = DRY
        it.clock.sleep = _a_moment  # type: ignore[method-assign]
        await it.look(400)
        await until(lambda: it.alerts.outbox.results["h", "failed"] > 0)
        it.live.replace(dataclasses.replace(it.live.current, alert_webhooks=(Webhook("h", "generic", url),)))
        await until(lambda: len(hook.got) == 1)
        it.live.replace(dataclasses.replace(it.live.current, alert_webhooks=()))
        await it.look()
        assert it.alerts.outbox._queues == {}


async def _a_moment(seconds: float) -> None:
    await asyncio.sleep(0.002)


async def test_of_two_daemons_one_tells(tmp_path: Path) -> None:
    hook = Hook()
    async with (
        serving(hook.take) as url,
        place(tmp_path, Webhook("h", "generic", url)) as old,
        place(tmp_path, Webhook("h", "generic", url)) as new,
    ):
        new.may_act = False
        old.facts = new.facts = DRY
        for _ in range(40):
            await old.look()
            await new.look()
        await old.sent()
        assert hook.said == [("firing", "pool-nearly-dry")]
        # The old one ends, or gives up; the other one knows what has been told.
        old.may_act, new.may_act = False, True
        for _ in range(100):
            await old.look()
            await new.look()
        assert [told["name"] for told in new.alerts.firing()] == ["pool-nearly-dry"]
        old.facts = new.facts = WELL
        for _ in range(100):
            await old.look()
            await new.look()
        await new.sent()
    assert hook.said == [("firing", "pool-nearly-dry"), ("resolved", "pool-nearly-dry")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version":99}',
        b'{"version":1,"episodes":5,"waiting":[1]}',
        b'{"version":1,"waiting":{"h":[{"at":"x","news":[]},{"at":1,"news":[{"name":1}]},7]}}',
    ],
)
async def test_a_broken_file_stops_nothing(tmp_path: Path, content: bytes) -> None:
    await asyncio.to_thread((tmp_path / FILE).write_bytes, content)
    hook = Hook()
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", url)) as it:
        it.facts = DRY
        await it.look(400)
        await it.sent()
    assert hook.said == [("firing", "pool-nearly-dry")]


async def test_a_disk_that_takes_nothing_stops_no_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("codex_proxy.alerts.watch.files.write_atomic", full)
    hook = Hook()
    async with serving(hook.take) as url, place(tmp_path, Webhook("h", "generic", url)) as it:
        it.facts = DRY
        await it.look(800)
        await it.sent()
    assert hook.said == [("firing", "pool-nearly-dry")]
    assert caplog.text.count("alerts not saved") == 1


async def test_each_shape_gets_through(tmp_path: Path) -> None:
    hook = Hook()
    hook.body = json.dumps({"ok": True, "code": 0, "errcode": 0})
    shapes: dict[str, Callable[[Any], bool]] = {
        "generic": lambda body: body["status"] == "firing",
        "slack": lambda body: "[firing]" in body["text"],
        "telegram": lambda body: body["chat_id"] == "5",
        "feishu": lambda body: body["msg_type"] == "text",
        "dingtalk": lambda body: body["msgtype"] == "text",
    }
    async with serving(hook.take) as url:
        hooks = [
            Webhook(shape, shape, f"{url}/{shape}", "5" if shape == "telegram" else "") for shape in shapes
        ]
        async with place(tmp_path, *hooks) as it:
            it.facts = DRY
            await it.look(400)
            await it.sent()
    assert len(hook.got) == len(shapes)
    assert all(any(_fits(fits, body) for body in hook.got) for fits in shapes.values())


def _fits(fits: Callable[[Any], bool], body: Any) -> bool:
    try:
        return fits(body)
    except KeyError:
        return False
