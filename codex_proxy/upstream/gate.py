"""The place where a turn is admitted, topped up and settled: open until there is a ledger."""

from typing import Protocol

from codex_proxy.protocol.request import BackendRequest
from codex_proxy.trace import Trace


class Gate(Protocol):
    """Whether a turn may begin, go on, and what it has cost in the end."""

    async def admit(self, trace: Trace, request: BackendRequest) -> None:
        """Let the turn begin, or raise a ProxyError in the caller's words."""
        ...

    async def top_up(self, trace: Trace, delivered_bytes: int) -> bool:
        """Let the stream go on; asked once per upstream read, never per delta."""
        ...

    async def settle(self, trace: Trace) -> None:
        """Account for a finished turn; called exactly once, whatever happened."""
        ...


class OpenGate:
    """Lets everything pass."""

    async def admit(self, trace: Trace, request: BackendRequest) -> None:
        """Let the turn begin."""

    async def top_up(self, trace: Trace, delivered_bytes: int) -> bool:
        """Let the stream go on."""
        return True

    async def settle(self, trace: Trace) -> None:
        """Do nothing."""
