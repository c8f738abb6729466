"""What the admin API takes and gives, as types: they decode strictly, and its document is made of them.

Money is a decimal text of dollars, a time RFC 3339 in UTC. What is not named here is refused.
"""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MONEY_FORM = r"^-?[0-9]{1,10}(\.[0-9]{1,9})?$"

Money = Annotated[
    str,
    Meta(
        pattern=MONEY_FORM,
        description="Dollars as a decimal text, nine places at most.",
        examples=["12.50"],
    ),
]
Moment = Annotated[datetime, Meta(tz=True, description="RFC 3339.", examples=["2026-12-01T00:00:00Z"])]
Name = Annotated[str, Meta(min_length=1, max_length=100)]
Reason = Annotated[str, Meta(min_length=1, max_length=500, description="Why; it is kept for good.")]
Search = Annotated[str, Meta(max_length=200)]
Pattern = Annotated[str, Meta(min_length=1, max_length=200)]
Id = Annotated[str, Meta(min_length=1, max_length=128)]

MAX_PAGE = 500
Count = Annotated[int, Meta(ge=1, le=MAX_PAGE, description=f"How many at most, 1 to {MAX_PAGE}.")]
Many = Annotated[int, Meta(ge=1, le=100_000, description="How many at most.")]
Cursor = Annotated[str, Meta(max_length=64, description="`next` of the page before; without it, the newest.")]

Window = Literal["5h", "day", "week", "month", "total"]
Endpoint = Literal[
    "responses", "chat", "completions", "edits", "embeddings", "messages", "compact", "search", "images"
]  # fmt: skip


class Shape(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One object of the API."""


class Nothing(Shape, frozen=True, kw_only=True):
    """Nothing is to be said."""


# -- limits -------------------------------------------------------------------------------


class Budget(Shape, frozen=True, kw_only=True):
    """How much may be spent within a window; by UTC, but for the five hours, which begin with the first use."""

    window: Window
    amount: Money


class Limits(Shape, frozen=True, kw_only=True):
    """What a key, or a user with all its keys, may do; what is null or empty is no limit."""

    requests_per_minute: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    tokens_per_minute: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    budgets: Annotated[list[Budget], Meta(max_length=5)] = []
    models: Annotated[
        list[Pattern], Meta(max_length=100, description="Names of models; `*` stands for anything.")
    ] = []
    endpoints: Annotated[list[Endpoint], Meta(max_length=9)] = []
    networks: Annotated[
        list[Pattern],
        Meta(
            max_length=100,
            description="From where it may be used: addresses or networks.",
            examples=[["192.0.2.0/24"]],
        ),
    ] = []


class BudgetStanding(Shape, frozen=True, kw_only=True):
    """How a budget stands, and whose it is."""

    of: Literal["key", "user"]
    window: Window
    amount: Money
    spent: Money
    resets_at: datetime | None
    """None where it never begins anew, or has not begun."""


class Budgets(Shape, frozen=True, kw_only=True):
    """How budgets stand."""

    budgets: list[BudgetStanding]


# -- users and money ----------------------------------------------------------------------


class User(Shape, frozen=True, kw_only=True):
    """Somebody who owns keys, and the money they spend."""

    id: str
    name: str
    status: Literal["active", "suspended"]
    is_billed: bool
    """Whether its turns are paid from its balance."""
    balance: Money
    held: Money
    available: Money
    is_past_due: bool
    limits: Limits
    keys: int
    created_at: datetime


class UserList(Shape, frozen=True, kw_only=True):
    """Users that were asked for, by name."""

    users: list[User]
    total: int
    """How many there are, whatever the limit."""


class UserQuery(Shape, frozen=True, kw_only=True):
    """Which users."""

    q: Annotated[Search, Meta(description="Part of a name or an id.")] = ""
    status: Literal["active", "suspended"] | None = None
    limit: Many = 100_000


class NewUser(Shape, frozen=True, kw_only=True):
    """A user to be made."""

    name: Name
    is_billed: bool | None = None
    """Left out: as the ledger's mode has it."""
    limits: Limits = Limits()


class UserChange(Shape, frozen=True, kw_only=True):
    """What is to be changed of a user; what is left out stays. Limits are replaced as a whole."""

    name: Name | UnsetType = UNSET
    status: Literal["active", "suspended"] | UnsetType = UNSET
    is_billed: bool | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET


class Payment(Shape, frozen=True, kw_only=True):
    """A change of a balance."""

    amount: Money
    reason: Reason
    idempotency_key: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=128,
            description="The same one again changes nothing, and answers as the first time.",
        ),
    ]


