"""One account's file as a value: what it says, and the same with other tokens. Pure.

What a file may say is told in docs/accounts.md. A part that is no use is left out and named;
where leaving it out would do what its owner did not want (send tokens another way, serve more
than it was meant to), the narrower reading counts, and is named too.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from codex_proxy.accounts.files import Unusable
from codex_proxy.accounts.tokens import (
    NO_SECRET,
    Identity,
    NewTokens,
    Secret,
    expiry_of,
    identity_of,
    seconds_of,
    word_of,
)

Shape = Literal["flat", "codex"]

# Numbers beyond this are a mistake; JSON has no largest one.
_LARGEST = 1_000_000
_LONGEST_PATTERN = 200

# How far two machines' clocks may be apart, a wrong time zone included.
_CLOCK_SECONDS = 86_400.0


@dataclass(slots=True, repr=False)
class Credential:
    """One account's file, read."""

    path: Path
    """The file as it is listed in auth-dir."""
    target: Path
    """The file itself, when `path` is a symlink to it."""
    shape: Shape
    raw: dict[str, Any]
    """The whole file, unknown keys included."""
    access: Secret
    refresh: Secret
    id: Secret
    expires_at: float | None
    """Wall clock; from the access token, else from the file; None when neither says."""
    last_refresh: float | None
    identity: Identity
    alias: str | None
    """The name its owner gave it."""
    disabled: bool
    proxy_url: Secret | None
    """Its own way out, None where its file names none; secret, because it may carry a password."""
    priority: int = 0
    """Smaller serves first; others only while none of a smaller number can."""
    weight: float = 1.0
    """Its share under the `weighted` strategy, against the others of its priority."""
    models_allowed: tuple[str, ...] = ()
    """Patterns of the only models it serves; empty is every model."""
    models_denied: tuple[str, ...] = ()
    """Patterns of models it does not serve."""
    max_concurrency: int | None = None
    """How many requests it carries at a time; None: what the configuration says; 0: any number."""
    mtime_ns: int = 0
    interrupted: float | None = None
    """When an exchange of this very refresh token began whose end was never written down.

    The token may be spent: try it once, and blame the lost answer when it is refused."""
    refused: str = ""
    """Why the issuer refused it after that; then nobody asks with it again unless told to."""
    superseded: frozenset[str] = frozenset()
    """Digests of the refresh tokens that we know to be spent; a file that holds one is behind."""
    is_unsaved: bool = False
    """Its tokens are newer than its file; `save` with empty NewTokens is another try."""
    key: str = dataclasses.field(init=False)
    """A stable name of the account: the same in every file and after every login."""
    workspace: str = dataclasses.field(init=False)
    """A stable name of its workspace; its own where the tokens name none."""

    def __post_init__(self) -> None:
        # Once: every choice among the accounts asks each of them.
        self.key = self._key()
        account_id = self.identity.account_id
        self.workspace = hashlib.sha256(account_id.encode()).hexdigest()[:24] if account_id else self.key

    def __repr__(self) -> str:
        return f"Credential({self.default_alias!r})"

    def _key(self) -> str:
        """Name the account.

        An e-mail address alone names no account, because one person may have several
        workspaces; a file that says no more is named by its place.
        """
        user, account = self.identity.user_id, self.identity.account_id
        if user is None and account is not None:
            user = (self.identity.email or "").lower()
        if user is None:
            return _digest("path", str(self.target))
        return _digest("identity", user, account or "")

    @property
    def default_alias(self) -> str:
        """Return a short name for logs and pages that does not change with the plan."""
        return f"acct-{self.key[:8]}"

    def all_tokens(self) -> NewTokens:
        """Return its tokens as an exchange that brought all of them would."""
        return NewTokens(self.access or None, self.refresh or None, self.id or None)

    def merged(self, tokens: NewTokens, *, now: float) -> "Credential":
        """Return this credential with *tokens*, what they lack kept; nothing is written.

        The result knows which token is spent, so that a later `save` takes the file's old
        refresh token for its own past and not for somebody else's login.
        """
        held = ((tokens.access, self.access), (tokens.refresh, self.refresh), (tokens.id, self.id))
        if tokens.expires_in is None and all(not new or new == old for new, old in held):
            # Nothing new, as in another try to save: the times of the exchange stay.
            return self
        expires_at = expiry_of(tokens.access or "")
        if tokens.access and expires_at is None and tokens.expires_in is not None:
            expires_at = seconds_of(now + tokens.expires_in)
        raw = with_tokens(self.raw, self.shape, tokens, expires_at, now)
        past = self.superseded
        if self.refresh and tokens.refresh and tokens.refresh != self.refresh:
            past |= {self.refresh.digest()}
        merged, _ = parse(self.path, self.target, raw, self.mtime_ns)
        return dataclasses.replace(merged, alias=self.alias, superseded=past, is_unsaved=True)


