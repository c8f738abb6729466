"""Builds everything, starts it in order, and ends it without losing anything.

The end, after SIGTERM or SIGINT: not ready, no new connections, streams may end until
drain-timeout, what is left gets a proper terminal error, token exchanges in flight are waited
for, unsaved tokens are tried once more. A second signal skips the waiting for streams.
"""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from codex_proxy import __version__, config, logs
from codex_proxy.accounts.actions import Actions
from codex_proxy.accounts.memory import OWNERS_FILE, Memory, Owners
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.upkeep import EXCHANGE_SECONDS, Keeper
from codex_proxy.clock import Clock, SystemClock
from codex_proxy.config import ApiKey, Live, Loaded, Settings
from codex_proxy.errors import ConfigError, PoolShortage, ProxyError
from codex_proxy.net import Outbound
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.server import keyfile
from codex_proxy.server.access import Access, Level
from codex_proxy.server.admin import admin_handlers, control_handlers
from codex_proxy.server.app import CONTROL_ROUTES, ROUTES, Route, build_app
from codex_proxy.server.counting import TokenCounter
from codex_proxy.server.decisions import Decisions
from codex_proxy.server.front import Handler
from codex_proxy.server.listener import Listener
from codex_proxy.server.public import Public, log_turn
from codex_proxy.server.usage import PoolUsage
from codex_proxy.server.views import Phase, PoolAdmin
from codex_proxy.tasks import Background, Job
from codex_proxy.upstream.backend import AccountRoute
from codex_proxy.upstream.executor import Executor

logger = logging.getLogger(__name__)

CONTROL_SOCKET = "control.sock"
"""In data-dir: where commands reach a running daemon; only its owner may open it."""

# How soon a daemon that was started beside another notices that it is alone.
_TAKE_OVER_SECONDS = 2.0

# How many objects may be made before the young ones are looked through for cycles.
_GC_THRESHOLD = 10_000

# How long the last terminal errors may take to reach their callers.
_CUT_SECONDS = 5.0

_RENDERERS = {dialect.name: dialect.render_error for dialect in (RESPONSES, MESSAGES)}


