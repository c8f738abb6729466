"""The OAuth issuer: logins, refresh tokens that work once, device codes.

State and decisions only; the server turns `Refused` into an answer. Access tokens stay good to
their end when they are refreshed, as signed tokens do, unless `old_access_valid` is off.
"""

import base64
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from codex_proxy.protocol.wire import dumps

if TYPE_CHECKING:
    from codex_proxy.simulator.account import SimAccount

CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann"
AUTH_CLAIM = "https://api.openai.com/auth"
PROFILE_CLAIM = "https://api.openai.com/profile"
TEN_DAYS = 10 * 86_400.0
DEVICE_REDIRECT = "/deviceauth/callback"
"""Below the issuer's own address: what the code of a device login is exchanged with."""

REFRESH_MODES = frozenset({
    "ok",
    "reused",
    "invalidated",
    "expired",
    "invalid_grant",
    "slow",
    "hang",
    "hang_committed",
    "cut",
    "cut_committed",
    "bad_json",
    "no_refresh_token",
    "cloudflare",
    "401",
    "403",
    "429",
    "500",
    "502",
    "503",
})
"""How a token exchange may end; `*_committed` spends the token and then fails to say so."""

_PERMANENT = {
    "reused": "Your refresh token has already been used to generate a new access token. Please try signing in again.",
    "invalidated": "Your refresh token has been invalidated. Please try signing in again.",
    "expired": "Your refresh token has expired. Please try signing in again.",
}


