"""Tokens: who gets in, how they rotate, and how logging in goes."""

import asyncio
import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from codex_proxy.protocol.wire import loads
from codex_proxy.simulator import Simulator
from codex_proxy.simulator.issuer import CLIENT_ID, s256

if TYPE_CHECKING:
    from tests.simulator.conftest import Caller

AUTH = "https://api.openai.com/auth"


def claims(token: str) -> dict[str, Any]:
    header, payload, signature = token.split(".")
    assert "=" not in token
    assert header
    assert signature
    value: dict[str, Any] = loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return value


async def test_tokens_carry_the_claims_that_clients_read(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    access, identity = claims(account.tokens.access), claims(account.tokens.id_token)
    assert access["exp"] == int(account.tokens.expires_at)
    assert access["exp"] - access["iat"] == 10 * 86_400
    assert access[AUTH]["chatgpt_account_id"] == account.account_id
    assert access[AUTH]["chatgpt_user_id"] == identity[AUTH]["chatgpt_user_id"] == account.user_id
    assert identity["email"] == account.email
    assert identity[AUTH]["chatgpt_plan_type"] == "plus"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer nobody's", "chatgpt-account-id": "own"},
        {"authorization": "own"},
        {"authorization": "own", "chatgpt-account-id": "another"},
    ],
)
async def test_who_is_not_known_is_not_let_in(caller: "Caller", headers: dict[str, str]) -> None:
    own = caller.headers("a1")
    swap = {"own": own["authorization"]}
    sent = {name: swap.get(value, value) for name, value in headers.items()}
    answer = await caller.turn(account=None, headers=sent)
    assert answer.status == 401


async def test_an_expired_token_is_refused_by_the_simulator_s_clock(caller: "Caller") -> None:
    caller.sim.advance(10 * 86_400 + 1)
    assert (await caller.turn()).json["error"]["code"] == "token_expired"
    caller.sim.account("a2").issue(expires_in=60)
    assert (await caller.turn(account="a2")).status == 200
    caller.sim.account("a2").expire_access()
    assert (await caller.turn(account="a2")).status == 401


