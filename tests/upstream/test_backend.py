"""What the backend's refusals mean, and what belongs to one account, as pure functions."""

from email.utils import format_datetime

import pytest

from codex_proxy.errors import Verdict
from codex_proxy.net import NetError, NetKind
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.upstream.backend import net_failure, refusal, split_turn_state

NOW = 1_800_000_000.0

PAGE = b"<!DOCTYPE html><html><title>Just a moment...</title></html>"


def _error(**fields: object) -> JsonObject:
    return {"error": {"message": "Words.", "type": "invalid_request_error", "param": None, **fields}}


# Real bodies, as the backend contract has them.
REFUSALS: list[tuple[int, JsonObject | bytes, Verdict]] = [
    (400, _error(), Verdict.CALLER),
    (400, {"detail": "Unsupported parameter: temperature"}, Verdict.CALLER),
    (
        400,
        {"detail": "The 'x' model is not supported when using Codex with a ChatGPT account."},
        Verdict.MODEL,
    ),
    (
        400,
        _error(message="The 'x' model is not supported when using Codex with a ChatGPT account."),
        Verdict.MODEL,
    ),
    (400, _error(code="model_not_found"), Verdict.MODEL),
    (400, _error(code="invalid_encrypted_content"), Verdict.ENCRYPTED),
    (400, _error(code="context_length_exceeded"), Verdict.CALLER),
    (401, _error(code="token_invalidated"), Verdict.UNAUTHORIZED),
    (401, _error(code="token_revoked"), Verdict.UNAUTHORIZED),
    (401, _error(code="token_expired"), Verdict.UNAUTHORIZED),
    (401, {"detail": "Unauthorized"}, Verdict.UNAUTHORIZED),
    (402, {"detail": {"code": "deactivated_workspace"}}, Verdict.UNENTITLED),
    (402, b"", Verdict.UNENTITLED),
    (403, {"detail": "Forbidden"}, Verdict.FORBIDDEN),
    (403, PAGE, Verdict.PATH),
    (403, b"\n  " + PAGE, Verdict.PATH),
    (404, {"detail": "Not Found"}, Verdict.MODEL),
    (413, b"too large", Verdict.CALLER),
    (422, {"detail": "no"}, Verdict.CALLER),
    (
        429,
        {"error": {"type": "usage_limit_reached", "message": "The usage limit has been reached"}},
        Verdict.EXHAUSTED,
    ),
    (429, {"error": {"type": "usage_not_included"}}, Verdict.MODEL),
    (429, _error(type="insufficient_quota", code="insufficient_quota"), Verdict.UNENTITLED),
    (429, {"error": {"type": "rate_limit_exceeded"}}, Verdict.LIMITED),
    (429, b"", Verdict.LIMITED),
    (429, PAGE, Verdict.LIMITED),
    (500, b"", Verdict.SERVER),
    (500, _error(type="server_error", code="server_error"), Verdict.SERVER),
    (502, PAGE, Verdict.SERVER),
    (503, PAGE, Verdict.PATH),
    (503, b"no healthy upstream", Verdict.OVERLOADED),
    (503, {"error": {"code": "server_is_overloaded"}}, Verdict.OVERLOADED),
    (504, PAGE, Verdict.SERVER),
    (529, {"error": {"type": "overloaded_error"}}, Verdict.OVERLOADED),
    (
        500,
        {"error": {"message": "Selected model is at capacity. Please try a different model."}},
        Verdict.OVERLOADED,
    ),
    (302, b"", Verdict.SERVER),
]


@pytest.mark.parametrize(("status", "body", "verdict"), REFUSALS)
def test_a_refusal_says_whose_fault_it_is(status: int, body: JsonObject | bytes, verdict: Verdict) -> None:
    raw = body if isinstance(body, bytes) else dumps(body)
    error = refusal(status, {}, raw, now=NOW)
    assert error.verdict is verdict
    assert error.status == status
    assert not error.in_stream


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"x-ms-retry-after-ms": "300"}, 0.3),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e300"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_the_wait_is_read_from_every_header_that_tells_it(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert refusal(429, headers, b"", now=NOW).retry_after == seconds


def test_the_wait_may_be_a_date() -> None:
    from datetime import UTC, datetime

    date = format_datetime(datetime.fromtimestamp(NOW + 90, UTC), usegmt=True)
    assert refusal(429, {"retry-after": date}, b"", now=NOW).retry_after == pytest.approx(90, abs=1)
    assert refusal(429, {"retry-after": date}, b"", now=NOW + 200).retry_after is None


def test_a_limit_says_when_it_ends_and_what_it_limits() -> None:
    body = dumps({"error": {"type": "usage_limit_reached", "resets_at": NOW + 500, "resets_in_seconds": 500}})
    error = refusal(429, {"x-codex-active-limit": "codex_bengalfox"}, body, now=NOW)
    assert error.resets_at == NOW + 500
    assert error.limit_family == "codex_bengalfox"
    assert refusal(429, {"x-codex-active-limit": "Codex-Bengalfox"}, body, now=NOW).limit_family == (
        "codex_bengalfox"
    )
    assert refusal(429, {"x-codex-active-limit": "codex"}, body, now=NOW).limit_family is None
    assert refusal(429, {}, body, now=NOW).limit_family is None


def test_what_a_refusal_quotes_holds_no_secret() -> None:
    body = dumps(_error(message="Bearer eyJhbGciOi.eyJzdWIi.sig of someone@example.com was refused"))
    error = refusal(400, {}, body, now=NOW)
    assert "eyJ" not in error.fault.message
    assert "someone@" not in error.fault.message
    assert "eyJ" not in str(error)


@pytest.mark.parametrize("body", [b"{", b"null", b"[]", b"\xff\xfe", b"{" * 100_000])
def test_a_body_that_is_no_error_leaves_the_status_to_speak(body: bytes) -> None:
    error = refusal(500, {}, body, now=NOW)
    assert error.verdict is Verdict.SERVER
    assert error.fault.code is None


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        (NetKind.CONNECT, Verdict.PATH),
        (NetKind.DNS, Verdict.PATH),
        (NetKind.PROXY, Verdict.PATH),
        (NetKind.TLS, Verdict.PATH),
        (NetKind.TIMEOUT, Verdict.SILENT),
        (NetKind.CUT, Verdict.CUT),
    ],
)
def test_a_lost_call_is_judged_by_where_it_was_lost(kind: NetKind, verdict: Verdict) -> None:
    error = net_failure(NetError(kind, "failed for backend.example"))
    assert error.verdict is verdict
    assert error.fault.code == kind.value


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("0123456789ab.raw", ("0123456789ab", "raw")),
        ("0123456789ab.raw.with.dots", ("0123456789ab", "raw.with.dots")),
        ("0123456789ab.", ("", None)),
        ("0123456789ab", ("", None)),
        ("short.raw", ("", None)),
        ("0123456789ab.a\r\nx-evil: 1", ("", None)),
        ("0123456789ab.é", ("", None)),
        ("0123456789ab." + "x" * 5000, ("", None)),
        ("", ("", None)),
        (None, ("", None)),
    ],
)
def test_a_turn_state_is_ours_only_in_our_shape(value: str | None, parts: tuple[str, str | None]) -> None:
    assert split_turn_state(value) == parts
