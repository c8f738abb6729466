"""What owners do to users, keys and balances: plain functions of a connection, each with its line in the audit.

They run in a transaction of their own (`Ledger.write`), so what one of them refuses costs nobody else anything.
"""

import ipaddress
from collections.abc import Mapping
from typing import Any, Literal, get_args

import orjson
from sqlalchemy import Connection, Row, func, insert, select, update

from codex_proxy.errors import RequestError
from codex_proxy.ledger.model import (
    NO_LIMITS,
    OWNER_ID,
    Budget,
    Entry,
    Key,
    KeyStatus,
    Limits,
    User,
    UserStatus,
    Window,
)
from codex_proxy.ledger.money import MOST, format_money, parse_money
from codex_proxy.ledger.tables import audit, client_keys, entries, state, users

_MOST_NAME = 100
_MOST_REASON = 500
_NAMES = ("models", "endpoints", "networks")
_NUMBERS = ("requests_per_minute", "tokens_per_minute", "concurrency")

# As `alembic` would say it, for whoever reads the audit.
_USER_FIELDS = frozenset({"name", "status", "is_billed", "limits"})
_KEY_FIELDS = frozenset({"name", "expires", "limits"})


# -- limits as they are stored ---------------------------------------------------------------


def limits_text(limits: Limits) -> str:
    """Return *limits* as they are stored; what is not limited is left out."""
    return orjson.dumps(limits_json(limits)).decode()


def limits_json(limits: Limits) -> dict[str, Any]:
    """Return *limits* as JSON; money is decimal text."""
    said: dict[str, Any] = {
        name: getattr(limits, name) for name in _NUMBERS if getattr(limits, name) is not None
    }
    if limits.budgets:
        said["budgets"] = [
            {"window": one.window.value, "amount": format_money(one.nanos)} for one in limits.budgets
        ]
    return said | {name: list(getattr(limits, name)) for name in _NAMES if getattr(limits, name)}


def limits_of(stored: str) -> Limits:
    """Return the limits in a stored text."""
    said = orjson.loads(stored)
    if not said:
        return NO_LIMITS
    values: dict[str, Any] = {name: said.get(name) for name in _NUMBERS}
    values |= {name: tuple(said.get(name, ())) for name in _NAMES}
    values["budgets"] = tuple(
        Budget(Window(one["window"]), parse_money(one["amount"])) for one in said.get("budgets", ())
    )
    return Limits(**values)


def _check_limits(limits: object) -> Limits:
    if not isinstance(limits, Limits):
        raise RequestError("limits must be limits", param="limits")
    for name in _NUMBERS:
        number = getattr(limits, name)
        if number is not None and not (type(number) is int and 0 < number < 1 << 53):
            raise RequestError(f"{name} must be a whole number above 0", param=f"limits.{name}")
    seen = set()
    for position, budget in enumerate(limits.budgets):
        if not (type(budget.nanos) is int and 0 <= budget.nanos <= MOST):
            raise RequestError(
                "amount must not be negative, and nine billion dollars at most",
                param=f"limits.budgets.{position}.amount",
            )
        if budget.window in seen:
            raise RequestError(
                f"there are two budgets for {budget.window.value!r}",
                param=f"limits.budgets.{position}.window",
            )
        seen.add(budget.window)
    for position, network in enumerate(limits.networks):
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError as exc:
            raise RequestError(
                f"{network[:60]!r} is not an address or a network such as 10.0.0.0/8",
                param=f"limits.networks.{position}",
            ) from exc
    for name in ("models", "endpoints"):
        for position, word in enumerate(getattr(limits, name)):
            _check_text(word, f"limits.{name}.{position}", 200)
    return limits


# -- rows -----------------------------------------------------------------------------------


def user_of(row: Row[Any]) -> User:
    """Return the user of a row of `users`."""
    return User(
        id=row.id,
        name=row.name,
        status=row.status,
        is_billed=bool(row.is_billed),
        balance=row.balance,
        held=row.held,
        limits=limits_of(row.limits),
        created=row.created,
        is_past_due=bool(row.is_past_due),
    )


