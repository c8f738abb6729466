"""Fresh tokens, saved before they are used; what every failure costs, and what it does not."""

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from codex_proxy.accounts import files, store
from codex_proxy.accounts.account import Account, Cause, Login
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.state import State
from codex_proxy.accounts.upkeep import EXCHANGE_SECONDS, Keeper, Result
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.net import NetError, NetKind, Outbound, Reply
from codex_proxy.tasks import Background
from tests.accounts.making import (
    DAY,
    HOUR,
    NOW,
    Middle,
    access_token,
    login_of,
    named,
    read_file,
    state_of,
    write_file,
)

Step = Reply | NetError | Callable[["Call"], Awaitable[Reply]]


class Call:
    """One call that went out."""

    def __init__(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, proxy: str | None
    ) -> None:
        self.method = method
        self.url = url
        self.headers = headers
        self.body = body
        self.proxy = proxy

    @property
    def json(self) -> Any:
        return orjson.loads(self.body or b"{}")


class World:
    """What is out there: answers by the end of the path, one after the other; the last one stays."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._steps: dict[str, list[Step]] = {}

    def answer(self, path: str, *steps: Step) -> None:
        self._steps[path] = list(steps)

    def of(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.url.partition("?")[0].endswith(path)]

    @property
    def exchanges(self) -> list[Call]:
        return self.of("/oauth/token")

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str],
        body: bytes | None = None,
        timeout: float = 30.0,
        proxy_url: str | None = None,
    ) -> Reply:
        call = Call(method, url, headers, body, proxy_url)
        self.calls.append(call)
        steps = next(s for path, s in self._steps.items() if url.partition("?")[0].endswith(path))
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        await asyncio.sleep(0)
        if isinstance(step, NetError):
            raise step
        if isinstance(step, Reply):
            return step
        return await step(call)


def reply(status: int, body: object = None, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, names, body if isinstance(body, bytes) else orjson.dumps(body))


def tokens(user: str = "a", n: int = 1, *, ends: float | None = NOW + 10 * DAY, **more: Any) -> Reply:
    body = {"access_token": access_token(user, ends=ends, n=n), "refresh_token": f"rt_{user}_{n}", **more}
    return reply(200, {name: value for name, value in body.items() if value is not None})


def always_new_tokens() -> Callable[[Call], Awaitable[Reply]]:
    """Answer each exchange with tokens that nobody has had yet."""
    serials = itertools.count(1)

    async def exchange(_: Call) -> Reply:
        return tokens(n=next(serials))

    return exchange


def denied(code: str, status: int = 401) -> Reply:
    return reply(status, {"error": {"message": "no", "code": code}})


class House:
    """A keeper with its pool, its files and its clock."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.auths, self.data = folder / "auths", folder / "data"
        self.live = Live(
            Settings(
                auth_dir=self.auths,
                data_dir=self.data,
                oauth_issuer="http://issuer.test",
                base_url="http://backend.test/backend-api/codex",
                **settings,
            )
        )
        self.clock = ManualClock(NOW)
        self.background = Background(self.clock.sleep)
        self.world = World()
        self.pool = Pool(self.clock, rng=Middle())
        self.keeper = Keeper(
            self.pool,
            live=self.live,
            clock=self.clock,
            background=self.background,
            outbound=cast(Outbound, self.world),
            rng=Middle(),
        )

    def file(self, user: str = "a", **more: Any) -> Path:
        return write_file(self.auths, user, **more)

    def account(self, user: str = "a") -> Account:
        return named(self.pool, user)

    def content(self, user: str = "a") -> dict[str, Any]:
        return read_file(self.auths / f"{user}.json")

    @property
    def pending(self) -> list[str]:
        """What kinds of records wait in data-dir."""
        return sorted(path.name.partition(".")[2] for path in (self.data / "pending").glob("*.json"))


@contextlib.asynccontextmanager
async def house(
    folder: Path, *users: str, ends: float | None = NOW - 1, **settings: Any
) -> AsyncIterator[House]:
    """A house with accounts whose access tokens are over, unless `ends` says otherwise."""
    one = House(folder, **settings)
    one.auths.mkdir()
    for user in users:
        one.file(user, ends=ends)
    await one.keeper.load()
    try:
        yield one
    finally:
        await one.background.aclose()


# -- an exchange -------------------------------------------------------------------------


async def test_a_good_token_is_used_as_it_is(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 1) as h:
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", ends=NOW + 1)
        assert h.world.calls == []


async def test_an_expired_token_is_exchanged_and_the_file_keeps_all_it_had(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        before = h.content()
        h.world.answer("/oauth/token", tokens())
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", ends=NOW + 10 * DAY, n=1)
        (call,) = h.world.exchanges
        assert (call.method, call.url) == ("POST", "http://issuer.test/oauth/token")
        assert call.json["refresh_token"] == "rt_a_0"
        assert call.json["refresh_reason"] == "proactive_expiry"
        assert call.headers["originator"] == "codex_proxy"
        after = h.content()
        assert after["refresh_token"] == "rt_a_1"
        assert after["access_token"] == token.reveal()
        assert after["mine"] == {"kept": True}
        assert before.keys() <= after.keys()
        assert h.pending == []
        assert h.account().refreshing is None


async def test_new_tokens_are_on_disk_before_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, "a") as h:
        events: list[str] = []
        real = store.save

        def save(credential: store.Credential, *args: Any, **kwargs: Any) -> store.Credential:
            events.append(f"save while using {h.account().credential.refresh.reveal()}")
            events.append(f"record {h.pending}")
            saved = real(credential, *args, **kwargs)
            events.append(f"on disk {h.content()['refresh_token']}")
            events.append(f"still using {h.account().credential.refresh.reveal()}")
            return saved

        async def exchange(_: Call) -> Reply:
            events.append(f"sent, record {h.pending}")
            return tokens()

        monkeypatch.setattr(store, "save", save)
        h.world.answer("/oauth/token", exchange)
        assert await h.keeper.refresh(h.account(), "proactive_expiry")
        events.append(f"using {h.account().credential.refresh.reveal()}, record {h.pending}")
        assert events == [
            "sent, record ['exchange.json']",
            "save while using rt_a_0",
            "record ['exchange.json']",
            "on disk rt_a_1",
            "still using rt_a_0",
            "using rt_a_1, record []",
        ]


async def test_what_the_answer_lacks_is_kept(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens(refresh_token=None))
        assert await h.keeper.token(h.account()) is not None
        assert h.content()["refresh_token"] == "rt_a_0"
        assert h.account().can_refresh()


