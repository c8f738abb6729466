"""Sessions of the page by themselves: how long they last, what is kept of them, and how slow guessing is."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from codex_proxy.accounts import files
from codex_proxy.clock import ManualClock
from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import KeyRefused, ProxyError, TooManyGuesses
from codex_proxy.ledger.directory import Directory
from codex_proxy.ledger.keys import digest_of
from codex_proxy.ledger.model import NO_LIMITS, Key, User
from codex_proxy.protocol.wire import loads
from codex_proxy.server import keyfile
from codex_proxy.server.access import Access, Level
from codex_proxy.server.dashboard.sessions import (
    COOKIE,
    CSRF_HEADER,
    IDLE_SECONDS,
    MAX_OF_HOLDERS,
    MAX_OF_ONE_KEY,
    MAX_SESSIONS,
    Sessions,
    csrf_of,
)
from codex_proxy.server.holders import KeyHolders
from codex_proxy.tasks import Background
from codex_proxy.throttle import Throttle

KEY = "key-of-the-owner"
DAY = 86_400.0


class Door:
    """Sessions, and a browser that asks for them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.clock = ManualClock()
        owner = ApiKey.of("owner", KEY)
        self.live = Live(replace(Settings(listen=":8080", api_keys=(owner,), data_dir=folder), **settings))
        self.file = folder / "sessions.json"
        self.sessions = self.anew()

    def anew(self) -> Sessions:
        made = Sessions(self.file, live=self.live, clock=self.clock, background=Background())
        made.access = Access(self.live, sessions=made, throttle=Throttle(self.clock.monotonic))
        return made

    def request(
        self, method: str = "GET", token: str = "", remote: str = "203.0.113.7", host: str = "proxy.test:8080"
    ) -> web.Request:
        headers = CIMultiDict({"Host": host})
        if token:
            headers["Cookie"] = f"{COOKIE}={token}"
            headers[CSRF_HEADER] = csrf_of(token)
        return make_mocked_request(method, "/ui/api/session", headers=headers).clone(remote=remote)

    async def enter(self, remote: str = "203.0.113.7", key: str = KEY) -> str:
        return (await self.sessions.log_in(self.request("POST", remote=remote), key))[1]

    async def guess(self, remote: str) -> None:
        with contextlib.suppress(KeyRefused, TooManyGuesses):
            await self.enter(remote, "not-the-key")

    def is_in(self, token: str) -> bool:
        return self.sessions.is_valid(self.request(token=token))


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


# -- how long they last -------------------------------------------------------------------


async def test_a_clock_that_was_ahead_makes_no_session_last_longer(door: Door) -> None:
    door.clock._now += 400 * DAY
    token = await door.enter()
    door.clock._now -= 400 * DAY
    assert door.is_in(token)
    door.clock.advance(IDLE_SECONDS + 1)
    assert not door.is_in(token)


async def test_a_set_up_token_from_a_future_is_none(tmp_path: Path) -> None:
    door = Door(tmp_path, api_keys=())
    token, _ = keyfile.make_setup_token(tmp_path)
    door.clock._now = (tmp_path / keyfile.SETUP).stat().st_mtime - 2 * DAY
    with pytest.raises(KeyRefused):
        await door.enter(key=token)


async def test_a_page_that_is_switched_off_has_no_sessions(door: Door) -> None:
    token = await door.enter()
    door.live.current = replace(door.live.current, ui="off")
    assert not door.is_in(token)


# -- what is kept of them -----------------------------------------------------------------


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    with mock.patch.object(files, "write_atomic", side_effect=OSError(28, "No space left on device")):
        yield


