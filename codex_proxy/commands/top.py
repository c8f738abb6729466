"""`codex-proxy top`: what goes on now and how the accounts are, in a terminal.

What is shown is made from the daemon's own JSON by `screen`, which knows neither terminal nor daemon. Needs rich
(the extra `tui`).
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from codex_proxy.commands import options
from codex_proxy.commands.control import NoDaemon, Running, daemon
from codex_proxy.commands.terminal import printable, seconds_of, span
from codex_proxy.config import Settings
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject

try:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live as Screen
    from rich.table import Table
    from rich.text import Text
except ImportError:
    raise ProxyError(
        "`codex-proxy top` needs rich: install codex-proxy with the extra tui, as in pipx install 'codex-proxy[tui]'"
    ) from None

# As many as fit any screen; with more accounts --filter names some.
_MAX_ACCOUNTS = 200

_BARS = "▁▂▃▄▅▆▇█"
_WIDE_COLUMNS = 110
"""From here on there is room for longer bars, errors, and the reason why an account rests."""
_SPARK_COLUMNS = 60

_STATUS = {
    "active": ("●", "green"),
    "cooldown": ("◐", "yellow"),
    "unavailable": ("○", "red"),
    "needs_login": ("✗", "red"),
    "disabled": ("□", "bright_black"),
}
"""A sign for each, because colour alone tells not everybody."""

_ORDERS = ("alias", "used", "requests", "status")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Show what goes on now and how every account is, again and again, from the running daemon. Keys: q ends, s sorts"
        " by another column, j and k (or the arrows) move through the accounts."
    )
    parser.add_argument(
        "--filter", metavar="TEXT", default="", help="only accounts whose name, file or status has it"
    )
    parser.add_argument("--interval", metavar="SECONDS", type=_interval, default=2.0, help="how often (2)")
    parser.add_argument("--once", action="store_true", help="print it once and end, as without a terminal")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is none: a number of seconds from 0.2 to 3600 would do")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Show it until the user has seen enough; return the exit code."""
    settings = options.load(args).settings
    console = Console(highlight=False)
    if args.once or not console.is_terminal or not sys.stdin.isatty():
        seen = asyncio.run(_ask_once(settings, args.filter))
        console.print(screen(seen, View(), time.time(), console.width))
        return 0
    asyncio.run(_watch(settings, args.filter, args.interval, console))
    return 0


# -- asking -------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What the daemon said last."""

    now: JsonObject | None = None
    stats: JsonObject | None = None
    at: float = 0.0
    trouble: str = ""
    """Why there is nothing newer."""
    points: list[list[Any]] = field(default_factory=list)

    async def ask(self, running: Running, needle: str) -> None:
        """Take up what is new."""
        since = f"?since={self.points[-1][0]}" if self.points else ""
        now = await running.get(f"/now{since}")
        query = {"page": "1", "page_size": str(_MAX_ACCOUNTS), **({"q": needle} if needle else {})}
        self.stats = await running.get(f"/stats?{urlencode(query)}")
        self.now, self.at, self.trouble = now, time.time(), ""
        self.points = [*self.points, *now["series"]["points"]][-_SPARK_COLUMNS * 5 :]


async def _ask_once(settings: Settings, needle: str) -> Seen:
    seen = Seen()
    async with daemon(settings) as running:
        await seen.ask(running, needle)
    return seen


async def _watch(settings: Settings, needle: str, interval: float, console: Console) -> None:
    seen, view, pressed = Seen(), View(), asyncio.Event()

    def press(keys: str) -> None:
        view.press(keys)
        pressed.set()

    with _keys(press), Screen(console=console, screen=True, auto_refresh=False) as shown:
        while True:
            try:
                # Anew each time: after a restart another process answers there.
                async with daemon(settings) as running:
                    await seen.ask(running, needle)
            except NoDaemon:
                seen.trouble = "no daemon answers"
            except ProxyError as exc:
                seen.trouble = exc.message
            # Until it is time to ask again, keys change what is shown.
            until = time.monotonic() + interval
            while (left := until - time.monotonic()) > 0:
                frame = screen(seen, view, time.time(), console.size.width, console.size.height)
                shown.update(frame, refresh=True)
                pressed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await pressed.wait()
                if view.is_over:
                    return


