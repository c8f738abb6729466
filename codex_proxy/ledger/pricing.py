"""An owner's own prices in the database, and the prices of what was used before made anew.

Plain functions of a connection, for `Ledger.read` and `Ledger.write`; `Pricing` is the book that turns are priced by,
renewed when an owner changes something.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, insert, or_, select, update

from codex_proxy.errors import RequestError
from codex_proxy.ledger.changes import adjust, note_audit
from codex_proxy.ledger.prices import STANDARD, Cost, OwnPrice, Price, PriceBook, cost, read_price
from codex_proxy.ledger.tables import counters, prices, state, usage, usage_days
from codex_proxy.ledger.windows import DAY
from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.tasks import Job
from codex_proxy.trace import Usage

T = TypeVar("T")

_MODEL = re.compile(r"[\x21-\x7e]{1,256}")
# Of one transaction: while it lasts no turn can set anything aside.
_SLICE = 200
_LOOK_SECONDS = 1.0
"""How soon a change by another process counts after it was heard of."""

_MOST_MOMENT = 1 << 53


class Database(Protocol):
    """What is needed of a ledger here."""

    on_change: list[Callable[[], None]]

    async def read(self, question: Callable[[Connection], T]) -> T: ...

    async def write(
        self, work: Callable[[Connection], T], *, concerns: Callable[[T], tuple[str, ...]] | None = None
    ) -> T: ...


class Pricing:
    """The prices that count, and what an owner does to them."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        """Begin with the package's own prices; *now* is the wall clock."""
        self._database = database
        self._now = now
        self._is_stale = False
        # What was read before a change must not be taken in after what was read since.
        self._loading = asyncio.Lock()
        database.on_change.append(self._note_change)
        self.book = PriceBook.load()

    def jobs(self) -> list[Job]:
        """Return what runs by itself: a look at what other processes have changed."""
        return [Job("prices", lambda: _LOOK_SECONDS, self._look)]

    async def load(self) -> None:
        """Take in the owner's prices as they are now."""
        async with self._loading:
            self._is_stale = False
            own = tuple(await self._database.read(own_prices))
            if own != self.book.own:
                self.book = self.book.with_own(own)

    def _note_change(self) -> None:
        self._is_stale = True

    async def _look(self) -> None:
        if self._is_stale:
            await self.load()

    async def set(
        self, model: object, tier: object, since: object, definition: Mapping[str, Any], *, actor: str
    ) -> OwnPrice:
        """Set a price from a moment on (epoch milliseconds; None: from now on).

        Raises:
            RequestError: If something does not fit; it names the field.
        """
        at = int(self._now() * 1000)
        price = await self._database.write(
            lambda connection: set_price(
                connection, model=model, tier=tier, since=since, definition=definition, actor=actor, at=at
            )
        )
        await self.load()
        return price

    async def end(self, id: int, *, actor: str) -> OwnPrice:  # noqa: A002 -- its column
        """Have one of the owner's prices, and all before it, count no more; the package's counts again.

        Raises:
            RequestError: If there is no such price, or another one has taken its place.
        """
        at = int(self._now() * 1000)
        price = await self._database.write(
            lambda connection: end_price(connection, id=id, actor=actor, at=at)
        )
        await self.load()
        return price

    async def rerate(
        self,
        *,
        since: int,
        until: int | None = None,
        model: str | None = None,
        reason: str,
        actor: str,
        is_dry: bool = False,
    ) -> "Rerated":
        """Price again what was used from *since* up to *until* (epoch milliseconds; None: now).

        What it costs more or less is taken or given back, with a ledger entry for each turn. Done in slices, so
        that turns go on meanwhile; each slice is whole by itself, and a second run does only what is left.

        Raises:
            RequestError: If something does not fit.
        """
        at = int(self._now() * 1000)
        wanted = check_span(since, at if until is None else until, model, reason)
        total, after, book = Rerated(), 0, self.book
        while True:
            place = after

            def work(connection: Connection, place: int = place) -> tuple[Rerated, int | None]:
                return rerate_slice(connection, book, wanted, place, actor=actor, at=at, is_dry=is_dry)

            done, following = await (
                self._database.read(work)
                if is_dry
                else self._database.write(work, concerns=lambda found: tuple(found[0].moved))
            )
            total.add(done)
            if following is None:
                break
            after = following
        if not is_dry:
            await self._database.write(lambda connection: _note_rerated(connection, wanted, total, actor, at))
        return total


# -- an owner's prices -----------------------------------------------------------------------


def own_prices(connection: Connection) -> list[OwnPrice]:
    """Return the owner's prices, and their ends, the oldest row first."""
    return [_own(row) for row in connection.execute(select(prices).order_by(prices.c.id))]


def _own(row: Row[Any]) -> OwnPrice:
    price = None
    if row.definition is not None:
        price = _price(row.id, row.model, row.tier, row.since, loads(row.definition))
    return OwnPrice(row.id, row.model, row.tier, row.since, price)


