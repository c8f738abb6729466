"""The ledger of one daemon: who may ask for what, what it has cost, and that it adds up.

Everything here is asked on the loop and done by the writer's thread (`ledger.writer`), in the order in which it
was asked. Nothing is said to be done before it is on disk, in the database or in a spool; but that a turn has begun which
takes from what its key was allotted (`ledger.allotments`) gets there a moment later, with its money safe meanwhile.
"""

import asyncio
import importlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection

from codex_proxy.clock import Clock
from codex_proxy.errors import ConfigError, KeyRefused, LedgerAway, OutOfFunds, ProxyError
from codex_proxy.ledger import changes
from codex_proxy.ledger.allotments import MILLISECONDS, Allotment, Allotments
from codex_proxy.ledger.bases import Away, Base, FileBase, FileReader, Reader
from codex_proxy.ledger.checks import check
from codex_proxy.ledger.cleaning import clean, clean_hold
from codex_proxy.ledger.directory import Directory
from codex_proxy.ledger.keys import digest_of, make_key
from codex_proxy.ledger.model import NO_LIMITS, Entry, Hold, Key, Limits, Mode, Settlement, User
from codex_proxy.ledger.operations import (
    Authorize,
    Errand,
    News,
    Operation,
    Reap,
    Recall,
    Settle,
    TopUp,
    Work,
)
from codex_proxy.ledger.spooling import MOST_BYTES, MOST_ROWS, Spool
from codex_proxy.ledger.writer import Writer, WriterStatistics
from codex_proxy.storage.lock import StoreLock
from codex_proxy.tasks import Job

logger = logging.getLogger(__name__)

T = TypeVar("T")

_USED_SECONDS = 60.0
_REAP_SECONDS = 30.0
_END_SECONDS = 30.0
# How long the process before this one may take to let go of the database.
_LOCK_SECONDS = 10.0


@dataclass(slots=True, frozen=True)
class LedgerStatistics:
    """How the ledger does."""

    mode: Mode
    holds_open: int
    is_away: bool
    writer: WriterStatistics


@dataclass(slots=True)
class _Open:
    """A turn under way."""

    hold: Hold
    is_billed: bool
    is_written: bool
    """Whether the database has its hold."""
    ends_at: float
    """By the monotonic clock: when it is taken for left behind."""
    is_blind: bool = False
    """It began while the database was away, and may have no hold that could grow."""


