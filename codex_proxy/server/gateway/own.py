"""What the holder of a client key is told: its own key, what is left, what it has used. Nothing of anybody else."""

from collections.abc import Callable

from codex_proxy.errors import KeyRefused
from codex_proxy.ledger import model, queries
from codex_proxy.patterns import fits
from codex_proxy.server.gateway.amounts import dollars
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.people import budgets_of, key_shape, limits_shape
from codex_proxy.server.gateway.shapes import Own, OwnQuery, OwnUser, UsagePage, UsageRow
from codex_proxy.server.gateway.usage import sums_by, total_of, usage_page

_DAYS = 30
_DAY_MS = 86_400_000


async def own(desk: Desk, key_id: str) -> Own:
    """Return what the holder of a key may know."""
    key, user = _holder(desk, key_id)
    now = int(desk.clock.now() * 1000)
    wanted = queries.UsageFilter(key=key.id, since=now - (_DAYS - 1) * _DAY_MS)
    budgets = [
        *await budgets_of(desk, "key", key.id, key.limits),
        *await budgets_of(desk, "user", user.id, user.limits),
    ]
    return Own(
        key=key_shape(desk, key),
        user=OwnUser(
            is_billed=user.is_billed and desk.ledger.mode == "billing",
            balance=dollars(user.balance),
            available=dollars(user.balance - user.held),
            is_past_due=user.is_past_due,
            limits=limits_shape(user.limits),
        ),
        budgets=budgets,
        total=await total_of(desk, wanted),
        days=await sums_by(desk, ("day",), wanted),
        models=await sums_by(desk, ("model",), wanted),
    )


async def own_usage(desk: Desk, key_id: str, query: OwnQuery) -> UsagePage:
    """Return what the requests of one key have used."""
    key, _ = _holder(desk, key_id)
    page = await usage_page(desk, queries.UsageFilter(key=key.id), query.limit, query.before)
    return UsagePage(usage=[_without_pool(row) for row in page.usage], next=page.next)


def models_of(desk: Desk, key_id: str) -> Callable[[str], bool]:
    """Return what tells of a model whether the holder of a key may use it."""
    key, user = _holder(desk, key_id)
    allowed = [limits.models for limits in (key.limits, user.limits) if limits.models]
    return lambda name: all(any(fits(pattern, name) for pattern in patterns) for patterns in allowed)


def _holder(desk: Desk, key_id: str) -> tuple[model.Key, model.User]:
    key = desk.ledger.directory.key(key_id)
    user = None if key is None else desk.ledger.directory.user(key.user_id)
    if key is None or user is None:
        raise KeyRefused("this client key is not known any more", code="no_session")
    return key, user


def _without_pool(row: UsageRow) -> UsageRow:
    """Leave out which account or upstream served: that is the owner's."""
    return UsageRow(
        **{
            name: getattr(row, name)
            for name in row.__struct_fields__
            if name not in ("target", "upstream", "error")
        },
        target="",
        upstream="",
        error="",
    )
