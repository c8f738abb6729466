"""What keys are allotted: their turns begin at once, and nobody gets or loses anything by it."""

import asyncio
import threading
from typing import Any

import pytest

from codex_proxy.errors import KeyRefused, LedgerAway, OutOfFunds, ProxyError, RequestError
from codex_proxy.ledger.allotments import MILLISECONDS
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Budget, Window
from codex_proxy.ledger.operations import Errand, Work
from tests.ledger.conftest import Database
from tests.ledger.making import NOON, Holder, clock, hold, holder, money, running, settlement
from tests.ledger.test_faults import cut, until

TURN = 1_000
PLENTY = 1_000 * TURN


async def allotted(ledger: Ledger, of: Holder, name: str = "first") -> None:
    """Have a key be allotted something, with a turn of it under way."""
    await ledger.authorize(hold(of, name, TURN))
    assert ledger._writer._allotted[of.key_id] > 0


def begins(ledger: Ledger, of: Holder, name: str, nanos: int = TURN, **fields: Any) -> bool:
    """Whether a turn begins at once; otherwise it has not begun at all."""
    return ledger.begin(hold(of, name, nanos, **fields)) is None


async def flush(ledger: Ledger, of: Holder) -> None:
    """Wait until everything is written that was asked before."""
    await ledger.settled(settlement(of, "flush", 0))