async def test_fifty_callers_are_one_exchange(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        go_on = asyncio.Event()

        async def exchange(_: Call) -> Reply:
            await go_on.wait()
            return tokens()

        h.world.answer("/oauth/token", exchange)
        callers = [h.background.spawn(h.keeper.token(h.account()), name="caller") for _ in range(50)]
        await until(lambda: bool(h.world.exchanges))
        go_on.set()
        got = await asyncio.gather(*callers)
        assert len(h.world.exchanges) == 1
        assert {token.reveal() for token in got if token is not None} == {
            access_token("a", ends=NOW + 10 * DAY, n=1)
        }
        assert None not in got


async def test_an_exchange_goes_on_when_everybody_who_asked_has_left(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        go_on = asyncio.Event()

        async def exchange(_: Call) -> Reply:
            await go_on.wait()
            return tokens()

        h.world.answer("/oauth/token", exchange)
        callers = [h.background.spawn(h.keeper.token(h.account()), name="caller") for _ in range(3)]
        await until(lambda: bool(h.world.exchanges))
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert all(caller.cancelled() for caller in callers)
        # The end of the process waits for it as well.
        closing = asyncio.get_running_loop().create_task(h.background.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()
        go_on.set()
        await closing
        assert h.content()["refresh_token"] == "rt_a_1"
        assert h.account().credential.refresh.reveal() == "rt_a_1"


async def test_the_account_of_an_exchange_is_left_alone_by_a_look_at_its_file(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:

        async def exchange(_: Call) -> Reply:
            h.file("a", ends=NOW - 1, note="an edit")
            await h.keeper.follow_files()
            return tokens()

        h.world.answer("/oauth/token", exchange)
        assert await h.keeper.refresh(h.account(), "proactive_expiry")
        await h.keeper.follow_files()
        assert h.account().credential.refresh.reveal() == "rt_a_1"
        assert h.content()["note"] == "an edit"
        assert h.account().credential.raw["note"] == "an edit"


async def test_an_accounts_own_proxy_carries_its_exchange_and_its_questions(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        h.file("a", ends=NOW - 1, **{"proxy-url": "http://own:1"})
        await h.keeper.load()
        h.world.answer("/oauth/token", tokens())
        h.world.answer("/wham/usage", reply(200, {}))
        await h.keeper.check_usage(h.account())
        assert [call.proxy for call in h.world.calls] == ["http://own:1", "http://own:1"]


async def test_no_more_exchanges_at_a_time_than_the_setting_says(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcde", refresh_concurrency=2) as h:
        running, most = 0, 0
        go_on = asyncio.Event()

        async def exchange(call: Call) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await go_on.wait()
            running -= 1
            return tokens(call.json["refresh_token"].split("_")[1])

        h.world.answer("/oauth/token", exchange)
        asked = [
            h.background.spawn(h.keeper.refresh(account, "proactive_expiry"), name="asked")
            for account in h.pool
        ]
        await until(lambda: running == 2)
        go_on.set()
        await asyncio.gather(*asked)
        assert most == 2
        assert len(h.world.exchanges) == 5


# -- a save that fails -------------------------------------------------------------------


def no_room_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writes into *folder* fail, as on a full or read-only disk."""
    real = files.write_atomic

    def write_atomic(target: Path, *args: Any, **kwargs: Any) -> bool:
        if target.is_relative_to(folder):
            raise OSError(28, "No space left on device")
        return real(target, *args, **kwargs)

    monkeypatch.setattr(files, "write_atomic", write_atomic)


async def test_a_folder_that_nobody_may_write_is_tried_ever_more_seldom_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        [saves] = [job for job in h.keeper.jobs() if job.name == "saves"]
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(h.auths, patch)
            await h.keeper.token(h.account())
            pauses = []
            for _ in range(10):
                pauses.append(saves.every())
                await saves.run()
        assert pauses == [10, 20, 40, 80, 160, 320, 640, 640, 640, 640]
        said = [r for r in caplog.records if "saved" in r.getMessage() and r.levelno >= logging.INFO]
        assert [record.levelname for record in said] == ["ERROR"]
        await saves.run()
        assert not is_unsaved(h)
        assert saves.every() == 10


async def test_tokens_that_cannot_be_saved_anywhere_are_tried_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        [saves] = [job for job in h.keeper.jobs() if job.name == "saves"]
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(tmp_path, patch)
            await h.keeper.token(h.account())
            for _ in range(3):
                await saves.run()
                assert saves.every() == 10
        assert caplog.text.count("still not saved") == 3


async def test_tokens_that_cannot_be_saved_are_used_and_saved_later(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(h.auths, patch)
            assert await h.keeper.token(h.account()) is not None
            assert h.content()["refresh_token"] == "rt_a_0"
            assert h.account().unsaved
            assert "tokens.json" in h.pending
            # A look at the folder brings the spent token back no more than another try does.
            await h.keeper.load()
            await h.keeper.save_unsaved()
            assert h.account().unsaved
            assert h.account().credential.refresh.reveal() == "rt_a_1"
        await h.keeper.save_unsaved()
        assert not is_unsaved(h)
        assert h.content()["refresh_token"] == "rt_a_1"
        assert h.content()["mine"] == {"kept": True}
        assert h.pending == []
        assert len(h.world.exchanges) == 1
        await h.keeper.load()
        assert h.account().credential.refresh.reveal() == "rt_a_1"


async def test_tokens_that_no_disk_takes_are_used_from_memory_and_saved_later(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(tmp_path, patch)
            token = await h.keeper.token(h.account())
            assert token is not None
            await h.keeper.load()
            await h.keeper.save_unsaved()
            assert await h.keeper.token(h.account()) == token
            assert h.content()["refresh_token"] == "rt_a_0"
        await h.keeper.save_unsaved()
        assert h.content()["refresh_token"] == "rt_a_1"
        assert not is_unsaved(h)


async def test_the_record_of_an_exchange_stays_while_no_disk_has_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, "a") as h:

        async def exchange(_: Call) -> Reply:
            # The disk is full from now on.
            no_room_in(tmp_path, monkeypatch)
            return tokens()

        h.world.answer("/oauth/token", exchange)
        assert await h.keeper.token(h.account()) is not None
        assert h.pending == ["exchange.json"]
        # Killed now, the next start knows why the token in the file is refused.
        after = House(tmp_path)
        await after.keeper.load()
        assert login_of(after.account()) is Login.UNCERTAIN


async def test_the_next_process_completes_what_could_not_be_saved(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(h.auths, patch)
            assert await h.keeper.token(h.account()) is not None
    after = House(tmp_path)
    await after.keeper.load()
    assert after.account().credential.refresh.reveal() == "rt_a_1"
    assert after.content()["refresh_token"] == "rt_a_1"
    assert after.pending == []


async def test_a_file_taken_away_is_not_brought_back(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        account = h.account()

        async def exchange(_: Call) -> Reply:
            (h.auths / "a.json").unlink()
            return tokens()

        h.world.answer("/oauth/token", exchange)
        # What is in flight may end with the new token.
        assert await h.keeper.token(account) is not None
        assert not account.unsaved
        await h.keeper.save_unsaved()
        assert list(h.auths.glob("*.json")) == []
        await h.keeper.follow_files()
        assert len(h.pool) == 0


async def test_another_login_made_during_the_exchange_wins(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:

        async def exchange(_: Call) -> Reply:
            h.file("a", n=7)
            return tokens()

        h.world.answer("/oauth/token", exchange)
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", n=7)
        assert h.content()["refresh_token"] == "rt_a_7"


async def test_another_accounts_login_in_the_file_is_left_alone(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        account = h.account()

        async def exchange(_: Call) -> Reply:
            write_file(h.auths, "b", n=7).rename(h.auths / "a.json")
            return tokens()

        h.world.answer("/oauth/token", exchange)
        key = account.key
        assert await h.keeper.token(account) is not None
        assert account.key == key
        assert h.content()["refresh_token"] == "rt_b_7"
        await h.keeper.follow_files()
        assert [a.credential.refresh.reveal() for a in h.pool] == ["rt_b_7"]


async def test_a_late_save_does_not_touch_another_accounts_login(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        account = h.account()
        with pytest.MonkeyPatch.context() as patch:
            no_room_in(h.auths, patch)
            await h.keeper.token(account)
        write_file(h.auths, "b", n=7).rename(h.auths / "a.json")
        key = account.key
        await h.keeper.save_unsaved()
        assert account.key == key
        assert h.content()["refresh_token"] == "rt_b_7"
        await h.keeper.follow_files()
        assert [a.alias for a in h.pool] == ["b"]


# -- several processes -------------------------------------------------------------------


async def test_the_winner_of_the_lock_has_done_the_work_for_the_others(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        with store.exchange_lock(h.account().credential) as held:
            assert held
            refreshing = h.background.spawn(h.keeper.token(h.account()), name="caller")
            began = h.clock.monotonic()
            await until(lambda: h.clock.monotonic() > began)
            h.file("a", n=9, ends=NOW + DAY)
        token = await refreshing
        assert token is not None
        assert token.reveal() == access_token("a", n=9)
        assert h.world.exchanges == []


async def test_what_the_winner_got_counts_although_the_folder_was_looked_at_first(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        with store.exchange_lock(h.account().credential) as held:
            assert held
            refreshing = h.background.spawn(h.keeper.token(h.account()), name="caller")
            began = h.clock.monotonic()
            await until(lambda: h.clock.monotonic() > began)
            h.file("a", n=9, ends=NOW + DAY)
            # The watch is quicker than whoever waits for the lock.
            await h.keeper.follow_files()
            assert h.account().credential.refresh.reveal() == "rt_a_9"
        token = await refreshing
        assert token is not None
        assert token.reveal() == access_token("a", n=9)
        assert h.world.exchanges == []


async def test_a_lock_that_is_never_given_back_is_waited_for_as_long_as_an_exchange_takes(
    tmp_path: Path,
) -> None:
    async with house(tmp_path, "a") as h:
        with store.exchange_lock(h.account().credential):
            assert await h.keeper.token(h.account()) is None
        assert EXCHANGE_SECONDS <= h.clock.now() - NOW <= EXCHANGE_SECONDS + 10
        assert h.world.exchanges == []
        assert h.account().login_lost == ""
        assert h.account().refresh_after > h.clock.now()


async def test_a_file_with_newer_tokens_saves_the_exchange(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.file("a", n=3)
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", n=3)
        assert h.world.exchanges == []


# -- exchanges that fail -----------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        denied("refresh_token_expired"),
        denied("refresh_token_reused"),
        denied("refresh_token_invalidated"),
        denied("invalid_grant", 400),
        denied("something_new", 401),
    ],
)
async def test_a_permanent_refusal_costs_the_login_and_nothing_of_the_file(
    tmp_path: Path, answer: Reply
) -> None:
    async with house(tmp_path, "a") as h:
        before = (h.auths / "a.json").read_bytes()
        h.world.answer("/oauth/token", answer)
        assert await h.keeper.token(h.account()) is None
        assert state_of(h.account()) is State.NEEDS_LOGIN
        assert h.account().reason() == orjson.loads(answer.body)["error"]["code"]
        assert (h.auths / "a.json").read_bytes() == before
        assert h.pending == []
        # Nobody asks again with it.
        assert await h.keeper.token(h.account()) is None
        h.clock.advance(30 * DAY)
        await h.keeper.refresh_due()
        assert len(h.world.exchanges) == 1


async def test_a_lost_login_serves_to_the_end_of_its_access_token(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 200) as h:
        h.world.answer("/oauth/token", denied("refresh_token_expired"))
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.account().login_lost == "refresh_token_expired"
        assert state_of(h.account()) is State.READY
        assert await h.keeper.token(h.account()) is not None
        h.clock.advance(200)
        assert await h.keeper.token(h.account()) is None
        h.pool.accounts()
        assert state_of(h.account()) is State.NEEDS_LOGIN
        # A new login in the file brings it back.
        h.file("a", n=4)
        await h.keeper.follow_files()
        assert state_of(h.account()) is State.READY
        assert await h.keeper.token(h.account()) is not None


@pytest.mark.parametrize(
    "answer",
    [
        reply(500, {}),
        reply(503, b"<html>down</html>"),
        reply(403, b"<html>Just a moment...</html>"),
        reply(400, {"error": "temporarily_odd"}),
        NetError(NetKind.CONNECT, "connect failed"),
        NetError(NetKind.DNS, "dns failed"),
        NetError(NetKind.PROXY, "proxy failed"),
    ],
)
async def test_passing_trouble_costs_a_pause_only(tmp_path: Path, answer: Reply | NetError) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", answer, answer, tokens())
        assert await h.keeper.token(h.account()) is None
        assert state_of(h.account()) is State.READY
        assert h.account().login_lost == ""
        assert h.account().refresh_after == NOW + 30
        assert h.account().last_error.startswith("refresh ")
        assert h.pending == []
        # Callers meanwhile are not a flood.
        assert [await h.keeper.token(h.account()) for _ in range(5)] == [None] * 5
        assert len(h.world.exchanges) == 1
        h.clock.advance(30)
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.account().refresh_after == NOW + 30 + 60
        h.clock.advance(60)
        assert await h.keeper.token(h.account()) is not None
        assert (h.account().refresh_failures, h.account().refresh_after) == (0, 0.0)


async def test_a_valid_token_serves_while_the_issuer_is_down(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 100) as h:
        h.world.answer("/oauth/token", reply(500, {}))
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert len(h.world.exchanges) == 1
        assert await h.keeper.token(h.account()) is not None
        assert state_of(h.account()) is State.READY


@pytest.mark.parametrize(
    "answer",
    [NetError(NetKind.TIMEOUT, "late"), NetError(NetKind.CUT, "cut"), reply(200, b"{"), reply(200, {})],
)
async def test_an_answer_that_was_lost_leaves_its_record(tmp_path: Path, answer: Reply | NetError) -> None:
    async with house(tmp_path, "a") as h:
        before = (h.auths / "a.json").read_bytes()
        h.world.answer("/oauth/token", answer, tokens())
        assert await h.keeper.token(h.account()) is None
        assert state_of(h.account()) is State.READY
        assert h.account().login_lost == ""
        assert h.pending == ["exchange.json"]
        assert (h.auths / "a.json").read_bytes() == before
        h.clock.advance(30)
        assert await h.keeper.token(h.account()) is not None
        assert h.pending == []


async def test_an_issuer_that_wants_fewer_questions_names_the_pause(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", reply(429, {}, retry_after="123"))
        assert await h.keeper.token(h.account()) is None
        assert h.account().refresh_after == NOW + 123
        assert h.account().login_lost == ""


async def test_pauses_between_exchanges_have_an_end(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", reply(500, {}))
        pauses = []
        for _ in range(8):
            await h.keeper.token(h.account())
            pauses.append(h.account().refresh_after - h.clock.now())
            h.clock.advance(pauses[-1])
        assert pauses == [30, 60, 120, 240, 480, 900, 900, 900]


async def test_a_refusal_is_checked_against_the_file_first(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:

        async def reused(_: Call) -> Reply:
            # The Codex CLI, which shares the file, was a moment faster.
            h.file("a", n=2)
            return denied("refresh_token_reused")

        h.world.answer("/oauth/token", reused)
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", n=2)
        assert state_of(h.account()) is State.READY
        assert h.account().login_lost == ""


async def test_an_interrupted_exchange_is_tried_once_and_named_as_the_reason(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", NetError(NetKind.CUT, "killed here"))
        await h.keeper.token(h.account())
        assert h.pending == ["exchange.json"]
    after = House(tmp_path)
    await after.keeper.load()
    assert after.account().credential.interrupted == NOW
    after.world.answer("/oauth/token", denied("refresh_token_reused"))
    assert await after.keeper.token(after.account()) is None
    assert after.account().reason() == (
        "refresh_token_reused (an exchange was interrupted before its answer was saved)"
    )
    assert len(after.world.exchanges) == 1


async def test_an_interrupted_exchange_whose_token_was_not_spent_is_forgotten(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", NetError(NetKind.CUT, "killed here"))
        await h.keeper.token(h.account())
    after = House(tmp_path)
    await after.keeper.load()
    after.world.answer("/oauth/token", tokens())
    assert await after.keeper.token(after.account()) is not None
    assert after.pending == []
    await after.keeper.load()
    assert after.account().credential.interrupted is None


async def test_an_exchange_that_breaks_off_pauses_and_leaves_its_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, "a") as h:

        async def broken(_: Call) -> Reply:
            raise RuntimeError("a mistake of ours")

        h.world.answer("/oauth/token", broken)
        with pytest.raises(RuntimeError):
            await h.keeper.token(h.account())
        assert h.account().refreshing is None
        assert h.account().refresh_after == NOW + 30
        assert h.pending == ["exchange.json"]
        assert login_of(h.account()) is Login.UNCERTAIN
        await asyncio.sleep(0)
        assert "task died name=exchange:a" in caplog.text


# -- an answer that was lost -------------------------------------------------------------


async def test_the_old_token_is_tried_once_at_start_while_the_access_token_serves(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        store.note_exchange(h.data, h.account().credential, now=NOW - 60)
        await h.keeper.load()
        account = h.account()
        assert login_of(account) is Login.UNCERTAIN
        h.world.answer("/oauth/token", denied("refresh_token_reused"))
        assert h.keeper.exchanges.seconds_to_next() <= 1.0
        await h.keeper.refresh_due()
        # Nobody waits for that.
        token = await h.keeper.token(account)
        assert token is not None
        assert token.reveal() == access_token("a")
        await h.background.wait_critical()
        assert len(h.world.exchanges) == 1
        assert login_of(account) is Login.LOST
        assert account.login_lost == (
            "refresh_token_reused (an exchange was interrupted before its answer was saved)"
        )
        assert state_of(account) is State.READY
    # Nor is it tried by the next one, which knows the reason.
    after = House(tmp_path)
    await after.keeper.load()
    after.world.answer("/oauth/token", tokens())
    await after.keeper.refresh_due()
    await after.background.wait_critical()
    assert after.world.exchanges == []
    assert after.account().login_lost == account.login_lost
    assert await after.keeper.token(after.account()) is not None
    after.clock.advance(2 * DAY)
    assert await after.keeper.token(after.account()) is None
    after.pool.accounts()
    assert state_of(after.account()) is State.NEEDS_LOGIN
    assert after.account().reason() == account.login_lost
    # Its owner may ask for another try all the same.
    assert await after.keeper.refresh_one(after.account()) == Result(after.account(), True, "")
    assert login_of(after.account()) is Login.OK
    assert after.pending == []


@pytest.mark.parametrize(
    "passing", [NetError(NetKind.CONNECT, "no"), reply(503, {}), reply(429, {}), reply(403, b"<html>")]
)
async def test_a_try_that_meets_passing_trouble_is_made_again_later(
    tmp_path: Path, passing: Reply | NetError
) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        store.note_exchange(h.data, h.account().credential, now=NOW - 60)
        await h.keeper.load()
        account = h.account()
        h.world.answer("/oauth/token", passing, passing, tokens())
        for _ in range(2):
            await h.keeper.refresh_due()
            await h.background.wait_critical()
            await h.keeper.load()
            assert login_of(account) is Login.UNCERTAIN
            assert h.pending == ["exchange.json"]
            h.clock.advance(account.refresh_after - h.clock.now())
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert len(h.world.exchanges) == 3
        assert login_of(account) is Login.OK
        assert h.content()["refresh_token"] == "rt_a_1"
        await h.keeper.load()
        assert login_of(account) is Login.OK
        assert h.pending == []


@pytest.mark.parametrize("is_on_disk", [True, False])
async def test_an_answer_that_is_lost_while_we_live_is_no_other_case(
    tmp_path: Path, is_on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, "a", ends=NOW + 200) as h:
        if not is_on_disk:
            no_room_in(tmp_path, monkeypatch)
        account = h.account()
        h.world.answer("/oauth/token", NetError(NetKind.CUT, "cut"), denied("refresh_token_reused"))
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert login_of(account) is Login.UNCERTAIN
        await h.keeper.load()
        assert login_of(account) is Login.UNCERTAIN
        h.clock.advance(30)
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert login_of(account) is Login.LOST
        assert "interrupted" in account.login_lost
        assert await h.keeper.token(account) is not None
        assert h.content()["refresh_token"] == "rt_a_0"


async def test_a_mistake_while_saving_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        with monkeypatch.context() as patched:
            patched.setattr(store, "save", lambda *_, **__: 1 / 0)
            assert await h.keeper.token(h.account()) is not None
        assert h.account().unsaved
        # What no disk has is not taken for saved.
        assert h.pending == ["exchange.json"]
        await h.keeper.load()
        assert h.account().credential.refresh.reveal() == "rt_a_1"
        await h.keeper.save_unsaved()
        assert h.content()["refresh_token"] == "rt_a_1"
        assert "rt_a_1" not in caplog.text


# -- what is not to be exchanged ---------------------------------------------------------


async def test_a_token_whose_file_was_taken_away_is_not_spent(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        (h.auths / "a.json").rename(tmp_path / "a.json")
        account = h.account()
        assert await h.keeper.token(account) is None
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert await h.keeper.refresh_one(account) == Result(account, False, "its file is not there")
        assert h.world.exchanges == []
        assert account.login_lost == ""
        await h.keeper.follow_files()
        assert len(h.pool) == 0
        # Streams that still run with it ask in vain as well.
        assert await h.keeper.token(account) is None
        assert h.world.exchanges == []


async def test_a_token_in_a_file_that_holds_another_account_is_not_spent(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        write_file(h.auths, "b").rename(h.auths / "a.json")
        assert await h.keeper.token(h.account()) is None
        assert h.world.exchanges == []


async def test_a_half_written_file_stops_no_exchange(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        whole = (h.auths / "a.json").read_bytes()
        (h.auths / "a.json").write_bytes(whole[:50])
        assert await h.keeper.token(h.account()) is not None
        (h.auths / "a.json").write_bytes(whole)
        await h.keeper.save_unsaved()
        assert h.content()["refresh_token"] == "rt_a_1"


async def test_a_disabled_account_is_exchanged_when_its_owner_asks_for_it_alone(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        h.file("a", ends=NOW - 1, disabled=True)
        await h.keeper.load()
        account = h.account()
        h.world.answer("/oauth/token", tokens())
        h.world.answer("/wham/usage", reply(200, USAGE))
        assert await h.keeper.token(account) is None
        assert await h.keeper.check_usage(account) == Result(account, False, "disabled")
        assert await results(h.keeper.each_refresh(h.pool)) == {"a": (False, "disabled")}
        assert h.world.calls == []
        assert await h.keeper.refresh_one(account) == Result(account, True, "")
        assert h.content()["refresh_token"] == "rt_a_1"
        assert h.content()["disabled"] is True
        assert state_of(account) is State.DISABLED
        # Its quota may be asked for while its token is good; that exchanges nothing.
        assert (await h.keeper.check_usage(account)).success


async def test_a_login_that_is_lost_stays_so_when_its_owners_try_meets_trouble(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        account = h.account()
        h.world.answer("/oauth/token", denied("refresh_token_expired"), reply(500, {}), denied("odd"))
        await h.keeper.token(account)
        assert await h.keeper.refresh_one(account) == Result(account, False, "refresh_token_expired")
        assert account.login_lost == "refresh_token_expired"
        assert await h.keeper.refresh_one(account) == Result(account, False, "odd")


async def test_an_exhausted_account_keeps_refreshing(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 100) as h:
        h.account().hold(Cause.LIMIT, NOW + 5 * DAY)
        h.world.answer("/oauth/token", tokens())
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.content()["refresh_token"] == "rt_a_1"
        assert state_of(h.account()) is State.COOLING


# -- when --------------------------------------------------------------------------------


async def test_a_token_is_exchanged_five_minutes_before_its_end_give_or_take(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/oauth/token", tokens())
        # Jitter in the middle: half a minute earlier.
        h.clock.advance(DAY - 331)
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.world.exchanges == []
        assert h.keeper.exchanges.seconds_to_next() == pytest.approx(1.0)
        h.clock.advance(1)
        await h.keeper.refresh_due()
        # Once is enough, however often one looks.
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert len(h.world.exchanges) == 1


async def test_accounts_logged_in_together_are_not_exchanged_together(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcdefgh", ends=NOW + DAY) as h:
        h.keeper.exchanges._rng = random.Random(1)
        times = [h.keeper.exchanges.due(account) for account in h.pool]
        assert len(set(times)) == 8
        for due in times:
            assert due is not None
            assert NOW + DAY - 360 <= due <= NOW + DAY - 300
        # And each keeps its own moment.
        assert [h.keeper.exchanges.due(account) for account in h.pool] == times


async def test_looking_often_never_rotates_a_good_token(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY, refresh_interval=5.0) as h:
        for _ in range(100):
            assert 0 < h.keeper.exchanges.seconds_to_next() <= 5.0
            h.clock.advance(HOUR)
            await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.world.calls == []


async def test_a_clock_that_is_ahead_neither_stops_an_account_nor_floods_the_issuer(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW - DAY) as h:
        h.world.answer("/oauth/token", *(tokens(n=n, ends=NOW - HOUR) for n in (1, 2)))
        for _ in range(20):
            await h.keeper.refresh_due()
            await h.background.wait_critical()
            await h.keeper.follow_files()
            h.clock.advance(10)
        token = await h.keeper.token(h.account())
        assert token is not None
        assert token.reveal() == access_token("a", n=1, ends=NOW - HOUR)
        assert len(h.world.exchanges) == 1
        # The backend knows better when it is over.
        renewed = await h.keeper.token(h.account(), refused=token)
        assert renewed is not None
        assert renewed.reveal() == access_token("a", n=2, ends=NOW - HOUR)


async def test_an_answer_that_leaves_no_access_token_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        h.file("a", access_token="")
        await h.keeper.load()
        h.world.answer("/oauth/token", reply(200, {"refresh_token": "rt_a_1"}))
        for _ in range(10):
            await h.keeper.refresh_due()
            await h.background.wait_critical()
            h.clock.advance(1)
        assert len(h.world.exchanges) == 1
        assert h.content()["refresh_token"] == "rt_a_1"


async def test_a_token_of_unknown_end_is_exchanged_on_a_401_only(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=None) as h:
        h.world.answer("/oauth/token", tokens(ends=NOW + 200 * DAY))
        h.clock.advance(100 * DAY)
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        token = await h.keeper.token(h.account())
        assert h.world.exchanges == []
        assert token is not None
        fresh = await h.keeper.token(h.account(), refused=token)
        assert fresh is not None
        assert fresh != token
        assert h.world.exchanges[0].json["refresh_reason"] == "unauthorized_recovery"
        # One who comes late with the old token gets the new one.
        assert await h.keeper.token(h.account(), refused=token) == fresh
        assert len(h.world.exchanges) == 1


async def test_a_disabled_account_is_not_exchanged(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        h.file("a", ends=NOW - 1, disabled=True)
        await h.keeper.load()
        await h.keeper.refresh_due()
        await h.background.wait_critical()
        assert h.world.calls == []


async def test_a_refresh_ends_no_cooldown(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", tokens())
        h.account().hold(Cause.LIMIT, NOW + HOUR)
        assert await h.keeper.refresh(h.account(), "proactive_expiry")
        assert state_of(h.account()) is State.COOLING
        assert h.account().cooling_until() == NOW + HOUR


# -- rounds ------------------------------------------------------------------------------


async def results(rounds: AsyncIterator[Result]) -> dict[str, tuple[bool, str]]:
    return {r.account.alias: (r.success, r.reason) async for r in rounds}


async def test_a_round_of_exchanges_is_paced_and_names_what_it_left_out(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + DAY) as h:
        h.file("c", disabled=True)
        h.file("d", refresh_token="")
        await h.keeper.load()

        async def exchange(call: Call) -> Reply:
            user = call.json["refresh_token"].split("_")[1]
            return tokens(user) if user == "a" else denied("refresh_token_expired")

        h.world.answer("/oauth/token", exchange)
        assert await results(h.keeper.each_refresh(h.pool)) == {
            "a": (True, ""),
            "b": (False, "refresh_token_expired"),
            "c": (False, "disabled"),
            "d": (False, "no refresh token"),
        }
        assert h.clock.now() > NOW


async def test_a_round_asked_for_gives_a_lost_login_another_chance(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", denied("app_session_terminated"), tokens())
        assert await h.keeper.token(h.account()) is None
        assert state_of(h.account()) is State.NEEDS_LOGIN
        assert await results(h.keeper.each_refresh(h.pool)) == {"a": (True, "")}
        assert state_of(h.account()) is State.READY


async def test_a_round_goes_on_when_nobody_listens_any_more(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + DAY) as h:

        async def exchange(call: Call) -> Reply:
            return tokens(call.json["refresh_token"].split("_")[1])

        h.world.answer("/oauth/token", exchange)
        rounds = h.keeper.each_refresh(h.pool)
        await anext(rounds)
        await cast(Any, rounds).aclose()
        await until(lambda: h.background.statistics() == {"tasks": 0, "critical": 0})
        assert {h.content(user)["refresh_token"] for user in "ab"} == {"rt_a_1", "rt_b_1"}


# -- questions ---------------------------------------------------------------------------

USAGE = {
    "plan_type": "plus",
    "rate_limit": {"primary_window": {"used_percent": 27, "limit_window_seconds": 18000}},
}


async def test_usage_is_asked_beside_the_backend_and_read(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/wham/usage", reply(200, USAGE))
        assert await h.keeper.check_usage(h.account()) == Result(h.account(), True, "")
        (call,) = h.world.calls
        assert (call.method, call.url) == ("GET", "http://backend.test/backend-api/wham/usage")
        assert call.headers["authorization"] == f"Bearer {access_token('a')}"
        assert call.headers["chatgpt-account-id"] == "acc-a"
        quota = h.account().quota
        assert (quota.left(NOW), quota.usage_status, quota.usage_at) == (73.0, 200, NOW)


async def test_a_401_of_a_question_is_answered_by_one_exchange(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/wham/usage", reply(401, {}), reply(200, USAGE))
        h.world.answer("/oauth/token", tokens())
        assert (await h.keeper.check_usage(h.account())).success
        assert len(h.world.exchanges) == 1
        assert [call.headers["authorization"] for call in h.world.of("/usage")] == [
            f"Bearer {access_token('a')}",
            f"Bearer {access_token('a', ends=NOW + 10 * DAY, n=1)}",
        ]


@pytest.mark.parametrize("status", [403, 429, 500, 502])
async def test_other_refusals_of_a_question_say_nothing_about_the_login(tmp_path: Path, status: int) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/wham/usage", reply(status, b"<html>"))
        for _ in range(10):
            result = await h.keeper.check_usage(h.account())
            assert (result.success, result.reason) == (False, f"status {status}")
        assert state_of(h.account()) is State.READY
        assert h.account().quota.usage_status == status
        assert h.account().quota.seen_at is None
        assert h.world.exchanges == []


async def test_a_question_that_gets_no_answer_says_why(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/wham/usage", NetError(NetKind.DNS, "dns failed"))
        assert await h.keeper.check_usage(h.account()) == Result(h.account(), False, "dns")
        h.world.answer("/wham/usage", reply(200, b"no json"))
        assert await h.keeper.check_usage(h.account()) == Result(h.account(), False, "status 200")
        assert state_of(h.account()) is State.READY


async def test_an_account_without_a_token_cannot_ask(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.world.answer("/oauth/token", denied("refresh_token_expired"))
        assert await h.keeper.check_usage(h.account()) == Result(h.account(), False, "refresh_token_expired")
        assert h.world.of("/usage") == []


async def test_fresh_tokens_refused_again_and_again_cost_the_login(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY, health_check_max_failures=3) as h:
        h.world.answer("/oauth/token", always_new_tokens())
        h.world.answer("/wham/usage", reply(401, {}))
        for _ in range(2):
            assert (await h.keeper.check_usage(h.account())).reason == "status 401"
            assert state_of(h.account()) is State.READY
        await h.keeper.check_usage(h.account())
        assert state_of(h.account()) is State.NEEDS_LOGIN


async def test_an_issuer_that_is_down_costs_no_login(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY, health_check_max_failures=1) as h:
        h.world.answer("/oauth/token", reply(500, {}))
        h.world.answer("/wham/usage", reply(401, {}))
        for _ in range(5):
            assert not (await h.keeper.check_usage(h.account())).success
            h.clock.advance(HOUR)
        assert h.account().login_lost == ""
        assert state_of(h.account()) is State.READY


async def test_only_old_numbers_are_asked_for_again(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + DAY, health_check_interval=300.0) as h:
        h.file("c", disabled=True)
        h.file("d", ends=NOW - 1, refresh_token="")
        await h.keeper.load()
        h.world.answer("/wham/usage", reply(200, USAGE))
        h.account("b").quota.read_headers({"x-codex-primary-used-percent": "5"}, NOW)
        await h.keeper.check_all()
        assert [call.headers["chatgpt-account-id"] for call in h.world.calls] == ["acc-a"]
        h.clock.advance(300)
        await h.keeper.check_all()
        assert sorted(call.headers["chatgpt-account-id"] for call in h.world.calls[1:]) == ["acc-a", "acc-b"]


async def test_no_more_questions_at_a_time_than_the_setting_says(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcde", ends=NOW + DAY, health_check_concurrency=2) as h:
        running, most = 0, 0

        async def usage(_: Call) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1
            return reply(200, USAGE)

        h.world.answer("/wham/usage", usage)
        assert len(await results(h.keeper.each_usage(h.pool))) == 5
        assert most == 2


async def test_a_round_asks_nothing_with_the_token_of_a_disabled_account(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.file("b", ends=NOW + DAY, disabled=True)
        await h.keeper.load()
        h.world.answer("/wham/usage", reply(200, usage(27)))
        found = await results(h.keeper.each_usage(list(h.pool)))
        assert found == {"a": (True, ""), "b": (False, "disabled")}
        assert [call.headers["chatgpt-account-id"] for call in h.world.calls] == ["acc-a"]


async def test_nothing_is_kept_of_accounts_that_left(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        h.world.answer("/models", reply(500, {}))
        h.world.answer("/wham/usage", reply(500, {}))
        for number in range(30):
            path = h.file(f"u{number}", ends=NOW + DAY)
            await h.keeper.load()
            h.keeper.exchanges.seconds_to_next()
            await h.keeper.fetch_models()
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
            path.unlink()
        h.file("stays", ends=NOW + DAY)
        await h.keeper.load()
        h.keeper.exchanges.seconds_to_next()
        await h.keeper.fetch_models()
        h.keeper.seconds_to_next_probe()
        keeper = h.keeper
        for kept in (keeper._models_after, keeper.exchanges._jitter, keeper._probes, keeper._asking):
            assert len(kept) <= 2, "the one that is there, and none but a few that are not"


# -- accounts that rest ------------------------------------------------------------------


def usage(used: float = 27, *, week: float | None = 4, allowed: object = True, **more: Any) -> dict[str, Any]:
    """Return what the usage endpoint says of an account."""
    limit = {
        "allowed": allowed,
        "limit_reached": used >= 100 or (week or 0) >= 100,
        "primary_window": {
            "used_percent": used, "limit_window_seconds": 18_000, "reset_after_seconds": 3_600,
        },
        "secondary_window": week
        if week is None
        else {"used_percent": week, "limit_window_seconds": 604_800, "reset_after_seconds": 400_000},
    }  # fmt: skip
    return {"plan_type": "plus", "rate_limit": {**limit, **more}}


async def test_an_account_that_rests_for_its_limit_is_asked_every_few_minutes(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcdef", ends=NOW + 10 * DAY) as h:
        h.keeper._rng = random.Random(3)
        h.world.answer("/wham/usage", reply(200, usage(100, allowed=False)))
        for user in "abcde":
            h.account(user).hold(Cause.LIMIT, NOW + 3 * HOUR)
        h.account("f").hold(Cause.RATE, NOW + 3 * HOUR)
        h.account("f").quota.seen_at = NOW
        times: dict[str, list[float]] = {user: [NOW] for user in "abcdef"}
        while h.clock.now() < NOW + 3 * HOUR - 1:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            seen = len(h.world.calls)
            await h.keeper.probe_due()
            for call in h.world.calls[seen:]:
                times[call.headers["chatgpt-account-id"].removeprefix("acc-")].append(h.clock.now())
        for user in "abcde":
            pauses = [later - earlier for earlier, later in itertools.pairwise(times[user])]
            assert len(pauses) >= 30
            assert all(180 <= pause <= 302 for pause in pauses), "a look a second late at most"
            assert h.account(user).holds == {Cause.LIMIT: NOW + 3 * HOUR}
        assert times["f"] == [NOW], "what passes by itself is not asked for"
        assert len({times[user][1] for user in "abcde"}) == 5, "they do not knock together"


async def test_what_has_an_account_that_just_came_is_asked_at_once_and_once(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + 10 * DAY) as h:
        h.account("b").quota.seen_at = NOW
        h.world.answer("/wham/usage", reply(200, usage(27)))
        assert h.keeper.seconds_to_next_probe() < 4
        for _ in range(10):
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
        (call,) = h.world.calls
        assert call.headers["chatgpt-account-id"] == "acc-a"
        assert h.account().left(h.clock.now(), None) == 73


async def test_an_account_that_cannot_be_asked_is_not_asked_all_the_time(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        h.world.answer("/wham/usage", NetError(NetKind.CONNECT, "no"))
        end = h.clock.now() + HOUR
        while h.clock.now() < end:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
        assert 10 <= len(h.world.calls) <= 21


async def test_a_reset_that_came_early_is_seen(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        account = h.account()
        account.hold(Cause.LIMIT, NOW + 5 * DAY)
        h.world.answer("/wham/usage", reply(200, usage(100, allowed=False)), reply(200, usage(0)))
        await h.keeper.probe_due()
        for expected in (State.COOLING, State.READY):
            h.clock.advance(300)
            await h.keeper.probe_due()
            assert state_of(account) is expected
        assert Cause.LIMIT not in account.holds
        assert len(h.world.calls) == 2


async def probed(h: House, answer: Reply | NetError) -> None:
    h.world.answer("/wham/usage", answer)
    await h.keeper.probe_due()
    h.clock.advance(300)
    await h.keeper.probe_due()


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, usage(27)),
        reply(200, usage(99)),
        reply(200, usage(0, week=None)),
        reply(200, {"rate_limit": {"allowed": True}}),
    ],
)
async def test_an_account_that_may_go_on_serves_again(tmp_path: Path, answer: Reply) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        h.account().hold(Cause.LIMIT, NOW + DAY)
        await probed(h, answer)
        assert state_of(h.account()) is State.READY
        # One request finds out before many do.
        assert h.account().on_trial


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, usage(100, allowed=False)),
        reply(200, usage(100)),
        reply(200, usage(10, week=100)),
        reply(200, usage(10, limit_reached=True)),
        reply(200, usage(100, limit_reached=False)),
        reply(200, usage(10, week=100, limit_reached=False)),
        reply(200, {**usage(10), "spend_control": {"reached": True}}),
        reply(200, usage(10, allowed=None)),
        reply(200, usage(10, allowed="true")),
        reply(200, {"rate_limit": None}),
        reply(200, {"rate_limit": {}}),
        reply(200, {}),
        reply(200, b"<html>"),
        reply(401, {}),
        reply(403, b"<html>"),
        reply(429, {}, retry_after="9999999"),
        reply(500, {}),
        NetError(NetKind.TIMEOUT, "late"),
    ],
)
async def test_nothing_else_ends_a_cooldown_or_makes_it_longer(
    tmp_path: Path, answer: Reply | NetError
) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        h.world.answer("/oauth/token", tokens())
        h.account().hold(Cause.LIMIT, NOW + DAY)
        await probed(h, answer)
        assert len(h.world.of("/usage")) >= 1
        assert h.account().holds == {Cause.LIMIT: NOW + DAY}
        assert state_of(h.account()) is State.COOLING
        assert h.account().login_lost == ""


async def test_an_answer_about_an_account_that_does_not_rest_changes_no_familys_limit(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.account().family_holds["codex_other"] = NOW + HOUR
        h.world.answer("/wham/usage", reply(200, usage(27)))
        assert (await h.keeper.check_usage(h.account())).success
        assert h.account().family_holds == {"codex_other": NOW + HOUR}


async def test_a_limit_that_is_met_while_the_answer_is_on_its_way_stays(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + 10 * DAY) as h:
        h.account("a").hold(Cause.LIMIT, NOW + HOUR)

        async def late(call: Call) -> Reply:
            user = call.headers["chatgpt-account-id"].removeprefix("acc-")
            h.account(user).hold(Cause.LIMIT, NOW + DAY)
            return reply(200, usage(27))

        h.world.answer("/wham/usage", late)
        for user in "ab":
            assert (await h.keeper.check_usage(h.account(user))).success
            assert h.account(user).holds == {Cause.LIMIT: NOW + DAY}


def of_family(used: float = 10, *, name: str = "codex_x", **more: Any) -> dict[str, Any]:
    """Return what the usage endpoint says of the limit of a model family."""
    window = {"used_percent": used, "limit_window_seconds": 18_000, "reset_after_seconds": 3_600}
    limit = {"allowed": used < 100, "limit_reached": used >= 100, "primary_window": window, **more}
    return {"limit_name": "X", "metered_feature": name, "rate_limit": limit}


def unentitle(one: Account, reason: str = "insufficient_quota", *, count: int = 1) -> None:
    """Have the backend say that it will not serve an account, for the n-th time in a row."""
    one.unavailable_until = NOW + 4 * HOUR
    one.unavailable_reason, one.unavailable_count = reason, count
    one.settle(NOW)
    assert state_of(one) is State.UNAVAILABLE


async def test_who_rests_for_a_family_or_is_not_entitled_is_asked_every_few_minutes(tmp_path: Path) -> None:
    async with house(tmp_path, *"abc", ends=NOW + 10 * DAY) as h:
        h.world.answer("/wham/usage", reply(200, usage(100, allowed=False)))
        for user in "abc":
            h.account(user).quota.seen_at = h.account(user).quota.usage_at = NOW
        h.account("a").family_holds["codex_x"] = NOW + HOUR
        unentitle(h.account("b"))
        while h.clock.now() < NOW + HOUR - 1:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
        asked = [call.headers["chatgpt-account-id"] for call in h.world.calls]
        assert set(asked) == {"acc-a", "acc-b"}
        for user in "ab":
            assert 11 <= asked.count(f"acc-{user}") <= 20
        # No such answer ends any of it.
        assert h.account("a").family_holds == {"codex_x": NOW + HOUR}
        assert state_of(h.account("b")) is State.UNAVAILABLE


async def test_each_limit_ends_by_its_own_numbers(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        one = h.account()
        one.hold(Cause.LIMIT, NOW + DAY)
        one.family_holds.update({"codex_x": NOW + DAY, "codex_y": NOW + DAY, "codex_z": NOW + DAY})
        spent, left = usage(100, allowed=False), usage(10)
        extra = {"additional_rate_limits": [of_family(10), of_family(100, name="codex-y")]}
        h.world.answer("/wham/usage", reply(200, {**spent, **extra}), reply(200, {**left, **extra}))
        await h.keeper.check_usage(one)
        assert one.holds == {Cause.LIMIT: NOW + DAY}
        assert one.family_holds == {"codex_y": NOW + DAY, "codex_z": NOW + DAY}
        await h.keeper.check_usage(one)
        assert one.holds == {}
        assert one.family_holds == {"codex_y": NOW + DAY, "codex_z": NOW + DAY}


@pytest.mark.parametrize(
    "entries",
    [
        [of_family(100)],
        [of_family(10, allowed=False)],
        [of_family(10, allowed="true")],
        [of_family(10, limit_reached=True)],
        [of_family(10, name="codex_other")],
        [{**of_family(10), "metered_feature": None}],
        [{**of_family(10), "rate_limit": None}],
        # Of two that contradict each other, the worse is believed.
        [of_family(10), of_family(100)],
        [of_family(100), of_family(10)],
        [None, 7, "x"],
        [],
        {},
        None,
    ],
)
async def test_nothing_else_ends_a_familys_limit(tmp_path: Path, entries: Any) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        h.account().family_holds["codex_x"] = NOW + DAY
        await probed(h, reply(200, {**usage(10), "additional_rate_limits": entries}))
        assert len(h.world.calls) >= 1
        assert h.account().family_holds == {"codex_x": NOW + DAY}


@pytest.mark.parametrize("reason", ["insufficient_quota", "status 402", "deactivated_workspace"])
async def test_an_account_that_is_entitled_again_is_tried_by_one_request(tmp_path: Path, reason: str) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        unentitle(h.account(), reason)
        await probed(h, reply(200, usage(27)))
        assert state_of(h.account()) is State.READY
        assert h.account().on_trial


@pytest.mark.parametrize(
    "answer",
    [
        reply(200, usage(100, allowed=False)),
        reply(200, usage(10, allowed=None)),
        reply(200, usage(10, limit_reached=True)),
        reply(200, {**usage(10), "spend_control": {"reached": True}}),
        reply(200, {"rate_limit": None, "plan_type": "plus"}),
        reply(200, {}),
        reply(402, {}),
        reply(500, {}),
        NetError(NetKind.TIMEOUT, "late"),
    ],
)
async def test_nothing_else_entitles_an_account(tmp_path: Path, answer: Reply | NetError) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        unentitle(h.account())
        await probed(h, answer)
        assert len(h.world.calls) >= 1
        assert state_of(h.account()) is State.UNAVAILABLE
        assert h.account().unavailable_until == NOW + 4 * HOUR


async def test_a_refusal_that_comes_while_the_answer_is_on_its_way_stays(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + 10 * DAY) as h:
        unentitle(h.account("a"))
        h.account("b").family_holds["codex_x"] = NOW + HOUR

        async def late(call: Call) -> Reply:
            if call.headers["chatgpt-account-id"] == "acc-a":
                h.account("a").unavailable_until = NOW + 5 * HOUR
            else:
                h.account("b").family_holds["codex_x"] = NOW + DAY
            return reply(200, {**usage(27), "additional_rate_limits": [of_family(10)]})

        h.world.answer("/wham/usage", late)
        for user in "ab":
            assert (await h.keeper.check_usage(h.account(user))).success
        assert h.account("a").unavailable_until == NOW + 5 * HOUR
        assert h.account("b").family_holds == {"codex_x": NOW + DAY}


async def test_an_answer_that_was_wrong_is_believed_more_and_more_seldom(tmp_path: Path) -> None:
    """The usage endpoint says that it may, the backend says that it may not: each try costs a request a failover."""
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        one, tries = h.account(), [NOW]
        unentitle(one)
        h.world.answer("/wham/usage", reply(200, usage(27)))
        while h.clock.now() < NOW + 6 * HOUR:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
            if state_of(one) is State.READY:
                tries.append(h.clock.now())
                unentitle(one, count=one.unavailable_count + 1)
                one.unavailable_until = h.clock.now() + 6 * HOUR
        pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
        assert pauses[0] <= 302
        assert pauses[1] <= 302
        assert all(1_200 <= pause <= 2_500 for pause in pauses[5:])
        assert len(pauses) <= 20
        # What is another word than before counts at once.
        h.world.answer(
            "/wham/usage", reply(200, {**usage(27), "credits": {"has_credits": True, "balance": "9"}})
        )
        await h.keeper.check_usage(one)
        assert state_of(one) is State.READY


async def test_another_plan_forgets_what_the_old_one_lacked(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        one = h.account()
        one.refusals["responses gpt-5.5"] = NOW + HOUR
        unentitle(one)
        for plan, lacks, state in (
            ("free", True, State.UNAVAILABLE),
            ("free", True, State.UNAVAILABLE),
            ("plus", False, State.READY),
        ):
            h.world.answer("/wham/usage", reply(200, {**usage(100, allowed=False), "plan_type": plan}))
            await h.keeper.check_usage(one)
            assert one.lacks("responses gpt-5.5", NOW) is lacks
            assert state_of(one) is state


async def test_a_window_that_has_started_again_is_asked_for_soon(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcdefgh", ends=NOW + 10 * DAY) as h:
        h.keeper._rng = random.Random(5)
        for user in "abcdefgh":
            h.account(user).quota.read_usage(usage(60), NOW)
        h.clock.advance(3_599)
        await h.keeper.probe_due()
        h.clock.advance(300)
        await h.keeper.probe_due()
        assert h.world.calls == [], "the first round in which it is over only gives it a time"
        h.clock.advance(4)
        await h.keeper.probe_due()
        assert h.world.calls == []
        h.world.answer("/wham/usage", reply(200, usage(1)))
        rounds = 0
        while len(h.world.calls) < 8:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
            rounds += 1
        assert rounds > 4, "not all at once"
        assert h.clock.now() <= NOW + 3_599 + 300 + 62
        assert h.account().quota.left(h.clock.now()) == 96.0
        h.clock.advance(600)
        await h.keeper.probe_due()
        assert len(h.world.calls) == 8


async def test_a_limit_whose_end_has_come_is_asked_for_as_soon_as_any_reset(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        account = h.account()
        account.quota.read_usage(usage(100, allowed=False), NOW)
        account.hold(Cause.LIMIT, NOW + 3_600)
        h.world.answer("/wham/usage", reply(200, usage(100, allowed=False)))
        h.clock.advance(3_590)
        await h.keeper.probe_due()
        h.world.answer("/wham/usage", reply(200, usage(0)))
        asked = len(h.world.calls)
        h.clock.advance(11)
        await h.keeper.probe_due()
        while len(h.world.calls) == asked:
            h.clock.advance(h.keeper.seconds_to_next_probe())
            await h.keeper.probe_due()
        assert h.clock.now() <= NOW + 3_601 + 62
        assert account.quota.left(h.clock.now()) == 96.0


async def test_a_new_login_is_judged_anew(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY, health_check_max_failures=2) as h:
        h.world.answer("/oauth/token", always_new_tokens())
        h.world.answer("/wham/usage", reply(401, {}))
        for _ in range(2):
            await h.keeper.check_usage(h.account())
        assert state_of(h.account()) is State.NEEDS_LOGIN
        h.file("a", n=50, ends=NOW + DAY)
        await h.keeper.follow_files()
        assert state_of(h.account()) is State.READY
        await h.keeper.check_usage(h.account())
        assert state_of(h.account()) is State.READY


async def test_accounts_that_are_off_or_lost_are_not_asked(tmp_path: Path) -> None:
    async with house(tmp_path, ends=NOW + DAY) as h:
        h.file("a", disabled=True)
        h.file("b", ends=NOW - 1, refresh_token="")
        await h.keeper.load()
        for user in "ab":
            h.account(user).holds[Cause.LIMIT] = NOW + DAY
        for _ in range(5):
            await h.keeper.probe_due()
            h.clock.advance(600)
        assert h.world.calls == []
        assert h.keeper._probes == {}


async def test_probes_share_the_bound_of_all_questions(tmp_path: Path) -> None:
    async with house(tmp_path, *"abcdef", ends=NOW + DAY, health_check_concurrency=2) as h:
        running, most = 0, 0

        async def one(_: Call) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1
            return reply(200, usage(100, allowed=False))

        for account in h.pool:
            account.hold(Cause.LIMIT, NOW + DAY)
        h.world.answer("/wham/usage", one)
        await h.keeper.probe_due()
        h.clock.advance(300)
        await h.keeper.probe_due()
        assert (len(h.world.calls), most) == (6, 2)


# -- warm connections --------------------------------------------------------------------


async def test_each_way_to_the_backend_carries_a_sign_of_life(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + DAY) as h:
        for user, way in (("c", "http://one:1"), ("d", "http://one:1"), ("e", "socks5://two:2")):
            h.file(user, **{"proxy-url": way})
        h.file("f", disabled=True, **{"proxy-url": "http://off:1"})
        await h.keeper.load()
        h.world.answer("/backend-api", reply(404, b""))
        await h.keeper.keep_connections()
        assert {(call.method, call.url) for call in h.world.calls} == {
            ("HEAD", "http://backend.test/backend-api")
        }
        assert sorted(call.proxy or "" for call in h.world.calls) == ["", "http://one:1", "socks5://two:2"]
        # Nobody is asked for anything, so nobody's token is shown.
        assert {tuple(call.headers) for call in h.world.calls} == {("user-agent",)}
        assert h.world.calls[0].headers["user-agent"] == h.live.current.user_agent
        assert h.background.statistics()["tasks"] == 0


async def test_a_way_that_is_broken_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/backend-api", NetError(NetKind.DNS, "no"))
        with caplog.at_level(logging.INFO):
            caplog.clear()
            await h.keeper.keep_connections()
        assert caplog.records == []
        assert state_of(h.account()) is State.READY


async def test_a_pool_with_a_proxy_each_warms_a_bounded_number(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        for number in range(100):
            h.file(f"u{number}", **{"proxy-url": f"http://way:{1000 + number}"})
        await h.keeper.load()
        running, most = 0, 0

        async def one(_: Call) -> Reply:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            return reply(200)

        h.world.answer("/backend-api", one)
        await h.keeper.keep_connections()
        assert 50 <= len(h.world.calls) <= 64
        assert most <= 8


async def test_a_pool_without_accounts_warms_nothing(tmp_path: Path) -> None:
    async with house(tmp_path) as h:
        await h.keeper.keep_connections()
        assert h.world.calls == []


# -- model lists -------------------------------------------------------------------------


async def test_model_lists_are_fetched_and_fetched_again_when_they_changed(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + 10 * DAY) as h:
        h.world.answer(
            "/models",
            reply(200, {"models": [{"slug": "gpt-5.5"}, "odd"]}),
            reply(200, {"models": [{"slug": "gpt-6"}]}),
        )
        await h.keeper.fetch_models()
        assert h.account().models == frozenset({"gpt-5.5"})
        version = h.live.current.models_client_version
        assert (
            h.world.calls[0].url == f"http://backend.test/backend-api/codex/models?client_version={version}"
        )
        h.clock.advance(HOUR)
        await h.keeper.fetch_models()
        assert len(h.world.calls) == 1
        h.pool.read_headers(h.account(), {"x-models-etag": "1"})
        await h.keeper.fetch_models()
        assert len(h.world.calls) == 1
        h.pool.read_headers(h.account(), {"x-models-etag": "2"})
        await h.keeper.fetch_models()
        assert h.account().models == frozenset({"gpt-6"})
        h.clock.advance(DAY)
        await h.keeper.fetch_models()
        assert len(h.world.calls) == 3


@pytest.mark.parametrize(
    "answer",
    [reply(500, {}), reply(200, b"<html>"), reply(200, {"models": None}), NetError(NetKind.CUT, "cut")],
)
async def test_a_list_that_was_not_had_is_asked_for_again_later(
    tmp_path: Path, answer: Reply | NetError
) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        h.world.answer("/models", answer, reply(200, {"models": [{"slug": "gpt-5.5"}]}))
        await h.keeper.fetch_models()
        await h.keeper.fetch_models()
        assert h.account().models is None
        assert len(h.world.calls) == 1
        h.clock.advance(300)
        await h.keeper.fetch_models()
        assert h.account().models == frozenset({"gpt-5.5"})


async def test_one_slow_list_holds_up_no_other(tmp_path: Path) -> None:
    async with house(tmp_path, "a", "b", ends=NOW + DAY) as h:
        go_on = asyncio.Event()

        async def models(call: Call) -> Reply:
            if call.headers["chatgpt-account-id"] == "acc-a":
                await go_on.wait()
            return reply(200, {"models": [{"slug": "gpt-5.5"}]})

        h.world.answer("/models", models)
        fetching = h.background.spawn(h.keeper.fetch_models(), name="models")
        await until(lambda: h.account("b").models is not None)
        assert h.account("a").models is None
        go_on.set()
        await fetching
        assert h.account("a").models is not None


# -- files -------------------------------------------------------------------------------


async def test_files_are_followed(tmp_path: Path) -> None:
    async with house(tmp_path, "a") as h:
        h.file("b")
        await h.keeper.follow_files()
        assert [a.alias for a in h.pool] == ["a", "b"]
        (h.auths / "a.json").unlink()
        await h.keeper.follow_files()
        assert [a.alias for a in h.pool] == ["b"]


async def test_a_folder_in_which_nothing_changed_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, "a") as h:
        await h.keeper.follow_files()
        monkeypatch.setattr(store.Folder, "_scan", lambda *_: pytest.fail("read again"))
        await h.keeper.follow_files()


async def test_a_broken_file_is_named_once_and_the_rest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(tmp_path, "a") as h:
        (h.auths / "b.json").write_text("{", encoding="utf-8")
        with caplog.at_level(logging.WARNING):
            await h.keeper.load()
            await h.keeper.load()
        assert [a.alias for a in h.pool] == ["a"]
        lines = [r.getMessage() for r in caplog.records if "b.json" in r.getMessage()]
        assert len(lines) == 1


async def test_a_file_that_is_being_written_costs_its_account_nothing(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        account, whole = h.account(), (h.auths / "a.json").read_bytes()
        account.quota.read_headers({"x-codex-primary-used-percent": "5"}, NOW)
        for part in (b"", whole[:40]):
            (h.auths / "a.json").write_bytes(part)
            await h.keeper.follow_files()
            assert [*h.pool] == [account]
        (h.auths / "a.json").write_bytes(whole)
        await h.keeper.follow_files()
        assert [*h.pool] == [account]
        assert account.quota.left(NOW) == 95.0
        (h.auths / "a.json").write_bytes(b'{"OPENAI_API_KEY": "sk-1"}')
        await h.keeper.follow_files()
        assert len(h.pool) == 0


async def test_a_folder_that_is_away_for_a_moment_costs_nothing(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY) as h:
        account = h.account()
        h.auths.rename(tmp_path / "away")
        await h.keeper.follow_files()
        assert [*h.pool] == [account]
        (tmp_path / "away").rename(h.auths)
        await h.keeper.follow_files()
        assert [*h.pool] == [account]


# -- jobs --------------------------------------------------------------------------------


async def test_what_runs_by_itself(tmp_path: Path) -> None:
    async with house(tmp_path, "a", ends=NOW + DAY, health_check_interval=77.0) as h:
        jobs = {job.name: job for job in h.keeper.jobs()}
        assert set(jobs) == {
            "files", "watch", "refresh", "saves", "usage", "probes", "models", "keepalive"
        }  # fmt: skip
        assert jobs["files"].every() <= 2.0
        assert jobs["usage"].every() == 77.0
        assert jobs["keepalive"].every() == 60.0
        assert jobs["probes"].every() > 0
        h.live.replace(Settings(health_check_interval=0.0, keepalive_interval=0.0))
        assert (jobs["usage"].every(), jobs["probes"].every(), jobs["keepalive"].every()) == (0, 0, 0)


# -- helpers -----------------------------------------------------------------------------


def is_unsaved(h: House) -> bool:
    return h.account().unsaved


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come true"
        await asyncio.sleep(0.001)
