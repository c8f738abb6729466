"""Users, their money and their keys."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Literal, TypeVar

from msgspec import UNSET

from codex_proxy.errors import RequestError
from codex_proxy.ledger import model, queries
from codex_proxy.server.gateway import shapes
from codex_proxy.server.gateway.amounts import dollars, nanos
from codex_proxy.server.gateway.desk import Call, Desk, maybe_moment, millis, moment
from codex_proxy.server.gateway.shapes import (
    Budgets,
    BudgetStanding,
    Entries,
    EntryQuery,
    Key,
    KeyChange,
    KeyList,
    KeyQuery,
    KeyWithSecret,
    Limits,
    NewKey,
    NewUser,
    Nothing,
    PageQuery,
    Payment,
    Rotation,
    User,
    UserChange,
    UserList,
    UserQuery,
)

T = TypeVar("T")

# A few milliseconds.
_SLICE = 200

# -- limits -------------------------------------------------------------------------------


def limits_of(limits: Limits, place: str = "limits") -> model.Limits:
    """Return limits as the ledger has them.

    Raises:
        RequestError: If one makes no sense; it names the field.
    """
    budgets: list[model.Budget] = []
    for number, budget in enumerate(limits.budgets):
        param = f"{place}.budgets.{number}"
        window = model.Window(budget.window)
        if any(one.window is window for one in budgets):
            raise RequestError(
                f"{param}.window: there is a budget for {budget.window!r} already", param=f"{param}.window"
            )
        amount = nanos(budget.amount, f"{param}.amount")
        if amount <= 0:
            raise RequestError(f"{param}.amount: must be more than 0", param=f"{param}.amount")
        budgets.append(model.Budget(window, amount))
    networks = []
    for number, text in enumerate(limits.networks):
        try:
            networks.append(str(ipaddress.ip_network(text.strip(), strict=False)))
        except ValueError:
            param = f"{place}.networks.{number}"
            raise RequestError(
                f"{param}: {text!r} is no address and no network such as '192.0.2.0/24'", param=param
            ) from None
    return model.Limits(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        concurrency=limits.concurrency,
        budgets=tuple(budgets),
        models=tuple(limits.models),
        endpoints=tuple(dict.fromkeys(limits.endpoints)),
        networks=tuple(dict.fromkeys(networks)),
    )


def limits_shape(limits: model.Limits) -> Limits:
    """Return limits as they are told."""
    return Limits(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        concurrency=limits.concurrency,
        budgets=[shapes.Budget(window=one.window.value, amount=dollars(one.nanos)) for one in limits.budgets],
        models=list(limits.models),
        # Only what may be asked for is ever kept.
        endpoints=list(limits.endpoints),  # type: ignore[arg-type]
        networks=list(limits.networks),
    )


async def budgets_of(
    desk: Desk, of: Literal["key", "user"], owner: str, limits: model.Limits
) -> list[BudgetStanding]:
    """Return how the budgets of a key or a user stand now."""
    if not limits.budgets:
        return []
    now = int(desk.clock.now() * 1000)
    found = await desk.ledger.read(lambda connection: queries.spent(connection, owner, limits.budgets, now))
    return [
        BudgetStanding(
            of=of,
            window=one.window.value,
            amount=dollars(one.nanos),
            spent=dollars(one.spent),
            resets_at=maybe_moment(one.resets_at),
        )
        for one in found
    ]


async def budgets_of_user(desk: Desk, call: Call[Nothing, Nothing]) -> Budgets:
    """Tell how the budgets of a user stand."""
    user = find_user(desk, call.name)
    return Budgets(budgets=await budgets_of(desk, "user", user.id, user.limits))


async def budgets_of_key(desk: Desk, call: Call[Nothing, Nothing]) -> Budgets:
    """Tell how the budgets of a key stand."""
    key = find_key(desk, call.name)
    return Budgets(budgets=await budgets_of(desk, "key", key.id, key.limits))


# -- users --------------------------------------------------------------------------------


async def list_users(desk: Desk, call: Call[UserQuery, Nothing]) -> UserList:
    """List users."""
    needle = call.query.q.strip().lower()
    found = [
        user
        for user in desk.ledger.directory.users()
        if (not needle or needle in user.name.lower() or needle in user.id.lower())
        and call.query.status in (None, user.status)
    ]
    counts = _keys_by_user(desk)
    found.sort(key=lambda user: (user.name.lower(), user.id))
    shown = [
        _user_shape(user, counts.get(user.id, 0))
        async for some in _slices(found[: call.query.limit])
        for user in some
    ]
    return UserList(users=shown, total=len(found))


async def get_user(desk: Desk, call: Call[Nothing, Nothing]) -> User:
    """Return one user."""
    return user_shape(desk, find_user(desk, call.name))


async def create_user(desk: Desk, call: Call[Nothing, NewUser]) -> User:
    """Make a user; its balance is 0."""
    name = _name(call.body.name)
    is_billed = call.body.is_billed
    user = await desk.ledger.create_user(
        name,
        is_billed=desk.ledger.mode == "billing" if is_billed is None else is_billed,
        limits=limits_of(call.body.limits),
        actor=call.actor,
    )
    return user_shape(desk, user)


async def update_user(desk: Desk, call: Call[Nothing, UserChange]) -> User:
    """Change a user."""
    body = call.body
    user = find_user(desk, call.name)
    changes: dict[str, object] = {}
    if body.name is not UNSET:
        changes["name"] = _name(body.name)
    if body.status is not UNSET:
        changes["status"] = body.status
    if body.is_billed is not UNSET:
        changes["is_billed"] = body.is_billed
    if body.limits is not UNSET:
        changes["limits"] = limits_of(body.limits)
    if changes:
        user = await desk.ledger.update_user(user.id, changes, actor=call.actor)
    return user_shape(desk, user)


async def credit_user(desk: Desk, call: Call[Nothing, Payment]) -> shapes.Entry:
    """Add to a user's balance."""
    amount = nanos(call.body.amount, "amount")
    if amount <= 0:
        raise RequestError("amount: must be more than 0; use adjust to take something away", param="amount")
    return await _pay(desk, call, amount, "credit")


