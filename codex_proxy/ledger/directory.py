"""All users and keys, in memory: who a key belongs to is asked with every request and waits for nothing."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from codex_proxy.ledger.model import Key, User


class Directory:
    """What the database has of users and keys, as of the last change that this process knows of.

    A balance in it is as old as this process's last turn of that user; another process may have changed it since.

    Args:
        now: The wall clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._users: dict[str, User] = {}
        self._balances: dict[str, tuple[int, int, bool]] = {}
        """Newer ones than those in `_users`."""
        self._keys: dict[str, Key] = {}
        self._by_digest: dict[bytes, Key] = {}
        self._old: dict[bytes, tuple[Key, int]] = {}
        self.used: dict[str, int] = {}
        """When keys were used, as far as that is not written down."""

    def key_by_digest(self, digest: bytes) -> Key | None:
        """Return the key with this digest, whatever its status; None if there is none."""
        key = self._by_digest.get(digest)
        if key is None and (old := self._old.get(digest)) is not None and self._now() * 1_000.0 < old[1]:
            return old[0]
        return key

    def key(self, id: str) -> Key | None:  # noqa: A002 -- what it is called everywhere
        """Return a key; None if there is none."""
        return self._keys.get(id)

    def user(self, id: str) -> User | None:  # noqa: A002 -- what it is called everywhere
        """Return a user; None if there is none."""
        self._settle_balances()
        return self._users.get(id)

    def look_up(self, id: str) -> User | None:  # noqa: A002
        """Return a user whose balance may be an old one, which costs less; None if there is none."""
        return self._users.get(id)

    def is_billed(self, id: str) -> bool | None:  # noqa: A002
        """Return whether a user is billed; None for one that may not ask."""
        user = self._users.get(id)
        return None if user is None or user.status != "active" else user.is_billed

    def keys(self) -> list[Key]:
        """Return all keys, the oldest first."""
        return sorted(self._keys.values(), key=lambda key: (key.created, key.id))

    @property
    def has_keys(self) -> bool:
        """Whether there is any key; asked for each request that came without one, so nothing is sorted for it."""
        return bool(self._keys)

    def users(self) -> list[User]:
        """Return all users, the oldest first."""
        self._settle_balances()
        return sorted(self._users.values(), key=lambda user: (user.created, user.id))

    def load(self, users: Iterable[User], keys: Iterable[tuple[Key, bytes | None, int | None]]) -> None:
        """Forget everything, and know these."""
        self._users = {user.id: user for user in users}
        self._balances.clear()
        before = self._keys
        self._keys, self._by_digest, self._old = {}, {}, {}
        for key, old_digest, old_until in keys:
            # When it was used is known here before it is written.
            known = before.get(key.id)
            used = 0 if known is None else known.last_used or 0
            self.put_key(
                replace(key, last_used=used) if used > (key.last_used or 0) else key, old_digest, old_until
            )

    def put_user(self, user: User) -> None:
        """Know a user as it is now."""
        self._balances.pop(user.id, None)
        self._users[user.id] = user

    def put_key(self, key: Key, old_digest: bytes | None, old_until: int | None) -> None:
        """Know a key as it is now."""
        before = self._keys.get(key.id)
        if before is not None:
            self._by_digest.pop(before.digest, None)
            for digest in [digest for digest, (one, _) in self._old.items() if one.id == key.id]:
                del self._old[digest]
        used = self.used.get(key.id)
        if used is not None and used > (key.last_used or 0):
            key = replace(key, last_used=used)
        self._keys[key.id] = self._by_digest[key.digest] = key
        if old_digest is not None and old_until is not None:
            self._old[old_digest] = key, old_until

    def put_balance(self, id: str, balance: int, held: int, *, is_past_due: bool) -> None:  # noqa: A002
        """Know what a user has now."""
        # Far more often than anybody looks.
        self._balances[id] = balance, held, is_past_due

    def _settle_balances(self) -> None:
        for id_, (balance, held, is_past_due) in self._balances.items():
            user = self._users.get(id_)
            if user is not None:
                self._users[id_] = replace(user, balance=balance, held=held, is_past_due=is_past_due)
        self._balances.clear()

    def note_used(self, key_id: str, at: int) -> None:
        """Know that a key was used; it is written down later."""
        if key_id in self._keys:
            self.used[key_id] = at

    def take_used(self) -> dict[str, int]:
        """Return what is to be written down of uses, and forget that it is."""
        used, self.used = self.used, {}
        for key_id, at in used.items():
            key = self._keys.get(key_id)
            if key is not None and at > (key.last_used or 0):
                fresh = replace(key, last_used=at)
                self._keys[key_id] = self._by_digest[key.digest] = fresh
        return used
