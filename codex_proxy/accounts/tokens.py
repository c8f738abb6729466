"""Tokens and who they belong to: pure, and safe to keep in anything that may be printed.

A token lives in a `Secret`, which shows itself only when asked by name. What an account is
called comes from the claims inside its tokens; signatures are not checked, because the
issuer's tokens reach us from the owner's own files and the backend checks them anyway.
"""

import base64
import binascii
import hashlib
import hmac
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

AUTH_CLAIM = "https://api.openai.com/auth"
PROFILE_CLAIM = "https://api.openai.com/profile"

# The last second that datetime can show; anything later is a mistake in a token, not a time.
_LATEST_TIME = 253_402_300_799.0
_MASK = "***"
_WORD = re.compile(r"[\x21-\x7e]+")
_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)*")
# What the backend says of an account whose data may live anywhere.
_UNCONSTRAINED = frozenset({"no_constraint", "no_constraints", "none", "unknown"})


class Secret:
    """A text that is never shown by accident.

    repr, str and format give asterisks; pickling fails, and so does every JSON encoder. Only
    `reveal` returns the text, so each place that uses it can be found by that word.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the text itself."""
        return self._value

    def digest(self) -> str:
        """Return a name for this text that does not give it away; empty for no text."""
        if not self._value:
            return ""
        return hashlib.sha256(b"codex-proxy secret\0" + _utf8(self._value)).hexdigest()

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_utf8(self._value), _utf8(other._value))

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __repr__(self) -> str:
        return f"Secret({_MASK})" if self._value else "Secret()"

    def __str__(self) -> str:
        return _MASK if self._value else ""

    def __format__(self, spec: str) -> str:
        # The spec is dropped on purpose: a width of 1000 or a precision of 3 tells nothing.
        return str(self)

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: object) -> "Secret":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


NO_SECRET = Secret()


@dataclass(slots=True, frozen=True)
class Identity:
    """Whose tokens these are; None where no token says so."""

    user_id: str | None = None
    account_id: str | None = None
    email: str | None = None
    plan: str | None = None
    is_fedramp: bool = False
    residency: str | None = None
    """Where the account's data must stay (`us`), None when it may be anywhere."""

    def __repr__(self) -> str:
        return f"Identity(email={mask_email(self.email or '')!r}, plan={self.plan!r})"


@dataclass(slots=True, frozen=True)
class NewTokens:
    """What an exchange brought; None where the answer had nothing, which means: keep the old."""

    access: Secret | None = None
    refresh: Secret | None = None
    id: Secret | None = None
    expires_in: float | None = None
    """Seconds that the access token lives, as the answer put it; the token's own `exp` outranks it."""


def claims(token: Secret | str) -> dict[str, Any]:
    """Return what a JWT says, empty when it is none.

    Never raises: a token of a shape we do not know is still a token.
    """
    parts = (token.reveal() if isinstance(token, Secret) else token).split(".")
    if len(parts) != 3:
        return {}
    payload = parts[1].rstrip("=")
    try:
        decoded = orjson.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (binascii.Error, ValueError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def identity_of(id_token: Secret | str, access_token: Secret | str) -> Identity:
    """Return whose tokens these are; the id token speaks first, the access token fills its gaps."""
    documents = [claims(id_token), claims(access_token)]
    auth = [_mapping(document.get(AUTH_CLAIM)) for document in documents]
    profiles = [_mapping(document.get(PROFILE_CLAIM)) for document in documents]
    residency = _first(auth, "chatgpt_compute_residency") or _first(auth, "chatgpt_data_residency")
    return Identity(
        user_id=_first(auth, "chatgpt_user_id") or _first(auth, "user_id") or _first(documents, "sub"),
        account_id=_first(auth, "chatgpt_account_id")
        or _first(auth, "organization_id")
        or next(_organizations(auth), None),
        email=_first(documents, "email") or _first(profiles, "email"),
        plan=_first(auth, "chatgpt_plan_type"),
        is_fedramp=any(claim.get("chatgpt_account_is_fedramp") is True for claim in auth),
        residency=None if residency is None or residency.lower() in _UNCONSTRAINED else residency,
    )


def expiry_of(access_token: Secret | str) -> float | None:
    """Return when an access token ends (wall clock), None when it does not say."""
    return seconds_of(claims(access_token).get("exp"))


def seconds_of(value: object) -> float | None:
    """Return *value* as a time or a span in seconds, None when it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Compared before it is converted: a huge integer has no float.
    if not 0 < value <= _LATEST_TIME or not math.isfinite(value):
        return None
    return float(value)


def word_of(value: object) -> str | None:
    """Return *value* when it is a text that a header can carry, without the blanks around it."""
    if not isinstance(value, str):
        return None
    stripped = value.strip()
    return stripped if _WORD.fullmatch(stripped) else None


def mask_email(email: str) -> str:
    """Return an address that its owner recognises and nobody else can write to."""
    local, at, domain = email.rpartition("@")
    if not email:
        return ""
    if not at or not local:
        return _MASK
    host, dot, rest = domain.partition(".")
    return f"{local[0]}{_MASK}@{host[:1]}{_MASK}{dot}{rest}"


def mask_name(name: str) -> str:
    """Return a file's name with the e-mail addresses in it masked; many files are named so."""
    stem, dot, suffix = name.rpartition(".")
    if not stem:
        return _EMAIL.sub(lambda match: mask_email(match[0]), name)
    return _EMAIL.sub(lambda match: mask_email(match[0]), stem) + dot + suffix


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _first(sources: list[Mapping[str, Any]] | list[dict[str, Any]], name: str) -> str | None:
    return next((word for source in sources if (word := word_of(source.get(name)))), None)


def _organizations(auth: list[Mapping[str, Any]]) -> Iterator[str]:
    for source in auth:
        organizations = source.get("organizations")
        if isinstance(organizations, list) and organizations:
            word = word_of(_mapping(organizations[0]).get("id"))
            if word:
                yield word


def _utf8(text: str) -> bytes:
    # A lone surrogate can come out of a JSON escape; it must not break a comparison.
    return text.encode("utf-8", "surrogatepass")
