"""Credential files: found, read, and written back without ever losing what they hold.

The rules, each with its test:

- A file is never deleted, and never overwritten with less than it had. Only token fields and
  the two times are changed; what an answer lacks, and keys we do not know, stay.
- It is replaced in one step (a new file beside it, on disk, then renamed over), so that a
  crash at any moment leaves the old file or the new one.
- What is on disk at the moment of writing counts, not what was read an hour ago: an edit made
  meanwhile is kept, and another login's tokens are adopted instead of overwritten.
- New tokens go to `<data-dir>/pending` first and stay there until their file has them; the
  next scan completes what was interrupted.

Everything here blocks on a disk and belongs in a thread. Nothing here guards one account
against two exchanges at a time in this process; `exchange_lock` does so between processes.
"""

import contextlib
import copy
import dataclasses
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from codex_proxy.accounts import files, pending
from codex_proxy.accounts.credential import Credential as Credential
from codex_proxy.accounts.credential import made_at, newer, parse, with_tokens
from codex_proxy.accounts.files import Unusable as Unusable
from codex_proxy.accounts.pending import Pending
from codex_proxy.accounts.pending import clear_exchange as clear_exchange
from codex_proxy.accounts.pending import note_exchange as note_exchange
from codex_proxy.accounts.pending import note_refusal as note_refusal
from codex_proxy.accounts.tokens import NewTokens, mask_name
from codex_proxy.errors import ProxyError

# Somebody may edit the file between our look and our rename; each try looks again.
_SAVE_TRIES = 5

# Times of files are coarse: one written twice within a tick looks the same after both. Until
# it has rested for this long it is read again, whatever its times say.
_SETTLED_NS = 2_000_000_000

Mark = tuple[int, int, int, int, int, str]
"""What changes whenever a file may have changed: its times, its size, its place."""


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


@dataclass(slots=True)
class _Entry:
    """One file as it was when it was read."""

    mark: Mark
    is_settled: bool
    digest: bytes
    credential: Credential | None
    complaints: list[str]
    problem: Unusable | None


class Folder:
    """auth-dir as it was at the last look: only what changed since is read again.

    Polled, because change notices do not cross bind mounts, symlinks and network file systems.
    A file that did not change gives the very same `Credential` again.
    """

    def __init__(self, auth_dir: Path, data_dir: Path | None = None) -> None:
        self._auth_dir = auth_dir
        self._data_dir = data_dir
        self._entries: dict[str, _Entry] = {}
        self._trouble: str | None = None
        """Why the folder cannot be read, '' when it can; None before the first look."""
        self._lock = threading.Lock()

    def look(self, *, anyway: bool = False) -> Scan | None:
        """Return what the folder holds now; None when that is what the last look found, unless *anyway*.

        A broken file is named and the rest goes on. With a data-dir, tokens that could not be
        saved earlier are put where they belong.
        """
        with self._lock:
            changed = self._read()
            return self._scan() if changed or anyway else None

    def _read(self) -> bool:
        """Bring the entries up to date; True when one is another."""
        before, trouble = self._entries, self._trouble
        try:
            # The marks first: a change while we read is then seen by the next look.
            marks = _marks(self._auth_dir)
        except OSError as exc:
            is_file = isinstance(exc, NotADirectoryError)
            self._trouble = "auth-dir is no folder" if is_file else f"folder not readable: {files.why(exc)}"
            return self._trouble != trouble
        self._trouble = ""
        self._entries = {}
        changed = trouble != "" or before.keys() != marks.keys()
        for name, mark in marks.items():
            known = before.get(name)
            if known is None or not known.is_settled or known.mark != mark:
                entry = _entry(self._auth_dir / name, mark, known)
                changed = changed or entry is not known
                known = entry
            self._entries[name] = known
        return changed

    def _scan(self) -> Scan:
        if self._trouble:
            return Scan([], [Problem(self._auth_dir, self._trouble)])
        problems: list[Problem] = []
        credentials: list[Credential] = []
        waiting = Pending.load(self._data_dir) if self._data_dir is not None else None
        for name, entry in self._entries.items():
            path = self._auth_dir / name
            if entry.problem is not None:
                problems.append(Problem(path, entry.problem.message, is_final=entry.problem.is_final))
            problems.extend(Problem(path, text, skipped=False) for text in entry.complaints)
            credential = entry.credential
            if credential is None:
                continue
            if waiting is not None:
                credential, complaint = _completed(credential, waiting)
                if complaint:
                    problems.append(Problem(path, complaint, skipped=False))
            credentials.append(credential)
        credentials, doubles = _without_doubles(credentials)
        credentials, aliases = _without_alias_doubles(credentials)
        problems += doubles + aliases
        problems.sort(key=lambda problem: problem.path.name)
        return Scan(credentials, problems)


