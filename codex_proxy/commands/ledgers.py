"""`codex-proxy ledger`: how the book of usage and money does, and whether it adds up."""

import argparse

from codex_proxy.commands.gateway import Gateway, add_actions, add_json, asked, perform_on, show_json
from codex_proxy.commands.terminal import complain, printable, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.description = (
        "Tell how the ledger does, or check that its sums agree; through the running daemon, or on its database when"
        " none runs."
    )
    add_json(parser, is_top=True)
    parser.set_defaults(action=None)
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [ACTION ...]"
    add = add_actions(parser)
    _ = add("status", "tell how it does; also without an action")
    _ = add("check", "check that all sums agree; exit code 1 when they do not")


def run(args: argparse.Namespace) -> int:
    """Tell it; return the exit code."""
    action = _check if args.action == "check" else _status
    return perform_on(args, lambda gateway: action(gateway, args))


async def _status(gateway: Gateway, args: argparse.Namespace) -> int:
    found = await asked(gateway, "GET", "/ledger")
    if args.json:
        show_json(found)
        return 0
    away = "its database cannot be written now; what is used is kept aside" if found["is_away"] else "well"
    say(
        f"mode {found['mode']}: {away}",
        f"{found['users']} users, {found['keys']} keys, balances {found['balance']}, held {found['held']}",
    )
    for name, value in found["figures"].items():
        # What was said above, and what there is none of.
        if name in ("mode", "is_away") or value == "":
            continue
        said = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        say(f"  {printable(name.removeprefix('writer_').replace('_', ' '))}: {said}")
    return 0


async def _check(gateway: Gateway, args: argparse.Namespace) -> int:
    found = await asked(gateway, "POST", "/ledger/check")
    if args.json:
        show_json(found)
    elif found["ok"]:
        say("All sums agree.")
    else:
        complain(*found["problems"])
    return 0 if found["ok"] else 1
