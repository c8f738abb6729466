"""Credential files: found, read, and written back without ever losing what they hold.

The rules, each with its test:

- A file is never deleted, and never overwritten with less than it had. Only token fields and
  the two times are changed; what an answer lacks, and keys we do not know, stay.
- It is replaced in one step (a new file beside it, on disk, then renamed over), so that a
  crash at any moment leaves the old file or the new one.
- What is on disk at the moment of writing counts, not what was read an hour ago: an edit made
  meanwhile is kept, and another login's tokens are adopted instead of overwritten.
- Tokens that cannot be written there go to `<data-dir>/pending`; the next scan completes it.

Everything here blocks on a disk and belongs in a thread. Nothing here guards one account
against two exchanges at a time in this process; `exchange_lock` does so between processes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from codex_proxy.accounts.tokens import (
    NO_SECRET,
    Identity,
    NewTokens,
    Secret,
    expiry_of,
    identity_of,
    mask_name,
    seconds_of,
    word_of,
)
from codex_proxy.errors import ProxyError

# A credential file has a few kilobytes; what is larger is something else.
MAX_FILE_SIZE = 1024 * 1024

_SUFFIX = ".json"
_TEMPORARY_PREFIX = ".codex-proxy-"
_LOCK_FOLDER = ".codex-proxy-locks"
_PENDING_FOLDER = "pending"
_PENDING_TOKENS = ".tokens.json"
_PENDING_EXCHANGE = ".exchange.json"
# Somebody may edit the file between our look and our rename; each try looks again.
_SAVE_TRIES = 5

Shape = Literal["flat", "codex"]
Signature = tuple[tuple[str, int, int, int, int], ...]


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
    superseded: frozenset[str] = frozenset()
    """Digests of the refresh tokens that we know to be spent; a file that holds one is behind."""
    is_unsaved: bool = False
    """Its tokens are newer than its file; `save` with empty NewTokens is another try."""
    key: str = dataclasses.field(init=False)
    """A stable name of the account: the same in every file and after every login."""

    def __post_init__(self) -> None:
        # Once: every choice among the accounts asks each of them.
        self.key = self._key()

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
        raw = _with_tokens(self.raw, self.shape, tokens, expires_at, now)
        past = self.superseded
        if self.refresh and tokens.refresh and tokens.refresh != self.refresh:
            past |= {self.refresh.digest()}
        merged, _ = _parse(self.path, self.target, raw, self.mtime_ns)
        return dataclasses.replace(merged, alias=self.alias, superseded=past, is_unsaved=True)


@dataclass(slots=True, frozen=True)
class Problem:
    """Something wrong with a file; never says what is in it."""

    path: Path = field(repr=False)
    reason: str
    skipped: bool = True
    """The file is not used; False when only a part of it is not."""
    is_final: bool = False
    """There is no login in it, or not for us; False when nobody can tell now, as in a half-written file."""

    @property
    def name(self) -> str:
        """Return the file's name, e-mail addresses in it masked."""
        return mask_name(self.path.name)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(slots=True, frozen=True)
class Scan:
    """What a look at auth-dir found, in the order of the file names."""

    credentials: list[Credential]
    problems: list[Problem]


