"""What the simulated backend does when it misbehaves, over real sockets."""

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from codex_proxy.simulator import Script, Simulator
from codex_proxy.simulator.faults import STATES

if TYPE_CHECKING:
    from tests.simulator.conftest import Caller

REFUSALS: list[tuple[str, dict[str, Any], int, Any]] = [
    ("rate_limit", {}, 429, ("error", "type", "rate_limit_exceeded")),
    ("overloaded", {}, 503, ("error", "code", "server_is_overloaded")),
    ("payment", {}, 402, ("detail", "code", "deactivated_workspace")),
    ("not_included", {}, 429, ("error", "type", "usage_not_included")),
    ("insufficient_quota", {}, 429, ("error", "code", "insufficient_quota")),
    ("forbidden", {"detail": "no"}, 403, ("detail", None, "no")),
    ("server_error", {}, 500, ("error", "code", "server_error")),
    ("server_error", {"status": 529}, 529, ("error", "code", "server_error")),
    ("server_error", {"status": 500, "body": {"x": 1}}, 500, ("x", None, 1)),
    ("not_found", {}, 404, ("detail", None, "Not Found")),
    ("bad_request", {"body": {"detail": "odd"}}, 400, ("detail", None, "odd")),
    ("context_length", {"how": "http"}, 400, ("error", "code", "context_length_exceeded")),
    ("unauthorized", {}, 401, ("error", "code", "token_invalidated")),
    ("unauthorized", {"code": "token_revoked"}, 401, ("error", "code", "token_revoked")),
    ("revoked", {}, 401, ("error", "code", "token_invalidated")),
]


@pytest.mark.parametrize(("state", "options", "status", "found"), REFUSALS)
async def test_a_state_refuses_until_it_is_changed(
    caller: "Caller", state: str, options: dict[str, Any], status: int, found: tuple[str, str | None, Any]
) -> None:
    account = caller.sim.account("a1")
    account.set(state, **options)
    for _ in range(2):
        answer = await caller.turn()
        outer, inner, value = found
        assert answer.status == status
        assert (answer.json[outer] if inner is None else answer.json[outer][inner]) == value
    assert (await caller.turn(account="a2")).status == 200
    account.set("ok")
    assert (await caller.turn()).status == 200


async def test_times_counts_requests(caller: "Caller") -> None:
    caller.sim.account("a1").set("server_error", times=2, status=502)
    assert [(await caller.turn()).status for _ in range(3)] == [502, 502, 200]
    assert caller.sim.account("a1").state == "ok"


async def test_a_usage_limit_names_its_reset_and_ends_with_it(caller: "Caller") -> None:
    sim, account = caller.sim, caller.sim.account("a1")
    account.set("usage_limit", resets_in=90)
    answer = await caller.turn()
    error = answer.json["error"]
    assert (answer.status, error["type"], error["plan_type"]) == (429, "usage_limit_reached", "plus")
    assert 88 <= error["resets_in_seconds"] <= 90
    assert answer.headers["x-codex-active-limit"] == "codex"
    assert answer.headers["x-codex-primary-used-percent"] == "100"
    assert answer.headers["x-codex-primary-reset-at"] == str(error["resets_at"])
    page = (await caller.ask("GET", "/backend-api/wham/usage")).json
    assert page["rate_limit"]["limit_reached"] is True
    assert page["rate_limit"]["primary_window"]["reset_at"] == error["resets_at"]
    sim.advance(91)
    assert (await caller.turn()).status == 200


async def test_a_family_limit_hits_only_its_models(caller: "Caller") -> None:
    caller.sim.account("a1").set("usage_limit", family="codex_bengalfox", resets_in=60)
    assert (await caller.turn()).status == 200
    answer = await caller.turn(model="gpt-5.3-codex-spark")
    assert answer.status == 429
    assert answer.headers["x-codex-active-limit"] == "codex_bengalfox"
    assert answer.headers["x-codex-bengalfox-primary-used-percent"] == "100"
    assert answer.headers["x-codex-primary-used-percent"] == "0"


async def test_a_limit_may_hide_its_reset(caller: "Caller") -> None:
    caller.sim.account("a1").set("usage_limit", headers=False, body_reset=False)
    answer = await caller.turn()
    assert "resets_at" not in answer.json["error"]
    # Plain numbers still come along, as on every answer, but none that speaks of the limit.
    assert answer.headers["x-codex-primary-used-percent"] == "0"


async def test_retry_after_is_sent_when_asked_for(caller: "Caller") -> None:
    caller.sim.account("a1").set("rate_limit", retry_after=7)
    assert (await caller.turn()).headers["retry-after"] == "7"
    caller.sim.account("a1").set("rate_limit")
    assert "retry-after" not in (await caller.turn()).headers