def scan(auth_dir: Path, data_dir: Path | None = None) -> Scan:
    """Read every credential file of *auth_dir*, as `Folder.look` does the first time."""
    found = Folder(auth_dir, data_dir).look(anyway=True)
    assert found is not None
    return found


def load(path: Path) -> Credential:
    """Read one credential file.

    Raises:
        Unusable: If it is none.
    """
    target = files.resolve(path)
    raw, status = files.read_json(target)
    return parse(path, target, raw, status.st_mtime_ns)[0]


def _marks(auth_dir: Path) -> dict[str, Mark]:
    found: dict[str, Mark] = {}
    for name, is_link in files.listing(auth_dir):
        path = os.path.join(auth_dir, name)
        try:
            status = os.stat(path)
            # The change time is in it for edits that keep size and modification time.
            found[name] = (
                status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev,
                os.path.realpath(path) if is_link else "",
            )  # fmt: skip
        except OSError:
            found[name] = (-1, 0, 0, 0, 0, "")
    return found


def _entry(path: Path, mark: Mark, known: _Entry | None) -> _Entry:
    """Read a file; gives *known* again when it is as it was then."""
    is_settled = mark[1] + _SETTLED_NS < time.time_ns()
    digest = b""
    try:
        target = files.resolve(path)
        data, status = files.read(target)
        digest = hashlib.sha256(data).digest()
        if known is not None and (known.mark, known.digest) == (mark, digest):
            known.is_settled = is_settled
            return known
        credential, complaints = parse(path, target, files.decode(data), status.st_mtime_ns)
    except Unusable as exc:
        if known is not None and (known.mark, known.digest) == (mark, digest) and known.credential is None:
            known.is_settled = is_settled
            return known
        return _Entry(mark, is_settled, digest, None, [], exc)
    return _Entry(mark, is_settled, digest, credential, complaints, None)


def _completed(credential: Credential, waiting: Pending) -> tuple[Credential, str]:
    """Give a file the tokens that wait for it; the text says what is still wrong."""
    digest = credential.refresh.digest()
    record = waiting.by_old.get(digest)
    if record is None:
        if digest in waiting.by_new:
            # Killed after the file was written: nothing waits any more.
            waiting.forget(credential)
        return _with_interruption(credential, waiting), ""
    complaint = ""
    with exchange_lock(credential) as is_free:
        if not is_free:
            return credential.merged(record.tokens, now=record.saved_at), ""
        try:
            saved = save(credential, record.tokens, now=record.saved_at)
        except NotSaved as exc:
            saved = exc.credential
            complaint = f"its newer tokens are kept in data-dir: {exc.message}"
        else:
            # Empties nothing when another login was adopted: the record is not of its past.
            waiting.forget(saved)
    return _with_interruption(saved, waiting), complaint


def _with_interruption(credential: Credential, waiting: Pending) -> Credential:
    if credential.refresh.digest() not in waiting.exchanges:
        return credential
    with exchange_lock(credential) as is_free:
        # Held, it is under way, here or in another process; and it may have ended since the look.
        exchange = waiting.look_again(credential) if is_free else None
    if exchange is None:
        return credential
    return dataclasses.replace(credential, interrupted=exchange.at, refused=exchange.refused)


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
    # A time after the one at which it was written down is none.
    made = {id(member): made_at(member, member.mtime_ns / 1e9) for member in group}
    if None not in made.values():
        return max(group, key=lambda member: (made[id(member)] or 0.0, member.mtime_ns))
    if all(member.expires_at is not None for member in group):
        return max(group, key=lambda member: (member.expires_at or 0.0, member.mtime_ns))
    return max(group, key=lambda member: member.mtime_ns)


def _without_alias_doubles(credentials: list[Credential]) -> tuple[list[Credential], list[Problem]]:
    problems: list[Problem] = []
    kept: list[Credential] = []
    seen: set[str] = set()
    # What an account is called without an alias is its own, whichever file is read first.
    by_default = {credential.default_alias: credential for credential in credentials}
    for credential in credentials:
        alias = credential.alias
        if alias is not None and alias in seen:
            complaint = "alias is left out: another file has it"
        elif alias is not None and by_default.get(alias, credential) is not credential:
            complaint = f"alias is left out: {alias} is the name of another account"
        else:
            complaint = ""
        if complaint:
            problems.append(Problem(credential.path, complaint, skipped=False))
            credential = dataclasses.replace(credential, alias=None)
        elif alias is not None:
            seen.add(alias)
        kept.append(credential)
    return kept, problems


# -- writing back -------------------------------------------------------------------------


