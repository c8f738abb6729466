"""Turns, and what was said in them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "turns",
        sa.Column("key", key, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("route", sa.String, nullable=False),
        sa.Column("caller", sa.String, nullable=False),
        sa.Column("client", sa.String),
        sa.Column("model", sa.String),
        sa.Column("account", sa.String),
        sa.Column("rule", sa.String),
        sa.Column("binding", sa.String),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("error", sa.String),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("first_event", sa.Float),
        sa.Column("first_text", sa.Float),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("input_tokens", sa.BigInteger),
        sa.Column("cached_tokens", sa.BigInteger),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("reasoning_tokens", sa.BigInteger),
        sa.Column("usage_source", sa.String),
        sa.Column("request_bytes", sa.BigInteger, nullable=False),
        sa.Column("answer_bytes", sa.BigInteger, nullable=False),
        sa.Column("story", sa.Text, nullable=False),
    )
    op.create_index("turns_by_id", "turns", ["id"])
    op.create_index("turns_by_caller", "turns", ["caller", "key"])
    op.create_index("turns_by_account", "turns", ["account", "key"])
    op.create_index("turns_by_model", "turns", ["model", "key"])
    went_wrong = sa.text("outcome != 'completed'")
    op.create_index(
        "turns_gone_wrong",
        "turns",
        ["outcome", "key"],
        sqlite_where=went_wrong,
        postgresql_where=went_wrong,
    )
    op.create_table(
        "captures",
        sa.Column(
            "key",
            key,
            sa.ForeignKey("turns.key", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("is_cut", sa.Boolean, nullable=False),
    )