async def test_cloudflare_is_a_page(caller: "Caller") -> None:
    caller.sim.account("a1").set("cloudflare")
    answer = await caller.turn()
    assert answer.status == 403
    assert answer.headers["content-type"].startswith("text/html")
    assert b"Just a moment..." in answer.body


@pytest.mark.parametrize("how", ["failed", "error"])
async def test_overload_may_come_inside_the_stream(caller: "Caller", how: str) -> None:
    caller.sim.account("a1").set("overloaded_in_stream", how=how)
    answer = await caller.turn()
    assert answer.status == 200
    last = "error" if how == "error" else "response.failed"
    assert answer.kinds == ["response.created", "response.in_progress", last]
    error = answer.last["error"] if how == "error" else answer.last["response"]["error"]
    assert error["code"] == "server_is_overloaded"
    assert answer.last["sequence_number"] == 2


@pytest.mark.parametrize("after", [0, 1, 4])
async def test_a_failure_comes_after_as_many_good_events(caller: "Caller", after: int) -> None:
    caller.sim.account("a1").set("failed", code="usage_limit_reached", message="m", after=after)
    answer = await caller.turn()
    assert len(answer.kinds) == 2 + after + 1
    assert answer.last["response"]["error"] == {"code": "usage_limit_reached", "message": "m"}
    assert answer.last["response"]["usage"] is None


async def test_a_long_context_fails_in_the_stream(caller: "Caller") -> None:
    caller.sim.account("a1").set("context_length")
    assert (await caller.turn()).last["response"]["error"]["code"] == "context_length_exceeded"


async def test_incomplete_ends_the_stream(caller: "Caller") -> None:
    caller.sim.account("a1").set("incomplete", reason="content_filter", after=3)
    answer = await caller.turn()
    assert (len(answer.kinds), answer.last["type"]) == (6, "response.incomplete")


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_breaks_the_connection(caller: "Caller", after: int, reset: bool) -> None:
    caller.sim.account("a1").set("cut", after=after, reset=reset)
    answer = await caller.turn()
    assert answer.status == 200
    assert answer.broken
    if not reset:
        assert len(answer.kinds) == after
    received = caller.sim.turns[0]
    await received.closed.wait()
    assert (received.finished, received.cancelled) == (False, False)


async def test_a_clean_cut_ends_as_http_has_it_without_a_terminal_event(caller: "Caller") -> None:
    caller.sim.account("a1").set("cut", after=5, clean=True)
    answer = await caller.turn()
    assert not answer.broken
    assert len(answer.kinds) == 5


async def test_a_cut_never_sends_the_end(caller: "Caller") -> None:
    caller.sim.account("a1").set("cut", after=10_000)
    assert "response.completed" not in (await caller.turn()).kinds


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"where": "headers"}, None), ({"where": "created"}, 2), ({"where": "middle"}, 5), ({"after": 3}, 3)],
)
async def test_a_stall_says_nothing_until_the_peer_leaves(
    caller: "Caller", options: dict[str, Any], seen: int | None
) -> None:
    caller.sim.account("a1").set("stall", **options)
    url = f"{caller.sim.base_url}/responses"
    body = {"model": "gpt-5.5", "stream": True, "store": False, "input": [{"role": "user", "content": "hi"}]}
    got: bytes | None = None

    async def read() -> None:
        nonlocal got
        async with caller.session.post(url, json=body, headers=caller.headers()) as response:
            got = b""
            async for chunk in response.content.iter_any():
                got += chunk

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(), 0.05)
    own = [line for line in (got or b"").split(b"\n") if line.startswith(b"event: response.")]
    assert (None if got is None else len([line for line in own if b"metadata" not in line])) == seen
    received = caller.sim.turns[0]
    await asyncio.wait_for(received.closed.wait(), 1)
    assert received.cancelled
    assert not received.finished


async def test_a_stall_may_end(caller: "Caller") -> None:
    caller.sim.account("a1").set("stall", where="middle", seconds=0.01)
    answer = await caller.turn()
    assert answer.last["type"] == "response.completed"
    assert not caller.sim.turns[0].cancelled


async def test_slow_is_late_but_whole(caller: "Caller") -> None:
    caller.sim.account("a1").set("slow", delay=0.01, per_event=0.001)
    started = asyncio.get_running_loop().time()
    assert (await caller.turn()).last["type"] == "response.completed"
    assert asyncio.get_running_loop().time() - started >= 0.01


async def test_refuse_closes_without_a_byte(caller: "Caller") -> None:
    caller.sim.account("a1").set("refuse")
    with pytest.raises(aiohttp.ClientConnectionError):
        await caller.turn()
    assert caller.sim.turns[0].status is None


