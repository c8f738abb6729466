"""The tables of records.db.

A turn's key is its time: microseconds since 1970 and ten bits that tell apart those of one moment. So the
newest are at the end, a span of time is a range of keys, and whatever is looked up by an index comes in the
order of time without being sorted.
"""

from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from codex_proxy.storage.migrating import Schema

KEY_BITS = 10
"""How many bits of a key do not belong to its time."""
KEYS_A_SECOND = 1_000_000 << KEY_BITS

metadata = MetaData()

# In SQLite only a plain INTEGER is the row's own number.
_Key = BigInteger().with_variant(Integer, "sqlite")

turns = Table(
    "turns",
    metadata,
    Column("key", _Key, primary_key=True, autoincrement=False),
    Column("id", String, nullable=False),
    Column("route", String, nullable=False),
    Column("caller", String, nullable=False),
    Column("client", String),
    Column("model", String),
    Column("account", String),
    Column("rule", String),
    Column("binding", String),
    Column("outcome", String, nullable=False),
    Column("status", Integer),
    Column("error", String),
    Column("attempts", Integer, nullable=False),
    Column("stream", Boolean, nullable=False),
    # Seconds since it came.
    Column("first_event", Float),
    Column("first_text", Float),
    Column("seconds", Float, nullable=False),
    Column("input_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("reasoning_tokens", BigInteger),
    Column("usage_source", String),
    Column("request_bytes", BigInteger, nullable=False),
    Column("answer_bytes", BigInteger, nullable=False),
    # Attempts, decisions and marks: see `records.story`.
    Column("story", Text, nullable=False),
)

Index("turns_by_id", turns.c.id)
Index("turns_by_caller", turns.c.caller, turns.c.key)
Index("turns_by_account", turns.c.account, turns.c.key)
Index("turns_by_model", turns.c.model, turns.c.key)

# Few turns go wrong, and those are asked for.
went_wrong = turns.c.outcome != "completed"
Index(
    "turns_gone_wrong",
    turns.c.outcome,
    turns.c.key,
    sqlite_where=went_wrong,
    postgresql_where=went_wrong,
)

captures = Table(
    "captures",
    metadata,
    Column("key", _Key, ForeignKey(turns.c.key, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("request", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("is_cut", Boolean, nullable=False),
)
"""What was asked and answered, of callers for whom that is switched on."""

REVISIONS = ("0001",)

SCHEMA = Schema("records", metadata, Path(__file__).with_name("migrations"), REVISIONS)