def _price(id: int, model: str, tier: str, since: int, definition: object) -> Price:  # noqa: A002
    return read_price(definition, id=f"own/{id}", model=model, tier=tier, since=since)


def set_price(
    connection: Connection,
    *,
    model: object,
    tier: object,
    since: object,
    definition: Mapping[str, Any],
    actor: str,
    at: int,
) -> OwnPrice:
    """Set a price of the owner's own.

    Raises:
        RequestError: If something does not fit; it names the field.
    """
    if not isinstance(model, str) or not _MODEL.fullmatch(model):
        raise RequestError("model is no model name", param="model")
    tier = STANDARD if tier is None else tier
    if not isinstance(tier, str):
        raise RequestError("tier is no text", param="tier")
    since = at if since is None else since
    if isinstance(since, bool) or not isinstance(since, int) or not 0 <= since < _MOST_MOMENT:
        raise RequestError("effective_from is no moment", param="effective_from")
    try:
        _price(0, model, tier, since, definition)
    except ValueError as exc:
        raise RequestError(str(exc), param=str(exc).partition(":")[0]) from exc
    return _insert(connection, model, tier, since, definition, actor, at)


def end_price(connection: Connection, *, id: int, actor: str, at: int) -> OwnPrice:  # noqa: A002 -- its column
    """End a price of the owner's own, now or, if it would count only later, before it does.

    Raises:
        RequestError: If there is no such price, or another one has taken its place.
    """
    row = connection.execute(select(prices).where(prices.c.id == id)).first()
    if row is None or row.definition is None:
        raise RequestError("there is no such price", param="price", code="price_not_found", status=404)
    rivals = (prices.c.model == row.model, prices.c.tier == row.tier, prices.c.since <= max(row.since, at))
    last = connection.execute(
        select(prices).where(*rivals).order_by(prices.c.since.desc(), prices.c.id.desc()).limit(1)
    ).one()
    if last.id != row.id:
        # To end it would end the one that counts.
        raise RequestError(
            "this price counts no more already: another one, or its end, has taken its place",
            param="price",
            code="price_not_current",
            status=409,
        )
    return _insert(connection, row.model, row.tier, max(row.since, at), None, actor, at)


def _insert(
    connection: Connection,
    model: str,
    tier: str,
    since: int,
    definition: Mapping[str, Any] | None,
    actor: str,
    at: int,
) -> OwnPrice:
    text = None if definition is None else dumps(definition).decode()
    row = connection.execute(
        insert(prices)
        .values(model=model, tier=tier, since=since, definition=text, created=at, actor=actor)
        .returning(prices)
    ).one()
    # So that other processes look.
    connection.execute(update(state).values(version=state.c.version + 1))
    said = {"tier": tier, "since": since}
    note_audit(
        connection,
        at=at,
        actor=actor,
        action="price.end" if definition is None else "price.set",
        target=model,
        after=said if definition is None else {**said, **definition},
    )
    return _own(row)