@contextlib.contextmanager
def _keys(press: Callable[[str], None]) -> Iterator[None]:
    """Have *press* called with the keys as they are pressed; the terminal is as before afterwards."""
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    loop = asyncio.get_running_loop()
    try:
        tty.setcbreak(number)
        loop.add_reader(number, lambda: press(os.read(number, 64).decode(errors="replace")))
        yield
    finally:
        loop.remove_reader(number)
        termios.tcsetattr(number, termios.TCSADRAIN, before)


# -- showing ------------------------------------------------------------------------------


@dataclass(slots=True)
class View:
    """How the user wants to see it."""

    order: int = 0
    top: int = 0
    """The first account that is shown."""
    is_over: bool = False

    def press(self, keys: str) -> None:
        """Do what *keys* ask for; others do nothing."""
        for key in keys.replace("\x1b[A", "k").replace("\x1b[B", "j"):
            if key in "qQ":
                self.is_over = True
            elif key in "sS":
                self.order = (self.order + 1) % len(_ORDERS)
            elif key == "j":
                self.top += 1
            elif key == "k":
                self.top = max(0, self.top - 1)


def screen(seen: Seen, view: View, now: float, width: int, height: int | None = None) -> "RenderableType":
    """Return what is to be seen in so many columns, and lines; None for as many as there are."""
    if seen.now is None or seen.stats is None:
        return Text(printable(seen.trouble or "asking the daemon"), style="yellow")
    head = [_title(seen, now), *_numbers(seen.now), *_sparks(seen.points)]
    head += [
        Text(f"! {printable(str(alert['text']))}", style="red", no_wrap=True)
        for alert in seen.now.get("alerts") or []
    ]
    accounts = _sorted(seen.stats["accounts"], _ORDERS[view.order])
    # The header of the table, the line below it and the empty one above it.
    room = len(accounts) if height is None else max(1, height - len(head) - 4)
    view.top = max(0, min(view.top, len(accounts) - room))
    shown = accounts[view.top : view.top + room]
    return Group(
        *head,
        Text(""),
        _table(shown, now, is_wide=width >= _WIDE_COLUMNS),
        _below(seen, view, len(shown), len(accounts)),
    )


def _title(seen: Seen, now: float) -> "Text":
    assert seen.now is not None
    text = Text(f"codex-proxy {seen.now['version']}", style="bold")
    text.append(f"  up {span(seen.now['uptime_seconds'])}", style="")
    if seen.trouble:
        text.append(f"  {printable(seen.trouble)}; this is {span(now - seen.at)} old", style="red")
    return text


def _numbers(now: JsonObject) -> "list[Text]":
    tokens, first, lag = now["tokens_per_second"], now["first_token_seconds"], now["loop_lag_seconds"]
    rows = [
        [
            ("in flight", _number(now["in_flight"])),
            ("streams", _number(now["streams"])),
            ("queued", _number(now["queued"])),
            ("requests/s", _number(now["requests_per_second"])),
            ("errors", _share(now["error_share"])),
        ],
        [
            ("tokens/s in", _number(tokens["input"])),
            ("out", _number(tokens["output"])),
            ("cached", _share(now["cached_share"])),
        ],
        [
            ("first token p50", _seconds(first["p50"])),
            ("p95", _seconds(first["p95"])),
            ("loop lag", _seconds(lag["max"])),
        ],
    ]
    counts = now["accounts"]
    rows.append([(name.replace("_", " "), _number(counts.get(name))) for name in ("total", *_STATUS)])
    return [_pairs(row) for row in rows]


def _pairs(row: Sequence[tuple[str, str]]) -> "Text":
    # What does not fit is cut: a second line would push the table out of sight.
    text = Text(no_wrap=True, overflow="crop")
    for name, value in row:
        text.append(f"{name} ", style="bright_black")
        text.append(f"{value}   ")
    return text


def _sparks(points: Sequence[Sequence[Any]]) -> "list[Text]":
    """Draw the last minutes of requests and of the first token, five steps a column."""
    found = []
    columns = [points[start : start + 5] for start in range(len(points) % 5, len(points), 5)][
        -_SPARK_COLUMNS:
    ]
    for name, values in (
        ("requests", [float(sum(point[1] for point in some)) for some in columns]),
        ("first token", [max((point[6] or 0.0 for point in some), default=0.0) for some in columns]),
    ):
        most = max(values, default=0.0)
        bars = "".join(_BARS[min(7, int(8 * value / most))] if most and value else " " for value in values)
        found.append(Text.assemble((f"{name:<12}", "bright_black"), (bars, "cyan")))
    return found


