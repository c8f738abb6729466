"""Tokens under load: refused, expired, revoked; what the caller sees and what the files hold."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import upkeep
from codex_proxy.accounts.account import Cause
from codex_proxy.accounts.state import State
from codex_proxy.simulator import SimAccount, Simulator
from tests.harness import Stand, standing


def _file(stand: Stand, account: SimAccount) -> dict[str, Any]:
    path = stand.auths / f"simulated-{account.name}.json"
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


async def _expire(stand: Stand, seconds: float = -60.0) -> None:
    """Let every account's file hold a token that ends *seconds* from now."""
    for account in stand.accounts:
        account.issue(seconds)
    stand.sim.write_auth_files(stand.auths)
    await stand.daemon.keeper.load()


@pytest.mark.parametrize("code", ["token_invalidated", "token_expired", "token_revoked", ""])
@pytest.mark.parametrize("accounts", [1, 3])
async def test_a_refused_token_is_exchanged_and_the_turn_goes_on(
    tmp_path: Path, accounts: int, code: str
) -> None:
    async with standing(tmp_path, accounts=accounts) as stand:
        if accounts > 1:
            stand.in_order()
        first = stand.accounts[0]
        first.set("unauthorized", code=code)
        old = first.tokens.access
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert answer.types[-1] == "response.completed"
        assert stand.tried() == [first.name, first.name]
        assert [turn.status for turn in stand.sim.turns] == [401, 200]
        (exchange,) = stand.sim.exchanges
        assert exchange.json["refresh_reason"] == "unauthorized_recovery"
        assert (
            stand.sim.turns[1].headers["authorization"] == f"Bearer {first.tokens.access}" != f"Bearer {old}"
        )
        # It was written down.
        assert _file(stand, first)["access_token"] == first.tokens.access
        assert _file(stand, first)["refresh_token"] == first.tokens.refresh
        known = stand.known(first)
        assert known.state is State.READY
        assert not known.strikes


