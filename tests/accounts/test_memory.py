"""What outlives the process: limits, totals and bindings, and who wrote which compacted history."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_proxy.accounts import memory
from codex_proxy.accounts.account import BACKOFF, REFUSAL_SECONDS, REPROBE, Cause
from codex_proxy.accounts.affinity import Owner
from codex_proxy.accounts.memory import (
    OWNERS_FILE,
    SAVE_SECONDS,
    STATE_FILE,
    Memory,
    Owners,
    dump_account,
    restore_account,
)
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.quota import MAX_RESET_SECONDS
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Credential, Scan
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.tasks import Background
from tests.accounts.making import DAY, HOUR, NOW, account, credential, make_pool, named, state_of
from tests.process import until

REPOSITORY = Path(__file__).parent.parent.parent


@dataclasses.dataclass
class Home:
    """A pool, and its memory in a folder."""

    pool: Pool
    memory: Memory
    owners: Owners
    clock: ManualClock
    background: Background


@contextlib.asynccontextmanager
async def home(folder: Path, *credentials: Credential, now: float = NOW) -> AsyncIterator[Home]:
    """Start what keeps a pool of *credentials*, and end it without a word, as a kill does."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    pool, clock = make_pool(clock=ManualClock(now))
    owners = Owners(folder / OWNERS_FILE)
    background = Background()
    kept = Memory(
        pool, live=Live(Settings(data_dir=folder)), clock=clock, background=background, owners=owners
    )
    pool.apply(Scan(list(credentials), []))
    await kept.load()
    try:
        yield Home(pool, kept, owners, clock, background)
    finally:
        await background.aclose()


def state(folder: Path) -> Any:
    return json.loads((folder / STATE_FILE).read_bytes())


def write_state(folder: Path, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / STATE_FILE).write_bytes(orjson.dumps({"version": 1, **more}))


# -- an account ----------------------------------------------------------------------------


async def test_what_is_known_of_an_account_outlives_the_process(tmp_path: Path) -> None:
    async with home(tmp_path, credential("a")) as first:
        one = named(first.pool, "a")
        one.hold(Cause.LIMIT, NOW + HOUR)
        one.hold(Cause.OVERLOAD, NOW + 5)
        one.family_holds["codex_x"] = NOW + 60
        one.refusals["responses gpt-5.5"] = NOW + 70
        one.unavailable_until, one.unavailable_reason, one.unavailable_count = NOW + 90, "no_credits", 2
        one.quota.read_headers(
            {"x-codex-primary-used-percent": "40", "x-codex-primary-window-minutes": "300"}, NOW
        )
        one.total_requests, one.total_errors, one.completions, one.last_used = 7, 2, 5, NOW - 3
        one.usage.input_tokens, one.usage.cached_tokens, one.usage.output_tokens = 100, 60, 30
        first.pool.learned_families["gpt-x"] = "codex_x"
        first.pool.affinity.bind("conv_1", one.key, NOW)
        await first.memory.save()
    async with home(tmp_path, credential("a"), now=NOW + 10) as second:
        other = named(second.pool, "a")
        assert other.holds == {Cause.LIMIT: NOW + HOUR}
        assert other.family_holds == {"codex_x": NOW + 60}
        assert other.refusals == {"responses gpt-5.5": NOW + 70}
        assert (other.unavailable_until, other.unavailable_reason) == (NOW + 90, "no_credits")
        assert other.unavailable_count == 2
        assert state_of(other) is State.UNAVAILABLE
        assert other.quota == one.quota
        assert (other.total_requests, other.total_errors, other.completions) == (7, 2, 5)
        assert (other.usage, other.last_used) == (one.usage, NOW - 3)
        assert second.pool.learned_families == {"gpt-x": "codex_x"}
        assert second.pool.affinity.homes("conv_1", NOW + 10) == (one.key,)
        assert second.memory.since == NOW


async def test_an_account_that_rested_rests_on(tmp_path: Path) -> None:
    async with home(tmp_path, credential("a")) as first:
        named(first.pool, "a").hold(Cause.LIMIT, NOW + HOUR)
        await first.memory.save()
    async with home(tmp_path, credential("a"), now=NOW + HOUR - 1) as second:
        assert state_of(named(second.pool, "a")) is State.COOLING
    async with home(tmp_path, credential("a"), now=NOW + HOUR) as third:
        assert state_of(named(third.pool, "a")) is State.READY
        assert named(third.pool, "a").holds == {}


