"""Two thousand accounts: what a request, a timer and a change of files look at. Counted, not timed."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import memory
from codex_proxy.accounts.account import Account, Cause
from codex_proxy.accounts.memory import Memory
from codex_proxy.accounts.pool import Lease, Pool, Want
from codex_proxy.accounts.quota import Quota
from codex_proxy.accounts.scheduler import STRATEGIES, Horizon, make_strategy
from codex_proxy.accounts.state import State
from codex_proxy.accounts.store import Problem, Scan
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import PoolExhausted, Verdict
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background
from tests.accounts.making import DAY, NOW, Middle, credential, failure, named
from tests.counting import Calls

COUNT = 2_000
NEW = Want("gpt-5.5", tokens=9_000)


def numbers(rng: random.Random, now: float) -> dict[str, str]:
    return {
        "x-codex-plan-type": rng.choice(["plus", "plus", "free", "pro"]),
        "x-codex-primary-used-percent": str(rng.randrange(0, 96)),
        "x-codex-primary-window-minutes": "300",
        "x-codex-primary-reset-at": str(int(now + rng.uniform(600, 18_000))),
        "x-codex-secondary-used-percent": str(rng.randrange(0, 96)),
        "x-codex-secondary-window-minutes": "10080",
        "x-codex-secondary-reset-at": str(int(now + rng.uniform(3_600, 7 * DAY))),
    }


def many(name: str = "horizon", *, count: int = COUNT, known: bool = True) -> tuple[Pool, ManualClock]:
    clock, rng = ManualClock(NOW), random.Random(name)
    pool = Pool(clock, rng=Middle(), strategy=make_strategy(name))
    pool.apply(Scan([credential(f"u{number}", ends=NOW + 30 * DAY) for number in range(count)], []))
    if known:
        for one in pool:
            pool.read_headers(one, numbers(rng, NOW))
    return pool, clock


class Looks:
    """How often accounts were looked at, in whichever way."""

    def __init__(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = pool
        self.settled = 0
        self.left = 0
        settle, left = Account.settle, Account.left

        def settling(account: Account, now: float) -> bool:
            self.settled += 1
            return settle(account, now)

        def leaving(account: Account, now: float, family: str | None) -> float | None:
            self.left += 1
            return left(account, now, family)

        monkeypatch.setattr(Account, "settle", settling)
        monkeypatch.setattr(Account, "left", leaving)

    @property
    def scored(self) -> int:
        strategy = self.pool._strategy
        return strategy.looks if isinstance(strategy, Horizon) else self.left

    @property
    def filed(self) -> int:
        return self.pool._shelves.looks if self.pool._shelves is not None else 0

    def all(self) -> int:
        return self.settled + self.scored + self.filed


# -- a request -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("known", [True, False])
def test_new_conversations_look_at_few_accounts(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, clock = many(name, known=known)
    pool.pick(NEW).release()
    looks = Looks(pool, monkeypatch)
    before = looks.all()
    leases = [pool.pick(NEW) for _ in range(50)]
    assert len({lease.account.alias for lease in leases}) >= (20 if name == "horizon" else 1)
    assert looks.all() - before <= 50 * 15, "50 at once, and no account has changed but those that were taken"
    for lease in leases:
        lease.ok()
        lease.release()
    before = looks.all()
    for _ in range(100):
        clock.advance(0.5)
        lease = pool.pick(NEW)
        lease.ok()
        lease.release()
        pool.spent(lease.account, 12_000.0)
    assert looks.all() - before <= 50 + 100 * 40


def test_the_more_accounts_the_fewer_of_them_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns go on, numbers change, and what is learned changes every score."""
    looked: dict[int, int] = {}
    for count in (200, COUNT):
        with monkeypatch.context() as patch:
            pool, clock = many(count=count)
            rng = random.Random(5)
            pool.pick(NEW).release()
            looks = Looks(pool, patch)
            before, leases = looks.all(), list[Lease]()
            for _ in range(400):
                clock.advance(rng.uniform(0.01, 0.5))
                leases.append(pool.pick(NEW))
                while len(leases) > 30:
                    lease = leases.pop(rng.randrange(len(leases)))
                    pool.read_headers(lease.account, numbers(rng, clock.now()))
                    lease.ok()
                    lease.release()
                    pool.spent(lease.account, rng.lognormvariate(9.3, 0.8))
            looked[count] = looks.all() - before
    assert looked[COUNT] <= 3 * looked[200]
    assert looked[COUNT] <= 400 * 60


def test_a_running_conversation_looks_at_its_own_account_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = many()
    want = Want("gpt-5.5", session="s", tokens=9_000)
    first = pool.pick(want)
    first.ok()
    first.release()
    looks = Looks(pool, monkeypatch)
    before = looks.all()
    for _ in range(40):
        clock.advance(1.0)
        lease = pool.pick(want)
        assert lease.account is first.account
        lease.ok()
        lease.release()
    # That it may serve, and what it scores.
    assert looks.all() - before == 40 * 2


def test_when_all_rest_that_is_told_without_a_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = many("round-robin")
    for number, one in enumerate(pool):
        one.hold(Cause.LIMIT, NOW + 1_000 + number)
    with pytest.raises(PoolExhausted):
        pool.pick(NEW)
    looks = Looks(pool, monkeypatch)
    before = looks.all()
    for _ in range(50):
        with pytest.raises(PoolExhausted) as caught:
            pool.pick(NEW)
        assert caught.value.resets_at == NOW + 1_000
        assert not pool.has_other(NEW, ())
    assert looks.all() == before


