"""`codex-proxy upstreams`: providers over HTTP beside the accounts, and how they do."""

import argparse

from codex_proxy.commands import options
from codex_proxy.commands.control import segment
from codex_proxy.commands.gateway import Gateway, add_json, asked, day, name, perform_on, show_json
from codex_proxy.commands.terminal import Align, columns, printable, say
from codex_proxy.protocol.wire import JsonObject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.description = (
        "List the upstreams of the configuration and of the ledger, or check them now. How they have done so far is"
        " known to the running daemon only; without one they are listed and checked from here."
    )
    add_json(parser, is_top=True)
    parser.set_defaults(action=None)
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [ACTION ...]"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", prog=parser.prog)
    text = "ask all upstreams, or one, whether they are well, and for their models"
    check = actions.add_parser("check", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    options.add_config(check)
    add_json(check)
    check.add_argument("name", metavar="NAME", nargs="?", type=name, help="only this one")


def run(args: argparse.Namespace) -> int:
    """List upstreams, or check them; return the exit code."""
    action = _list if args.action is None else _check
    return perform_on(args, lambda gateway: action(gateway, args))


async def _list(gateway: Gateway, args: argparse.Namespace) -> int:
    found = await asked(gateway, "GET", "/upstreams")
    if args.json:
        show_json(found)
        return 0
    if not found["upstreams"]:
        say("There are no upstreams; the key `upstreams` of the configuration names some.")
        return 0
    head = ("NAME", "URL", "PRIORITY", "WEIGHT", "STATE", "REQUESTS", "ERRORS", "CHECKED", "CAPABILITIES")
    aligns: tuple[Align, ...] = ("<", "<", ">", ">", "<", ">", ">", "<", "<")
    rows = [head, *(_row(one) for one in found["upstreams"])]
    say(*columns(rows, aligns))
    return 0


def _row(one: JsonObject) -> tuple[str, ...]:
    reason = f" ({one['reason']})" if one["reason"] else ""
    return (
        printable(one["name"]),
        printable(one["effective_url"]),
        str(one["priority"]),
        f"{one['weight']:g}",
        printable(one["state"] + reason),
        str(one["requests"]),
        str(one["errors"]),
        day(one["checked_at"]),
        " ".join(one["capabilities"]),
    )


async def _check(gateway: Gateway, args: argparse.Namespace) -> int:
    path = "/upstreams/health/check" if args.name is None else f"/upstreams/{segment(args.name)}/check"
    found = await asked(gateway, "POST", path)
    results: list[JsonObject] = found.get("results", [found])
    code = 0 if all(one["state"] == "normal" for one in results) else 1
    if args.json:
        show_json(found)
        return code
    if not results:
        say("There are no upstreams; the key `upstreams` of the configuration names some.")
    for number, one in enumerate(results, start=1):
        took = "" if one["seconds"] is None else f" in {one['seconds']:.2f} s"
        models = f", {one['models']} models" if one["state"] == "normal" else ""
        said = f": {one['message']}" if one["message"] and one["state"] != "normal" else ""
        say(f"[{number}/{len(results)}] {one['name']}: {one['state']}{took}{models}{said}")
    return code
