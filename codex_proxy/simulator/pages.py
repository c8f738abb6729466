"""What an account can ask about itself: models, usage, workspaces."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.exchange import Exchange, silence
from codex_proxy.simulator.faults import Reply, unauthorized
from codex_proxy.simulator.gate import authenticate, meet
from codex_proxy.simulator.quota import usage_page

if TYPE_CHECKING:
    from codex_proxy.simulator.server import Simulator


class Pages:
    """Answer what costs no quota."""

    def __init__(self, sim: "Simulator") -> None:
        self._sim = sim

    async def _about(self, exchange: Exchange, answer: Callable[[SimAccount], Reply]) -> Reply | None:
        account = authenticate(self._sim, exchange)
        if isinstance(account, Reply):
            return account
        met = await meet(self._sim, exchange, account, "", is_turn=False)
        if isinstance(met, Reply):
            return met
        if met is not None and met.state == "stall":
            await silence(met.options.get("seconds"))
        elif met is not None and met.state == "cut":
            exchange.abort()
            return None
        return answer(account)

    async def models(self, exchange: Exchange) -> Reply | None:
        """List the models of the account."""

        def answer(account: SimAccount) -> Reply:
            headers = {"etag": account.etag()}
            if exchange.request.headers.get("if-none-match") == account.etag():
                return Reply(304, content_type=None, headers=headers)
            return Reply.json({"models": account.model_list()}, headers=headers)

        return await self._about(exchange, answer)

    async def usage(self, exchange: Exchange) -> Reply | None:
        """Tell how much is used."""

        def answer(account: SimAccount) -> Reply:
            fault = account.current_fault()
            status = int(fault.options.get("usage", 200)) if fault is not None else 200
            if status == 401:
                return unauthorized("token_invalidated")
            if status != 200:
                return Reply.json({"detail": "Forbidden" if status == 403 else "Error"}, status)
            return Reply.json(usage_page(account))

        return await self._about(exchange, answer)

    async def accounts_check(self, exchange: Exchange) -> Reply | None:
        """Tell which workspace the login is for."""

        def answer(account: SimAccount) -> Reply:
            entry = {
                "id": account.account_id,
                "structure": "personal",
                "plan_type": account.plan,
                "name": None,
                "profile_picture_url": None,
                "account_user_role": "account-owner",
                "can_access_with_session": True,
                "workspace_backend_origin": self._sim.workspace_origin,
                "account_routing_override": "NO_CONSTRAINT",
            }
            ids = [account.account_id]
            value = {"accounts": [entry], "account_ordering": ids, "default_account_id": account.account_id}
            return Reply.json(value)

        return await self._about(exchange, answer)