def save(
    credential: Credential, tokens: NewTokens, *, now: float, data_dir: Path | None = None
) -> Credential:
    """Put *tokens*, for which *credential*'s refresh token was exchanged, into its file.

    Returns what the file holds then. When somebody logged in again meanwhile, that is the
    other login, perhaps of another account: it is kept and adopted, and our tokens stay in
    *data_dir*. With empty tokens it is another try for a credential that `is_unsaved`.

    Raises:
        SaveFailed: If the file could not be written; it is as it was.
        Vanished: If it is gone.
    """
    merged = credential.merged(tokens, now=now)
    # First of all: from here on a crash loses nothing, wherever it comes.
    is_pending = data_dir is not None and pending.keep(data_dir, merged, now)
    try:
        # All of them after an earlier save failed; else only what the answer brought, so that
        # an edit of the others is kept.
        saved = _save(merged, merged.all_tokens() if credential.is_unsaved else tokens, now)
    except NotSaved as exc:
        exc.is_pending = is_pending
        raise
    if data_dir is not None and saved.refresh == merged.refresh:
        Pending.load(data_dir).forget(merged)
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
            raw, seen = files.read_json(target)
            found, _ = parse(merged.path, target, raw, seen.st_mtime_ns)
        except Unusable as exc:
            # Half written by somebody, or broken by an edit: there may be something in it.
            raise SaveFailed(f"the credential file is not usable now: {exc.message}", merged) from None
        if found.refresh.digest() not in ours:
            return found
        raw = with_tokens(raw, found.shape, tokens, merged.expires_at, merged.last_refresh or now)
        try:
            if not files.write_atomic(target, files.encode(raw), expected=seen):
                continue
            mtime_ns = os.stat(target).st_mtime_ns
        except OSError as exc:
            raise SaveFailed(f"the credential file was not written: {files.why(exc)}", merged) from None
        saved, _ = parse(merged.path, target, raw, mtime_ns)
        return dataclasses.replace(saved, superseded=merged.superseded)
    raise SaveFailed("the credential file is being changed all the time", merged)


# -- what its owner wants of a file -------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Added:
    """What became of a login that was brought to auth-dir."""

    credential: Credential
    """What the file holds now."""
    outcome: Literal["added", "updated", "kept"]
    """`kept`: the folder has this account already, with tokens that are as new or newer."""


def edit(
    path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], *, mode: int | None = None
) -> Credential:
    """Change a credential file by *change*, which is given what it holds and returns what it should.

    What is on disk at that moment is changed, mode (unless *mode* says another) and owner stay,
    and *change* is called again when somebody else was faster. The tokens are the daemon's
    business; see `save`.

    Raises:
        Unusable: If the file holds no login, or would hold none then; it is as it was.
        SaveFailed: If it could not be written; it is as it was.
    """
    for _ in range(_SAVE_TRIES):
        target = files.resolve(path)
        raw, seen = files.read_json(target)
        changed = change(copy.deepcopy(raw))
        found, _ = parse(path, target, changed, seen.st_mtime_ns)
        if changed == raw:
            return found
        try:
            kept = stat.S_IMODE(seen.st_mode) if mode is None else mode
            if files.write_atomic(target, files.encode(changed), expected=seen, mode=kept):
                return dataclasses.replace(found, mtime_ns=os.stat(target).st_mtime_ns)
        except OSError as exc:
            raise SaveFailed(f"the credential file was not written: {files.why(exc)}", found) from None
    raise SaveFailed("the credential file is being changed all the time", load(path))


def add(
    auth_dir: Path,
    raw: dict[str, Any],
    *,
    name: str | None = None,
    is_new: bool = False,
    now: float | None = None,
) -> Added:
    """Bring one login to *auth_dir*; as `Adding.add`."""
    with Adding(auth_dir, now=now) as adding:
        return adding.add(raw, name=name, is_new=is_new)


