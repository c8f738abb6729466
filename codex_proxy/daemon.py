"""Builds everything, starts it in order, and ends it without losing anything.

The end, after SIGTERM or SIGINT: not ready, no new connections, streams may end until
drain-timeout, what is left gets a proper terminal error, token exchanges in flight are waited
for, unsaved tokens are tried once more. A second signal skips the waiting for streams.

A restart (`handover`) is a start and an end at a time: the new process prepares itself, this one
stops taking newcomers, writes what it knows and gives up what only one may have, the new one serves
with the same sockets, and this one drains. SIGHUP reads the configuration again.
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
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from codex_proxy import __version__, config, handover, logs
from codex_proxy.accounts.actions import Actions
from codex_proxy.accounts.memory import OWNERS_FILE, Afterwards, Memory, Owners, take_news
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.upkeep import EXCHANGE_SECONDS, Keeper
from codex_proxy.alerts.watch import Alerts
from codex_proxy.clock import Clock, SystemClock
from codex_proxy.config import CONTROL_SOCKET, ApiKey, Live, Loaded, Settings, Watcher
from codex_proxy.errors import ConfigError, PoolShortage, ProxyError
from codex_proxy.handover import NotRestarted, Predecessor, Successor
from codex_proxy.net import Outbound
from codex_proxy.protocol.messages import MESSAGES
from codex_proxy.protocol.responses import RESPONSES
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.records.records import Records
from codex_proxy.server import keyfile
from codex_proxy.server.access import Access, Level
from codex_proxy.server.admin import Admin, admin_handlers, control_handlers
from codex_proxy.server.app import ACCOUNT_ROUTES, ROUTES, UI_ROUTES, Route, build_app
from codex_proxy.server.control import LOCAL_ROUTES, local_handlers
from codex_proxy.server.counting import TokenCounter
from codex_proxy.server.dashboard.api import Page
from codex_proxy.server.dashboard.recent import Recent, Tails
from codex_proxy.server.dashboard.sessions import FILE as SESSIONS_FILE
from codex_proxy.server.dashboard.sessions import Sessions
from codex_proxy.server.decisions import Decisions
from codex_proxy.server.facts import facts_of
from codex_proxy.server.front import Front, Handler
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.holding import HOLDER_ROUTES, holder_handlers
from codex_proxy.server.gateway.routes import (
    GATEWAY_ROUTES,
    GATEWAY_UI_ROUTES,
    gateway_handlers,
    gateway_ui_handlers,
    usage_told,
)
from codex_proxy.server.listener import Listener, open_sockets
from codex_proxy.server.metrics import Metrics, Sources
from codex_proxy.server.public import Models, Public, log_turn
from codex_proxy.server.pulse import LoopLag, Pulse
from codex_proxy.server.requests import Requests, requests_handlers
from codex_proxy.server.tally import Tally
from codex_proxy.server.usage import PoolUsage
from codex_proxy.server.views import Phase, PoolAdmin
from codex_proxy.storage.lock import StoreLock
from codex_proxy.supervisor import Supervisor, take_sockets
from codex_proxy.tasks import Background, Job
from codex_proxy.throttle import Throttle
from codex_proxy.trace import TraceSink
from codex_proxy.upstream.backend import AccountRoute
from codex_proxy.upstream.executor import Executor
from codex_proxy.upstream.providers import Providers
from codex_proxy.upstream.routing import MergedRoute

if TYPE_CHECKING:
    from codex_proxy.server.books import Books
    from codex_proxy.server.gateway.kept import KeptUpstreams
    from codex_proxy.telemetry import Telemetry

logger = logging.getLogger(__name__)

# How soon a daemon that was started beside another notices that it is alone.
_TAKE_OVER_SECONDS = 2.0

# How many objects may be made before the young ones are looked through for cycles.
_GC_THRESHOLD = 10_000

# How long the last terminal errors may take to reach their callers.
_CUT_SECONDS = 5.0

# After a restart, how long a request may be on its way to an idle connection of the old process.
_IDLE_SECONDS = 10.0

_NEWS_SECONDS = 1.0
"""How often the new process is told what the old one still learns."""

_WHILE_DRAINING = frozenset({
    "files",
    "watch",
    "saves",
    "memory",
    "keep-alive",
    "sockets",
    "watchdog",
    "loop-lag",
})
"""The jobs that requests in work need; all others are the new process's once one takes over."""

_RENDERERS = {dialect.name: dialect.render_error for dialect in (RESPONSES, MESSAGES)}


