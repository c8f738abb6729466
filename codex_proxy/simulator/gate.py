"""What stands before every answer: whose token it is, and what the account is up to."""

import asyncio
from typing import TYPE_CHECKING

from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.exchange import Exchange
from codex_proxy.simulator.faults import STREAM_STATES, Fault, Reply, refusal, unauthorized

if TYPE_CHECKING:
    from codex_proxy.simulator.server import Simulator


def authenticate(sim: "Simulator", exchange: Exchange) -> SimAccount | Reply:
    """Return the account that the request speaks for, or its 401."""
    headers = exchange.request.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        return unauthorized("")
    account, code = sim.issuer_state.account_of(token)
    exchange.account = account
    exchange.received.account = account.name if account is not None else None
    if account is None or code:
        fault = account.current_fault() if account is not None else None
        told = fault.options.get("code") if fault is not None and fault.state == "unauthorized" else None
        return unauthorized(str(told or code))
    if headers.get("chatgpt-account-id") != account.account_id:
        return unauthorized("")
    if account.fedramp and headers.get("x-openai-fedramp", "").lower() != "true":
        return Reply.json({"detail": "Workspace is not authorized in this region."}, 401)
    return account


async def meet(
    sim: "Simulator", exchange: Exchange, account: SimAccount, slug: str, *, is_turn: bool
) -> Reply | Fault | None:
    """Return the refusal or the stream fault that this request meets."""
    if sim.latency:
        await asyncio.sleep(sim.latency)
    script = exchange.script
    if script is not None and script.fault is not None:
        state, options = script.fault
        until = sim.now() + float(options.get("resets_in", 3600))
        fault: Fault | None = Fault(state, options, None, until if state == "usage_limit" else None)
        if fault is not None and state == "ok":
            fault = None
    else:
        fault = account.take_fault(slug, is_turn=is_turn)
    if fault is None:
        return None
    if fault.state == "refuse":
        exchange.abort()
        return Reply(0)
    if fault.state == "slow":
        await asyncio.sleep(float(fault.options.get("delay", 1.0)))
        return fault
    if fault.state == "context_length" and fault.options.get("how") == "http":
        return refusal(fault, account, slug)
    if fault.state in STREAM_STATES:
        return fault
    return refusal(fault, account, slug)