async def test_a_logout_that_could_not_be_written_is_written_later(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    token = await door.enter()
    with full_disk():
        await door.sessions.log_out(door.request("DELETE", token))
        await door.sessions.save()
    assert caplog.text.count("sessions are not kept") == 1
    assert loads(door.file.read_bytes())
    await door.sessions.save()
    assert loads(door.file.read_bytes()) == {}


@pytest.mark.parametrize("leaves", [False, True])
async def test_what_is_written_last_is_what_was_true_last(door: Door, leaves: bool) -> None:
    """Also when whoever caused the first write does not wait for its end."""
    token = await door.enter()
    real = files.write_atomic
    busy, calls = threading.Event(), 0

    def slow_first(path: Path, data: bytes) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            busy.set()
            threading.Event().wait(0.2)
        return real(path, data)

    async def enter() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05 if leaves else None):
                await door.enter("203.0.113.8")

    async def leave() -> None:
        await asyncio.to_thread(busy.wait)
        if leaves:
            await asyncio.sleep(0.1)
        await door.sessions.log_out(door.request("DELETE", token))

    with mock.patch.object(files, "write_atomic", side_effect=slow_first):
        await asyncio.gather(enter(), leave())
        await asyncio.sleep(0.3)
    assert len(loads(door.file.read_bytes())) == 1
    assert not door.is_in(token)


async def test_a_second_daemon_on_the_same_folder_brings_nobody_back(door: Door) -> None:
    token = await door.enter()
    second = door.anew()
    await second.load()
    second.may_write = False
    await door.sessions.log_out(door.request("DELETE", token))
    await second.log_in(door.request("POST"), KEY)
    await second.save()
    assert loads(door.file.read_bytes()) == {}
    # The first has ended.
    second.may_write = True
    await second.save()
    assert loads(door.file.read_bytes())


async def test_who_has_handed_over_lets_nobody_in_or_out(door: Door) -> None:
    token = await door.enter()
    await door.sessions.give_up()
    for attempt in (door.enter, lambda: door.sessions.log_out(door.request("DELETE", token))):
        with pytest.raises(ProxyError) as caught:
            await attempt()
        assert caught.value.status == 503
    assert door.is_in(token)
    door.sessions.take_back()
    await door.sessions.log_out(door.request("DELETE", token))
    assert loads(door.file.read_bytes()) == {}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "7", "{", '{"x": {}}', '{"' + "a" * 64 + '": {"opened_by": 1, "name": 2, "made": 3, "used": 4}}',
        '{"' + "a" * 64 + '": {"opened_by": "local", "name": "n", "made": "x", "used": null}}',
        '{"' + "a" * 64 + '": [1]}', '{"' + "a" * 64 + '": {"opened_by": "local", "name": "n", "made": true, "used": 1e300}}',
    ],
)  # fmt: skip
async def test_a_file_that_is_no_use_is_as_good_as_none(door: Door, text: str) -> None:
    door.file.write_text(text, encoding="utf-8")
    await door.sessions.load()
    await door.enter()
    again = door.anew()
    await again.load()
    assert len(again._sessions) == 1


# -- guessing -----------------------------------------------------------------------------


async def test_the_addresses_of_one_network_are_one_guesser(door: Door) -> None:
    """However the zeros in the middle of an address are left out."""
    for place in range(1, 6):
        await door.guess(f"2001:db8::{place}:0:0:{place}")
    with pytest.raises(TooManyGuesses):
        await door.enter("2001:db8::9:1:2:3")
    await door.enter("2001:db8:0:1::9")
    await door.enter("::ffff:203.0.113.7")


async def test_guesses_from_everywhere_keep_out_nobody_who_was_in_before(door: Door) -> None:
    await door.enter("198.51.100.1")
    for place in range(100):
        await door.guess(f"203.0.113.{place}")
    with pytest.raises(TooManyGuesses):
        await door.enter("203.0.113.200")
    await door.enter("198.51.100.1")
    # Nor who sits at this machine.
    await door.enter("127.0.0.1")
    await door.enter("::1")
    for _ in range(6):
        await door.guess("198.51.100.1")
    with pytest.raises(TooManyGuesses):
        await door.enter("198.51.100.1")