def _table(accounts: Sequence[JsonObject], now: float, *, is_wide: bool) -> "Table":
    table = Table(box=None, pad_edge=False, expand=False, header_style="bright_black")
    for name in ("account", "status", "5h", "week"):
        table.add_column(name, no_wrap=True)
    for name in ("now", "requests", *(["errors"] if is_wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("why", overflow="ellipsis", no_wrap=True)
    bar = 10 if is_wide else 4
    for account in accounts:
        sign, colour = _STATUS.get(account["status"], ("?", ""))
        status = str(account["status"]).replace("_", " ")
        until = seconds_of(account.get("cooldown_until"))
        if account["status"] == "cooldown" and until is not None:
            status = f"rests {span(until - now)}"
        short, long = _windows(account)
        cells: list[RenderableType] = [
            Text(printable(str(account["alias"]))),
            Text(f"{sign} {status}", style=colour),
            _window(short, now, bar),
            _window(long, now, bar),
            _number(account["in_flight"]),
            _number(account["total_requests"]),
        ]
        if is_wide:
            why = Text(printable(str(account.get("reason") or "")), style="bright_black")
            cells += [_number(account["total_errors"]), why]
        table.add_row(*cells)
    return table


def _windows(account: JsonObject) -> "tuple[JsonObject | None, JsonObject | None]":
    """Return the shorter and the longer window of the account's own limit; None for one that is not known."""
    quota = account.get("quota") or {}
    own = [window for window in quota.get("windows", ()) if window["limit"] == "codex"]
    short = next((window for window in own if (window["minutes"] or 0) < 24 * 60), None)
    long = next((window for window in own if (window["minutes"] or 0) >= 24 * 60), None)
    return short, long


def _window(window: JsonObject | None, now: float, columns: int) -> "Text":
    used = None if window is None else window["used_percent"]
    if window is None or used is None:
        return Text("?", style="bright_black")
    full = round(min(100.0, used) / 100 * columns)
    resets = seconds_of(window["resets_at"])
    colour = "red" if used >= 95 else "yellow" if used >= 75 else "green"
    return Text.assemble(
        ("█" * full, colour),
        ("░" * (columns - full), "bright_black"),
        f" {used:3.0f}%",
        (f" {span(resets - now)}" if resets is not None else "", "bright_black"),
    )


def _sorted(accounts: Sequence[JsonObject], order: str) -> list[JsonObject]:
    def used(account: JsonObject) -> float:
        return max((window["used_percent"] or 0.0 for window in _windows(account) if window), default=-1.0)

    keys: dict[str, Callable[[JsonObject], Any]] = {
        "alias": lambda account: account["alias"],
        "used": lambda account: -used(account),
        "requests": lambda account: -account["total_requests"],
        "status": lambda account: (
            list(_STATUS).index(account["status"]) if account["status"] in _STATUS else 9
        ),
    }
    return sorted(accounts, key=keys[order])


def _below(seen: Seen, view: View, shown: int, known: int) -> "Text":
    assert seen.stats is not None
    total = seen.stats["pagination"]["filtered_total"]
    parts = [f"{view.top + 1} to {view.top + shown} of {total}" if shown < total else f"{total} accounts"]
    if known < total:
        parts.append("name some with --filter")
    problems = seen.stats.get("problems") or []
    if problems:
        parts.append(f"{len(problems)} files with problems: see codex-proxy accounts")
    return Text(f"{', '.join(parts)}; sorted by {_ORDERS[view.order]}", style="bright_black")


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "?"
    if abs(value) >= 10_000:
        return f"{value / 1000:.0f}k"
    return f"{value:g}" if isinstance(value, int) else f"{value:.1f}"


def _share(value: object) -> str:
    return f"{100 * value:.1f}%" if isinstance(value, int | float) else "?"


def _seconds(value: object) -> str:
    if not isinstance(value, int | float):
        return "?"
    return f"{1000 * value:.0f}ms" if value < 1 else f"{value:.1f}s"
