"""`codex-proxy keys`: client keys and what they may do."""

import argparse

from codex_proxy.commands import options
from codex_proxy.commands.gateway import (
    Gateway,
    add_actions,
    add_json,
    add_limits,
    add_new_limits,
    asked,
    check_new_limits,
    day,
    key_called,
    later,
    limits_in_words,
    limits_of,
    path_of,
    perform_on,
    seconds,
    show_json,
    user_called,
)
from codex_proxy.commands.terminal import Align, columns, complain, confirm, printable, say
from codex_proxy.protocol.wire import JsonObject

OWNER = "owner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.description = (
        "List the client keys of the ledger, make one, replace its text, limit it or end it; through the running daemon,"
        " or on its database when none runs. Keys of the configuration (api-keys) are not among them."
    )
    add_json(parser, is_top=True)
    parser.add_argument("--user", metavar="USER", help="only those of this user")
    parser.add_argument("--status", choices=("active", "revoked", "expired"), help="only those")
    parser.set_defaults(action=None)
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [--user USER] [--status STATUS] [ACTION ...]"
    add = add_actions(parser)
    made = add("create", "make a key, and print its text, this once")
    made.add_argument("name", metavar="NAME", help="what to call it")
    made.add_argument(
        "--user",
        metavar="USER",
        # A default would undo a --user before the action.
        default=argparse.SUPPRESS,
        help="whose it is, by id or name (owner, who is never billed)",
    )
    made.add_argument("--expires", metavar="TIME", type=later, help="when it ends: 30d, or 2026-12-31")
    add_limits(made)
    rotated = add("rotate", "replace a key's text, and print the new one, this once")
    rotated.add_argument("key", metavar="KEY", help="by id, name or hint")
    rotated.add_argument(
        "--grace", metavar="SPAN", type=seconds, default=0, help="for how long the old text goes on working"
    )
    limited = add("limits", "show a key's limits, or replace all of them")
    limited.add_argument("key", metavar="KEY", help="by id, name or hint")
    add_new_limits(limited)
    revoked = add("revoke", "end a key for good; it is refused within a second")
    revoked.add_argument("key", metavar="KEY", help="by id, name or hint")
    options.add_yes(revoked)


def run(args: argparse.Namespace) -> int:
    """List keys, or do something to one; return the exit code."""
    check_new_limits(args)
    action = {
        None: _list,
        "create": _create,
        "rotate": _rotate,
        "limits": _limit,
        "revoke": _revoke,
    }[args.action]
    return perform_on(args, lambda gateway: action(gateway, args))


async def _list(gateway: Gateway, args: argparse.Namespace) -> int:
    query = {} if args.status is None else {"status": args.status}
    if args.user is not None:
        query["user"] = (await user_called(gateway, args.user))["id"]
    found = await asked(gateway, "GET", "/keys", query=query)
    if args.json:
        show_json(found)
        return 0
    if not found["keys"]:
        say("There is no such key; `codex-proxy keys create NAME` makes one.")
        return 0
    head = ("ID", "NAME", "USER", "KEY", "STATUS", "LAST USED", "EXPIRES", "LIMITS")
    rows = [head, *(_row(key) for key in found["keys"])]
    aligns: list[Align] = ["<"] * len(head)
    say(*columns(rows, aligns))
    return 0


def _row(key: JsonObject) -> tuple[str, ...]:
    return (
        *(printable(key[name]) for name in ("id", "name", "user", "hint", "status")),
        day(key["last_used_at"]),
        day(key["expires_at"]),
        printable(limits_in_words(key["limits"])),
    )


async def _create(gateway: Gateway, args: argparse.Namespace) -> int:
    user = await user_called(gateway, OWNER if args.user is None else args.user)
    body = {"user": user["id"], "name": args.name, "limits": limits_of(args)}
    if args.expires is not None:
        body["expires_at"] = args.expires
    return _told(await asked(gateway, "POST", "/keys", body=body), as_json=args.json)


async def _rotate(gateway: Gateway, args: argparse.Namespace) -> int:
    key = await key_called(gateway, args.key)
    made = await asked(gateway, "POST", path_of("keys", key, "rotate"), body={"grace_seconds": args.grace})
    return _told(made, as_json=args.json)


def _told(made: JsonObject, *, as_json: bool) -> int:
    if as_json:
        show_json(made)
        return 0
    key = made["key"]
    # Alone on stdout, so that it can go into a file or another program.
    say(made["secret"])
    complain(
        f"key {key['name']!r} ({key['id']}) of {key['user']!r}, limits: {limits_in_words(key['limits'])};"
        " its text is shown this once, because only a digest is kept"
    )
    return 0


async def _limit(gateway: Gateway, args: argparse.Namespace) -> int:
    key = await key_called(gateway, args.key)
    limits = limits_of(args)
    if limits or args.none:
        key = await asked(gateway, "PATCH", path_of("keys", key), body={"limits": limits})
    if args.json:
        show_json(key)
    else:
        say(f"{key['name']}: {limits_in_words(key['limits'])}")
    return 0


async def _revoke(gateway: Gateway, args: argparse.Namespace) -> int:
    key = await key_called(gateway, args.key)
    if not confirm(f"End the key {key['name']!r} of {key['user']!r} for good?", is_yes=args.yes):
        say("Nothing was done.")
        return 1
    key = await asked(gateway, "POST", path_of("keys", key, "revoke"))
    if args.json:
        show_json(key)
    else:
        say(f"{key['name']}: {key['status']}")
    return 0