class Entry(Shape, frozen=True, kw_only=True):
    """One change of a balance; none is ever changed or deleted."""

    id: str
    user_id: str
    user: str
    kind: Literal["debit", "credit", "adjust"]
    amount: Money
    balance_after: Money
    at: datetime
    request_id: str | None
    reason: str
    actor: str


class Entries(Shape, frozen=True, kw_only=True):
    """Changes of balances, the newest first."""

    entries: list[Entry]
    next: str | None


class EntryQuery(Shape, frozen=True, kw_only=True):
    """Which changes of balances."""

    user: Id | None = None
    limit: Count = 100
    before: Cursor | None = None


class PageQuery(Shape, frozen=True, kw_only=True):
    """Which part of a list."""

    limit: Count = 100
    before: Cursor | None = None


# -- keys ---------------------------------------------------------------------------------


class Key(Shape, frozen=True, kw_only=True):
    """A client key, without its text."""

    id: str
    name: str
    user_id: str
    user: str
    hint: str
    status: Literal["active", "revoked", "expired"]
    limits: Limits
    expires_at: datetime | None
    created_at: datetime
    last_used_at: datetime | None


class KeyList(Shape, frozen=True, kw_only=True):
    """Keys that were asked for, the newest first."""

    keys: list[Key]
    total: int
    """How many there are, whatever the limit."""


class KeyQuery(Shape, frozen=True, kw_only=True):
    """Which keys."""

    user: Id | None = None
    status: Literal["active", "revoked", "expired"] | None = None
    q: Annotated[Search, Meta(description="Part of a name, a hint or an id.")] = ""
    limit: Many = 100_000


class NewKey(Shape, frozen=True, kw_only=True):
    """A key to be made."""

    user: Id
    name: Name
    limits: Limits = Limits()
    expires_at: Moment | None = None


class KeyChange(Shape, frozen=True, kw_only=True):
    """What is to be changed of a key; what is left out stays. Limits are replaced as a whole."""

    name: Name | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET


class Rotation(Shape, frozen=True, kw_only=True):
    """How a key is replaced."""

    grace_seconds: Annotated[
        int, Meta(ge=0, le=30 * 86_400, description="For how long the old text goes on working.")
    ] = 0


class KeyWithSecret(Shape, frozen=True, kw_only=True):
    """A key, and its text: this once, because only a digest is kept."""

    key: Key
    secret: str


# -- the ledger ---------------------------------------------------------------------------


class LedgerStatus(Shape, frozen=True, kw_only=True):
    """How the ledger does."""

    mode: Literal["personal", "billing"]
    is_away: bool
    """Whether the database cannot be written now; what is settled meanwhile is kept aside and written later."""
    users: int
    keys: int
    balance: Money
    held: Money
    figures: dict[str, int | float | str | bool]
    """How the writer does."""


class CheckResult(Shape, frozen=True, kw_only=True):
    """Whether the money adds up."""

    ok: bool
    problems: list[str]


# -- audit --------------------------------------------------------------------------------


class AuditRow(Shape, frozen=True, kw_only=True):
    """One thing that an owner did."""

    id: str
    at: datetime
    actor: str
    action: str
    target: str
    before: str | None
    after: str | None


class Audit(Shape, frozen=True, kw_only=True):
    """What owners did, the newest first."""

    entries: list[AuditRow]
    next: str | None


class AuditQuery(Shape, frozen=True, kw_only=True):
    """Which of it."""

    actor: Search | None = None
    target: Search | None = None
    limit: Count = 100
    before: Cursor | None = None


# -- prices -------------------------------------------------------------------------------

PriceTier = Literal["standard", "flex", "batch", "priority", "ultrafast"]


class Rates(Shape, frozen=True, kw_only=True):
    """Unit prices: dollars for a million tokens. What is left out costs as the input does."""

    input: Money
    cached: Money | None = None
    cache_write: Money | None = None
    output: Money


class Price(Shape, frozen=True, kw_only=True):
    """What one model costs in one tier; unit prices in dollars for a million tokens."""

    id: str
    """Tells where it comes from."""
    own_id: str | None
    """What to end it by, if it is an owner's own."""
    model: str
    aliases: list[str]
    tier: str
    source: Literal["package", "own"]
    effective_from: datetime | None
    input: Money
    cached: Money
    cache_write: Money
    output: Money
    long: Rates | None
    """Of a request whose input has more than `long_above` tokens, and then for all of it."""
    long_above: int
    reads: int
    writes: int