class Daemon:
    """The whole process, as an object that tests can start and stop.

    Args:
        loaded: The settings, and where they came from.
        environ: The environment, for reading the settings again.
    """

    def __init__(
        self, loaded: Loaded, *, environ: Mapping[str, str] | None = None, clock: Clock | None = None
    ) -> None:
        self._loaded = loaded
        self._environ = environ if environ is not None else {}
        self.live = Live(loaded.settings)
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.background = Background(self.clock.sleep)
        self.outbound = Outbound(self.live)
        owners = Owners(loaded.settings.data_dir / OWNERS_FILE)
        self.pool = Pool(self.clock, owners=owners)
        self.memory = Memory(
            self.pool, live=self.live, clock=self.clock, background=self.background, owners=owners
        )
        self.pool.on_added = self.memory.recall
        self.pool.apply_settings(loaded.settings)
        self.keeper = Keeper(
            self.pool,
            live=self.live,
            clock=self.clock,
            background=self.background,
            outbound=self.outbound,
        )
        route = AccountRoute(self.pool, self.keeper, live=self.live, clock=self.clock, outbound=self.outbound)
        self.executor = Executor(route, live=self.live, clock=self.clock, background=self.background)
        self.executor.listen(log_turn)
        self.executor.listen(self.pool.count_turn)
        self.decisions = Decisions()
        self.executor.listen(self.decisions.note)
        self._open_control: Callable[[Path], Awaitable[bool]] | None = None
        self._phase: Phase = "starting"
        self._listener = Listener()
        self._counter = TokenCounter()
        self.port = 0
        """Where it listens; known once started."""

    @property
    def url(self) -> str:
        """The address for a client on this machine."""
        host = self.live.current.listen_host
        if host in (None, "0.0.0.0"):
            host = "127.0.0.1"
        elif host == "::":
            host = "::1"
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{self.port}"

    # -- start ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the accounts, open the port, start what runs by itself.

        Raises:
            OSError: If the port cannot be opened.
            ProxyError: If the client key cannot be made or read.
        """
        settings = self.live.current
        await asyncio.to_thread(_make_folders, settings)
        access = Access(self.live, self._client_key(settings))
        await self.keeper.load()
        await self.memory.load()
        if not len(self.pool):
            logger.warning("no account loaded yet: put account files into %s", settings.auth_dir)

        admin = PoolAdmin(
            self.pool,
            self.keeper,
            Actions(self.pool, self.keeper, live=self.live, clock=self.clock, outbound=self.outbound),
            clock=self.clock,
            background=self.background,
            phase=lambda: self._phase,
        )
        owner = admin_handlers(admin, self.decisions, self.clock.monotonic)
        public = Public(
            self.executor,
            self.pool,
            live=self.live,
            clock=self.clock,
            counter=self._counter,
            resolve=access.resolve,
        )
        usage = PoolUsage(self.pool, live=self.live)
        app = build_app(access, {**public.handlers(), **usage.handlers(), **owner}, _RENDERERS)
        self.port = await self._listener.open_port(app, settings.listen_host, settings.listen_port)
        owner |= control_handlers(admin)
        control = build_app(access, owner, _RENDERERS, self._control_routes(owner))
        self._open_control = functools.partial(self._listener.open_unix, control)
        await self._take_control()

        self.live.subscribe(lambda _, new: logs.set_level(new.log_level))
        self.live.subscribe(lambda _, new: self.pool.apply_settings(new))
        own = Job("control", lambda: 0.0 if self.memory.may_write else _TAKE_OVER_SECONDS, self._take_control)
        jobs = (*self.keeper.jobs(), *self.memory.jobs(), *self.executor.jobs(), *public.jobs(), own)
        for job in jobs:
            _ = self.background.start(job)
        _ = self.background.spawn(
            config.watch(self.live, self._loaded.path, self._environ, since=self._loaded), name="config"
        )
        self._phase = "ready"
        logger.info("listening url=%s accounts=%d version=%s", self.url, len(self.pool), __version__)

    async def _take_control(self) -> None:
        """Listen for commands, and write what is remembered, unless another daemon on this data-dir does."""
        assert self._open_control is not None
        path = self.live.current.data_dir / CONTROL_SOCKET
        was_ours = self.memory.may_write
        self.memory.may_write = not await self._listener.is_taken(path)
        if self.memory.may_write:
            await self._open_control(path)
        elif was_ours:
            logger.warning(
                "another daemon uses this data-dir: commands reach that one, and until it ends nothing is written of "
                "what this one learns; if both are to stay, give each its own path=%s",
                path.parent,
            )

    def _client_key(self, settings: Settings) -> ApiKey | None:
        if not keyfile.needs_key(settings):
            return None
        key, created = keyfile.ensure_client_key(settings.data_dir)
        keyfile.announce(key, created, settings.data_dir, sys.stderr)
        return ApiKey.of("generated", key)

    def _control_routes(self, handlers: Mapping[str, Handler]) -> list[Route]:
        """Return the owner's routes without a key: only the owner can open the control socket."""
        return [
            dataclasses.replace(route, level=Level.PUBLIC)
            for route in (*ROUTES, *CONTROL_ROUTES)
            if route.handler in handlers
        ]

    # -- end ------------------------------------------------------------------------------

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """End in order; *hurry* cuts the waiting for streams short."""
        self._phase = "draining"
        logger.info("draining turns=%d requests=%d", self.executor.in_flight, self._listener.in_work)
        await self._listener.refuse()
        await self._drain(hurry if hurry is not None else asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CUT_SECONDS):
                await self._cut_turns()
                # A terminal event in our buffer is none yet.
                await self._listener.flush()
        await self._listener.aclose()
        await self._counter.aclose()
        self.keeper.end()
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS + 5.0):
                # What could start another exchange ends first; those in flight are waited for.
                await self.background.aclose()
        except TimeoutError:
            logger.error("a token exchange did not end in time")
        await self.keeper.save_unsaved()
        await self.memory.save()
        await self.outbound.aclose()
        logger.info("stopped")

    async def _drain(self, hurry: asyncio.Event) -> None:
        """Let what is in work end, up to drain-timeout."""

        async def all_out() -> None:
            await self._listener.wait_idle()
            await self._listener.flush()

        drained = self.background.spawn(all_out(), name="drain")
        hurried = self.background.spawn(hurry.wait(), name="hurry")
        await asyncio.wait(
            {drained, hurried},
            timeout=self.live.current.drain_timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (drained, hurried):
            task.cancel()

    async def _cut_turns(self) -> None:
        """End every turn with a proper error, those too that only now begin."""
        while self.executor.in_flight:
            self.executor.cut_all(PoolShortage("the proxy is being restarted; try again in 1s"))
            await self.executor.drain(0.05)

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT, then end in order."""
        loop = asyncio.get_running_loop()
        ending, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if ending.is_set() else ending).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await self.start()
        # What is there now stays; looking through it again and again finds nothing.
        gc.collect()
        gc.freeze()
        # A turn makes hundreds of objects, all of them gone with it: the default looks for cycles once a turn.
        gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
        try:
            await ending.wait()
        finally:
            await self.stop(hurry)


def _make_folders(settings: Settings) -> None:
    """Make data-dir, for its owner only, and auth-dir, where the first files will be put.

    Raises:
        ConfigError: If one of them cannot be made.
    """
    for key, folder in (("data-dir", settings.data_dir), ("auth-dir", settings.auth_dir)):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"{key}: {folder}: {exc.strerror or type(exc).__name__}") from exc


def _allow_many_connections() -> None:
    """Let the process have as many sockets as it may: the usual 1,024 are 500 streams, each with two."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        resource = importlib.import_module("resource")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def new_event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's event loop, which delivers events sooner; None where there is none."""
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def run(loaded: Loaded) -> int:
    """Run the daemon until it is told to end; return the exit code."""
    logs.setup(loaded.settings.log_level)
    _allow_many_connections()
    for warning in loaded.warnings:
        logger.warning("configuration: %s", warning)
    if loaded.path is None:
        logger.info("no configuration file; the defaults and the environment count")

    async def main() -> None:
        daemon = Daemon(loaded, environ=dict(os.environ))
        try:
            await daemon.run_until_signalled()
        except BaseException:
            await daemon.background.aclose()
            await daemon.outbound.aclose()
            raise

    try:
        with asyncio.Runner(loop_factory=new_event_loop()) as runner:
            runner.run(main())
    except ProxyError as exc:
        logger.error("not started: %s", exc.message)
        return 1
    except OSError as exc:
        logger.error("not started: cannot listen on %s: %s", loaded.settings.listen, exc.strerror or exc)
        return 1
    return 0
