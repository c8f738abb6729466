"""`codex-proxy prices`: what models cost, and prices of one's own."""

import argparse

from codex_proxy.commands.control import segment
from codex_proxy.commands.gateway import (
    Gateway,
    add_actions,
    add_json,
    asked,
    day,
    moment,
    perform_on,
    show_json,
)
from codex_proxy.commands.terminal import Align, columns, printable, say
from codex_proxy.protocol.wire import JsonObject

TIERS = ("standard", "flex", "batch", "priority", "ultrafast")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.description = (
        "List what models cost, in dollars for a million tokens: the package's prices, and your own, which win. Set or end"
        " one of your own, or price what was used again; through the running daemon, or on its database when none runs."
    )
    add_json(parser, is_top=True)
    parser.add_argument("--model", metavar="MODEL", dest="only", help="only what counts for this model")
    parser.set_defaults(action=None)
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [--model MODEL] [ACTION ...]"
    add = add_actions(parser)
    made = add("set", "set a price of your own, in dollars for a million tokens")
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--input", metavar="DOLLARS", required=True, help="of input")
    made.add_argument("--output", metavar="DOLLARS", required=True, help="of output, reasoning included")
    made.add_argument("--cached", metavar="DOLLARS", help="of cached input (as other input)")
    made.add_argument(
        "--cache-write", metavar="DOLLARS", help="of input that goes into a cache (as other input)"
    )
    made.add_argument(
        "--tier", choices=TIERS, default="standard", help="for requests of this tier (standard)"
    )
    made.add_argument("--since", metavar="TIME", type=moment, help="from when on it counts (now)")
    ended = add("end", "end a price of your own; the package's counts again")
    ended.add_argument("number", metavar="NUMBER", help="its number in the list")
    again = add("rerate", "price what was used again, by the prices that count for its time now")
    again.add_argument(
        "--since", metavar="TIME", type=moment, required=True, help="from when on: 7d, 2026-01-31"
    )
    again.add_argument("--until", metavar="TIME", type=moment, help="up to when (now)")
    again.add_argument("--model", metavar="MODEL", help="only what this model has used")
    again.add_argument("--reason", metavar="TEXT", required=True, help="why; it is kept for good")
    again.add_argument(
        "--apply", action="store_true", help="do it; without this it is only told what would change"
    )


def run(args: argparse.Namespace) -> int:
    """List prices, or change them; return the exit code."""
    action = {None: _list, "set": _set, "end": _end, "rerate": _rerate}[args.action]
    return perform_on(args, lambda gateway: action(gateway, args))


async def _list(gateway: Gateway, args: argparse.Namespace) -> int:
    query = {} if args.only is None else {"model": args.only}
    found = await asked(gateway, "GET", "/prices", query=query)
    if args.json:
        show_json(found)
        return 0
    if not found["prices"]:
        say("Nothing here has a price for that; `codex-proxy prices set MODEL` gives it one.")
        return 0
    head = ("MODEL", "TIER", "INPUT", "CACHED", "CACHE WRITE", "OUTPUT", "LONG INPUT", "OWN", "SINCE")
    aligns: tuple[Align, ...] = ("<", "<", ">", ">", ">", ">", "<", "<", "<")
    say(*columns([head, *(_row(price) for price in found["prices"])], aligns))
    return 0


def _row(price: JsonObject) -> tuple[str, ...]:
    long = price["long"]
    return (
        printable(price["model"]),
        price["tier"],
        *(price[name] for name in ("input", "cached", "cache_write", "output")),
        "-" if long is None else f"{long['input']}/{long['output']} above {price['long_above']}",
        price["own_id"] or "-",
        day(price["effective_from"]),
    )


async def _set(gateway: Gateway, args: argparse.Namespace) -> int:
    body: JsonObject = {"model": args.model, "tier": args.tier, "input": args.input, "output": args.output}
    for name, value in (
        ("cached", args.cached),
        ("cache_write", args.cache_write),
        ("effective_from", args.since),
    ):
        if value is not None:
            body[name] = value
    return _told(await asked(gateway, "POST", "/prices", body=body), as_json=args.json)


async def _end(gateway: Gateway, args: argparse.Namespace) -> int:
    return _told(await asked(gateway, "DELETE", f"/prices/{segment(args.number)}"), as_json=args.json)


def _told(own: JsonObject, *, as_json: bool) -> int:
    if as_json:
        show_json(own)
        return 0
    price = own["price"]
    what = "no price of your own counts" if price is None else f"{price['input']} in, {price['output']} out"
    say(f"{own['model']} ({own['tier']}): {what} from {day(own['effective_from'])} on; number {own['id']}")
    return 0


async def _rerate(gateway: Gateway, args: argparse.Namespace) -> int:
    body: JsonObject = {"since": args.since, "reason": args.reason, "dry_run": not args.apply}
    for name, value in (("until", args.until), ("model", args.model)):
        if value is not None:
            body[name] = value
    done = await asked(gateway, "POST", "/prices/rerate", body=body)
    if args.json:
        show_json(done)
        return 0
    changed = "would change" if done["dry_run"] else "changed"
    say(
        f"{done['changed']} of {done['turns']} requests {changed}: {done['before']} becomes {done['after']};"
        f" {done['unpriced']} have no price"
    )
    for moved in done["moved"]:
        say(f"  {moved['user']}: {moved['amount']}")
    if done["dry_run"]:
        say("Nothing was done: say --apply to do it.")
    return 0
