"""The ledger of a daemon, and what stands on it: prices, the gate of turns, the keys at the door.

Imported only while `ledger` is on.
"""

from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.ledger.gate import TurnGate
from codex_proxy.ledger.ledger import Ledger
from codex_proxy.ledger.model import Mode
from codex_proxy.ledger.pricing import Pricing
from codex_proxy.server.holders import KeyHolders
from codex_proxy.server.metrics import LedgerFigures
from codex_proxy.storage.lock import StoreLock
from codex_proxy.tasks import Job

_MODES: dict[str, Mode] = {"personal": "personal", "billing": "billing"}


class Books:
    """Built with the daemon, opened when it starts.

    Raises:
        ConfigError: If what the database needs is not installed.
    """

    def __init__(self, live: Live, clock: Clock, lock: StoreLock) -> None:
        settings = live.current
        self.ledger = Ledger(
            settings.data_dir,
            mode=_MODES[settings.ledger],
            clock=clock,
            lock=lock,
            database_url=settings.database_url,
        )
        self.pricing = Pricing(self.ledger, clock.now)
        self.gate = TurnGate(self.ledger, self.pricing, live=live, clock=clock)
        self.holders = KeyHolders(self.ledger.directory, clock)

    async def open(self) -> None:
        """Open the database.

        Raises:
            ConfigError: If it cannot be used.
        """
        await self.ledger.start()
        try:
            await self.pricing.load()
        except BaseException:
            await self.ledger.aclose()
            raise

    def figures(self) -> LedgerFigures:
        """Return how it does, for a scrape."""
        now = self.ledger.statistics()
        writer = now.writer
        unpaid, lost = writer.shortfalls, writer.reaped
        return LedgerFigures(
            now.is_away,
            now.holds_open,
            writer.spooled,
            {
                "paid": writer.settled - unpaid - lost,
                "unpaid": unpaid,
                "lost": lost,
                "refused": writer.refused,
            },
        )

    def jobs(self) -> list[Job]:
        """Return what runs by itself."""
        return [*self.ledger.jobs(), *self.pricing.jobs(), *self.gate.jobs()]
