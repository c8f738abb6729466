"""What outlives the process: limits, totals and bindings in data-dir, never a token.

Two files, both for their owner only:

- `state.json`: what is known of each account, and which conversation lives where. Replaced in
  one step, so that a crash leaves the old one or the new one; of several processes the last
  writer wins, and what is lost by that is learned again.
- `history-owners`: which account wrote which compacted history, one line each, only ever
  appended to. People resume a conversation after weeks, and no other account can read it.

What is said of a token counts only while the account's file still holds that token: a new login
is not blamed for the old one. What the pool has to offer is `Remembered`.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from codex_proxy.accounts import files
from codex_proxy.accounts.account import BACKOFF, REFUSAL_SECONDS, REPROBE, Account, Cause
from codex_proxy.accounts.affinity import Affinity, Owner
from codex_proxy.accounts.dues import FEW
from codex_proxy.accounts.quota import MAX_RESET_SECONDS, Quota
from codex_proxy.accounts.tokens import seconds_of
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.protocol.wire import BadJson, JsonObject, dumps, loads
from codex_proxy.tasks import Background, Job

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
OWNERS_FILE = "history-owners"

VERSION = 1
"""Of `state.json`; a file of another version is set aside."""

# What may be lost when the process is killed: numbers that the next answer tells again.
SAVE_SECONDS = 10.0

MAX_OWNERS = 500_000
"""How many compacted histories are remembered, the newest; about 50 MB when so many there are."""

# Ten thousand accounts have two megabytes; what is so large is not ours.
_MAX_STATE_SIZE = 64 * 1024 * 1024

# Nothing that an account rests for is longer; a later time comes from a clock that was wrong.
_MAX_HOLD_SECONDS = MAX_RESET_SECONDS

# Accounts whose file is gone for now. A file that comes back brings its limits back.
_MAX_ABSENT = 10_000

# Models and limits of one account, and those learned by the pool.
_MAX_NAMES = 256
_MAX_FAMILIES = 4_096
_MAX_TEXT = 200

# No cause but a limit rests an account for longer, unless the backend itself named a time.
_MIN_CAP_SECONDS = 3_600.0

# Between two of so many accounts, or rows of JSON, other work gets its turn: some milliseconds.
_SLICE = 50
_ROWS = 500


class Remembered(Protocol):
    """What of a pool is kept, and how it is put back."""

    affinity: Affinity
    learned_families: dict[str, str]

    def __iter__(self) -> Iterator[Account]: ...

    def __len__(self) -> int: ...


class Memory:
    """Save what the pool knows, and give it back after a restart.

    Args:
        pool: What is remembered.
        owners: Written with it, when there are any to write.
    """

    def __init__(
        self,
        pool: Remembered,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        owners: "Owners | None" = None,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._background = background
        self._path = live.current.data_dir / STATE_FILE
        self._owners = owners
        self._saving = asyncio.Lock()
        self._saved = b""
        """Digest of what `state.json` holds."""
        self._known: dict[str, _Known] = {}
        """What was last known of each account, also of those whose file is gone."""
        self._met: dict[str, Account] = {}
        """The accounts that have got back what was known of them."""
        self._touched: list[Account] = []
        """Those that have changed since they were looked at (`Account.touch`)."""
        self._marks: dict[str, _Mark] = {}
        """What each had counted and heard when it was looked at."""
        self._stamp: tuple[object, ...] = ()
        """What was saved last, but for the accounts."""
        self.may_write = True
        """Whether `state.json` is ours; another daemon on the same data-dir has its own view of all this."""
        self._is_failing = False
        self._is_loaded = False
        self._flushing: asyncio.Task[None] | None = None
        self.since = clock.now()
        """Since when totals are counted."""
        if owners is not None:
            owners.on_add = self._flush_soon

    def jobs(self) -> list[Job]:
        """Return what runs by itself."""
        return [Job("memory", lambda: SAVE_SECONDS, self.save)]

    # -- reading --------------------------------------------------------------------------

    async def load(self) -> None:
        """Read what an earlier process knew, and give it to the accounts that are there.

        Those whose files come later get theirs through `recall`. Nothing that is wrong with
        the file stops the start.
        """
        if self._owners is not None:
            await asyncio.to_thread(self._owners.load)
        document = await asyncio.to_thread(_read_state, self._path)
        self._is_loaded = True
        if document is None:
            return
        now = self._clock.now()
        self.since = _past(document.get("since"), now) or self.since
        accounts = document.get("accounts")
        if isinstance(accounts, dict):
            for key, said in accounts.items():
                if isinstance(said, dict) and len(self._known) < _MAX_ABSENT:
                    self._known[key] = (seconds_of(said.pop("at", None)), dumps(said))
        recalled = sum(self.recall(account) for account in self._pool)
        families = document.get("families")
        for name, family in families.items() if isinstance(families, dict) else ():
            if isinstance(family, str) and len(self._pool.learned_families) < _MAX_FAMILIES:
                self._pool.learned_families.setdefault(name, family)
        conversations = document.get("conversations")
        if isinstance(conversations, list):
            self._pool.affinity.restore(conversations, now)
        logger.info("memory restored accounts=%d of=%d", recalled, len(self._known))

    def recall(self, account: Account) -> bool:
        """Give an account back what was known of it; False when nothing was.

        To be called with every account that was just made: one whose file comes later, or comes
        back, has its limits still.
        """
        known = self._known.get(account.key)
        if self._met.get(account.key) is account or not self._is_loaded:
            return False
        self._met[account.key] = account
        if known is None:
            return False
        restore_account(account, loads(known[1]), self._clock.now())
        return True

    # -- writing --------------------------------------------------------------------------

    async def save(self) -> None:
        """Write down what has changed since the last time; what was never read is not written over."""
        async with self._saving:
            if self._is_loaded and self.may_write:
                await self._save_state()
        if self._owners is not None:
            await self._owners.flush()

    async def catch_up(self) -> None:
        """Learn which histories another process has had compacted; by itself that takes until the next save."""
        if self._owners is not None:
            await self._owners.flush()

    async def _save_state(self) -> None:
        now = self._clock.now()
        is_news = await self._look(now)
        is_news |= self._drop_absent(now)
        affinity, families = self._pool.affinity, self._pool.learned_families
        stamp = (affinity.changes, len(families), self.since)
        if not is_news and stamp == self._stamp:
            return
        self._stamp = ()
        # In slices, and not in a thread: while one renders, nothing else runs either way.
        parts = [b'"since":', dumps(self.since), b',"accounts":{']
        parts += await _rendered(iter(list(self._known.items())), _rows)
        parts += [b'},"families":', dumps(dict(families)), b',"conversations":[']
        parts += await _rendered(affinity.dump(), lambda rows: dumps(rows)[1:-1])
        parts.append(b"]}")
        data, digest = await asyncio.to_thread(_joined, parts)
        if digest == self._saved:
            self._stamp = stamp
            return
        # The frame is put around the same bytes: rendering twice would take twice as long.
        head = b'{"version":%d,"saved_at":%d,' % (VERSION, int(now))
        try:
            await asyncio.to_thread(files.write_atomic, self._path, head + data)
        except OSError as exc:
            if not self._is_failing:
                logger.warning("memory not saved file=%s reason=%s", self._path.name, _why(exc))
            self._is_failing = True
            return
        if self._is_failing:
            logger.info("memory saved again file=%s", self._path.name)
        self._is_failing = False
        self._saved = digest
        self._stamp = stamp

    async def _look(self, now: float) -> bool:
        """Look at the accounts of which something has changed; True when there are any."""
        touched = {account.key for account in self._touched}
        self._touched.clear()
        is_few, is_news, looked = len(self._pool) <= FEW, False, 0
        for account in self._pool:
            self.recall(account)
            key, mark = account.key, _mark(account)
            if not is_few and key not in touched and self._marks.get(key) == mark:
                continue
            self._marks[key] = mark
            if not any(one is self._touched for one in account.watchers):
                account.watchers.append(self._touched)
            known, said = self._known.get(key), dumps(dump_account(account))
            if known is None or known[1] != said:
                self._known[key] = (now, said)
                is_news = True
            looked += 1
            if looked % _SLICE == 0:
                await asyncio.sleep(0)
        return is_news

    def _drop_absent(self, now: float) -> bool:
        """Forget accounts that have been gone for longer than anything is true of them; True when there are any."""
        present = {account.key for account in self._pool}
        self._met = {key: account for key, account in self._met.items() if key in present}
        self._marks = {key: mark for key, mark in self._marks.items() if key in present}
        absent = [key for key in self._known if key not in present]
        count = len(self._known)
        for number, key in enumerate(absent):
            if (
                len(absent) - number > _MAX_ABSENT
                or _past(self._known[key][0], now, _MAX_HOLD_SECONDS) is None
            ):
                del self._known[key]
        return len(self._known) != count

    def totals(self) -> dict[str, list[int]]:
        """Return what each account had counted when it was written down last."""
        return {
            account.key: _totals_said(loads(known[1]))
            for account in self._pool
            if (known := self._known.get(account.key)) is not None
        }

    def _flush_soon(self) -> None:
        """Have a new owner on disk at once: a kill a moment later must not lose it."""
        if self._owners is not None and (self._flushing is None or self._flushing.done()):
            self._flushing = self._background.spawn(self._owners.flush(), name="owners")


# -- after a restart ----------------------------------------------------------------------


class Afterwards:
    """What a process still learns while it drains, for the one that has taken over from it.

    Limits it meets are not told: the other one meets them as well, or had an answer since.
    """

    def __init__(self, pool: Remembered, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._told = {account.key: _totals(account) for account in pool}
        self._told_at = clock.now()
        self._told_changes = pool.affinity.changes

    def written(self, totals: Mapping[str, list[int]]) -> None:
        """Take it for told what was written down; turns ended meanwhile too."""
        self._told.update(totals)

    def news(self) -> JsonObject | None:
        """Return what is new since the last time, None for nothing."""
        since, self._told_at = self._told_at, self._clock.now()
        totals: dict[str, list[int]] = {}
        for account in self._pool:
            now, before = _totals(account), self._told.get(account.key)
            if before is None:
                before = [0] * len(now)
            if now != before:
                totals[account.key] = [new - old for new, old in zip(now, before, strict=True)]
                self._told[account.key] = now
        affinity = self._pool.affinity
        conversations: list[object] = []
        if affinity.changes != self._told_changes:
            self._told_changes = affinity.changes
            conversations = [entry for entry in affinity.dump() if entry[1] >= since]
        return {"totals": totals, "conversations": conversations} if totals or conversations else None


def take_news(pool: Remembered, news: Mapping[str, Any], now: float) -> None:
    """Add what `Afterwards` of another process told; whatever else stands there is left out."""
    totals = news.get("totals")
    for account in pool:
        told = totals.get(account.key) if isinstance(totals, dict) else None
        if isinstance(told, list) and len(told) == len(_totals(account)):
            _add_totals(account, [_count(number) for number in told])
            account.touch()
    conversations = news.get("conversations")
    if isinstance(conversations, list) and conversations:
        # Where a conversation went since is known better here.
        known = {session: at for session, at, _ in pool.affinity.dump()}
        pool.affinity.restore(
            [
                entry
                for entry in conversations
                if isinstance(entry, list) and len(entry) == 3 and _is_newer(entry, known)
            ],
            now,
        )


def _is_newer(entry: list[Any], known: Mapping[str, float]) -> bool:
    session, at = entry[0], entry[1]
    return isinstance(session, str) and isinstance(at, int | float) and at > known.get(session, -math.inf)


def _totals(account: Account) -> list[int]:
    usage = account.usage
    return [
        account.total_requests, account.total_errors, account.completions,
        usage.input_tokens, usage.cached_tokens, usage.cache_write_tokens,
        usage.output_tokens, usage.reasoning_tokens,
    ]  # fmt: skip


def _totals_said(said: JsonObject) -> list[int]:
    """Return the same, of what `dump_account` said."""
    return [said["requests"], said["errors"], said["completions"], *said["usage"]]


def _add_totals(account: Account, told: list[int]) -> None:
    usage = account.usage
    account.total_requests += told[0]
    account.total_errors += told[1]
    account.completions += told[2]
    usage.input_tokens += told[3]
    usage.cached_tokens += told[4]
    usage.cache_write_tokens += told[5]
    usage.output_tokens += told[6]
    usage.reasoning_tokens += told[7]


# -- one account --------------------------------------------------------------------------


_Known = tuple[float | None, bytes]
"""When it was so, and what `dump_account` said, rendered: as objects it would keep the garbage collector busy."""


def _rows(entries: list[tuple[str, _Known]]) -> bytes:
    """Render entries of the accounts in `state.json`."""
    return b",".join(
        b'%s:%s%s"at":%s}' % (dumps(key), said[:-1], b"," if len(said) > 2 else b"", dumps(at))
        for key, (at, said) in entries
    )


_Mark = tuple[object, ...]


def _mark(account: Account) -> _Mark:
    """Return what changes in an account with every request and every answer."""
    quota = account.quota
    return (
        account.total_requests, account.total_errors, account.completions, account.last_used,
        quota.seen_at, quota.usage_at, quota.plan_at, quota.credits.seen_at,
    )  # fmt: skip


def dump_account(account: Account) -> JsonObject:
    """Return what is kept of an account."""
    usage, credential = account.usage, account.credential
    return {
        "quota": account.quota.to_json(),
        "holds": {cause.name.lower(): until for cause, until in account.holds.items()},
        "family_holds": _newest(account.family_holds),
        "refusals": _newest(account.refusals),
        "unavailable": [
            account.unavailable_until,
            account.unavailable_reason[:_MAX_TEXT],
            account.unavailable_count,
        ],
        "login_lost": account.login_lost[:_MAX_TEXT],
        "rejected": account.rejected,
        # Digests: what the above is true of.
        "access": credential.access.digest(),
        "refresh": credential.refresh.digest(),
        "requests": account.total_requests,
        "errors": account.total_errors,
        "completions": account.completions,
        "last_used": account.last_used,
        "usage": [
            usage.input_tokens,
            usage.cached_tokens,
            usage.cache_write_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
        ],
    }


def restore_account(account: Account, said: Mapping[str, Any], now: float) -> None:
    """Give *account*, which has just been made, back what `dump_account` said of it.

    Whatever is wrong in it, over by now, or further away than anything lasts, is left out.
    """
    credential = account.credential
    same_access = bool(credential.access) and said.get("access") == credential.access.digest()
    same_refresh = bool(credential.refresh) and said.get("refresh") == credential.refresh.digest()

    quota = Quota.from_json(said.get("quota"), now)
    if account.quota.seen_at is None:
        if quota.plan is None:
            quota.plan = account.quota.plan
        account.take_quota(quota)

    causes = {cause.name.lower(): cause for cause in Cause}
    for name, until in _holds(said.get("holds"), now).items():
        cause = causes.get(name)
        if cause is not None and (cause is not Cause.REJECTED or same_access):
            if cause is not Cause.LIMIT:
                # A clock that was ahead: only a limit lasts for days.
                until = min(until, now + max(1.2 * BACKOFF[cause].cap, _MIN_CAP_SECONDS))
            account.holds[cause] = max(until, account.holds.get(cause, 0.0))
    for held, table, longest in (
        (said.get("family_holds"), account.family_holds, _MAX_HOLD_SECONDS),
        (said.get("refusals"), account.refusals, REFUSAL_SECONDS),
    ):
        for name, until in _holds(held, now).items():
            table[name] = max(min(until, now + longest), table.get(name, 0.0))

    match said.get("unavailable"):
        case [until, str(reason), int(count)] if _until(until, now) is not None:
            until = min(float(until), now + 1.2 * REPROBE.cap)
            account.unavailable_until = max(account.unavailable_until, until)
            account.unavailable_reason = reason[:_MAX_TEXT]
            account.unavailable_count = max(1, min(count, 100))

    rejected, lost = said.get("rejected"), said.get("login_lost")
    if same_access and rejected == credential.access.digest():
        account.rejected = rejected
    if same_refresh and isinstance(lost, str):
        account.login_lost = lost[:_MAX_TEXT]

    _restore_totals(account, said, now)
    account.touch()
    account.settle(now)


def _restore_totals(account: Account, said: Mapping[str, Any], now: float) -> None:
    account.total_requests += _count(said.get("requests"))
    account.total_errors += _count(said.get("errors"))
    account.completions += _count(said.get("completions"))
    last_used = _past(said.get("last_used"), now)
    if last_used is not None:
        account.last_used = max(last_used, account.last_used or 0.0)
    numbers = said.get("usage")
    if isinstance(numbers, list) and len(numbers) == 5:
        usage = account.usage
        usage.input_tokens += _count(numbers[0])
        usage.cached_tokens += _count(numbers[1])
        usage.cache_write_tokens += _count(numbers[2])
        usage.output_tokens += _count(numbers[3])
        usage.reasoning_tokens += _count(numbers[4])


def _newest(table: Mapping[str, float]) -> dict[str, float]:
    """Return the entries that hold longest, names cut to what is read back."""
    longest = sorted(table.items(), key=lambda entry: -entry[1])[:_MAX_NAMES]
    return {name: until for name, until in longest if len(name) <= _MAX_TEXT}


def _holds(said: object, now: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in said.items() if isinstance(said, dict) else ():
        until = _until(value, now)
        if until is not None and len(name) <= _MAX_TEXT and len(found) < _MAX_NAMES:
            found[name] = until
    return found


def _until(value: object, now: float) -> float | None:
    """Return the end of a hold that is still to come, and not further away than any is."""
    until = seconds_of(value)
    return until if until is not None and now < until <= now + _MAX_HOLD_SECONDS else None


def _past(value: object, now: float, within: float = math.inf) -> float | None:
    """Return a moment that has been, and no longer ago than *within*."""
    moment = seconds_of(value)
    return moment if moment is not None and now - within <= moment <= now else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else 0


# -- the file -----------------------------------------------------------------------------


def _read_state(path: Path) -> JsonObject | None:
    """Read `state.json`; None when there is none, or none that we understand, which is set aside."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_STATE_SIZE + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        _set_aside(path, f"not readable: {_why(exc)}")
        return None
    if len(data) > _MAX_STATE_SIZE:
        _set_aside(path, "far too large")
        return None
    try:
        document = loads(data)
    except BadJson:
        _set_aside(path, "not JSON")
        return None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        _set_aside(path, f"not of version {VERSION}")
        return None
    return document


