"""What the issuer is asked: tokens for tokens, logins, the end of a login.

A refresh token can be used once. So the one question about a failure is whether the old token
may have been spent: an issuer that never got the request spent nothing, and one whose answer
was lost on the way may have. Nothing here touches a file, retries, or forgets a token.

| what came back                                           | kind      |
|----------------------------------------------------------|-----------|
| a code that says the login is over, on any status; 401   | PERMANENT |
| 429                                                      | LIMITED   |
| no connection; a proxy's refusal; any other status       | PASSING   |
| timeout or cut after sending; a 200 that cannot be read  | UNCERTAIN |

A login has no such question: one that failed is begun again (`LoginFailed`).

Facts: backend contract, sections 1.3 to 1.6.
"""

import base64
import enum
import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol
from urllib.parse import urlencode

import orjson

from codex_proxy.accounts.tokens import NewTokens, Secret, seconds_of, word_of
from codex_proxy.errors import ProxyError, clean, fault_of
from codex_proxy.net.http import NetError, Reply

CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"

SCOPE = "openid profile email offline_access api.connectors.read api.connectors.invoke"

RefreshReason = Literal["proactive_expiry", "unauthorized_recovery"]
TokenKind = Literal["refresh_token", "access_token"]

# How long an answer about a login may take; a person is waiting.
_LOGIN_SECONDS = 30.0
_REVOKE_SECONDS = 10.0
# By how much a device asks more seldom when it is told that it asks too often (RFC 8628).
_SLOWER_SECONDS = 5.0

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

# What a person can do something about, in our words.
_LOGIN_WORDS = {
    "access_denied": "the login was refused on the issuer's page",
    "authorization_declined": "the login was refused on the issuer's page",
    "expired_token": "the code has expired",
    "missing_codex_entitlement": (
        "this account may not use Codex: its plan or its workspace does not include it;"
        " a workspace's administrator can allow it"
    ),
}


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


class LoginFailed(ProxyError):
    """A login brought no account. The message is for the person who logs in; nothing was written."""


class NoAnswer(LoginFailed):
    """The issuer could not be asked, or had a bad moment; asking again may help."""


class RevokeFailed(ProxyError):
    """The issuer did not take a login back; it may go on being good."""