def parse(path: Path, target: Path, raw: dict[str, Any], mtime_ns: int) -> tuple[Credential, list[str]]:
    """Make a credential of a file's contents; the list names the parts that are no use.

    Raises:
        Unusable: If there is no login in it, or none that may be used.
    """
    complaints: list[str] = []
    nested = raw.get("tokens")
    shape: Shape = "codex" if isinstance(nested, dict) and nested else "flat"
    holder: dict[str, Any] = nested if isinstance(nested, dict) and nested else raw
    access = token_of(holder, "access_token")
    refresh = token_of(holder, "refresh_token")
    if not refresh and shape == "flat":
        refresh = token_of(holder, "rk")
    if not access and not refresh:
        if raw.get("OPENAI_API_KEY"):
            raise Unusable("holds an API key and no ChatGPT login; only logins can be pooled", is_final=True)
        raise Unusable("holds neither an access token nor a refresh token", is_final=True)
    id_token = token_of(holder, "id_token")
    said = identity_of(id_token, access)
    account_id = _account_id(holder, raw, complaints)
    email = raw.get("email")
    allowed, denied = _models(raw, complaints)
    credential = Credential(
        path=path,
        target=target,
        shape=shape,
        raw=raw,
        access=access,
        refresh=refresh,
        id=id_token,
        expires_at=expiry_of(access) or _time_of(raw.get("expired")),
        last_refresh=_time_of(raw.get("last_refresh")),
        identity=dataclasses.replace(
            said,
            # The file names the workspace that its owner chose at login.
            account_id=account_id or said.account_id,
            email=word_of(email) or said.email,
            # A plan changes; the token is the newer word.
            plan=said.plan or word_of(raw.get("plan_type")),
        ),
        alias=_alias(raw, complaints),
        disabled=_is_disabled(raw, complaints),
        proxy_url=_proxy_url(raw),
        priority=_priority(raw, complaints),
        weight=_weight(raw, complaints),
        models_allowed=allowed,
        models_denied=denied,
        max_concurrency=_max_concurrency(raw, complaints),
        mtime_ns=mtime_ns,
    )
    return credential, complaints


def token_of(holder: dict[str, Any], name: str) -> Secret:
    """Return the token called *name*, empty when there is none.

    Raises:
        Unusable: If what is there can be no token.
    """
    value = holder.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return NO_SECRET
    word = word_of(value)
    if word is None:
        raise Unusable(f"{name} is not a token")
    return Secret(word)


def newer(one: Credential, other: Credential, *, now: float) -> bool:
    """Tell whether *one*'s tokens were made after *other*'s; False when nothing says so."""
    mine_at, theirs_at = made_at(one, now), made_at(other, now)
    for mine, theirs in ((mine_at, theirs_at), (one.expires_at, other.expires_at)):
        if mine is not None and theirs is not None:
            return mine > theirs
    times = (mine_at, one.expires_at)
    return any(at is not None for at in times) and theirs_at is None and other.expires_at is None


def made_at(credential: Credential, now: float) -> float | None:
    """Return when its tokens were made, None when that is not known.

    A time that has not come is a mistake, and believed it would outdo every login to come.
    """
    at = credential.last_refresh
    return None if at is None or at > now + _CLOCK_SECONDS else at


def _account_id(holder: dict[str, Any], raw: dict[str, Any], complaints: list[str]) -> str | None:
    value = holder.get("account_id") or raw.get("account_id")
    if not value:
        return None
    word = word_of(value)
    if word is None:
        complaints.append("account_id is not a word; the one in the token is used")
    return word


def _alias(raw: dict[str, Any], complaints: list[str]) -> str | None:
    value = raw.get("alias")
    if value is None or value == "":
        return None
    # It is shown wherever the account is, so it may be no address and nothing that breaks a line.
    if (
        isinstance(value, str)
        and value.strip()
        and len(value) <= 64
        and value.isprintable()
        and "@" not in value
    ):
        return value.strip()
    complaints.append("alias is left out: up to 64 printable characters without '@' would do")
    return None


def _is_disabled(raw: dict[str, Any], complaints: list[str]) -> bool:
    value = raw.get("disabled")
    if value is None or isinstance(value, bool):
        return value is True
    # Whoever wrote it there meant to switch it off; one that rests by mistake does no harm.
    complaints.append("disabled is taken for true: true or false would do")
    return True


