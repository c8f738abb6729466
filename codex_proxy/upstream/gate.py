"""The place where a turn is admitted, topped up and settled: open until there is a ledger."""

from typing import Protocol

from codex_proxy.protocol.request import BackendRequest
from codex_proxy.trace import Trace


class Passage(Protocol):
    """One turn's way through the gate."""

    async def admit(self) -> None:
        """Let the turn begin, or raise a ProxyError in the caller's words."""
        ...

    async def top_up(self, text_bytes: int) -> bool:
        """Let the stream go on, of which there is so much text; asked once per upstream read, never per delta."""
        ...

    def settle(self) -> None:
        """Account for the turn, whose story is finished; called exactly once, also when it was not admitted.

        Never waits: the caller's answer is not held up, and whoever is told to end still settles.
        """
        ...


class Gate(Protocol):
    """Whether turns may begin, go on, and what they have cost in the end."""

    def enter(self, trace: Trace, request: BackendRequest) -> Passage:
        """Return the turn's passage; nothing has happened yet."""
        ...


class OpenGate:
    """Lets everything pass: a gate, and the one passage through it."""

    def enter(self, trace: Trace, request: BackendRequest) -> "OpenGate":
        """Return itself."""
        return self

    async def admit(self) -> None:
        """Let the turn begin."""

    async def top_up(self, text_bytes: int) -> bool:
        """Let the stream go on."""
        return True

    def settle(self) -> None:
        """Do nothing."""
