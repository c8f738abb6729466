"""`codex-proxy accounts`: how they are, and what is done to one of them."""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from codex_proxy.accounts.actions import Action, unknown_account
from codex_proxy.commands import login, options
from codex_proxy.commands.control import Control, control
from codex_proxy.commands.terminal import (
    Align,
    clock,
    columns,
    complain,
    confirm,
    has_colour,
    paint,
    printable,
    say,
    say_json,
    seconds_of,
    span,
    width,
    wrapped,
)
from codex_proxy.config import Settings
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject, dumps

_STATUS_COLOURS = {
    "active": "green",
    "cooldown": "yellow",
    "unavailable": "yellow",
    "needs_login": "red",
    "disabled": "grey",
}
_LIMIT = "codex"
_SHORT_MINUTES = 24 * 60
_UNKNOWN = "?"
_SCREEN = 80
_PLAN_WIDTH = 12

_HELP: dict[str, str] = {
    "disable": "take no new requests with it; it stays disabled until it is enabled",
    "enable": "use it again",
    "remove": "take its file out of the auth-dir, into data-dir/removed",
    "refresh": "exchange its token now, also that of a disabled account",
    "reset": "end its cooldowns and forget what was learned of it",
    "check": "ask for its quota now; costs none",
    "relogin": "log it in again, into the same file",
}
_ROUNDS: dict[str, Any] = {"refresh": "refresh", "check": "check"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and actions."""
    parser.add_argument("--json", action="store_true", help="print what is known, or was done, as JSON")
    # Written out, because nothing else says that the action may be left out.
    parser.usage = f"{parser.prog} [-h] [-config FILE] [--json] [ACTION ...]"
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", title="actions on an account", prog=parser.prog
    )
    for name, text in _HELP.items():
        action = actions.add_parser(
            name, help=text, description=f"{text[:1].upper()}{text[1:]}.", allow_abbrev=False
        )
        options.add_config(action)
        action.set_defaults(usage=action)
        if name == "relogin":
            action.add_argument(
                "alias", metavar="ALIAS", help="the account, by the name in `codex-proxy accounts`"
            )
            options.add_login(action)
            continue
        # Below the top a default would undo one before the action.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS,
            help="print what was done as JSON, a line for each account",
        )  # fmt: skip
        can_be_all = name in ("refresh", "reset", "check")
        action.add_argument(
            "aliases",
            metavar="ALIAS",
            nargs="*" if can_be_all else "+",
            help="the accounts, by their names in `codex-proxy accounts`",
        )
        if can_be_all:
            action.add_argument("--all", action="store_true", help="all accounts")
        if name == "remove":
            options.add_yes(action)


def run(args: argparse.Namespace) -> int:
    """Show the accounts, or do something to some; return the exit code."""
    settings = options.load(args).settings
    if args.action is None:
        return asyncio.run(_show(settings, as_json=args.json))
    if args.action == "relogin":
        if args.json:
            args.usage.error("a login asks and tells a person: it has no --json")
        return login.relogin(settings, args)
    wants_all = getattr(args, "all", False)
    if wants_all is bool(args.aliases):
        args.usage.error("name accounts or say --all" + (", not both" if wants_all else ""))
    if args.action == "remove" and not args.yes:
        if args.json:
            args.usage.error("with --json nobody is asked: say --yes")
        asyncio.run(check_known(settings, args.aliases))
        if not confirm(f"Take {', '.join(args.aliases)} out of the pool?", is_yes=False):
            say("Nothing was done.")
            return 1
    return asyncio.run(_do(settings, args.action, args.aliases, as_json=args.json))


# -- doing --------------------------------------------------------------------------------


async def check_known(settings: Settings, aliases: Iterable[str]) -> None:
    """Find out whether there are accounts of these names, before anybody is asked about them.

    Raises:
        ProxyError: If one is not there; it names those that are called alike.
    """
    async with control(settings) as pool:
        known = [account["alias"] for account in (await pool.accounts())["accounts"]]
    for alias in aliases:
        if alias not in known:
            raise unknown_account(alias, known)


async def _do(settings: Settings, action: Action, aliases: Sequence[str], *, as_json: bool) -> int:
    async with control(settings) as pool:
        if not aliases and action in _ROUNDS:
            return await _round(pool, action, as_json=as_json)
        if not aliases:
            aliases = [account["alias"] for account in (await pool.accounts())["accounts"]]
        return await act(pool, action, aliases, as_json=as_json)


async def act(pool: Control, action: Action, aliases: Iterable[str], *, as_json: bool = False) -> int:
    """Do *action* to each account, one after the other; a failure does not stop the others."""
    code, now = 0, time.time()
    for alias in aliases:
        try:
            done = await pool.act(alias, action)
        except ProxyError as exc:
            code = 1
            if as_json:
                _say_json(alias, False, exc.message)
            else:
                complain(exc.message)
            continue
        if as_json:
            _say_json(done["alias"], done["success"], done["message"])
            code = code if done["success"] else 1
            continue
        if not done["success"]:
            complain(f"{alias}: {done['message']}")
            code = 1
            continue
        say(f"{alias}: {done['message']}")
        if action == "check" and done["account"] is not None:
            for text in quota_in_words(done["account"], now):
                say(f"  {text}")
    return code


def _say_json(alias: str, success: bool, message: str) -> None:
    # An argument that is no text cannot be in JSON as it is.
    name = alias.encode("utf-8", "replace").decode()
    say_json(dumps({"alias": name, "success": success, "message": message}))


async def _round(pool: Control, action: Action, *, as_json: bool) -> int:
    failed = skipped = total = 0
    async for item in pool.each(_ROUNDS[action]):
        total += 1
        if item["success"]:
            outcome = "ok"
        elif item["reason"] == "disabled":
            # Its owner wants it left alone; one that is named is not.
            outcome = "left out: disabled"
            skipped += 1
        else:
            outcome = f"failed: {item['reason'] or 'see the log'}"
            failed += 1
        if as_json:
            _say_json(item["alias"], item["success"], outcome)
            continue
        say(f"[{item['current']}/{item['total']}] {item['alias']}: {outcome}")
    if not total and not as_json:
        say("There are no accounts.")
    elif not as_json:
        left_out = f", {skipped} left out" if skipped else ""
        say(f"{total - failed - skipped} of {total} succeeded{left_out}.")
    return 1 if failed else 0


# -- showing ------------------------------------------------------------------------------


async def _show(settings: Settings, *, as_json: bool) -> int:
    async with control(settings) as pool:
        known = {"daemon": pool.is_daemon, **await pool.accounts()}
    if as_json:
        say_json(dumps(known))
        return 0
    say(*table(known, time.time(), colour=has_colour(sys.stdout)), is_painted=True)
    if not known["accounts"]:
        say(f"Get one into {settings.auth_dir} with `codex-proxy login` or `codex-proxy import PATH`.")
    return 0


_HEAD = ("ALIAS", "PLAN", "STATE", "5H", "RESETS", "WEEK", "RESETS", "SEEN", "TOKEN", "BUSY")
_ALIGNS: tuple[Align, ...] = ("<", "<", "<", ">", "<", ">", "<", ">", ">", ">")


def table(known: JsonObject, now: float, *, colour: bool = False) -> list[str]:
    """Return what is known of the accounts as lines for a person, fit to be printed as they are."""
    accounts: list[JsonObject] = known["accounts"]
    lines: list[str] = []
    if accounts:
        rows, (head, *body) = _fitting(accounts, now, is_daemon=known["daemon"])
        lines.append(head)
        for account, line in zip(accounts, body, strict=True):
            lines.append(_painted(line, account, rows, is_on=colour))
            remarks = [
                line for text in _remarks(account, now) for line in wrapped(printable(text), indent="  ")
            ]
            lines += [paint(text, "grey", is_on=colour) for text in remarks]
    if known["problems"]:
        lines += [*([""] if lines else []), "Files of the auth-dir with something wrong:"]
        for problem in known["problems"]:
            lines += wrapped(printable(f"{problem['file']}: {problem['reason']}"), indent="  ")
    return [*lines, *([""] if lines else []), *wrapped(_summary(known), _SCREEN)]


def _fitting(
    accounts: Sequence[JsonObject], now: float, *, is_daemon: bool
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return rows and lines that fit a screen if they can: moments go first, spans say as much."""
    clocks = [(True, True), (True, False), (False, False)]
    while True:
        shown = clocks.pop(0)
        rows = [_HEAD, *(_row(account, now, shown, is_daemon=is_daemon) for account in accounts)]
        lines = columns(rows, _ALIGNS, gap=" ")
        if not clocks or max(map(width, lines)) <= _SCREEN:
            return rows, lines


def _row(account: JsonObject, now: float, clocks: tuple[bool, bool], *, is_daemon: bool) -> tuple[str, ...]:
    windows = _own_windows(account)
    short = next((one for one in windows if _is_short(one)), None)
    long = next((one for one in windows if not _is_short(one)), None)
    ages = [one["age"] for one in (short, long) if one is not None and one["age"] is not None]
    ends_at = seconds_of(account["token_expire"])
    return (
        printable(account["alias"]),
        _shortened(printable(account["plan_type"] or _UNKNOWN)),
        account["status"].replace("_", " "),
        _used(short, "5h"),
        _resets(short, now, has_clock=clocks[0]),
        _used(long, "week"),
        _resets(long, now, has_clock=clocks[1]),
        span(max(ages)) if ages else _UNKNOWN,
        _UNKNOWN if ends_at is None else "over" if ends_at <= now else span(ends_at - now),
        str(account["in_flight"]) if is_daemon else "-",
    )


def _shortened(plan: str) -> str:
    return plan if len(plan) <= _PLAN_WIDTH else plan[: _PLAN_WIDTH - 1] + "…"


def _own_windows(account: JsonObject) -> list[JsonObject]:
    quota = account["quota"]
    return [one for one in quota["windows"] if one["limit"] == _LIMIT] if quota is not None else []


def _is_short(window: JsonObject) -> bool:
    minutes = window["minutes"]
    return bool(minutes <= _SHORT_MINUTES if minutes is not None else window["window"] == "primary")


def _used(window: JsonObject | None, usual: str) -> str:
    if window is None or window["used_percent"] is None:
        return _UNKNOWN
    # A plan may have windows of other lengths than the heading says.
    length = "" if window["window"] in (usual, "primary", "secondary") else f"/{window['window']}"
    return f"{window['used_percent']:.0f}%{length}"


def _resets(window: JsonObject | None, now: float, *, has_clock: bool) -> str:
    at = seconds_of(window["resets_at"]) if window is not None else None
    if at is None:
        return _UNKNOWN
    return f"{span(at - now)} {clock(at, now)}" if has_clock else span(at - now)


def _remarks(account: JsonObject, now: float) -> list[str]:
    """Say what does not fit a column, and does not go without saying."""
    remarks: list[str] = []
    if account["status"] in ("cooldown", "unavailable") and account["reason"]:
        until = seconds_of(account["cooldown_until"])
        when = f", until {clock(until, now)} (in {span(until - now)})" if until is not None else ""
        remarks.append(f"{account['status'].replace('_', ' ')}: {account['reason']}{when}")
    match account["login"]:
        case "uncertain":
            remarks.append(f"login uncertain: {account['login_reason']}")
        case "lost":
            remarks.append(
                f"login lost: {account['login_reason']}; codex-proxy accounts relogin {account['alias']}"
            )
        case _ if account["status"] == "needs_login":
            remarks.append(
                f"needs login: {account['reason']}; codex-proxy accounts relogin {account['alias']}"
            )
    if account["last_error"]:
        remarks.append(f"last error: {account['last_error']}")
    return remarks


def _painted(line: str, account: JsonObject, rows: Sequence[Sequence[str]], *, is_on: bool) -> str:
    """Colour the state's column, found by the columns before it."""
    if not is_on:
        return line
    taken = sum(max(width(row[place]) for row in rows) + 1 for place in range(2))
    # Columns are counted in what they take on the screen, texts in characters.
    start = 0
    while taken > 0:
        taken -= width(line[start])
        start += 1
    state = account["status"].replace("_", " ")
    return (
        line[:start]
        + paint(state, _STATUS_COLOURS[account["status"]], is_on=True)
        + line[start + len(state) :]
    )


def _summary(known: JsonObject) -> str:
    accounts = known["accounts"]
    states = [account["status"] for account in accounts]
    counts = ", ".join(
        f"{states.count(state)} {state.replace('_', ' ')}" for state in _STATUS_COLOURS if state in states
    )
    number = f"{len(accounts)} account{'' if len(accounts) == 1 else 's'}"
    running = (
        f"The daemon has been running for {span(known['uptime_seconds'])}."
        if known["daemon"]
        else "The daemon is not running: this is what the files say."
    )
    return f"{number}{': ' + counts if counts else ''}. {running}"


def quota_in_words(account: JsonObject, now: float) -> list[str]:
    """Return what is known of an account's quota, and of what was bought beside it, line by line."""
    found: list[str] = []
    quota = account["quota"]
    if quota is None:
        return found
    for window in quota["windows"]:
        name = window["window"] if window["limit"] == _LIMIT else f"{window['limit']} {window['window']}"
        used = window["used_percent"]
        at = seconds_of(window["resets_at"])
        when = "" if at is None else f", resets in {span(at - now)} ({clock(at, now)})"
        found.append(f"{name}: {'unknown' if used is None else f'{used:.0f}% used'}{when}")
    return [*found, *_credits_in_words(quota["credits"]), *_spend_in_words(quota["spend"], now)]


def _credits_in_words(told: JsonObject | None) -> list[str]:
    if told is None or not (told["has_credits"] or told["unlimited"]):
        return []
    balance = told["balance"]
    left = "unlimited" if told["unlimited"] else f"{balance} left" if balance else "some left"
    over = "; their own limit is reached" if told["overage_limit_reached"] else ""
    return [f"credits: {left}{over}"]


def _spend_in_words(spend: JsonObject | None, now: float) -> list[str]:
    if spend is None or (spend["limit"] is None and not spend["reached"]):
        return []
    parts = []
    if spend["limit"] is not None:
        parts.append(f"{spend['used'] or _UNKNOWN} of {spend['limit']}")
    if spend["used_percent"] is not None:
        parts.append(f"{spend['used_percent']:.0f}% used")
    if spend["reached"]:
        parts.append("the limit is reached")
    at = seconds_of(spend["resets_at"])
    if at is not None:
        parts.append(f"resets in {span(at - now)} ({clock(at, now)})")
    return [f"spending in the workspace: {', '.join(parts)}"]
