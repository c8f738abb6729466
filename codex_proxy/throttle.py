"""How slow guessing is: wrong keys counted by network, and what another try costs there."""

import hashlib
import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache

from codex_proxy.addresses import read_address

_FREE_GUESSES = 5
_FIRST_WAIT = 2.0
_LONGEST_WAIT = 300.0
_FORGET_SECONDS = 900.0
_MAX_ADDRESSES = 10_000
# From all addresses together: a network of them is no way around.
_ALL = ""
_FREE_FOR_ALL = 60
_MAX_KNOWN = 1_000
# This machine, as `_network` calls it: whoever sits at it is kept out by nobody elsewhere.
_HERE = frozenset({"127.0.0.1", "::"})


class Throttle:
    """Make guessing slow: some tries are free, then each costs a pause twice as long as the last.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """By network: how many in a row, and when the last one was."""
        self._known: OrderedDict[str, None] = OrderedDict()
        """Networks from which somebody got in: what others guess keeps nobody out there."""
        self._wrong: OrderedDict[tuple[str, bytes], float] = OrderedDict()
        """What `guessed` has counted, by network and digest of the key, and when it came last."""
        self._is_told = False
        """Somebody was kept out since the last try that counted, and the log has it."""

    def wait(self, address: str) -> float:
        """Return how many seconds to wait before another try; 0 is none."""
        if not self._failures:
            return 0.0
        network = _network(address)
        wait = self._wait(network, _FREE_GUESSES)
        return (
            wait if network in _HERE or network in self._known else max(wait, self._wait(_ALL, _FREE_FOR_ALL))
        )

    def _wait(self, who: str, free: int) -> float:
        count, last = self._failures.get(who, (0, 0.0))
        if count < free:
            return 0.0
        pause = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(count - free, 30))
        return max(0.0, last + pause - self._now())

    def failed(self, address: str) -> None:
        """Count a try that failed."""
        now = self._now()
        self._is_told = False
        for who in (_network(address), _ALL):
            count, last = self._failures.pop(who, (0, now))
            if now - last > _FORGET_SECONDS:
                count = 0
            self._failures[who] = (count + 1, now)
        while len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)

    def guessed(self, address: str, key: str) -> bool:
        """Count a wrong key that came with a request; tell whether it was a new one from there.

        A program that goes on asking with a key that is good no more learns nothing by it, and keeps nobody out.
        """
        now = self._now()
        guess = _network(address), hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        last = self._wrong.pop(guess, None)
        self._wrong[guess] = now
        if last is not None and now - last <= _FORGET_SECONDS:
            return False
        if len(self._wrong) > _MAX_ADDRESSES:
            self._wrong.popitem(last=False)
        self.failed(address)
        return True

    def succeeded(self, address: str, *, is_owner: bool = True) -> None:
        """Take the last try back, and forget those before it if that was an owner: a client key buys no guesses."""
        network = _network(address)
        if is_owner:
            self._failures.pop(network, None)
        else:
            self._take_back(network)
        self.admitted(address)
        self._take_back(_ALL)

    def admitted(self, address: str) -> None:
        """Note that a right key came with a request.

        Nothing is forgotten: one that comes every few seconds would make guesses free for all who share its address.
        """
        network = _network(address)
        self._known[network] = None
        self._known.move_to_end(network)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def is_news(self) -> bool:
        """Tell whether that somebody is kept out is worth a line of the log: once for each try that counted."""
        is_news, self._is_told = not self._is_told, True
        return is_news

    def _take_back(self, who: str) -> None:
        count, last = self._failures.get(who, (0, 0.0))
        if count:
            self._failures[who] = (count - 1, last)

    def forget(self) -> None:
        """Forget what is long ago."""
        long_ago = self._now() - _FORGET_SECONDS
        while self._failures and next(iter(self._failures.values()))[1] < long_ago:
            self._failures.popitem(last=False)
        while self._wrong and next(iter(self._wrong.values())) < long_ago:
            self._wrong.popitem(last=False)


@lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """Return whom to count for an address: of IPv6 the network, which one person has all of."""
    found = read_address(address)
    if found is None:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((found, 64), strict=False).network_address)
    return str(found)