async def _rendered(rows: Iterator[Any], render: Callable[[list[Any]], bytes]) -> list[bytes]:
    """Render *rows* in slices, with the commas between; other work gets its turn."""
    parts: list[bytes] = []
    while some := list(itertools.islice(rows, _ROWS)):
        parts += [b"," if parts else b"", render(some)]
        await asyncio.sleep(0)
    return parts


def _joined(parts: list[bytes]) -> tuple[bytes, bytes]:
    data = b"".join(parts)
    return data, hashlib.blake2b(data, digest_size=16).digest()


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{path.name}.aside")
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    logger.warning(
        "memory starts empty: %s is %s; it was set aside as %s. Limits, totals and bindings are learned again",
        path.name,
        reason,
        aside.name,
    )


def _why(exc: OSError) -> str:
    return os.strerror(exc.errno).lower() if exc.errno else "unknown error"


# -- who wrote which compacted history ----------------------------------------------------


_END = b"."
"""The last word of a line: one without it was torn by a crash."""

_NONE = b"-"
_Line = tuple[bytes, bytes, bytes]
"""Digest, account, workspace."""


class Owners:
    """The accounts that wrote compacted histories, on disk without a time limit.

    Appended to without a lock: one write a batch, each beginning with a line break, so that a
    line torn by a crash ends there. Whoever makes the file anew takes over what others have
    appended meanwhile, and whoever appended looks whether the file is still the same one.

    Args:
        path: The file; None keeps them in memory only.
    """

    def __init__(self, path: Path | None, *, size: int = MAX_OWNERS) -> None:
        self._path = path
        self._size = size
        self._owners: dict[bytes, Owner] = {}
        self._interned: dict[tuple[bytes, bytes], Owner] = {}
        self._unwritten: list[bytes] = []
        self._flushing = asyncio.Lock()
        self._inode = 0
        self._offset = 0
        """How far the file has been read; others append to it too."""
        self._is_failing = False
        self.on_add: Callable[[], None] | None = None
        """Told of every new owner, to have it written soon."""

    def __len__(self) -> int:
        return len(self._owners)

    def get(self, digest: str) -> Owner | None:
        """Return who wrote the history of that digest, when that is known."""
        try:
            return self._owners.get(bytes.fromhex(digest))
        except ValueError:
            return None

    def add(self, digest: str, account: str, workspace: str, now: float) -> None:
        """Remember who wrote a history.

        Args:
            digest: Its name, in hexadecimal digits.
            account: The account's key.
            workspace: Digest of the account's workspace; empty when it has none.
        """
        words = [digest.encode(), account.encode(), workspace.encode() or _NONE]
        if any(word.split() != [word] for word in words):
            raise ValueError("an owner's names must be single words")
        key = bytes.fromhex(digest)
        known = self._owners.get(key)
        if known is not None and (known.account, known.workspace) == (account, workspace):
            return
        self._set(key, words[1], words[2])
        if self._path is None:
            return
        self._unwritten.append(b" ".join([*words, b"%d" % now, _END]))
        # A disk that takes nothing must not fill the memory; what is remembered stays.
        del self._unwritten[: -self._size]
        if self.on_add is not None:
            self.on_add()

    def _set(self, key: bytes, account: bytes, workspace: bytes) -> None:
        owner = self._interned.get((account, workspace))
        if owner is None:
            owner = Owner(account.decode(), "" if workspace == _NONE else workspace.decode())
            self._interned[account, workspace] = owner
        self._owners.pop(key, None)
        self._owners[key] = owner
        if len(self._owners) > self._size:
            del self._owners[next(iter(self._owners))]

    # -- the file -------------------------------------------------------------------------

    def load(self) -> None:
        """Read the file, and make it anew when most of it is of no use any more; blocks on a disk."""
        if self._path is None:
            return
        try:
            lines = 0
            for line in self._news():
                lines += 1
                self._take(line)
            if lines > 2 * len(self._owners):
                self._rewrite(self._path)
                for line in self._news():
                    self._take(line)
        except FileNotFoundError:
            return
        except OSError as exc:
            logger.warning("owners of compacted histories not read: %s", _why(exc))

    async def flush(self) -> None:
        """Have everything on disk, and take over what other processes have added."""
        if self._path is None:
            return
        async with self._flushing:
            while True:
                batch, self._unwritten = self._unwritten, []
                try:
                    news = await asyncio.to_thread(self._exchange, self._path, batch)
                except BaseException as exc:
                    # Perhaps written all the same: a line that stands there twice says nothing else.
                    self._unwritten = [*batch, *self._unwritten]
                    if not isinstance(exc, OSError):
                        raise
                    if not self._is_failing:
                        logger.warning("owners of compacted histories not written: %s", _why(exc))
                    self._is_failing = True
                    return
                self._is_failing = False
                newer = {line.split(b" ", 1)[0] for line in self._unwritten}
                for line in news:
                    if line[0] not in newer:
                        self._take(line)
                if not self._unwritten:
                    return

    def _take(self, line: _Line) -> None:
        if not self._is_known(line):
            self._set(bytes.fromhex(line[0].decode()), line[1], line[2])

    def _is_known(self, line: _Line) -> bool:
        known = self._owners.get(bytes.fromhex(line[0].decode()))
        return known is not None and known is self._interned.get((line[1], line[2]))

    def _exchange(self, path: Path, batch: list[bytes]) -> list[_Line]:
        """Write our lines and read what is news to us; in a thread."""
        if batch:
            _append(path, b"\n" + b"\n".join(batch) + b"\n")
        try:
            # Filtered here: a file that was made anew is read from its beginning.
            return [line for line in self._news() if not self._is_known(line)]
        except FileNotFoundError:
            return []

    def _news(self) -> Iterator[_Line]:
        """Read what was appended since the last time; all of it when the file is another one."""
        assert self._path is not None
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    # Somebody is writing it, or was killed over it.
                    return
                self._offset += len(line)
                words = _words(line)
                if words is not None:
                    yield words

    def _rewrite(self, path: Path) -> None:
        """Make the file anew without what is repeated, broken or too old, unless another process does."""
        with open(path.with_name(f"{path.name}.lock"), "ab") as guard:
            os.fchmod(guard.fileno(), 0o600)
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass  # a file system without locks
            with open(path, "rb") as old:
                needed, end = _collect(old, self._size)
                files.write_atomic(path, b"".join(needed.values()))
                # Who appended before the new file stood there saw nothing wrong.
                old.seek(end)
                late = old.read()
            if late.strip():
                _append(path, b"\n" + late + b"\n")
        logger.info("owners of compacted histories written anew lines=%d", len(needed))


def _words(line: bytes) -> _Line | None:
    """Read a line; None for one that is empty, torn or not ours."""
    words = line.split()
    if len(words) != 5 or words[4] != _END:
        return None
    try:
        bytes.fromhex(words[0].decode())
        (words[1] + words[2]).decode()
    except ValueError:
        return None
    return words[0], words[1], words[2]


def _collect(lines: Iterable[bytes], size: int) -> tuple[dict[bytes, bytes], int]:
    """Return the last line of each digest, the newest *size* of them, and where the last whole line ends."""
    needed: dict[bytes, bytes] = {}
    end = 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        words = _words(line)
        if words is not None:
            needed.pop(words[0], None)
            needed[words[0]] = line
            if len(needed) > size:
                del needed[next(iter(needed))]
    return needed, end


def _append(path: Path, data: bytes) -> None:
    """Append in one write, on disk before it returns; again when the file was made anew meanwhile."""
    for _ in range(5):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            if os.write(descriptor, data) != len(data):
                # The disk is full; what stands there is a torn line, and all is written again later.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            mine = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
                return
