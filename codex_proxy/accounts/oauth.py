"""The exchange of a refresh token, and what its failures mean.

A refresh token can be used once. So the one question about a failure is whether the old token
may have been spent: an issuer that never got the request spent nothing, and one whose answer
was lost on the way may have. Nothing here touches a file, retries, or forgets a token.

| what came back                                           | kind      |
|----------------------------------------------------------|-----------|
| a code that says the login is over, on any status; 401   | PERMANENT |
| 429                                                      | LIMITED   |
| no connection; a proxy's refusal; any other status       | PASSING   |
| timeout or cut after sending; a 200 that cannot be read  | UNCERTAIN |

Facts: backend contract, section 1.5.
"""

import enum
import math
import re
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

import orjson

from codex_proxy.accounts.tokens import NewTokens, Secret, seconds_of, word_of
from codex_proxy.errors import ProxyError, clean, fault_of
from codex_proxy.net.http import NetError, Reply

CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"

RefreshReason = Literal["proactive_expiry", "unauthorized_recovery"]

_PERMANENT = frozenset({
    "refresh_token_expired",
    "refresh_token_reused",
    "refresh_token_invalidated",
    "invalid_grant",
    "token_expired",
    "app_session_terminated",
})
# Shorter texts could be a part of any word.
_TELLING_LENGTH = 8


class Fetch(Protocol):
    """One outbound call, as `net.http.Outbound.fetch` makes it; raises `NetError`."""

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout: float,
        proxy_url: str | None = None,
    ) -> Reply: ...


class RefreshFailure(enum.Enum):
    """What a failed exchange means for the refresh token."""

    PERMANENT = "permanent"
    """The login is over: a person must log in again."""
    PASSING = "passing"
    """The token is as good as before: try again later."""
    UNCERTAIN = "uncertain"
    """The token may be spent and its successor lost: try it once more, no oftener."""
    LIMITED = "limited"
    """The issuer wants fewer requests: wait `retry_after`."""


class RefreshFailed(ProxyError):
    """An exchange brought no tokens. The message is the issuer's, secrets taken out."""

    def __init__(
        self,
        kind: RefreshFailure,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code
        """The issuer's own word, lower case."""
        self.answer_status = status
        """The HTTP status that the issuer gave; None when there was no answer."""
        self.retry_after = retry_after
        """Seconds from now, when the issuer said so."""

    def __str__(self) -> str:
        return f"{self.kind.value} status={self.answer_status} code={self.code}: {self.message}"


async def refresh(
    fetch: Fetch,
    *,
    issuer: str,
    refresh_token: Secret,
    reason: RefreshReason,
    originator: str,
    user_agent: str,
    timeout: float = 30.0,
    proxy_url: str | None = None,
) -> NewTokens:
    """Exchange *refresh_token*; from the moment this is called it may be spent.

    Raises:
        RefreshFailed: If no tokens came back.
    """
    body = {
        "client_id": CLIENT_ID,
        "grant_type": "refresh_token",
        "refresh_reason": reason,
        "refresh_token": refresh_token.reveal(),
    }
    headers = {
        "accept": "application/json",
        "content-type": "application/json",
        "originator": originator,
        "user-agent": user_agent,
    }
    try:
        answer = await fetch(
            "POST",
            f"{issuer.rstrip('/')}/oauth/token",
            headers=headers,
            body=orjson.dumps(body),
            timeout=timeout,
            proxy_url=proxy_url,
        )
    except NetError as exc:
        kind = RefreshFailure.PASSING if exc.kind.is_path else RefreshFailure.UNCERTAIN
        raise RefreshFailed(kind, clean(str(exc))) from exc
    if 200 <= answer.status < 300:
        return _new_tokens(answer)
    raise _failure(answer, refresh_token)


def _new_tokens(answer: Reply) -> NewTokens:
    document = _document(answer.body)
    access, new_refresh, id_token = (
        Secret(word) if (word := word_of(document.get(name))) else None
        for name in ("access_token", "refresh_token", "id_token")
    )
    # A new refresh token alone is worth keeping: it replaces one that is spent now.
    if access is None and new_refresh is None:
        raise RefreshFailed(
            RefreshFailure.UNCERTAIN, "the issuer's answer holds no tokens", status=answer.status
        )
    return NewTokens(access, new_refresh, id_token, seconds_of(document.get("expires_in")))


def _failure(answer: Reply, refresh_token: Secret) -> RefreshFailed:
    document = _document(answer.body)
    code = _code(document)
    if code in _PERMANENT or answer.status == 401:
        kind = RefreshFailure.PERMANENT
    elif answer.status == 429:
        kind = RefreshFailure.LIMITED
    else:
        kind = RefreshFailure.PASSING
    return RefreshFailed(
        kind,
        _without(refresh_token, _message(document, answer.status)),
        code=None if code is None else _without(refresh_token, code),
        status=answer.status,
        retry_after=None if kind is RefreshFailure.PERMANENT else _retry_after(answer.headers),
    )


def _code(document: Mapping[str, Any]) -> str | None:
    error = document.get("error")
    for value in (error.get("code") if isinstance(error, dict) else error, document.get("code")):
        if isinstance(value, str) and value:
            return value.lower()
    return None


def _message(document: Mapping[str, Any], status: int) -> str:
    description = document.get("error_description")
    if isinstance(description, str) and description:
        # OAuth's own shape: the word in `error`, the sentence beside it.
        return description
    return fault_of(document, f"the issuer answered {status}").message


def _without(secret: Secret, text: str) -> str:
    """Take an echoed token out, of whatever shape it is."""
    value = secret.reveal()
    if len(value) >= _TELLING_LENGTH:
        text = re.sub(re.escape(value), "[token]", text, flags=re.IGNORECASE)
    return clean(text)


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        # A date is told from the answer's own, so that a wrong clock here does no harm.
        until, now = _date(value), _date(headers.get("date", ""))
        if until is None or now is None:
            return None
        seconds = (until - now).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _date(value: str) -> datetime | None:
    try:
        parsed = parsedate_to_datetime(value)
    except ValueError:
        return None
    return parsed if parsed.tzinfo is not None else None