async def test_a_peer_that_leaves_is_noticed(caller: "Caller") -> None:
    caller.sim.script(Script.long_text(10_000, delay=0.001))
    async with caller.session.post(
        f"{caller.sim.base_url}/responses",
        json={"model": "gpt-5.5", "stream": True, "store": False, "input": []},
        headers=caller.headers(),
    ) as response:
        await response.content.readany()
    received = caller.sim.turns[0]
    await asyncio.wait_for(received.closed.wait(), 1)
    assert received.cancelled


async def test_a_turn_that_goes_wrong_leaves_its_script(caller: "Caller") -> None:
    caller.sim.account("a1").set("overloaded", times=1)
    caller.sim.script("kept")
    assert (await caller.turn()).status == 503
    assert (await caller.turn(account="a2")).text == "kept"


async def test_a_scripted_state_is_for_one_turn(caller: "Caller") -> None:
    caller.sim.account("a1").script(Script.state("server_error", status=504), Script.text("fine"))
    assert (await caller.turn()).status == 504
    assert (await caller.turn()).text == "fine"


async def test_states_spare_what_costs_nothing_unless_told(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    for everywhere, status in ((False, 200), (True, 500)):
        account.set("server_error", everywhere=everywhere)
        for path in ("/backend-api/codex/models", "/backend-api/wham/usage"):
            assert (await caller.ask("GET", path)).status == status


async def test_usage_can_be_refused_alone(caller: "Caller") -> None:
    caller.sim.account("a1").set("ok", usage=403)
    assert (await caller.ask("GET", "/backend-api/wham/usage")).status == 403
    assert (await caller.turn()).status == 200


@pytest.mark.parametrize(
    "state", sorted(set(STATES) - {"ok", "slow", "incomplete", "refuse", "stall", "bad_model", "cut"})
)
async def test_compact_meets_the_states_too(caller: "Caller", state: str) -> None:
    caller.sim.account("a1").set(state)
    answer = await caller.post("/backend-api/codex/responses/compact", {"model": "gpt-5.5", "input": []})
    assert answer.status >= 400


async def test_windows_move_with_use_and_reset_with_time() -> None:
    async with Simulator(accounts=1, quota_tokens=1000) as sim, aiohttp.ClientSession() as session:
        account = sim.account("a1")
        headers = {
            "authorization": f"Bearer {account.tokens.access}",
            "chatgpt-account-id": account.account_id,
        }
        body = {
            "model": "gpt-5.5",
            "stream": True,
            "store": False,
            "input": [{"role": "user", "content": "x" * 800}],
        }

        async def turn() -> tuple[int, str]:
            async with session.post(f"{sim.base_url}/responses", json=body, headers=headers) as response:
                await response.read()
                return response.status, response.headers["x-codex-primary-used-percent"]

        assert await turn() == (200, "0")
        status, used = await turn()
        assert status == 200
        assert 20 <= int(used) <= 60
        while status == 200:
            status, used = await turn()
        assert (status, used) == (429, "100")
        assert 0 < account.used_percent["secondary"] < account.used_percent["primary"]
        sim.advance(300 * 60)
        assert await turn() == (200, "0")


async def test_the_week_can_be_what_is_used_up(caller: "Caller") -> None:
    account = caller.sim.account("a1")
    account.use(primary=5, secondary=100)
    answer = await caller.turn()
    assert answer.status == 429
    assert answer.headers["x-codex-secondary-used-percent"] == "100"
    assert answer.json["error"]["resets_at"] == round(account.secondary.reset_at)


def test_a_wrong_state_says_what_there_is() -> None:
    account = Simulator(accounts=1).account("a1")
    with pytest.raises(ValueError, match="there are ok, usage_limit"):
        account.set("tired")
    with pytest.raises(ValueError, match="no option colour"):
        account.set("cut", colour="red")
    with pytest.raises(ValueError, match="unknown refresh"):
        account.set("ok", refresh="never")
    with pytest.raises(ValueError, match="unknown state"):
        Script.state("tired")


async def test_closing_cuts_what_is_open() -> None:
    sim = Simulator(accounts=1)
    await sim.start()
    account = sim.account("a1")
    account.set("stall", where="created")
    headers = {"authorization": f"Bearer {account.tokens.access}", "chatgpt-account-id": account.account_id}
    body = {"model": "gpt-5.5", "stream": True, "store": False, "input": []}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{sim.base_url}/responses", json=body, headers=headers) as response,
    ):
        await response.content.readany()
        await asyncio.wait_for(sim.aclose(), 2)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert not sim.turns[0].cancelled