class Unusable(ProxyError):
    """A file is no credential; the message says why and nothing of what is in it."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        """It is not there, or it is whole and holds no login."""


class NotSaved(ProxyError):
    """The new tokens are not in the file. `credential` has them: go on with it.

    `is_pending` tells that they are safe in data-dir meanwhile.
    """

    def __init__(self, message: str, credential: Credential) -> None:
        super().__init__(message)
        self.credential = credential
        self.is_pending = False


class SaveFailed(NotSaved):
    """The file could not be written and is as it was; try again later."""


class Vanished(NotSaved):
    """The file is gone, so its owner took it away; it is not brought back."""


# -- finding and reading ------------------------------------------------------------------


def signature(auth_dir: Path) -> Signature:
    """Return what changes whenever a credential file in *auth_dir* may have changed.

    Polled, because change notices do not cross bind mounts and network file systems. The
    change time is in it for edits that keep size and modification time, and for a chmod.
    """
    try:
        names = _names(auth_dir)
    except OSError:
        return (("", -1, 0, 0, 0),)
    found: list[tuple[str, int, int, int, int]] = []
    for name in names:
        try:
            status = os.stat(auth_dir / name)
        except OSError:
            found.append((name, -1, 0, 0, 0))
        else:
            found.append((name, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(found)


def scan(auth_dir: Path, data_dir: Path | None = None) -> Scan:
    """Read every credential file of *auth_dir*; a broken one is named and the rest goes on.

    With *data_dir*, tokens that could not be saved earlier are put where they belong.
    """
    try:
        names = _names(auth_dir)
    except OSError as exc:
        return Scan([], [Problem(auth_dir, f"folder not readable: {_why(exc)}")])
    problems: list[Problem] = []
    credentials: list[Credential] = []
    pending = _Pending.load(data_dir) if data_dir is not None else None
    for name in names:
        try:
            credential, complaints = _load(auth_dir / name)
        except Unusable as exc:
            problems.append(Problem(auth_dir / name, exc.message, is_final=exc.is_final))
            continue
        problems.extend(Problem(credential.path, text, skipped=False) for text in complaints)
        if pending is not None:
            credential, complaint = pending.apply(credential)
            if complaint:
                problems.append(Problem(credential.path, complaint, skipped=False))
        credentials.append(credential)
    credentials, doubles = _without_doubles(credentials)
    problems.extend(doubles)
    problems.extend(_without_alias_doubles(credentials))
    problems.sort(key=lambda problem: problem.path.name)
    return Scan(credentials, problems)


def load(path: Path) -> Credential:
    """Read one credential file.

    Raises:
        Unusable: If it is none.
    """
    return _load(path)[0]


def _names(auth_dir: Path) -> list[str]:
    with os.scandir(auth_dir) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(_SUFFIX) and not entry.name.startswith(".")
        )


def _load(path: Path) -> tuple[Credential, list[str]]:
    target = _resolve(path)
    raw, status = _read(target)
    return _parse(path, target, raw, status.st_mtime_ns)


def _resolve(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        reason = "symlink to a file that is not there" if path.is_symlink() else "not there any more"
        raise Unusable(reason, is_final=True) from None
    except (RuntimeError, OSError) as exc:
        # Below 3.13 a loop is a RuntimeError.
        if isinstance(exc, RuntimeError) or exc.errno == errno.ELOOP:
            raise Unusable("symlink that leads to itself") from None
        raise Unusable(f"not readable: {_why(exc)}") from None


def _read(target: Path) -> tuple[dict[str, Any], os.stat_result]:
    """Return what a file holds, and its state at that moment."""
    try:
        # Non-blocking, because opening a named pipe would wait for its other end.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise Unusable(f"not readable: {_why(exc)}") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise Unusable("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a regular file")
        data = _read_up_to(descriptor, MAX_FILE_SIZE + 1)
    except OSError as exc:
        raise Unusable(f"not readable: {_why(exc)}") from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_SIZE:
        raise Unusable("larger than 1 MiB")
    return _decode(data), status


def _read_up_to(descriptor: int, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    while limit_bytes > 0 and (part := os.read(descriptor, limit_bytes)):
        parts.append(part)
        limit_bytes -= len(part)
    return b"".join(parts)


def _decode(data: bytes) -> dict[str, Any]:
    # The standard library's parser on purpose: it gives back every integer as it was, and
    # what we do not know must be written as it was read.
    if not data.strip():
        raise Unusable("empty")
    try:
        document = json.loads(
            data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except UnicodeDecodeError as exc:
        raise Unusable(f"not UTF-8 at byte {exc.start}") from None
    except json.JSONDecodeError as exc:
        raise Unusable(f"not JSON: {exc.msg} at line {exc.lineno} column {exc.colno}") from None
    except RecursionError:
        raise Unusable("not JSON: nested too deep") from None
    except ValueError:
        raise Unusable("not JSON: a number out of range") from None
    if not isinstance(document, dict):
        raise Unusable("not a JSON object")
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _finite_float(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise ValueError("too large")
    return value


def _parse(path: Path, target: Path, raw: dict[str, Any], mtime_ns: int) -> tuple[Credential, list[str]]:
    """Make a credential of a file's contents; the list names the parts that are no use."""
    complaints: list[str] = []
    nested = raw.get("tokens")
    shape: Shape = "codex" if isinstance(nested, dict) and nested else "flat"
    holder: dict[str, Any] = nested if isinstance(nested, dict) and nested else raw
    access = _token(holder, "access_token")
    refresh = _token(holder, "refresh_token")
    if not refresh and shape == "flat":
        refresh = _token(holder, "rk")
    if not access and not refresh:
        if raw.get("OPENAI_API_KEY"):
            raise Unusable("holds an API key and no ChatGPT login; only logins can be pooled", is_final=True)
        raise Unusable("holds neither an access token nor a refresh token", is_final=True)
    id_token = _token(holder, "id_token")
    said = identity_of(id_token, access)
    account_id = _account_id(holder, raw, complaints)
    email = raw.get("email")
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
        mtime_ns=mtime_ns,
    )
    return credential, complaints