async def test_an_account_that_refuses_new_tokens_too_is_left(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("unauthorized", times=2)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.tried() == [first.name, first.name, second.name]
        assert len(stand.sim.exchanges) == 1
        known = stand.known(first)
        assert known.state is State.COOLING
        assert known.cooling_cause() is Cause.REJECTED


async def test_a_revoked_login_costs_the_caller_nothing(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        before = _file(stand, first)
        first.set("revoked")
        for _ in range(2):
            assert (await stand.ask("hi")).status == 200
        assert stand.tried()[:2] == [first.name, second.name]
        assert first.name not in stand.tried()[2:]
        assert len(stand.sim.exchanges) == 1
        known = stand.known(first)
        assert known.state is State.NEEDS_LOGIN
        assert known.reason() == "refresh_token_invalidated"
        assert _file(stand, first) == before

        # A person logs in again; the file is all it takes.
        first.set("ok")
        first.issue()
        stand.sim.write_auth_files(stand.auths)
        await stand.daemon.keeper.load()
        assert stand.known(first).state is State.READY
        assert (await stand.ask("hi")).status == 200
        assert stand.tried()[-1] == first.name


PASSING = ("500", "502", "503", "429", "403", "cloudflare", "bad_json", "cut", "hang")
PERMANENT = {
    "reused": "refresh_token_reused",
    "invalidated": "refresh_token_invalidated",
    "expired": "refresh_token_expired",
    "invalid_grant": "invalid_grant",
    "401": "",
}


@pytest.mark.parametrize("how", PASSING)
async def test_an_issuer_in_trouble_costs_no_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(upkeep, "EXCHANGE_SECONDS", 0.2)
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        before = _file(stand, first)
        first.set("unauthorized", refresh=how)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.tried() == [first.name, second.name]
        assert len(stand.sim.exchanges) == 1
        known = stand.known(first)
        assert known.login_lost == ""
        assert known.cooling_cause() is Cause.REJECTED
        assert known.refresh_after > time.time() + 5
        assert _file(stand, first) == before

        # The issuer is well again: its next look at the account mends it, without a caller.
        first.set("unauthorized", refresh="ok")
        known.refresh_after = 0.0
        await stand.daemon.keeper.refresh_due()
        await stand.until(lambda: known.refreshing is None)
        assert known.state is State.READY
        assert (await stand.ask("hi")).status == 200
        assert stand.tried()[-1] == first.name


@pytest.mark.parametrize(("how", "reason"), PERMANENT.items())
async def test_a_login_that_is_over_is_left_and_its_file_kept(tmp_path: Path, how: str, reason: str) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        before = _file(stand, first)
        first.set("unauthorized", refresh=how)
        for _ in range(2):
            assert (await stand.ask("hi")).status == 200
        assert stand.tried()[:2] == [first.name, second.name]
        assert first.name not in stand.tried()[2:]
        assert len(stand.sim.exchanges) == 1
        known = stand.known(first)
        assert known.state is State.NEEDS_LOGIN
        assert known.reason().startswith(reason)
        assert known.reason()
        assert _file(stand, first) == before
        # A timer does not knock again with a token that is known to be dead.
        await stand.daemon.keeper.refresh_due()
        assert known.refreshing is None


@pytest.mark.parametrize("how", ["reused", "invalidated", "500"])
async def test_a_valid_access_token_serves_to_its_end_whatever_the_issuer_says(
    tmp_path: Path, how: str
) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        await _expire(stand, 200.0)
        # Issued long ago: a token that lives for minutes only is left alone for half its life.
        account.tokens.issued_at -= 3600.0
        stand.sim.write_auth_files(stand.auths)
        await stand.daemon.keeper.load()
        account.set("ok", refresh=how)
        # Less than five minutes are left, so the timer asks.
        await stand.daemon.keeper.refresh_due()
        await stand.until(lambda: stand.known(account).refreshing is None)
        assert len(stand.sim.exchanges) == 1
        assert stand.known(account).state is State.READY
        assert (await stand.ask("hi")).status == 200
        assert len(stand.sim.exchanges) == 1


async def test_an_answer_without_a_refresh_token_loses_none(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        before = _file(stand, account)
        account.set("unauthorized", refresh="no_refresh_token")
        assert (await stand.ask("hi")).status == 200
        after = _file(stand, account)
        assert after["access_token"] == account.tokens.access != before["access_token"]
        assert after["refresh_token"] == before["refresh_token"]
        assert after["id_token"] == before["id_token"]
        # It is as good as before.
        account.set("unauthorized")
        assert (await stand.ask("hi")).status == 200
        assert len(stand.sim.exchanges) == 2


async def test_fifty_turns_on_an_expired_token_make_one_exchange(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        await _expire(stand)
        stand.sim.latency = 0.02
        answers = await asyncio.gather(*(stand.ask(f"question {number}") for number in range(50)))
        assert {answer.status for answer in answers} == {200}
        assert [answer.text for answer in answers] == [f"pong: question {number}" for number in range(50)]
        assert len(stand.sim.exchanges) == 1
        # The expired token was never sent.
        assert len(stand.sim.turns) == 50
        assert {turn.headers["authorization"] for turn in stand.sim.turns} == {
            f"Bearer {account.tokens.access}"
        }


async def test_fifty_turns_on_a_refused_token_make_one_exchange(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        account.set("unauthorized")
        stand.sim.latency = 0.02
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(50)))
        assert {answer.status for answer in answers} == {200}
        assert len(stand.sim.exchanges) == 1
        await stand.idle()
        assert stand.known(account).in_flight == 0


async def test_fifty_turns_on_a_dead_login_ask_the_issuer_once(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await _expire(stand)
        stand.accounts[0].set("ok", refresh="invalidated")
        answers = await asyncio.gather(*(stand.ask("hi") for _ in range(50)))
        assert {answer.status for answer in answers} == {429}
        assert {answer.json["error"]["code"] for answer in answers} == {"no_account_available"}
        assert len(stand.sim.exchanges) == 1
        assert stand.sim.turns == []


async def test_a_caller_who_leaves_interrupts_no_exchange(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        await _expire(stand)
        account.set("ok", refresh="slow", refresh_seconds=0.1)
        asking = asyncio.ensure_future(stand.ask("hi"))  # noqa: TID251 -- a caller, not the daemon
        await stand.until(lambda: len(stand.sim.exchanges) == 1)
        asking.cancel()
        known = stand.known(account)
        await stand.until(lambda: known.in_flight == 0)
        assert known.refreshing is not None
        await stand.until(lambda: known.refreshing is None)
        assert not stand.sim.exchanges[0].cancelled
        assert _file(stand, account)["refresh_token"] == account.tokens.refresh
        assert known.state is State.READY
        assert (await stand.ask("hi")).status == 200


async def test_callers_do_not_wait_for_an_exchange_while_others_can_serve(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        first.issue(-60)
        stand.sim.write_auth_files(stand.auths)
        await stand.daemon.keeper.load()
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [stand.accounts[1].name]
        assert stand.sim.exchanges == []


async def test_a_token_that_another_program_has_exchanged_is_taken_from_the_file(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        # Another program exchanges the token and writes the file; we have not looked yet.
        stand.sim.issuer_state.exchange(account.tokens.refresh, stand.sim.issuer_state.client_id)
        stand.sim.write_auth_files(stand.auths)
        old = stand.known(account).credential.access.reveal()
        for tokens in stand.sim.issuer_state._access.values():
            tokens.access_revoked = tokens.access == old
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert stand.sim.exchanges == []
        assert stand.known(account).credential.refresh.reveal() == account.tokens.refresh


async def test_a_data_folder_that_cannot_be_written_costs_no_turn(tmp_path: Path) -> None:
    def blocked(sim: Simulator, folder: Path) -> None:
        sim.write_auth_files(folder)
        # A file where the folder of pending records would be.
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "pending").write_text("", encoding="utf-8")

    async with standing(tmp_path, accounts=1, auths=blocked) as stand:
        (account,) = stand.accounts
        account.set("unauthorized")
        assert (await stand.ask("hi")).status == 200
        assert _file(stand, account)["access_token"] == account.tokens.access
