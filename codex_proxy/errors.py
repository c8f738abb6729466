"""What can go wrong, as types that the next decision branches on.

    ProxyError                  anything we say ourselves; has a status, a type, a code
    ├── ConfigError             a setting is wrong; names file, line, key, value, what would do
    ├── RequestError            the caller's request cannot be served as it is; names the field
    ├── KeyRefused              no client key, or one we do not know
    ├── TooManyGuesses          too many wrong keys were tried for what is the owner's
    ├── NotAllowed              this key may not use this model, or ask here
    ├── OutOfFunds              there is no money for it
    │   └── BudgetUsedUp        a budget is used up until its window ends
    ├── RateLimited             more than a key, a user or all of them may ask; knows when there is room
    ├── LedgerAway              what a turn costs could not be written down now
    ├── PoolError               no account can serve this now
    │   ├── PoolExhausted       every account's quota is used up; knows the earliest reset
    │   ├── PoolShortage        passing trouble everywhere; try again in a moment
    │   └── PoolEmpty           there is no account that could ever serve it without a person's help
    └── UpstreamError           one attempt failed; carries a Verdict, never shown as it is

`classify` turns what the backend said into a `Verdict`; the executor matches on every one:

| what came back                                                        | verdict      |
|-----------------------------------------------------------------------|--------------|
| code/type usage_limit_reached (any status, or in a stream)            | EXHAUSTED    |
| "model is not supported when using Codex", model_not_found,           | MODEL        |
|   usage_not_included, any other 404                                   |              |
| invalid_encrypted_content                                             | ENCRYPTED    |
| insufficient_quota, *_spend_limit_exceeded, *_credits_depleted,       | UNENTITLED   |
|   deactivated_workspace, any other 402                                |              |
| context_length_exceeded, invalid_prompt, *_policy...                  | CALLER       |
| server_is_overloaded, overloaded_error, slow_down,                    | OVERLOADED   |
|   "model is at capacity", 503, 529                                    |              |
| rate_limit_exceeded, any other 429                                    | LIMITED      |
| 401                                                                   | UNAUTHORIZED |
| 403 whose body is a page (Cloudflare), 407                            | PATH         |
| any other 403                                                         | FORBIDDEN    |
| 408, 425, 5xx, failure codes nobody knows inside a stream             | SERVER       |
| any other 4xx                                                         | CALLER       |

Facts: backend contract, sections 3.1 and 5.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar


class Verdict(enum.Enum):
    """Whose fault a failed attempt is, and so what happens next."""

    CALLER = "caller"
    """The request itself: to the caller at once, nobody is punished."""
    MODEL = "model"
    """This account lacks this model: remember it, next account."""
    ENCRYPTED = "encrypted"
    """Encrypted items of another account: once more without them."""
    UNAUTHORIZED = "unauthorized"
    """The access token was refused: refresh once, once more, then the next account."""
    EXHAUSTED = "exhausted"
    """The account's usage limit: cooled until its reset, next account."""
    UNENTITLED = "unentitled"
    """Plan, credits or workspace: unavailable with its reason, next account."""
    LIMITED = "limited"
    """Asked too fast: cooled for a moment, next account."""
    OVERLOADED = "overloaded"
    """The backend has no room: counted, next account."""
    SERVER = "server"
    """The backend broke: counted, next account."""
    FORBIDDEN = "forbidden"
    """Refused without a reason we know: counted, cooled, next account."""
    PATH = "path"
    """The way there (connection, DNS, proxy, a Cloudflare page): counted, next account."""
    SILENT = "silent"
    """A deadline passed without a byte: counted, next account."""
    CUT = "cut"
    """The stream ended without its end: counted, next account."""

    @property
    def is_passing(self) -> bool:
        """Tell whether such an attempt cost time, and so counts towards max-retry."""
        return self in _PASSING


_PASSING = frozenset({
    Verdict.OVERLOADED,
    Verdict.SERVER,
    Verdict.FORBIDDEN,
    Verdict.PATH,
    Verdict.SILENT,
    Verdict.CUT,
})


