"""What a backend can do instead of answering: the states of an account, and the refusals they cause.

| state | what a turn meets |
|---|---|
| usage_limit | 429 `usage_limit_reached`; of the account, or of one model family |
| rate_limit | 429 `rate_limit_exceeded`, with or without `Retry-After` |
| overloaded | 503 `server_is_overloaded` |
| overloaded_in_stream | 200, then the same inside the stream |
| failed | 200, then `response.failed` with any code |
| context_length | the same with `context_length_exceeded`, or as a 400 |
| incomplete | 200, then `response.incomplete` |
| cut | the connection ends in the middle of the stream |
| stall | silence: before the headers, after the first events, in the middle |
| slow | everything, but late |
| unauthorized | 401 until the token is refreshed |
| revoked | 401 always, the refresh included |
| payment | 402 `deactivated_workspace` |
| not_included, insufficient_quota | 429 of a plan or purse that will not do |
| cloudflare, forbidden | 403, as a page or as JSON |
| server_error | 500, 502, 504, 529 |
| refuse | the connection closes without a byte |
| bad_model, not_found, bad_request | 400 and 404 |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from codex_proxy.protocol.wire import dumps
from codex_proxy.simulator.issuer import REFRESH_MODES
from codex_proxy.simulator.quota import quota_headers

if TYPE_CHECKING:
    from codex_proxy.simulator.account import SimAccount

_COMMON = frozenset({"everywhere", "refresh", "refresh_seconds", "usage"})
"""Options of every state: also for model lists and usage; how refreshes end; the status of /wham/usage."""

STATES: dict[str, frozenset[str]] = {
    "ok": frozenset(),
    "usage_limit": frozenset({"resets_in", "family", "headers", "body_reset", "window"}),
    "rate_limit": frozenset({"retry_after", "message"}),
    "overloaded": frozenset({"retry_after"}),
    "overloaded_in_stream": frozenset({"how", "after"}),
    "failed": frozenset({"code", "message", "after", "how"}),
    "context_length": frozenset({"how"}),
    "incomplete": frozenset({"reason", "after"}),
    "cut": frozenset({"after", "clean", "reset"}),
    "stall": frozenset({"where", "after", "seconds"}),
    "slow": frozenset({"delay", "per_event"}),
    "unauthorized": frozenset({"code"}),
    "revoked": frozenset(),
    "payment": frozenset({"code"}),
    "not_included": frozenset(),
    "insufficient_quota": frozenset({"code"}),
    "cloudflare": frozenset(),
    "forbidden": frozenset({"detail"}),
    "server_error": frozenset({"status", "body"}),
    "refuse": frozenset(),
    "bad_model": frozenset(),
    "not_found": frozenset(),
    "bad_request": frozenset({"body", "status"}),
}

STREAM_STATES = frozenset({
    "overloaded_in_stream",
    "failed",
    "context_length",
    "incomplete",
    "cut",
    "stall",
    "slow",
})
"""States that a stream shows; all others refuse before it."""

MESSAGES = {
    "server_is_overloaded": "Our servers are currently overloaded. Please try again later.",
    "context_length_exceeded": "Your input exceeds the context window of this model. Please adjust your input and try again.",
    "insufficient_quota": "You exceeded your current quota, please check your plan and billing details.",
    "rate_limit_exceeded": "Rate limit reached. Please try again in 1.5s.",
    "usage_limit_reached": "The usage limit has been reached",
    "usage_not_included": "Your plan does not include Codex. Upgrade to Plus to continue.",
    "invalid_prompt": "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
    "slow_down": "Slow down. Please reduce your request rate.",
}
_CLOUDFLARE = b"""<!DOCTYPE html><html lang="en-US"><head><title>Just a moment...</title></head>
<body><h1>chatgpt.com</h1><p>Enable JavaScript and cookies to continue</p>
<script>window._cf_chl_opt={cType:'managed'};</script></body></html>
"""


@dataclass(slots=True)
class Fault:
    """A state in force."""

    state: str
    options: dict[str, Any] = field(default_factory=dict)
    times: int | None = None
    """How many requests it still meets; None for all."""
    until: float | None = None

    def hits(self, family: str, *, is_turn: bool) -> bool:
        """Return whether a request for a model of *family* meets it."""
        if self.state == "ok":
            return False
        if self.state == "usage_limit" and self.options.get("family", "codex") not in {"codex", family}:
            return False
        return is_turn or bool(self.options.get("everywhere")) or self.state in {"unauthorized", "revoked"}


@dataclass(slots=True)
class Reply:
    """An answer that is no stream."""

    status: int
    body: bytes = b""
    content_type: str | None = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Reply":
        """Answer with JSON."""
        return cls(status, dumps(value), headers=headers or {})


def check_state(state: str, options: Iterable[str]) -> None:
    """See that there is such a state with such options.

    Raises:
        ValueError: If not; the message lists what there is.
    """
    known = STATES.get(state)
    if known is None:
        raise ValueError(f"unknown state {state!r}; there are {', '.join(STATES)}")
    wrong = set(options) - known - _COMMON
    if wrong:
        allowed = ", ".join(sorted(known | _COMMON))
        raise ValueError(f"state {state!r} has no option {', '.join(sorted(wrong))}; it has {allowed}")
    if isinstance(options, Mapping) and "refresh" in options and str(options["refresh"]) not in REFRESH_MODES:
        raise ValueError(
            f"unknown refresh {options['refresh']!r}; there are {', '.join(sorted(REFRESH_MODES))}"
        )


def error_body(
    text: str, *, code: str | None = None, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """Return an error in the API's envelope."""
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def unauthorized(code: str) -> Reply:
    """Return a 401 in one of the shapes that were seen."""
    if not code:
        return Reply.json({"detail": "Unauthorized"}, 401)
    texts = {
        "token_expired": "Provided authentication token is expired. Please try signing in again.",
        "token_revoked": "Encountered invalidated oauth token for user, failing request",
    }
    text = texts.get(code, "Your authentication token has been invalidated. Please try signing in again.")
    return Reply.json(error_body(text, code=code) | {"status": 401}, 401)


