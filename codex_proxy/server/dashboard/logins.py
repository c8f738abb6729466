"""Logins that are begun on the page: a code is shown there, a person types it elsewhere, the account appears."""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from codex_proxy.accounts import store
from codex_proxy.accounts.login import LIMIT_SECONDS, account_file, device_login
from codex_proxy.accounts.oauth import Device, Issuer
from codex_proxy.accounts.tokens import NewTokens
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.net import Outbound
from codex_proxy.tasks import Background

logger = logging.getLogger(__name__)

MAX_LOGINS = 8
"""How many may wait at a time: each asks the issuer every few seconds."""


@dataclass(slots=True)
class Login:
    """One login under way, or over."""

    id: str
    invited: asyncio.Event = field(default_factory=asyncio.Event)
    device: Device | None = None
    expires_at: float = 0.0
    """Wall clock."""
    state: Literal["waiting", "done", "failed"] = "waiting"
    message: str = ""
    alias: str | None = None
    has_tokens: bool = False
    """They are here, and on their way into a file."""
    task: "asyncio.Task[None] | None" = None


class Logins:
    """Keeps the logins of the page.

    Args:
        follow_files: Has the folder of accounts looked at, once a new one is there.
    """

    def __init__(
        self,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        outbound: Outbound,
        follow_files: Callable[[], Awaitable[None]],
    ) -> None:
        self._live = live
        self._clock = clock
        self._background = background
        self._outbound = outbound
        self._follow_files = follow_files
        self._logins: OrderedDict[str, Login] = OrderedDict()

    async def begin(self) -> Login:
        """Ask the issuer for a code, and wait for it to be typed in the background.

        Raises:
            RequestError: 502 if the issuer gives none, 429 if too many logins wait already.
        """
        waiting = [login for login in self._logins.values() if login.state == "waiting"]
        if len(waiting) >= MAX_LOGINS:
            raise RequestError("too many logins wait already; cancel one", status=429, code="too_many_logins")
        login = Login(secrets.token_urlsafe(16))
        self._logins[login.id] = login
        over = [one for one in self._logins.values() if one.state != "waiting"]
        for one in over[: max(0, len(self._logins) - 4 * MAX_LOGINS)]:
            del self._logins[one.id]
        login.task = self._background.spawn(self._run(login), name="page-login")
        # Also when it is cancelled before it has begun.
        login.task.add_done_callback(lambda _: login.invited.set())
        try:
            await login.invited.wait()
        except asyncio.CancelledError:
            # Whoever asked has left, and nobody will ever see the code.
            self.cancel(login.id)
            raise
        if login.device is None:
            raise RequestError(login.message or "the login was broken off", status=502, code="login_failed")
        return login

    def find(self, login_id: str) -> Login:
        """Return a login.

        Raises:
            RequestError: 404 if it is not known, or forgotten.
        """
        login = self._logins.get(login_id)
        if login is None:
            raise RequestError("there is no such login", status=404, code="unknown_login")
        return login

    def cancel(self, login_id: str) -> None:
        """Break a login off; one whose tokens are on their way is not, so that they are not lost."""
        login = self.find(login_id)
        if login.task is not None and login.state == "waiting" and not login.has_tokens:
            login.task.cancel()
            login.state, login.message = "failed", "cancelled"

    async def _run(self, login: Login) -> None:
        settings = self._live.current
        issuer = Issuer(
            self._outbound.fetch, settings.oauth_issuer, settings.originator, settings.user_agent, None
        )

        def invite(device: Device) -> None:
            login.device = device
            login.expires_at = self._clock.now() + LIMIT_SECONDS
            login.invited.set()

        async def keep(tokens: NewTokens) -> store.Added:
            raw = account_file(tokens, now=self._clock.now())
            added = await asyncio.to_thread(store.add, settings.auth_dir, raw, is_new=True)
            await self._follow_files()
            return added

        try:
            tokens = await device_login(issuer, lambda got: got, invite=invite, sleep=self._clock.sleep)
            # They exist only once: whoever gives up now does not lose them.
            login.has_tokens = True
            kept = self._background.spawn(keep(tokens), name="page-login-keep", critical=True)
            added = await asyncio.shield(kept)
        except ProxyError as exc:
            login.state, login.message = "failed", exc.message
        except Exception:
            logger.exception("login of the page broke")
            login.state, login.message = "failed", "the proxy failed on this; its log says why"
        else:
            credential = added.credential
            login.alias = credential.alias or credential.default_alias
            login.state = "done"
            login.message = "its new login is in" if added.outcome == "updated" else "its login is in"
            logger.info("login done alias=%s outcome=%s", login.alias, added.outcome)