def _own(raw: dict[str, Any], name: str) -> object:
    """Return what the owner's key *name* says, in either spelling."""
    value = raw.get(name)
    return raw.get(name.replace("-", "_")) if value is None else value


def _proxy_url(raw: dict[str, Any]) -> Secret | None:
    value = _own(raw, "proxy-url")
    if value is None or value == "":
        return None
    word = word_of(value)
    if word is None or "://" not in word:
        # Left out, it would send the account's tokens another way than its owner wants. Final,
        # because its owner no longer wants the way that was there before either.
        raise Unusable("proxy-url is no address: scheme://host:port would do", is_final=True)
    return Secret(word)


def _priority(raw: dict[str, Any], complaints: list[str]) -> int:
    value = raw.get("priority")
    if value is None:
        return 0
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    complaints.append("priority is left out: a whole number would do")
    return 0


def _weight(raw: dict[str, Any], complaints: list[str]) -> float:
    value = raw.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST:
        return float(value)
    complaints.append("weight is left out: a number above 0 would do")
    return 1.0


def _max_concurrency(raw: dict[str, Any], complaints: list[str]) -> int | None:
    value = _own(raw, "max-concurrency")
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
        return value
    # Whoever wrote it there wanted fewer at a time; how many, nobody can tell.
    complaints.append("max-concurrency is taken for 1: a whole number from 0 (any number) would do")
    return 1


def _models(raw: dict[str, Any], complaints: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns of what the account serves, and of what it does not."""
    value = raw.get("models")
    if value is None:
        return (), ()
    allowed: list[str] = []
    denied: list[str] = []
    match value:
        case list():
            parts = [word for item in value if (word := _pattern(item))]
            is_whole = len(parts) == len(value)
            for word in parts:
                if word.startswith("!"):
                    denied.append(word[1:])
                else:
                    allowed.append(word)
        case dict():
            is_whole = value.keys() <= {"allow", "deny"}
            for name, patterns in (("allow", allowed), ("deny", denied)):
                items = value.get(name) or []
                if not isinstance(items, list):
                    is_whole = False
                    continue
                patterns.extend(
                    word for item in items if (word := _pattern(item)) and not word.startswith("!")
                )
                is_whole = is_whole and len(patterns) == len(items)
        case _:
            is_whole = False
    if not is_whole:
        # A part left out could be the one that keeps a model away from it.
        complaints.append(
            'models cannot be read, so none is served: a list of patterns, or {"allow": [...], "deny": [...]}'
        )
        return (), ("*",)
    return tuple(allowed), tuple(denied)


def _pattern(item: object) -> str | None:
    word = word_of(item)
    return None if word is None or not word.removeprefix("!") or len(word) > _LONGEST_PATTERN else word


def with_tokens(
    raw: dict[str, Any], shape: Shape, tokens: NewTokens, expires_at: float | None, at: float | None
) -> dict[str, Any]:
    """Return a file's contents with *tokens* in its own shape; everything else stays.

    *expires_at* is the end of the access token, *at* the moment of the exchange; None: unknown.
    """
    result = dict(raw)
    holder: dict[str, Any] = result
    if shape == "codex":
        holder = result["tokens"] = dict(raw["tokens"])
    if tokens.access:
        holder["access_token"] = tokens.access.reveal()
        # The Codex CLI knows no such key; there it is only for a token that does not say it.
        if expires_at is not None and (
            shape == "flat" or "expired" in result or not expiry_of(tokens.access)
        ):
            result["expired"] = _render_time(expires_at)
        elif expires_at is None and "expired" in result:
            # The old token's end is not the new one's; unknown is not over.
            result["expired"] = ""
    if tokens.id:
        holder["id_token"] = tokens.id.reveal()
    if tokens.refresh:
        if shape == "flat" and "rk" in holder:
            holder["rk"] = tokens.refresh.reveal()
        if shape == "codex" or "rk" not in holder or "refresh_token" in holder:
            holder["refresh_token"] = tokens.refresh.reveal()
    if at is not None:
        result["last_refresh"] = _render_time(at)
    else:
        result.pop("last_refresh", None)
    return result


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _time_of(value: object) -> float | None:
    """Read a time as files have it: RFC 3339, or seconds; None for none and for the Go zero time."""
    if not isinstance(value, str):
        return seconds_of(value)
    try:
        parsed = datetime.fromisoformat(value.strip())
    except ValueError:
        return None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    return seconds_of(parsed.timestamp())


def _render_time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