class ProxyError(Exception):
    """Base of everything we raise on purpose."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    """What else an answer with it says in its head, in the words of its dialect."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(ProxyError):
    """A setting is wrong. The message names file, line, key, value and what would do."""


class RequestError(ProxyError):
    """The caller's request cannot be served as it is.

    `param` is the path of the field (`input.3.content.0.type`), None when it is no field.
    """

    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",  # noqa: A002 -- the wire's own word
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.type = type
        self.allow = allow
        """For a 405: the value of the Allow header."""


class KeyRefused(ProxyError):
    """No client key came with the request, or one that we do not know."""

    status = 401
    type = "invalid_request_error"

    def __init__(self, message: str, *, code: str = "invalid_api_key") -> None:
        super().__init__(message)
        self.code = code


class TooManyGuesses(ProxyError):
    """Somebody tried too many keys; another one may be tried in `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_guesses"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotAllowed(ProxyError):
    """The caller's key may not do this: a model, or an endpoint, that is not among its own.

    A 400 where OpenAI's clients ask: the Codex CLI repeats a 402, 403 or 404 six times.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code: str = code
        self.param = param


class OutOfFunds(ProxyError):
    """The caller's money does not reach for it; another try will not either."""

    status = 429
    type = "insufficient_quota"
    code: str = "insufficient_quota"


class BudgetUsedUp(OutOfFunds):
    """A budget has no room left; `resets_at` is when its window ends."""

    type = "usage_limit_reached"
    code = "usage_limit_reached"

    def __init__(self, message: str, *, resets_at: float, retry_after: float) -> None:
        super().__init__(message)
        self.resets_at = resets_at
        """Wall clock, seconds since the epoch."""
        self.retry_after = retry_after
        """Seconds from now."""