def _token(holder: dict[str, Any], name: str) -> Secret:
    value = holder.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return NO_SECRET
    word = word_of(value)
    if word is None:
        raise Unusable(f"{name} is not a token")
    return Secret(word)


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


def _proxy_url(raw: dict[str, Any]) -> Secret | None:
    value = raw.get("proxy-url")
    if value is None:
        value = raw.get("proxy_url")
    if value is None or value == "":
        return None
    word = word_of(value)
    if word is None or "://" not in word:
        # Left out, it would send the account's tokens another way than its owner wants.
        raise Unusable("proxy-url is no address: scheme://host:port would do")
    return Secret(word)


def _without_doubles(credentials: list[Credential]) -> tuple[list[Credential], list[Problem]]:
    """Keep the newest file of each account.

    Two files with one refresh token are one account as well, whatever else they say: the
    token can be exchanged only once.
    """
    groups: list[list[Credential]] = []
    by_name: dict[str, list[Credential]] = {}
    for credential in credentials:
        names = [credential.key]
        if credential.refresh:
            names.append("refresh:" + credential.refresh.digest())
        members = [credential]
        for group in {id(by_name[name]): by_name[name] for name in names if name in by_name}.values():
            groups.remove(group)
            members = [*group, *members]
        groups.append(members)
        for member in members:
            by_name[member.key] = members
            if member.refresh:
                by_name["refresh:" + member.refresh.digest()] = members
    kept: list[Credential] = []
    problems: list[Problem] = []
    for group in groups:
        newest = _newest(group)
        kept.append(newest)
        problems.extend(
            Problem(
                other.path,
                f"the same {'file' if other.target == newest.target else 'account'} as "
                f"{mask_name(newest.path.name)}{'' if other.target == newest.target else ', which is newer'}; "
                "this one is left alone",
                is_final=True,
            )
            for other in group
            if other is not newest
        )
    kept.sort(key=lambda credential: credential.path.name)
    return kept, problems


def _newest(group: list[Credential]) -> Credential:
    if all(member.last_refresh is not None for member in group):
        return max(group, key=lambda member: (member.last_refresh or 0.0, member.mtime_ns))
    if all(member.expires_at is not None for member in group):
        return max(group, key=lambda member: (member.expires_at or 0.0, member.mtime_ns))
    return max(group, key=lambda member: member.mtime_ns)


def _without_alias_doubles(credentials: list[Credential]) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for credential in credentials:
        if credential.alias is None:
            continue
        if credential.alias in seen:
            problems.append(Problem(credential.path, "alias is left out: another file has it", skipped=False))
            credential.alias = None
        else:
            seen.add(credential.alias)
    return problems


# -- writing back -------------------------------------------------------------------------


def save(
    credential: Credential, tokens: NewTokens, *, now: float, data_dir: Path | None = None
) -> Credential:
    """Put *tokens*, for which *credential*'s refresh token was exchanged, into its file.

    Returns what the file holds then. When somebody logged in again meanwhile, that is the
    other login, perhaps of another account: it is kept and adopted, and our tokens go to
    *data_dir*. With empty tokens it is another try for a credential that `is_unsaved`.

    Raises:
        SaveFailed: If the file could not be written; it is as it was.
        Vanished: If it is gone.
    """
    merged = credential.merged(tokens, now=now)
    try:
        # All of them after an earlier save failed; else only what the answer brought, so that
        # an edit of the others is kept.
        saved = _save(merged, merged.all_tokens() if credential.is_unsaved else tokens, now)
    except NotSaved as exc:
        if data_dir is not None:
            exc.is_pending = _keep(data_dir, merged, now)
        raise
    if data_dir is not None:
        if saved.refresh == merged.refresh:
            _Pending.load(data_dir).forget(merged)
        else:
            _keep(data_dir, merged, now)
    return saved


