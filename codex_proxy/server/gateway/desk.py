"""What a handler of the admin API is given: the parts of the daemon, and one call, decoded."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, TypeVar

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import RequestError
from codex_proxy.server.access import holder

if TYPE_CHECKING:
    from codex_proxy.ledger.ledger import Ledger
    from codex_proxy.ledger.pricing import Pricing
    from codex_proxy.server.gateway.kept import KeptUpstreams
    from codex_proxy.upstream.providers import Providers

Q = TypeVar("Q")
B = TypeVar("B")

_LAST_DAY = datetime(9999, 12, 31, tzinfo=UTC)


class Desk:
    """The parts that the handlers work on, the daemon's own or some made for one command."""

    def __init__(
        self,
        live: Live,
        clock: Clock,
        *,
        ledger: "Ledger | None" = None,
        pricing: "Pricing | None" = None,
        providers: "Providers | None" = None,
        kept: "KeptUpstreams | None" = None,
    ) -> None:
        self.live = live
        self.clock = clock
        self._ledger = ledger
        self._pricing = pricing
        self._providers = providers
        self._kept = kept

    @property
    def has_ledger(self) -> bool:
        """Whether there is one."""
        return self._ledger is not None

    @property
    def ledger(self) -> "Ledger":
        """The ledger.

        Raises:
            RequestError: 404, if there is none; it says what to set.
        """
        if self._ledger is None:
            raise _off("there are no users, keys and money here")
        return self._ledger

    @property
    def pricing(self) -> "Pricing":
        """The prices; there are some where there is a ledger."""
        if self._pricing is None:
            raise _off("there are no prices here")
        return self._pricing

    @property
    def providers(self) -> "Providers":
        """The upstreams over HTTP.

        Raises:
            RequestError: 503, if nobody here knows how they do.
        """
        if self._providers is None:
            raise RequestError(
                "how upstreams do is known to a running daemon only",
                status=503,
                code="no_daemon",
                type="server_error",
            )
        return self._providers

    @property
    def kept(self) -> "KeptUpstreams":
        """The upstreams that were added here.

        Raises:
            RequestError: 404, if there is nowhere to keep them; it says what to set.
        """
        if self._kept is None:
            raise _off(
                "upstreams that are added while the daemon runs are kept in the ledger; those of the configuration (upstreams) need none"
            )
        return self._kept

    def name_of_user(self, user_id: str) -> str:
        """Return what a user is called."""
        user = self.ledger.directory.user(user_id)
        return user_id if user is None else user.name

    def name_of_key(self, key_id: str) -> str:
        """Return what a key is called, one of the configuration too; any other caller is called by its id."""
        key = self.ledger.directory.key(key_id)
        if key is not None:
            return key.name
        callers = (holder(one) for one in self.live.current.api_keys)
        return next((one.name for one in callers if one.id == key_id), key_id)


def _off(what: str) -> RequestError:
    return RequestError(
        f"{what}, and the ledger is off: set ledger: personal (usage is kept for each key) or ledger: billing (users pay "
        "from a balance) in the configuration, and restart",
        status=404,
        code="ledger_off",
    )


@dataclass(slots=True, frozen=True)
class Call(Generic[Q, B]):
    """What is asked for, and by whom."""

    name: str
    """What stands in the path's open segment: an id, or a name."""
    query: Q
    body: B
    actor: str


@dataclass(slots=True, frozen=True)
class Csv:
    """A table for a spreadsheet."""

    name: str
    data: bytes


def moment(milliseconds: int) -> datetime:
    """Return a time of the ledger as it is told; one beyond the calendar is its last day."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return _LAST_DAY


def maybe_when(seconds: float | None) -> datetime | None:
    """Return a time in seconds as it is told."""
    return None if seconds is None else moment(int(seconds * 1000))


def maybe_moment(milliseconds: int | None) -> datetime | None:
    """Return a time, or none where there is none."""
    return None if milliseconds is None else moment(milliseconds)


def millis(at: datetime) -> int:
    """Return a time as the ledger keeps it."""
    return int(at.timestamp() * 1000)
