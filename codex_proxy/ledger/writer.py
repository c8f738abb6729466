"""The one thread that writes a ledger.

It takes what has gathered and decides and writes it in one transaction, so that all of it is on disk at the price of
one wait; whoever waits hears of it after that. Nothing is waited for but the database, and that for so long.

While the database is away, or belongs to the process that takes over from this one, settlements go to a spool.
What begins then, where money is taken, is refused: another process may be spending the same money. Turns under
way get a little more when they ask for it, and a mark for it.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from sqlalchemy import Connection, delete, insert, select, update

from codex_proxy.errors import LedgerAway, ProxyError
from codex_proxy.ledger import changes, rows
from codex_proxy.ledger.bases import Again, Away, Base, NotOpened
from codex_proxy.ledger.book import LOAN, Book, Wanted, used_up
from codex_proxy.ledger.cleaning import ODD
from codex_proxy.ledger.model import Hold, Key, Mode, Settlement, User, Window
from codex_proxy.ledger.operations import (
    Authorize,
    Decided,
    Drop,
    Errand,
    Everybody,
    News,
    Operation,
    Reap,
    Recall,
    Settle,
    TopUp,
    Work,
)
from codex_proxy.ledger.spooling import Spool, keep_refused, process_of, set_apart, settlement_of, spools_in
from codex_proxy.ledger.tables import client_keys, counters, holds, processes, users
from codex_proxy.ledger.windows import DAY
from codex_proxy.storage.spool import SpoolReader

logger = logging.getLogger(__name__)

# How many operations go into one transaction: beyond it a batch takes longer than anybody likes to wait.
_MOST_TOGETHER = 512

_GATHER_SECONDS = 0.02
"""How long settlements are gathered for which nobody waits: what a process that is killed can lose of them, too."""
_GATHERED = 128
"""How many of them are enough."""
_PACE_SECONDS = 0.01
"""How long after the last transaction the next one waits for more turns to begin, while there are many.

One for each turn costs half a millisecond of CPU, one for ten of them a tenth each; a model takes seconds to answer.
"""
_WORTH_IT = 4
"""One in so many of the turns under way is enough."""
_LOOK_SECONDS = 0.5
"""How often it is looked whether a spool has grown, another process has changed a key, the database is back."""
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 8.0
_BEAT_SECONDS = 10.0
_DEAD_SECONDS = 60.0
"""How long a process on another machine may show no sign of life before what it holds is released."""
_KEPT_WINDOWS = 2 * DAY
_TRIES = 5
"""Of a transaction that gets into another's way."""

BLIND_TOP_UPS = 4
"""How often a turn gets more while it cannot be looked whether there is more."""
BLIND = "blind_top_up"
"""The mark of a turn that got it."""

Answer = tuple[asyncio.Future[Any], Any, BaseException | None]


@dataclass(slots=True, frozen=True)
class WriterStatistics:
    """How the writing goes."""

    waiting: int
    settled: int
    """Turns written since the start."""
    reaped: int
    """Holds released that nobody has settled."""
    shortfalls: int
    """Turns that have cost more than there was."""
    refused: int
    """Settlements that the database will not have; they are in the log, by id, and in a file beside the database."""
    spooled: int
    """Settlements that wait in a file, or in memory, for the database."""
    is_spool_full: bool
    trouble: str
    """What keeps it from writing; empty when nothing does."""