class Adding:
    """Logins on their way into auth-dir: many after one look at it, and nobody else's meanwhile."""

    def __init__(self, auth_dir: Path, *, now: float | None = None) -> None:
        self._auth_dir = auth_dir
        self._now = time.time() if now is None else now
        self._known: dict[str, Credential] | None = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def add(self, raw: dict[str, Any], *, name: str | None = None, is_new: bool = False) -> Added:
        """Bring a login into the file of its account, or into a new one called *name*.

        An account is never in two files for it. A file that is there keeps all it has but its
        tokens, which are replaced by newer ones only, or by those of a login made just now.

        Raises:
            Unusable: If *raw* holds no login.
            SaveFailed: If it could not be written.
        """
        # A place where no file can be, so that a login without a name is nobody else's.
        nowhere = self._auth_dir / ".new"
        new, _ = parse(nowhere, nowhere, raw, 0)
        index = self._index(new)
        seen = next((index[alias] for alias in _aliases(new) if alias in index), None)
        if seen is None:
            stem = _stem(name, new)
            if new.alias is None and stem == _token_name(new):
                # It says not whose it is, and would be called by its place, which nobody knows before.
                raw = {**raw, "alias": stem}
            try:
                path = files.write_new(self._auth_dir, stem, files.encode(raw))
            except OSError as exc:
                raise SaveFailed(f"the credential file was not written: {files.why(exc)}", new) from None
            added = Added(load(path), "added")
        else:
            # Somebody may have exchanged its token since the look.
            known = load(seen.path)
            if not is_new and not newer(new, known, now=self._now):
                added = Added(known, "kept")
            else:
                # New tokens are their owner's alone, whatever the old ones were.
                edited = edit(known.path, lambda found: _relogged(found, known, new), mode=0o600)
                added = Added(edited, "updated")
        index.update(dict.fromkeys(_aliases(added.credential), added.credential))
        return added

    def _index(self, new: Credential) -> dict[str, Credential]:
        """Return every account that is there, by each of its names; the first time, look."""
        if self._known is None:
            try:
                self._auth_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as exc:
                is_file = isinstance(exc, FileExistsError)
                reason = (
                    "auth-dir is no folder" if is_file else f"the folder cannot be made: {files.why(exc)}"
                )
                raise SaveFailed(reason, new) from None
            self._held.enter_context(files.lock(self._auth_dir, "add", wait=True))
            found = scan(self._auth_dir).credentials
            self._known = {alias: one for one in found for alias in _aliases(one)}
        return self._known


def take_out(credential: Credential, folder: Path) -> Path:
    """Move a credential file out of auth-dir into *folder*; return where it is now.

    At every moment it is in one of the two places, also across file systems. A symlink is
    moved, not the file that it leads to.

    Raises:
        SaveFailed: If it could not be moved; it is where it was.
        Vanished: If it is gone.
    """
    _make_folder(credential, folder)
    try:
        return files.move(credential.path, folder)
    except FileNotFoundError:
        raise Vanished("the credential file is gone", credential) from None
    except OSError as exc:
        raise SaveFailed(f"the credential file was not moved: {files.why(exc)}", credential) from None


def check_take_out(credential: Credential, folder: Path) -> None:
    """Find out whether `take_out` would work, before something is done that cannot be undone.

    Raises:
        SaveFailed: If it would not.
        Vanished: If the file is gone.
    """
    _make_folder(credential, folder)
    for place, what in (
        (folder, "the folder of removed files (below data-dir)"),
        (credential.path.parent, "auth-dir"),
    ):
        try:
            files.probe(place)
        except OSError as exc:
            raise SaveFailed(f"{what} cannot be written to: {files.why(exc)}", credential) from None
    if not os.path.lexists(credential.path):
        raise Vanished("the credential file is gone", credential)


def _make_folder(credential: Credential, folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise SaveFailed(
            f"the folder {folder} (below data-dir) cannot be made: {files.why(exc)}",
            credential,
        ) from None


def _aliases(credential: Credential) -> Iterator[str]:
    """Yield what makes two files one account: whose they are, or a token that both hold."""
    yield credential.key
    if credential.refresh:
        yield "refresh:" + credential.refresh.digest()
    if credential.access:
        yield "access:" + credential.access.digest()


def _relogged(found: dict[str, Any], known: Credential, new: Credential) -> dict[str, Any]:
    """Return a file's contents with another login's tokens; all else stays."""
    current, _ = parse(known.path, known.target, found, 0)
    if current.key != known.key:
        raise Unusable("it holds another account by now")
    if current.shape == new.shape == "codex":
        # What the Codex CLI notes beside its tokens is of their login.
        found["tokens"] = {**found["tokens"], **new.raw["tokens"]}
    return with_tokens(found, current.shape, new.all_tokens(), new.expires_at, new.last_refresh)


def _stem(name: str | None, new: Credential) -> str:
    """Return a file's name without its end; by itself it gives no e-mail address away."""
    stem = _UNSAFE.sub("-", re.sub(r"\.json$", "", name or "", flags=re.IGNORECASE)).strip("-.")[:100]
    if stem:
        return stem
    return _token_name(new) or new.default_alias


def _token_name(new: Credential) -> str | None:
    """Return a name made of its token for a login that does not say whose it is; None for others."""
    if new.identity.user_id is not None or new.identity.account_id is not None:
        return None
    return f"acct-{(new.refresh or new.access).digest()[:8]}"


_UNSAFE = re.compile(r"[^A-Za-z0-9._@+-]+")


# -- between processes --------------------------------------------------------------------


def exchange_lock(credential: Credential) -> AbstractContextManager[bool]:
    """Hold the right to exchange *credential*'s refresh token; False when another process has it.

    Beside the credential file, because that is what two daemons share; not on the file itself,
    because that is replaced. Where no lock can be made (a read-only folder), nobody is kept out.
    """
    return files.lock(credential.target.parent, credential.key[:16])
