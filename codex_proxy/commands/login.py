"""`codex-proxy login`: get an account in; and log one that is there in again."""

import argparse
import asyncio
import contextlib
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codex_proxy.accounts import store
from codex_proxy.accounts.actions import unknown_account
from codex_proxy.accounts.credential import Credential, parse
from codex_proxy.accounts.login import PORTS, Invitation, account_file, browser_login, device_login
from codex_proxy.accounts.oauth import Device, Issuer, LoginFailed
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.tokens import NewTokens, mask_name
from codex_proxy.clock import SystemClock
from codex_proxy.commands import options
from codex_proxy.commands.control import take_up
from codex_proxy.commands.terminal import complain, say, wrapped
from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError
from codex_proxy.net import Outbound

# A pasted address has a few hundred characters.
_MOST_TYPED = 64 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Log a ChatGPT account in and put it into the auth-dir. An account that is there already gets the new login."
    parser.add_argument("--alias", metavar="NAME", help="what to call it in lists and logs")
    options.add_login(parser)


def run(args: argparse.Namespace) -> int:
    """Log an account in; return the exit code."""
    settings = options.load(args).settings
    known = _known(settings)
    if args.alias is not None:
        _check_alias(args.alias, known)
    _check_folder(settings.auth_dir)

    def accept(tokens: NewTokens) -> store.Added:
        raw = account_file(tokens, now=time.time())
        if args.alias is not None:
            raw["alias"] = args.alias
        return _put(settings, raw)

    return _perform(settings, args, accept)


def relogin(settings: Settings, args: argparse.Namespace) -> int:
    """Log an account in again, into its file; return the exit code."""
    account = _find(settings, args.alias)
    if account.identity.user_id is None:
        raise ProxyError(
            f"the file of {args.alias} does not say whose it is, so nobody can tell whether the same person logs in:"
            " use `codex-proxy login`, and then remove this one"
        )
    _check_folder(account.target.parent)

    def accept(tokens: NewTokens) -> store.Added:
        raw = account_file(tokens, now=time.time())
        nowhere = settings.auth_dir / ".new"
        if parse(nowhere, nowhere, raw, 0)[0].key != account.key:
            raise LoginFailed(
                f"another account logged in than {args.alias}, or another of its workspaces; nothing was changed."
                " Log out in the browser first, or use `codex-proxy login` to have that account in the pool too"
            )
        return _put(settings, raw)

    proxy = account.proxy_url
    return _perform(settings, args, accept, proxy_url=proxy.reveal() if proxy else None)


def _perform(
    settings: Settings,
    args: argparse.Namespace,
    accept: Callable[[NewTokens], store.Added],
    *,
    proxy_url: str | None = None,
) -> int:
    try:
        added = asyncio.run(_log_in(settings, args, accept, proxy_url))
    except KeyboardInterrupt:
        complain("the login was broken off; nothing was changed")
        return 1
    credential = added.credential
    plan = f" ({credential.identity.plan})" if credential.identity.plan else ""
    name = credential.alias or credential.default_alias
    place = credential.path.parent / mask_name(credential.path.name)
    what = "its new login is in" if added.outcome == "updated" else "its login is in"
    say(f"Logged in: {name}{plan}; {what} {place}.")
    if credential.disabled:
        say(f"It is disabled; `codex-proxy accounts enable {name}` puts it to use.")
    else:
        say(asyncio.run(take_up(settings)))
    return 0


async def _log_in(
    settings: Settings,
    args: argparse.Namespace,
    accept: Callable[[NewTokens], store.Added],
    proxy_url: str | None,
) -> store.Added:
    outbound = Outbound(Live(settings))
    issuer = Issuer(
        outbound.fetch, settings.oauth_issuer, settings.originator, settings.user_agent, proxy_url
    )
    try:
        if args.device:
            return await device_login(issuer, accept, invite=_invite_device)
        can_open = not args.no_browser and _has_browser()
        can_type = args.no_browser or (sys.stdin is not None and sys.stdin.isatty())
        with contextlib.ExitStack() as stack:

            def invite(invitation: Invitation) -> None:
                _invite(invitation, can_open=can_open, can_type=can_type)
                if can_type:
                    stack.enter_context(_typing(invitation.offer))

            return await browser_login(
                issuer,
                accept,
                invite=invite,
                can_type=args.no_browser,
                ports=tuple(args.callback_port) or PORTS,
            )
    finally:
        await outbound.aclose()


# -- what a person sees -------------------------------------------------------------------