class Refused(Exception):
    """The issuer's answer is an error; carries the status and the body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(f"refused with {status}")
        self.status = status
        self.body = body


@dataclass(slots=True, eq=False)
class Login:
    """One login: the family of all tokens that were made from it."""

    account: "SimAccount"
    revoked: bool = False
    refreshes: int = 0


@dataclass(slots=True, eq=False)
class Tokens:
    """What one exchange gave."""

    access: str
    refresh: str
    id_token: str
    issued_at: float
    expires_at: float
    """The end of the access token as the server sees it; the token itself may say otherwise."""
    login: Login
    access_revoked: bool = False
    refresh_spent: bool = False
    refresh_expired: bool = False


@dataclass(slots=True)
class _Code:
    """An authorization code that waits for its exchange."""

    account: "SimAccount"
    redirect_uri: str
    challenge: str


@dataclass(slots=True)
class _Device:
    user_code: str
    polls: int = 0
    account: "SimAccount | None" = None


@dataclass(slots=True)
class Issuer:
    """Issue, rotate and revoke tokens; the clock is the simulator's."""

    now: Callable[[], float]
    lifetime: float = TEN_DAYS
    strict: bool = True
    client_id: str = CLIENT_ID
    old_access_valid: bool = True
    """Whether an access token goes on being good after a refresh."""
    device_enabled: bool = True
    device_interval: str = "5"
    device_polls: int | None = None
    """After how many polls a device login is approved by itself; None waits for `approve_device`."""
    device_slow_down: int = 0
    """How many of the next polls are told to come more seldom."""
    login_error: str | None = None
    """With what a person's logins end instead of a code: `access_denied`, `missing_codex_entitlement`, ..."""
    revoke_status: int = 200
    """What a request to revoke a token is answered; anything but 200 revokes nothing."""
    exchanges: int = 0
    """How many refresh tokens were exchanged with success."""
    _access: dict[str, Tokens] = field(default_factory=dict)
    _refresh: dict[str, Tokens] = field(default_factory=dict)
    _codes: dict[str, _Code] = field(default_factory=dict)
    _devices: dict[str, _Device] = field(default_factory=dict)
    _serial: int = 0

    @staticmethod
    def rfc3339(when: float) -> str:
        """Render a time as account files have it."""
        return datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    def issue(
        self, account: "SimAccount", expires_in: float | None = None, login: Login | None = None
    ) -> Tokens:
        """Make a set of tokens: of a new login, or the next of *login*."""
        now = self.now()
        expires_at = now + (self.lifetime if expires_in is None else expires_in)
        # What has ended already was issued a lifetime before that.
        issued_at = now if expires_at > now else expires_at - self.lifetime
        self._serial += 1
        identity = {
            "chatgpt_account_id": account.account_id,
            "chatgpt_plan_type": account.plan,
            "chatgpt_user_id": account.user_id,
            "user_id": account.user_id,
            "chatgpt_account_user_id": f"{account.user_id}__{account.account_id}",
            "chatgpt_account_is_fedramp": account.fedramp,
            "chatgpt_compute_residency": "no_constraint",
            "chatgpt_data_residency": "no_constraint",
        }
        session = f"authsess_{secrets.token_hex(12)}"
        common = {"iss": "https://auth.openai.com", "iat": int(issued_at), "sub": f"auth0|{account.user_id}"}
        access = {
            **common,
            "aud": ["https://api.openai.com/v1"],
            "client_id": self.client_id,
            "exp": int(expires_at),
            "jti": f"{self._serial}-{secrets.token_hex(8)}",
            "nbf": int(issued_at),
            "scp": ["openid", "profile", "email", "offline_access"],
            "session_id": session,
            AUTH_CLAIM: identity,
            PROFILE_CLAIM: {"email": account.email, "email_verified": True},
        }
        identified = {
            **common,
            "aud": [self.client_id],
            "email": account.email,
            "email_verified": True,
            "name": f"Simulated {account.name}",
            "exp": int(issued_at) + 3600,
            AUTH_CLAIM: identity,
        }
        tokens = Tokens(
            access=encode_jwt(access),
            refresh=f"rt_{secrets.token_urlsafe(33)}.{self._serial}",
            id_token=encode_jwt(identified),
            issued_at=issued_at,
            expires_at=expires_at,
            login=login or Login(account),
        )
        self._access[tokens.access] = tokens
        self._refresh[tokens.refresh] = tokens
        return tokens

    def account_of(self, access: str) -> "tuple[SimAccount | None, str]":
        """Return whose access token this is, and '' or the code with which it is refused."""
        tokens = self._access.get(access)
        if tokens is None:
            return None, "token_invalidated"
        account = tokens.login.account
        if tokens.access_revoked:
            return account, "token_invalidated"
        if self.now() >= tokens.expires_at:
            return account, "token_expired"
        return account, ""

    def owner_of_refresh(self, refresh: str) -> "SimAccount | None":
        """Return whose refresh token this is, spent or not."""
        tokens = self._refresh.get(refresh)
        return None if tokens is None else tokens.login.account

    def revoke(self, account: "SimAccount") -> None:
        """Revoke all that *account* has."""
        for tokens in self._refresh.values():
            if tokens.login.account is account:
                tokens.login.revoked = True
                tokens.access_revoked = True

    def exchange(self, refresh: object, client_id: object, *, rotate: bool = True) -> Tokens:
        """Trade a refresh token for the next tokens of its login.

        Raises:
            Refused: If it is unknown, spent, expired or revoked.
        """
        if self.strict and client_id != self.client_id:
            raise Refused(401, _oauth_error("invalid_client", "The client is unknown."))
        old = self._refresh.get(refresh) if isinstance(refresh, str) else None
        if old is None:
            raise Refused(401, permanent("invalidated"))
        if old.refresh_spent:
            # The token is in two hands, and nobody knows which is the owner's.
            if self.strict:
                old.login.revoked = True
            raise Refused(401, permanent("reused"))
        if old.login.revoked:
            raise Refused(401, permanent("invalidated"))
        if old.refresh_expired:
            raise Refused(401, permanent("expired"))
        account = old.login.account
        new = self.issue(account, login=old.login)
        if rotate:
            old.refresh_spent = True
        else:
            del self._refresh[new.refresh]
            new.refresh = old.refresh
            self._refresh[old.refresh] = new
        if not self.old_access_valid:
            old.access_revoked = True
        old.login.refreshes += 1
        self.exchanges += 1
        if account.tokens.login is old.login:
            account.tokens = new
        return new

    def authorize(self, account: "SimAccount", query: Mapping[str, str]) -> str:
        """Approve a browser login and return where the browser goes next.

        Raises:
            Refused: If the client asks for it wrongly.
        """
        redirect = query.get("redirect_uri", "")
        if query.get("response_type") != "code" or not redirect or query.get("client_id") != self.client_id:
            raise Refused(
                400, _oauth_error("invalid_request", "response_type, client_id and redirect_uri are needed.")
            )
        if query.get("code_challenge_method") != "S256" or not query.get("code_challenge"):
            raise Refused(400, _oauth_error("invalid_request", "A code_challenge of method S256 is needed."))
        if self.strict:
            self._check_authorize(redirect, query)
        back = {"state": query.get("state", "")}
        if self.login_error is not None:
            back["error"] = self.login_error
            back["error_description"] = f"The login ended with {self.login_error}."
        else:
            back["code"] = self._code(account, redirect, query["code_challenge"])
        return redirect + ("&" if "?" in redirect else "?") + urlencode(back)

    def _check_authorize(self, redirect: str, query: Mapping[str, str]) -> None:
        """Refuse what the real issuer would not serve a Codex client; ports are free here, for tests side by side."""
        place = urlsplit(redirect)
        if place.hostname not in {"127.0.0.1", "localhost"} or place.path != "/auth/callback":
            raise Refused(400, _oauth_error("invalid_request", "The redirect_uri is not registered."))
        if not {"openid", "offline_access"} <= set(query.get("scope", "").split()):
            raise Refused(400, _oauth_error("invalid_scope", "openid and offline_access are needed."))
        if len(query.get("state", "")) < 8:
            raise Refused(400, _oauth_error("invalid_request", "A state that nobody can guess is needed."))

    def exchange_code(self, form: Mapping[str, str]) -> Tokens:
        """Trade an authorization code for tokens; a code works once.

        Raises:
            Refused: If code, redirect or verifier do not belong together.
        """
        waiting = self._codes.pop(form.get("code", ""), None)
        verifier = form.get("code_verifier", "")
        if waiting is None or form.get("client_id") != self.client_id:
            raise Refused(400, _oauth_error("invalid_grant", "The authorization code is unknown or used."))
        if waiting.challenge != s256(verifier):
            raise Refused(400, _oauth_error("invalid_grant", "The code verifier does not match."))
        given = form.get("redirect_uri", "")
        if waiting.redirect_uri == DEVICE_REDIRECT:
            given = urlsplit(given).path
        if given != waiting.redirect_uri:
            raise Refused(400, _oauth_error("invalid_grant", "The redirect URI does not match."))
        waiting.account.tokens = self.issue(waiting.account)
        return waiting.account.tokens

    def start_device(self) -> dict[str, Any]:
        """Begin a device login.

        Raises:
            Refused: If device logins are switched off.
        """
        if not self.device_enabled:
            raise Refused(404, {"detail": "Not Found"})
        self._serial += 1
        device = f"deviceauth_{secrets.token_hex(12)}"
        letters = sha256(device.encode()).hexdigest().upper()
        self._devices[device] = _Device(f"{letters[:4]}-{letters[4:9]}")
        # The real issuer sends the interval as a string.
        return {
            "device_auth_id": device,
            "user_code": self._devices[device].user_code,
            "interval": self.device_interval,
        }

    def approve_device(self, user_code: str, account: "SimAccount") -> bool:
        """Approve the device login with *user_code*; False when there is none."""
        for device in self._devices.values():
            if device.user_code == user_code.strip().upper():
                device.account = account
                return True
        return False

    def poll_device(self, device_id: str, user_code: str, default: "SimAccount | None") -> dict[str, Any]:
        """Answer a poll of a device login.

        Raises:
            Refused: While it is pending (403), and when it is unknown (400).
        """
        device = self._devices.get(device_id)
        if device is None or device.user_code != user_code:
            raise Refused(400, _oauth_error("invalid_grant", "The device code is unknown."))
        device.polls += 1
        if self.login_error is not None:
            raise Refused(403, _oauth_error(self.login_error, f"The login ended with {self.login_error}."))
        if self.device_slow_down > 0:
            self.device_slow_down -= 1
            raise Refused(403, _oauth_error("slow_down", "You ask too often."))
        if self.device_polls is not None and device.polls > self.device_polls:
            device.account = device.account or default
        if device.account is None:
            raise Refused(403, _oauth_error("authorization_pending", "Not approved yet."))
        del self._devices[device_id]
        verifier = secrets.token_urlsafe(48)
        code = self._code(device.account, DEVICE_REDIRECT, s256(verifier))
        return {"authorization_code": code, "code_challenge": s256(verifier), "code_verifier": verifier}

    def revoke_token(self, token: str, client_id: str = CLIENT_ID) -> None:
        """Revoke the login that *token* belongs to; an unknown one is nobody's business.

        Raises:
            Refused: If the request is wrong, or nothing is to be revoked now.
        """
        if self.revoke_status != 200:
            raise Refused(self.revoke_status, _oauth_error("server_error", "The issuer has a bad day."))
        if not token or (self.strict and token in self._refresh and client_id != self.client_id):
            raise Refused(400, _oauth_error("invalid_request", "A token and its client are needed."))
        tokens = self._refresh.get(token) or self._access.get(token)
        if tokens is not None:
            tokens.login.revoked = True
            for other in self._refresh.values():
                if other.login is tokens.login:
                    other.access_revoked = True

    def _code(self, account: "SimAccount", redirect: str, challenge: str) -> str:
        code = f"ac_{secrets.token_urlsafe(24)}"
        self._codes[code] = _Code(account, redirect, challenge)
        return code


def permanent(how: str) -> dict[str, Any]:
    """Return the body with which a refresh token is refused for good."""
    return {
        "error": {
            "message": _PERMANENT[how],
            "type": "invalid_request_error",
            "param": None,
            "code": f"refresh_token_{how}",
        }
    }


def s256(verifier: str) -> str:
    """Return the PKCE challenge of *verifier*."""
    return _b64url(sha256(verifier.encode()).digest())


def encode_jwt(claims: dict[str, Any]) -> str:
    """Return a token that looks real; its signature is none."""
    header = {"alg": "RS256", "kid": "simulator", "typ": "JWT"}
    signature = sha256(dumps(claims)).digest()
    return ".".join(_b64url(part) for part in (dumps(header), dumps(claims), signature))


def _b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _oauth_error(code: str, text: str) -> dict[str, Any]:
    return {"error": code, "error_description": text}