class Ledger:
    """See the module.

    Args:
        folder: The data-dir, which is there.
        lock: Its lock, which other stores share.
        database_url: Of a PostgreSQL database; without it the ledger is a file in *folder*.
        allots: Whether keys may be allotted something (`ledger.allotments`); otherwise each turn waits until what is
            set aside for it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Mode,
        clock: Clock,
        lock: StoreLock,
        database_url: str = "",
        spool_bytes: int = MOST_BYTES,
        spool_rows: int = MOST_ROWS,
        allots: bool = True,
    ) -> None:
        self.mode: Mode = mode
        self.directory = Directory(clock.now)
        self.on_change: list[Callable[[], None]] = []
        """Called when users, keys or something else that is remembered may have changed."""
        self._clock = clock
        self.process = secrets.token_hex(8)
        """Whose holds these are."""
        self._base, self._reader = _bases(folder, lock, database_url)
        self._spool = Spool(folder, self.process, most_bytes=spool_bytes, most_rows=spool_rows)
        self._writer = Writer(
            self._base,
            folder,
            mode=mode,
            process=self.process,
            tell=self._tell,
            now=clock.now,
            spool=self._spool,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[str, _Open] = {}
        self._allotments = Allotments()
        # Of several processes each would keep from the others what it does not need.
        self._may_allot = allots and self._base.is_alone
        self._allots = self._may_allot
        self._is_over = False

    # -- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the database; what processes have left behind that are no more is put in order.

        Raises:
            ConfigError: If it cannot be used; the message says what would help.
        """
        self._loop = asyncio.get_running_loop()
        deadline = time.monotonic() + _LOCK_SECONDS
        is_said = False
        while True:
            promise = self._loop.create_future()
            self._writer.start(promise)
            try:
                await promise
                return
            except Away as exc:
                if time.monotonic() > deadline or not exc.is_passing:
                    raise ConfigError(f"ledger = {self.mode}: {exc}") from exc
                if not is_said:
                    logger.info("waiting for the ledger: another process has it")
                    is_said = True
            await asyncio.sleep(0.1)

    async def hand_over(self) -> None:
        """Write what waits, and let another process write; what is settled here reaches it through a spool."""
        self._allots = False
        self._recall_all()
        await self._errand("hand over")

    async def take_back(self) -> None:
        """Write again after all: nobody else does."""
        await self._errand("take back")
        self._allots = self._may_allot

    async def aclose(self) -> None:
        """Write what waits, and end."""
        if self._is_over or self._loop is None:
            return
        self._is_over = True
        self._write_used()
        # First, so that the writer is the last one and leaves nothing beside the file.
        await self._reader.aclose()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._errand("end")
        except TimeoutError:
            logger.error("the ledger is not closed: its database does not answer")

    async def _errand(self, name: str) -> None:
        promise = asyncio.get_running_loop().create_future()
        self._writer.put(Errand(name, promise))
        await promise

    def jobs(self) -> list[Job]:
        """Return what runs by itself: releasing what was left behind, and writing down when keys were used."""
        return [
            Job("ledger-reaper", lambda: _REAP_SECONDS, self.reap),
            Job("ledger-used", lambda: _USED_SECONDS, self._note_used),
            Job("ledger-allotments", lambda: MILLISECONDS / 1_000.0, self.recall_idle),
        ]

    @property
    def is_away(self) -> bool:
        """Whether the database cannot be written now."""
        return self._writer.is_away

    def statistics(self) -> LedgerStatistics:
        """Return how it does."""
        return LedgerStatistics(self.mode, len(self._open), self.is_away, self._writer.statistics())

    # -- turns -----------------------------------------------------------------------------

    async def authorize(self, hold: Hold) -> None:
        """Set aside what a turn may cost. `settle` has to follow, also when this is cancelled.

        Raises:
            KeyRefused: If its key, or the owner of it, may not be used any more.
            OutOfFunds: If there is not so much.
            BudgetUsedUp: If a budget has no room for it.
            LedgerAway: If that cannot be found out, or its end could not be written down.
        """
        asked = self.begin(hold)
        if asked is not None:
            await self.ask(asked)

    def begin(self, hold: Hold) -> Authorize | None:
        """Do of `authorize` what can be done at once; what it returns is to be given to `ask`.

        That is all of it where nothing is paid and no budget counts, and where its key has been allotted enough.

        Raises:
            KeyRefused: If its key, or the owner of it, may not be used any more.
            LedgerAway: If its end could not be written down.
        """
        if self._is_over:
            raise LedgerAway("the proxy is ending")
        hold = clean_hold(hold)
        is_billed = self.directory.is_billed(hold.user_id)
        if is_billed is None:
            raise KeyRefused("the owner of this key is suspended", code="user_suspended")
        is_billed = is_billed and self.mode == "billing"
        is_written = is_billed or bool(hold.budgets)
        if self._writer.is_full:
            raise LedgerAway("what this request costs could not be written down; try again in a moment")
        ends_at = self._clock.monotonic() + max(0.0, (hold.expires - hold.at) / 1_000.0)
        self._open[hold.request_id] = _Open(hold, is_billed, is_written, ends_at)
        self.directory.note_used(hold.key_id, hold.at)
        if not is_written:
            return None
        if hold.nanos <= 0 or not self._allots or self._writer.is_away:
            return Authorize(hold, is_billed)
        allotment = self._allotment(hold)
        is_allotted = allotment.take(hold.nanos)
        wish = allotment.wish(hold.nanos)
        asked = Authorize(hold, is_billed, None, is_allotted, allotment if wish else None, wish)
        if not is_allotted:
            return asked
        self._writer.put_later(asked)
        return None

    async def ask(self, asked: Authorize) -> None:
        """Do the rest of `authorize`."""
        hold = asked.hold
        before = self._allotments.taken_out(hold.user_id)
        try:
            try:
                is_there = await self._ask_paced(asked)
            except OutOfFunds:
                if asked.allotment is not None:
                    # It was not looked at.
                    asked.allotment.answered(0, hold.at)
                if not self._recall_of(hold.user_id, before):
                    raise
                # It may have been there, for another key.
                is_there = await self._ask_paced(Authorize(hold, asked.is_billed))
        except ProxyError:
            self._open.pop(hold.request_id, None)
            raise
        if is_there is False and not asked.is_billed and (turn := self._open.get(hold.request_id)):
            turn.is_blind = True

    async def _ask_paced(self, asked: Authorize) -> Any:
        asked.promise = asyncio.get_running_loop().create_future()
        self._writer.put_paced(asked, len(self._open))
        return await asked.promise

    # -- what is allotted ------------------------------------------------------------------

    def _allotment(self, hold: Hold) -> Allotment:
        """Return what a turn may take from."""
        found = self._allotments.find(hold)
        if found is not None and (found.budgets != hold.budgets or not found.counts(hold.at)):
            self._recall(found)
            found = None
        if found is None:
            found = Allotment(hold.user_id, hold.key_id, hold.budgets, hold.at)
            self._allotments.put(found)
        return found

    def _recall(self, allotment: Allotment) -> None:
        self._allotments.take_out(allotment)
        self._writer.put_later(Recall(allotment.user_id, allotment.key_id))

    def _recall_of(self, user_id: str, before: int) -> bool:
        """Have a user's keys give back what they have; whether who asks again may find more.

        Also when others have had them do that since so many were taken out *before*: several may have been refused for
        what one key had.
        """
        if self._is_over:
            # Nobody would answer.
            return False
        for one in self._allotments.of_user(user_id):
            if not one.is_empty:
                self._recall(one)
        return self._allotments.taken_out(user_id) != before

    def _recall_all(self) -> None:
        if self._allotments.clear():
            self._writer.put_later(Recall())

    async def recall_idle(self) -> None:
        """Have keys that are not in use give back what they have."""
        at = self._at()
        for one in self._allotments:
            if not one.counts(at):
                self._recall(one)

    async def top_up(self, request_id: str, nanos: int) -> bool:
        """Set aside *nanos* more for a turn; False when there is not so much."""
        turn = self._open.get(request_id)
        if turn is None or self._is_over:
            return False
        hold = turn.hold
        # Whoever asks is alive.
        turn.ends_at = max(
            turn.ends_at, self._clock.monotonic() + max(0.0, (hold.expires - hold.at) / 1_000.0)
        )
        if not turn.is_written or turn.is_blind:
            return True
        at = round(self._clock.now() * 1_000.0)

        def more(promise: asyncio.Future[Any]) -> TopUp:
            return TopUp(
                request_id, hold.user_id, hold.key_id, nanos, at, turn.is_billed, hold.budgets, promise
            )

        before = self._allotments.taken_out(hold.user_id)
        grown: bool = await self._ask(more)
        if not grown and self._recall_of(hold.user_id, before):
            grown = await self._ask(more)
        return grown

    def settle(self, settlement: Settlement) -> None:
        """Release what was set aside for a turn, and take what it cost. Once; a second time changes nothing."""
        settlement = clean(settlement)
        self._open.pop(settlement.request_id, None)
        if self._is_over:
            # Its hold is released by whoever comes next, as of a turn that was lost.
            logger.error("a turn ended after the ledger request=%s", settlement.request_id)
            return
        self.directory.note_used(settlement.key_id, settlement.at)
        self._writer.put_later(Settle(settlement))

    async def settled(self, settlement: Settlement) -> None:
        """Settle, and wait until it is on disk.

        Raises:
            LedgerAway: If it cannot be written at all.
        """
        if self._is_over:
            raise LedgerAway("the proxy is ending")
        settlement = clean(settlement)
        self._open.pop(settlement.request_id, None)
        await self._ask(lambda promise: Settle(settlement, promise))

    async def reap(self) -> None:
        """Release what turns have set aside that nobody has settled in time, or whose process is gone."""
        now, at = self._clock.monotonic(), round(self._clock.now() * 1_000.0)
        late = [one for one in self._open.values() if one.ends_at < now]
        for one in late:
            del self._open[one.hold.request_id]
            if one.is_written:
                self._writer.put(Reap(one.hold.request_id, one.hold.user_id, one.hold.key_id, at))
        if late:
            logger.error("turns were never settled count=%d", len(late))
        if not self._is_over:
            await self._errand("look")

    # -- what owners do --------------------------------------------------------------------

    async def create_user(
        self, name: str, *, is_billed: bool = True, limits: Limits = NO_LIMITS, actor: str
    ) -> User:
        """Make a user, without money.

        Raises:
            RequestError: If something does not fit, or the name is taken.
            LedgerAway: If it cannot be written now.
        """
        made, at = f"user_{secrets.token_hex(8)}", self._at()
        return await self._work(
            lambda connection: changes.create_user(
                connection, id=made, name=name, is_billed=is_billed, limits=limits, actor=actor, at=at
            ),
            users=(made,),
        )

    async def update_user(self, id: str, given: Mapping[str, Any], actor: str) -> User:  # noqa: A002
        """Change some of name, status, is_billed and limits.

        Raises:
            RequestError: If there is no such user or field, or something does not fit.
            LedgerAway: If it cannot be written now.
        """
        at = self._at()
        return await self._work(
            lambda connection: changes.update_user(connection, id=id, changes=given, actor=actor, at=at),
            users=(id,),
        )

    async def credit(
        self,
        user_id: str,
        nanos: int,
        *,
        kind: Literal["credit", "adjust"] = "credit",
        reason: str,
        idempotency_key: str,
        actor: str,
    ) -> Entry:
        """Change a balance, once for each *idempotency_key*.

        Raises:
            RequestError: If there is no such user, the idempotency key was used for something else, or what is to be
                taken is not there.
            LedgerAway: If it cannot be written now.
        """
        at = self._at()
        return await self._work(
            lambda connection: changes.credit(
                connection,
                user_id=user_id,
                nanos=nanos,
                kind=kind,
                reason=reason,
                idempotency_key=idempotency_key,
                actor=actor,
                at=at,
            ),
            users=(user_id,),
        )

    async def create_key(
        self,
        user_id: str,
        name: str,
        *,
        limits: Limits = NO_LIMITS,
        expires: int | None = None,
        actor: str,
    ) -> tuple[Key, str]:
        """Make a key; its text is returned this once, and kept nowhere.

        Raises:
            RequestError: If there is no such user, or something does not fit.
            LedgerAway: If it cannot be written now.
        """
        made, text, at = f"key_{secrets.token_hex(8)}", make_key(secrets.token_bytes(32)), self._at()
        key = await self._work(
            lambda connection: changes.create_key(
                connection,
                id=made,
                user_id=user_id,
                name=name,
                digest=digest_of(text),
                hint=_hint(text),
                limits=limits,
                expires=expires,
                actor=actor,
                at=at,
            ),
            keys=(made,),
        )
        return key, text

    async def update_key(self, id: str, given: Mapping[str, Any], actor: str) -> Key:  # noqa: A002
        """Change some of name, expires and limits.

        Raises:
            RequestError: If there is no such key or field, or something does not fit.
            LedgerAway: If it cannot be written now.
        """
        at = self._at()
        return await self._work(
            lambda connection: changes.update_key(connection, id=id, changes=given, actor=actor, at=at),
            keys=(id,),
        )

    async def rotate_key(self, id: str, grace_seconds: float, actor: str) -> tuple[Key, str]:  # noqa: A002
        """Give a key a new text, which is returned this once; the old one counts for *grace_seconds* more.

        Raises:
            RequestError: If there is no such key, or it was revoked.
            LedgerAway: If it cannot be written now.
        """
        text, at = make_key(secrets.token_bytes(32)), self._at()
        until = at + round(max(0.0, grace_seconds) * 1_000.0)
        key = await self._work(
            lambda connection: changes.rotate_key(
                connection,
                id=id,
                digest=digest_of(text),
                hint=_hint(text),
                grace_until=until,
                actor=actor,
                at=at,
            ),
            keys=(id,),
        )
        return key, text

    async def revoke_key(self, id: str, actor: str) -> Key:  # noqa: A002
        """End a key for ever; the next request with it is refused.

        Raises:
            RequestError: If there is no such key.
            LedgerAway: If it cannot be written now.
        """
        at = self._at()
        return await self._work(
            lambda connection: changes.revoke_key(connection, id=id, actor=actor, at=at), keys=(id,)
        )

    async def write(
        self, work: Callable[[Connection], T], *, concerns: Callable[[T], tuple[str, ...]] | None = None
    ) -> T:
        """Change something else, in a transaction of its own; *work* may be run more than once.

        Args:
            concerns: Tells from what *work* returns which users have another balance; without it all of all is read anew,
                which many such changes in a row cannot afford.

        Raises:
            LedgerAway: If it cannot be written now.
        """
        return await self._work(work, concerns=concerns)

    async def read(self, question: Callable[[Connection], T], *, is_long: bool = False) -> T:
        """Ask the database something; *is_long* says that it is about everything, and may take its time.

        Raises:
            LedgerAway: If it cannot be read now.
        """
        try:
            return await self._reader.ask(question, is_long=is_long)
        except Away as exc:
            raise LedgerAway(f"the ledger cannot be read: {exc}") from exc

    async def check(self) -> list[str]:
        """Return what does not add up: nothing, or something is very wrong."""
        return await self.read(check, is_long=True)

    # -- between the loop and the thread -----------------------------------------------------

    def _at(self) -> int:
        return round(self._clock.now() * 1_000.0)

    async def _ask(self, make: Callable[[asyncio.Future[Any]], Operation]) -> Any:
        promise: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._writer.put(make(promise))
        return await promise

    async def _work(
        self,
        work: Callable[[Connection], T],
        *,
        concerns: Callable[[T], tuple[str, ...]] | None = None,
        users: tuple[str, ...] = (),
        keys: tuple[str, ...] = (),
    ) -> T:
        if self._is_over:
            raise LedgerAway("the proxy is ending")
        # It may take what is allotted, or change who may have it.
        self._recall_all()
        done: T = await self._ask(lambda promise: Work(work, promise, concerns, users, keys))
        return done

    def _write_used(self) -> bool:
        used = self.directory.take_used()
        if used:
            self._writer.put(
                Work(lambda connection: changes.note_used(connection, used), None, is_quiet=True)
            )
        return bool(used)

    async def _note_used(self) -> None:
        self._write_used()

    def _tell(self, news: News) -> None:
        """In the writer's thread: have the loop hear of it."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._hear, news)
        except RuntimeError:
            # The loop is closed; nobody waits any more.
            logger.debug("nobody hears of what was written")

    def _hear(self, news: News) -> None:
        directory = self.directory
        if news.everybody is not None:
            directory.load(news.everybody.users, news.everybody.keys)
        for user in news.users:
            directory.put_user(user)
        for key in news.keys:
            directory.put_key(*key)
        for allotment, nanos, at in news.allotted:
            allotment.answered(nanos, at)
        for user_id, balance, held, is_past_due in news.balances:
            directory.put_balance(user_id, balance, held, is_past_due=is_past_due)
        if news.everybody is not None or news.users or news.keys:
            for listener in self.on_change:
                listener()
        for promise, value, error in news.answers:
            if promise.done():
                # Its caller has left.
                continue
            if error is None:
                promise.set_result(value)
            else:
                promise.set_exception(error)


def _hint(text: str) -> str:
    return f"{text[:6]}...{text[-4:]}"


def _bases(folder: Path, lock: StoreLock, database_url: str) -> tuple[Base, Reader]:
    if database_url:
        server = importlib.import_module("codex_proxy.ledger.server")
        return server.ServerBase(database_url), server.ServerReader(database_url)
    base = FileBase(folder, lock)
    return base, FileReader(base.path)