async def adjust_user(desk: Desk, call: Call[Nothing, Payment]) -> shapes.Entry:
    """Correct a user's balance, up or down."""
    amount = nanos(call.body.amount, "amount")
    if amount == 0:
        raise RequestError("amount: must not be 0", param="amount")
    return await _pay(desk, call, amount, "adjust")


async def _pay(desk: Desk, call: Call[Nothing, Payment], amount: int, kind: model.EntryKind) -> shapes.Entry:
    user = find_user(desk, call.name)
    assert kind != "debit"
    entry = await desk.ledger.credit(
        user.id,
        amount,
        kind=kind,
        reason=_reason(call.body.reason),
        idempotency_key=call.body.idempotency_key,
        actor=call.actor,
    )
    return entry_shape(desk, entry)


def find_user(desk: Desk, user_id: str, param: str | None = None) -> model.User:
    """Return the user with this id.

    Raises:
        RequestError: If there is none; 404, or 400 where *param* is a field of the body.
    """
    user = desk.ledger.directory.user(user_id)
    if user is None:
        raise RequestError(
            f"there is no user with the id {user_id[:128]!r}",
            param=param,
            status=404 if param is None else 400,
            code="user_not_found",
        )
    return user


async def _slices(found: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Go through many in slices, so that other work gets its turn."""
    for start in range(0, len(found), _SLICE):
        yield found[start : start + _SLICE]
        await asyncio.sleep(0)


def user_shape(desk: Desk, user: model.User) -> User:
    """Return a user as it is told."""
    return _user_shape(user, _keys_by_user(desk).get(user.id, 0))


def _user_shape(user: model.User, keys: int) -> User:
    return User(
        id=user.id,
        name=user.name,
        status=user.status,
        is_billed=user.is_billed,
        balance=dollars(user.balance),
        held=dollars(user.held),
        available=dollars(user.balance - user.held),
        is_past_due=user.is_past_due,
        limits=limits_shape(user.limits),
        keys=keys,
        created_at=moment(user.created),
    )


def _keys_by_user(desk: Desk) -> dict[str, int]:
    counts: dict[str, int] = {}
    keys = desk.ledger.directory.keys()
    for key in keys:
        if key.status == "active":
            counts[key.user_id] = counts.get(key.user_id, 0) + 1
    return counts


def _name(text: str) -> str:
    name = " ".join(text.split())
    if not name or not name.isprintable():
        raise RequestError(
            "name: must have a letter that can be seen, and no control characters", param="name"
        )
    return name


def _reason(text: str) -> str:
    if not text.strip():
        raise RequestError("reason: say why", param="reason")
    return text.strip()


# -- money --------------------------------------------------------------------------------


async def list_entries(desk: Desk, call: Call[EntryQuery, Nothing]) -> Entries:
    """List changes of balances."""
    if call.query.user is not None:
        _ = find_user(desk, call.query.user, "user")
    return await _entries(desk, call.query.user, call.query.limit, call.query.before)


async def list_entries_of_user(desk: Desk, call: Call[PageQuery, Nothing]) -> Entries:
    """List changes of one user's balance."""
    user = find_user(desk, call.name)
    return await _entries(desk, user.id, call.query.limit, call.query.before)


async def _entries(desk: Desk, user_id: str | None, limit: int, before: str | None) -> Entries:
    page = await desk.ledger.read(
        lambda connection: queries.entries_page(connection, user=user_id, limit=limit, before=before)
    )
    return Entries(entries=[entry_shape(desk, one) for one in page.rows], next=page.next)


def entry_shape(desk: Desk, entry: model.Entry) -> shapes.Entry:
    """Return a change of a balance as it is told."""
    return shapes.Entry(
        id=str(entry.id),
        user_id=entry.user_id,
        user=desk.name_of_user(entry.user_id),
        kind=entry.kind,
        amount=dollars(entry.nanos),
        balance_after=dollars(entry.balance_after),
        at=moment(entry.at),
        request_id=entry.request_id or None,
        reason=entry.reason,
        actor=entry.actor,
    )


# -- keys ---------------------------------------------------------------------------------


async def list_keys(desk: Desk, call: Call[KeyQuery, Nothing]) -> KeyList:
    """List keys."""
    query = call.query
    needle = query.q.strip().lower()
    now = desk.clock.now() * 1000
    keys = desk.ledger.directory.keys()
    found = [
        key
        for key in keys
        if query.user in (None, key.user_id)
        and query.status in (None, status_of(key, now))
        and (not needle or any(needle in text.lower() for text in (key.name, key.hint, key.id)))
    ]
    found.sort(key=lambda key: (-key.created, key.id))
    shown = [key async for some in _slices(found[: query.limit]) for key in _key_shapes(desk, some)]
    return KeyList(keys=shown, total=len(found))


async def get_key(desk: Desk, call: Call[Nothing, Nothing]) -> Key:
    """Return one key."""
    return key_shape(desk, find_key(desk, call.name))


async def create_key(desk: Desk, call: Call[Nothing, NewKey]) -> KeyWithSecret:
    """Make a key; its text is told this once."""
    body = call.body
    user = find_user(desk, body.user, "user")
    key, text = await desk.ledger.create_key(
        user.id,
        _name(body.name),
        limits=limits_of(body.limits),
        expires=None if body.expires_at is None else _future(desk, millis(body.expires_at)),
        actor=call.actor,
    )
    return KeyWithSecret(key=key_shape(desk, key), secret=text)


async def update_key(desk: Desk, call: Call[Nothing, KeyChange]) -> Key:
    """Change a key."""
    body = call.body
    key = find_key(desk, call.name)
    changes: dict[str, object] = {}
    if body.name is not UNSET:
        changes["name"] = _name(body.name)
    if body.limits is not UNSET:
        changes["limits"] = limits_of(body.limits)
    if body.expires_at is not UNSET:
        changes["expires"] = None if body.expires_at is None else _after_1970(millis(body.expires_at))
    if changes:
        key = await desk.ledger.update_key(key.id, changes, actor=call.actor)
    return key_shape(desk, key)


async def rotate_key(desk: Desk, call: Call[Nothing, Rotation]) -> KeyWithSecret:
    """Replace a key's text; the old one goes on working for a while, if that is asked for."""
    key = find_key(desk, call.name)
    rotated, text = await desk.ledger.rotate_key(key.id, call.body.grace_seconds, actor=call.actor)
    return KeyWithSecret(key=key_shape(desk, rotated), secret=text)


async def revoke_key(desk: Desk, call: Call[Nothing, Nothing]) -> Key:
    """End a key for good; it is refused from the next request on."""
    key = find_key(desk, call.name)
    return key_shape(desk, await desk.ledger.revoke_key(key.id, actor=call.actor))


def find_key(desk: Desk, key_id: str) -> model.Key:
    """Return the key with this id.

    Raises:
        RequestError: 404, if there is none.
    """
    key = desk.ledger.directory.key(key_id)
    if key is None:
        raise RequestError(
            f"there is no key with the id {key_id[:128]!r}; a key's id is not its text",
            status=404,
            code="key_not_found",
        )
    return key


def status_of(key: model.Key, now: float) -> str:
    """Return how a key stands; *now* in milliseconds."""
    if key.status == "active" and key.expires is not None and key.expires <= now:
        return "expired"
    return key.status


def key_shape(desk: Desk, key: model.Key) -> Key:
    """Return a key as it is told."""
    return next(iter(_key_shapes(desk, (key,))))


def _key_shapes(desk: Desk, keys: Iterable[model.Key]) -> Iterable[Key]:
    now = desk.clock.now() * 1000
    for key in keys:
        yield Key(
            id=key.id,
            name=key.name,
            user_id=key.user_id,
            user=desk.name_of_user(key.user_id),
            hint=key.hint,
            status=status_of(key, now),  # type: ignore[arg-type]  # one of the three
            limits=limits_shape(key.limits),
            expires_at=maybe_moment(key.expires),
            created_at=moment(key.created),
            last_used_at=maybe_moment(key.last_used),
        )


def _after_1970(at: int) -> int:
    if at <= 0:
        raise RequestError("expires_at: is before 1970", param="expires_at")
    return at


def _future(desk: Desk, at: int) -> int:
    if at <= desk.clock.now() * 1000:
        raise RequestError("expires_at: is in the past", param="expires_at")
    return at