class OwnPrice(Shape, frozen=True, kw_only=True):
    """A price that an owner has set, or (`price` is null) has ended."""

    id: str
    model: str
    tier: str
    effective_from: datetime
    price: Rates | None
    long: Rates | None


class PriceList(Shape, frozen=True, kw_only=True):
    """What counts now, and every price of an owner's own, the newest first."""

    prices: list[Price]
    own: list[OwnPrice]


class PriceQuery(Shape, frozen=True, kw_only=True):
    """Which prices."""

    model: Annotated[str, Meta(max_length=256, description="Only what counts for this name.")] = ""
    at: Annotated[datetime, Meta(tz=True, description="When; left out: now.")] | None = None


class NewPrice(Shape, frozen=True, kw_only=True):
    """A price of an owner's own, from a moment on; dollars for a million tokens."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    tier: PriceTier = "standard"
    effective_from: Moment | None = None
    """Left out: from now on."""
    input: Money
    cached: Money | None = None
    cache_write: Money | None = None
    output: Money
    long: Rates | None = None
    long_above: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    reads: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None
    """How many tokens a request reads at most; more is not believed."""
    writes: Annotated[int, Meta(ge=1, le=100_000_000)] | None = None


class Rerating(Shape, frozen=True, kw_only=True):
    """Which requests are priced again by what counts for their time now."""

    since: Moment
    until: Moment | None = None
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    reason: Annotated[str, Meta(min_length=1, max_length=200)]
    dry_run: bool = True
    """Only tell what would change."""


class Moved(Shape, frozen=True, kw_only=True):
    """What was given back to a user, or with a minus taken."""

    user_id: str
    user: str
    amount: Money


class Rerated(Shape, frozen=True, kw_only=True):
    """What pricing again has come to, or would."""

    dry_run: bool
    turns: int
    changed: int
    unpriced: int
    """How many have no price now; they stay as they are."""
    before: Money
    after: Money
    shortfall: Money
    moved: list[Moved]


# -- upstreams ----------------------------------------------------------------------------

Capability = Literal["responses", "chat", "completions", "engines", "edits", "embeddings", "messages"]
Models = Annotated[
    list[str | dict[str, str]],
    Meta(
        max_length=500,
        description="Names or patterns, `*` stands for anything; or a mapping of them to what the model is called there. None: all.",
    ),
]
UpstreamName = Annotated[str, Meta(min_length=1, max_length=64)]
UpstreamUrl = Annotated[str, Meta(min_length=1, max_length=2000, description="With or without `/v1`.")]
UpstreamKey = Annotated[str, Meta(max_length=4096, description="It is written, and never told again.")]


class HealthResult(Shape, frozen=True, kw_only=True):
    """What the last check of an upstream has found."""

    name: str
    state: Literal["normal", "abnormal", "unknown"]
    standing: Literal["healthy", "degraded", "ejected", "disabled", "unknown"]
    """How it is in the order of upstreams."""
    status: int | None
    seconds: float | None
    message: str
    models: int
    checked_at: datetime | None


class HealthCheck(Shape, frozen=True, kw_only=True):
    """What checks have found."""

    checked: int
    total: int
    results: list[HealthResult]


class Upstream(Shape, frozen=True, kw_only=True):
    """A provider over HTTP beside the accounts."""

    name: str
    base_url: str
    effective_url: str
    has_key: bool
    is_editable: bool
    """Not of one that stands in the configuration."""
    priority: int
    weight: float
    max_retries: int
    timeout: float
    enabled: bool
    models: list[str | dict[str, str]]
    capabilities: list[str]
    on_client_disconnect: str
    state: Literal["healthy", "degraded", "ejected", "disabled", "unknown"]
    reason: str | None
    check: HealthResult
    checked_at: datetime | None
    served_models: list[str]
    in_flight: int
    requests: int
    errors: int
    last_error: str | None
    last_used_at: datetime | None


class UpstreamList(Shape, frozen=True, kw_only=True):
    """All upstreams, by name."""

    upstreams: list[Upstream]
    can_add: bool
    """Whether there is a ledger to keep others in."""


class NewUpstream(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """An upstream to be added; what is left out is as in the configuration."""

    name: UpstreamName
    base_url: UpstreamUrl
    api_key: UpstreamKey | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    max_retries: int | UnsetType = UNSET
    timeout: float | UnsetType = UNSET
    """Seconds."""
    enabled: bool | UnsetType = UNSET
    models: Models | UnsetType = UNSET
    capabilities: list[Capability] | UnsetType = UNSET
    on_client_disconnect: Literal["drain", "cancel"] | UnsetType = UNSET


class UpstreamChange(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """What is to be changed of an upstream; what is left out stays."""

    base_url: UpstreamUrl | UnsetType = UNSET
    api_key: UpstreamKey | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    max_retries: int | UnsetType = UNSET
    timeout: float | UnsetType = UNSET
    """Seconds."""
    enabled: bool | UnsetType = UNSET
    models: Models | UnsetType = UNSET
    capabilities: list[Capability] | UnsetType = UNSET
    on_client_disconnect: Literal["drain", "cancel"] | UnsetType = UNSET


# -- usage --------------------------------------------------------------------------------

Group = Literal["user", "key", "model", "day"]


class Tokens(Shape, frozen=True, kw_only=True):
    """Tokens; `input_tokens` has cached and written ones in it, `output_tokens` the reasoning."""

    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int


class Attempt(Shape, frozen=True, kw_only=True):
    """One try of a request on one target."""

    target: str
    outcome: str
    status: int | None
    seconds: float


class UsageRow(Tokens, frozen=True, kw_only=True):
    """What one request has used."""

    request_id: str
    at: datetime
    user_id: str
    user: str
    key_id: str
    key: str
    route: str
    asked_model: str
    model: str
    tier: str
    target: str
    upstream: str
    client: str
    end: str
    status: int
    error: str
    source: str
    """`backend`, `estimate` or `none`."""
    flags: list[str]
    cost: Money | None
    """None: it has no price."""
    is_billed: bool
    debit: Money
    """What was taken from the balance."""
    shortfall: Money
    """What there was no money for."""
    prices: dict[str, str]
    """The unit prices that it was made of, dollars for a million tokens."""
    price_id: str
    seconds: float


class UsageDetail(UsageRow, frozen=True, kw_only=True):
    """What one request has used, and where it was tried."""

    attempts: list[Attempt]


class UsagePage(Shape, frozen=True, kw_only=True):
    """Usage, the newest first."""

    usage: list[UsageRow]
    next: str | None


class UsageFilter(Shape, frozen=True, kw_only=True):
    """Which usage."""

    user: Id | None = None
    key: Id | None = None
    model: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    since: Annotated[datetime, Meta(tz=True, description="RFC 3339, or seconds since 1970.")] | None = None
    until: Annotated[datetime, Meta(tz=True, description="The first moment that is not meant.")] | None = None


class UsageQuery(UsageFilter, frozen=True, kw_only=True):
    """Which part of which usage."""

    limit: Count = 100
    before: Cursor | None = None


class SumQuery(UsageFilter, frozen=True, kw_only=True):
    """Which usage, and how it is added up. Sums are of whole days of UTC."""

    by: Annotated[
        str,
        Meta(
            pattern=r"^(user|key|model|day)(,(user|key|model|day))*$",
            description="One or more of user, key, model and day, with commas between them.",
            examples=["key,day"],
        ),
    ] = "day"


class UsageTotal(Tokens, frozen=True, kw_only=True):
    """Usage added up."""

    turns: int
    unpriced: int
    """How many of them have no price."""
    cost: Money
    debit: Money
    shortfall: Money


class UsageSum(UsageTotal, frozen=True, kw_only=True):
    """Usage added up, for one user, key, model or day; null where it was not asked to be told apart."""

    user_id: str | None
    user: str | None
    key_id: str | None
    key: str | None
    model: str | None
    day: str | None


class UsageSums(Shape, frozen=True, kw_only=True):
    """Usage added up."""

    by: list[Group]
    sums: list[UsageSum]
    total: UsageTotal


# -- a key's holder -----------------------------------------------------------------------


class OwnUser(Shape, frozen=True, kw_only=True):
    """What a key's holder may know of its user."""

    is_billed: bool
    balance: Money
    available: Money
    is_past_due: bool
    limits: Limits


class Own(Shape, frozen=True, kw_only=True):
    """What a key's holder is told: its own key, what is left, and what it has used in the last 30 days."""

    key: Key
    user: OwnUser
    budgets: list[BudgetStanding]
    total: UsageTotal
    days: list[UsageSum]
    models: list[UsageSum]


class OwnQuery(Shape, frozen=True, kw_only=True):
    """Which part of its own usage."""

    limit: Count = 25
    before: Cursor | None = None
