"""Decides what turns may set aside and what they pay: no database, no clock.

A book holds the rows that some operations are about. They are decided in the order in which they came, and
what has to be written is gathered in `changes`; whether it could be written is not known here. What holds
before and after each: a balance covers what is held, which is what open holds hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from codex_proxy.errors import BudgetUsedUp, KeyRefused, OutOfFunds
from codex_proxy.ledger.allotments import Allotment
from codex_proxy.ledger.model import Budget, Hold, Mode, Settlement, Window
from codex_proxy.ledger.money import format_money
from codex_proxy.ledger.windows import DAY
from codex_proxy.trace import UsageSource

MOST_COST = 1_000_000 * 1_000_000_000
"""What one turn may cost. Beyond it something is wrong, and nine thousand of them can still be added up."""

_PART = 8
"""One in so many nanodollars of what there is may be allotted at a time."""

Budgets = Sequence[tuple[str, Budget]]
"""Whose (a user's or a key's id) budgets have to have room."""

LOAN = "loan~"
"""How the id of a hold begins that is no turn's, but what a process may spend of a balance that it cannot write any more."""

LOST = "lost"
"""How a turn has ended whose process has died, or that nobody has settled in time."""

_WORDS = {
    Window.HOURS_5: "five hours",
    Window.DAY: "a day",
    Window.WEEK: "a week",
    Window.MONTH: "a month",
    Window.TOTAL: "in all",
}


@dataclass(slots=True)
class Account:
    """What is looked at of a user."""

    id: str
    status: str
    is_billed: bool
    balance: int
    held: int
    is_past_due: bool


@dataclass(slots=True, frozen=True)
class KeyFacts:
    """What is looked at of a key."""

    status: str
    expires: int | None


@dataclass(slots=True)
class Reserved:
    """An open hold."""

    request_id: str
    user_id: str
    key_id: str
    nanos: int
    is_billed: bool
    """Whether it is part of what its user holds."""
    at: int
    model: str
    process: str


@dataclass(slots=True)
class Counter:
    """What was spent in one window of an owner's budget."""

    owner: str
    window: Window
    start: int
    until: int
    spent: int


@dataclass(slots=True, frozen=True)
class Settled:
    """A turn that has its usage row already; its fields say where it was added up."""

    request_id: str
    end: str
    at: int
    user_id: str
    key_id: str
    model: str


@dataclass(slots=True)
class Charge:
    """A usage row to be written, and the ledger entry of what was taken for it."""

    settlement: Settlement
    cost: int | None
    is_billed: bool
    debit: int
    """Nothing was taken where it is 0, and there is no entry."""
    shortfall: int
    balance_after: int


@dataclass(slots=True)
class Changes:
    """What differs from what was loaded."""

    accounts: dict[str, Account] = field(default_factory=dict)
    granted: dict[str, Reserved] = field(default_factory=dict)
    """Holds that were not there."""
    grown: dict[str, Reserved] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    """Holds that were there."""
    undone: list[str] = field(default_factory=list)
    """Usage rows of turns that were taken for lost and were not."""
    charges: list[Charge] = field(default_factory=list)
    counters: dict[tuple[str, Window, int], Counter] = field(default_factory=dict)
    days: dict[tuple[int, str, str, str], list[int]] = field(default_factory=dict)
    """What is added to the sums of a day, in the order of `tables.SUMS`."""
    allotted: dict[str, int] = field(default_factory=dict)
    """By how much more, or less, is allotted to a user or a key."""
    answered: list[tuple[Allotment, int, int]] = field(default_factory=list)
    """By how much allotments have grown of which that was asked, and as of which moment."""