@dataclass(slots=True, frozen=True)
class Pkce:
    """What only the program that began a login knows, and its digest, which the issuer is told."""

    verifier: Secret
    challenge: str

    @classmethod
    def new(cls) -> "Pkce":
        """Make one that nobody can guess."""
        verifier = secrets.token_urlsafe(64)
        digest = hashlib.sha256(verifier.encode()).digest()
        return cls(Secret(verifier), base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii"))


@dataclass(slots=True, frozen=True)
class Device:
    """A device login that waits for a person."""

    id: Secret
    user_code: str
    """What the person types at `url`."""
    url: str
    interval: float
    """Seconds between two questions whether it is done."""


@dataclass(slots=True, frozen=True)
class Grant:
    """A device login that a person has approved."""

    code: Secret
    verifier: Secret


@dataclass(slots=True, frozen=True)
class Issuer:
    """The issuer of logins, and the way there."""

    fetch: Fetch
    url: str
    originator: str
    user_agent: str
    proxy_url: str | None = None
    """The way out; None means the configured one."""

    def authorize_url(self, pkce: Pkce, *, redirect_uri: str, state: str) -> str:
        """Return the page where a person logs in, after which the browser goes to *redirect_uri*."""
        query = {
            "response_type": "code",
            "client_id": CLIENT_ID,
            "redirect_uri": redirect_uri,
            "scope": SCOPE,
            "code_challenge": pkce.challenge,
            "code_challenge_method": "S256",
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
            "state": state,
            "originator": self.originator,
        }
        return f"{self._base}/oauth/authorize?{urlencode(query)}"

    async def exchange_code(self, code: Secret, *, redirect_uri: str, verifier: Secret) -> NewTokens:
        """Trade the code of a login for its tokens, which are all there.

        Raises:
            LoginFailed: If the issuer gives none, or not all.
        """
        form = {
            "grant_type": "authorization_code",
            "client_id": CLIENT_ID,
            "code": code.reveal(),
            "redirect_uri": redirect_uri,
            "code_verifier": verifier.reveal(),
        }
        answer = await self._post(
            "/oauth/token", urlencode(form).encode(), "application/x-www-form-urlencoded", _LOGIN_SECONDS
        )
        document = _document(answer.body)
        if not 200 <= answer.status < 300:
            raise _login_failure(answer, document, code, verifier)
        tokens = _tokens_of(document)
        if not (tokens.access and tokens.refresh and tokens.id):
            raise LoginFailed("the issuer's answer lacks tokens: log in again")
        return tokens

    async def start_device(self) -> Device:
        """Begin a login that is approved on another device.

        Raises:
            LoginFailed: If the issuer has no such logins, or its answer is none.
        """
        answer = await self._post_json("/api/accounts/deviceauth/usercode", {"client_id": CLIENT_ID})
        document = _document(answer.body)
        if answer.status == 404:
            raise LoginFailed(
                "the issuer does not offer device logins (its account settings may allow them):"
                " log in without --device"
            )
        if not 200 <= answer.status < 300:
            raise _login_failure(answer, document)
        name = word_of(document.get("device_auth_id"))
        code = word_of(document.get("user_code")) or word_of(document.get("usercode"))
        if name is None or code is None:
            raise LoginFailed("the issuer's answer holds no code for the device login")
        return Device(Secret(name), code, f"{self._base}/codex/device", _interval(document.get("interval")))

    async def poll_device(self, device: Device) -> Grant | float:
        """Return the grant once there is one; until then, by how many seconds to ask more seldom.

        Raises:
            NoAnswer: If the issuer said nothing of use.
            LoginFailed: If nothing will come of this login.
        """
        body = {"device_auth_id": device.id.reveal(), "user_code": device.user_code}
        answer = await self._post_json("/api/accounts/deviceauth/token", body)
        document = _document(answer.body)
        if 200 <= answer.status < 300:
            code = word_of(document.get("authorization_code"))
            verifier = word_of(document.get("code_verifier"))
            if code is None or verifier is None:
                raise LoginFailed("the issuer's answer lacks the code of the login: log in again")
            return Grant(Secret(code), Secret(verifier))
        said = _code(document)
        if said in {"access_denied", "authorization_declined", "expired_token"}:
            raise _login_failure(answer, document, device.id)
        if said == "slow_down" or answer.status == 429:
            return max(_SLOWER_SECONDS, min(_retry_after(answer.headers) or 0.0, 60.0))
        if answer.status in {403, 404}:
            return 0.0
        raise _login_failure(answer, document, device.id)

    async def exchange_grant(self, grant: Grant) -> NewTokens:
        """Trade an approved device login for its tokens; as `exchange_code`."""
        return await self.exchange_code(
            grant.code, redirect_uri=f"{self._base}/deviceauth/callback", verifier=grant.verifier
        )

    async def revoke(self, token: Secret, kind: TokenKind) -> None:
        """Take a login back: no token of it is good afterwards.

        Raises:
            RevokeFailed: If the issuer did not say that it did.
        """
        body = {"token": token.reveal(), "token_type_hint": kind}
        if kind == "refresh_token":
            body["client_id"] = CLIENT_ID
        try:
            answer = await self._post_json("/oauth/revoke", body, _REVOKE_SECONDS)
        except NoAnswer as exc:
            raise RevokeFailed(exc.message) from exc
        if not 200 <= answer.status < 300:
            raise RevokeFailed(_without(token, _message(_document(answer.body), answer.status)))

    @property
    def _base(self) -> str:
        return self.url.rstrip("/")

    async def _post_json(self, path: str, body: Mapping[str, str], timeout: float = _LOGIN_SECONDS) -> Reply:
        return await self._post(path, orjson.dumps(body), "application/json", timeout)

    async def _post(self, path: str, body: bytes, content_type: str, timeout: float) -> Reply:
        headers = {"accept": "application/json", "content-type": content_type, "user-agent": self.user_agent}
        try:
            return await self.fetch(
                "POST",
                f"{self._base}{path}",
                headers=headers,
                body=body,
                timeout=timeout,
                proxy_url=self.proxy_url,
            )
        except NetError as exc:
            raise NoAnswer(f"the issuer did not answer: {clean(str(exc))}") from exc


def login_words(code: str, description: str = "") -> str:
    """Return in words why the issuer refused a login, given its own word for it."""
    for word, text in _LOGIN_WORDS.items():
        if word in {code.lower(), description.lower()} or word in description.lower().split():
            return text
    said = ": ".join(" ".join(part.split()) for part in (code, description) if part.strip())
    return clean(f"the issuer refused the login: {said or 'it did not say why'}")[:500]


def _login_failure(answer: Reply, document: Mapping[str, Any], *secret: Secret) -> LoginFailed:
    text = _message(document, answer.status)
    for one in secret:
        text = _without(one, text)
    code = _code(document) or ""
    if answer.status >= 500 or answer.status == 429:
        return NoAnswer(f"the issuer answered {answer.status}: {text}")
    return LoginFailed(login_words(code, "" if text.lower() == code else text))


def _interval(value: object) -> float:
    """Read a pause in seconds, which the issuer sends as a text."""
    try:
        seconds = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        seconds = math.nan
    return min(60.0, max(1.0, seconds)) if math.isfinite(seconds) else 5.0


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
    tokens = _tokens_of(_document(answer.body))
    # A new refresh token alone is worth keeping: it replaces one that is spent now.
    if tokens.access is None and tokens.refresh is None:
        raise RefreshFailed(
            RefreshFailure.UNCERTAIN, "the issuer's answer holds no tokens", status=answer.status
        )
    return tokens


def _tokens_of(document: Mapping[str, Any]) -> NewTokens:
    access, refresh_token, id_token = (
        Secret(word) if (word := word_of(document.get(name))) else None
        for name in ("access_token", "refresh_token", "id_token")
    )
    return NewTokens(access, refresh_token, id_token, seconds_of(document.get("expires_in")))


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
