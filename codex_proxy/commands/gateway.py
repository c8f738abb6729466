"""The gateway as a command reaches it: through the running daemon, or on its database when none runs.

Both do what the admin API does, with its own code (`server.gateway.operations`); a command does not ask which it has.
"""

import argparse
import asyncio
import importlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from codex_proxy import logs
from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import SystemClock
from codex_proxy.commands import options
from codex_proxy.commands.control import NoDaemon, Running, daemon, segment
from codex_proxy.commands.terminal import say_json
from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError
from codex_proxy.net import Outbound
from codex_proxy.protocol.wire import JsonObject, dumps, loads
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.operations import BASE, perform
from codex_proxy.storage.lock import StoreLock
from codex_proxy.tasks import Background
from codex_proxy.upstream.providers import Providers

if TYPE_CHECKING:
    from codex_proxy.server.books import Books
    from codex_proxy.server.gateway.kept import KeptUpstreams

ACTOR = "command line"
"""Who did it, in the audit, when no daemon ran."""

WINDOWS = ("5h", "day", "week", "month", "total")
ENDPOINTS = (
    "responses", "chat", "completions", "edits", "embeddings", "messages", "compact", "search", "images",
)  # fmt: skip

_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Gateway(Protocol):
    """What commands ask of it."""

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> bytes:
        """Return what the admin API answers at *path*.

        Raises:
            ProxyError: With its own words, when it refuses.
        """
        ...


async def asked(
    gateway: Gateway,
    method: str,
    path: str,
    *,
    query: Mapping[str, str] | None = None,
    body: object = None,
) -> JsonObject:
    """Return what the admin API answers, as an object."""
    document: JsonObject = loads(await gateway.ask(method, path, query=query, body=body))
    return document


Work = Callable[[Gateway], Awaitable[int]]


def perform_on(args: argparse.Namespace, work: Work) -> int:
    """Reach the gateway of the configuration that *args* names, do *work* on it, and return the exit code."""
    for value in vars(args).values():
        if isinstance(value, str) and not value.isprintable() and _is_broken(value):
            raise ProxyError(f"{value[:50]!r} is no text: this terminal and its arguments have to be UTF-8")
    settings = options.load(args).settings

    async def main() -> int:
        async with reached(settings) as gateway:
            return await work(gateway)

    return asyncio.run(main())


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@asynccontextmanager
async def reached(settings: Settings) -> AsyncIterator[Gateway]:
    """Reach the gateway of *settings*."""
    async with AsyncExitStack() as stack:
        try:
            running = await stack.enter_async_context(daemon(settings))
        except NoDaemon:
            found: Gateway = await stack.enter_async_context(_database(settings))
        else:
            found = _Daemon(running)
        yield found


class _Daemon:
    def __init__(self, running: Running) -> None:
        self._running = running

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> bytes:
        return await self._running.ask(
            method, BASE + path, query=query, body={} if body is None and method == "POST" else body
        )


class _Database:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> bytes:
        sent = b"" if body is None else dumps(body)
        done = await perform(self._desk, method, path, query=query or {}, body=sent, actor=ACTOR)
        return done.body


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[_Database]:
    logs.setup("error")
    clock, live = SystemClock(), Live(settings)
    background, outbound = Background(), Outbound(live)
    providers = Providers(live=live, clock=clock, background=background, outbound=outbound, origins=Origins())
    providers.follow(settings)
    books: Books | None = None
    kept: KeptUpstreams | None = None
    try:
        if settings.ledger != "off":
            books = await _opened(live, clock, settings)
            kept = await _kept(books, providers, clock)
        yield _Database(
            Desk(live, clock, providers=providers)
            if books is None
            else Desk(live, clock, ledger=books.ledger, pricing=books.pricing, providers=providers, kept=kept)
        )
    finally:
        if books is not None:
            await books.ledger.aclose()
        await background.aclose()
        await outbound.aclose()


