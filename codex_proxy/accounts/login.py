"""Logging an account in: through a browser on this machine, or on another device.

Both end with `accept`, which is given the new tokens and puts them into a file; it may refuse
them (the wrong account logged in), and then nothing was written. What is shown and what is
typed is the caller's business; the page that the browser comes back to is ours.

Facts: backend contract, sections 1.3 and 1.4.
"""

import asyncio
import errno
import html
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import aiohttp
from aiohttp import web

from codex_proxy.accounts.oauth import (
    Device,
    Grant,
    Issuer,
    LoginFailed,
    NoAnswer,
    Pkce,
    login_words,
)
from codex_proxy.accounts.tokens import NewTokens, Secret, expiry_of, identity_of, word_of

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]
Accept = Callable[[NewTokens], T]
"""Takes the tokens of a login, or raises `LoginFailed`; what it returns is the login's result."""

PORTS = (1455, 1457)
"""Where the issuer lets a browser come back to, in this order; other ports it refuses."""

LIMIT_SECONDS = 900.0
"""How long a person may take; the issuer's codes live as long."""

_HOST = "127.0.0.1"
_CALLBACK = "/auth/callback"
# An earlier login needs a moment to let go of the port after it was told to.
_RELEASE_TRIES = 10
_RELEASE_SECONDS = 0.1
# So many questions in a row without an answer are no passing trouble.
_MOST_SILENCES = 5
_BARE_CODE = re.compile(r"[\w.~+/=-]{20,2048}", re.ASCII)


@dataclass(slots=True, frozen=True)
class Invitation:
    """What a person needs to log in with a browser."""

    url: str
    redirect_uri: str
    """Where the browser comes back to."""
    is_listening: bool
    """Whether anything of ours waits there; if not, what comes back has to be typed."""
    offer: Callable[[str], str]
    """Take a typed address or code; returns what is wrong with it, '' when it is good."""


async def browser_login(
    issuer: Issuer,
    accept: Accept[T],
    *,
    invite: Callable[[Invitation], None],
    can_type: bool = False,
    ports: Sequence[int] = PORTS,
    sleep: Sleep = asyncio.sleep,
    limit: float = LIMIT_SECONDS,
) -> T:
    """Log in with a browser; the first answer counts, that of the browser or a typed one.

    Args:
        invite: Told once where to log in.
        can_type: Whether a login is possible without a port for the browser to come back to.

    Raises:
        LoginFailed: If it came to nothing.
    """
    pkce = Pkce.new()
    callback = Callback(secrets.token_urlsafe(32))
    try:
        await callback.open(ports, sleep, is_needed=not can_type)
        url = issuer.authorize_url(pkce, redirect_uri=callback.redirect_uri, state=callback.state)
        invite(Invitation(url, callback.redirect_uri, callback.is_listening, callback.offer))
        try:
            async with asyncio.timeout(limit):
                code = await callback.wait_code()
        except TimeoutError:
            raise LoginFailed(f"nobody logged in within {_minutes(limit)}: begin again") from None
        tokens = await issuer.exchange_code(code, redirect_uri=callback.redirect_uri, verifier=pkce.verifier)
        result = accept(tokens)
    except LoginFailed as exc:
        callback.conclude(exc)
        raise
    else:
        callback.conclude(None)
        return result
    finally:
        await callback.aclose()


async def device_login(
    issuer: Issuer,
    accept: Accept[T],
    *,
    invite: Callable[[Device], None],
    sleep: Sleep = asyncio.sleep,
    limit: float = LIMIT_SECONDS,
) -> T:
    """Log in with a code that a person types on another device.

    Raises:
        LoginFailed: If it came to nothing.
    """
    device = await issuer.start_device()
    invite(device)
    try:
        async with asyncio.timeout(limit):
            grant = await _granted(issuer, device, sleep)
    except TimeoutError:
        raise LoginFailed(
            f"the code was not entered within {_minutes(limit)} and has expired: begin again"
        ) from None
    return accept(await issuer.exchange_grant(grant))