def _invite_device(device: Device) -> None:
    say("On any device, open this page and log in:")
    say("", f"  {device.url}", "")
    say("and type this code there, which is good for 15 minutes:")
    say("", f"  {device.user_code}", "")
    say(
        "Give the code to nobody: whoever asks you for it wants your account.",
        "Waiting; Ctrl-C ends it.",
    )


def _invite(invitation: Invitation, *, can_open: bool, can_type: bool) -> None:
    if can_open:
        # On a thread of its own: some browsers do not come back before they are closed.
        threading.Thread(target=_open, args=(invitation.url,), daemon=True).start()
        say("A browser should open now. If it does not, open this page to log in:")
    else:
        say("Open this page in a browser and log in:")
    say("", f"  {invitation.url}", "")
    if can_type:
        where = "If that browser is on another machine, it" if invitation.is_listening else "The browser"
        text = (
            f"{where} ends at an address that cannot be opened there,"
            f" {invitation.redirect_uri}?code=... Paste that address here and press Enter."
        )
        say(*wrapped(text))
    say("Waiting for the login, 15 minutes at most; Ctrl-C ends it.")


def _has_browser() -> bool:
    """Tell whether a browser can be opened that does not take this very terminal."""
    if sys.platform != "linux" or os.environ.get("BROWSER"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"))


def _open(url: str) -> None:
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(url)


@contextlib.contextmanager
def _typing(offer: Callable[[str], str]) -> Iterator[None]:
    """Give *offer* each line of stdin while this lasts."""
    loop = asyncio.get_running_loop()
    typed = bytearray()

    def take(line: bytes) -> None:
        complaint = offer(line.decode("utf-8", "replace"))
        if complaint:
            complain(complaint)

    def on_readable() -> None:
        # Read below Python's own buffer, which would wait for more.
        data = os.read(descriptor, _MOST_TYPED)
        typed.extend(data)
        while b"\n" in typed:
            line, _, rest = bytes(typed).partition(b"\n")
            typed[:] = rest
            take(line)
        if data and len(typed) <= _MOST_TYPED:
            return
        if typed:
            take(bytes(typed))
            typed.clear()
        if not data:
            # The end of what is typed is not the end of the login: the browser may still come back.
            loop.remove_reader(descriptor)

    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        yield
        return
    try:
        loop.add_reader(descriptor, on_readable)
    except PermissionError:
        # A file: it is there at once, and cannot be waited for.
        with open(descriptor, "rb", closefd=False) as file:
            for line in file.read(_MOST_TYPED).splitlines():
                take(line)
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


# -- files --------------------------------------------------------------------------------


def _put(settings: Settings, raw: dict[str, Any]) -> store.Added:
    """Bring a new login to auth-dir, under the alias that it came with.

    Raises:
        LoginFailed: If it could not be written.
    """
    try:
        added = store.add(settings.auth_dir, raw, is_new=True)
        alias = raw.get("alias")
        if alias is not None and added.credential.alias != alias:
            named = store.edit(added.credential.path, lambda found: {**found, "alias": alias})
            added = store.Added(named, added.outcome)
    except ProxyError as exc:
        raise LoginFailed(f"the login worked, but its file could not be written: {exc.message}") from exc
    return added


def _known(settings: Settings) -> list[Credential]:
    return store.scan(settings.auth_dir).credentials


def _find(settings: Settings, alias: str) -> Credential:
    # The pool names its accounts, so one is found by the name that `accounts` shows.
    pool = Pool(SystemClock())
    pool.apply(store.scan(settings.auth_dir))
    account = pool.by_alias(alias)
    if account is None:
        raise unknown_account(alias, [one.alias for one in pool])
    return account.credential


def _check_alias(alias: str, known: list[Credential]) -> None:
    """Refuse a name that is none, or that is taken, before anybody goes to a browser."""
    nowhere = Path("nowhere")
    credential, complaints = parse(nowhere, nowhere, {"access_token": "x", "alias": alias}, 0)
    if complaints or credential.alias is None:
        raise ProxyError(f"--alias {alias!r} is no name: up to 64 printable characters without '@' would do")
    if any(alias in (one.alias, one.default_alias) for one in known):
        raise ProxyError(
            f"there is an account {alias!r} already; `codex-proxy accounts relogin {alias}` logs it in again"
        )


def _check_folder(folder: Path) -> None:
    """Find out before the login whether its file can be written after it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as exc:
        raise ProxyError(f"auth-dir {folder} is no folder") from exc
    except OSError as exc:
        raise ProxyError(f"the folder {folder} cannot be made: {exc.strerror}") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ProxyError(f"the folder {folder} cannot be written to, so a login could not be kept")