async def test_guesses_at_the_log_in_and_with_requests_count_together(door: Door) -> None:
    access = door.sessions.access
    assert access is not None

    def offer(key: str) -> None:
        request = door.request().clone(headers=CIMultiDict({"Authorization": f"Bearer {key}"}))
        with contextlib.suppress(KeyRefused):
            access.admit(request.clone(remote="203.0.113.7"), Level.OWNER)

    for number in range(3):
        offer(f"guess {number}")
    for _ in range(2):
        await door.guess("203.0.113.7")
    with pytest.raises(TooManyGuesses):
        offer(KEY)
    with pytest.raises(TooManyGuesses):
        await door.enter()
    door.clock.advance(2.0)
    # Whoever logs in was no guesser.
    await door.enter()
    for number in range(5):
        offer(f"another {number}")
    with pytest.raises(TooManyGuesses):
        await door.enter()


# -- holders of client keys ---------------------------------------------------------------


class Ledger:
    """Client keys of a ledger, each by its text."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.directory = Directory(door.clock.now)
        self.directory.load([User("user_1", "ada", "active", True, 0, 0, NO_LIMITS, 0)], [])
        assert door.sessions.access is not None
        door.sessions.access.holders = KeyHolders(self.directory, door.clock)

    def key(self, text: str, name: str = "laptop", old: str | None = None, old_until: float = 0) -> None:
        key = Key(f"key_{name}", "user_1", name, digest_of(text), "sk-...", "active", None, NO_LIMITS, 0)
        before = None if old is None else digest_of(old)
        self.directory.put_key(key, before, None if before is None else int(old_until * 1000))


async def test_a_holders_session_ends_with_the_text_that_opened_it(door: Door) -> None:
    """A key is rotated because somebody else has it: that one is not to go on looking at the page."""
    ledger = Ledger(door)
    ledger.key("first")
    thief = await door.enter(key="first")
    ledger.key("second", old="first", old_until=door.clock.now() + 60)
    holder = await door.enter(key="second")
    assert door.is_in(thief)
    assert door.is_in(holder)
    door.clock.advance(61)
    assert not door.is_in(thief)
    assert door.is_in(holder)
    ledger.key("third")
    assert not door.is_in(holder)


async def test_holders_who_log_in_again_and_again_put_nobody_else_out(door: Door) -> None:
    ledger = Ledger(door)
    ledger.key("mine")
    ledger.key("theirs", "phone")
    owner, other = await door.enter(), await door.enter(key="theirs")
    tokens = [await door.enter(key="mine") for _ in range(MAX_OF_ONE_KEY + 1)]
    assert [door.is_in(token) for token in (owner, other)] == [True, True]
    assert [door.is_in(token) for token in tokens] == [False, *[True] * MAX_OF_ONE_KEY]
    # Nor do many of them together put the owner out, and what is kept is read again as it was.
    for number in range(MAX_OF_HOLDERS // MAX_OF_ONE_KEY):
        ledger.key(f"key {number}", f"number {number}")
        for _ in range(MAX_OF_ONE_KEY):
            door.sessions._open(f"key:key_number {number}:{digest_of(f'key {number}').hex()}", "somebody")
    assert door.is_in(owner)
    await door.sessions.save()
    kept = loads(door.file.read_bytes())
    assert len(kept) == MAX_OF_HOLDERS + 1
    again = door.anew()
    await again.load()
    assert len(again._sessions) == len(kept)
    for _ in range(MAX_SESSIONS):
        door.sessions._open("local", "somebody")
    assert not door.is_in(owner)


async def test_a_key_of_ones_own_buys_no_guesses_at_the_owners(door: Door) -> None:
    Ledger(door).key("mine")
    for _ in range(4):
        await door.guess("203.0.113.7")
    await door.enter(key="mine")
    await door.guess("203.0.113.7")
    with pytest.raises(TooManyGuesses):
        await door.enter(key="mine")
