"""The folder of the account files, followed: what changes there counts within a moment.

Two ways, because neither is enough: the system's notices come at once, but not across bind
mounts, network file systems and symlinks; a look every few seconds misses nothing. Where there
are no notices (none are to be had, or the folder is away) the look comes oftener.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import watchfiles

from codex_proxy.accounts import files, pending, store
from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import Clock
from codex_proxy.config import Live

logger = logging.getLogger(__name__)

# How often the folder is looked at: beside the system's notices, and without any.
SLOW_SECONDS = 5.0
FAST_SECONDS = 1.0

# A file that is being written changes many times: one look once it rests for a moment, and
# one in between at least when it never does.
_REST_MS = 50
_LONGEST_MS = 400

# How often the watch is woken when nothing happens, to see whether its folder is still the one.
_WAKE_MS = 1_000

# How soon a watch is tried again: when its folder went away, and when the system gave none.
_AGAIN_SECONDS = 1.0
_REFUSED_SECONDS = 60.0

Place = tuple[int, int]


class AccountFiles:
    """Make the pool what the files say, again and again."""

    def __init__(self, pool: Pool, *, live: Live, clock: Clock) -> None:
        self._pool = pool
        self._live = live
        self._clock = clock
        settings = live.current
        self.folder = settings.auth_dir
        self._looker = store.Folder(settings.auth_dir, settings.data_dir)
        self._turn = asyncio.Lock()
        self._again = False
        self._is_first = True
        self._is_watched = False
        self._has_complained = False
        self._watch_pause = _AGAIN_SECONDS
        self.looks = 0
        """How often the folder was looked at."""

    # -- looking --------------------------------------------------------------------------

    async def load(self) -> None:
        """Make the pool what the files say, whether they changed or not."""
        await self._look(anyway=True)

    async def follow(self) -> None:
        """Make the pool what the files say, if any of them changed."""
        await self._look(anyway=False)

    def look_again(self) -> None:
        """Note that the exchange of an account is over, for which it was left alone; the next look takes it up."""
        self._again = True

    def seconds_to_next_look(self) -> float:
        """Return how soon the folder is to be looked at again."""
        return SLOW_SECONDS if self._is_watched and not self._again else FAST_SECONDS

    async def _look(self, *, anyway: bool) -> None:
        # In turn, so that an older look is never applied after a newer one.
        async with self._turn:
            anyway, self._again = anyway or self._again, False
            self.looks += 1
            try:
                scan = await asyncio.to_thread(self._read, anyway)
                if scan is not None:
                    self._apply(await self._caught_up(scan))
            except BaseException:
                self._again = True
                raise

    def _read(self, anyway: bool) -> store.Scan | None:
        scan = self._looker.look(anyway=anyway)
        if self._is_first and scan is not None:
            self._is_first = False
            data_dir = self._live.current.data_dir
            folders = {self.folder, data_dir, data_dir / pending.FOLDER}
            folders |= {credential.target.parent for credential in scan.credentials}
            count = files.remove_leftovers(folders, now=time.time())
            if count:
                logger.info("unfinished files of a killed process removed count=%d", count)
        return scan

    def _apply(self, scan: store.Scan) -> None:
        known = {(problem.path, problem.reason) for problem in self._pool.problems}
        self._pool.apply(scan)
        for problem in scan.problems:
            if (problem.path, problem.reason) not in known:
                logger.warning("account file problem file=%s", problem)
        for credential in scan.credentials:
            account = self._pool.get(credential.key) if credential.refused else None
            if account is not None and account.credential is credential and not account.login_lost:
                self._pool.login_lost(account, credential.refused)

    async def _caught_up(self, scan: store.Scan) -> store.Scan:
        """Return what was found with what only we know, and mend the files that are behind it.

        A file that holds a token which we know to be spent was put back by an editor that had
        it open, or from a copy; the next start would find a login that is lost.
        """
        credentials = list(scan.credentials)
        for place, credential in enumerate(credentials):
            account = self._pool.get(credential.key)
            if account is None:
                continue
            mine = account.credential
            if credential.refresh == mine.refresh:
                if mine.interrupted is not None and credential.interrupted is None:
                    # No disk took the record; what we know of it stays known.
                    credentials[place] = dataclasses.replace(credential, interrupted=mine.interrupted)
            elif mine.superseded and credential.refresh.digest() in mine.superseded:
                credentials[place] = await asyncio.to_thread(self._put_back, credential, mine)
        return dataclasses.replace(scan, credentials=credentials)

    def _put_back(self, behind: store.Credential, mine: store.Credential) -> store.Credential:
        try:
            behind = store.load(behind.path)
        except store.Unusable:
            return behind
        if behind.refresh.digest() not in mine.superseded:
            # What was read was older than an exchange that has ended since.
            return behind
        at = mine.last_refresh if mine.last_refresh is not None else self._clock.now()
        left = None if mine.expires_at is None else mine.expires_at - at
        tokens = dataclasses.replace(mine.all_tokens(), expires_in=left)
        # What its owner edited there is theirs; only the tokens are ours.
        current = dataclasses.replace(behind.merged(tokens, now=at), superseded=mine.superseded)
        try:
            saved = store.save(current, tokens, now=at, data_dir=self._live.current.data_dir)
        except store.NotSaved as exc:
            return exc.credential
        logger.warning(
            "account file held tokens that are spent; its newer ones were put back alias=%s",
            saved.alias or saved.default_alias,
        )
        return saved

    # -- watching -------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look whenever the system tells of a change, until the folder is another one or gone."""
        self._watch_pause = _AGAIN_SECONDS
        place = await asyncio.to_thread(_place, self.folder)
        if place is None:
            return
        try:
            async with contextlib.aclosing(_notices(self.folder)) as notices:
                async for has_changes in notices:
                    if not self._is_watched:
                        # From here on nothing is missed; what came before is looked for now.
                        has_changes = self._is_watched = True
                        self._has_complained = False
                    if has_changes:
                        await self.follow()
                    if await asyncio.to_thread(_place, self.folder) != place:
                        return
        except _NoNotices as exc:
            self._watch_pause = _REFUSED_SECONDS
            if not self._has_complained:
                self._has_complained = True
                logger.warning(
                    "auth-dir cannot be watched, so it is looked at every %.0f s reason=%s", FAST_SECONDS, exc
                )
        finally:
            self._is_watched = False

    def seconds_to_next_watch(self) -> float:
        """Return how soon a watch that ended is begun again."""
        return self._watch_pause


