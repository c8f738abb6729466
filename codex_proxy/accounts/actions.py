"""What an owner does to one account: switch it off and on, take it away, log it out, look after it now.

The same for a running daemon and for a command without one: whoever asks gives the pool and
the keeper, the daemon's own or some made for the moment. Every change is in the account's file
before it counts, so that it outlives the process.
"""

import asyncio
import contextlib
import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from codex_proxy.accounts import files, oauth, pending, store
from codex_proxy.accounts.account import Account
from codex_proxy.accounts.credential import Credential
from codex_proxy.accounts.pool import Pool
from codex_proxy.accounts.tokens import NO_SECRET, mask_name
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.accounts.words import words
from codex_proxy.clock import Clock
from codex_proxy.config import Live
from codex_proxy.errors import RequestError
from codex_proxy.net import NetError, Outbound

logger = logging.getLogger(__name__)

Action = Literal["disable", "enable", "remove", "logout", "refresh", "reset", "check"]
ACTIONS: tuple[Action, ...] = get_args(Action)

REMOVED_FOLDER = "removed"
"""In data-dir: where account files go that are taken out of service."""

_TOKEN_KEYS = ("access_token", "refresh_token", "id_token", "rk")
# Another process that exchanges the token needs at most that long.
_LOCK_SECONDS = 35.0
_LOCK_PAUSE_SECONDS = 0.25


@dataclass(slots=True, frozen=True)
class Done:
    """What became of an action."""

    alias: str
    success: bool
    message: str


