"""Targets, as the executor sees them: an account, or an upstream over HTTP."""

from collections.abc import Collection, Mapping
from typing import Protocol

from codex_proxy.errors import UpstreamError
from codex_proxy.net import Answer
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.trace import Decision


class Lease(Protocol):
    """The right to one exchange with one target: reported, and released once."""

    key: str
    """The target's identity."""
    alias: str
    """Its name for logs and pages."""
    upstream: str
    """The same for an upstream; empty for an account."""
    decision: Decision
    """Why it was picked."""
    is_native: bool
    """Whether the answer comes in the caller's own dialect, and passes as it is."""
    is_as_named: bool
    """Whether the model is asked that the caller named, and not the one that stands for it here."""
    drains: bool
    """Whether an answer is read on when its caller has left, so that what it has cost is known."""
    max_retries: int | None
    """Further attempts of one turn on this target; None: as many as there may be."""
    first_byte_timeout: float | None
    """How long it may be silent before its answer begins; None: as long as any."""

    async def open(self, request: BackendRequest) -> Answer:
        """Send the request; return an answer whose status is good.

        Raises:
            UpstreamError: If there is none.
        """
        ...

    async def recover(self, error: UpstreamError, request: BackendRequest) -> bool:
        """Try to mend what failed on this target; True when one more `open` is worth it."""
        ...

    def wrap_turn_state(self, value: str) -> str:
        """Bind a turn-state to this target."""
        ...

    def observe(self, kind: str, payload: Mapping[str, object]) -> None:
        """Take in what an event of the stream tells of the target itself."""
        ...

    def ok(self) -> None:
        """Report that the target answered."""
        ...

    def failed(self, error: UpstreamError) -> None:
        """Report a failure."""
        ...

    def release(self) -> None:
        """Give the target back."""
        ...


class Route(Protocol):
    """Where the next attempt goes."""

    def pick(self, request: BackendRequest, tried: Collection[str]) -> Lease:
        """Take a target that has not been tried.

        Raises:
            PoolError: If there is none now.
            RequestError: If no target can ever serve this.
        """
        ...

    async def wait_for_place(
        self, request: BackendRequest, tried: Collection[str], *, seconds: float, ticket: float
    ) -> None:
        """Wait until a target that could serve *request* has room, *seconds* at most; the smallest ticket goes first."""
        ...

    def limits(self) -> JsonObject | None:
        """Return the route's quota as a caller may see it; None when nothing is known."""
        ...
