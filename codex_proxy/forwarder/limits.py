"""How often one address may ask, and which address that is."""

import ipaddress
from collections.abc import Sequence

from codex_proxy.addresses import read_address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_ADDRESSES = 50_000
"""How many are remembered; past it those that came first are forgotten, who then have asked nothing yet."""

_MINUTE = 60.0


class Limiter:
    """So many requests a minute for each address: that many at once, then one at a time.

    One number for each is kept, the time at which it has used up what it asked for (the cell rate algorithm):
    nothing has to be counted down, and the wait it tells is exact.
    """

    def __init__(self, per_minute: int) -> None:
        self._spacing = _MINUTE / per_minute
        self._until: dict[str, float] = {}

    def admit(self, address: str, now: float) -> float:
        """Count a request at *now*; return 0, or in how many seconds there is room for one."""
        used_up = max(now, self._until.get(address, now))
        wait = used_up + self._spacing - now - _MINUTE
        # Sums of fractions are a little off.
        if wait > 1e-6:
            return wait
        if address not in self._until and len(self._until) >= MAX_ADDRESSES:
            self._make_room(now)
        self._until[address] = used_up + self._spacing
        return 0.0

    def __len__(self) -> int:
        return len(self._until)

    def _make_room(self, now: float) -> None:
        self._until = {one: until for one, until in self._until.items() if until > now}
        surplus = len(self._until) - MAX_ADDRESSES * 9 // 10
        for one in list(self._until)[: max(0, surplus)]:
            del self._until[one]


def network_of(text: str) -> Network:
    """Read an address or a network such as 10.0.0.0/8.

    Raises:
        ValueError: If it is none.
    """
    return ipaddress.ip_network(text.strip(), strict=False)


def caller_of(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return who asks: what relays say of it is believed only of *trusted* ones, from the last one on."""
    who = peer
    if trusted and _is_in(peer, trusted):
        hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
        for hop in reversed(hops):
            address = read_address(hop)
            if address is None:
                break
            who = str(address)
            if not _is_in(who, trusted):
                break
    return who


def slot_of(address: str) -> str:
    """Return whose count a request is: whoever has one address of IPv6 has a whole network of them."""
    parsed = read_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed) if parsed is not None else address


def is_loopback(address: str) -> bool:
    """Tell whether an address is this machine's own."""
    parsed = read_address(address)
    return parsed is not None and parsed.is_loopback


def _is_in(address: str, networks: Sequence[Network]) -> bool:
    parsed = read_address(address)
    return parsed is not None and any(parsed in network for network in networks)
