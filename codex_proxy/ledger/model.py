"""What the ledger knows, as values. Times are epoch milliseconds, money is nanodollars."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from codex_proxy.trace import UsageSource

Mode = Literal["personal", "billing"]

OWNER_ID = "owner"
"""The user that is always there and is never billed: whoever owns the proxy, with the keys of the configuration."""


class Window(enum.Enum):
    """For how long a budget is; by UTC, but for the five hours, which begin with the first use."""

    HOURS_5 = "5h"
    DAY = "day"
    WEEK = "week"
    """From Monday."""
    MONTH = "month"
    TOTAL = "total"


@dataclass(slots=True, frozen=True)
class Budget:
    """How much may be spent within a window."""

    window: Window
    nanos: int


@dataclass(slots=True, frozen=True)
class Limits:
    """What a key, or a user with all its keys, may do; None and empty mean: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    budgets: tuple[Budget, ...] = ()
    models: tuple[str, ...] = ()
    """Patterns of model names, as in `model-map`."""
    endpoints: tuple[str, ...] = ()
    """Names of what is asked for: responses, chat, completions, edits, embeddings, messages, compact, search, images."""
    networks: tuple[str, ...] = ()
    """From where it may be used, as CIDR."""

    @property
    def has_rates(self) -> bool:
        """Whether something is counted by the minute."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


NO_LIMITS = Limits()

UserStatus = Literal["active", "suspended"]
KeyStatus = Literal["active", "revoked"]


@dataclass(slots=True, frozen=True)
class User:
    """Somebody who owns keys, and the money they spend."""

    id: str
    name: str
    status: UserStatus
    is_billed: bool
    """Whether its turns are paid from its balance; of one that is not, only what they would have cost is kept."""
    balance: int
    held: int
    """The part of the balance that turns under way have set aside."""
    limits: Limits
    created: int
    is_past_due: bool = False
    """A turn has cost more than there was."""


@dataclass(slots=True, frozen=True)
class Key:
    """A client key, without its text."""

    id: str
    user_id: str
    name: str
    digest: bytes = field(repr=False)
    hint: str
    """Its first and last characters, as it may be shown."""
    status: KeyStatus
    expires: int | None
    limits: Limits
    created: int
    last_used: int | None = None
    """Written once a minute at most."""


@dataclass(slots=True)
class Hold:
    """Money set aside before a turn begins."""

    request_id: str
    """Ours, never a backend's: it is what keeps a turn from being paid twice."""
    user_id: str
    key_id: str
    nanos: int
    """0 where nothing is to be paid; budgets are looked at all the same."""
    at: int
    expires: int
    """When a hold that nobody has settled is taken for left behind."""
    model: str
    budgets: tuple[tuple[str, Budget], ...] = ()
    """Whose (a user's or a key's id) budgets have to have room for it."""


@dataclass(slots=True)
class AttemptRow:
    """One try of a turn on one target."""

    target: str
    """An account's alias or an upstream's name."""
    outcome: str
    status: int | None
    milliseconds: int


@dataclass(slots=True)
class Settlement:
    """What became of a turn; from it the usage row is written, and the debit."""

    request_id: str
    user_id: str
    key_id: str
    at: int
    route: str
    asked_model: str
    model: str
    """The one that was priced."""
    tier: str
    target: str
    """Who served; empty when nobody did."""
    upstream: str
    """The HTTP upstream's name; empty for an account."""
    client: str
    end: str
    status: int
    error: str
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    source: UsageSource
    flags: tuple[str, ...]
    """What was odd: "clamped"."""
    cost: int | None
    """What it costs; None when it has no price."""
    is_billed: bool
    """Whether it is paid from the user's balance."""
    prices: Mapping[str, str]
    """The unit prices it was made of, as decimal texts of dollars for a million tokens; empty without a price."""
    price_id: str
    milliseconds: int
    budgets: tuple[tuple[str, Budget], ...] = ()
    """As in its hold."""
    attempts: tuple[AttemptRow, ...] = ()
    lent: int = 0
    """What of *lender* it has used up, in a process that could not write the database any more."""
    lender: str = ""
    """A hold that is nobody's turn."""


EntryKind = Literal["debit", "credit", "adjust"]


@dataclass(slots=True, frozen=True)
class Entry:
    """One change of a balance; none is ever changed or deleted."""

    id: int
    user_id: str
    kind: EntryKind
    nanos: int
    """Negative for a debit."""
    balance_after: int
    at: int
    request_id: str
    """Of the turn that was paid; empty otherwise."""
    reason: str
    actor: str