def key_of(row: Row[Any]) -> Key:
    """Return the key of a row of `client_keys`."""
    return Key(
        id=row.id,
        user_id=row.user_id,
        name=row.name,
        digest=bytes(row.digest),
        hint=row.hint,
        status=row.status,
        expires=row.expires,
        limits=limits_of(row.limits),
        created=row.created,
        last_used=row.last_used,
    )


def known_key_of(row: Row[Any]) -> tuple[Key, bytes | None, int | None]:
    """Return the key of a row, the digest of the text it had before, and until when that counts."""
    return key_of(row), None if row.old_digest is None else bytes(row.old_digest), row.old_until


def entry_of(row: Row[Any]) -> Entry:
    """Return the entry of a row of `entries`."""
    return Entry(
        id=row.id,
        user_id=row.user_id,
        kind=row.kind,
        nanos=row.nanos,
        balance_after=row.balance_after,
        at=row.at,
        request_id=row.request_id,
        reason=row.reason,
        actor=row.actor,
    )


def note_audit(
    connection: Connection,
    *,
    at: int,
    actor: str,
    action: str,
    target: str,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Write down that *actor* did *action* to *target*; what it was *before* and is *after* has no secrets in it."""
    connection.execute(
        insert(audit).values(
            at=at,
            actor=_check_text(actor, "actor", 200),
            action=action,
            target=target,
            before=None if before is None else orjson.dumps(before).decode(),
            after=None if after is None else orjson.dumps(after).decode(),
        )
    )


def version(connection: Connection) -> int:
    """Return a number that grows with every change of a user or a key."""
    return int(connection.execute(select(state.c.version)).scalar_one())


def everybody(connection: Connection) -> tuple[list[User], list[tuple[Key, bytes | None, int | None]]]:
    """Return all users, and all keys with the digest of their text before and until when it counts."""
    everyone = [user_of(row) for row in connection.execute(select(users))]
    return everyone, [known_key_of(row) for row in connection.execute(select(client_keys))]


def touch(connection: Connection) -> None:
    """Write something that changes nothing, to see whether it can be written."""
    connection.execute(update(state).values(version=state.c.version))


def note_change(connection: Connection) -> None:
    """Have other processes notice that a user, a key or something else that they remember has changed."""
    connection.execute(update(state).values(version=state.c.version + 1))


# -- users ----------------------------------------------------------------------------------


def make_owner(connection: Connection, at: int) -> None:
    """Make the user that is always there, and what else a new database has in it."""
    if connection.execute(select(state.c.id)).first() is None:
        connection.execute(insert(state).values(id=1, version=1))
    if connection.execute(select(users.c.id).where(users.c.id == OWNER_ID)).first() is None:
        _insert_user(connection, OWNER_ID, OWNER_ID, is_billed=False, limits=NO_LIMITS, at=at)


def create_user(
    connection: Connection,
    *,
    id: str,  # noqa: A002 -- made by the caller, so that a second try is the same
    name: str,
    is_billed: bool,
    limits: Limits,
    actor: str,
    at: int,
) -> User:
    """Make a user without money.

    Raises:
        RequestError: If something does not fit, or the name is taken.
    """
    _check_text(name, "name", _MOST_NAME)
    _check_limits(limits)
    found = find_user(connection, id)
    if found is None:
        _check_free(connection, name)
        _insert_user(connection, id, name, is_billed=_check_bool(is_billed), limits=limits, at=at)
        found = _user(connection, id)
        note_audit(connection, at=at, actor=actor, action="user.create", target=id, after=_user_json(found))
        note_change(connection)
    return found


def update_user(
    connection: Connection,
    *,
    id: str,  # noqa: A002 -- its column
    changes: Mapping[str, Any],
    actor: str,
    at: int,
) -> User:
    """Change some fields of a user.

    Raises:
        RequestError: If there is no such user or field, or something does not fit.
    """
    before = _user(connection, id, lock=True)
    _check_fields(changes, _USER_FIELDS)
    values = dict(changes)
    if "name" in values:
        _check_text(values["name"], "name", _MOST_NAME)
        if values["name"] != before.name:
            _check_free(connection, values["name"])
    if "status" in values and values["status"] not in get_args(UserStatus):
        raise RequestError(f"status must be one of {', '.join(get_args(UserStatus))}", param="status")
    if "is_billed" in values:
        _check_bool(values["is_billed"])
    if id == OWNER_ID:
        if values.get("status", "active") != "active":
            raise RequestError("the built-in user cannot be suspended: the keys of the configuration are its own", param="status")  # fmt: skip
        if values.get("is_billed"):
            raise RequestError("the built-in user is never billed", param="is_billed")
        if values.get("name", before.name) != before.name:
            raise RequestError("the built-in user keeps its name", param="name")
    if "limits" in values:
        values["limits"] = limits_text(_check_limits(values["limits"]))
    if values:
        connection.execute(update(users).where(users.c.id == id).values(**values))
    after = _user(connection, id)
    if after != before:
        note_audit(
            connection,
            at=at,
            actor=actor,
            action="user.update",
            target=id,
            before=_user_json(before),
            after=_user_json(after),
        )
        note_change(connection)
    return after


def find_user(connection: Connection, id: str) -> User | None:  # noqa: A002 -- its column
    """Return a user; None if there is none."""
    row = connection.execute(select(users).where(users.c.id == id)).first()
    return None if row is None else user_of(row)


def _user(connection: Connection, id: str, *, lock: bool = False) -> User:  # noqa: A002 -- its column
    question = select(users).where(users.c.id == id)
    row = connection.execute(question.with_for_update() if lock else question).first()
    if row is None:
        raise RequestError(f"there is no user {id[:100]!r}", param="user", code="user_not_found", status=404)
    return user_of(row)


def _insert_user(
    connection: Connection, id: str, name: str, *, is_billed: bool, limits: Limits, at: int  # noqa: A002
) -> None:  # fmt: skip
    connection.execute(
        insert(users).values(
            id=id,
            name=name,
            status="active",
            is_billed=is_billed,
            balance=0,
            held=0,
            is_past_due=False,
            limits=limits_text(limits),
            created=at,
        )
    )


def _check_free(connection: Connection, name: str) -> None:
    if connection.execute(select(users.c.id).where(users.c.name == name)).first() is not None:
        raise RequestError(f"there is a user {name!r} already", param="name", code="name_taken", status=409)


def _user_json(user: User) -> dict[str, Any]:
    return {
        "name": user.name,
        "status": user.status,
        "is_billed": user.is_billed,
        "limits": limits_json(user.limits),
    }


# -- money ----------------------------------------------------------------------------------


def credit(
    connection: Connection,
    *,
    user_id: str,
    nanos: int,
    kind: Literal["credit", "adjust"],
    reason: str,
    idempotency_key: str,
    actor: str,
    at: int,
) -> Entry:
    """Change a balance, once for each *idempotency_key*; an adjustment may take.

    Raises:
        RequestError: If there is no such user, the key was used for something else, or what is to be taken is not
            there or held by turns under way.
    """
    user = _user(connection, user_id, lock=True)
    _check_text(reason, "reason", _MOST_REASON)
    _check_text(idempotency_key, "idempotency_key", 200)
    if kind not in ("credit", "adjust"):
        raise RequestError("kind must be credit or adjust", param="kind")
    if type(nanos) is not int or nanos == 0 or abs(nanos) > MOST or (kind == "credit" and nanos < 0):
        raise RequestError("amount must be above 0, and nine billion dollars at most", param="amount")
    row = connection.execute(select(entries).where(entries.c.idempotency_key == idempotency_key)).first()
    if row is not None:
        known = entry_of(row)
        if (known.user_id, known.nanos, known.kind, known.reason) != (user_id, nanos, kind, reason):
            raise RequestError(
                "this idempotency_key was used for another change",
                param="idempotency_key",
                code="idempotency_conflict",
                status=409,
            )
        return known
    if nanos < 0 and user.balance + nanos < user.held:
        raise RequestError(
            f"only {format_money(user.balance - user.held)} dollars can be taken",
            param="amount",
            code="balance_too_small",
            status=409,
        )
    if user.balance + nanos > MOST:
        raise RequestError("a balance is nine billion dollars at most", param="amount")
    entry = _move(
        connection, user, nanos, kind=kind, reason=reason, idempotency_key=idempotency_key, actor=actor, at=at
    )
    note_audit(
        connection,
        at=at,
        actor=actor,
        action=f"user.{kind}",
        target=user_id,
        before={"balance": format_money(user.balance)},
        after={"balance": format_money(entry.balance_after), "reason": reason},
    )
    return entry


def adjust(
    connection: Connection,
    user_id: str,
    nanos: int,
    *,
    reason: str,
    actor: str,
    at: int,
    request_id: str = "",
) -> int:
    """Change a balance by as much of *nanos* as it can be, for a turn whose price has changed.

    Returns:
        What it was changed by: less is taken when it is not there, or held by turns under way.

    Raises:
        RequestError: If there is no such user.
    """
    user = _user(connection, user_id, lock=True)
    moved = max(nanos, user.held - user.balance) if nanos < 0 else min(nanos, MOST - user.balance)
    if moved:
        _move(
            connection, user, moved, kind="adjust", reason=reason, actor=actor, at=at, request_id=request_id
        )
    return moved


def _move(
    connection: Connection,
    user: User,
    nanos: int,
    *,
    kind: str,
    reason: str,
    actor: str,
    at: int,
    request_id: str = "",
    idempotency_key: str | None = None,
) -> Entry:
    balance = user.balance + nanos
    connection.execute(
        update(users)
        .where(users.c.id == user.id)
        # What could not be paid once is written down where it was; who has money again is not past due.
        .values(balance=balance, is_past_due=user.is_past_due and balance <= user.held)
    )
    row = connection.execute(
        insert(entries)
        .values(
            user_id=user.id,
            kind=kind,
            nanos=nanos,
            balance_after=balance,
            at=at,
            request_id=request_id,
            reason=reason,
            actor=_check_text(actor, "actor", 200),
            idempotency_key=idempotency_key,
        )
        .returning(entries)
    ).one()
    return entry_of(row)


# -- keys -----------------------------------------------------------------------------------


def create_key(
    connection: Connection,
    *,
    id: str,  # noqa: A002 -- made by the caller, so that a second try is the same
    user_id: str,
    name: str,
    digest: bytes,
    hint: str,
    limits: Limits,
    expires: int | None,
    actor: str,
    at: int,
) -> Key:
    """Make a key.

    Raises:
        RequestError: If there is no such user, or something does not fit.
    """
    _check_text(name, "name", _MOST_NAME)
    _check_limits(limits)
    _check_expires(expires)
    _user(connection, user_id)
    row = connection.execute(select(client_keys).where(client_keys.c.id == id)).first()
    if row is not None:
        return key_of(row)
    connection.execute(
        insert(client_keys).values(
            id=id,
            user_id=user_id,
            name=name,
            digest=digest,
            hint=hint,
            status="active",
            expires=expires,
            limits=limits_text(limits),
            created=at,
        )
    )
    key = _key(connection, id)
    note_audit(connection, at=at, actor=actor, action="key.create", target=id, after=_key_json(key))
    note_change(connection)
    return key


def update_key(
    connection: Connection,
    *,
    id: str,  # noqa: A002 -- its column
    changes: Mapping[str, Any],
    actor: str,
    at: int,
) -> Key:
    """Change some fields of a key.

    Raises:
        RequestError: If there is no such key or field, or something does not fit.
    """
    before = _key(connection, id)
    _check_fields(changes, _KEY_FIELDS)
    values = dict(changes)
    if "name" in values:
        _check_text(values["name"], "name", _MOST_NAME)
    if "expires" in values:
        _check_expires(values["expires"])
    if "limits" in values:
        values["limits"] = limits_text(_check_limits(values["limits"]))
    return _change_key(connection, before, values, action="key.update", actor=actor, at=at)


def rotate_key(
    connection: Connection,
    *,
    id: str,  # noqa: A002 -- its column
    digest: bytes,
    hint: str,
    grace_until: int,
    actor: str,
    at: int,
) -> Key:
    """Give a key a new text; the old one counts until *grace_until*, one before that no more.

    Raises:
        RequestError: If there is no such key, or it was revoked.
    """
    before = _key(connection, id)
    if before.status != "active":
        raise RequestError(
            "this key was revoked: make a new one", param="key", code="key_revoked", status=409
        )
    if before.digest == digest:
        return before
    old = {"old_digest": before.digest, "old_until": grace_until} if grace_until > at else {"old_digest": None, "old_until": None}  # fmt: skip
    return _change_key(
        connection, before, {"digest": digest, "hint": hint, **old}, action="key.rotate", actor=actor, at=at
    )


def revoke_key(connection: Connection, *, id: str, actor: str, at: int) -> Key:  # noqa: A002 -- its column
    """End a key for ever.

    Raises:
        RequestError: If there is no such key.
    """
    before = _key(connection, id)
    status: KeyStatus = "revoked"
    values = {"status": status, "old_digest": None, "old_until": None}
    return _change_key(connection, before, values, action="key.revoke", actor=actor, at=at)


def _key(connection: Connection, id: str) -> Key:  # noqa: A002 -- its column
    row = connection.execute(select(client_keys).where(client_keys.c.id == id).with_for_update()).first()
    if row is None:
        raise RequestError(f"there is no key {id[:100]!r}", param="key", code="key_not_found", status=404)
    return key_of(row)


def _change_key(
    connection: Connection, before: Key, values: Mapping[str, Any], *, action: str, actor: str, at: int
) -> Key:
    if values:
        connection.execute(update(client_keys).where(client_keys.c.id == before.id).values(**values))
    after = _key(connection, before.id)
    if after != before:
        note_audit(
            connection,
            at=at,
            actor=actor,
            action=action,
            target=before.id,
            before=_key_json(before),
            after=_key_json(after),
        )
        note_change(connection)
    return after


def _key_json(key: Key) -> dict[str, Any]:
    return {
        "user": key.user_id,
        "name": key.name,
        "hint": key.hint,
        "status": key.status,
        "expires": key.expires,
        "limits": limits_json(key.limits),
    }


def note_used(connection: Connection, used: Mapping[str, int]) -> None:
    """Write down when keys were used last."""
    for id_, at in sorted(used.items()):
        connection.execute(
            update(client_keys)
            .where(client_keys.c.id == id_, func.coalesce(client_keys.c.last_used, 0) < at)
            .values(last_used=at)
        )


# -- checks ---------------------------------------------------------------------------------


def _check_fields(changes: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in changes:
        if name not in known:
            raise RequestError(
                f"there is no field {name[:100]!r} to change: there are {', '.join(sorted(known))}",
                param=name[:100],
            )


def _check_text(value: object, param: str, most: int) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
        raise RequestError(f"{param} must be a text of 1 to {most} characters on one line", param=param)
    return value


def _check_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError("is_billed must be true or false", param="is_billed")
    return value


def _check_expires(value: object) -> None:
    if value is not None and not (type(value) is int and 0 < value < 1 << 53):
        raise RequestError("expires must be a moment, or null", param="expires")