class Actions:
    """Do what the owner asks."""

    def __init__(self, pool: Pool, keeper: Keeper, *, live: Live, clock: Clock, outbound: Outbound) -> None:
        self._pool = pool
        self._keeper = keeper
        self._live = live
        self._clock = clock
        self._outbound = outbound

    def find(self, alias: str) -> Account:
        """Return the account called *alias*.

        Raises:
            RequestError: If there is none; it names those that are called alike.
        """
        account = self._pool.by_alias(alias)
        if account is None:
            raise unknown_account(alias, [one.alias for one in self._pool])
        return account

    async def act(self, alias: str, action: Action) -> Done:
        """Do *action* to the account called *alias*.

        Raises:
            RequestError: If there is no such account.
        """
        account = self.find(alias)
        try:
            done = await self._do(account, action)
        except (store.Unusable, store.NotSaved) as exc:
            done = Done(alias, False, exc.message)
        logger.info("account action alias=%s action=%s success=%s", alias, action, done.success)
        return done

    async def _do(self, account: Account, action: Action) -> Done:
        match action:
            case "disable" | "enable":
                return await self._switch(account, is_on=action == "enable")
            case "remove":
                return await self._remove(account)
            case "logout":
                return await self._logout(account)
            case "refresh":
                return await self._refresh(account)
            case "reset":
                self._pool.reset(account)
                return Done(
                    account.alias, True, "its cooldowns are over, and what was learned of it is forgotten"
                )
            case "check":
                return await self._check(account)

    async def _switch(self, account: Account, *, is_on: bool) -> Done:
        def change(raw: dict[str, Any]) -> dict[str, Any]:
            if is_on:
                raw.pop("disabled", None)
            elif raw.get("disabled") is not True:
                raw["disabled"] = True
            return raw

        was_on = not account.credential.disabled
        credential = await asyncio.to_thread(store.edit, account.credential.path, change)
        if credential.key == account.key:
            self._pool.adopt(account, credential)
        if was_on is is_on:
            return Done(account.alias, True, f"it was {'on' if is_on else 'disabled'} already")
        if is_on:
            return Done(account.alias, True, "it takes requests again")
        running = f"; {account.in_flight} running end by themselves" if account.in_flight else ""
        return Done(account.alias, True, f"it takes no new requests{running}")

    async def _remove(self, account: Account) -> Done:
        await self._exchanged(account)
        path = await asyncio.to_thread(store.take_out, account.credential, self._removed_folder)
        await self._keeper.load()
        return Done(
            account.alias,
            True,
            f"its file is now in {path.parent} as {mask_name(path.name)};"
            f" move it back into {self._live.current.auth_dir} to have it again{self._other_file(account)}",
        )

    async def _logout(self, account: Account) -> Done:
        await self._exchanged(account)
        deadline = self._clock.monotonic() + _LOCK_SECONDS
        while True:
            # Held to the end, so that nobody exchanges a token that is about to be revoked.
            with store.exchange_lock(account.credential) as is_ours:
                if is_ours:
                    return await self._logout_locked(account)
            if self._clock.monotonic() >= deadline:
                return Done(account.alias, False, "another process is exchanging its token; try again")
            await self._clock.sleep(_LOCK_PAUSE_SECONDS)

    async def _logout_locked(self, account: Account) -> Done:
        # Whoever held the lock before us may have written newer tokens.
        credential = await asyncio.to_thread(store.load, account.credential.path)
        if credential.key != account.key:
            return Done(account.alias, False, "its file holds another account by now; nothing was done")
        try:
            # A login that has ended does not come back, so what may fail here is tried before.
            await asyncio.to_thread(store.check_take_out, credential, self._removed_folder)
        except store.NotSaved as exc:
            return Done(account.alias, False, f"nothing was done: {exc.message}")
        failure = await self._revoke(account, credential)
        if failure:
            return await self._not_revoked(account, credential, failure)
        ended = "the issuer has ended its login"
        await asyncio.to_thread(_forget_tokens, self._live.current.data_dir, [credential, account.credential])
        try:
            path = await asyncio.to_thread(store.take_out, credential, self._removed_folder)
        except store.Vanished:
            await self._keeper.load()
            return Done(account.alias, True, f"{ended}; its file was taken away meanwhile")
        except store.NotSaved as exc:
            # Its tokens are of no more use, whatever the file says.
            self._pool.reject(account)
            self._pool.login_lost(account, "logged out")
            name = mask_name(credential.path.name)
            return Done(
                account.alias,
                False,
                f"{ended}, but {exc.message}: its file is still in {self._live.current.auth_dir} as {name},"
                " with tokens that are good for nobody; take it out by hand",
            )
        await self._keeper.load()
        place = f"in {path.parent} as {mask_name(path.name)}"
        if path.is_symlink():
            return Done(
                account.alias,
                True,
                f"{ended}; its file is a symlink, which is now {place}; what it leads to was left as it is,"
                f" with tokens that are good for nobody{self._other_file(account)}",
            )
        try:
            await asyncio.to_thread(_blank, path)
        except store.Unusable as exc:
            return Done(
                account.alias,
                False,
                f"{ended}; its file is {place}, still with its tokens, which are good for nobody: {exc.message}"
                f"{self._other_file(account)}",
            )
        return Done(
            account.alias,
            True,
            f"{ended}; its file is {place}, without its tokens{self._other_file(account)}",
        )

    async def _not_revoked(self, account: Account, credential: Credential, failure: str) -> Done:
        """Take the account out of the pool all the same; its tokens are kept, to end the login with later."""
        said = f"the issuer did not end its login ({failure}), so whoever has its tokens may still use them"
        auth_dir = self._live.current.auth_dir
        try:
            path = await asyncio.to_thread(store.take_out, credential, self._removed_folder)
        except store.NotSaved as exc:
            return Done(account.alias, False, f"{said}; {exc.message}, and it is still in {auth_dir}")
        kept = "a symlink as before" if path.is_symlink() else "with its tokens, readable by you only"
        if not path.is_symlink():
            with contextlib.suppress(OSError):
                await asyncio.to_thread(path.chmod, 0o600)
        await self._keeper.load()
        return Done(
            account.alias,
            False,
            f"{said}. Its file is in {path.parent} as {mask_name(path.name)}, {kept}: to try again, move it back"
            f" into {auth_dir} and log out once more, or log out of all devices in the account's own"
            f" settings{self._other_file(account)}",
        )

    def _other_file(self, account: Account) -> str:
        """Say so when another file of the same account has taken the place of the one that went."""
        other = self._pool.get(account.key)
        if other is None:
            return ""
        name = mask_name(other.credential.path.name)
        return f". It had a second file, {name}, which is in use now, as {other.alias}"

    async def _revoke(self, account: Account, credential: Credential) -> str:
        """Revoke a login at the issuer; returns why that failed, '' when it did not."""
        settings = self._live.current
        issuer = oauth.Issuer(
            self._outbound.fetch,
            settings.oauth_issuer,
            settings.originator,
            settings.user_agent,
            account.proxy_url,
        )
        try:
            if credential.refresh:
                await issuer.revoke(credential.refresh, "refresh_token")
            else:
                await issuer.revoke(credential.access, "access_token")
        except oauth.RevokeFailed as exc:
            return exc.message
        return ""

    async def _refresh(self, account: Account) -> Done:
        result = await self._keeper.refresh_one(account)
        if result.success:
            return Done(account.alias, True, "it has new tokens")
        if account.login_lost or not account.credential.refresh:
            return Done(
                account.alias,
                False,
                f"its login is lost: {words(result.reason)}; log it in again: codex-proxy accounts relogin {account.alias}",
            )
        return Done(
            account.alias,
            False,
            f"it has no new tokens: {words(result.reason)}; its old ones are kept, and the log says more",
        )

    async def _check(self, account: Account) -> Done:
        try:
            result = await self._keeper.check_usage(account)
        except NetError as exc:
            return Done(account.alias, False, words(exc.kind.value))
        return Done(
            account.alias, result.success, "its quota was read" if result.success else words(result.reason)
        )

    async def _exchanged(self, account: Account) -> None:
        """Wait until no exchange of the account is in flight here: its answer exists only once."""
        if account.refreshing is not None:
            await asyncio.wait({account.refreshing})

    @property
    def _removed_folder(self) -> Path:
        return self._live.current.data_dir / REMOVED_FOLDER