def test_the_states_of_all_are_known_without_a_look_at_those_that_stayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, clock = many("round-robin")
    for user in ("u3", "u4"):
        named(pool, user).hold(Cause.LIMIT, NOW + 60)
    pool.accounts()
    looks = Looks(pool, monkeypatch)
    before = looks.all()
    assert sum(one.state is State.COOLING for one in pool.accounts()) == 2
    assert looks.all() == before
    clock.advance(61)
    assert all(one.state is State.READY for one in pool.accounts())
    assert looks.all() - before <= 2 * 2


def test_numbers_that_are_told_again_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, clock = many(count=40)
    one, said = named(pool, "u1"), numbers(random.Random(1), NOW)
    taken = 0
    take = Quota._take

    def taking(quota: Quota, *args: Any, **more: Any) -> None:
        nonlocal taken
        taken += 1
        take(quota, *args, **more)

    monkeypatch.setattr(Quota, "_take", taking)
    for number in range(100):
        clock.advance(1.0)
        # The one thing that differs from answer to answer.
        after = str(int(said["x-codex-primary-reset-at"]) - int(clock.now()))
        pool.read_headers(one, {**said, "x-codex-primary-reset-after-seconds": after, "date": str(number)})
    assert taken <= 3
    main = one.quota.families["codex"].primary
    assert main is not None
    assert (main.seen_at, one.quota.seen_at) == (clock.now(), clock.now())


# -- by itself -----------------------------------------------------------------------------


async def test_a_look_at_the_timers_is_a_look_at_what_has_changed(tmp_path: Path) -> None:
    pool, clock = many()
    live = Live(Settings(data_dir=tmp_path, auth_dir=tmp_path))
    background = Background()
    keeper = Keeper(
        pool, live=live, clock=clock, background=background, outbound=Outbound(live), rng=Middle()
    )
    agendas = (keeper._questions, keeper.exchanges._agenda, keeper._model_lists)

    def tick() -> int:
        before = sum(agenda.looks for agenda in agendas)
        keeper.seconds_to_next_probe()
        keeper.exchanges.seconds_to_next()
        assert keeper._due_questions(clock.now()) == []
        return sum(agenda.looks for agenda in agendas) - before

    assert tick() >= 2 * COUNT
    for _ in range(20):
        clock.advance(1.0)
        assert tick() == 0
    lease = pool.pick(NEW)
    lease.failed(failure(Verdict.EXHAUSTED, resets_at=NOW + 5_000))
    lease.release()
    assert 1 <= tick() <= 4
    assert tick() == 0
    await background.aclose()


async def test_what_is_kept_is_rendered_only_of_accounts_that_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, clock = many(count=300)
    background = Background()
    live = Live(Settings(data_dir=tmp_path))
    kept = Memory(pool, live=live, clock=clock, background=background)
    await kept.load()
    dumped: list[str] = []
    dump = memory.dump_account

    def dumping(account: Account) -> Any:
        dumped.append(account.alias)
        return dump(account)

    monkeypatch.setattr(memory, "dump_account", dumping)
    await kept.save()
    assert len(dumped) == 300
    file = tmp_path / memory.STATE_FILE
    written = await asyncio.to_thread(file.stat)
    dumped.clear()
    await kept.save()
    assert (dumped, (await asyncio.to_thread(file.stat)).st_mtime_ns) == ([], written.st_mtime_ns)
    lease = pool.pick(NEW)
    lease.ok()
    named(pool, "u7").hold(Cause.LIMIT, NOW + 60)
    named(pool, "u8").refuse("responses gpt-6", NOW + 60, NOW)
    pool.read_headers(named(pool, "u9"), numbers(random.Random(3), NOW))
    await kept.save()
    assert sorted(dumped) == sorted({"u7", "u8", "u9", lease.account.alias})
    again = Memory(Pool(clock), live=live, clock=clock, background=background)
    await again.load()
    assert set(again._known) == {one.key for one in pool}
    assert b'"limit"' in again._known[named(pool, "u7").key][1]
    await background.aclose()


# -- files ---------------------------------------------------------------------------------


def calls_of(work: Callable[[], object]) -> int:
    """Count the calls of functions that *work* makes."""
    with Calls() as counted:
        work()
    return counted.by_code.total() + counted.in_c


def reloads(count: int) -> list[int]:
    """Count what it takes to follow files that come, change, go, and cannot be read, so many at a time."""
    pool, _ = many(count=count, known=False)
    pool.pick(NEW).release()
    old = [one.credential for one in pool]
    fresh = [credential(f"new{number}", ends=NOW + DAY) for number in range(count)]
    changed = [credential(f"u{number}", ends=NOW + DAY, n=1) for number in range(count)]
    unread = [Problem(one.path, "half written") for one in changed]
    pool.pick(NEW).release()

    def follow(scan: Scan) -> int:
        made = calls_of(lambda: pool.apply(scan))
        return made + calls_of(lambda: pool.pick(NEW).release())

    return [
        follow(Scan(old, [])),
        follow(Scan([*old, *fresh], [])),
        follow(Scan([*changed, *fresh], [])),
        follow(Scan(fresh, unread)),
        follow(Scan(fresh, [])),
        follow(Scan([fresh[0]], [])),
    ]


def test_twice_as_many_files_take_twice_as_long_to_follow() -> None:
    for few, twice in zip(reloads(150), reloads(300), strict=True):
        assert twice <= 2.6 * few
