"""`codex-proxy usage`: what was used, and what it has cost."""

import argparse
import csv
import io
import itertools
import sys

from codex_proxy.commands.control import segment
from codex_proxy.commands.gateway import (
    Gateway,
    add_json,
    asked,
    day,
    key_called,
    moment,
    name,
    perform_on,
    show_json,
    user_called,
)
from codex_proxy.commands.terminal import Align, columns, printable, say
from codex_proxy.protocol.wire import JsonObject

GROUPS = ("user", "key", "model", "day")
_NARROWING = ("by", "rows", "user", "key", "model", "since", "until")
_DEFAULT_ROWS = 50
_MOST = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Add up tokens and money by user, key, model or day, or list single requests; through the running daemon, or"
        " out of its database when none runs. Sums are of whole days of UTC."
    )
    parser.add_argument(
        "request_id", metavar="REQUEST_ID", nargs="?", type=name, help="tell of this one request"
    )
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "--by", metavar="GROUPS", type=_groups,
        help=f"what to tell apart: one or more of {', '.join(GROUPS)}, with commas between them (day)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", metavar="N", type=_count, nargs="?", const=_DEFAULT_ROWS,
        help=f"list the last N requests instead ({_DEFAULT_ROWS})",
    )  # fmt: skip
    parser.add_argument("--user", metavar="USER", help="only of this user")
    parser.add_argument("--key", metavar="KEY", help="only of this key")
    parser.add_argument("--model", metavar="MODEL", help="only of this model")
    parser.add_argument("--since", metavar="TIME", type=moment, help="only later: 7d, or 2026-01-31")
    parser.add_argument("--until", metavar="TIME", type=moment, help="only earlier")
    how = parser.add_mutually_exclusive_group()
    add_json(how, is_top=True)  # type: ignore[arg-type]  # it takes arguments as a parser does
    how.add_argument("--csv", action="store_true", help="print a table for a spreadsheet")


def _groups(text: str) -> str:
    if not text or any(one not in GROUPS for one in text.split(",")):
        raise argparse.ArgumentTypeError(
            f"{text[:50]!r} will not do: user,model would, of {', '.join(GROUPS)}"
        )
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no number of requests")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Print it; return the exit code."""
    if args.request_id is not None and (args.csv or any(vars(args)[one] is not None for one in _NARROWING)):
        args.refuse("one request is told of by itself, with --json at most")
    if args.rows is not None and args.by is not None:
        args.refuse("argument --by: not allowed with argument --rows")
    return perform_on(args, lambda gateway: _show(gateway, args))


async def _show(gateway: Gateway, args: argparse.Namespace) -> int:
    if args.request_id is not None:
        return _told(await asked(gateway, "GET", f"/usage/{segment(args.request_id)}"), as_json=args.json)
    by = args.by or "day"
    query = {
        name: value
        for name, value in (("model", args.model), ("since", args.since), ("until", args.until))
        if value is not None
    }
    if args.user is not None:
        query["user"] = (await user_called(gateway, args.user))["id"]
    if args.key is not None:
        query["key"] = (await key_called(gateway, args.key))["id"]
    if args.csv:
        path = "/usage/sums.csv" if args.rows is None else "/usage.csv"
        grouped = {"by": by} if args.rows is None else {}
        table = await gateway.ask("GET", path, query={**query, **grouped})
        lines = csv.reader(io.StringIO(table.decode("utf-8"), newline=""))
        most = None if args.rows is None else args.rows + 1
        csv.writer(sys.stdout, lineterminator="\n").writerows(itertools.islice(lines, most))
        return 0
    if args.rows is not None:
        return await _list(gateway, query, args.rows, as_json=args.json)
    found = await asked(gateway, "GET", "/usage/sums", query={**query, "by": by})
    if args.json:
        show_json(found)
        return 0
    say(*_sums(found))
    return 0


def _sums(found: JsonObject) -> list[str]:
    if not found["sums"]:
        return ["Nothing was used."]
    groups: list[str] = found["by"]
    head = (
        *(one.upper() for one in groups),
        "TURNS",
        "INPUT",
        "CACHED",
        "OUTPUT",
        "COST",
        "PAID",
        "UNPRICED",
    )
    left: Align = "<"
    right: Align = ">"
    aligns = [*[left for _ in groups], *[right for _ in head[len(groups) :]]]
    rows = [(*(printable(str(one[name] or "-")) for name in groups), *_figures(one)) for one in found["sums"]]
    total = ("total", *("",) * (len(groups) - 1), *_figures(found["total"]))
    return columns([head, *rows, total], aligns)


def _figures(one: JsonObject) -> tuple[str, ...]:
    return (
        *(str(one[name]) for name in ("turns", "input_tokens", "cached_tokens", "output_tokens")),
        one["cost"],
        one["debit"],
        str(one["unpriced"] or "-"),
    )


async def _list(gateway: Gateway, query: dict[str, str], count: int, *, as_json: bool) -> int:
    rows: list[JsonObject] = []
    before: str | None = None
    while count > len(rows):
        limit = str(min(_MOST, count - len(rows)))
        page = await asked(
            gateway,
            "GET",
            "/usage",
            query={**query, "limit": limit, **({"before": before} if before else {})},
        )
        rows += page["usage"]
        before = page["next"]
        if before is None:
            break
    if as_json:
        for row in rows:
            show_json(row)
        return 0
    if not rows:
        say("Nothing was used.")
        return 0
    head = ("TIME", "ID", "USER", "KEY", "MODEL", "SERVED BY", "INPUT", "CACHED", "OUTPUT", "COST", "SOURCE")
    aligns: tuple[Align, ...] = ("<",) * 6 + (">",) * 4 + ("<",)
    say(*columns([head, *(_row(row) for row in rows)], aligns))
    return 0


def _row(row: JsonObject) -> tuple[str, ...]:
    return (
        day(row["at"]),
        *(printable(row[name] or "-") for name in ("request_id", "user", "key", "model")),
        printable(row["upstream"] or row["target"] or "-"),
        *(str(row[name]) for name in ("input_tokens", "cached_tokens", "output_tokens")),
        "unpriced" if row["cost"] is None else row["cost"],
        " ".join([row["source"], *row["flags"]]),
    )


def _told(row: JsonObject, *, as_json: bool) -> int:
    if as_json:
        show_json(row)
        return 0
    paid = f", paid {row['debit']}" if row["is_billed"] else ""
    unpaid = f", unpaid {row['shortfall']}" if row["is_billed"] and float(row["shortfall"]) else ""
    cost = "unpriced" if row["cost"] is None else row["cost"]
    say(
        f"{row['request_id']}: {row['end']}, status {row['status']}, {row['seconds']:.2f} s",
        f"  {row['user']} with key {row['key']}, {row['route']}, model {row['model'] or row['asked_model']}",
        f"  tokens: {row['input_tokens']} in ({row['cached_tokens']} cached), {row['output_tokens']} out"
        f" ({row['reasoning_tokens']} reasoning); source {' '.join([row['source'], *row['flags']])}",
        f"  cost {cost}{paid}{unpaid}"
        + "".join(f", {name} {price}" for name, price in row["prices"].items())
        + (f" ({row['price_id']})" if row["price_id"] else ""),
    )
    for attempt in row["attempts"]:
        say(
            f"  tried {attempt['target']}: {attempt['outcome']}, status {attempt['status']}, {attempt['seconds']:.2f} s"
        )
    return 0
