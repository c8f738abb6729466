"""`codex-proxy users`: who owns keys, and their money."""

import argparse
import secrets

from codex_proxy.commands.gateway import (
    Gateway,
    add_actions,
    add_json,
    add_limits,
    add_new_limits,
    asked,
    check_new_limits,
    day,
    limits_in_words,
    limits_of,
    path_of,
    perform_on,
    show_json,
    user_called,
)
from codex_proxy.commands.terminal import Align, columns, complain, printable, say
from codex_proxy.protocol.wire import JsonObject

_MOST = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.description = (
        "List the users of the ledger with their balances, make one, suspend it, add to a balance or correct it; through"
        " the running daemon, or on its database when none runs."
    )
    add_json(parser, is_top=True)
    parser.set_defaults(action=None)
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [ACTION ...]"
    add = add_actions(parser)
    made = add("create", "make a user; its balance is 0")
    made.add_argument("name", metavar="NAME", help="what to call it")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--billed", action="store_true", help="its requests are paid from its balance")
    how.add_argument("--unbilled", action="store_true", help="they are not, whatever the ledger's mode")
    add_limits(made)
    limited = add(
        "limits", "show a user's limits, or replace all of them; they hold for all its keys together"
    )
    limited.add_argument("user", metavar="USER", help="by id or name")
    add_new_limits(limited)
    for name, text in (
        ("suspend", "refuse all keys of a user until it is resumed"),
        ("resume", "let a suspended user's keys work again"),
        ("entries", "list every change of a user's balance, the newest first"),
    ):
        add(name, text).add_argument("user", metavar="USER", help="by id or name")
    for name, text, what in (
        ("credit", "add to a balance", "dollars, such as 25.00"),
        ("adjust", "correct a balance, up or down", "dollars, such as -2.50"),
    ):
        paid = add(name, text)
        paid.add_argument("user", metavar="USER", help="by id or name")
        paid.add_argument("amount", metavar="DOLLARS", help=what)
        paid.add_argument("--reason", metavar="TEXT", required=True, help="why; it is kept for good")
        paid.add_argument(
            "--idempotency-key",
            metavar="KEY",
            help="the same one again changes nothing; without it one is made and printed",
        )


def run(args: argparse.Namespace) -> int:
    """List users, or do something to one; return the exit code."""
    check_new_limits(args)
    action = {
        None: _list,
        "create": _create,
        "limits": _limit,
        "suspend": _suspend,
        "resume": _suspend,
        "entries": _entries,
        "credit": _pay,
        "adjust": _pay,
    }[args.action]
    return perform_on(args, lambda gateway: action(gateway, args))


async def _list(gateway: Gateway, args: argparse.Namespace) -> int:
    found = await asked(gateway, "GET", "/users")
    if args.json:
        show_json(found)
        return 0
    head = ("ID", "NAME", "STATUS", "BILLED", "BALANCE", "HELD", "AVAILABLE", "KEYS", "LIMITS")
    aligns: tuple[Align, ...] = ("<", "<", "<", "<", ">", ">", ">", ">", "<")
    say(*columns([head, *(_row(user) for user in found["users"])], aligns))
    return 0


def _row(user: JsonObject) -> tuple[str, ...]:
    return (
        *(printable(user[name]) for name in ("id", "name")),
        "past due" if user["is_past_due"] and user["status"] == "active" else user["status"],
        "yes" if user["is_billed"] else "no",
        user["balance"],
        user["held"],
        user["available"],
        str(user["keys"]),
        printable(limits_in_words(user["limits"])),
    )


async def _create(gateway: Gateway, args: argparse.Namespace) -> int:
    body: JsonObject = {"name": args.name, "limits": limits_of(args)}
    if args.billed or args.unbilled:
        body["is_billed"] = args.billed
    return _told(await asked(gateway, "POST", "/users", body=body), as_json=args.json)


async def _limit(gateway: Gateway, args: argparse.Namespace) -> int:
    user = await user_called(gateway, args.user)
    limits = limits_of(args)
    if limits or args.none:
        user = await asked(gateway, "PATCH", path_of("users", user), body={"limits": limits})
    if args.json:
        show_json(user)
    else:
        say(f"{user['name']}: {limits_in_words(user['limits'])}")
    return 0


async def _suspend(gateway: Gateway, args: argparse.Namespace) -> int:
    user = await user_called(gateway, args.user)
    status = "suspended" if args.action == "suspend" else "active"
    return _told(
        await asked(gateway, "PATCH", path_of("users", user), body={"status": status}), as_json=args.json
    )


def _told(user: JsonObject, *, as_json: bool) -> int:
    if as_json:
        show_json(user)
    else:
        billed = "billed" if user["is_billed"] else "not billed"
        say(f"{user['name']} ({user['id']}): {user['status']}, {billed}, balance {user['balance']}")
    return 0


async def _entries(gateway: Gateway, args: argparse.Namespace) -> int:
    user = await user_called(gateway, args.user)
    entries: list[JsonObject] = []
    before: str | None = None
    while True:
        query = {"limit": str(_MOST), **({"before": before} if before else {})}
        page = await asked(gateway, "GET", path_of("users", user, "entries"), query=query)
        entries += page["entries"]
        before = page["next"]
        if before is None:
            break
    if args.json:
        for entry in entries:
            show_json(entry)
        return 0
    head = ("TIME", "KIND", "AMOUNT", "BALANCE", "BY", "WHY")
    rows = [
        (
            day(one["at"]),
            one["kind"],
            one["amount"],
            one["balance_after"],
            printable(one["actor"] or "-"),
            printable(one["request_id"] or one["reason"] or "-"),
        )
        for one in entries
    ]
    say(*columns([head, *rows], ("<", "<", ">", ">", "<", "<")))
    return 0


async def _pay(gateway: Gateway, args: argparse.Namespace) -> int:
    user = await user_called(gateway, args.user)
    key = args.idempotency_key
    if key is None:
        key = f"cli-{secrets.token_hex(12)}"
        # Before anything is done: whoever does not see the end of it can ask again and pay once.
        complain(f"idempotency key: {key}")
    body = {"amount": args.amount, "reason": args.reason, "idempotency_key": key}
    entry = await asked(gateway, "POST", path_of("users", user, args.action), body=body)
    if args.json:
        show_json(entry)
    else:
        say(f"{entry['user']}: {entry['kind']} {entry['amount']}, balance {entry['balance_after']}")
    return 0