def _save(merged: Credential, tokens: NewTokens, now: float) -> Credential:
    ours = {merged.refresh.digest(), *merged.superseded}
    for _ in range(_SAVE_TRIES):
        try:
            target = merged.path.resolve(strict=True)
        except FileNotFoundError:
            raise Vanished("the credential file is gone", merged) from None
        except (OSError, RuntimeError):
            raise SaveFailed("the credential file cannot be reached", merged) from None
        try:
            raw, seen = _read(target)
            found, _ = _parse(merged.path, target, raw, seen.st_mtime_ns)
        except Unusable as exc:
            # Half written by somebody, or broken by an edit: there may be something in it.
            raise SaveFailed(f"the credential file is not usable now: {exc.message}", merged) from None
        if found.refresh.digest() not in ours:
            return found
        raw = _with_tokens(raw, found.shape, tokens, merged.expires_at, merged.last_refresh or now)
        try:
            if not write_atomic(target, _encode(raw), expected=seen):
                continue
            mtime_ns = os.stat(target).st_mtime_ns
        except OSError as exc:
            raise SaveFailed(f"the credential file was not written: {_why(exc)}", merged) from None
        saved, _ = _parse(merged.path, target, raw, mtime_ns)
        return dataclasses.replace(saved, superseded=merged.superseded)
    raise SaveFailed("the credential file is being changed all the time", merged)


def write_atomic(target: Path, data: bytes, *, expected: os.stat_result | None = None) -> bool:
    """Replace *target* by *data* in one step, readable by its owner only.

    With *expected*, only when the file is still in that state; False when it is not.

    Raises:
        OSError: If it could not be done; *target* is as it was.
    """
    # Beside the target, because a rename is one step only within a file system; hidden, so
    # that no scan takes it for a credential; exclusive, so that nobody's file is followed.
    temporary = target.parent / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            os.fchmod(descriptor, 0o600)
            if expected is not None and (expected.st_uid, expected.st_gid) != (os.geteuid(), os.getegid()):
                # Run as root in a container over a user's folder: the file stays the user's.
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, expected.st_uid, expected.st_gid)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if expected is not None and not _is_unchanged(target, expected):
            os.unlink(temporary)
            return False
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new name is there for everyone; only whether it outlives a power cut is open, and
    # some file systems cannot be asked.
    with contextlib.suppress(OSError):
        _sync_folder(target.parent)
    return True