def _place(folder: Path) -> Place | None:
    """Return which folder is at that path; None when there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _concerns(folder: Path, name: str) -> bool:
    """Tell whether a change of that name in *folder* may be one of an account.

    Not our own files on their way, nor whatever else is kept there. Names with two dots are
    links that mounted secrets are switched by; the folder's own name tells of itself.
    """
    if name.startswith("."):
        return name.startswith("..")
    return name.lower().endswith(files.SUFFIX) or name == folder.name


async def _notices(folder: Path) -> AsyncGenerator[bool, None]:
    """Yield True when something in *folder* changed, and False every second when nothing did."""
    changes = watchfiles.awatch(
        folder,
        watch_filter=lambda _, path: _concerns(folder, os.path.basename(path)),
        debounce=_LONGEST_MS,
        step=_REST_MS,
        rust_timeout=_WAKE_MS,
        yield_on_timeout=True,
        recursive=False,
    )
    try:
        async with contextlib.aclosing(changes):
            async for some in changes:
                yield bool(some)
    except FileNotFoundError:
        # Gone since it was looked for.
        return
    except (OSError, RuntimeError) as exc:
        # Too many watches on this machine, or a file system that has none.
        raise _NoNotices(_WITHOUT_PATHS.sub("", str(exc)) or type(exc).__name__) from exc


class _NoNotices(Exception):
    """The system gives no notices of this folder."""


# The library names the folder at the end of its message.
_WITHOUT_PATHS = re.compile(r"\s*(about )?\[.*", re.DOTALL)