class Daemon:
    """The whole process, as an object that tests can start and stop.

    Args:
        loaded: The settings, and where they came from.
        environ: The environment, for reading the settings again.
        sockets: Open already, by whoever started us; `listen` then only says how to call them.
        predecessor: The process that hands over to this one.
        command: How to start such a process; without it there is no restart.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        environ: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        sockets: Sequence[socket.socket] = (),
        predecessor: Predecessor | None = None,
        command: Sequence[str] = (),
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
        lock = StoreLock(loaded.settings.data_dir)
        self.books = _books(self.live, self.clock, lock)
        route = AccountRoute(self.pool, self.keeper, live=self.live, clock=self.clock, outbound=self.outbound)
        self.executor = Executor(
            route,
            live=self.live,
            clock=self.clock,
            background=self.background,
            gate=None if self.books is None else self.books.gate,
        )
        self.providers = Providers(
            live=self.live,
            clock=self.clock,
            background=self.background,
            outbound=self.outbound,
            origins=self.pool.origins,
        )
        merged = MergedRoute(route, self.providers, live=self.live, clock=self.clock)

        def choose_route() -> None:
            # Where there are no upstreams, nothing is paid for them.
            self.executor.route = merged if len(self.providers) else route

        self.providers.on_change = choose_route
        self.providers.follow(loaded.settings)
        self.executor.listen(self.pool.count_turn)
        self.decisions = Decisions()
        self.executor.listen(self.decisions.note)
        self.pulse = Pulse(self.pool, self.executor, clock=self.clock)
        self.loop_lag = LoopLag(self.clock)
        self.loop_lag.listen(self.pulse.note_lag)
        self.models = Models(self.pool, self.live, self.providers)
        self.providers.catalog_of = lambda: self.models.catalog
        self.tally = Tally(lambda: self.models.catalog)
        self.loop_lag.listen(self.tally.lag.add)
        self.records = Records(loaded.settings.data_dir, live=self.live, clock=self.clock, lock=lock)
        self.tails = Tails()
        self.listeners: list[TraceSink] = [
            log_turn,
            self.pulse.note,
            self.tally.note,
            self.records.note,
            self.tails.note,
        ]
        """Who hears of every turn, also of one that was refused before any account was looked at."""
        self.telemetry = _telemetry(loaded.settings)
        if self.telemetry is not None:
            self.listeners.append(self.telemetry.note)
        for listener in self.listeners:
            self.executor.listen(listener)
        self.requests = Requests(self.records, Recent(self.decisions.traces, self.tails))
        self.sessions = Sessions(
            loaded.settings.data_dir / SESSIONS_FILE,
            live=self.live,
            clock=self.clock,
            background=self.background,
        )
        self.alerts = Alerts(
            lambda: facts_of(self.pool, self.pulse, self.clock),
            self.outbound.fetch,
            live=self.live,
            clock=self.clock,
            background=self.background,
            may_act=lambda: self.memory.may_write,
            host=socket.gethostname(),
        )
        self._open_control: Callable[[Path], Awaitable[bool]] | None = None
        self._phase: Phase = "starting"
        self._listener = Listener()
        self._given = list(sockets)
        self._is_given = bool(sockets)
        self._listens_as = loaded.settings.listen
        """The setting, as the file has it, that the sockets are open for."""
        self._predecessor = predecessor
        self._left_control = None if predecessor is None else predecessor.estate.control
        self._command = list(command)
        self._jobs: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._restarting: asyncio.Task[JsonObject] | None = None
        self._successor: Successor | None = None
        """Set once it serves."""
        self._afterwards: Afterwards | None = None
        self._following: asyncio.Task[None] | None = None
        """Ends with the process before this one, which may have something to tell until then."""
        self._watcher: Watcher | None = None
        self._supervisor = Supervisor(self._environ)
        self._ending, self._hurry = asyncio.Event(), asyncio.Event()
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
        self._take_sockets()
        settings = self.live.current
        await asyncio.to_thread(_make_folders, settings)
        access = Access(self.live, self._client_key(settings), self.sessions, Throttle(self.clock.monotonic))
        self.sessions.access = access
        await self.sessions.load()
        await self.records.prepare()
        await self.keeper.load()
        self._watcher = await asyncio.to_thread(
            Watcher, self.live, self._loaded.path, self._environ, self._loaded
        )
        if self._predecessor is None:
            await self._open_books(access)
        sockets = self._given or await open_sockets(settings.listen_host, settings.listen_port)
        if self._predecessor is not None:
            await self._predecessor.wait_for_go()
            if self._ending.is_set():
                # Serving only to end would end the service.
                raise ProxyError("told to end before it served")
            # What it did meanwhile: tokens it got, files that came, who logged in.
            await self.keeper.load()
            await self.sessions.load()
            await self._open_books(access)
        await self.memory.load()
        if not len(self.pool) and not len(self.providers):
            logger.warning("no account loaded yet: put account files into %s", settings.auth_dir)

        admin = PoolAdmin(
            self.pool,
            self.keeper,
            Actions(self.pool, self.keeper, live=self.live, clock=self.clock, outbound=self.outbound),
            clock=self.clock,
            background=self.background,
            phase=lambda: self._phase,
            providers=self.providers,
        )
        owner = admin_handlers(admin, self.decisions, self.clock.monotonic, self.requests.story)
        owner |= requests_handlers(self.requests)
        public = Public(
            self.executor,
            self.pool,
            live=self.live,
            clock=self.clock,
            listed=self.models,
            listeners=self.listeners,
            counter=self._counter,
            resolve=access.resolve,
            providers=self.providers,
            models_of=None if self.books is None else self.books.gate.models_of,
            count=None if self.books is None else self.books.gate.count,
        )
        usage = PoolUsage(self.pool, live=self.live)
        owner |= self._metrics(public).handlers()
        page = self._page(admin, public)
        owner |= control_handlers(admin)
        kept = await self._kept_upstreams()
        desk = (
            Desk(self.live, self.clock, providers=self.providers)
            if self.books is None
            else Desk(
                self.live,
                self.clock,
                ledger=self.books.ledger,
                pricing=self.books.pricing,
                providers=self.providers,
                kept=kept,
            )
        )
        owner |= gateway_handlers(desk)
        if desk.has_ledger:
            self.requests.usage_of = functools.partial(usage_told, desk)
        app = build_app(
            access,
            {
                **public.handlers(),
                **usage.handlers(),
                **owner,
                **page.handlers(),
                **gateway_ui_handlers(desk),
                **holder_handlers(desk, self.sessions, page.holders_setup),
            },
            _RENDERERS,
            (*ROUTES, *ACCOUNT_ROUTES, *UI_ROUTES, *GATEWAY_ROUTES, *GATEWAY_UI_ROUTES, *HOLDER_ROUTES),
        )
        self.port = _port_of(sockets)
        await self._listener.serve(app, sockets)
        owner |= local_handlers(self._now, self.restart)
        control = build_app(access, owner, _RENDERERS, self._control_routes(owner))
        self._open_control = functools.partial(self._serve_control, control)
        await self._take_control()
        await self.alerts.load()

        self.live.subscribe(lambda _, new: logs.set_level(new.log_level))
        self.live.subscribe(lambda _, new: logs.set_format(new.log_format))
        self.live.subscribe(lambda _, new: self.pool.apply_settings(new))
        self.live.subscribe(lambda _, new: self.providers.follow(new))
        own = Job("control", lambda: 0.0 if self.memory.may_write else _TAKE_OVER_SECONDS, self._take_control)
        jobs = (
            *self.keeper.jobs(),
            *self.memory.jobs(),
            *self.records.jobs(),
            *self.executor.jobs(),
            *self.providers.jobs(),
            *public.jobs(),
            *self.loop_lag.jobs(),
            *self.alerts.jobs(),
            *page.jobs(),
            *(() if self.books is None else self.books.jobs()),
            *(() if kept is None else kept.jobs()),
            own,
        )
        watchdog = Job(
            "watchdog", lambda: self._supervisor.sign_of_life_seconds, self._supervisor.alive, at_once=True
        )
        for job in (*jobs, watchdog):
            self._jobs[job.name] = job, self.background.start(job)
        _ = self.background.spawn(config.keep_following(self._watcher), name="config")
        self._phase = "ready"
        if self._predecessor is not None:
            self._predecessor.ready()
            self._following = self.background.spawn(self._follow(self._predecessor), name="predecessor")
        else:
            self._supervisor.ready(self._status)
        logger.info("listening url=%s accounts=%d version=%s", self.url, len(self.pool), __version__)

    async def _kept_upstreams(self) -> "KeptUpstreams | None":
        """Return the upstreams that were added while a daemon ran, which are among the others now."""
        if self.books is None:
            return None
        module = importlib.import_module("codex_proxy.server.gateway.kept")
        kept: KeptUpstreams = module.KeptUpstreams(self.books.ledger, self.providers, self.clock.now)
        await kept.load()
        return kept

    async def _open_books(self, access: Access) -> None:
        if self.books is not None:
            await self.books.open()
            access.holders = self.books.holders

    def _page(self, admin: Admin, public: Public) -> Page:
        return Page(
            pool=self.pool,
            keeper=self.keeper,
            admin=admin,
            sessions=self.sessions,
            public=public,
            pulse=self.pulse,
            records=self.requests,
            alerts=self.alerts,
            live=self.live,
            clock=self.clock,
            background=self.background,
            outbound=self.outbound,
        )

    def _metrics(self, public: Public) -> Metrics:
        return Metrics(
            self.tally,
            self.pool,
            self.executor,
            self.background,
            Sources(
                phase=lambda: self._phase,
                sockets=lambda: public.sockets_open,
                refreshes=lambda: self.keeper.exchanges.results,
                reloads=lambda: self.live.readings,
                dropped_records=lambda: self.records.statistics().dropped,
                firing=self.alerts.count,
                messages=lambda: self.alerts.outbox.results,
                upstreams=lambda: [
                    (one.name, one.state(self.clock.monotonic()), one.in_flight)
                    for one in self.providers.all()
                ],
                drains=lambda: self.executor.drains,
                traces=lambda: self.telemetry.results if self.telemetry is not None else {},
                ledger=lambda: None if self.books is None else self.books.figures(),
            ),
            live=self.live,
            clock=self.clock,
        )

    def _now(self, since: float | None) -> JsonObject:
        return {**self.pulse.now(since), "alerts": self.alerts.firing()}

    def _take_sockets(self) -> None:
        """Take over the sockets that somebody else opened, where they are what is to be listened on."""
        estate = None if self._predecessor is None else self._predecessor.estate
        if estate is not None and (estate.is_given or estate.listen == self._listens_as):
            self._given, self._is_given = list(estate.sockets), estate.is_given
        elif estate is not None:
            # The setting was changed. They end with the process that has them still.
            for sock in estate.sockets:
                sock.close()
        if self._is_given:
            # What may be done without a key depends on who can reach us, not on what the file says of it.
            self.live.pin("listen", _most_open(self._given) or self._listens_as)

    @property
    def _status(self) -> str:
        return f"serving at {self.url}"

    async def _follow(self, predecessor: Predecessor) -> None:
        """Take over what the process before this one still learns, until it has ended."""
        async for news in predecessor.news():
            take_news(self.pool, news, self.clock.now())
            await self.memory.catch_up()
        logger.info("the process before this one has ended")

    async def _serve_control(self, control: Front, path: Path) -> bool:
        """Listen for commands, on the very socket of the process before this one if it left one."""
        left, self._left_control = self._left_control, None
        if left is None:
            return await self._listener.open_unix(control, path)
        await self._listener.serve_unix(control, path, left)
        return True

    def _is_left(self, path: Path) -> bool:
        """Tell whether the process before this one left its control socket, and it is the one at *path*."""
        if self._left_control is None or self._predecessor is None:
            return False
        if self._predecessor.estate.data_dir == str(path.parent.absolute()):
            return True
        self._left_control.close()
        self._left_control = None
        return False

    async def _take_control(self) -> None:
        """Listen for commands, and write what is remembered, unless another daemon on this data-dir does."""
        assert self._open_control is not None
        path = self.live.current.data_dir / CONTROL_SOCKET
        was_ours = self.memory.may_write
        self.memory.may_write = self._is_left(path) or not await self._listener.is_taken(path)
        self.records.may_write = self.sessions.may_write = self.memory.may_write
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
            if settings.auth == "none" and not settings.is_loopback:
                keyfile.offer_setup(settings)
            return None
        key, created = keyfile.ensure_client_key(settings.data_dir)
        keyfile.announce(key, created, settings.data_dir, sys.stderr)
        if created:
            keyfile.offer_setup(settings)
        return ApiKey.of("generated", key)

    def _control_routes(self, handlers: Mapping[str, Handler]) -> list[Route]:
        """Return the owner's routes without a key: only the owner can open the control socket."""
        return [
            dataclasses.replace(route, level=Level.PUBLIC)
            for route in (*ROUTES, *ACCOUNT_ROUTES, *GATEWAY_ROUTES, *LOCAL_ROUTES)
            if route.handler in handlers
        ]

    # -- restart --------------------------------------------------------------------------

    def restart(self) -> "asyncio.Task[JsonObject]":
        """Have a new process take over, and end; returns what came of it, as the command shows it.

        Raises:
            NotRestarted: If there is one under way.
        """
        if self._restarting is not None or self._successor is not None or self._phase != "ready":
            raise NotRestarted("a restart or the end of this process is under way already")
        self._restarting = self.background.spawn(self._restart(), name="restart")
        return self._restarting

    async def _restart(self) -> JsonObject:
        began = self.clock.monotonic()
        try:
            successor, held = await self._hand_over()
        except NotRestarted as exc:
            logger.error("not restarted, this process goes on: %s", exc.message)
            return {"success": False, "message": exc.message, "log": list(exc.lines)}
        finally:
            self._restarting = None
        self._successor = successor
        _ = self.background.start(Job("news", lambda: _NEWS_SECONDS, self._tell_news))
        self._supervisor.succeeded_by(successor.pid, self._status)
        self._rest({"watchdog"})
        await successor.let_go()
        logger.info("handed over pid=%d newcomers_held=%.3f", successor.pid, held)
        self._ending.set()
        return {
            "success": True,
            "message": f"process {successor.pid} serves now; {os.getpid()} ends when its streams have",
            "pid": successor.pid,
            "seconds": round(self.clock.monotonic() - began, 3),
            "held_seconds": round(held, 3),
        }

    async def _hand_over(self) -> tuple[Successor, float]:
        """Have a new process serve; return it, and how long newcomers were held.

        Raises:
            NotRestarted: If nothing came of it; everything is as it was.
        """
        reason = handover.obstacle_here(self._environ)
        if not self._command:
            reason = "the daemon runs inside another program, which alone can start it anew"
        if reason is not None:
            raise NotRestarted(reason)
        estate = handover.Estate(
            listen=self._listens_as,
            is_given=self._is_given,
            data_dir=str(self.live.current.data_dir.absolute()),
            sockets=self._listener.ports,
            control=self._listener.control,
        )
        successor = await Successor.start(self._command, self._environ, estate)
        try:
            await successor.wait_for("prepared", handover.PREPARE_SECONDS)
            await self._rest_upkeep()
            paused = self.clock.monotonic()
            await self._give_up()
            successor.go()
            await successor.wait_for("ready", handover.TAKE_SECONDS)
        except BaseException:
            # Also when this process is told to end meanwhile.
            await successor.kill()
            await self._take_back()
            raise
        return successor, self.clock.monotonic() - paused

    async def _rest_upkeep(self) -> None:
        """Begin nothing by ourselves any more, and have the answers of all exchanges on disk.

        Raises:
            NotRestarted: If there are tokens that only this process has.
        """
        self._rest(self._jobs.keys() - _WHILE_DRAINING)
        with contextlib.suppress(TimeoutError):
            # Requests may begin others; those are kept apart by the locks beside the files.
            async with asyncio.timeout(EXCHANGE_SECONDS):
                await self.background.wait_critical()
        await self.keeper.save_unsaved()
        aliases = await self.keeper.only_here()
        if aliases:
            raise NotRestarted(
                f"new tokens of {', '.join(aliases)} could not be written to auth-dir or data-dir, and would end with "
                "this process: see the log, make room or mend the folder's mode, and try again"
            )

    def _rest(self, names: AbstractSet[str]) -> None:
        for name in names & self._jobs.keys():
            self._jobs[name][1].cancel()

    async def _give_up(self) -> None:
        """Take in no newcomers, write what is known, and give up what only one process may have."""
        await self._listener.pause()
        # First, so that what is learned while it is written is told.
        self._afterwards = Afterwards(self.pool, self.clock)
        await self.memory.save()
        self._afterwards.written(self.memory.totals())
        await self.sessions.give_up()
        self.memory.may_write = False
        if self.books is not None:
            await self.books.ledger.hand_over()
        await self.records.hand_over()

    async def _tell_news(self) -> None:
        """Tell the process that has taken over what this one still learns."""
        news = None if self._afterwards is None else self._afterwards.news()
        if news is not None and self._successor is not None:
            await self._successor.tell(news)

    async def _take_back(self) -> None:
        """Go on as if nothing had been given up."""
        self.memory.may_write = True
        self.sessions.take_back()
        # Callers first, whatever becomes of the rest.
        await self._listener.resume()
        for name, (job, task) in list(self._jobs.items()):
            if task.cancelled() or task.cancelling():
                self._jobs[name] = job, self.background.start(job)
        if self.books is not None:
            await self.books.ledger.take_back()
        await self.records.take_back()

    async def _reload(self) -> None:
        """Read the configuration again, now."""
        if self._watcher is None or self._phase == "starting":
            # It has just been read, and is looked at again in a moment.
            return
        self._supervisor.reloading()
        try:
            await self._watcher.follow(at_once=True)
        finally:
            self._supervisor.ready(self._status)

    # -- end ------------------------------------------------------------------------------

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """End in order; *hurry* cuts the waiting for streams short."""
        if self._restarting is not None:
            # The end is meant for the service, not for this process alone.
            self._restarting.cancel()
            await asyncio.wait({self._restarting})
        if self._successor is None:
            self._phase = "draining"
            self._supervisor.stopping("letting streams end")
        logger.info("draining turns=%d requests=%d", self.executor.in_flight, self._listener.in_work)
        if self._successor is None:
            await self._listener.refuse()
            await self._drain(hurry if hurry is not None else asyncio.Event())
        else:
            await self._listener.retire()
            await self._drain(hurry if hurry is not None else asyncio.Event())
            await self._listener.refuse()
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
        await self._tell_news()
        await self.records.aclose()
        if self.books is not None:
            # Last of all turns: each has settled by now.
            await self.books.ledger.aclose()
        if self._successor is None:
            await self.sessions.save()
        if self.telemetry is not None:
            await self.telemetry.aclose()
        await self.outbound.aclose()
        logger.info("stopped")

    async def _drain(self, hurry: asyncio.Event) -> None:
        """Let what is in work end, up to drain-timeout."""

        async def all_out() -> None:
            if self._successor is not None:
                await self._listener.wait_left(_IDLE_SECONDS)
                if self._following is not None:
                    # What the process before this one has to tell comes this way to the next.
                    await asyncio.wait({self._following})
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

        def on_signal() -> None:
            (self._hurry if self._ending.is_set() else self._ending).set()

        def on_hangup() -> None:
            _ = self.background.spawn(self._reload(), name="reload")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        await self.start()
        # What is there now stays; looking through it again and again finds nothing.
        gc.collect()
        gc.freeze()
        # A turn makes hundreds of objects, all of them gone with it: the default looks for cycles once a turn.
        gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
        try:
            await self._ending.wait()
        finally:
            await self.stop(self._hurry)


