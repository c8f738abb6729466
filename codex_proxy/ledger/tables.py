"""The tables of the ledger, in SQLite as in PostgreSQL. Times are epoch milliseconds, money is nanodollars.

What has been paid, and who changed what, is never changed again: the database itself refuses it.
"""

from pathlib import Path

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
)

from codex_proxy.storage.migrating import Schema

metadata = MetaData()

# In SQLite only a plain INTEGER is the row's own number.
_Number = BigInteger().with_variant(Integer, "sqlite")

state = Table(
    "state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Grows with every change of a user or a key, so that other processes notice.
    Column("version", BigInteger, nullable=False),
)
"""One row."""

users = Table(
    "users",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("status", String, nullable=False),
    Column("is_billed", Boolean, nullable=False),
    Column("balance", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    Column("is_past_due", Boolean, nullable=False),
    Column("limits", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    CheckConstraint("held >= 0 AND balance >= held", name="users_covered"),
)

client_keys = Table(
    "client_keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("user_id", String, ForeignKey(users.c.id), nullable=False),
    Column("name", String, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    # The text before the last change of it, for as long as it still does.
    Column("old_digest", LargeBinary, unique=True),
    Column("old_until", BigInteger),
    Column("hint", String, nullable=False),
    Column("status", String, nullable=False),
    Column("expires", BigInteger),
    Column("limits", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("last_used", BigInteger),
)
Index("client_keys_by_user", client_keys.c.user_id)

processes = Table(
    "processes",
    metadata,
    Column("id", String, primary_key=True),
    # Goes on as long as it lives; no clock is compared.
    Column("beats", BigInteger, nullable=False),
    Column("started", BigInteger, nullable=False),
)
"""Daemons that hold something."""

holds = Table(
    "holds",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    # Whether it is part of what its user holds.
    Column("is_billed", Boolean, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("model", String, nullable=False),
    Column("process", String, nullable=False),
    CheckConstraint("nanos >= 0", name="holds_not_negative"),
    sqlite_with_rowid=False,
)
# In SQLite there is one process, which remembers them all.
Index("holds_by_user", holds.c.user_id).ddl_if(dialect="postgresql")

counters = Table(
    "counters",
    metadata,
    # A user's or a key's id.
    Column("owner", String, primary_key=True),
    Column("period", String, primary_key=True),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    # The first moment after it.
    Column("until", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""What was spent in one window of a budget. One that is not there is counted together when it is asked for."""

usage = Table(
    "usage",
    metadata,
    Column("id", _Number, primary_key=True),
    # Asked for by how it begins too, which takes an order of bytes.
    Column(
        "request_id", String().with_variant(String(collation="C"), "postgresql"), nullable=False, unique=True
    ),
    Column("user_id", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("route", String, nullable=False),
    Column("asked_model", String, nullable=False),
    Column("model", String, nullable=False),
    Column("tier", String, nullable=False),
    Column("target", String, nullable=False),
    Column("upstream", String, nullable=False),
    Column("client", String, nullable=False),
    Column("end", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("error", String, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("cache_write_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("source", String, nullable=False),
    # Words with a space between them.
    Column("flags", String, nullable=False),
    # Without one it has no price.
    Column("cost", BigInteger),
    Column("is_billed", Boolean, nullable=False),
    # Of what it costs: what was taken from the balance, and what there was no money for.
    Column("debit", BigInteger, nullable=False),
    Column("shortfall", BigInteger, nullable=False),
    Column("prices", Text, nullable=False),
    Column("price_id", String, nullable=False),
    Column("milliseconds", BigInteger, nullable=False),
)
# Asked for by spans of time, and told in its order. Whose turns are on which days say the sums of days: an index that
# is not in the order of time would cost a page for each turn.
# Within a day the turns of others are passed over in it.
Index("usage_by_time", usage.c.at, usage.c.id, usage.c.user_id)

usage_attempts = Table(
    "usage_attempts",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("target", String, nullable=False),
    Column("outcome", String, nullable=False),
    Column("status", Integer),
    Column("milliseconds", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Of turns that took more than one good attempt."""

SUMS = (
    "turns",
    "priced",
    "input_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cost",
    "debit",
    "shortfall",
)
"""What is added up of the turns of a day; `priced` is how many of them have a price."""

usage_days = Table(
    "usage_days",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("user_id", String, primary_key=True),
    Column("key_id", String, primary_key=True),
    Column("model", String, primary_key=True),
    *[Column(name, BigInteger, nullable=False) for name in SUMS],
    sqlite_with_rowid=False,
)
"""The usage of each day (since 1970, by UTC), added up."""
Index("usage_days_by_user", usage_days.c.user_id, usage_days.c.day)
Index("usage_days_by_key", usage_days.c.key_id, usage_days.c.day)

entries = Table(
    "entries",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("user_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("nanos", BigInteger, nullable=False),
    Column("balance_after", BigInteger, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("request_id", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("idempotency_key", String),
)
# As those of usage.
Index("entries_by_time", entries.c.at, entries.c.id, entries.c.user_id)
_is_by_hand = entries.c.kind != "debit"
Index(
    "entries_by_hand", entries.c.user_id, entries.c.at, sqlite_where=_is_by_hand, postgresql_where=_is_by_hand
)
_has_idempotency_key = entries.c.idempotency_key.is_not(None)
Index(
    "entries_once",
    entries.c.idempotency_key,
    unique=True,
    sqlite_where=_has_idempotency_key,
    postgresql_where=_has_idempotency_key,
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("target", String, nullable=False),
    # JSON, without secrets; null where there is none.
    Column("before", Text),
    Column("after", Text),
)
"""Who has changed what."""

prices = Table(
    "prices",
    metadata,
    Column("id", _Number, primary_key=True),
    Column("model", String, nullable=False),
    Column("tier", String, nullable=False),
    Column("since", BigInteger, nullable=False),
    # JSON; without it the owner's own price ends there.
    Column("definition", Text),
    Column("created", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
)
"""An owner's own prices; of two for one moment the later row counts."""
Index("prices_by_model", prices.c.model)

upstreams = Table(
    "upstreams",
    metadata,
    Column("name", String, primary_key=True),
    Column("definition", Text, nullable=False),
    Column("api_key", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("updated", BigInteger, nullable=False),
)
"""Those added while the daemon runs; their keys have to be sent, so they are here as they are."""

APPEND_ONLY = (entries.name, audit.name)
"""Tables whose rows stay as they were written."""


def refusals(dialect: str) -> list[str]:
    """Return the statements that make a database of *dialect* refuse what would change an append-only table."""
    made = []
    if dialect == "postgresql":
        made.append(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'rows of % stay as they are', TG_TABLE_NAME; END $$"
        )
    for table in APPEND_ONLY:
        if dialect == "postgresql":
            made.append(
                f"CREATE TRIGGER {table}_stay BEFORE UPDATE OR DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
            )
        else:
            made += [
                f"CREATE TRIGGER {table}_stay_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'rows of {table} stay as they are'); END"
                for change in ("UPDATE", "DELETE")
            ]
    return made


for _dialect in ("sqlite", "postgresql"):
    for _statement in refusals(_dialect):
        event.listen(
            metadata,
            "after_create",
            DDL(_statement.replace("%", "%%")).execute_if(dialect=_dialect),  # type: ignore[no-untyped-call]
        )

REVISIONS = ("0001",)

SCHEMA = Schema("ledger", metadata, Path(__file__).with_name("migrations"), REVISIONS, synchronous="FULL")
