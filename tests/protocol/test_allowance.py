"""What is left under a caller's limits, in the heads of answers and of refusals."""

import orjson
import pytest

from codex_proxy.errors import BudgetUsedUp, LedgerAway, NotAllowed, OutOfFunds, ProxyError, RateLimited
from codex_proxy.protocol import messages, responses
from codex_proxy.protocol.allowance import anthropic_headers, openai_headers
from codex_proxy.trace import Allowance, Room

NOW = 1_800_000_000.0


def test_openai_is_told_a_span_until_the_reset() -> None:
    headers = openai_headers(Allowance(Room(60, 59, 1.0), Room(1000, 0, 61.5)), NOW)
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m2s",
    }


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0ms"), (0.0204, "21ms"), (0.9999, "1000ms"), (59.2, "1m0s"), (3600.0, "1h0m0s")],
)
def test_a_span_is_never_told_too_short(seconds: float, said: str) -> None:
    headers = openai_headers(Allowance(Room(1, 0, seconds)), NOW)
    assert headers["x-ratelimit-reset-requests"] == said


def test_anthropic_is_told_the_moment_of_the_reset() -> None:
    headers = anthropic_headers(Allowance(tokens=Room(1000, 10, 0.5)), NOW)
    assert headers == {
        "anthropic-ratelimit-tokens-limit": "1000",
        "anthropic-ratelimit-tokens-remaining": "10",
        "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:01Z",
    }


REFUSALS: list[tuple[ProxyError, int, str, int, str, dict[str, str]]] = [
    (
        NotAllowed("no", code="model_not_allowed", param="model"),
        400, "model_not_allowed", 403, "permission_error", {},
    ),
    (OutOfFunds("no"), 429, "insufficient_quota", 402, "billing_error", {"x-should-retry": "false"}),
    (
        BudgetUsedUp("no", resets_at=NOW + 7200, retry_after=7200.0),
        429, "usage_limit_reached", 429, "rate_limit_error", {"retry-after": "7200", "x-should-retry": "false"},
    ),
    (
        RateLimited("no", retry_after=0.25),
        429, "rate_limit_exceeded", 429, "rate_limit_error", {"retry-after": "1", "retry-after-ms": "250"},
    ),
    (LedgerAway("no"), 503, "ledger_unavailable", 503, "api_error", {"retry-after": "5"}),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS, ids=[type(case[0]).__name__ for case in REFUSALS])
def test_a_refusal_has_each_dialects_own_words(
    case: tuple[ProxyError, int, str, int, str, dict[str, str]],
) -> None:
    error, openai_status, code, anthropic_status, kind, head = case
    status, headers, body = responses.render_error(error, request_id="r")
    assert (status, orjson.loads(body)["error"]["code"]) == (openai_status, code)
    assert head.items() <= headers.items()
    status, headers, body = messages.render_error(error, request_id="r")
    assert (status, orjson.loads(body)["error"]["type"]) == (anthropic_status, kind)
    assert head.items() <= headers.items()


def test_a_budgets_end_is_told_to_codex() -> None:
    error = BudgetUsedUp("no", resets_at=NOW + 60, retry_after=60.0)
    said = orjson.loads(responses.render_error(error, request_id="r")[2])["error"]
    assert (said["type"], said["resets_at"], said["resets_in_seconds"]) == (
        "usage_limit_reached",
        NOW + 60,
        60,
    )


def test_what_a_sink_adds_goes_out_with_the_refusal() -> None:
    error = RateLimited("no", retry_after=1.0)
    error.headers = {"x-ratelimit-limit-requests": "1"}
    for module in (responses, messages):
        assert module.render_error(error, request_id="r")[1]["x-ratelimit-limit-requests"] == "1"