def usage_limit(account: "SimAccount", family: str, resets_at: float, options: Mapping[str, Any]) -> Reply:
    """Return the 429 of a limit that is reached; its headers say which and until when."""
    now = account.now()
    error: dict[str, Any] = {
        "type": "usage_limit_reached",
        "message": MESSAGES["usage_limit_reached"],
        "plan_type": account.plan,
        "resets_at": round(resets_at),
        "eligible_promo": None,
        "resets_in_seconds": max(0, round(resets_at - now)),
    }
    if not options.get("body_reset", True):
        del error["resets_at"], error["resets_in_seconds"]
    headers: dict[str, str] = {}
    if options.get("headers", True):
        headers = quota_headers(account)
        prefix = "x-" + family.replace("_", "-")
        window = f"{prefix}-{options.get('window', 'primary')}"
        headers["x-codex-active-limit"] = family
        headers[f"{window}-used-percent"] = "100"
        headers[f"{window}-reset-at"] = str(round(resets_at))
        headers[f"{window}-reset-after-seconds"] = str(max(0, round(resets_at - now)))
        headers["x-codex-rate-limit-reached-type"] = "rate_limit_reached"
    return Reply.json({"error": error}, 429, headers)


def bad_model(slug: str) -> Reply:
    """Return the 400 of a model that the account has not."""
    return Reply.json(
        {"detail": f"The '{slug}' model is not supported when using Codex with a ChatGPT account."}, 400
    )


def refusal(fault: Fault, account: "SimAccount", slug: str) -> Reply:
    """Return the answer of a state that refuses before any stream."""
    options = fault.options
    match fault.state:
        case "usage_limit":
            until = (
                fault.until if fault.until is not None else account.now() + options.get("resets_in", 3600.0)
            )
            return usage_limit(account, str(options.get("family", "codex")), until, options)
        case "rate_limit":
            return _limited(options)
        case "overloaded":
            return Reply.json(
                error_body(
                    MESSAGES["server_is_overloaded"],
                    code="server_is_overloaded",
                    kind="service_unavailable_error",
                ),
                503,
                _retry_after(options),
            )
        case "unauthorized" | "revoked":
            return unauthorized(str(options.get("code", "token_invalidated")))
        case "payment":
            return Reply.json({"detail": {"code": options.get("code", "deactivated_workspace")}}, 402)
        case "not_included":
            error = {
                "type": "usage_not_included",
                "message": MESSAGES["usage_not_included"],
                "plan_type": account.plan,
            }
            return Reply.json({"error": error}, 429)
        case "insufficient_quota":
            code = str(options.get("code", "insufficient_quota"))
            return Reply.json(error_body(MESSAGES["insufficient_quota"], code=code, kind=code), 429)
        case "cloudflare":
            headers = {"server": "cloudflare", "cf-mitigated": "challenge"}
            return Reply(403, _CLOUDFLARE, "text/html; charset=UTF-8", headers)
        case "forbidden":
            return Reply.json({"detail": options.get("detail", "Forbidden")}, 403)
        case "server_error":
            return _server_error(int(options.get("status", 500)), options.get("body"))
        case "bad_model":
            return bad_model(slug)
        case "not_found":
            return Reply.json({"detail": "Not Found"}, 404)
        case "context_length":
            code = "context_length_exceeded"
            return Reply.json(error_body(MESSAGES[code], code=code, param="input"), 400)
        case "bad_request":
            body = options.get("body", error_body("The request is bad, as it was told to be."))
            return Reply.json(body, int(options.get("status", 400)))
        case _:
            raise ValueError(f"state {fault.state!r} refuses nothing")


def _limited(options: Mapping[str, Any]) -> Reply:
    seconds = options.get("retry_after")
    wait = f" Please try again in {seconds}s." if seconds is not None else ""
    text = options.get("message", f"Rate limit reached for this organization.{wait}")
    body = error_body(text, code="rate_limit_exceeded", kind="rate_limit_exceeded")
    return Reply.json(body, 429, _retry_after(options))


def _retry_after(options: Mapping[str, Any]) -> dict[str, str]:
    seconds = options.get("retry_after")
    return (
        {}
        if seconds is None
        else {"retry-after": f"{seconds:g}" if isinstance(seconds, float) else str(seconds)}
    )


def _server_error(status: int, body: Any) -> Reply:
    if isinstance(body, str):
        return Reply(status, body.encode(), "text/plain")
    if body is not None:
        return Reply.json(body, status)
    if status in {502, 504}:
        # These come from a gateway, which knows no JSON.
        page = f"<html><head><title>{status}</title></head><body><center>cloudflare</center></body></html>"
        return Reply(status, page.encode(), "text/html")
    text = "An error occurred while processing your request. You can retry your request."
    return Reply.json(error_body(text, code="server_error", kind="server_error"), status)
