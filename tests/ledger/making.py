"""Ledgers, people and turns made by hand."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from codex_proxy.clock import Clock, ManualClock
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import AttemptRow, Budget, Hold, Key, Limits, Mode, Settlement, User
from codex_proxy.ledger.windows import DAY
from codex_proxy.storage.lock import StoreLock
from codex_proxy.trace import UsageSource
from tests.ledger.conftest import Database

NOON = 1_800_000_000_000 // DAY * DAY + DAY // 2
"""A moment in the middle of a day, in milliseconds."""

DOLLAR = 1_000_000_000

Budgets = tuple[tuple[str, Budget], ...]


def clock(at: int = NOON) -> ManualClock:
    """Return a clock that stands at *at*."""
    return ManualClock(at / 1_000)


def make(
    database: Database,
    *,
    mode: Mode = "billing",
    at: Clock | None = None,
    lock: StoreLock | None = None,
    **options: Any,
) -> Ledger:
    """Return a ledger, not started."""
    return Ledger(
        database.folder,
        mode=mode,
        clock=at or clock(),
        lock=lock or StoreLock(database.folder),
        database_url=database.url,
        **options,
    )


@contextlib.asynccontextmanager
async def running(
    database: Database,
    *,
    mode: Mode = "billing",
    at: Clock | None = None,
    lock: StoreLock | None = None,
    **options: Any,
) -> AsyncIterator[Ledger]:
    """A ledger, from its start to its end, after which everything has to add up."""
    ledger = make(database, mode=mode, at=at, lock=lock, **options)
    await ledger.start()
    try:
        yield ledger
    finally:
        await ledger.aclose()


@dataclass(slots=True, frozen=True)
class Holder:
    """A user with a key and money."""

    user_id: str
    key_id: str


async def holder(
    ledger: Ledger,
    nanos: int = 10 * DOLLAR,
    *,
    name: str = "team",
    is_billed: bool = True,
    limits: Limits | None = None,
) -> Holder:
    """Make a user with a key and *nanos*."""
    user: User = await ledger.create_user(name, is_billed=is_billed, limits=limits or Limits(), actor="test")
    key, _ = await ledger.create_key(user.id, "laptop", actor="test")
    if nanos:
        await ledger.credit(
            user.id, nanos, reason="to begin with", idempotency_key=f"first {name}", actor="test"
        )
    return Holder(user.id, key.id)


def hold(
    of: Holder | Key, request_id: str, nanos: int = DOLLAR, *, at: int = NOON, budgets: Budgets = ()
) -> Hold:
    """Return what a turn sets aside."""
    key_id = of.id if isinstance(of, Key) else of.key_id
    return Hold(request_id, of.user_id, key_id, nanos, at, at + 600_000, "gpt-5.5", budgets)


def settlement(
    of: Holder, request_id: str, cost: int | None = DOLLAR, *, at: int = NOON, **fields: Any
) -> Settlement:
    """Return what is settled of a turn that was answered."""
    values: dict[str, Any] = {
        "route": "responses", "asked_model": "gpt-5.5", "model": "gpt-5.5", "tier": "", "target": "work",
        "upstream": "", "client": "codex", "end": "completed", "status": 200, "error": "", "input_tokens": 1_000,
        "cached_tokens": 800, "cache_write_tokens": 0, "output_tokens": 50, "reasoning_tokens": 20,
        "source": UsageSource.BACKEND, "flags": (), "is_billed": True, "prices": {"input": "1.25"},
        "price_id": "p", "milliseconds": 1_500, "attempts": (AttemptRow("work", "ok", 200, 1_500),),
    }  # fmt: skip
    return Settlement(request_id, of.user_id, of.key_id, at, cost=cost, **{**values, **fields})


def money(ledger: Ledger, of: Holder) -> tuple[int, int]:
    """Return a user's balance, and what of it is held."""
    user = ledger.directory.user(of.user_id)
    assert user is not None
    return user.balance, user.held