async def test_a_key_in_use_waits_for_its_first_turn_alone(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        asked = ledger.begin(hold(team, "first", TURN))
        assert asked is not None
        await ledger.ask(asked)
        for number in range(16):
            assert begins(ledger, team, f"turn {number}")
            await flush(ledger, team)
        assert money(ledger, team) == (PLENTY, 17 * TURN)
        assert ledger.statistics().holds_open == 17
        for number in range(16):
            ledger.settle(settlement(team, f"turn {number}", TURN))
        await flush(ledger, team)
        assert money(ledger, team) == (PLENTY - 16 * TURN, TURN)
        assert await ledger.check() == []


async def test_it_grows_while_it_is_used(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        for number in range(100):
            assert begins(ledger, team, f"turn {number}"), number
            ledger.settle(settlement(team, f"turn {number}", TURN))
            await flush(ledger, team)
        assert money(ledger, team) == (PLENTY - 100 * TURN, TURN)
        assert await ledger.check() == []


async def test_on_a_server_every_turn_is_asked_for(postgres: Database) -> None:
    async with running(postgres) as ledger:
        team = await holder(ledger, PLENTY)
        await ledger.authorize(hold(team, "first", TURN))
        assert not begins(ledger, team, "second")
        assert not ledger._writer._allotted


@pytest.mark.parametrize("balance", [0, TURN, 100 * TURN, 127 * TURN])
async def test_nothing_is_allotted_where_it_would_be_much(sqlite: Database, balance: int) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, balance)
        for number in range(3):
            try:
                await ledger.authorize(hold(team, f"turn {number}", TURN))
            except OutOfFunds:
                assert money(ledger, team)[1] == balance
        assert not ledger._writer._allotted


async def test_nothing_is_allotted_where_nothing_is_set_aside(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        for number in range(3):
            assert not begins(ledger, team, f"turn {number}", 0)
        assert not ledger._writer._allotted


async def test_whoever_uses_it_up_at_once_is_allotted_more(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 100 * PLENTY)
        waited = []
        for number in range(2_000):
            asked = ledger.begin(hold(team, f"turn {number}", TURN))
            if asked is not None:
                waited.append(number)
                await ledger.ask(asked)
        # There was no time to answer in between.
        assert len(waited) < 20
        assert waited[-1] - waited[-2] > 250
        # And less where that would be much.
        await adjust(ledger, team, -(100 * PLENTY - 2_000 * TURN - 150 * TURN))
        for number in range(20):
            await ledger.authorize(hold(team, f"later {number}", TURN))
        assert begins(ledger, team, "last")
        assert await ledger.check() == []


@pytest.mark.parametrize("keys", [1, 3])
async def test_racing_turns_get_all_that_is_there_and_no_more(sqlite: Database, keys: int) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 300 * TURN)
        team_keys = [team.key_id]
        for number in range(keys - 1):
            key, _ = await ledger.create_key(team.user_id, f"key {number}", actor="test")
            team_keys.append(key.id)
        served = refused = at_once = 0

        async def turn(number: int) -> None:
            nonlocal served, refused, at_once
            of = Holder(team.user_id, team_keys[number % keys])
            try:
                asked = ledger.begin(hold(of, f"turn {number}", TURN))
                at_once += asked is None
                if asked is not None:
                    await ledger.ask(asked)
            except OutOfFunds:
                refused += 1
                return
            await asyncio.sleep(0)
            ledger.settle(settlement(of, f"turn {number}", TURN))
            served += 1

        left = iter(range(600))

        async def caller() -> None:
            for number in left:
                await turn(number)

        await asyncio.gather(*(caller() for _ in range(50)))
        assert (served, refused) == (300, 300)
        assert at_once > 10
        await flush(ledger, team)
        assert money(ledger, team) == (0, 0)
        assert ledger.statistics().writer.shortfalls == 0
        assert await ledger.check() == []


async def test_what_one_key_has_is_there_for_another_that_needs_it(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 200 * TURN)
        key, _ = await ledger.create_key(team.user_id, "other", actor="test")
        other = Holder(team.user_id, key.id)
        await allotted(ledger, team)
        await ledger.authorize(hold(other, "large", 199 * TURN))
        assert money(ledger, team) == (200 * TURN, 200 * TURN)
        with pytest.raises(OutOfFunds):
            await ledger.authorize(hold(team, "more", 1))
        ledger.settle(settlement(other, "large", 0))
        await allotted(ledger, team, "again")
        # For a turn that needs more, too.
        assert await ledger.top_up("again", 198 * TURN)
        assert not await ledger.top_up("again", 1)
        assert await ledger.check() == []


async def others(ledger: Ledger, of: Holder) -> Holder:
    """Another key of the same user."""
    key, _ = await ledger.create_key(of.user_id, "other", actor="test")
    return Holder(of.user_id, key.id)


async def test_several_that_need_what_one_key_has_get_it(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 200 * TURN)
        other = await others(ledger, team)
        await allotted(ledger, team)
        # All that is free is what the first key has.
        await ledger.authorize(hold(other, "large", 183 * TURN))
        await asyncio.gather(*(ledger.authorize(hold(other, f"turn {number}", TURN)) for number in range(8)))
        ledger.settle(settlement(other, "turn 0", 0))
        assert await asyncio.gather(*(ledger.top_up("large", TURN) for _ in range(10))) == [True] * 9 + [
            False
        ]
        assert money(ledger, team) == (200 * TURN, 200 * TURN)
        assert await ledger.check() == []


async def test_who_is_refused_what_was_just_given_back_asks_again(sqlite: Database) -> None:
    now = clock()
    async with running(sqlite, at=now) as ledger:
        team = await holder(ledger, 200 * TURN)
        other = await others(ledger, team)
        await allotted(ledger, team)
        now.advance(MILLISECONDS / 1_000)
        async with asyncio.TaskGroup() as group:
            group.create_task(ledger.authorize(hold(other, "large", 199 * TURN)))
            await asyncio.sleep(0)
            await ledger.recall_idle()
        assert money(ledger, team) == (200 * TURN, 200 * TURN)


async def test_nobody_waits_who_is_refused_at_the_end(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 200 * TURN)
        other = await others(ledger, team)
        await allotted(ledger, team)
        go_on = threading.Event()
        ledger._writer.put(Work(lambda _: go_on.wait(5.0), None, is_quiet=True))

        async def let_go() -> None:
            # The end is asked for before the other two are answered.
            await until(lambda: any(isinstance(one, Errand) for one in ledger._writer._waiting))
            go_on.set()

        turn = ledger.authorize(hold(other, "large", 199 * TURN))
        more = ledger.top_up("first", 199 * TURN)
        refusal, grown, *_ = await asyncio.wait_for(
            asyncio.gather(turn, more, ledger.aclose(), let_go(), return_exceptions=True), 3.0
        )
        assert isinstance(refusal, OutOfFunds)
        assert grown is False


@pytest.mark.parametrize("mode", ["personal", "billing"])
async def test_budgets_are_used_up_to_the_last(sqlite: Database, mode: Any) -> None:
    async with running(sqlite, mode=mode) as ledger:
        team = await holder(ledger, PLENTY)
        budgets = (
            (team.user_id, Budget(Window.DAY, 200 * TURN)),
            (team.key_id, Budget(Window.HOURS_5, PLENTY)),
        )
        at_once = 0
        for number in range(200):
            asked = ledger.begin(hold(team, f"turn {number}", TURN, budgets=budgets))
            if asked is not None:
                await ledger.ask(asked)
            else:
                at_once += 1
            one = settlement(team, f"turn {number}", TURN, budgets=budgets, is_billed=mode == "billing")
            ledger.settle(one)
        with pytest.raises(OutOfFunds, match="a day"):
            await ledger.authorize(hold(team, "one more", TURN, budgets=budgets))
        assert at_once > 10
        assert await ledger.check() == []


async def test_it_is_for_the_budgets_and_the_moment_that_were_looked_at(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        assert begins(ledger, team, "same")
        assert not begins(ledger, team, "other", budgets=((team.user_id, Budget(Window.DAY, TURN)),))
        for name, offset in (("later", MILLISECONDS), ("earlier", -1)):
            await allotted(ledger, team, f"before {name}")
            assert begins(ledger, team, f"at {name}", at=NOON)
            assert not begins(ledger, team, name, at=NOON + offset)
        assert await ledger.check() == []


async def test_whoever_does_not_use_it_any_more_loses_it(sqlite: Database) -> None:
    now = clock()
    async with running(sqlite, at=now) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        await ledger.recall_idle()
        assert begins(ledger, team, "still there")
        now.advance(MILLISECONDS / 1_000)
        await ledger.recall_idle()
        await flush(ledger, team)
        assert not ledger._writer._allotted


async def adjust(ledger: Ledger, of: Holder, nanos: int) -> None:
    await ledger.credit(
        of.user_id, nanos, kind="adjust", reason="test", idempotency_key=f"adjust {nanos}", actor="test"
    )


async def test_who_changes_a_balance_finds_all_of_it(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        assert begins(ledger, team, "second")
        async with asyncio.TaskGroup() as group:
            group.create_task(adjust(ledger, team, 2 * TURN - PLENTY))
            await asyncio.sleep(0)
            # It comes too late to take from what was allotted.
            with pytest.raises(OutOfFunds):
                await ledger.authorize(hold(team, "third", TURN))
        assert money(ledger, team) == (2 * TURN, 2 * TURN)
        with pytest.raises(RequestError):
            await adjust(ledger, team, -1)
        assert await ledger.check() == []


async def test_a_key_that_is_revoked_begins_nothing_more(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        async with asyncio.TaskGroup() as group:
            group.create_task(ledger.revoke_key(team.key_id, "test"))
            await asyncio.sleep(0)
            with pytest.raises(KeyRefused):
                await ledger.authorize(hold(team, "second", TURN))
        assert await ledger.check() == []


async def test_a_turn_that_costs_more_takes_nothing_that_others_were_allotted(sqlite: Database) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, 200 * TURN)
        await allotted(ledger, team)
        await ledger.settled(settlement(team, "first", 500 * TURN))
        assert money(ledger, team) == (16 * TURN, 0)
        for number in range(16):
            assert begins(ledger, team, f"turn {number}")
            ledger.settle(settlement(team, f"turn {number}", TURN))
        await flush(ledger, team)
        assert money(ledger, team) == (0, 0)
        assert await ledger.check() == []


async def test_turns_that_have_begun_when_the_database_goes_away(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        back = cut(ledger, monkeypatch)
        # Nobody knows yet.
        assert begins(ledger, team, "ends while it is away")
        assert begins(ledger, team, "ends afterwards")
        await ledger.settled(settlement(team, "ends while it is away", TURN))
        assert ledger.is_away
        with pytest.raises(LedgerAway):
            await ledger.authorize(hold(team, "refused", TURN))
        back()
        await until(lambda: not ledger.is_away)
        await until(lambda: money(ledger, team) == (PLENTY - TURN, 2 * TURN))
        assert begins(ledger, team, "new")
        for name in ("first", "ends afterwards", "new"):
            await ledger.settled(settlement(team, name, TURN))
        assert money(ledger, team) == (PLENTY - 4 * TURN, 0)
        assert await ledger.check() == []


async def test_a_turn_that_was_only_in_memory_when_the_database_went_away_for_ever(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        cut(ledger, monkeypatch)
        assert begins(ledger, team, "second")
        await ledger.settled(settlement(team, "second", TURN))
    async with running(sqlite) as ledger:
        assert money(ledger, team) == (PLENTY - TURN, 0)
        assert await ledger.check() == []


async def test_nothing_is_allotted_across_a_restart(sqlite: Database) -> None:
    async with running(sqlite) as old:
        team = await holder(old, PLENTY)
        await allotted(old, team)
        assert begins(old, team, "second")
        await old.hand_over()
        async with running(sqlite) as new:
            # Half of what is free is the old one's.
            free = PLENTY - 2 * TURN
            assert money(new, team) == (PLENTY, 2 * TURN + (free - free // 2))
            assert not begins(old, team, "not at once")
            await old.authorize(hold(team, "third", TURN))
            await new.authorize(hold(team, "fourth", TURN))
            assert begins(new, team, "fifth")
            for one, name in (
                (old, "first"),
                (old, "second"),
                (old, "third"),
                (new, "fourth"),
                (new, "fifth"),
            ):
                await one.settled(settlement(team, name, TURN))
            await until(lambda: money(new, team)[0] == PLENTY - 5 * TURN)
            await old.aclose()
            await until(lambda: money(new, team) == (PLENTY - 5 * TURN, 0))
            assert await new.check() == []


async def test_a_batch_that_the_database_will_not_have_keeps_what_was_taken(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(sqlite) as ledger:
        team = await holder(ledger, PLENTY)
        await allotted(ledger, team)
        before = ledger._writer._allotted[team.key_id]
        real = ledger._writer._base.transaction
        fails = 1

        def transaction(work: Any, **named: Any) -> Any:
            nonlocal fails
            if fails:
                fails -= 1
                raise RuntimeError("once")
            return real(work, **named)

        monkeypatch.setattr(ledger._writer._base, "transaction", transaction)
        assert begins(ledger, team, "second")
        assert begins(ledger, team, "third")
        await flush(ledger, team)
        assert ledger._writer._allotted[team.key_id] in {before - 2 * TURN, before + 14 * TURN}
        assert money(ledger, team) == (PLENTY, 3 * TURN)
        assert await ledger.check() == []


async def test_many_keys_at_random_add_up(sqlite: Database) -> None:
    """Users with more and less, turns that cost more and less, keys changed meanwhile."""
    async with running(sqlite) as ledger:
        people = [await holder(ledger, nanos * TURN, name=f"user {nanos}") for nanos in (5, 130, 200, 5_000)]
        of = [people[number % 4] for number in range(1_000)]
        left = iter(range(1_000))

        async def caller() -> None:
            for number in left:
                team = of[number]
                try:
                    await ledger.authorize(hold(team, f"turn {number}", TURN))
                except ProxyError:
                    continue
                if number % 50 == 0:
                    await ledger.update_key(team.key_id, {"name": f"name {number}"}, "test")
                if number % 3 == 0:
                    await ledger.top_up(f"turn {number}", TURN // 2)
                await asyncio.sleep(0)
                ledger.settle(settlement(team, f"turn {number}", number * 7_919 % (3 * TURN)))

        await asyncio.gather(*(caller() for _ in range(40)))
        await flush(ledger, people[0])
        assert ledger.statistics().holds_open == 0
        assert [money(ledger, one)[1] for one in people] == [0] * 4
        assert money(ledger, people[3])[0] < 5_000 * TURN - 100 * TURN
        assert await ledger.check() == []
