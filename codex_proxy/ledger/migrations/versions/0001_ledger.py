"""Users, keys, holds, usage, entries and what belongs to them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# As they were in this step, whatever they become.
_APPEND_ONLY = ("entries", "audit")
_SUMS = (
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


def upgrade() -> None:
    """Make the tables."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "audit",
        sa.Column("id", number, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("before", sa.Text),
        sa.Column("after", sa.Text),
    )
    op.create_table(
        "counters",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("period", sa.String, primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "entries",
        sa.Column("id", number, primary_key=True),
        sa.Column("user_id", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("nanos", sa.BigInteger, nullable=False),
        sa.Column("balance_after", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("idempotency_key", sa.String),
    )
    op.create_index("entries_by_time", "entries", ["at", "id", "user_id"])
    is_by_hand = sa.text("kind != 'debit'")
    op.create_index(
        "entries_by_hand", "entries", ["user_id", "at"], sqlite_where=is_by_hand, postgresql_where=is_by_hand
    )
    has_idempotency_key = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        "entries_once",
        "entries",
        ["idempotency_key"],
        unique=True,
        sqlite_where=has_idempotency_key,
        postgresql_where=has_idempotency_key,
    )
    op.create_table(
        "holds",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("user_id", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("nanos", sa.BigInteger, nullable=False),
        sa.Column("is_billed", sa.Boolean, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("process", sa.String, nullable=False),
        sa.CheckConstraint("nanos >= 0", name="holds_not_negative"),
        sqlite_with_rowid=False,
    )
    if op.get_context().dialect.name == "postgresql":
        op.create_index("holds_by_user", "holds", ["user_id"])
    op.create_table(
        "prices",
        sa.Column("id", number, primary_key=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("definition", sa.Text),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
    )
    op.create_index("prices_by_model", "prices", ["model"])
    op.create_table(
        "processes",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("beats", sa.BigInteger, nullable=False),
        sa.Column("started", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "upstreams",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("api_key", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("updated", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("id", number, primary_key=True),
        sa.Column(
            "request_id",
            sa.String().with_variant(sa.String(collation="C"), "postgresql"),
            nullable=False,
            unique=True,
        ),
        sa.Column("user_id", sa.String, nullable=False),
        sa.Column("key_id", sa.String, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("route", sa.String, nullable=False),
        sa.Column("asked_model", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("tier", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("upstream", sa.String, nullable=False),
        sa.Column("client", sa.String, nullable=False),
        sa.Column("end", sa.String, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("error", sa.String, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("cache_write_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("flags", sa.String, nullable=False),
        sa.Column("cost", sa.BigInteger),
        sa.Column("is_billed", sa.Boolean, nullable=False),
        sa.Column("debit", sa.BigInteger, nullable=False),
        sa.Column("shortfall", sa.BigInteger, nullable=False),
        sa.Column("prices", sa.Text, nullable=False),
        sa.Column("price_id", sa.String, nullable=False),
        sa.Column("milliseconds", sa.BigInteger, nullable=False),
    )
    op.create_index("usage_by_time", "usage", ["at", "id", "user_id"])
    op.create_table(
        "usage_attempts",
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("milliseconds", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_days",
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.String, primary_key=True),
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        *[sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMS],
        sqlite_with_rowid=False,
    )
    op.create_index("usage_days_by_key", "usage_days", ["key_id", "day"])
    op.create_index("usage_days_by_user", "usage_days", ["user_id", "day"])
    op.create_table(
        "users",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("is_billed", sa.Boolean, nullable=False),
        sa.Column("balance", sa.BigInteger, nullable=False),
        sa.Column("held", sa.BigInteger, nullable=False),
        sa.Column("is_past_due", sa.Boolean, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.CheckConstraint("held >= 0 AND balance >= held", name="users_covered"),
    )
    op.create_table(
        "client_keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("user_id", sa.String, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("old_digest", sa.LargeBinary, unique=True),
        sa.Column("old_until", sa.BigInteger),
        sa.Column("hint", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("expires", sa.BigInteger),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("last_used", sa.BigInteger),
    )
    op.create_index("client_keys_by_user", "client_keys", ["user_id"])
    for statement in _refusals(op.get_context().dialect.name):
        op.execute(statement)


def _refusals(dialect: str) -> list[str]:
    made = []
    if dialect == "postgresql":
        made.append(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'rows of % stay as they are', TG_TABLE_NAME; END $$"
        )
    for table in _APPEND_ONLY:
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