# -- history ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Rerated:
    """What pricing again has come to; money is nanodollars."""

    turns: int = 0
    """How many were looked at."""
    changed: int = 0
    unpriced: int = 0
    """How many have no price now; they stay as they are."""
    before: int = 0
    """What those that changed had cost."""
    after: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    """By user: what was given back, or with a minus taken."""
    shortfall: int = 0
    """What there was no money for."""

    def add(self, other: "Rerated") -> None:
        """Add what a slice has come to."""
        for name in ("turns", "changed", "unpriced", "before", "after", "shortfall"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        # As `Counter.__add__` would, but for those below zero.
        for user, nanos in other.moved.items():
            self.moved[user] += nanos


@dataclass(slots=True, frozen=True)
class Span:
    """Which turns are priced again, and why."""

    since: int
    until: int
    model: str | None
    reason: str


def check_span(since: object, until: object, model: object, reason: object) -> Span:
    """Return what is to be priced again.

    Raises:
        RequestError: If something does not fit; it names the field.
    """
    for name, moment in (("since", since), ("until", until)):
        if isinstance(moment, bool) or not isinstance(moment, int) or not 0 <= moment < _MOST_MOMENT:
            raise RequestError(f"{name} is no moment", param=name)
    assert isinstance(since, int)
    assert isinstance(until, int)
    if until <= since:
        raise RequestError("until is not after since", param="until")
    if model is not None and (not isinstance(model, str) or not _MODEL.fullmatch(model)):
        raise RequestError("model is no model name", param="model")
    if not isinstance(reason, str) or not 1 <= len(reason.strip()) <= 200 or not reason.isprintable():
        raise RequestError("reason must be a text of 1 to 200 characters on one line", param="reason")
    return Span(since, until, model, reason)


_COLUMNS = (
    "id", "request_id", "user_id", "key_id", "at", "model", "tier", "input_tokens", "cached_tokens",
    "cache_write_tokens", "output_tokens", "reasoning_tokens", "cost", "is_billed", "debit", "shortfall",
    "price_id", "milliseconds",
)  # fmt: skip


def rerate_slice(
    connection: Connection,
    book: PriceBook,
    wanted: Span,
    after: int,
    *,
    actor: str,
    at: int,
    is_dry: bool,
) -> tuple[Rerated, int | None]:
    """Price again the turns that follow the row *after*; return what came of it, and where to go on."""
    done = Rerated()
    question = (
        select(*(usage.c[name] for name in _COLUMNS))
        .where(*_conditions(wanted, after))
        .order_by(usage.c.id)
        .limit(_SLICE)
    )
    if not is_dry:
        # Another process may be doing the same; whoever comes second finds what the first has made of it.
        question = question.with_for_update()
    rows = connection.execute(question).all()
    for row in rows:
        done.turns += 1
        # By what counted when it began, as it was priced then.
        price = book.find(row.model, row.at - row.milliseconds, row.tier)
        if price is None:
            done.unpriced += 1
            continue
        counted = Usage(
            row.input_tokens,
            row.cached_tokens,
            row.cache_write_tokens,
            row.output_tokens,
            row.reasoning_tokens,
        )
        fresh = cost(price, counted)
        if fresh.nanos == row.cost:
            continue
        done.changed += 1
        done.before += row.cost or 0
        done.after += fresh.nanos
        debit, shortfall, moved = _moved(connection, row, fresh, wanted, actor=actor, at=at, is_dry=is_dry)
        if moved:
            done.moved[row.user_id] += moved
        done.shortfall += shortfall - row.shortfall
        if not is_dry:
            _put(connection, row, fresh, debit, shortfall)
    return done, rows[-1].id if len(rows) == _SLICE else None


def _conditions(wanted: Span, after: int) -> Iterator[ColumnElement[bool]]:
    yield usage.c.id > after
    yield usage.c.at >= wanted.since
    yield usage.c.at < wanted.until
    # Nobody knows what a lost one has used; and what was released has cost nothing.
    yield or_(usage.c.input_tokens > 0, usage.c.output_tokens > 0)
    if wanted.model is not None:
        yield usage.c.model == wanted.model


def _moved(
    connection: Connection, row: Row[Any], fresh: Cost, wanted: Span, *, actor: str, at: int, is_dry: bool
) -> tuple[int, int, int]:
    """Take or give back what a turn costs more or less; return its debit and shortfall now, and what was moved."""
    if not row.is_billed:
        return 0, 0, 0
    difference = fresh.nanos - (row.cost or 0)
    # What nobody has paid is not given back.
    forgiven = min(row.shortfall, max(0, -difference))
    asked = -difference - forgiven
    moved = asked
    if asked and not is_dry:
        moved = adjust(
            connection,
            row.user_id,
            asked,
            reason=f"priced again: {wanted.reason}",
            actor=actor,
            at=at,
            request_id=row.request_id,
        )
    debit = row.debit - moved
    return debit, fresh.nanos - debit, moved


def _put(connection: Connection, row: Row[Any], fresh: Cost, debit: int, shortfall: int) -> None:
    """Write a turn's new cost wherever it was added up."""
    difference = fresh.nanos - (row.cost or 0)
    connection.execute(
        update(usage)
        .where(usage.c.id == row.id)
        .values(
            cost=fresh.nanos,
            debit=debit,
            shortfall=shortfall,
            prices=dumps(dict(fresh.prices)).decode(),
            price_id=fresh.price_id,
        )
    )
    connection.execute(
        update(usage_days)
        .where(
            usage_days.c.day == row.at // DAY,
            usage_days.c.user_id == row.user_id,
            usage_days.c.key_id == row.key_id,
            usage_days.c.model == row.model,
        )
        .values(
            priced=usage_days.c.priced + int(row.cost is None),
            cost=usage_days.c.cost + difference,
            debit=usage_days.c.debit + (debit - row.debit),
            shortfall=usage_days.c.shortfall + (shortfall - row.shortfall),
        )
    )
    connection.execute(
        update(counters)
        .where(
            counters.c.owner.in_((row.user_id, row.key_id)),
            counters.c.start <= row.at,
            counters.c.until > row.at,
        )
        .values(spent=counters.c.spent + difference)
    )


def _note_rerated(connection: Connection, wanted: Span, total: Rerated, actor: str, at: int) -> None:
    note_audit(
        connection,
        at=at,
        actor=actor,
        action="usage.rerate",
        target=wanted.model or "all models",
        after={
            "since": wanted.since,
            "until": wanted.until,
            "reason": wanted.reason,
            "turns": total.turns,
            "changed": total.changed,
            "unpriced": total.unpriced,
            "before": total.before,
            "after": total.after,
        },
    )
