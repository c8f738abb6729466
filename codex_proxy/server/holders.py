"""Who holds a client key of the ledger; imported only where there is one."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from codex_proxy.addresses import read_address
from codex_proxy.clock import Clock
from codex_proxy.errors import KeyRefused
from codex_proxy.ledger.directory import Directory
from codex_proxy.ledger.keys import digest_of, is_well_formed
from codex_proxy.ledger.model import Key, User
from codex_proxy.trace import Caller

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class KeyHolders:
    """Turns the text of a key into its caller, by what the ledger knows at this moment."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock

    @property
    def are_there(self) -> bool:
        """Whether the ledger has any key at all, so that one is needed."""
        return self._directory.has_keys

    def find(self, text: str, address: str | None) -> Caller | None:
        """Return the caller whose key *text* is, and who asks from *address*; None when it is no key of the ledger.

        Raises:
            KeyRefused: If it is one that may not be used: not any more, or not from there.
        """
        key = self._directory.key_by_digest(digest_of(text))
        if key is None:
            if is_well_formed(text):
                raise KeyRefused("this client key is not known: it was made by another proxy, or deleted")
            return None
        return self._admit(key, address)

    def check(self, key_id: str, address: str | None) -> Caller:
        """Return the caller whose key has this id, and who asks from *address*.

        Raises:
            KeyRefused: If it may not be used: not any more, or not from there.
        """
        key = self._directory.key(key_id)
        if key is None:
            raise KeyRefused("this client key is not known any more")
        return self._admit(key, address)

    def is_good(self, key_id: str, digest: str) -> bool:
        """Tell whether the key with this id may be used from anywhere, by the text that has this digest."""
        try:
            key = self._directory.key_by_digest(bytes.fromhex(digest))
        except ValueError:
            return False
        try:
            return key is not None and key.id == key_id and self._admit_from_somewhere(key) is not None
        except KeyRefused:
            return False

    def _admit(self, key: Key, address: str | None) -> Caller:
        user = self._admit_from_somewhere(key)
        for limits in (key.limits, user.limits):
            if limits.networks and not is_within(address, limits.networks):
                raise KeyRefused(
                    "this client key may not be used from this address", code="address_not_allowed"
                )
        return Caller(key.id, key.name)

    def _admit_from_somewhere(self, key: Key) -> User:
        if key.status != "active":
            raise KeyRefused("this client key was revoked", code="key_revoked")
        if key.expires is not None and key.expires <= self._clock.now() * 1000:
            raise KeyRefused("this client key has expired", code="key_expired")
        user = self._directory.user(key.user_id)
        if user is None or user.status != "active":
            raise KeyRefused("the owner of this client key is suspended", code="user_suspended")
        return user


def is_within(address: str | None, networks: Sequence[str]) -> bool:
    """Tell whether *address* lies in one of *networks*."""
    # A Unix socket has none.
    found = None if address is None else read_address(address)
    return found is not None and any(found in network for network in _parsed(tuple(networks)))


@lru_cache(maxsize=1024)
def _parsed(networks: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(one, strict=False) for one in networks)
