"""The issuer's side of HTTP: token exchanges, browser and device logins."""

import asyncio
from typing import TYPE_CHECKING

from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.exchange import Exchange, silence
from codex_proxy.simulator.faults import Fault, Reply, refusal
from codex_proxy.simulator.issuer import Refused, Tokens, permanent

if TYPE_CHECKING:
    from codex_proxy.simulator.server import Simulator


class Logins:
    """Answer for the issuer; the decisions are made by `issuer.Issuer`."""

    def __init__(self, sim: "Simulator") -> None:
        self._sim = sim
        self._issuer = sim.issuer_state

    async def token(self, exchange: Exchange) -> Reply | None:
        """Exchange a refresh token or an authorization code."""
        form = exchange.form()
        try:
            if form.get("grant_type") == "authorization_code":
                return _token_reply(self._issuer.exchange_code(form))
            if form.get("grant_type") != "refresh_token":
                raise Refused(400, {"error": "unsupported_grant_type", "error_description": "Not supported."})
            return await self._refresh(exchange, form)
        except Refused as refused:
            return Reply.json(refused.body, refused.status)

    async def _refresh(self, exchange: Exchange, form: dict[str, str]) -> Reply | None:
        refresh, client_id = form.get("refresh_token"), form.get("client_id")
        owner = self._issuer.owner_of_refresh(refresh or "")
        exchange.received.account = owner.name if owner is not None else None
        mode = owner.refresh_mode if owner is not None else "ok"
        if self._sim.latency:
            await asyncio.sleep(self._sim.latency)
        match mode:
            case "reused" | "invalidated" | "expired":
                raise Refused(401, permanent(mode))
            case "invalid_grant":
                raise Refused(400, {"error": "invalid_grant", "error_description": "The grant is invalid."})
            case "hang":
                await silence(None)
            case "cut":
                exchange.abort()
                return None
            case "hang_committed" | "cut_committed":
                self._issuer.exchange(refresh, client_id)
                if mode == "hang_committed":
                    await silence(None)
                exchange.abort()
                return None
            case "bad_json":
                return Reply(200, b"<html>not what you asked for</html>", "text/html")
            case "cloudflare":
                assert owner is not None
                return refusal(Fault("cloudflare"), owner, "")
            case "no_refresh_token":
                tokens = self._issuer.exchange(refresh, client_id, rotate=False)
                return Reply.json({"access_token": tokens.access, "token_type": "Bearer"})
            case "slow":
                assert owner is not None
                await asyncio.sleep(owner.refresh_seconds)
            case "ok":
                pass
            case _:
                body = {
                    "error": {"message": "The issuer has a bad day.", "type": "server_error", "code": None}
                }
                raise Refused(int(mode), body)
        return _token_reply(self._issuer.exchange(refresh, client_id))

    async def authorize(self, exchange: Exchange) -> Reply | None:
        """Approve a browser login at once and send the browser back."""
        query = dict(exchange.request.query)
        account = self.who(query.get("account") or query.get("login_hint"))
        if account is None:
            return Reply.json(
                {"error": "access_denied", "error_description": "There is no such account."}, 400
            )
        try:
            return Reply(302, content_type=None, headers={"location": self._issuer.authorize(account, query)})
        except Refused as refused:
            return Reply.json(refused.body, refused.status)

    async def revoke(self, exchange: Exchange) -> Reply | None:
        """Revoke a login."""
        form = exchange.form()
        owner = self._issuer.owner_of_refresh(form.get("token", ""))
        exchange.received.account = owner.name if owner is not None else None
        try:
            self._issuer.revoke_token(form.get("token", ""), form.get("client_id", ""))
        except Refused as refused:
            return Reply.json(refused.body, refused.status)
        return Reply.json({})

    async def device_start(self, exchange: Exchange) -> Reply | None:
        """Begin a device login."""
        try:
            return Reply.json(self._issuer.start_device())
        except Refused as refused:
            return Reply.json(refused.body, refused.status)

    async def device_poll(self, exchange: Exchange) -> Reply | None:
        """Say whether a device login was approved."""
        form = exchange.form()
        try:
            return Reply.json(
                self._issuer.poll_device(
                    form.get("device_auth_id", ""), form.get("user_code", ""), self.who(None)
                )
            )
        except Refused as refused:
            return Reply.json(refused.body, refused.status)

    async def device_page(self, exchange: Exchange) -> Reply | None:
        """Approve a device login: the page that a person opens, with the code in its address."""
        query = exchange.request.query
        code = query.get("user_code")
        if code is None:
            return Reply(200, b"Approve with ?user_code=CODE[&account=NAME]\n", "text/plain")
        account = self.who(query.get("account"))
        if account is None or not self._issuer.approve_device(code, account):
            return Reply(404, b"There is no such code or account.\n", "text/plain")
        return Reply(200, b"Approved; the device may go on.\n", "text/plain")

    def who(self, name: str | None) -> SimAccount | None:
        """Return the account called *name*; without one, the account that logs in next."""
        wanted = name or self._sim.login_as
        for account in self._sim.accounts:
            if wanted is None or wanted in {account.name, account.email}:
                return account
        return None


def _token_reply(tokens: Tokens) -> Reply:
    value = {
        "access_token": tokens.access,
        "refresh_token": tokens.refresh,
        "id_token": tokens.id_token,
        "token_type": "Bearer",
        "expires_in": int(tokens.expires_at - tokens.issued_at),
        "scope": "openid profile email offline_access",
    }
    return Reply.json(value)