class RateLimited(ProxyError):
    """A limit of requests, tokens or turns at a time is reached; there is room in `retry_after` seconds."""

    status = 429
    type = "rate_limit_exceeded"
    code: str = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LedgerAway(ProxyError):
    """The ledger cannot be written now, so nothing that costs may begin."""

    status = 503
    type = "server_error"
    code: str = "ledger_unavailable"

    def __init__(self, message: str, *, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PoolError(ProxyError):
    """No account can serve this request now."""

    status = 429
    is_for_history = False
    """Whether the one account is meant that can read the request's compacted history, and rests."""
    decision: object = None
    """The pool's own account of the choice that found nobody, for the turn's story."""


class PoolExhausted(PoolError):
    """Every account that could serve is at its limit; `resets_at` is the earliest way out."""

    type = "usage_limit_reached"
    code = "usage_limit_reached"

    def __init__(self, message: str, *, resets_at: float, retry_after: float) -> None:
        super().__init__(message)
        self.resets_at = resets_at
        """Wall clock, seconds since the epoch."""
        self.retry_after = retry_after
        """Seconds from now."""


class PoolShortage(PoolError):
    """Passing trouble on every account that could serve; worth another try in `retry_after` seconds."""

    type = "rate_limit_exceeded"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PoolBusy(PoolShortage):
    """Every account that could serve carries all that it may at a time, or is on trial; a place is waited for."""

    def __init__(self, message: str, *, retry_after: float = 1.0, patience: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.patience = patience
        """How long to wait for it in all; None: as long as the configuration lets a request queue."""


class PoolEmpty(PoolError):
    """No account could serve without a person's help: none loaded, or all need a login.

    Sent without Retry-After: the Codex CLI then stops after one request (contract, section 5).
    """

    type = "no_account_available"
    code = "no_account_available"


@dataclass(slots=True, frozen=True)
class BackendFault:
    """What the backend said when it refused, in its own words; safe to show when it is the caller's fault."""

    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None


class UpstreamError(ProxyError):
    """One attempt failed.

    Carries what the next decision needs; nobody parses a message. Only a CALLER verdict is
    ever shown to the caller, with `fault`'s own words.
    """

    def __init__(
        self,
        verdict: Verdict,
        fault: BackendFault,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        resets_at: float | None = None,
        limit_family: str | None = None,
        in_stream: bool = False,
    ) -> None:
        super().__init__(fault.message)
        self.verdict = verdict
        self.fault = fault
        self.status = status if status is not None else 502
        self.retry_after = retry_after
        """Seconds from now, when the backend said so."""
        self.resets_at = resets_at
        """Wall clock of the end of a usage limit, when the backend said so."""
        self.limit_family = limit_family
        """What `x-codex-active-limit` named, None when absent."""
        self.in_stream = in_stream
        """The failure came inside a 200 stream."""

    def __str__(self) -> str:
        return f"{self.verdict.value} status={self.status} code={self.fault.code or self.fault.type}"

    @property
    def callers_status(self) -> int:
        """The status for a caller whose request it was that failed: none that speaks of an account."""
        is_own = 400 <= self.status < 500 and self.status not in _OF_ACCOUNTS
        return self.status if is_own and not self.in_stream else 400

    @property
    def servers_words(self) -> str:
        """What may be said of a broken backend: its own words if they are about itself."""
        is_itself = (self.fault.code or self.fault.type) in _OF_ITSELF
        return self.fault.message if is_itself else "the backend failed while it answered"


_OF_ACCOUNTS = frozenset({401, 402, 403, 404, 407, 429})
"""Statuses of the backend that speak of an account."""

_OF_ITSELF = frozenset({
    None,
    "error",
    "internal_error",
    "internal_server_error",
    "processing_error",
    "server_error",
    "timeout",
})
"""Codes with which the backend speaks of itself; under any other its words may be about an account."""


_EXHAUSTED = frozenset({"usage_limit_reached", "usage_limit_exceeded", "billing_hard_cap_reached"})
_MODEL = frozenset({"model_not_found", "usage_not_included", "model_not_supported"})
_UNENTITLED = frozenset({
    "insufficient_quota",
    "billing_hard_limit_reached",
    "billing_not_active",
    "credit_balance_exhausted",
    "exceeded_current_quota_error",
    "insufficient_balance",
    "insufficient_user_quota",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "workspace_owner_credits_depleted",
    "workspace_member_credits_depleted",
    "workspace_owner_usage_limit_reached",
    "workspace_member_usage_limit_reached",
    "deactivated_workspace",
    "payment_required",
})
_CALLER = frozenset({
    "context_length_exceeded",
    "invalid_prompt",
    "bio_policy",
    "cyber_policy",
    "misalignment_policy_violation",
    "content_policy_violation",
    "content_filter",
    "empty_image_file",
    "failed_to_download_image",
    "image_content_policy_violation",
    "image_file_not_found",
    "image_file_too_large",
    "image_parse_error",
    "image_too_large",
    "image_too_small",
    "invalid_base64_image",
    "invalid_image",
    "invalid_image_format",
    "invalid_image_mode",
    "invalid_image_url",
    "unsupported_image_media_type",
    "invalid_request_error",
    "string_above_max_length",
    "unsupported_parameter",
    "unsupported_value",
    "invalid_value",
    "missing_required_parameter",
})
_OVERLOADED = frozenset({"server_is_overloaded", "overloaded_error", "slow_down", "engine_overloaded"})
_LIMITED = frozenset({"rate_limit_exceeded", "rate_limit_error", "too_many_requests"})
_MODEL_WORDS = "model is not supported when using codex"
_CAPACITY_WORDS = "model is at capacity"


def classify(status: int | None, fault: BackendFault, *, is_page: bool = False) -> Verdict:
    """Return whose fault a refusal is.

    Codes outrank the status, because the backend says the same thing with several. A status
    of None means the failure came inside a 200 stream. `is_page` tells that the body was HTML.
    """
    words = fault.message.lower()
    # The code is the sharper word: a usage limit's `type` is its name, but most others say
    # only "invalid_request_error" there, which every 401 does too.
    for name in (fault.code, fault.type):
        verdict = _by_name(name)
        if verdict is not None and not (verdict is Verdict.CALLER and status in _STATUS_OUTRANKS_CALLER):
            if name == "invalid_request_error" and _MODEL_WORDS in words:
                return Verdict.MODEL
            return verdict
    if _MODEL_WORDS in words:
        return Verdict.MODEL
    if _CAPACITY_WORDS in words:
        return Verdict.OVERLOADED
    if status is None:
        return Verdict.SERVER
    if is_page and status in (403, 503):
        return Verdict.PATH
    return _BY_STATUS.get(status) or (Verdict.SERVER if status >= 500 or status < 400 else Verdict.CALLER)


_STATUS_OUTRANKS_CALLER = frozenset({401, 402, 403, 404, 407, 408, 425, 429, 500, 502, 503, 504, 529})

_BY_STATUS: dict[int, Verdict] = {
    401: Verdict.UNAUTHORIZED,
    402: Verdict.UNENTITLED,
    403: Verdict.FORBIDDEN,
    404: Verdict.MODEL,
    407: Verdict.PATH,
    408: Verdict.SERVER,
    425: Verdict.SERVER,
    429: Verdict.LIMITED,
    503: Verdict.OVERLOADED,
    529: Verdict.OVERLOADED,
}


def _by_name(name: str | None) -> Verdict | None:
    if not name:
        return None
    lowered = name.lower()
    if lowered == "invalid_encrypted_content":
        return Verdict.ENCRYPTED
    for names, verdict in (
        (_EXHAUSTED, Verdict.EXHAUSTED),
        (_MODEL, Verdict.MODEL),
        (_UNENTITLED, Verdict.UNENTITLED),
        (_OVERLOADED, Verdict.OVERLOADED),
        (_LIMITED, Verdict.LIMITED),
        (_CALLER, Verdict.CALLER),
    ):
        if lowered in names:
            return verdict
    return None


def fault_of(payload: Any, default: str = "the backend refused the request") -> BackendFault:
    """Read a refusal out of any of the shapes the backend uses.

    `{"error": {...}}`, `{"error": "code"}`, `{"detail": "..."}`, `{"detail": {"code"}}`, a flat
    `{"message", "code"}`, and the `error` of a failed response.
    """
    source: Any = payload
    if isinstance(payload, Mapping):
        if payload.get("error"):
            source = payload["error"]
        elif payload.get("detail"):
            source = payload["detail"]
    if isinstance(source, str):
        # A bare word is a code; a sentence is a message.
        words = clean(source)
        return BackendFault(words, code=words if re.fullmatch(r"[a-z][a-z0-9_]*", words) else None)
    if not isinstance(source, Mapping):
        return BackendFault(default)
    message = _text(source.get("message")) or _text(source.get("detail"))
    code = _text(source.get("code"))
    kind = _text(source.get("type"))
    return BackendFault(message or code or kind or default, kind, code, _text(source.get("param")))


def _text(value: Any) -> str | None:
    # Words for machines too: some are made from what was sent.
    return clean(value) if isinstance(value, str) and value else None


class Redact:
    """The one list of what a secret looks like, for error texts and log lines alike."""

    PATTERNS: ClassVar[tuple[tuple[str, re.Pattern[str], str], ...]] = (
        ("eyj", re.compile(r"\beyJ[\w-]{4,}\.[\w-]*\.?[\w-]*"), "[token]"),
        ("bearer", re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+"), r"\1 [token]"),
        ("", re.compile(r"\b(?:rt|at|sk|sess|cp)[_-][\w.-]{8,}"), "[token]"),
        ("@", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[email]"),
    )
    """What must be in a text, in lower case, for the pattern to match; the pattern; what comes instead."""

    @classmethod
    def text(cls, value: str) -> str:
        """Return *value* with tokens, keys and e-mail addresses taken out."""
        # Every log line comes by, and looking for a word is twenty times faster than the patterns.
        lowered = value.lower()
        for word, pattern, replacement in cls.PATTERNS:
            if word in lowered:
                value = pattern.sub(replacement, value)
        return value


# Long enough for any message a person reads; a prompt echoed into an error stays out.
MAX_MESSAGE_LENGTH = 2048


def clean(message: str) -> str:
    """Make a backend's message fit to be shown: no secrets, at most 2,048 characters."""
    return Redact.text(message[: MAX_MESSAGE_LENGTH * 2])[:MAX_MESSAGE_LENGTH]