@pytest.mark.parametrize(
    "until", [NOW + MAX_RESET_SECONDS + 1, NOW + 1e9, NOW - 1, NOW, "soon", None, True, 1e300]
)
def test_a_hold_that_is_over_or_further_away_than_any_is_dropped(until: Any) -> None:
    one = account()
    said = {
        "holds": {"limit": until},
        "family_holds": {"codex_x": until},
        "refusals": {"responses m": until},
        "unavailable": [until, "why", 1],
    }
    restore_account(one, said, NOW)
    assert (one.holds, one.family_holds, one.refusals, one.unavailable_until) == ({}, {}, {}, 0.0)
    assert state_of(one) is State.READY


@pytest.mark.parametrize("cause", [cause for cause in Cause if cause is not Cause.LIMIT])
def test_a_hold_from_a_clock_that_was_ahead_rests_no_longer_than_its_cause_does(cause: Cause) -> None:
    one, other = account(), account()
    one.holds = {cause: NOW + 10 * DAY, Cause.LIMIT: NOW + 10 * DAY}
    restore_account(other, dump_account(one), NOW)
    assert other.holds[Cause.LIMIT] == NOW + 10 * DAY, "a limit may last for weeks"
    assert other.holds[cause] == NOW + max(1.2 * BACKOFF[cause].cap, HOUR)


def test_an_entitlement_and_a_refusal_from_such_a_clock_end_as_well() -> None:
    one = account()
    said = {"unavailable": [NOW + 10 * DAY, "no_credits", 2], "refusals": {"responses m": NOW + 10 * DAY}}
    restore_account(one, said, NOW)
    assert one.unavailable_until == NOW + 1.2 * REPROBE.cap
    assert one.refusals == {"responses m": NOW + REFUSAL_SECONDS}
    assert one.lacks("responses m", NOW)


def test_a_hold_that_is_longer_here_stays() -> None:
    one = account()
    one.hold(Cause.LIMIT, NOW + 50)
    restore_account(one, {"holds": {"limit": NOW + 20, "rate": NOW + 10, "moonphase": NOW + 10}}, NOW)
    assert one.holds == {Cause.LIMIT: NOW + 50, Cause.RATE: NOW + 10}


def test_what_was_refused_is_true_of_that_token_only() -> None:
    one = account("a")
    one.login_lost = "refresh_token_reused"
    one.rejected = one.credential.access.digest()
    one.holds[Cause.REJECTED] = NOW + 60
    said = dump_account(one)

    same = account("a")
    restore_account(same, said, NOW)
    assert (same.login_lost, same.rejected) == (one.login_lost, one.rejected)
    assert same.holds == {Cause.REJECTED: NOW + 60}
    assert not same.can_refresh()
    assert state_of(same) is State.NEEDS_LOGIN

    # Somebody has logged in again meanwhile.
    new = account("a", n=1)
    restore_account(new, said, NOW)
    assert (new.login_lost, new.rejected, new.holds) == ("", "", {})
    assert state_of(new) is State.READY

    # Only the access token is another one: the refresh token is as dead as it was.
    half = account("a", n=1, refresh="rt_a_0")
    restore_account(half, said, NOW)
    assert (half.login_lost, half.rejected) == ("refresh_token_reused", "")
    assert half.access_is_valid(NOW)


def test_without_tokens_nothing_is_said_of_them() -> None:
    one = account("a", access="", refresh="")
    one.login_lost = "gone"
    said = dump_account(one)
    other = account("a", access="", refresh="")
    restore_account(other, said, NOW)
    assert other.login_lost == ""


def test_totals_are_added_up() -> None:
    one = account()
    one.total_requests = one.usage.input_tokens = 3
    said = {"requests": 4, "usage": [10, 1, 2, 3, 4], "errors": -1, "completions": "many"}
    restore_account(one, said, NOW)
    assert (one.total_requests, one.total_errors, one.completions) == (7, 0, 0)
    assert (one.usage.input_tokens, one.usage.cache_write_tokens, one.usage.reasoning_tokens) == (13, 2, 4)