async def _opened(live: Live, clock: SystemClock, settings: Settings) -> "Books":
    # With the ledger off nothing of it is imported.
    module = importlib.import_module("codex_proxy.server.books")
    await asyncio.to_thread(settings.data_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
    books: Books = module.Books(live, clock, StoreLock(settings.data_dir))
    await books.open()
    return books


async def _kept(books: "Books", providers: Providers, clock: SystemClock) -> "KeptUpstreams":
    module = importlib.import_module("codex_proxy.server.gateway.kept")
    kept: KeptUpstreams = module.KeptUpstreams(books.ledger, providers, clock.now)
    await kept.load()
    return kept


# -- who is meant ---------------------------------------------------------------------------


async def user_called(gateway: Gateway, name: str) -> JsonObject:
    """Return the user with this id or name.

    Raises:
        ProxyError: If there is none, or more than one.
    """
    users = (await asked(gateway, "GET", "/users"))["users"]
    return _one_called(name, users, "user", "codex-proxy users")


async def key_called(gateway: Gateway, name: str) -> JsonObject:
    """Return the key with this id, name or hint; one that works before others of its name.

    Raises:
        ProxyError: If there is none, or more than one.
    """
    keys = (await asked(gateway, "GET", "/keys"))["keys"]
    if name.startswith("sk-") and not any(name == key["hint"] for key in keys):
        # It is not repeated: it would stand in a terminal's memory once more.
        raise ProxyError("a key is named by its id or name, not by its text; `codex-proxy keys` lists them")
    return _one_called(name, keys, "key", "codex-proxy keys")


def _one_called(name: str, known: list[JsonObject], what: str, command: str) -> JsonObject:
    for one in known:
        if one["id"] == name:
            return one
    found = [one for one in known if name in (one["name"], one.get("hint"))]
    found = [one for one in found if one["status"] == "active"] or found
    if len(found) > 1:
        raise ProxyError(
            f"there are {len(found)} {what}s called {name!r}: name one by its id, "
            + " or ".join(str(one["id"]) for one in found[:5])
        )
    if not found:
        raise ProxyError(f"there is no {what} {name!r}; `{command}` lists them")
    return found[0]


def path_of(kind: str, one: JsonObject, *rest: str) -> str:
    """Return the path of a user, a key or an upstream."""
    return "/".join(("", kind, segment(str(one["id"])), *rest))


# -- arguments ------------------------------------------------------------------------------


def add_json(parser: argparse.ArgumentParser, *, is_top: bool = False) -> None:
    """Let *parser* take --json."""
    parser.add_argument(
        "--json",
        action="store_true",
        # Below the top a default would undo one before the action.
        default=False if is_top else argparse.SUPPRESS,
        help="print what is known, or was done, as JSON",
    )


def add_actions(parser: argparse.ArgumentParser) -> Callable[[str, str], argparse.ArgumentParser]:
    """Let *parser* take an action; return what adds one, by its name and a line of what it does."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", prog=parser.prog)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name, help=text, description=f"{text[:1].upper()}{text[1:]}.", allow_abbrev=False
        )
        options.add_config(action)
        add_json(action)
        return action

    return add


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Let *parser* take limits."""
    group = parser.add_argument_group("limits")
    group.add_argument("--requests", metavar="N", type=_count, help="requests a minute")
    group.add_argument("--tokens", metavar="N", type=_count, help="tokens a minute")
    group.add_argument("--concurrency", metavar="N", type=_count, help="requests at a time")
    group.add_argument(
        "--budget",
        metavar="WINDOW=DOLLARS",
        type=_budget,
        action="append",
        default=[],
        help=f"what may be spent in a window: {', '.join(WINDOWS)}; again for more",
    )
    group.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        default=[],
        help="only these models; * stands for anything",
    )
    group.add_argument(
        "--endpoint", metavar="ENDPOINT", choices=ENDPOINTS, action="append", default=[],
        help="only these endpoints: " + ", ".join(ENDPOINTS),
    )  # fmt: skip
    group.add_argument(
        "--network",
        metavar="NETWORK",
        action="append",
        default=[],
        help="only from there, such as 192.0.2.0/24",
    )


def add_new_limits(parser: argparse.ArgumentParser) -> None:
    """Let *parser* take limits that replace others, or that there are to be none."""
    parser.add_argument("--none", action="store_true", help="no limits any more")
    add_limits(parser)
    parser.set_defaults(refuse=parser.error)


def check_new_limits(args: argparse.Namespace) -> None:
    """End with a complaint when *args* say both."""
    if args.action == "limits" and args.none and limits_of(args):
        args.refuse("argument --none: not allowed with limits")


def limits_of(args: argparse.Namespace) -> JsonObject:
    """Return the limits that *args* hold, as the admin API takes them."""
    given: JsonObject = {
        "requests_per_minute": args.requests,
        "tokens_per_minute": args.tokens,
        "concurrency": args.concurrency,
        "budgets": [{"window": window, "amount": amount} for window, amount in args.budget],
        "models": args.model,
        "endpoints": args.endpoint,
        "networks": args.network,
    }
    return {name: value for name, value in given.items() if value}


def limits_in_words(limits: JsonObject) -> str:
    """Return limits in a few words."""
    words = [
        f"{limits[name]} {unit}"
        for name, unit in (
            ("requests_per_minute", "requests/min"),
            ("tokens_per_minute", "tokens/min"),
            ("concurrency", "at a time"),
        )
        if limits[name] is not None
    ]
    words += [
        f"${budget['amount']} {'in all' if budget['window'] == 'total' else 'per ' + budget['window']}"
        for budget in limits["budgets"]
    ]
    words += [" ".join(limits[name]) for name in ("models", "endpoints", "networks") if limits[name]]
    return ", ".join(words) or "none"


def name(text: str) -> str:
    """Read a name, which is something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a name cannot be empty")
    return text


def moment(text: str) -> str:
    """Read a time: how long ago (2h, 3d), or a date with or without the time of day on this machine's clock."""
    return _told(_in(text, -1) or _date(text))


def later(text: str) -> str:
    """Read a time to come: in how long (30d), or a date."""
    return _told(_in(text, 1) or _date(text))


def seconds(text: str) -> int:
    """Read a span such as 10m."""
    span = _SPAN.fullmatch(text.strip())
    if span is None:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no span of time: 30s, 10m, 2h or 1d would do")
    return int(timedelta(**{_UNITS[span[2]]: int(span[1])}).total_seconds())


def _in(text: str, sign: int) -> datetime | None:
    span = _SPAN.fullmatch(text.strip())
    if span is None:
        return None
    try:
        return datetime.now(UTC) + sign * timedelta(**{_UNITS[span[2]]: int(span[1])})
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is further away than a calendar goes") from None


def _date(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.strip()).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} is no time: 2h and 3d are spans, 2026-01-31 and 2026-01-31T08:00 are moments"
        ) from None


def _told(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000_000):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no limit: a whole number above 0 would do")
    return int(text)


def _budget(text: str) -> tuple[str, str]:
    window, _, amount = text.partition("=")
    if window not in WINDOWS or not amount:
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} is no budget: month=25.00 would do; windows are {', '.join(WINDOWS)}"
        )
    return window, amount


# -- what is printed ---------------------------------------------------------------------------


def show_json(document: object) -> None:
    """Print *document* in a line of its own."""
    say_json(dumps(document))


def day(at: object) -> str:
    """Return a time of the API as a day and minute on this machine's clock."""
    if not isinstance(at, str):
        return "-"
    return f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M}"
