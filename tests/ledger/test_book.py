"""The book by itself: whatever is asked of it, and in whatever order, the money adds up."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from codex_proxy.errors import BudgetUsedUp, KeyRefused, OutOfFunds
from codex_proxy.ledger.book import Account, Book, Changes, Charge, Counter, KeyFacts, Reserved, Settled
from codex_proxy.ledger.model import Budget, Hold, Window
from codex_proxy.ledger.windows import DAY, bounds
from tests.ledger.making import NOON, Holder, settlement

USERS = ("ann", "bob")
REQUESTS = ("a", "b")
WINDOWS = (Window.DAY, Window.TOTAL, Window.HOURS_5)


def of(user: str) -> Holder:
    return Holder(user, f"key of {user}")


def new_book(mode: str = "billing", **balances: int) -> Book:
    book = Book("personal" if mode == "personal" else "billing", "here")
    for user in USERS:
        book.accounts[user] = Account(user, "active", True, balances.get(user, 0), 0, False)
        book.keys[of(user).key_id] = KeyFacts("active", None)
    return book


def ask(
    user: str, request_id: str, nanos: int, at: int = NOON, budgets: tuple[tuple[str, Budget], ...] = ()
) -> Hold:
    return Hold(request_id, user, of(user).key_id, nanos, at, at + 1_000, "m", budgets)


class Books(RuleBasedStateMachine):
    """A book and a database of dictionaries, into which several steps are written together, or none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts: dict[str, Account] = {}
        self.holds: dict[str, Reserved] = {}
        self.usage: dict[str, Charge] = {}
        self.entries: dict[str, list[int]] = defaultdict(list)
        self.days: dict[tuple[int, str, str, str], list[int]] = defaultdict(lambda: [0] * 10)
        self.counters: dict[tuple[str, Window, int], Counter] = {}
        self.book: Book | None = None
        self.is_written = True

    @initialize(balances=st.lists(st.integers(0, 200), min_size=2, max_size=2))
    def begin(self, balances: list[int]) -> None:
        for user, balance in zip(USERS, balances, strict=True):
            self.accounts[user] = Account(user, "active", True, balance, 0, False)
            self.entries[user].append(balance)

    # -- what a writer does

    def load(self) -> Book:
        if self.book is None:
            book = new_book()
            book.accounts = {user: replace(one) for user, one in self.accounts.items()}
            for hold in self.holds.values():
                book.add_hold(replace(hold))
            for counter in self.counters.values():
                book.add_counter(replace(counter), is_new=False)
            self.book = book
        book = self.book
        self.is_written = False
        for request_id, charge in self.usage.items():
            one = charge.settlement
            known = Settled(request_id, one.end, one.at, one.user_id, one.key_id, one.model)
            book.settled.setdefault(request_id, known)
        return book

    def need(self, book: Book, budgets: tuple[tuple[str, Budget], ...], at: int) -> None:
        for owner, budget in budgets:
            if book.counter(owner, budget.window, at) is None:
                start, until = bounds(budget.window, at)
                spent = sum(
                    charge.cost or 0
                    for charge in [*self.usage.values(), *book.changes.charges]
                    if owner in (charge.settlement.user_id, charge.settlement.key_id)
                    and start <= charge.settlement.at < until
                )
                book.add_counter(Counter(owner, budget.window, start, until, spent), is_new=True)

    @rule()
    def write(self) -> None:
        book = self.load()
        self.is_written = True
        done: Changes = book.changes
        for request_id in done.released:
            del self.holds[request_id]
        for request_id, hold in done.granted.items():
            assert request_id not in self.holds
            self.holds[request_id] = replace(hold)
        for request_id, hold in done.grown.items():
            self.holds[request_id] = replace(hold)
        for request_id in done.undone:
            assert self.usage.pop(request_id).settlement.end == "lost"
        for charge in done.charges:
            assert charge.settlement.request_id not in self.usage
            self.usage[charge.settlement.request_id] = charge
            if charge.debit:
                self.entries[charge.settlement.user_id].append(-charge.debit)
        for place, sums in done.days.items():
            self.days[place] = [a + b for a, b in zip(self.days[place], sums, strict=True)]
        for key, counter in done.counters.items():
            self.counters[key] = replace(counter)
        for user, account in done.accounts.items():
            self.accounts[user] = replace(account)
        book.written()

    # -- what can happen

    @rule(
        user=st.sampled_from(USERS),
        request_id=st.sampled_from(REQUESTS),
        nanos=st.integers(0, 120),
        hours=st.integers(-30, 30),
        windows=st.sets(st.sampled_from(WINDOWS)),
        limit=st.integers(0, 300),
        of_user=st.booleans(),
    )
    def authorize(
        self,
        user: str,
        request_id: str,
        nanos: int,
        hours: int,
        windows: set[Window],
        limit: int,
        of_user: bool,
    ) -> None:
        request_id = f"{user}-{request_id}"
        if request_id in self.load().holds or request_id in self.load().settled:
            return
        at = NOON + hours * 3_600_000
        owner = user if of_user else of(user).key_id
        budgets = tuple((owner, Budget(window, limit)) for window in sorted(windows, key=str))
        book = self.load()
        self.need(book, budgets, at)
        free = book.accounts[user].balance - book.accounts[user].held
        try:
            book.authorize(ask(user, request_id, nanos, at, budgets))
        except BudgetUsedUp:
            assert nanos <= free
        except OutOfFunds:
            assert nanos > free or budgets
        else:
            assert nanos <= free
            for _, budget in budgets:
                counter = book.counter(owner, budget.window, at)
                assert counter is not None
                assert counter.spent + book.held.get(owner, 0) <= budget.nanos

    @rule(user=st.sampled_from(USERS), request_id=st.sampled_from(REQUESTS), nanos=st.integers(-5, 120))
    def top_up(self, user: str, request_id: str, nanos: int) -> None:
        book = self.load()
        free = book.accounts[user].balance - book.accounts[user].held
        is_open = f"{user}-{request_id}" in book.holds
        assert book.top_up(f"{user}-{request_id}", nanos) is (is_open and 0 <= nanos <= free)

    @rule(
        user=st.sampled_from(USERS),
        request_id=st.sampled_from(REQUESTS),
        cost=st.one_of(st.none(), st.integers(-5, 400)),
        hours=st.integers(-30, 30),
        is_billed=st.booleans(),
    )
    def settle(self, user: str, request_id: str, cost: int | None, hours: int, is_billed: bool) -> None:
        book = self.load()
        others = sum(
            hold.nanos for hold in book.holds.values() if hold.user_id == user and hold.request_id != f"{user}-{request_id}"
        )  # fmt: skip
        before = book.settled.get(f"{user}-{request_id}")
        done = book.settle(
            settlement(
                of(user), f"{user}-{request_id}", cost, at=NOON + hours * 3_600_000, is_billed=is_billed
            )
        )
        assert done is (before is None or before.end == "lost")
        # What others have set aside is still there.
        assert book.accounts[user].balance >= others

    @rule(user=st.sampled_from(USERS), request_id=st.sampled_from(REQUESTS))
    def reap(self, user: str, request_id: str) -> None:
        book = self.load()
        is_open = f"{user}-{request_id}" in book.holds
        is_new = f"{user}-{request_id}" not in book.settled
        assert book.reap(f"{user}-{request_id}", NOON) is (is_open and is_new)

    @rule(user=st.sampled_from(USERS), request_id=st.sampled_from(REQUESTS))
    def drop(self, user: str, request_id: str) -> None:
        book = self.load()
        book.drop(f"{user}-{request_id}")

    @rule()
    def forget(self) -> None:
        """What was decided could not be written, or the process is a new one."""
        self.book = None
        self.is_written = True

    # -- what is always true

    @invariant()
    def it_adds_up(self) -> None:
        if not self.is_written:
            return
        for user, account in self.accounts.items():
            assert 0 <= account.held <= account.balance
            assert account.held == sum(hold.nanos for hold in self.holds.values() if hold.user_id == user)
            assert account.balance == sum(self.entries[user])
            own = [charge for charge in self.usage.values() if charge.settlement.user_id == user]
            assert sum(charge.cost or 0 for charge in own if charge.is_billed) == sum(
                charge.debit + charge.shortfall for charge in own
            )
            assert sum(charge.debit for charge in own) == -sum(self.entries[user][1:])
            assert account.is_past_due is any(charge.shortfall for charge in own)
        for counter in self.counters.values():
            assert counter.spent == sum(
                charge.cost or 0
                for charge in self.usage.values()
                if counter.owner in (charge.settlement.user_id, charge.settlement.key_id)
                and counter.start <= charge.settlement.at < counter.until
            )
        for (day, user, key, model), sums in self.days.items():
            own = [
                charge
                for charge in self.usage.values()
                if (charge.settlement.at // DAY, charge.settlement.user_id) == (day, user)
                and (charge.settlement.key_id, charge.settlement.model) == (key, model)
            ]
            assert sums[0] == len(own)
            assert sums[7:] == [
                sum(charge.cost or 0 for charge in own),
                sum(charge.debit for charge in own),
                sum(charge.shortfall for charge in own),
            ]


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_who_is_not_known_or_suspended_or_has_no_key_any_more_begins_nothing() -> None:
    book = new_book(ann=100)
    with pytest.raises(KeyRefused):
        book.authorize(ask("nobody", "a", 1))
    book.accounts["ann"].status = "suspended"
    with pytest.raises(KeyRefused):
        book.authorize(ask("ann", "a", 1))
    book.accounts["ann"].status = "active"
    book.keys["key of ann"] = KeyFacts("revoked", None)
    with pytest.raises(KeyRefused):
        book.authorize(ask("ann", "a", 1))
    book.keys["key of ann"] = KeyFacts("active", NOON)
    with pytest.raises(KeyRefused):
        book.authorize(ask("ann", "a", 1))
    # A key of the configuration is not in the database.
    del book.keys["key of ann"]
    book.authorize(ask("ann", "a", 1))
    assert book.changes.granted.keys() == {"a"}


def test_in_personal_mode_nobody_pays() -> None:
    book = new_book("personal", ann=0)
    book.authorize(ask("ann", "a", 1_000))
    assert book.accounts["ann"].held == 0
    assert book.held == {"ann": 1_000, "key of ann": 1_000}
    book.settle(settlement(of("ann"), "a", 5, is_billed=False))
    assert [charge.debit for charge in book.changes.charges] == [0]
    assert book.held == {"ann": 0, "key of ann": 0}


@pytest.mark.parametrize(
    ("window", "moment", "start", "until"),
    [
        (Window.DAY, "2026-11-26T23:59:59.999", "2026-11-26", "2026-11-27"),
        (Window.WEEK, "2026-11-26T00:00", "2026-11-23", "2026-11-30"),
        (Window.WEEK, "2026-11-23T00:00", "2026-11-23", "2026-11-30"),
        (Window.WEEK, "2026-11-22T23:59", "2026-11-16", "2026-11-23"),
        (Window.MONTH, "2028-02-29T12:00", "2028-02-01", "2028-03-01"),
        (Window.MONTH, "2026-12-31T23:59", "2026-12-01", "2027-01-01"),
        (Window.HOURS_5, "2026-12-31T23:59", "2026-12-31T23:59", "2027-01-01T04:59"),
    ],
)
def test_windows_are_those_of_the_calendar(window: Window, moment: str, start: str, until: str) -> None:
    def at(text: str) -> int:
        return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1_000)

    assert bounds(window, at(moment)) == (at(start), at(until))
    first, last = bounds(Window.TOTAL, at(moment))
    assert first <= at(moment) < last