def test_the_plan_of_the_token_stands_while_no_answer_has_told_another() -> None:
    one = account()
    one.quota.plan = "plus"
    restore_account(one, {"quota": {}}, NOW)
    assert one.quota.plan == "plus"
    restore_account(one, {"quota": {"plan": ["pro", NOW - 1, "usage"]}}, NOW)
    assert one.quota.plan == "pro"


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
DUMP = dump_account(account())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(DUMP)), odd, max_size=6))
def test_nothing_that_is_written_there_breaks_an_account(said: dict[str, Any]) -> None:
    one = account()
    restore_account(one, {**DUMP, **said}, NOW)
    for end in (*one.holds.values(), *one.family_holds.values(), *one.refusals.values()):
        assert NOW < end <= NOW + MAX_RESET_SECONDS
    assert 0.0 <= one.unavailable_until <= NOW + MAX_RESET_SECONDS
    again = dump_account(one)
    assert len(orjson.dumps(again)) < 100_000


# -- the file --------------------------------------------------------------------------------


async def test_the_file_is_its_owners_and_holds_no_secret(tmp_path: Path) -> None:
    cred = credential("a", alias="my-alias")
    cred = dataclasses.replace(
        cred, identity=dataclasses.replace(cred.identity, email="someone@example.com", plan="plus")
    )
    async with home(tmp_path, cred) as h:
        one = next(iter(h.pool))
        one.login_lost, one.rejected = "refresh_token_reused", cred.access.digest()
        h.owners.add("ab" * 12, one.key, one.workspace, NOW)
        await h.memory.save()
    for name in (STATE_FILE, OWNERS_FILE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        said = (tmp_path / name).read_text()
        identity = cred.identity
        for secret in (cred.access.reveal(), cred.refresh.reveal(), identity.email, identity.account_id):
            assert secret is not None
            assert secret not in said
        assert str(identity.user_id) not in said
        assert "my-alias" not in said


async def test_it_is_written_when_something_changed(tmp_path: Path) -> None:
    async with home(tmp_path, credential("a")) as h:
        (job,) = h.memory.jobs()
        assert job.every() == SAVE_SECONDS
        await h.memory.save()
        first = (tmp_path / STATE_FILE).stat()
        h.clock.advance(SAVE_SECONDS)
        await h.memory.save()
        assert (tmp_path / STATE_FILE).stat().st_ino == first.st_ino
        named(h.pool, "a").hold(Cause.LIMIT, NOW + HOUR)
        await h.memory.save()
        assert (tmp_path / STATE_FILE).stat().st_ino != first.st_ino
        (said,) = state(tmp_path)["accounts"].values()
        assert said["holds"] == {"limit": NOW + HOUR}
        assert said["at"] == NOW + SAVE_SECONDS


async def test_others_get_their_turn_while_much_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is rendered in a piece that holds up the loop, not even in a thread: rendering keeps the others out."""
    async with home(tmp_path, *(credential(f"u{number}") for number in range(400))) as h:
        for number in range(5_000):
            h.pool.affinity.bind(f"conversation-{number}", named(h.pool, "u7").key, NOW)
        sizes: list[int] = []

        def dumps(value: object) -> bytes:
            data = orjson.dumps(value)
            sizes.append(len(data))
            return data

        monkeypatch.setattr(memory, "dumps", dumps)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                # Meanwhile the pool changes.
                h.pool.affinity.bind(f"new-{turns}", named(h.pool, "u7").key, NOW)
                named(h.pool, "u7").family_holds[f"codex_{turns}"] = NOW + HOUR
                h.pool.learned_families[f"model-{turns}"] = "codex_x"
                await asyncio.sleep(0)

        busy = h.background.spawn(others(), name="others")
        await asyncio.sleep(0)
        began = turns
        await h.memory.save()
        busy.cancel()
        assert turns - began >= 400 / 50 + 5_000 / 1_000
        assert max(sizes) < 150_000
        said = state(tmp_path)
        assert len(said["accounts"]) == 400
        assert len(said["conversations"]) >= 5_000
    async with home(tmp_path, credential("u7")) as again:
        one = named(again.pool, "u7")
        assert again.pool.affinity.homes("conversation-77", NOW) == (one.key,)
        assert len(again.pool.affinity) == len(said["conversations"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\x00\xff",
        b'{"accounts": {}}',
        b'{"version": 2, "accounts": {}}',
        b'{"version": "1"}',
        b"[" * 100_000,
    ],
)
async def test_a_file_that_is_none_of_ours_is_set_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    async with home(tmp_path, credential("a")) as h:
        assert state_of(named(h.pool, "a")) is State.READY
        assert (tmp_path / f"{STATE_FILE}.aside").read_bytes() == content
        assert "memory starts empty: state.json is " in caplog.text
        await h.memory.save()
    assert state(tmp_path)["version"] == 1


@pytest.mark.parametrize("key", ["accounts", "families", "conversations", "since"])
@pytest.mark.parametrize("value", [None, -7, "x", [], {}, [[]], {"x": 1}, {"x": {}}, [["conv", 1]]])
async def test_an_odd_part_of_it_is_left_out(tmp_path: Path, key: str, value: Any) -> None:
    write_state(tmp_path, **{key: value})
    async with home(tmp_path, credential("a")) as h:
        assert state_of(named(h.pool, "a")) is State.READY
        assert h.memory.since == NOW
        await h.memory.save()


async def test_a_folder_in_its_place_does_not_stop_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STATE_FILE).mkdir()
    (tmp_path / OWNERS_FILE).mkdir()
    async with home(tmp_path, credential("a")) as h:
        assert len(h.pool) == 1
        assert "memory starts empty" in caplog.text
        await h.memory.save()
    assert state(tmp_path)["version"] == 1
    assert "owners of compacted histories not read" in caplog.text


async def test_a_folder_that_takes_nothing_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with home(tmp_path / "data", credential("a")) as h:
        (tmp_path / "data").rmdir()
        for _ in range(3):
            await h.memory.save()
        assert caplog.text.count("memory not saved file=state.json") == 1
        (tmp_path / "data").mkdir()
        await h.memory.save()
        assert "memory saved again" in caplog.text
        assert state(tmp_path / "data")["version"] == 1


async def test_what_was_never_read_is_not_written_over(tmp_path: Path) -> None:
    """A start that fails halfway ends in order, too."""
    write_state(tmp_path, accounts={"x": {"at": NOW}})
    pool, clock = make_pool("a")
    kept = Memory(pool, live=Live(Settings(data_dir=tmp_path)), clock=clock, background=Background())
    await kept.save()
    assert set(state(tmp_path)["accounts"]) == {"x"}


# -- accounts that are not there --------------------------------------------------------------


async def test_an_account_whose_file_comes_later_has_its_limits_still(tmp_path: Path) -> None:
    async with home(tmp_path, credential("a")) as first:
        one = named(first.pool, "a")
        one.hold(Cause.LIMIT, NOW + HOUR)
        one.total_requests = 5
        await first.memory.save()
    async with home(tmp_path) as second:
        await second.memory.save()
        second.pool.apply(Scan([credential("a")], []))
        late = named(second.pool, "a")
        second.memory.recall(late)
        assert state_of(late) is State.COOLING
        assert late.total_requests == 5
        # Never twice.
        assert not second.memory.recall(late)
        await second.memory.save()
        assert late.total_requests == 5
        # Removed, and put back.
        second.pool.apply(Scan([], []))
        await second.memory.save()
        second.pool.apply(Scan([credential("a")], []))
        again = named(second.pool, "a")
        assert again is not late
        await second.memory.save()
        assert state_of(again) is State.COOLING
        assert again.total_requests == 5


async def test_accounts_that_are_gone_for_long_are_forgotten(tmp_path: Path) -> None:
    write_state(tmp_path, accounts={"old": {"at": NOW - 33 * DAY}, "odd": {}, "new": {"at": NOW - DAY}})
    async with home(tmp_path, credential("a")) as h:
        await h.memory.save()
        assert set(state(tmp_path)["accounts"]) == {"new", named(h.pool, "a").key}


async def test_what_is_known_of_accounts_that_are_gone_is_written_as_it_was_read(tmp_path: Path) -> None:
    odd = {"at": NOW - 1, "holds": {"limit": NOW + 50}, "new": ["of a later version", None]}
    known = {"x": odd, "empty": {"at": NOW - DAY}, '"quoted"': {"a": 1, "at": NOW - 2}}
    write_state(tmp_path, accounts=known)
    async with home(tmp_path, credential("a")) as h:
        await h.memory.save()
        said = state(tmp_path)["accounts"]
        assert said.pop(named(h.pool, "a").key)["at"] == NOW
        assert said == known


async def test_accounts_that_are_gone_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MAX_ABSENT", 10)
    async with home(tmp_path) as h:
        for number in range(15):
            h.pool.apply(Scan([credential(f"u{number}")], []))
            await h.memory.save()
        assert len(state(tmp_path)["accounts"]) == 11
        assert named(h.pool, "u14").key in state(tmp_path)["accounts"]


# -- owners of compacted histories -------------------------------------------------------------


def name_of(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=12).hexdigest()


def filled(path: Path, *numbers: int, account: str = "acct", workspace: str = "ws") -> Owners:
    owners = Owners(path)
    owners.load()
    for number in numbers:
        owners.add(name_of(number), account, workspace, NOW)
    return owners


def reloaded(path: Path, **more: Any) -> Owners:
    owners = Owners(path, **more)
    owners.load()
    return owners


async def test_an_owner_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    owners = filled(path, 1, 2)
    owners.add(name_of(3), "other", "", NOW)
    assert owners.get(name_of(1)) == Owner("acct", "ws")
    assert owners.get(name_of(9)) is None
    assert owners.get("no digest") is None
    await owners.flush()
    found = reloaded(path)
    assert len(found) == 3
    assert found.get(name_of(2)) == Owner("acct", "ws")
    assert found.get(name_of(3)) == Owner("other", "")


async def test_the_last_word_on_an_owner_counts(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    owners = filled(path, 1)
    await owners.flush()
    owners.add(name_of(1), "other", "ws", NOW)
    await owners.flush()
    assert owners.get(name_of(1)) == Owner("other", "ws")
    assert reloaded(path).get(name_of(1)) == Owner("other", "ws")


async def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    owners = filled(path, 1)
    await owners.flush()
    size = path.stat().st_size
    owners.add(name_of(1), "acct", "ws", NOW + 99)
    await owners.flush()
    assert path.stat().st_size == size


def test_without_a_file_they_are_in_memory_only() -> None:
    owners = Owners(None)
    owners.load()
    owners.add(name_of(1), "acct", "ws", NOW)
    assert owners.get(name_of(1)) == Owner("acct", "ws")
    asyncio.run(owners.flush())


@pytest.mark.parametrize(
    "words", [("xyz", "a", "w"), ("ab", "a b", "w"), ("ab", "", "w"), ("ab", "a", "w\n")]
)
def test_what_would_break_a_line_is_refused(tmp_path: Path, words: tuple[str, str, str]) -> None:
    owners = Owners(tmp_path / OWNERS_FILE)
    with pytest.raises(ValueError, match=r"."):
        owners.add(*words, NOW)
    assert len(owners) == 0


async def test_a_file_cut_anywhere_has_all_that_was_whole(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    await filled(path, 1, 2).flush()
    whole = path.read_bytes()
    first = whole.index(b".\n") + 2
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        owners = reloaded(path)
        assert (owners.get(name_of(1)) is not None) is (size >= first)
        assert owners.get(name_of(2)) is None
        # What comes next stands on a line of its own.
        owners.add(name_of(3), "acct", "ws", NOW)
        await owners.flush()
        found = reloaded(path)
        assert found.get(name_of(3)) == Owner("acct", "ws")
        # One that lacked nothing but its line break is whole now.
        ends = size in (first - 1, len(whole) - 1)
        assert len(found) == len(owners) == 1 + (size >= first) + ends


async def test_garbage_between_the_lines_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    await filled(path, 1).flush()
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n\n a b c d .\nzz acct ws 1 .\n" + b"x" * 100_000 + b"\nab \xff ws 1 .\n")
    assert len(reloaded(path)) == 1


async def test_only_the_newest_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    owners = filled(path, *range(30))
    await owners.flush()
    few = reloaded(path, size=10)
    assert len(few) == 10
    assert few.get(name_of(19)) is None
    assert few.get(name_of(20)) is not None
    few.add(name_of(30), "acct", "ws", NOW)
    assert len(few) == 10
    # More than twice what is needed: it was made anew.
    assert len(path.read_bytes().split()) == 10 * 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_file_that_repeats_itself_is_made_anew_at_start(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    owners = filled(path, 1, 2)
    await owners.flush()
    for number in range(5):
        owners.add(name_of(1), f"acct{number}", "ws", NOW)
        await owners.flush()
    found = reloaded(path)
    assert len(path.read_bytes().split()) == 2 * 5
    assert found.get(name_of(1)) == Owner("acct4", "ws")
    # The others go on as before, the one that has the old file open in its mind too.
    owners.add(name_of(3), "acct", "ws", NOW)
    await owners.flush()
    await found.flush()
    assert found.get(name_of(3)) == Owner("acct", "ws")
    assert reloaded(path).get(name_of(3)) == Owner("acct", "ws")


async def test_a_line_for_a_file_that_was_just_replaced_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process made the file anew between our write and its becoming durable, and has seen none of it."""
    path = tmp_path / OWNERS_FILE
    owners = filled(path, 1)
    await owners.flush()
    before = path.read_bytes()
    sync = os.fsync
    replaced: list[bool] = []

    def replace_once(descriptor: int) -> None:
        sync(descriptor)
        if not replaced:
            replaced.append(True)
            (tmp_path / "new").write_bytes(before)
            os.replace(tmp_path / "new", path)

    monkeypatch.setattr(os, "fsync", replace_once)
    owners.add(name_of(2), "acct", "ws", NOW)
    await owners.flush()
    assert replaced
    assert reloaded(path).get(name_of(2)) == Owner("acct", "ws")
    assert owners.get(name_of(2)) == Owner("acct", "ws")


async def test_what_another_process_adds_is_learned(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    one, other = filled(path, 1), filled(path)
    await one.flush()
    assert other.get(name_of(1)) is None
    await other.flush()
    assert other.get(name_of(1)) == Owner("acct", "ws")


async def test_a_disk_that_takes_nothing_is_told_of_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data" / OWNERS_FILE
    owners = filled(path, 1)
    for _ in range(3):
        await owners.flush()
    assert caplog.text.count("owners of compacted histories not written") == 1
    path.parent.mkdir()
    owners.add(name_of(2), "acct", "ws", NOW)
    await owners.flush()
    assert len(reloaded(path)) == 2


async def test_a_new_owner_is_on_disk_at_once(tmp_path: Path) -> None:
    async with home(tmp_path) as h:
        for number in range(200):
            h.owners.add(name_of(number), "acct", "ws", NOW)
        await until(lambda: not h.background.statistics()["tasks"])
    assert len(reloaded(tmp_path / OWNERS_FILE)) == 200


WRITER = """
import asyncio, hashlib, sys
from pathlib import Path
from codex_proxy.accounts.memory import Owners
path, who, count, loads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

async def main():
    owners = Owners(path)
    owners.load()
    print("ready", flush=True)
    for number in range(count):
        name = hashlib.blake2b(f"{who}/{number}".encode(), digest_size=12).hexdigest()
        owners.add(name, who, "ws", 1.0)
        await owners.flush()
        print(number, flush=True)
        if loads and number % loads == 0:
            # What is repeated makes the file worth making anew.
            for turn in range(9):
                owners.add("ab" * 12, f"{who}-{turn}", "ws", 1.0)
                await owners.flush()
            Owners(path).load()

asyncio.run(main())
"""


def writer(path: Path, who: str, count: int, loads: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), who, str(count), str(loads)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def names_by(who: str, count: int) -> list[str]:
    return [hashlib.blake2b(f"{who}/{n}".encode(), digest_size=12).hexdigest() for n in range(count)]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """Also while some of them make the file anew again and again."""
    path = tmp_path / OWNERS_FILE
    processes = [writer(path, f"p{n}", 60, 3 if n % 2 else 0) for n in range(4)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = reloaded(path)
    for number in range(4):
        who = f"p{number}"
        assert [found.get(name) for name in names_by(who, 60)] == [Owner(who, "ws")] * 60


def test_a_kill_at_any_moment_leaves_what_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / OWNERS_FILE
    for turn in range(5):
        who = f"k{turn}"
        process = writer(path, who, 10_000, 4)
        assert process.stdout is not None
        flushed = -1
        for line in process.stdout:
            flushed = int(line) if line.strip().isdigit() else flushed
            if flushed >= 10 + turn:
                break
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        flushed = max([flushed, *(int(word) for word in rest)])
        found = reloaded(path)
        names = names_by(who, flushed + 1)
        assert [found.get(name) for name in names] == [Owner(who, "ws")] * len(names)
