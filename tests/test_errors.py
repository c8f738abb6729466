"""Whose fault a refusal is, what it says, and what of it may be shown."""

import pytest

from codex_proxy.errors import (
    MAX_MESSAGE_LENGTH,
    BackendFault,
    Redact,
    UpstreamError,
    Verdict,
    classify,
    clean,
    fault_of,
)
from codex_proxy.protocol.wire import JsonObject

# What the backend sends, as contract and recordings have it: status (None: inside a stream), body, verdict.
ANSWERS: list[tuple[int | None, JsonObject, Verdict]] = [
    (
        429,
        {"error": {"type": "usage_limit_reached", "message": "The usage limit has been reached"}},
        Verdict.EXHAUSTED,
    ),
    (403, {"error": {"type": "usage_limit_reached", "message": "x"}}, Verdict.EXHAUSTED),
    (None, {"error": {"code": "usage_limit_reached", "message": "x"}}, Verdict.EXHAUSTED),
    (400, {"error": {"code": "billing_hard_cap_reached"}}, Verdict.EXHAUSTED),
    (
        400,
        {"detail": "The 'gpt-9' model is not supported when using Codex with a ChatGPT account."},
        Verdict.MODEL,
    ),
    (
        400,
        {
            "error": {
                "type": "invalid_request_error",
                "message": "The 'gpt-9' model is not supported when using Codex with a ChatGPT account.",
            }
        },
        Verdict.MODEL,
    ),
    (404, {"error": {"code": "model_not_found", "type": "invalid_request_error"}}, Verdict.MODEL),
    (404, {"error": {"type": "invalid_request_error", "message": "no such thing"}}, Verdict.MODEL),
    (404, {"detail": "Not Found"}, Verdict.MODEL),
    (429, {"error": {"type": "usage_not_included", "plan_type": "free"}}, Verdict.MODEL),
    (
        400,
        {"error": {"code": "invalid_encrypted_content", "type": "invalid_request_error"}},
        Verdict.ENCRYPTED,
    ),
    (429, {"error": {"type": "insufficient_quota"}}, Verdict.UNENTITLED),
    (402, {"detail": {"code": "deactivated_workspace"}}, Verdict.UNENTITLED),
    (402, {}, Verdict.UNENTITLED),
    (429, {"error": {"code": "workspace_member_credits_depleted"}}, Verdict.UNENTITLED),
    (400, {"error": {"code": "context_length_exceeded", "type": "invalid_request_error"}}, Verdict.CALLER),
    (None, {"error": {"code": "context_length_exceeded"}}, Verdict.CALLER),
    (None, {"error": {"code": "cyber_policy"}}, Verdict.CALLER),
    (None, {"error": {"code": "image_parse_error"}}, Verdict.CALLER),
    (400, {"detail": "Unsupported parameter: temperature"}, Verdict.CALLER),
    (413, {"detail": "too large"}, Verdict.CALLER),
    (422, {"detail": [{"loc": ["body"]}]}, Verdict.CALLER),
    (503, {"error": {"code": "server_is_overloaded"}}, Verdict.OVERLOADED),
    (None, {"error": {"code": "server_is_overloaded"}}, Verdict.OVERLOADED),
    (400, {"error": {"message": "Selected model is at capacity. Try another."}}, Verdict.OVERLOADED),
    (503, {}, Verdict.OVERLOADED),
    (529, {"error": {"type": "overloaded_error"}}, Verdict.OVERLOADED),
    (429, {"error": {"type": "rate_limit_exceeded"}}, Verdict.LIMITED),
    (429, {"error": {"type": "invalid_request_error", "message": "slow down"}}, Verdict.LIMITED),
    (429, {}, Verdict.LIMITED),
    (
        401,
        {
            "error": {
                "code": "token_invalidated",
                "type": "invalid_request_error",
                "message": "Please sign in",
            }
        },
        Verdict.UNAUTHORIZED,
    ),
    (401, {"detail": "Unauthorized"}, Verdict.UNAUTHORIZED),
    (403, {"detail": "no"}, Verdict.FORBIDDEN),
    (407, {}, Verdict.PATH),
    (408, {}, Verdict.SERVER),
    (425, {}, Verdict.SERVER),
    (500, {"error": {"type": "server_error"}}, Verdict.SERVER),
    (500, {"error": {"type": "invalid_request_error"}}, Verdict.SERVER),
    (502, {}, Verdict.SERVER),
    (504, {}, Verdict.SERVER),
    (302, {}, Verdict.SERVER),
    (None, {"error": {"code": "never_heard_of"}}, Verdict.SERVER),
    (None, {}, Verdict.SERVER),
    (418, {}, Verdict.CALLER),
]