class Writer:
    """The thread.

    Args:
        tell: Is given what has come of a batch, in this thread.
        now: The wall clock.
    """

    def __init__(
        self,
        base: Base,
        folder: Path,
        *,
        mode: Mode,
        process: str,
        tell: Callable[[News], None],
        now: Callable[[], float],
        spool: Spool,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._folder = folder
        self._mode = mode
        self._process = process
        self._tell = tell
        self._now = now
        self._monotonic = monotonic
        self._spool = spool
        self._spools: dict[Path, SpoolReader] = {}
        self._waiting: deque[Operation] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._book: Book | None = None
        self._is_open = False
        self._has_handed_over = False
        self._trouble = ""
        self._retry_at = 0.0
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._look_at = 0.0
        self._beat_at = 0.0
        self._beats: dict[str, tuple[int, float]] = {}
        """The last sign of life of other processes, and when it was new."""
        self._version = 0
        self._blind: dict[str, int] = {}
        self._lendable: dict[str, int] = {}
        """What this process may still spend of balances after it has handed over, by user."""
        self._loans: dict[str, list[Authorize | TopUp]] = {}
        """What was lent to turns of that, by request."""
        self._spent: dict[tuple[str, Window], tuple[int, int, int]] = {}
        """Of windows: when they begin and end, and what was spent in them as far as this process knows."""
        self._allotted: dict[str, int] = {}
        """What keys and users have been allotted, as far as that is not taken."""
        self._unsure: list[Decided] = []
        """Holds to be released when it can be done: of turns that were refused while it was not known whether they had
        been written, and of those that nobody has settled in time."""
        self._settled = self._reaped = self._shortfalls = self._refused = 0
        self._timer: asyncio.TimerHandle | None = None
        """Sends the thread for what waits, if nothing else does before."""
        self._due = self._sent_at = 0.0

    # -- from the loop ---------------------------------------------------------------------

    def put(self, operation: Operation) -> None:
        """Have *operation* done."""
        self._waiting.append(operation)
        self._send(asyncio.get_running_loop().time())

    def put_paced(self, operation: Operation, under_way: int) -> None:
        """Have *operation* done, with those of others if many turns are *under_way* and few of them wait."""
        self._waiting.append(operation)
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = self._sent_at + _PACE_SECONDS
        if due <= now or len(self._waiting) * _WORTH_IT >= under_way:
            self._send(now)
        else:
            self._send_at(loop, due)

    def put_later(self, operation: Settle | Authorize | Recall) -> None:
        """Have *operation* done in a moment: nobody waits for it, and a transaction of its own would cost more than the turn."""
        self._waiting.append(operation)
        if len(self._waiting) >= _GATHERED:
            self._send(asyncio.get_running_loop().time())
        elif self._timer is None:
            # One that is there is not later.
            loop = asyncio.get_running_loop()
            self._send_at(loop, loop.time() + _GATHER_SECONDS)

    def _send_at(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = loop.call_at(due, self._send, due)

    def _send(self, now: float) -> None:
        """Have the thread take what waits."""
        self._sent_at = now
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._wake.is_set():
            self._wake.set()

    def start(self, promise: asyncio.Future[Any]) -> None:
        """Open the database; *promise* hears how that went."""
        self._thread = threading.Thread(target=self._run, args=(promise,), name="ledger", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait for the end of the thread; whether it has come."""
        if self._thread is not None:
            self._thread.join(seconds)
            return not self._thread.is_alive()
        return True

    @property
    def is_away(self) -> bool:
        """Whether settlements go to the spool."""
        return bool(self._trouble) or self._has_handed_over

    @property
    def is_full(self) -> bool:
        """Whether nothing should begin, because its end could not be written down."""
        return self._spool.is_full

    def statistics(self) -> WriterStatistics:
        """Return how it goes."""
        return WriterStatistics(
            waiting=len(self._waiting),
            settled=self._settled,
            reaped=self._reaped,
            shortfalls=self._shortfalls,
            refused=self._refused,
            spooled=self._spool.rows + len(self._spool.kept),
            is_spool_full=self._spool.is_full,
            trouble=self._trouble,
        )

    # -- the thread ------------------------------------------------------------------------

    def _run(self, promise: asyncio.Future[Any]) -> None:
        try:
            self._open()
            # What a process has left that is no more comes first: its holds are its users' money.
            self._read_spools()
            self._release_dead()
        except BaseException as exc:
            self._spool.close()
            self._base.give_up()
            self._answer([(promise, None, exc)])
            return
        self._answer([(promise, None, None)])
        while True:
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            try:
                if self._round():
                    return
            except Exception:
                # Whatever it is, the next round may do better; a thread that is gone never would.
                logger.exception("the ledger's writer failed")

    def _round(self) -> bool:
        """Do what waits, and leave what comes meanwhile to the next round; True at the end of the thread."""
        self._look()
        left = len(self._waiting)
        while left > 0 and (batch := self._take(left)):
            left -= len(batch) if isinstance(batch, list) else 1
            try:
                if isinstance(batch, Errand):
                    if self._run_errand(batch):
                        return True
                elif isinstance(batch, Work):
                    self._do_work(batch)
                else:
                    self._do(batch)
            except Exception:
                # Nobody may wait for ever; who has heard already does not hear it twice.
                self._answer([
                    (one.promise, None, _not_now())
                    for one in (batch if isinstance(batch, list) else [batch])
                    if one.promise is not None
                ])
                if isinstance(batch, Errand) and batch.name == "end":
                    logger.exception("the ledger's writer failed")
                    return True
                raise
            self._look()
        return False

    def _take(self, most: int) -> list[Decided] | Work | Errand | None:
        """Take what is done together: up to *most* turns as far as there are any, or one other thing."""
        waiting = self._waiting
        batch: list[Decided] = []
        most = min(most, _MOST_TOGETHER)
        while waiting and len(batch) < most:
            first = waiting[0]
            if isinstance(first, (Work, Errand)):
                if batch:
                    break
                waiting.popleft()
                return first
            batch.append(first)
            waiting.popleft()
        return batch or None

    def _run_errand(self, errand: Errand) -> bool:
        if errand.name == "hand over":
            self._hand_over()
        elif errand.name == "take back":
            self._has_handed_over = False
            self._look_at = self._retry_at = 0.0
            self._look()
        elif errand.name == "look":
            self._look_at = 0.0
            self._look()
            if not self.is_away:
                try:
                    self._release_dead()
                    self._forget_windows()
                except Away as exc:
                    self._went_away(str(exc))
        elif errand.name == "end":
            self._end()
        if errand.promise is not None:
            self._answer([(errand.promise, None, None)])
        return errand.name == "end"

    def _end(self) -> None:
        # A last try; what is not on disk then is lost: its hold is released by whoever comes next.
        if self._spool.kept and not self._spool.put(()):
            logger.error("%d settlements could not be written anywhere", len(self._spool.kept))
        # Whoever has taken over sees by it that nothing more comes.
        self._spool.close(is_awaited=self._has_handed_over)
        if self._is_open and not self._base.is_alone:
            with contextlib.suppress(Away):
                self._transaction(
                    lambda connection: connection.execute(
                        delete(processes).where(processes.c.id == self._process)
                    ),
                    is_trial=True,
                )
        self._close()

    def _hand_over(self) -> None:
        """Let another process write; from now on what comes goes to a spool, which that one reads.

        On a server both can write, and there is nothing to hand over.
        """
        if not self._base.is_alone:
            return
        # It is there before the lock is free: the other one must not think that nobody is left.
        if self._spool.open():
            # Asked a second time, or while the database is away, what was set aside before is still there.
            self._lendable = self._set_aside_loans() or self._lendable
        self._close()
        self._has_handed_over = True

    def _set_aside_loans(self) -> dict[str, int]:
        """Set aside half of what each balance has free, and return it by user.

        Callers on connections that this process still has are served from it: they must not hear of a restart, and the
        other process must not spend the same money.
        """
        if self._mode != "billing" or self.is_away:
            return {}
        free = select(users.c.id, users.c.balance - users.c.held).where(
            users.c.is_billed, users.c.status == "active", users.c.balance > users.c.held
        )
        at = self._at()
        lendable: dict[str, int] = {}
        try:
            found = self._transaction(lambda connection: connection.execute(free).all())
            lendable = {user_id: nanos - nanos // 2 for user_id, nanos in found}
            loans = [
                Authorize(Hold(self._loan_of(user_id), user_id, "", nanos, at, at, ""), True, None)
                for user_id, nanos in lendable.items()
            ]
            for start in range(0, len(loans), _MOST_TOGETHER):
                self._apply([*loans[start : start + _MOST_TOGETHER]])
            # What the database would not have is not there to be spent.
            own = select(holds.c.user_id, holds.c.nanos).where(
                holds.c.process == self._process, holds.c.request_id.startswith(LOAN, autoescape=True)
            )
            written = {
                row.user_id: row.nanos
                for row in self._transaction(lambda connection: connection.execute(own).all())
            }
            lendable = {user_id: written.get(user_id, 0) for user_id in lendable}
        except Exception as exc:
            # No restart comes to nothing for it.
            reason = exc if isinstance(exc, Away) else type(exc).__name__
            logger.warning("requests that are to be paid are refused during the restart: %s", reason)
            # Some of it may be set aside: that is to be released, and nothing is to be spent.
            return dict.fromkeys(lendable, 0)
        return lendable

    def _loan_of(self, user_id: str) -> str:
        return f"{LOAN}{self._process}~{user_id}"

    def _call_in_loans(self) -> None:
        """Have what was lent to turns set aside for them, and the rest released.

        Only when that can be written: until then another process may book turns that end, and release their loans.
        """
        at = self._at()
        back: list[Decided] = [Drop(self._loan_of(user_id), user_id, "", at) for user_id in self._lendable]
        for lent in self._loans.values():
            for one in lent:
                # It was given, whatever budgets say by now.
                if isinstance(one, Authorize):
                    back.append(Authorize(replace(one.hold, budgets=()), one.is_billed, None))
                else:
                    back.append(replace(one, budgets=(), promise=None))
        # Before those that were reaped since.
        self._unsure = [*back, *self._unsure]
        self._lendable = {}
        self._loans.clear()

    def _close(self) -> None:
        self._book = None
        self._is_open = False
        self._base.give_up()

    # -- the database ----------------------------------------------------------------------

    def _open(self) -> None:
        self._base.open()
        try:
            self._transaction(self._enter)
        except BaseException:
            self._base.give_up()
            raise
        self._is_open = True
        self._know_everybody(self._transaction(_everybody))
        if not self._base.is_alone:
            # While it is there, and locked, this process is alive, whatever its machine is called.
            self._spool.open()

    def _enter(self, connection: Connection) -> None:
        changes.make_owner(connection, self._at())
        if not self._base.is_alone:
            own = processes.c.id == self._process
            if (
                connection.execute(update(processes).where(own).values(beats=processes.c.beats + 1)).rowcount
                == 0
            ):
                connection.execute(insert(processes).values(id=self._process, beats=0, started=self._at()))

    def _transaction(self, work: Callable[[Connection], Any], *, is_trial: bool = False) -> Any:
        for _ in range(_TRIES - 1):
            with contextlib.suppress(Again):
                return self._base.transaction(work, is_trial=is_trial)
        try:
            return self._base.transaction(work, is_trial=is_trial)
        except Again as exc:
            if exc.is_taken and exc.__cause__ is not None:
                raise exc.__cause__ from None
            raise Away(f"it is too busy: {exc}") from exc

    def _look(self) -> None:
        """Find out whether the database is there, and whether something has come in another way."""
        now = self._monotonic()
        if self._has_handed_over or now < (self._retry_at if self._trouble else self._look_at):
            return
        self._look_at = now + _LOOK_SECONDS
        if self._trouble and self._spool.kept:
            # It may be that only the database is away now.
            self._spool.put(())
        try:
            if not self._is_open:
                self._open()
                self._release_dead()
            elif self._trouble:
                # To read is not enough: a disk may be full.
                self._transaction(changes.touch, is_trial=True)
            self._settle_kept()
            self._recovered()
            self._read_spools()
            if not self._base.is_alone:
                self._spool.open()
                self._follow_others()
        except (Away, NotOpened) as exc:
            self._went_away(str(exc))
        except Exception as exc:
            # What waits is not to wait for this.
            logger.exception("the ledger's writer failed")
            self._went_away(type(exc).__name__)

    def _went_away(self, reason: str) -> None:
        self._book = None
        if not self._trouble:
            logger.error("the ledger cannot be written: %s; tried again until it works", reason)
        self._trouble = reason
        self._retry_at = self._monotonic() + self._retry_seconds
        self._retry_seconds = min(self._retry_seconds * 2, _LAST_RETRY_SECONDS)

    def _recovered(self) -> None:
        if self._trouble:
            logger.warning("the ledger can be written again")
        self._trouble = ""
        self._retry_seconds = _FIRST_RETRY_SECONDS
        if self._spool.rows:
            # It is over, and read like any other.
            if self._base.is_alone:
                self._spool.close()
            else:
                self._spool.renew()

    def _settle_kept(self) -> None:
        """Write what is only in memory, and release what may have been set aside in vain."""
        self._call_in_loans()
        kept, unsure = self._spool.kept, self._unsure
        if kept or unsure:
            self._spool.kept, self._unsure = [], []
            try:
                is_there = self._apply([*unsure, *[Settle(one) for one in kept]])
            except Away:
                self._spool.kept += kept
                self._unsure += unsure
                raise
            if not is_there:
                # What is left of it comes before everything else.
                raise Away(self._trouble)

    # -- on a server, with others ------------------------------------------------------------

    def _follow_others(self) -> None:
        """Show that this process is alive, and know what another one has changed."""
        is_due = self._monotonic() >= self._beat_at
        found, everyone = self._transaction(lambda connection: self._beat(connection, is_due=is_due))
        if is_due:
            self._beat_at = self._monotonic() + _BEAT_SECONDS
        self._version = found
        if everyone is not None:
            self._book = None
            self._know_everybody(everyone)

    def _beat(self, connection: Connection, *, is_due: bool) -> tuple[int, Everybody | None]:
        if is_due:
            self._enter(connection)
        found = changes.version(connection)
        return found, None if found == self._version else _everybody(connection)

    def _know_everybody(self, everyone: Everybody) -> None:
        self._tell(News([], [], [], [], everyone))

    # -- turns -----------------------------------------------------------------------------

    def _do(self, batch: list[Decided]) -> None:
        if self._blind:
            self._mark_blind(batch)
        if self.is_away:
            self._do_without(batch)
        else:
            self._try(batch)

    def _try(self, batch: list[Decided]) -> bool:
        """Do *batch* with the database, or without it; whether the database is still there."""
        try:
            return self._apply(batch)
        except Exception as exc:
            if not isinstance(exc, Away):
                # A mistake of ours must not leave anybody waiting.
                logger.exception("the ledger's writer failed")
            self._went_away(str(exc) or type(exc).__name__)
            at = self._at()
            for one in batch:
                if isinstance(one, Authorize) and one.is_billed and not one.is_allotted:
                    hold = one.hold
                    self._unsure.append(Drop(hold.request_id, hold.user_id, hold.key_id, at))
            self._do_without(batch)
            return False

    def _mark_blind(self, batch: list[Decided]) -> None:
        """Mark turns that end and have had more without a look, also when the database is back by now."""
        for one in batch:
            if isinstance(one, Settle):
                if self._blind.pop(one.settlement.request_id, 0):
                    one.settlement = replace(one.settlement, flags=(*one.settlement.flags, BLIND))
            elif isinstance(one, Reap):
                self._blind.pop(one.request_id, None)

    def _apply(self, batch: list[Decided]) -> bool:
        """Decide and write *batch*, and tell what came of it.

        Returns:
            False when the database went away while it was done in parts, and what was left was done without it.

        Raises:
            Away: If it is not known to be written.
        """
        try:
            book, answers = self._transaction(lambda connection: self._decide(connection, batch))
        except Exception as exc:
            self._book = None
            _note_tried(batch)
            if isinstance(exc, Away):
                raise
            return self._apply_apart(batch, exc)
        done = book.changes
        self._settled += len(done.charges)
        self._reaped += sum(1 for one in done.charges if one.settlement.end == "lost")
        self._shortfalls += sum(1 for one in done.charges if one.shortfall)
        for one in done.counters.values():
            self._spent[one.owner, one.window] = one.start, one.until, one.spent
        balances = [(one.id, one.balance, one.held, one.is_past_due) for one in done.accounts.values()]
        if self._base.is_alone:
            book.written()
            self._book = book
        if balances or answers or done.answered:
            self._tell(News(answers, balances, [], [], allotted=done.answered))
        return True

    def _apply_apart(self, batch: list[Decided], error: Exception) -> bool:
        """Do one by one what could not be written together, so that one that cannot be written harms no other."""
        if len(batch) > 1:
            half = len(batch) // 2
            if self._try(batch[:half]):
                return self._try(batch[half:])
            self._do_without(batch[half:])
            return False
        (one,) = batch
        if isinstance(one, Recall):
            # Nothing of it is in the database.
            book = Book(self._mode, self._process, self._allotted)
            one.decide(book)
            book.written()
            return True
        if _is_owed(one) and one.tried < _TRIES:
            return self._try(batch)
        logger.error(
            "the database will not have an operation kind=%s request=%s error=%s",
            type(one).__name__, one.request_id, type(error).__name__,
        )  # fmt: skip
        if isinstance(one, Settle):
            of = one.settlement
            if ODD not in of.flags:
                # Once more without what may be wrong with it: what was served is paid.
                bare = replace(of, flags=(ODD,), prices={}, attempts=(), budgets=())
                return self._try([Settle(bare, one.promise)])
            self._refused += 1
            keep_refused(self._folder, of)
            # That it was there is written down all the same, and nothing stays held.
            is_there = self._try([Reap(of.request_id, of.user_id, of.key_id, self._at())])
        else:
            is_there = True
        refusal = LedgerAway("what this request costs cannot be written down")
        if one.promise is not None:
            self._answer([(one.promise, None, refusal)])
        return is_there

    def _decide(self, connection: Connection, batch: Sequence[Decided]) -> tuple[Book, list[Answer]]:
        book, self._book = self._book, None
        is_new = book is None
        if book is None:
            book = Book(self._mode, self._process, self._allotted)
        loader = rows.Loader(connection, book, is_alone=self._base.is_alone)
        if is_new and self._base.is_alone:
            loader.load_all_holds()
        wanted = Wanted(book)
        for one in batch:
            one.want(wanted)
        loader.load(wanted)
        answers: list[Answer] = []
        for one in batch:
            value: bool | None = None
            error: BaseException | None = None
            try:
                value = one.decide(book)
            except ProxyError as exc:
                error = exc
            if one.promise is not None:
                answers.append((one.promise, value, error))
        rows.write(connection, book.changes)
        return book, answers

    # -- without the database --------------------------------------------------------------

    def _do_without(self, batch: Sequence[Decided]) -> None:
        """Do what can be done: settlements are kept, and what would need a look at a balance is refused."""
        _note_tried(batch)
        answers: list[Answer] = []
        settlements: list[Settlement] = []
        for one in batch:
            value: Any = None
            error: ProxyError | None = None
            match one:
                case Settle():
                    settlement = self._with_loan(one.settlement)
                    settlements.append(settlement)
                    self._spend(settlement)
                case Authorize() if one.is_allotted:
                    # It has begun, and what it has taken is still there.
                    self._unsure.append(one)
                case Authorize():
                    error = self._why_not(one)
                    # There is nothing that could grow.
                    value = False
                case TopUp():
                    given = self._blind.get(one.request_id, 0)
                    value = not one.is_billed or self._lend(one)
                    if not value and given < BLIND_TOP_UPS:
                        value = True
                        self._blind[one.request_id] = given + 1
                case Reap():
                    # Nobody will ask for it again; what was lent is still its own if it ends after all.
                    self._unsure.append(one)
                    value = False
                case Drop() | Recall():
                    self._unsure.append(one)
            if one.promise is not None:
                answers.append((one.promise, value, error))
        if settlements:
            self._spool.put(settlements)
        self._answer(answers)

    def _why_not(self, asked: Authorize) -> ProxyError | None:
        """Return why a turn may not begin now; None when it may."""
        hold = asked.hold
        for owner, budget in hold.budgets:
            start, until, spent = self._spent.get((owner, budget.window), (0, 0, 0))
            if start <= hold.at < until and spent + max(1, hold.nanos) > budget.nanos:
                return used_up(budget, until, hold.at)
        if self._spool.is_full or (asked.is_billed and not self._lend(asked)):
            return LedgerAway("what this request costs cannot be written down now; try again in a moment")
        return None

    def _spend(self, settlement: Settlement) -> None:
        if settlement.cost:
            for owner in {settlement.user_id, settlement.key_id}:
                for window in Window:
                    start, until, spent = self._spent.get((owner, window), (0, 0, 0))
                    if start <= settlement.at < until:
                        self._spent[owner, window] = start, until, spent + settlement.cost

    def _lend(self, asked: Authorize | TopUp) -> bool:
        """Give a turn of what was set aside for this process before it handed over; False when that is not enough."""
        of = asked.hold if isinstance(asked, Authorize) else asked
        left = self._lendable.get(of.user_id, 0)
        if not self._has_handed_over or left < of.nanos:
            return False
        self._lendable[of.user_id] = left - of.nanos
        self._loans.setdefault(of.request_id, []).append(asked)
        return True

    def _with_loan(self, settlement: Settlement) -> Settlement:
        """Return *settlement* with what it has used up of what was lent: whoever books it releases that.

        The rest can be lent again. Few turns could begin otherwise, because they are lent many times what they cost.
        """
        loans = self._loans.pop(settlement.request_id, ())
        lent = sum(one.hold.nanos if isinstance(one, Authorize) else one.nanos for one in loans)
        if not lent:
            return settlement
        used = min(max(0, settlement.cost or 0), lent)
        if settlement.user_id in self._lendable:
            self._lendable[settlement.user_id] += lent - used
        return replace(settlement, lent=used, lender=self._loan_of(settlement.user_id))

    # -- everything else -------------------------------------------------------------------

    def _do_work(self, work: Work) -> None:
        news = News([], [], [], [])
        value: Any = None
        error: BaseException | None = None
        if self.is_away:
            error = _not_now()
        else:
            try:
                value, news.users, news.keys, news.everybody, found = self._transaction(
                    lambda connection: _work(connection, work)
                )
                if found == self._version + 1:
                    # It was this change alone, and its rows are known.
                    self._version = found
            except Away as exc:
                self._went_away(str(exc))
                error = _not_now()
            except Exception as exc:
                error = exc
            if not work.is_quiet:
                # It may have changed what the book remembers.
                self._book = None
        if work.promise is not None:
            news.answers.append((work.promise, value, error))
        self._tell(news)

    def _answer(self, answers: list[Answer]) -> None:
        if answers:
            self._tell(News(answers, [], [], []))

    def _at(self) -> int:
        return round(self._now() * 1_000.0)

    # -- what others have left -------------------------------------------------------------

    def _read_spools(self) -> None:
        """Write what this process, or another one, could not."""
        try:
            paths = spools_in(self._folder)
        except OSError as exc:
            logger.warning("spools cannot be looked for: %s", exc.strerror or type(exc).__name__)
            return
        for path in paths:
            if path == self._spool.path:
                continue
            reader = self._spools.setdefault(path, SpoolReader(path))
            # Before it is read to its end.
            is_over = reader.is_over()
            try:
                for found in reader.read():
                    for part in _parts(found, reader):
                        self._apply(part)
                        # Whoever waits does not wait for all of it.
                        self._serve()
                if is_over:
                    self._spools.pop(path, None)
                    if reader.is_damaged:
                        set_apart(path)
                    path.unlink(missing_ok=True)
                    of = process_of(path)
                    # One that has another spool is not gone: this one is from a time when its database was away.
                    if of not in {self._process, *map(process_of, spools_in(self._folder))}:
                        self._release([of])
            except FileNotFoundError:
                self._spools.pop(path, None)
            except OSError as exc:
                logger.warning("a spool cannot be read path=%s: %s", path, exc.strerror or type(exc).__name__)
        left = [path for path in paths if process_of(path) == self._process and path != self._spool.path]
        if not self._trouble and not any(map(Path.exists, left)):
            self._spool.emptied()

    def _serve(self) -> None:
        # Once: where somebody always waits the rest would never have its turn.
        if self._waiting and not isinstance(self._waiting[0], Work | Errand):
            batch = self._take(_MOST_TOGETHER)
            assert isinstance(batch, list)
            self._do(batch)

    def _release_dead(self) -> None:
        """Release what processes hold that are no more."""
        living = {self._process, *[process_of(path) for path in spools_in(self._folder)]}
        if self._base.is_alone:
            holding = self._transaction(_holding)
            self._release([one for one in holding if one not in living])
            return
        now = self._monotonic()
        holding, beats = self._transaction(lambda connection: (_holding(connection), _beats(connection)))
        dead = []
        for one in {*holding, *beats} - living:
            # No clock but our own: one that was set, here or there, is nobody's death.
            seen, since = self._beats.get(one, (None, now))
            if seen != beats.get(one, -1):
                self._beats[one] = beats.get(one, -1), now
            elif now - since > _DEAD_SECONDS:
                dead.append(one)
        self._release(dead)

    def _forget_windows(self) -> None:
        """Delete the counters of windows that are over; a clock that is set back has them counted together again."""
        at = self._at()
        gone = self._transaction(
            lambda connection: (
                connection.execute(delete(counters).where(counters.c.until < at - _KEPT_WINDOWS)).rowcount
            )
        )
        if gone:
            self._book = None
        for key in [key for key, (_, until, _) in self._spent.items() if until < at - _KEPT_WINDOWS]:
            del self._spent[key]

    def _release(self, dead: list[str]) -> None:
        if not dead:
            return
        found = self._transaction(
            lambda connection: connection.execute(
                select(holds.c.request_id, holds.c.user_id, holds.c.key_id).where(holds.c.process.in_(dead))
            ).all()
        )
        at = self._at()
        for start in range(0, len(found), _MOST_TOGETHER):
            # What is left of a loan was nobody's.
            self._apply([
                (Drop if row[0].startswith(LOAN) else Reap)(row[0], row[1], row[2], at)
                for row in found[start : start + _MOST_TOGETHER]
            ])
        lost = sum(1 for row in found if not row[0].startswith(LOAN))
        if lost:
            logger.warning("turns were lost with the process that served them count=%d", lost)
        if not self._base.is_alone:
            self._transaction(
                lambda connection: connection.execute(delete(processes).where(processes.c.id.in_(dead)))
            )


def _not_now() -> LedgerAway:
    return LedgerAway("the ledger cannot be written now; try again in a moment")


def _is_owed(one: Decided) -> TypeGuard[Authorize | Reap | Drop]:
    """Tell whether nobody would ask for it again: a turn that has begun, or a release."""
    return isinstance(one, Reap | Drop) or (isinstance(one, Authorize) and one.is_allotted)


def _note_tried(batch: Sequence[Decided]) -> None:
    for one in batch:
        if isinstance(one, Authorize | Reap | Drop):
            one.tried += 1


def _parts(found: list[dict[str, Any]], reader: SpoolReader) -> Iterator[list[Decided]]:
    for start in range(0, len(found), _MOST_TOGETHER):
        part: list[Decided] = []
        for row in found[start : start + _MOST_TOGETHER]:
            try:
                part.append(Settle(settlement_of(row)))
            except ValueError as exc:
                logger.error("a line of a spool was left out: %s", exc)
                reader.is_damaged = True
        yield part


def _holding(connection: Connection) -> list[str]:
    return list(connection.execute(select(holds.c.process).distinct()).scalars())


def _beats(connection: Connection) -> dict[str, int]:
    return {row.id: row.beats for row in connection.execute(select(processes.c.id, processes.c.beats))}


def _everybody(connection: Connection) -> Everybody:
    return Everybody(*changes.everybody(connection))


def _work(
    connection: Connection, work: Work
) -> tuple[Any, list[User], list[tuple[Key, bytes | None, int | None]], Everybody | None, int]:
    """Do it; return what it gives, what it has changed of users and keys, and the version after it."""
    value = work.work(connection)
    if work.is_quiet:
        return value, [], [], None, 0
    concerned = work.users if work.concerns is None else work.concerns(value)
    if work.concerns is None and not work.users and not work.keys:
        changes.note_change(connection)
        return value, [], [], _everybody(connection), changes.version(connection)
    found_users = [
        changes.user_of(row) for row in connection.execute(select(users).where(users.c.id.in_(concerned)))
    ]
    found_keys = [
        changes.known_key_of(row)
        for row in connection.execute(select(client_keys).where(client_keys.c.id.in_(work.keys)))
    ]
    return value, found_users, found_keys, None, changes.version(connection)
