"""PostgreSQL as an SQLAlchemy engine: how long anything may take, and what is wrong when something is.

The driver speaks asyncio; whoever uses this has a thread and a loop of his own for it. A server that does not answer
is noticed here by our own clock, because one that is stopped cannot tell.
"""

import asyncio
import contextlib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from codex_proxy.errors import ConfigError

T = TypeVar("T")

_CONNECT_SECONDS = 4.0
# A server that is overloaded still does it in this time; a turn that waits for it longer is better off refused.
TRANSACTION_SECONDS = 8.0

# Classes and codes of PostgreSQL's own (SQLSTATE).
# 0A000: a statement was prepared before a column changed its type; the next try prepares it again.
_IN_THE_WAY = frozenset({"40001", "40P01", "55P03", "0A000"})
_TAKEN = "23505"
# Not 42: what is wrong then is a table or a right to it, as in the middle of a restore, and never a value.
_OF_THE_VALUES = ("22", "23", "44", "P0", "21", "2B", "39")


class Unreachable(Exception):
    """The server cannot be used now; the message says why, and has no secret in it."""


class InTheWay(Exception):
    """Another transaction was in the way of this one, which did nothing.

    Args:
        is_taken: What was to be written is there already; a second look will find it.
    """

    def __init__(self, message: str, *, is_taken: bool) -> None:
        super().__init__(message)
        self.is_taken = is_taken


class Postgres:
    """Connections to one database, for the loop that first uses it.

    Args:
        url: As libpq has it; what it does not say is taken from the environment (PGPASSWORD, PGPASSFILE, ...).
        is_writer: Whether it looks things up by index alone: a plan that was made while a table was small would read
            all of it, for ever.

    Raises:
        ConfigError: If the driver is not installed.
    """

    def __init__(self, url: str, *, connections: int, is_writer: bool) -> None:
        driver = _driver()
        self._driver = driver
        settings = {
            "application_name": "codex-proxy",
            "statement_timeout": f"{int(TRANSACTION_SECONDS * 1_000)}",
            # A process whose machine has vanished holds nobody up.
            "idle_in_transaction_session_timeout": f"{int(TRANSACTION_SECONDS * 2_000)}",
            "timezone": "UTC",
            # A plan that has to read a whole small table is thought to be dear where that is forbidden, and compiling it
            # takes a fifth of a second.
            "jit": "off",
        }
        if is_writer:
            settings["enable_seqscan"] = "off"
            # Whatever the server is set to: what is said to be written is.
            settings["synchronous_commit"] = "on"

        async def connect(**_: Any) -> Any:
            return await driver.connect(url, timeout=_CONNECT_SECONDS, server_settings=settings)

        self._engine: AsyncEngine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=connect,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=TRANSACTION_SECONDS,
            hide_parameters=True,
            connect_args={"prepared_statement_cache_size": 200},
        )

    async def transaction(
        self,
        work: Callable[[Connection], T],
        *,
        seconds: float = TRANSACTION_SECONDS,
        is_reading: bool = False,
    ) -> T:
        """Do *work* in a transaction.

        Raises:
            Unreachable: If the server cannot be used now; whether it was done is not known.
            InTheWay: If it was not done, and is worth another try.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        try:
            async with asyncio.timeout_at(ends_at):
                connection = await self._engine.connect()
            raw: Any = (await connection.get_raw_connection()).driver_connection
            # To be told to stop, and to say goodbye, would be one more thing that it does not answer.
            alarm = loop.call_at(ends_at, raw.terminate)
            try:
                if is_reading:
                    _ = await connection.execution_options(
                        isolation_level="REPEATABLE READ", postgresql_readonly=True
                    )
                async with connection.begin():
                    return await connection.run_sync(work)
            finally:
                alarm.cancel()
                await connection.close()
        except TimeoutError as exc:
            raise Unreachable(f"it does not answer within {seconds:g}s") from exc
        except OSError as exc:
            raise Unreachable(exc.strerror or type(exc).__name__) from exc
        except DBAPIError as exc:
            self._raise(exc, exc.orig)
            raise
        except (self._driver.PostgresError, self._driver.InterfaceError) as exc:
            self._raise(exc, exc)
            raise

    def _raise(self, error: BaseException, origin: BaseException | None) -> None:
        """Raise what *error* means, unless it is about what was to be written."""
        cause = (origin.__cause__ if origin is not None else None) or origin
        state = str(getattr(cause, "sqlstate", None) or getattr(origin, "sqlstate", None) or "")
        # Its first line, without the details: those have values in them.
        words = (str(cause).strip().splitlines() or [""])[0][:200] or type(cause).__name__
        if state in _IN_THE_WAY or state == _TAKEN:
            raise InTheWay(words, is_taken=state == _TAKEN) from error
        if not state.startswith(_OF_THE_VALUES) and not isinstance(cause, ValueError | TypeError):
            raise Unreachable(words) from error

    async def aclose(self) -> None:
        """Close what is open, without waiting for a server that does not answer."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._engine.dispose()


def _driver() -> Any:
    try:
        importlib.import_module("greenlet")
        return importlib.import_module("asyncpg")
    except ImportError as exc:
        raise ConfigError(
            "database-url: the driver for PostgreSQL is not installed; run `pip install 'codex-proxy[postgres]'`, or leave "
            "database-url empty"
        ) from exc