class Wanted:
    """What *book* has to be given before some operations can be decided."""

    def __init__(self, book: "Book") -> None:
        self._book = book
        self.users: set[str] = set()
        self.keys: set[str] = set()
        self.requests: set[str] = set()
        """Turns of which it matters whether they hold something, or are settled."""
        self._begun: set[str] = set()
        """Those that begin among the operations, so that nothing is there of them."""
        self.owners: set[str] = set()
        """Users and keys whose counters matter."""
        self.budgets: dict[tuple[str, int], tuple[Budgets, list[int]]] = {}
        """Budgets and moments, each of which has to have its counters; by user and identity: turns of one key share theirs."""

    def begin(self, hold: Hold) -> None:
        """Add that a turn begins: its key is looked at, and there is nothing of it yet."""
        if hold.key_id not in self._book.keys:
            self.keys.add(hold.key_id)
        self._begun.add(hold.request_id)
        self._add(hold.user_id, hold.key_id, hold.budgets, hold.at)

    def go_on(self, request_id: str, user_id: str, key_id: str, budgets: Budgets, at: int) -> None:
        """Add something about a turn that was begun."""
        if request_id not in self._book.holds and request_id not in self._begun:
            self.requests.add(request_id)
        self._add(user_id, key_id, budgets, at)

    def _add(self, user_id: str, key_id: str, budgets: Budgets, at: int) -> None:
        book = self._book
        if not budgets and user_id in book.accounts and user_id in book.counters and key_id in book.counters:
            return
        if user_id not in book.accounts:
            self.users.add(user_id)
        if user_id not in book.counters:
            self.owners.add(user_id)
        if key_id not in book.counters:
            self.owners.add(key_id)
        if budgets:
            known = self.budgets.get((user_id, id(budgets)))
            if known is None:
                self.owners.update([owner for owner, _ in budgets if owner not in book.counters])
                self.budgets[user_id, id(budgets)] = budgets, [at]
            else:
                known[1].append(at)


