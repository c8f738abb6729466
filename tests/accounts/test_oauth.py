"""The exchange of a refresh token: what is sent, and what each failure means."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from codex_proxy.accounts.oauth import RefreshFailed, RefreshFailure, refresh
from codex_proxy.accounts.tokens import NewTokens, Secret
from codex_proxy.net.http import NetError, NetKind, Reply

TOKEN = "rt_0123456789abcdef"
PERMANENT, PASSING, UNCERTAIN, LIMITED = RefreshFailure


class Issuer:
    """Gives one answer and remembers what it was asked."""

    def __init__(self, answer: Reply | NetError) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout: float,
        proxy_url: str | None = None,
    ) -> Reply:
        self.asked.append({
            "method": method,
            "url": url,
            "headers": dict(headers),
            "body": orjson.loads(body or b"null"),
            "timeout": timeout,
            "proxy_url": proxy_url,
        })
        if isinstance(self.answer, NetError):
            raise self.answer
        return self.answer


def reply(status: int, body: object, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, data)


async def exchange(answer: Reply | NetError) -> NewTokens:
    return await refresh(
        Issuer(answer).fetch,
        issuer="https://auth.example",
        refresh_token=Secret(TOKEN),
        reason="proactive_expiry",
        originator="codex_proxy",
        user_agent="codex-proxy/1",
    )


async def failure(answer: Reply | NetError) -> RefreshFailed:
    with pytest.raises(RefreshFailed) as caught:
        await exchange(answer)
    return caught.value


async def test_the_request_is_what_the_issuer_expects() -> None:
    issuer = Issuer(reply(200, {"access_token": "at"}))
    await refresh(
        issuer.fetch,
        issuer="https://auth.example/",
        refresh_token=Secret(TOKEN),
        reason="unauthorized_recovery",
        originator="codex_proxy",
        user_agent="codex-proxy/1",
        timeout=7.0,
        proxy_url="http://proxy:1",
    )
    assert issuer.asked == [
        {
            "method": "POST",
            "url": "https://auth.example/oauth/token",
            "headers": {
                "accept": "application/json",
                "content-type": "application/json",
                "originator": "codex_proxy",
                "user-agent": "codex-proxy/1",
            },
            "body": {
                "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
                "grant_type": "refresh_token",
                "refresh_reason": "unauthorized_recovery",
                "refresh_token": TOKEN,
            },
            "timeout": 7.0,
            "proxy_url": "http://proxy:1",
        }
    ]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (
            {"access_token": "at", "refresh_token": "rt2", "id_token": "id", "expires_in": 3600},
            NewTokens(Secret("at"), Secret("rt2"), Secret("id"), 3600.0),
        ),
        ({"access_token": "at"}, NewTokens(Secret("at"))),
        ({"refresh_token": "rt2"}, NewTokens(refresh=Secret("rt2"))),
        ({"access_token": "at", "refresh_token": "", "id_token": None}, NewTokens(Secret("at"))),
        ({"access_token": "at", "expires_in": "3600"}, NewTokens(Secret("at"))),
        ({"access_token": "at", "refresh_token": 7}, NewTokens(Secret("at"))),
    ],
)
async def test_what_the_answer_lacks_is_none(body: object, tokens: NewTokens) -> None:
    assert await exchange(reply(200, body)) == tokens


def error(code: str) -> dict[str, Any]:
    return {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": code}}


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (reply(401, error("refresh_token_reused")), PERMANENT, "refresh_token_reused"),
        (reply(400, error("Refresh_Token_Expired")), PERMANENT, "refresh_token_expired"),
        (reply(403, error("refresh_token_invalidated")), PERMANENT, "refresh_token_invalidated"),
        (reply(400, {"error": "invalid_grant", "error_description": "gone"}), PERMANENT, "invalid_grant"),
        (
            reply(400, {"code": "app_session_terminated", "message": "bye"}),
            PERMANENT,
            "app_session_terminated",
        ),
        (reply(400, {"detail": "over", "code": "token_expired"}), PERMANENT, "token_expired"),
        (reply(400, {"error": {"message": "m"}, "code": "token_expired"}), PERMANENT, "token_expired"),
        (reply(401, b"<html>"), PERMANENT, None),
        (reply(401, error("something_new")), PERMANENT, "something_new"),
        (reply(400, error("something_new")), PASSING, "something_new"),
        (reply(400, {"error": "invalid_request"}), PASSING, "invalid_request"),
        (reply(403, b"<html>Just a moment...</html>"), PASSING, None),
        (reply(404, b""), PASSING, None),
        (reply(302, b""), PASSING, None),
        (reply(407, b""), PASSING, None),
        (reply(500, b"not json"), PASSING, None),
        (reply(503, error("server_error")), PASSING, "server_error"),
        (reply(429, error("rate_limit_exceeded")), LIMITED, "rate_limit_exceeded"),
        (reply(429, error("refresh_token_reused")), PERMANENT, "refresh_token_reused"),
        (reply(200, b"<html>captive portal</html>"), UNCERTAIN, None),
        (reply(200, b""), UNCERTAIN, None),
        (reply(200, [1]), UNCERTAIN, None),
        (reply(200, {}), UNCERTAIN, None),
        (reply(200, {"id_token": "id"}), UNCERTAIN, None),
        (NetError(NetKind.CONNECT, "refused"), PASSING, None),
        (NetError(NetKind.DNS, "no such host"), PASSING, None),
        (NetError(NetKind.PROXY, "proxy refused"), PASSING, None),
        (NetError(NetKind.TLS, "bad certificate"), PASSING, None),
        (NetError(NetKind.TIMEOUT, "no answer"), UNCERTAIN, None),
        (NetError(NetKind.CUT, "reset"), UNCERTAIN, None),
    ],
)
async def test_a_failure_says_what_it_means_for_the_token(
    answer: Reply | NetError, kind: RefreshFailure, code: str | None
) -> None:
    failed = await failure(answer)
    assert (failed.kind, failed.code) == (kind, code)
    assert failed.message


@pytest.mark.parametrize("kind", NetKind)
async def test_every_way_a_call_fails_has_a_meaning(kind: NetKind) -> None:
    expected = UNCERTAIN if kind in {NetKind.TIMEOUT, NetKind.CUT} else PASSING
    assert (await failure(NetError(kind, "x"))).kind is expected


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "17"}, 17.0),
        ({"retry_after": "-3"}, 0.0),
        ({"retry_after": "inf"}, None),
        ({"retry_after": "soon"}, None),
        ({}, None),
        ({"retry_after": "Sat, 21 Nov 2026 00:01:00 GMT", "date": "Sat, 21 Nov 2026 00:00:00 GMT"}, 60.0),
        ({"retry_after": "Sat, 21 Nov 2026 00:01:00 GMT"}, None),
        ({"retry_after": "Sat, 21 Nov 2026 00:01:00 -0000", "date": "Sat, 21 Nov 2026 00:00:00 GMT"}, None),
    ],
)
async def test_the_issuer_says_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert (await failure(reply(429, error("slow_down"), **headers))).retry_after == seconds
    assert (await failure(reply(503, b"", **headers))).retry_after == seconds


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": f"token {TOKEN} of jane@example.com", "code": TOKEN}},
        {"error": TOKEN},
        {"error": "invalid_grant", "error_description": f"bad {TOKEN.upper()}"},
        {"message": f"x{TOKEN}y"},
    ],
)
async def test_no_token_and_no_email_is_in_a_failure(body: object) -> None:
    failed = await failure(reply(400, body))
    shown = f"{failed} {failed!r} {failed.message} {failed.code} {failed.args}".lower()
    assert "0123456789abcdef" not in shown
    assert "jane" not in shown


async def test_a_long_message_is_cut() -> None:
    failed = await failure(reply(500, {"error": {"message": "x" * 100_000}}))
    assert len(str(failed)) < 3_000