@pytest.mark.parametrize(("status", "payload", "verdict"), ANSWERS)
def test_every_answer_has_its_verdict(status: int | None, payload: JsonObject, verdict: Verdict) -> None:
    assert classify(status, fault_of(payload)) is verdict


@pytest.mark.parametrize(
    ("status", "verdict"), [(403, Verdict.PATH), (503, Verdict.PATH), (502, Verdict.SERVER)]
)
def test_a_page_instead_of_json_is_the_way_s_fault(status: int, verdict: Verdict) -> None:
    assert classify(status, BackendFault("Just a moment..."), is_page=True) is verdict


def test_every_verdict_of_the_backend_is_reached() -> None:
    """The three that no answer has are our own: no byte, no end, no way."""
    assert {verdict for _, _, verdict in ANSWERS} == set(Verdict) - {Verdict.SILENT, Verdict.CUT}


def test_the_sharper_code_outranks_the_type() -> None:
    fault = BackendFault("x", type="rate_limit_exceeded", code="usage_limit_reached")
    assert classify(429, fault) is Verdict.EXHAUSTED


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        (
            {"error": {"message": "m", "type": "t", "code": "c", "param": "p"}},
            BackendFault("m", "t", "c", "p"),
        ),
        ({"error": "rate_limit_exceeded"}, BackendFault("rate_limit_exceeded", code="rate_limit_exceeded")),
        ({"error": "It broke."}, BackendFault("It broke.")),
        ({"detail": "Not Found"}, BackendFault("Not Found")),
        ({"detail": {"code": "deactivated_workspace"}}, BackendFault("deactivated_workspace", None, "deactivated_workspace")),
        ({"message": "m", "code": "c"}, BackendFault("m", None, "c")),
        ({"error": {"message": "", "code": 5, "type": None}}, BackendFault("default")),
        ({"error": [1]}, BackendFault("default")),
        ({"error": None, "detail": "Not now"}, BackendFault("Not now")),
        ([], BackendFault("default")),
        (None, BackendFault("default")),
        ("plain words", BackendFault("plain words")),
    ],
)  # fmt: skip
def test_a_refusal_is_read_in_any_shape(payload: object, fault: BackendFault) -> None:
    assert fault_of(payload, "default") == fault


SECRETS = [
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0.c2ln",
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0.",
    "rt_abcdefghijkl",
    "at-abcdefghijkl",
    "sk-proj-abcdefghijkl",
    "cp-abcdefghijklmnop",
    "some.one+tag@mail.example.com",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("around", ["{}", "key={}, and more", '{{"token":"{}"}}', "({})"])
def test_a_secret_is_taken_out_wherever_it_stands(secret: str, around: str) -> None:
    text = Redact.text(around.format(secret))
    assert secret not in text
    assert secret[:12] not in text
    assert "[token]" in text or "[email]" in text


@pytest.mark.parametrize("field", ["message", "type", "code", "param"])
def test_no_field_of_a_refusal_repeats_a_secret(field: str) -> None:
    for payload in (
        {"error": {"message": "no", field: "rt_0123456789abcdef"}},
        {"error": "rt_0123456789abcdef"},
    ):
        assert "0123456789" not in repr(fault_of(payload))


def test_an_opaque_bearer_is_taken_out() -> None:
    assert Redact.text("authorization: bearer qwerty123, x") == "authorization: bearer [token], x"
    assert Redact.text("AUTHORIZATION: BEARER QWERTY123") == "AUTHORIZATION: BEARER [token]"


@pytest.mark.parametrize(
    "words",
    ["unknown item type 'message' in input.0", "try again in 1.5s", "gpt-5.1-codex-max", "resp_12", "a @ b"],
)
def test_ordinary_words_stay(words: str) -> None:
    assert Redact.text(words) == words


def test_a_message_is_cut_after_it_was_cleaned() -> None:
    """A secret across the cut must not lose only its tail."""
    message = "x" * (MAX_MESSAGE_LENGTH - 10) + " Bearer abcdefghijklmnopqrstuvwxyz"
    told = clean(message)
    assert len(told) <= MAX_MESSAGE_LENGTH
    assert "abc" not in told


def test_an_upstream_error_logs_no_message() -> None:
    error = UpstreamError(Verdict.LIMITED, BackendFault("owner@example.com", code="c"), status=429)
    assert str(error) == "limited status=429 code=c"


def test_only_what_cost_time_counts_towards_the_retries() -> None:
    assert {verdict for verdict in Verdict if verdict.is_passing} == {
        Verdict.OVERLOADED,
        Verdict.SERVER,
        Verdict.FORBIDDEN,
        Verdict.PATH,
        Verdict.SILENT,
        Verdict.CUT,
    }