class Book:
    """The rows that operations are about, and the operations."""

    def __init__(self, mode: Mode, process: str, allotted: dict[str, int] | None = None) -> None:
        """Make one; *allotted* is what the keys of users, and so users, have been allotted in all (`ledger.allotments`)."""
        self.mode = mode
        self.process = process
        self.allotted = {} if allotted is None else allotted
        self.accounts: dict[str, Account] = {}
        self.keys: dict[str, KeyFacts] = {}
        self.holds: dict[str, Reserved] = {}
        self.held: dict[str, int] = {}
        """What the open holds of a user, or a key, hold in all."""
        self.counters: dict[str, list[Counter]] = {}
        self.settled: dict[str, Settled | Settlement] = {}
        self.changes = Changes()

    # -- what is loaded --------------------------------------------------------------------

    def add_hold(self, hold: Reserved) -> None:
        """Take in a hold that is open."""
        self.holds[hold.request_id] = hold
        self._add_held(hold, hold.nanos)

    def counter(self, owner: str, window: Window, at: int) -> Counter | None:
        """Return the counter of the window that *at* is in, the fullest if there are several; None if it is not known.

        There are several windows of five hours when a clock was set back.
        """
        found: Counter | None = None
        for one in self.counters.get(owner, ()):
            if (
                one.window is window
                and one.start <= at < one.until
                and (found is None or one.spent > found.spent)
            ):
                found = one
        return found

    def add_counter(self, counter: Counter, *, is_new: bool) -> None:
        """Take in a counter; *is_new* says that it has to be written."""
        self.counters.setdefault(counter.owner, []).append(counter)
        if is_new:
            self._changed(counter)

    def written(self) -> None:
        """Know that the changes are written; what is loaded stays."""
        for owner in self.changes.allotted:
            if nanos := self._allotted(owner):
                self.allotted[owner] = nanos
            else:
                self.allotted.pop(owner, None)
        self.changes = Changes()
        # Turns that are over are asked for again by nobody, and would never end.
        self.settled.clear()

    # -- operations ------------------------------------------------------------------------

    def authorize(self, hold: Hold, *, is_allotted: bool = False) -> None:
        """Set aside what *hold* says; where that was allotted to its key, its turn has begun and is not asked again.

        Raises:
            KeyRefused: If its user or key may not be used any more.
            OutOfFunds: If there is not so much.
            BudgetUsedUp: If a budget has no room for it.
        """
        if is_allotted:
            self._allot(hold.user_id, hold.key_id, -hold.nanos)
        if hold.request_id in self.holds or hold.request_id in self.settled:
            return
        account = self.accounts.get(hold.user_id)
        nanos = hold.nanos if hold.nanos > 0 else 0
        if not is_allotted:
            self._check(hold, account, nanos)
        is_billed = account is not None and account.is_billed and self.mode == "billing"
        reserved = Reserved(
            hold.request_id, hold.user_id, hold.key_id, nanos, is_billed, hold.at, hold.model, self.process
        )
        self.holds[hold.request_id] = reserved
        self._hold(reserved, nanos)
        self.changes.granted[hold.request_id] = reserved

    def _check(self, hold: Hold, account: Account | None, nanos: int) -> None:
        if account is None or account.status != "active":
            raise KeyRefused("the owner of this key is suspended", code="user_suspended")
        key = self.keys.get(hold.key_id)
        if key is not None:
            # One of the configuration is not there, and not ours to end.
            if key.status != "active":
                raise KeyRefused("this key was revoked", code="key_revoked")
            if key.expires is not None and key.expires <= hold.at:
                raise KeyRefused("this key has expired", code="key_expired")
        if account.is_billed and self.mode == "billing" and self._free(account) < nanos:
            raise OutOfFunds(
                f"the balance does not reach: this request may cost {format_money(nanos)} dollars"
            )
        if hold.budgets:
            self._check_budgets(hold.budgets, hold.at, nanos)

    def allot(self, allotment: Allotment, nanos: int, budgets: Budgets, at: int) -> None:
        """Let *allotment* grow by *nanos*, if that is little of what there is."""
        account = self.accounts.get(allotment.user_id)
        grown = 0
        if account is not None and self._is_little(account, nanos, budgets, at):
            self._allot(allotment.user_id, allotment.key_id, nanos)
            grown = nanos
        self.changes.answered.append((allotment, grown, at))

    def recall(self, user_id: str, key_id: str) -> None:
        """End what was allotted to a key."""
        self._allot(user_id, key_id, -self._allotted(key_id))

    def recall_all(self) -> None:
        """End what was allotted to anybody."""
        self.changes.allotted = {owner: -nanos for owner, nanos in self.allotted.items()}

    def top_up(self, request_id: str, nanos: int, budgets: Budgets = (), at: int = 0) -> bool:
        """Let a hold grow by *nanos*; False when there is no room for it, or no such hold."""
        hold = self.holds.get(request_id)
        account = None if hold is None else self.accounts.get(hold.user_id)
        if hold is None or account is None or nanos < 0:
            return False
        if hold.is_billed and self._free(account) < nanos:
            return False
        try:
            self._check_budgets(budgets, at, nanos)
        except OutOfFunds:
            return False
        self._grow(hold, nanos)
        return True

    def settle(self, settlement: Settlement) -> bool:
        """Release the hold of a turn and take what it cost; False when that was done before.

        What other holds have set aside stays: what is not covered then is a shortfall.
        """
        request_id = settlement.request_id
        before = self.settled.get(request_id)
        self._release(request_id)
        if before is not None:
            if before.end != LOST or settlement.end == LOST:
                return False
            self._undo(request_id)
            self._day(before.at, before.user_id, before.key_id, before.model)[0] -= 1
        if settlement.lent:
            self._repay(settlement.lender, settlement.lent)
        cost = None if settlement.cost is None else min(max(0, settlement.cost), MOST_COST)
        account = self.accounts.get(settlement.user_id)
        is_billed = settlement.is_billed and account is not None
        debit = shortfall = balance = 0
        if account is not None and is_billed and cost:
            debit = min(cost, self._free(account))
            shortfall = cost - debit
            balance = account.balance = account.balance - debit
            if shortfall:
                account.is_past_due = True
            self.changes.accounts[account.id] = account
        self.changes.charges.append(Charge(settlement, cost, is_billed, debit, shortfall, balance))
        self._add_up(settlement, cost, debit, shortfall)
        self.settled[request_id] = settlement
        return True

    def drop(self, request_id: str) -> None:
        """Release a hold of a turn that never began."""
        self._release(request_id)

    def reap(self, request_id: str, at: int) -> bool:
        """Release a hold that nobody will settle, and say so in a usage row; False when there is none."""
        hold = self.holds.get(request_id)
        if hold is None:
            return False
        return self.settle(lost(hold, at))

    # -- parts -----------------------------------------------------------------------------

    def _free(self, account: Account) -> int:
        """Return what of a balance nobody has set aside."""
        return account.balance - account.held - self._allotted(account.id)

    def _allotted(self, owner: str) -> int:
        return self.allotted.get(owner, 0) + self.changes.allotted.get(owner, 0)

    def _allot(self, user_id: str, key_id: str, nanos: int) -> None:
        allotted = self.changes.allotted
        for owner in (user_id, key_id):
            allotted[owner] = allotted.get(owner, 0) + nanos

    def _is_little(self, account: Account, nanos: int, budgets: Budgets, at: int) -> bool:
        """Tell whether *nanos* are so little of balance and budgets that others do not miss them."""
        if account.is_billed and self.mode == "billing" and self._free(account) < nanos * _PART:
            return False
        try:
            self._check_budgets(budgets, at, nanos * _PART)
        except OutOfFunds:
            return False
        return True

    def _check_budgets(self, budgets: Budgets, at: int, nanos: int) -> None:
        for owner, budget in budgets:
            counter = self.counter(owner, budget.window, at)
            spent = 0 if counter is None else counter.spent
            # Nothing is left of one that is used up to the last, whatever a turn is expected to cost.
            if spent + self.held.get(owner, 0) + self._allotted(owner) + max(1, nanos) <= budget.nanos:
                continue
            raise used_up(budget, counter.until if counter is not None else at, at)

    def _hold(self, hold: Reserved, nanos: int) -> None:
        """Count *nanos* more, or less, as held."""
        if nanos:
            self._add_held(hold, nanos)
            if hold.is_billed:
                account = self.accounts[hold.user_id]
                account.held += nanos
                self.changes.accounts[account.id] = account

    def _add_held(self, hold: Reserved, nanos: int) -> None:
        # A loan has no key, and is nothing that any budget knows of.
        if hold.key_id:
            held = self.held
            held[hold.user_id] = held.get(hold.user_id, 0) + nanos
            held[hold.key_id] = held.get(hold.key_id, 0) + nanos

    def _release(self, request_id: str) -> None:
        hold = self.holds.pop(request_id, None)
        if hold is None:
            return
        self._hold(hold, -hold.nanos)
        self.changes.grown.pop(request_id, None)
        if self.changes.granted.pop(request_id, None) is None:
            self.changes.released.append(request_id)

    def _repay(self, lender: str, nanos: int) -> None:
        """Release what of a loan was a turn's."""
        loan = self.holds.get(lender)
        if loan is not None:
            self._grow(loan, -min(nanos, loan.nanos))

    def _grow(self, hold: Reserved, nanos: int) -> None:
        """Let an open hold be *nanos* larger, or smaller."""
        hold.nanos += nanos
        self._hold(hold, nanos)
        if hold.request_id not in self.changes.granted:
            self.changes.grown[hold.request_id] = hold

    def _add_up(self, settlement: Settlement, cost: int | None, debit: int, shortfall: int) -> None:
        sums = self._day(settlement.at, settlement.user_id, settlement.key_id, settlement.model)
        sums[0] += 1
        sums[2] += settlement.input_tokens
        sums[3] += settlement.cached_tokens
        sums[4] += settlement.cache_write_tokens
        sums[5] += settlement.output_tokens
        sums[6] += settlement.reasoning_tokens
        if cost is None:
            return
        sums[1] += 1
        sums[7] += cost
        sums[8] += debit
        sums[9] += shortfall
        if not cost:
            return
        for owner in {settlement.user_id, settlement.key_id}:
            for counter in self.counters.get(owner, ()):
                if counter.start <= settlement.at < counter.until:
                    counter.spent += cost
                    self._changed(counter)

    def _undo(self, request_id: str) -> None:
        charges = self.changes.charges
        kept = [one for one in charges if one.settlement.request_id != request_id]
        if len(kept) == len(charges):
            self.changes.undone.append(request_id)
        else:
            # It was only just taken for lost.
            self.changes.charges = kept

    def _day(self, at: int, user_id: str, key_id: str, model: str) -> list[int]:
        place = at // DAY, user_id, key_id, model
        sums = self.changes.days.get(place)
        if sums is None:
            sums = self.changes.days[place] = [0] * 10
        return sums

    def _changed(self, counter: Counter) -> None:
        self.changes.counters[counter.owner, counter.window, counter.start] = counter


def used_up(budget: Budget, until: int, at: int) -> OutOfFunds:
    """Return what is said of a budget that has no room before *until*."""
    words = f"the budget of {format_money(budget.nanos)} dollars ({_WORDS[budget.window]}) is used up"
    if budget.window is Window.TOTAL:
        return OutOfFunds(words)
    return BudgetUsedUp(words, resets_at=until / 1_000.0, retry_after=max(1.0, (until - at) / 1_000.0))


def lost(hold: Reserved, at: int) -> Settlement:
    """Return what is written down of a turn that nobody will settle."""
    return Settlement(
        hold.request_id,
        hold.user_id,
        hold.key_id,
        at,
        route="",
        asked_model=hold.model,
        model=hold.model,
        tier="",
        target="",
        upstream="",
        client="",
        end=LOST,
        status=0,
        error="",
        input_tokens=0,
        cached_tokens=0,
        cache_write_tokens=0,
        output_tokens=0,
        reasoning_tokens=0,
        source=UsageSource.NONE,
        flags=(),
        cost=None,
        is_billed=hold.is_billed,
        prices={},
        price_id="",
        milliseconds=max(0, at - hold.at),
    )
