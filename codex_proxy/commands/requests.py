"""`codex-proxy requests`: what became of the last requests."""

import argparse
import asyncio
import csv
import importlib
import io
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from codex_proxy.commands import options
from codex_proxy.commands.terminal import columns, complain, printable, say, say_json
from codex_proxy.config import Settings
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.records.asking import OUTCOMES, Filter
from codex_proxy.records.offline import File

_PAGE = 1_000
_DEFAULT_LIMIT = 50

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")

FIELDS = (
    "id", "at", "route", "caller", "client", "model", "account", "rule", "binding", "outcome", "status", "error",
    "attempts", "stream", "first_event_seconds", "first_text_seconds", "seconds", "input_tokens", "cached_tokens",
    "output_tokens", "reasoning_tokens", "usage_source",
)  # fmt: skip
"""What is told of a request, in the order of the columns of `--csv`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "List what became of the last requests, the newest first, out of the records in data-dir; the daemon need not"
        " run. One of them is told in full by `codex-proxy why ID`."
    )
    parser.add_argument("--caller", metavar="NAME", help="only those of this client key")
    parser.add_argument("--account", metavar="ALIAS", help="only those that this account served")
    parser.add_argument("--model", metavar="MODEL", help="only those that asked for this model")
    parser.add_argument("--outcome", choices=OUTCOMES, help="only those that ended so")
    parser.add_argument(
        "--route", metavar="ROUTE", help="only those of this route, such as responses or chat"
    )
    parser.add_argument(
        "--client", metavar="CLIENT", help="only those of this client: codex, claude-code or other"
    )
    parser.add_argument("--search", metavar="TEXT", help="only those with this in their id or error")
    parser.add_argument(
        "--since", metavar="TIME", type=moment, help="only later ones: 2h, 3d, or 2026-01-31T08:00"
    )
    parser.add_argument("--until", metavar="TIME", type=moment, help="only earlier ones")
    parser.add_argument("--min-seconds", metavar="S", type=_seconds, help="only those that took so long")
    parser.add_argument(
        "--limit", metavar="N", type=_count, help=f"how many at most, 0 for all ({_DEFAULT_LIMIT})"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print a JSON object in each line")
    how.add_argument("--csv", action="store_true", help="print them for a spreadsheet")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="go on with those that end from now on; needs the running daemon",
    )


def moment(text: str) -> float:
    """Read a time: how long ago, or a date with or without the time of day on this machine's clock."""
    text = text.strip()
    if re.fullmatch(f"({_SPAN.pattern})+", text):
        return time.time() - sum(float(number) * _UNITS[unit] for number, unit in _SPAN.findall(text))
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} is no time: 90m, 2h and 3d are times ago, 2026-01-31 and 2026-01-31T08:00 would do too"
        ) from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no number of seconds")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no whole number")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Print them; return the exit code."""
    settings = options.load(args).settings
    wanted = Filter(
        caller=args.caller,
        account=args.account,
        model=args.model,
        outcome=args.outcome,
        route=args.route,
        client=args.client,
        q=args.search,
        since=args.since,
        until=args.until,
        min_seconds=args.min_seconds,
    )
    if args.follow:
        show: Callable[[JsonObject], None] = _say_csv if args.csv else _say_json if args.json else _say_line
        if args.csv:
            _write_csv(FIELDS)
        asyncio.run(_follow(settings, wanted, show))
        return 0
    limit = _DEFAULT_LIMIT if args.limit is None else args.limit or sys.maxsize
    found = _stored(settings, wanted, limit)
    if args.json:
        for request in found:
            _say_json(request)
    elif args.csv:
        _write_csv(FIELDS)
        for request in found:
            _say_csv(request)
    else:
        for line in table(list(found)):
            say(line)
    return 0


def _stored(settings: Settings, wanted: Filter, limit: int) -> Iterator[JsonObject]:
    file = File(settings.data_dir)
    before: int | None = None
    try:
        while limit > 0:
            found, before = file.page(wanted, limit=min(limit, _PAGE), before=before)
            yield from found
            limit -= len(found)
            if before is None:
                return
    finally:
        file.close()


async def _follow(settings: Settings, wanted: Filter, show: Callable[[JsonObject], None]) -> None:
    # All of the daemon, which nothing but this needs.
    control = importlib.import_module("codex_proxy.commands.control")
    async with control.daemon(settings) as running:
        async for requests, dropped in running.follow():
            for request in reversed(requests):
                if fits(request, wanted):
                    show(request)
            if dropped:
                complain(f"{dropped} more were too many to show")
    raise ProxyError("the daemon has ended")


def fits(request: JsonObject, wanted: Filter) -> bool:
    """Tell whether a request is meant."""
    named = ("caller", "account", "model", "outcome", "route", "client")
    if any(getattr(wanted, name) not in (None, request[name]) for name in named):
        return False
    if wanted.q and wanted.q.lower() not in f"{request['id']} {request['error'] or ''}".lower():
        return False
    return (
        (wanted.since is None or request["at"] >= wanted.since)
        and (wanted.until is None or request["at"] < wanted.until)
        and (wanted.min_seconds is None or request["seconds"] >= wanted.min_seconds)
    )


def table(requests: list[JsonObject]) -> list[str]:
    """Return requests as lines for a person."""
    if not requests:
        return ["No such request is on record."]
    head = (
        "TIME",
        "ID",
        "CALLER",
        "MODEL",
        "ACCOUNT",
        "OUTCOME",
        "FIRST",
        "SECONDS",
        "INPUT",
        "CACHED",
        "OUTPUT",
    )
    rows = [head, *(_row(request) for request in requests)]
    return columns(rows, ("<", "<", "<", "<", "<", "<", ">", ">", ">", ">", ">"))


def _row(request: Mapping[str, Any]) -> tuple[str, ...]:
    outcome = (
        request["outcome"] if request["outcome"] != "failed" else f"failed {request['status'] or ''}".strip()
    )
    return (
        f"{datetime.fromtimestamp(request['at']):%m-%d %H:%M:%S}",
        # Before columns are measured: a caller may have written anything.
        *(printable(request[name] or "-") for name in ("id", "caller", "model", "account")),
        outcome + (f" {printable(request['error'])}" if request["error"] else ""),
        "-" if request["first_text_seconds"] is None else f"{request['first_text_seconds']:.2f}",
        f"{request['seconds']:.2f}",
        *(
            "-" if request[name] is None else str(request[name])
            for name in ("input_tokens", "cached_tokens", "output_tokens")
        ),
    )


def _say_line(request: JsonObject) -> None:
    say("  ".join(_row(request)))


def _say_json(request: JsonObject) -> None:
    say_json(dumps(request))


def _say_csv(request: JsonObject) -> None:
    _write_csv([request[name] for name in FIELDS])


def _write_csv(values: Any) -> None:
    line = io.StringIO()
    csv.writer(line).writerow(["" if value is None else _cell(value) for value in values])
    sys.stdout.write(line.getvalue())
    sys.stdout.flush()


def _cell(value: object) -> object:
    """Return a value as it can stand in a spreadsheet: a text that begins like a formula is not to be one."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