async def _granted(issuer: Issuer, device: Device, sleep: Sleep) -> Grant:
    pause, silences = device.interval, 0
    while True:
        await sleep(pause)
        try:
            said = await issuer.poll_device(device)
        except NoAnswer:
            # The person is at another device and need not know of a bad moment here.
            silences += 1
            if silences >= _MOST_SILENCES:
                raise
            continue
        silences = 0
        if isinstance(said, Grant):
            return said
        pause += said


def account_file(tokens: NewTokens, *, now: float) -> dict[str, Any]:
    """Return what a new account file holds, in the shape of the Go daemon's.

    Raises:
        LoginFailed: If the tokens do not say whose they are.
    """
    access, refresh, id_token = (token or Secret() for token in (tokens.access, tokens.refresh, tokens.id))
    identity = identity_of(id_token, access)
    if identity.user_id is None or identity.account_id is None:
        raise LoginFailed("the new tokens do not say whose they are, so no account can be made of them")
    expires_at = expiry_of(access)
    if expires_at is None and tokens.expires_in is not None:
        expires_at = now + tokens.expires_in
    return {
        "type": "codex",
        "email": identity.email or "",
        "account_id": identity.account_id,
        "access_token": access.reveal(),
        "refresh_token": refresh.reveal(),
        "id_token": id_token.reveal(),
        "expired": "" if expires_at is None else _rfc3339(expires_at),
        "last_refresh": _rfc3339(now),
    }


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Callback:
    """The page to which the browser comes back after a login.

    It believes nobody who does not know *state*, and says how the login ended: the answer to
    the browser waits until the tokens are in their file.
    """

    def __init__(self, state: str) -> None:
        self.state = state
        self.redirect_uri = ""
        self.is_listening = False
        loop = asyncio.get_running_loop()
        # The failure is a result and no exception: nobody may be there to take it.
        self._code: asyncio.Future[Secret | LoginFailed] = loop.create_future()
        self._verdict: asyncio.Future[LoginFailed | None] = loop.create_future()
        self._runner: web.AppRunner | None = None

    async def open(self, ports: Sequence[int], sleep: Sleep, *, is_needed: bool = True) -> None:
        """Listen on the first of *ports* that is free.

        A login that was left behind is asked to give up first, as the Codex CLI does, so that
        one that nobody looks at does not hold the port for a quarter of an hour.

        Raises:
            LoginFailed: If none is free and one is needed.
        """
        app = web.Application()
        app.router.add_get(_CALLBACK, self._on_callback)
        app.router.add_get("/cancel", self._on_cancel)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        for port in ports:
            bound = await self._bind(port)
            if bound is None and await _cancel(port):
                for _ in range(_RELEASE_TRIES):
                    await sleep(_RELEASE_SECONDS)
                    bound = await self._bind(port)
                    if bound is not None:
                        break
            if bound is not None:
                self.redirect_uri = f"http://{_HOST}:{bound}{_CALLBACK}"
                self.is_listening = True
                return
        if is_needed:
            names = " and ".join(str(port) for port in ports)
            raise LoginFailed(
                f"no port for the browser to come back to: {names} on {_HOST} are in use, and the issuer"
                " knows no others. End the program that has them, or log in with --no-browser or --device"
            )
        self.redirect_uri = f"http://{_HOST}:{ports[0]}{_CALLBACK}"

    async def _bind(self, port: int) -> int | None:
        assert self._runner is not None
        site = web.TCPSite(self._runner, _HOST, port)
        try:
            await site.start()
        except OSError as exc:
            await site.stop()
            if exc.errno in {errno.EADDRINUSE, errno.EACCES}:
                return None
            raise LoginFailed(f"cannot listen on {_HOST}:{port}: {exc.strerror or exc}") from exc
        address = self._runner.addresses[-1]
        return int(address[1])

    async def wait_code(self) -> Secret:
        """Wait for the code of the login.

        Raises:
            LoginFailed: If the issuer or a person refused it.
        """
        said = await self._code
        if isinstance(said, LoginFailed):
            raise said
        return said

    def offer(self, text: str) -> str:
        """Take what a person typed: the address the browser ended at, or the code in it.

        Returns what is wrong with it, '' when it is good.
        """
        words = text.strip().strip("'\"<>")
        if not words:
            return "nothing was typed: paste the whole address from the browser, or the code in it"
        if "=" in words and ("?" in words or "&" in words or words.startswith(("code=", "error="))):
            query = urlsplit(words).query if "?" in words else words
            complaint = self._take({name: values[0] for name, values in parse_qs(query).items()})
            return f"{complaint}: paste the address that this login ended at" if complaint else ""
        code, _, state = words.partition("#")
        if "://" in words or not _BARE_CODE.fullmatch(code):
            return "that is no address with a code in it: paste the whole address from the browser"
        if state and not secrets.compare_digest(state.encode(), self.state.encode()):
            return "that code is of another login: paste the one of this login"
        self._decide(Secret(code))
        return ""

    def conclude(self, failure: LoginFailed | None) -> None:
        """Let the browser know how the login ended."""
        if not self._verdict.done():
            self._verdict.set_result(failure)

    async def aclose(self) -> None:
        """Answer the browser that waits, and let go of the port."""
        self.conclude(LoginFailed("the login was broken off"))
        if self._runner is not None:
            await self._runner.cleanup()

    def _decide(self, outcome: Secret | LoginFailed) -> None:
        if not self._code.done():
            self._code.set_result(outcome)

    def _take(self, query: dict[str, str]) -> str:
        """Take what the issuer sent along with the browser; returns what is wrong with it."""
        state = query.get("state", "")
        if not secrets.compare_digest(state.encode("utf-8", "replace"), self.state.encode()):
            return "state mismatch: that is the answer to another login"
        if "error" in query:
            self._decide(LoginFailed(login_words(query["error"], query.get("error_description", ""))))
            return ""
        code = word_of(query.get("code"))
        if code is None:
            return "there is no code in it"
        self._decide(Secret(code))
        return ""

    async def _on_callback(self, request: web.Request) -> web.Response:
        complaint = self._take(dict(request.query))
        if complaint:
            # The login goes on: whoever this was cannot end it.
            return _page(400, "Not logged in", _sentence(complaint))
        failure = await self._verdict
        if failure is not None:
            return _page(400, "Not logged in", _sentence(failure.message))
        return _page(200, "Logged in", "The account is in the pool. You can close this page.")

    async def _on_cancel(self, request: web.Request) -> web.Response:
        # Browsers say where a request comes from, programs do not: a page cannot end a login.
        if "sec-fetch-site" in request.headers or "origin" in request.headers:
            return _page(403, "Not cancelled", "A web page may not end a login.")
        self._decide(LoginFailed("another login on this machine took the place of this one"))
        return web.Response(text="Login cancelled", headers={"Connection": "close"})


async def _cancel(port: int) -> bool:
    """Ask a login that listens on *port* to give up; True when it will."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0), trust_env=False) as session,
            session.get(f"http://{_HOST}:{port}/cancel", allow_redirects=False) as answer,
        ):
            return 200 <= answer.status < 300
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title} - codex-proxy</title>
<style>body {{ font: 18px/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 34em; padding: 0 1em }}</style>
<h1>{title}</h1>
<p>{text}</p>
</html>
"""


def _page(status: int, title: str, text: str) -> web.Response:
    response = web.Response(
        status=status,
        text=_PAGE.format(title=html.escape(title), text=html.escape(text)),
        content_type="text/html",
        headers={
            "Cache-Control": "no-store",
            # The code in the address is used up, and still nobody else's business.
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        },
    )
    response.force_close()
    return response


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"