def _port_of(sockets: Sequence[socket.socket]) -> int:
    """Return the first port among *sockets*; 0 where all have paths."""
    return next((int(one.getsockname()[1]) for one in sockets if one.family != socket.AF_UNIX), 0)


def _most_open(sockets: Sequence[socket.socket]) -> str | None:
    """Return where to listen, as the setting has it, for the socket that most can reach; None for paths alone."""
    found: str | None = None
    for sock in sockets:
        if sock.family == socket.AF_UNIX:
            continue
        host, port = sock.getsockname()[:2]
        listen = f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"
        if not Settings(listen=listen).is_loopback:
            return listen
        found = found or listen
    return found


def _books(live: Live, clock: Clock, lock: StoreLock) -> "Books | None":
    """Return the ledger and what stands on it, if there is one.

    Raises:
        ConfigError: If what it needs is not installed.
    """
    if live.current.ledger == "off":
        return None
    # Only here: most have no use for it.
    module = importlib.import_module("codex_proxy.server.books")
    made: Books = module.Books(live, clock, lock)
    return made


def _telemetry(settings: Settings) -> "Telemetry | None":
    """Return what sends traces, if they are wanted.

    Raises:
        ConfigError: If what it needs is not installed.
    """
    if settings.telemetry == "off":
        return None
    try:
        # Only here: it is an extra, and large.
        module = importlib.import_module("codex_proxy.telemetry")
    except ImportError as exc:
        raise ConfigError(
            f"telemetry = {settings.telemetry!r}: OpenTelemetry is not installed; run `pip install 'codex-proxy[otel]'`, "
            "or set telemetry: off"
        ) from exc
    made: Telemetry = module.Telemetry(settings)
    return made


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
    logs.setup(loaded.settings.log_level, form=loaded.settings.log_format)
    _allow_many_connections()
    for warning in loaded.warnings:
        logger.warning("configuration: %s", warning)
    if loaded.path is None:
        logger.info("no configuration file; the defaults and the environment count")

    async def main() -> None:
        predecessor, sockets = handover.predecessor(os.environ), take_sockets(os.environ)
        daemon = Daemon(
            loaded,
            environ=dict(os.environ),
            sockets=sockets,
            predecessor=predecessor,
            command=handover.own_command(),
        )
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