def unknown_account(alias: str, aliases: Iterable[str]) -> RequestError:
    """Return the error for an alias that no account has."""
    known = sorted(aliases)
    folded = {one.casefold(): one for one in known}
    near = [folded[match] for match in difflib.get_close_matches(alias.casefold(), folded, n=3, cutoff=0.5)]
    near += [one for one in known if alias and alias.casefold() in one.casefold() and one not in near]
    if near:
        hint = f"did you mean {' or '.join(near[:3])}?"
    elif known:
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        hint = f"there are {', '.join(known[:5])}{more}"
    else:
        hint = "there are no accounts"
    return RequestError(f"there is no account {alias!r}; {hint}", status=404, code="unknown_account")


def _blank(path: Path) -> None:
    """Empty the tokens in a file that was taken out; they are of no more use, but were secrets."""
    try:
        target = files.resolve(path)
        raw, seen = files.read_json(target)
        if not files.write_atomic(target, files.encode(_without_tokens(raw)), expected=seen):
            raise store.Unusable("it was changed meanwhile")
    except OSError as exc:
        raise store.Unusable(files.why(exc)) from None


def _without_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    blank = {name: "" if name in _TOKEN_KEYS else value for name, value in raw.items()}
    if isinstance(raw.get("tokens"), dict):
        blank["tokens"] = _without_tokens(raw["tokens"])
    return blank


def _forget_tokens(data_dir: Path, credentials: Iterable[Credential]) -> None:
    """Remove what data-dir keeps of an account's tokens."""
    for credential in credentials:
        if credential.refresh != NO_SECRET:
            pending.Pending.load(data_dir).forget(credential)
            pending.clear_exchange(data_dir, credential)
