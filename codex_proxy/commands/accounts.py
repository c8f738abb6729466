"""`codex-proxy accounts`: how they are, and what is done to one of them."""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from codex_proxy.accounts.actions import Action
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
    say,
    seconds_of,
    span,
    width,
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
    parser.add_argument("--json", action="store_true", help="print what is known as JSON")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions on an account")
    for name, text in _HELP.items():
        action = actions.add_parser(
            name, help=text, description=f"{text[:1].upper()}{text[1:]}.", allow_abbrev=False
        )
        options.add_config(action)
        if name == "relogin":
            action.add_argument(
                "alias", metavar="ALIAS", help="the account, by the name in `codex-proxy accounts`"
            )
            options.add_login(action)
            continue
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
        action.set_defaults(usage=action)


def run(args: argparse.Namespace) -> int:
    """Show the accounts, or do something to some; return the exit code."""
    settings = options.load(args).settings
    if args.action is None:
        return asyncio.run(_show(settings, as_json=args.json))
    if args.action == "relogin":
        return login.relogin(settings, args)
    wants_all = getattr(args, "all", False)
    if wants_all is bool(args.aliases):
        args.usage.error("name accounts or say --all" + (", not both" if wants_all else ""))
    if args.action == "remove" and not confirm(
        f"Take {', '.join(args.aliases)} out of the pool?", is_yes=args.yes
    ):
        say("Nothing was done.")
        return 1
    return asyncio.run(_do(settings, args.action, args.aliases))


# -- doing --------------------------------------------------------------------------------


async def _do(settings: Settings, action: Action, aliases: Sequence[str]) -> int:
    async with control(settings) as pool:
        if aliases:
            return await act(pool, action, aliases)
        if action in _ROUNDS:
            return await _round(pool, action)
        known = await pool.accounts()
        return await act(pool, action, [account["alias"] for account in known["accounts"]])


async def act(pool: Control, action: Action, aliases: Iterable[str]) -> int:
    """Do *action* to each account, one after the other; a failure does not stop the others."""
    code, now = 0, time.time()
    for alias in aliases:
        try:
            done = await pool.act(alias, action)
        except ProxyError as exc:
            complain(exc.message)
            code = 1
            continue
        if not done["success"]:
            complain(f"{alias}: {done['message']}")
            code = 1
            continue
        say(f"{alias}: {done['message']}")
        if action == "check" and done["account"] is not None:
            for text in _quota_in_words(done["account"], now):
                say(f"  {text}")
    return code


async def _round(pool: Control, action: Action) -> int:
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
        say(f"[{item['current']}/{item['total']}] {item['alias']}: {outcome}")
    if not total:
        say("There are no accounts.")
    else:
        left_out = f", {skipped} left out" if skipped else ""
        say(f"{total - failed - skipped} of {total} succeeded{left_out}.")
    return 1 if failed else 0


# -- showing ------------------------------------------------------------------------------


async def _show(settings: Settings, *, as_json: bool) -> int:
    async with control(settings) as pool:
        known = {"daemon": pool.is_daemon, **await pool.accounts()}
    if as_json:
        sys.stdout.buffer.write(dumps(known) + b"\n")
        sys.stdout.flush()
        return 0
    if not settings.auth_dir.exists():
        # Before the first account there is no folder, which is nothing wrong.
        known["problems"] = []
    for line in table(known, time.time(), colour=has_colour(sys.stdout)):
        say(line)
    if not known["accounts"]:
        say(f"Get one into {settings.auth_dir} with `codex-proxy login` or `codex-proxy import PATH`.")
    return 0


_HEAD = ("ALIAS", "PLAN", "STATE", "5H", "RESETS", "WEEK", "RESETS", "SEEN", "TOKEN", "BUSY")
_ALIGNS: tuple[Align, ...] = ("<", "<", "<", ">", "<", ">", "<", ">", ">", ">")


def table(known: JsonObject, now: float, *, colour: bool = False) -> list[str]:
    """Return what is known of the accounts as lines for a person."""
    accounts: list[JsonObject] = known["accounts"]
    lines: list[str] = []
    if accounts:
        rows = [_HEAD, *(_row(account, now, is_daemon=known["daemon"]) for account in accounts)]
        head, *body = columns(rows, _ALIGNS, gap=" ")
        lines.append(head)
        for account, line in zip(accounts, body, strict=True):
            lines.append(_painted(line, account, rows, is_on=colour))
            lines += [paint(f"  {text}", "grey", is_on=colour) for text in _remarks(account, now)]
    if known["problems"]:
        lines += ["", "Files of the auth-dir with something wrong:"]
        lines += [f"  {problem['file']}: {problem['reason']}" for problem in known["problems"]]
    return [*lines, *([""] if lines else []), _summary(known)]


def _row(account: JsonObject, now: float, *, is_daemon: bool) -> tuple[str, ...]:
    windows = _own_windows(account)
    short = next((one for one in windows if _is_short(one)), None)
    long = next((one for one in windows if not _is_short(one)), None)
    ages = [one["age"] for one in (short, long) if one is not None and one["age"] is not None]
    ends_at = seconds_of(account["token_expire"])
    return (
        account["alias"],
        account["plan_type"] or _UNKNOWN,
        account["status"].replace("_", " "),
        _used(short, "5h"),
        _resets(short, now),
        _used(long, "week"),
        _resets(long, now),
        span(max(ages)) if ages else _UNKNOWN,
        _UNKNOWN if ends_at is None else "over" if ends_at <= now else span(ends_at - now),
        str(account["in_flight"]) if is_daemon else "-",
    )


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


def _resets(window: JsonObject | None, now: float) -> str:
    at = seconds_of(window["resets_at"]) if window is not None else None
    return _UNKNOWN if at is None else f"{span(at - now)} {clock(at, now)}"


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


def _quota_in_words(account: JsonObject, now: float) -> list[str]:
    found: list[str] = []
    for window in account["quota"]["windows"] if account["quota"] is not None else ():
        name = window["window"] if window["limit"] == _LIMIT else f"{window['limit']} {window['window']}"
        used = window["used_percent"]
        at = seconds_of(window["resets_at"])
        when = "" if at is None else f", resets in {span(at - now)} ({clock(at, now)})"
        found.append(f"{name}: {'unknown' if used is None else f'{used:.0f}% used'}{when}")
    return found