def _is_unchanged(target: Path, expected: os.stat_result) -> bool:
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return False
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
        expected.st_ino,
        expected.st_size,
        expected.st_mtime_ns,
        expected.st_ctime_ns,
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _with_tokens(
    raw: dict[str, Any], shape: Shape, tokens: NewTokens, expires_at: float | None, at: float
) -> dict[str, Any]:
    """Return a file's contents with *tokens* in its own shape; everything else stays.

    *expires_at* is the end of the access token, *at* the moment of the exchange.
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
    result["last_refresh"] = _render_time(at)
    return result


def _encode(raw: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which only an escape can carry.
        return (json.dumps(raw, indent=2) + "\n").encode()


# -- tokens that could not be saved, exchanges whose end is not known ----------------------


def note_exchange(data_dir: Path, credential: Credential, *, now: float) -> bool:
    """Write down that *credential*'s refresh token is about to be spent; True when that is on disk.

    When the daemon dies before the answer is saved, the next one finds `interrupted` set and
    can say why the token is refused. Only a digest is written.
    """
    record = {"refresh_digest": credential.refresh.digest(), "at": now}
    return _write_record(data_dir, credential.key + _PENDING_EXCHANGE, record)


def clear_exchange(data_dir: Path, credential: Credential) -> None:
    """Take back `note_exchange`: its end is known and, if it brought tokens, they are saved."""
    with contextlib.suppress(OSError):
        os.unlink(data_dir / _PENDING_FOLDER / (credential.key + _PENDING_EXCHANGE))


def _keep(data_dir: Path, merged: Credential, now: float) -> bool:
    if not merged.superseded:
        # The exchange brought no new refresh token: the file's own goes on being good, and
        # an access token alone can be had again.
        return False
    record = {
        "replaces": sorted(merged.superseded),
        "access_token": merged.access.reveal(),
        "refresh_token": merged.refresh.reveal(),
        "id_token": merged.id.reveal(),
        "expires_at": merged.expires_at,
        "saved_at": merged.last_refresh or now,
    }
    name = merged.key + _PENDING_TOKENS
    if not _write_record(data_dir, name, record):
        return False
    _Pending.load(data_dir).forget(merged, but=name)
    return True


def _write_record(data_dir: Path, name: str, record: dict[str, Any]) -> bool:
    folder = data_dir / _PENDING_FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return write_atomic(folder / name, _encode(record))
    except OSError:
        return False


@dataclass(slots=True, frozen=True)
class _Record:
    """Tokens that wait for their file."""

    path: Path
    replaces: frozenset[str]
    tokens: NewTokens
    saved_at: float


@dataclass(slots=True)
class _Pending:
    """What data-dir keeps for credential files, found by the refresh token a file still holds."""

    by_old: dict[str, _Record] = field(default_factory=dict)
    by_new: dict[str, _Record] = field(default_factory=dict)
    exchanges: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, data_dir: Path) -> "_Pending":
        """Read all records; one that is broken says nothing and stays where it is."""
        pending = cls()
        try:
            names = _names(data_dir / _PENDING_FOLDER)
        except OSError:
            return pending
        records: list[_Record] = []
        for name in names:
            path = data_dir / _PENDING_FOLDER / name
            try:
                raw, _ = _read(path)
                if name.endswith(_PENDING_EXCHANGE):
                    at, digest = seconds_of(raw.get("at")), word_of(raw.get("refresh_digest"))
                    if at is not None and digest is not None:
                        pending.exchanges[digest] = at
                elif name.endswith(_PENDING_TOKENS):
                    records.append(_record(path, raw))
            except Unusable:
                continue
        for record in sorted(records, key=lambda record: record.saved_at):
            pending.by_old.update(dict.fromkeys(record.replaces, record))
            if record.tokens.refresh:
                pending.by_new[record.tokens.refresh.digest()] = record
        return pending

    def apply(self, credential: Credential) -> tuple[Credential, str]:
        """Give a file the tokens that wait for it; the text says what is still wrong."""
        digest = credential.refresh.digest()
        record = self.by_old.get(digest)
        if record is None:
            credential.interrupted = self.exchanges.get(digest)
            return credential, ""
        waiting = credential.merged(record.tokens, now=record.saved_at)
        complaint = ""
        with exchange_lock(credential) as is_free:
            if not is_free:
                return waiting, ""
            try:
                saved = save(credential, record.tokens, now=record.saved_at)
            except NotSaved as exc:
                saved = exc.credential
                complaint = f"its newer tokens are kept in data-dir: {exc.message}"
            else:
                # Empties nothing when another login was adopted: the record is not of its past.
                self.forget(saved)
        saved.interrupted = self.exchanges.get(saved.refresh.digest())
        return saved, complaint

    def forget(self, credential: Credential, *, but: str = "") -> None:
        """Remove the records whose tokens *credential* has, or has already replaced."""
        past = {credential.refresh.digest(), *credential.superseded}
        for digest in past & self.by_new.keys():
            path = self.by_new[digest].path
            if path.name != but:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _record(path: Path, raw: dict[str, Any]) -> _Record:
    replaces, saved_at = raw.get("replaces"), seconds_of(raw.get("saved_at"))
    access, refresh, id_token = (_token(raw, name) for name in ("access_token", "refresh_token", "id_token"))
    if not isinstance(replaces, list) or saved_at is None or not (access or refresh):
        raise Unusable("not a record of tokens")
    expires_at = seconds_of(raw.get("expires_at"))
    return _Record(
        path,
        frozenset(word for item in replaces if (word := word_of(item))),
        NewTokens(
            access or None,
            refresh or None,
            id_token or None,
            None if expires_at is None else expires_at - saved_at,
        ),
        saved_at,
    )


@contextlib.contextmanager
def exchange_lock(credential: Credential) -> Iterator[bool]:
    """Hold the right to exchange *credential*'s refresh token; False when another process has it.

    Beside the credential file, because that is what two daemons share; not on the file itself,
    because that is replaced. Where no lock can be made (a read-only folder), nobody is kept out.
    """
    descriptor = _open_lock(credential)
    if descriptor is None:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True
    finally:
        os.close(descriptor)


def _open_lock(credential: Credential) -> int | None:
    folder = credential.target.parent / _LOCK_FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Never removed: whoever waits for a lock on a removed file holds nothing.
        return os.open(
            folder / f"{credential.key[:16]}.lock",
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
    except OSError:
        return None


# -- small helpers ------------------------------------------------------------------------


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


def _why(exc: OSError) -> str:
    """Name an operating system's error without the path, which may be an e-mail address."""
    return os.strerror(exc.errno).lower() if exc.errno else "unknown error"