async def test_a_refresh_token_works_once(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    old = account.tokens
    account.set("unauthorized")
    assert (await caller.turn()).status == 401
    answer = await caller.refresh(old.refresh, refresh_reason="unauthorized_recovery")
    assert answer.status == 200
    assert {"access_token", "refresh_token", "id_token"} <= set(answer.json)
    assert answer.json["refresh_token"] == account.tokens.refresh != old.refresh
    assert (await caller.turn()).status == 200
    again = await caller.refresh(old.refresh)
    assert (again.status, again.json["error"]["code"]) == (401, "refresh_token_reused")
    # Two hands held the token: the whole family is revoked.
    family = await caller.refresh(account.tokens.refresh)
    assert (family.status, family.json["error"]["code"]) == (401, "refresh_token_invalidated")
    # What was already issued serves to its end.
    assert (await caller.turn()).status == 200
    assert caller.sim.issuer_state.exchanges == 1
    assert [received.account for received in caller.sim.exchanges] == ["a1"] * 3


async def test_of_many_exchanges_at_once_one_succeeds(caller: "Caller") -> None:
    token = caller.sim.account("a1").tokens.refresh
    statuses = [a.status for a in await asyncio.gather(*(caller.refresh(token) for _ in range(10)))]
    assert sorted(statuses) == [200] + [401] * 9


async def test_an_old_access_token_can_be_made_to_end_with_its_refresh(caller: "Caller") -> None:
    headers = caller.headers()
    caller.sim.issuer_state.old_access_valid = False
    await caller.refresh(caller.sim.account("a1").tokens.refresh)
    assert (await caller.turn(account=None, headers=headers)).status == 401
    assert (await caller.turn()).status == 200


REFRESHES: list[tuple[str, int, str]] = [
    ("reused", 401, "refresh_token_reused"),
    ("invalidated", 401, "refresh_token_invalidated"),
    ("expired", 401, "refresh_token_expired"),
    ("invalid_grant", 400, "invalid_grant"),
    ("500", 500, "bad day"),
    ("503", 503, "bad day"),
    ("401", 401, "bad day"),
    ("cloudflare", 403, "Just a moment"),
    ("bad_json", 200, "<html>"),
]


@pytest.mark.parametrize(("mode", "status", "text"), REFRESHES)
async def test_an_exchange_may_fail_and_keeps_the_token(
    caller: "Caller", mode: str, status: int, text: str
) -> None:
    account = caller.sim.account("a1")
    account.set("ok", refresh=mode)
    answer = await caller.refresh(account.tokens.refresh)
    assert (answer.status, text in answer.body.decode()) == (status, True)
    account.set("ok")
    assert (await caller.refresh(account.tokens.refresh)).status == 200


async def test_an_answer_without_a_refresh_token_leaves_the_old_one_good(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    token = account.tokens.refresh
    account.set("ok", refresh="no_refresh_token")
    assert set((await caller.refresh(token)).json) == {"access_token", "token_type"}
    account.set("ok")
    assert (await caller.refresh(token)).status == 200


@pytest.mark.parametrize(("mode", "spent"), [("cut", False), ("cut_committed", True)])
async def test_an_exchange_may_be_lost_before_or_after_it_counts(
    caller: "Caller", mode: str, spent: bool
) -> None:
    account = caller.sim.account("a1")
    token = account.tokens.refresh
    account.set("ok", refresh=mode)
    with pytest.raises(aiohttp.ClientConnectionError):
        await caller.refresh(token)
    assert (account.tokens.refresh != token) is spent
    account.set("ok")
    assert (await caller.refresh(token)).status == (401 if spent else 200)


async def test_a_hanging_exchange_ends_with_its_caller(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    account.set("ok", refresh="hang_committed")
    token = account.tokens.refresh
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(caller.refresh(token), 0.03)
    assert account.tokens.refresh != token
    received = caller.sim.exchanges[0]
    await asyncio.wait_for(received.closed.wait(), 1)
    assert received.cancelled


async def test_a_slow_exchange_is_one(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    account.set("ok", refresh="slow", refresh_seconds=0.01)
    started = asyncio.get_running_loop().time()
    assert (await caller.refresh(account.tokens.refresh)).status == 200
    assert asyncio.get_running_loop().time() - started >= 0.01


async def test_revoked_refuses_both_tokens_until_a_new_login(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    account.set("revoked")
    assert (await caller.turn()).status == 401
    answer = await caller.refresh(account.tokens.refresh)
    assert answer.json["error"]["code"] == "refresh_token_invalidated"
    account.issue()
    assert (await caller.turn()).status == 200
    assert account.state == "ok"


async def test_an_expired_refresh_token_is_named_so(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    account.expire_refresh()
    assert (await caller.refresh(account.tokens.refresh)).json["error"]["code"] == "refresh_token_expired"


async def test_another_client_is_refused(caller: "Caller") -> None:
    answer = await caller.refresh(caller.sim.account("a1").tokens.refresh, client_id="app_other")
    assert (answer.status, answer.json["error"]) == (401, "invalid_client")


def login_query(challenge: str) -> dict[str, str]:
    return {
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": "http://127.0.0.1:1455/auth/callback",
        "code_challenge": challenge,
        "code_challenge_method": "S256",
        "scope": "openid profile email offline_access",
        "state": "state-of-this-login",
    }


async def test_a_browser_login_gives_working_tokens(caller: "Caller") -> None:
    verifier = "v" * 60
    query = {**login_query(s256(verifier)), "account": "a2"}
    answer = await caller.ask("GET", "/oauth/authorize", account=None, params=query)
    assert answer.status == 302
    place = urlsplit(answer.headers["location"])
    back = parse_qs(place.query)
    assert (place.netloc, back["state"]) == ("127.0.0.1:1455", ["state-of-this-login"])
    form = {
        "grant_type": "authorization_code",
        "client_id": CLIENT_ID,
        "code": back["code"][0],
        "redirect_uri": query["redirect_uri"],
        "code_verifier": verifier,
    }
    tokens = await caller.ask("POST", "/oauth/token", account=None, data=form)
    assert claims(tokens.json["access_token"])[AUTH]["chatgpt_user_id"] == caller.sim.account("a2").user_id
    assert (await caller.turn(account="a2")).status == 200
    twice = await caller.ask("POST", "/oauth/token", account=None, data=form)
    assert (twice.status, twice.json["error"]) == (400, "invalid_grant")


@pytest.mark.parametrize("wrong", ["code_verifier", "redirect_uri", "client_id"])
async def test_a_code_needs_what_it_was_asked_with(caller: "Caller", wrong: str) -> None:
    verifier = "v" * 60
    answer = await caller.ask("GET", "/oauth/authorize", account=None, params=login_query(s256(verifier)))
    form = {
        "grant_type": "authorization_code",
        "client_id": CLIENT_ID,
        "code": parse_qs(urlsplit(answer.headers["location"]).query)["code"][0],
        "redirect_uri": "http://127.0.0.1:1455/auth/callback",
        "code_verifier": verifier,
        wrong: "other",
    }
    assert (await caller.ask("POST", "/oauth/token", account=None, data=form)).status == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"code_challenge_method": "plain"},
        {"redirect_uri": "https://example.com/auth/callback"},
        {"redirect_uri": "http://127.0.0.1:1455/elsewhere"},
        {"scope": "openid"},
        {"state": "short"},
    ],
)
async def test_authorize_refuses_what_the_issuer_would_not_serve(
    caller: "Caller", wrong: dict[str, str]
) -> None:
    query = {**login_query("x"), **wrong}
    assert (await caller.ask("GET", "/oauth/authorize", account=None, params=query)).status == 400


async def test_a_person_may_refuse_a_browser_login(caller: "Caller") -> None:
    caller.sim.issuer_state.login_error = "access_denied"
    answer = await caller.ask("GET", "/oauth/authorize", account=None, params=login_query("x"))
    back = parse_qs(urlsplit(answer.headers["location"]).query)
    assert (back["error"], back["state"]) == (["access_denied"], ["state-of-this-login"])
    assert "code" not in back


async def test_a_device_login_waits_for_a_person(caller: "Caller") -> None:
    start = await caller.post("/api/accounts/deviceauth/usercode", {"client_id": CLIENT_ID}, account=None)
    assert start.json["interval"] == "5"
    poll = {"device_auth_id": start.json["device_auth_id"], "user_code": start.json["user_code"]}
    path = "/api/accounts/deviceauth/token"
    assert (await caller.post(path, poll, account=None)).status == 403
    page = {"user_code": start.json["user_code"], "account": "a2"}
    assert (await caller.ask("GET", "/codex/device", account=None, params=page)).status == 200
    approved = await caller.post(path, poll, account=None)
    assert approved.json["code_challenge"] == s256(approved.json["code_verifier"])
    form = {
        "grant_type": "authorization_code",
        "client_id": CLIENT_ID,
        "code": approved.json["authorization_code"],
        "redirect_uri": f"{caller.sim.issuer}/deviceauth/callback",
        "code_verifier": approved.json["code_verifier"],
    }
    tokens = await caller.ask("POST", "/oauth/token", account=None, data=form)
    assert claims(tokens.json["id_token"])["email"] == "a2@example.com"


async def test_device_logins_can_be_off_or_approve_themselves(caller: "Caller") -> None:
    issuer = caller.sim.issuer_state
    issuer.device_polls = 1
    start = await caller.post("/api/accounts/deviceauth/usercode", {"client_id": CLIENT_ID}, account=None)
    poll = {"device_auth_id": start.json["device_auth_id"], "user_code": start.json["user_code"]}
    statuses = [
        (await caller.post("/api/accounts/deviceauth/token", poll, account=None)).status for _ in "12"
    ]
    assert statuses == [403, 200]
    issuer.device_enabled = False
    assert (await caller.post("/api/accounts/deviceauth/usercode", {}, account=None)).status == 404


async def test_a_device_login_may_be_slowed_down_and_refused(caller: "Caller") -> None:
    issuer = caller.sim.issuer_state
    issuer.device_slow_down = 1
    start = await caller.post("/api/accounts/deviceauth/usercode", {"client_id": CLIENT_ID}, account=None)
    poll = {"device_auth_id": start.json["device_auth_id"], "user_code": start.json["user_code"]}
    errors = []
    for refusal in (None, None, "access_denied"):
        issuer.login_error = refusal
        answer = await caller.post("/api/accounts/deviceauth/token", poll, account=None)
        errors.append((answer.status, answer.json["error"]))
    assert errors == [(403, "slow_down"), (403, "authorization_pending"), (403, "access_denied")]


async def test_revoke_ends_a_login(caller: "Caller") -> None:
    tokens = caller.sim.account("a1").tokens
    body = {"token": tokens.refresh, "token_type_hint": "refresh_token"}
    assert (await caller.post("/oauth/revoke", body, account=None)).status == 400, "it names no client"
    body["client_id"] = CLIENT_ID
    caller.sim.issuer_state.revoke_status = 503
    assert (await caller.post("/oauth/revoke", body, account=None)).status == 503
    assert (await caller.turn()).status == 200
    caller.sim.issuer_state.revoke_status = 200
    assert (await caller.post("/oauth/revoke", body, account=None)).status == 200
    assert (await caller.turn()).status == 401
    assert (await caller.refresh(tokens.refresh)).status == 401


def test_account_files_are_ready_and_private(tmp_path: Path) -> None:
    sim = Simulator(accounts=2, now=lambda: 1_800_000_000.0)
    paths = sim.write_auth_files(tmp_path / "auths")
    assert [path.name for path in paths] == ["simulated-a1.json", "simulated-a2.json"]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    flat = loads(paths[0].read_bytes())
    assert set(flat) == {
        "access_token", "refresh_token", "id_token", "account_id", "email", "type", "expired", "last_refresh"
    }  # fmt: skip
    assert (flat["type"], flat["last_refresh"], flat["expired"]) == (
        "codex",
        "2027-01-15T08:00:00Z",
        "2027-01-25T08:00:00Z",
    )
    codex = loads(sim.write_auth_files(tmp_path, "codex")[1].read_bytes())
    assert codex["tokens"]["refresh_token"] == sim.account("a2").tokens.refresh
    assert codex["auth_mode"] == "chatgpt"
    assert not list(tmp_path.rglob("*.tmp"))


async def test_a_fedramp_account_wants_its_header(caller: "Caller") -> None:
    caller.sim.add_account("gov", fedramp=True)
    assert (await caller.turn(account="gov")).status == 401
    assert (await caller.turn(account="gov", headers={"x-openai-fedramp": "true"})).status == 200
