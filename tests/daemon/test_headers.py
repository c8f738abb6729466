"""What passes up and down beside the body, and what never does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from codex_proxy import __version__
from codex_proxy.accounts.state import State
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator import Script, Simulator
from codex_proxy.simulator.checks import unseal
from codex_proxy.simulator.issuer import AUTH_CLAIM, encode_jwt
from tests.daemon.sockets import codex_fields, line
from tests.harness import CODEX_HEADERS, LITE, STANDARD, Answer, standing

TURN_STATE = "x-codex-turn-state"

# What the Codex CLI sends with a turn.
OF_A_CLIENT = {
    **CODEX_HEADERS,
    "version": "0.169.0",
    "session-id": "019a0000-0000-7000-8000-000000000001",
    "thread-id": "019a0000-0000-7000-8000-000000000002",
    "x-client-request-id": "019a0000-0000-7000-8000-000000000002",
    "x-codex-window-id": "019a0000-0000-7000-8000-000000000002:0",
    "x-codex-turn-metadata": '{"turn_id":"1","request_kind":"turn"}',
    "x-codex-beta-features": "remote_compaction_v2",
    "x-codex-parent-thread-id": "019a0000-0000-7000-8000-000000000003",
    "x-openai-subagent": "review",
}

# What names a person, an account or a way; and what belongs to one connection.
NEVER_UP = {
    "Authorization": "Bearer the-callers-own",
    "chatgpt-account-id": "the-callers-account",
    "x-openai-fedramp": "true",
    "x-openai-internal-codex-residency": "us",
    "x-openai-account-routing-override": "us",
    "x-oai-attestation": "attested",
    "x-api-key": "the-callers-key",
    "Cookie": "session=the-callers",
    "X-Forwarded-For": "10.1.2.3",
    "Forwarded": "for=10.1.2.3",
    "X-Real-IP": "10.1.2.3",
    "Proxy-Authorization": "Basic dGhlLWNhbGxlcnM=",
    "x-unknown-secret": "the-callers",
    "OpenAI-Organization": "org-callers",
    "Keep-Alive": "timeout=5",
    "TE": "trailers",
}

NEVER_DOWN = (
    "set-cookie",
    "strict-transport-security",
    "alt-svc",
    "cf-cache-status",
    "x-codex-plan-type",
    "x-codex-credits-balance",
    "x-codex-credits-has-credits",
    "x-codex-bengalfox-primary-used-percent",
    "x-codex-bengalfox-limit-name",
)


# Up ----------------------------------------------------------------------------------------------


async def test_what_a_codex_client_needs_passes_up(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        answer = await stand.ask("hi", headers={**OF_A_CLIENT, **NEVER_UP})
        assert answer.status == 200
        (turn,) = stand.sim.turns
        for name, value in OF_A_CLIENT.items():
            assert turn.headers.getall(name) == [value], name
        assert turn.headers["x-codex-routing-hint"] == f"model={STANDARD}"
        account = stand.sim.account(str(turn.account))
        assert turn.headers.getall("authorization") == [f"Bearer {account.tokens.access}"]
        assert turn.headers.getall("chatgpt-account-id") == [account.account_id]


@pytest.mark.parametrize("codex", [False, True])
async def test_what_is_the_callers_own_stays_here(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        assert (await stand.ask("hi", codex=codex, headers=NEVER_UP)).status == 200
        assert (await stand.post("/v1/alpha/search", {"commands": {}}, headers=NEVER_UP)).status == 200
        for received in stand.sim.requests:
            for name, value in NEVER_UP.items():
                assert value not in received.headers.getall(name, []), name
            assert "the-callers" not in str(received.headers)
            assert "10.1.2.3" not in str(received.headers)


async def test_for_other_callers_the_proxy_speaks_in_its_own_name(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        theirs = {"User-Agent": "OpenAI/Python 3.52", "x-stainless-lang": "python", "session-id": "talk-1"}
        await stand.ask("hi", headers={**theirs, "x-codex-window-id": "w", "x-codex-turn-metadata": "{}"})
        (turn,) = stand.sim.turns
        assert turn.headers["originator"] == "codex_proxy"
        assert turn.headers["user-agent"] == f"codex-proxy/{__version__}"
        # It is what binds a conversation to the backend's cache.
        assert turn.headers["session-id"] == "talk-1"
        for name in ("x-stainless-lang", "x-codex-window-id", "x-codex-turn-metadata"):
            assert name not in turn.headers


async def test_the_proxys_name_can_be_set(tmp_path: Path) -> None:
    async with standing(tmp_path, originator="my_tool", user_agent="my-tool/1.0 (test)") as stand:
        await stand.ask("hi")
        assert stand.sim.turns[-1].headers["originator"] == "my_tool"
        assert stand.sim.turns[-1].headers["user-agent"] == "my-tool/1.0 (test)"
        # A Codex client keeps its own.
        await stand.ask("hi", codex=True)
        assert stand.sim.turns[-1].headers["originator"] == CODEX_HEADERS["originator"]


async def test_the_routing_hint_follows_model_and_tier(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        hint = {"x-codex-routing-hint": "model=something-else"}
        await stand.ask("hi", codex=True, headers=hint, model=f"{STANDARD}-high-fast")
        assert stand.sim.turns[-1].headers["x-codex-routing-hint"] == f"model={STANDARD};tier=priority"
        assert stand.sim.turns[-1].json["model"] == STANDARD


# Whose account it is ------------------------------------------------------------------------------


async def test_a_fedramp_account_says_so_and_no_other(tmp_path: Path) -> None:
    sim = Simulator(accounts=0)
    government, plain = sim.add_account("gov", fedramp=True), sim.add_account("plain")
    async with standing(tmp_path, simulator=sim) as stand:
        for account, header in ((government, "true"), (plain, None)):
            stand.in_order_of(account)
            assert (await stand.ask("hi")).status == 200
            turn = stand.sim.turns[-1]
            assert turn.account == account.name
            assert turn.headers.get("x-openai-fedramp") == header


async def test_an_accounts_residency_goes_with_it(tmp_path: Path) -> None:
    def write(sim: Simulator, folder: Path) -> None:
        (account,) = sim.accounts
        claims = {
            "chatgpt_account_id": account.account_id,
            "chatgpt_user_id": account.user_id,
            "chatgpt_compute_residency": "us",
        }
        value = {**account.flat_file(), "id_token": encode_jwt({AUTH_CLAIM: claims})}
        (folder / "resident.json").write_bytes(dumps(value))

    async with standing(tmp_path, accounts=1, auths=write) as stand:
        assert (await stand.ask("hi")).status == 200
        assert stand.sim.turns[-1].headers["x-openai-internal-codex-residency"] == "us"


async def test_an_account_without_a_residency_names_none(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        await stand.ask("hi", codex=True, headers={"x-openai-internal-codex-residency": "eu"})
        assert "x-openai-internal-codex-residency" not in stand.sim.turns[-1].headers


# Down ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_codex_client_gets_what_it_reads_and_no_more(tmp_path: Path, stream: bool) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        answer = await stand.ask("hi", stream=stream, codex=True)
        headers = answer.headers
        assert headers["openai-model"] == STANDARD
        assert headers["x-codex-active-limit"] == "codex"
        assert {"cf-ray", "x-oai-request-id", TURN_STATE, "x-models-etag"} <= set(headers)
        assert headers["server"] == "codex-proxy"
        for name in NEVER_DOWN:
            assert name not in headers, name


@pytest.mark.parametrize("stream", [True, False])
async def test_other_callers_get_none_of_it(tmp_path: Path, stream: bool) -> None:
    async with standing(tmp_path) as stand:
        answer = await stand.ask("hi", stream=stream)
        for name in (
            *NEVER_DOWN,
            TURN_STATE,
            "openai-model",
            "x-models-etag",
            "cf-ray",
            "x-codex-active-limit",
        ):
            assert name not in answer.headers, name
        assert not [name for name in answer.headers if name.startswith("x-codex-")]
        if stream:
            assert all(kind.startswith("response.") for kind in answer.types)
            assert "response.metadata" not in answer.types


async def test_the_servers_framing_is_ours(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        whole = await stand.ask("hi", stream=False, codex=True)
        assert int(whole.headers["content-length"]) == len(whole.body)
        assert whole.headers["content-type"].startswith("application/json")
        streamed = await stand.ask("hi", codex=True)
        assert "content-length" not in streamed.headers
        assert "content-encoding" not in streamed.headers
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-accel-buffering"] == "no"
        assert streamed.headers["cache-control"] == "no-cache"


async def test_the_answers_id_is_the_callers_when_it_gave_one(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        named = await stand.ask("hi", codex=True, headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        first, second = await stand.ask("hi"), await stand.ask("hi")
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize("asked", [STANDARD, f"{STANDARD}-high", LITE, f"{LITE}-low-fast"])
async def test_the_model_that_comes_back_is_the_one_that_was_asked_for(tmp_path: Path, asked: str) -> None:
    """Another one makes the Codex CLI warn its user of misuse."""
    async with standing(tmp_path) as stand:
        stand.sim.served_model = "gpt-rerouted"
        body: JsonObject = {}
        if asked.startswith(LITE):
            body = {"reasoning": {"context": "all_turns"}, "parallel_tool_calls": False}
        headers = {"x-openai-internal-codex-responses-lite": "true"} if body else {}
        answer = await stand.ask("hi", codex=True, model=asked, headers=headers, **body)
        assert answer.status == 200
        assert answer.headers["openai-model"] == asked
        metadata = [e.json for e in answer.events if e.type == "response.metadata"]
        assert [event["headers"]["openai-model"] for event in metadata] == [asked]
        responses = [e.json["response"] for e in answer.events if "response" in e.json]
        assert {response["model"] for response in responses} == {asked}
        assert b"gpt-rerouted" not in answer.body
        whole = await stand.ask("hi", stream=False, model=STANDARD)
        assert whole.json["model"] == STANDARD


async def test_the_owner_of_the_account_is_not_named(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for codex in (True, False):
            answer = await stand.ask("hi", codex=codex)
            user = stand.sim.account(str(stand.sim.turns[-1].account)).user_id
            assert user.encode() not in answer.body
            for event in answer.events:
                if "response" in event.json:
                    assert event.json["response"]["safety_identifier"] is None


async def test_the_etag_of_the_models_is_that_of_our_list(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        listed = await stand.get("/backend-api/codex/models?client_version=0.169.0")
        answers = [await stand.ask("hi", codex=True) for _ in range(3)]
        assert {answer.headers["x-models-etag"] for answer in answers} == {listed.headers["etag"]}
        assert listed.headers["etag"] not in {account.etag() for account in stand.accounts}
        for answer in answers:
            for event in answer.events:
                if event.type == "response.metadata":
                    assert (
                        event.json["headers"].get("x-models-etag", listed.headers["etag"])
                        == (listed.headers["etag"])
                    )


async def test_the_quota_that_a_codex_client_sees_is_the_pools(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for account, used in zip(stand.accounts, (90, 30, 0), strict=True):
            account.use(primary=used, secondary=used // 3)
            stand.known(account).quota.read_headers(_quota(used), stand.daemon.clock.now())
        answer = await stand.ask("hi", codex=True)
        assert answer.headers["x-codex-primary-used-percent"] == "40"
        assert answer.headers["x-codex-primary-window-minutes"] == "300"
        limits = [event.json for event in answer.events if event.type == "codex.rate_limits"]
        assert limits
        for event in limits:
            assert event["rate_limits"]["primary"]["used_percent"] == 40
            assert event["rate_limits"]["allowed"] is True
            assert event["plan_type"] is None
            assert event["credits"] is None


def _quota(used: int) -> dict[str, str]:
    return {
        "x-codex-primary-used-percent": str(used),
        "x-codex-primary-window-minutes": "300",
        "x-codex-primary-reset-after-seconds": "3600",
        "x-codex-secondary-used-percent": str(used // 3),
        "x-codex-secondary-window-minutes": "10080",
        "x-codex-secondary-reset-after-seconds": "36000",
    }


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("state", ["ok", "usage_limit"])
async def test_hidden_quota_is_in_no_header_and_no_event(tmp_path: Path, stream: bool, state: str) -> None:
    async with standing(tmp_path, pool_limits="hide") as stand:
        stand.sim.set_all(state)
        answer = await stand.ask("hi", stream=stream, codex=True)
        assert answer.status == (200 if state == "ok" else 429)
        shown = {name for name in answer.headers if name.startswith("x-codex-")}
        assert shown <= {TURN_STATE}
        assert b"codex.rate_limits" not in answer.body
        assert b"used_percent" not in answer.body
        if state == "ok":
            # The rest of what a Codex client reads is there.
            assert answer.headers["openai-model"] == STANDARD


async def test_hidden_quota_is_in_no_frame(tmp_path: Path) -> None:
    async with standing(tmp_path, pool_limits="hide") as stand, line(stand, codex=True) as socket:
        for text in ("hi", "again"):
            frames = await socket.ask(text, **codex_fields(STANDARD))
            assert frames[-1]["type"] == "response.completed"
            assert "codex.rate_limits" not in [frame["type"] for frame in frames]
            assert "used-percent" not in str(frames)
            assert "used_percent" not in str(frames)


async def test_quota_is_hidden_and_shown_while_running(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        for hidden in (False, True, False):
            settings = dataclasses.replace(
                stand.daemon.live.current, pool_limits="hide" if hidden else "show"
            )
            stand.daemon.live.replace(settings)
            answer = await stand.ask("hi", codex=True)
            assert ("x-codex-active-limit" in answer.headers) is not hidden
            assert ("codex.rate_limits" in answer.types) is not hidden


async def test_refusals_carry_no_accounts_numbers(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("usage_limit")
        answer = await stand.ask("hi", codex=True)
        assert answer.status == 429
        for name in (*NEVER_DOWN, "x-codex-active-limit", "x-codex-primary-used-percent", "cf-ray"):
            assert name not in answer.headers, name


# The turn state -----------------------------------------------------------------------------------


def _state_of(answer: Answer) -> str:
    state = answer.headers[TURN_STATE]
    told = [
        event.json["headers"][TURN_STATE]
        for event in answer.events
        if event.type == "response.metadata" and TURN_STATE in event.json["headers"]
    ]
    assert told in ([], [state])
    return state


async def test_a_turn_state_comes_back_to_its_account_as_it_was(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        wrapped = _state_of(await stand.ask("hi", codex=True))
        raw = wrapped.partition(".")[2]
        assert unseal(raw) == {"a": first.tag, "k": "turn", "n": 1}
        # Another account has more left by now; the turn stays where it is.
        stand.in_order_of(second)
        answer = await stand.ask("go on", codex=True, headers={TURN_STATE: wrapped})
        assert answer.status == 200
        turn = stand.sim.turns[-1]
        assert turn.account == first.name
        assert turn.headers.getall(TURN_STATE) == [raw]


async def test_a_turn_state_in_the_body_is_treated_alike(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        wrapped = _state_of(await stand.ask("hi", codex=True))
        raw = wrapped.partition(".")[2]
        metadata = {"session_id": "s", TURN_STATE: wrapped}
        how: dict[str, Any] = {"codex": True, "headers": {TURN_STATE: wrapped}, "client_metadata": metadata}
        assert (await stand.ask("go on", **how)).status == 200
        assert stand.sim.turns[-1].account == first.name
        assert stand.sim.turns[-1].json["client_metadata"] == {"session_id": "s", TURN_STATE: raw}

        first.set("usage_limit")
        assert (await stand.ask("go on", **how)).status == 200
        assert [turn.account for turn in stand.sim.turns[-2:]] == [first.name, second.name]
        turn = stand.sim.turns[-1]
        assert TURN_STATE not in turn.headers
        assert turn.json["client_metadata"] == {"session_id": "s"}


async def test_another_account_never_sees_a_turn_state(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        wrapped = _state_of(await stand.ask("hi", codex=True))
        first.set("overloaded")
        answer = await stand.ask("go on", codex=True, headers={TURN_STATE: wrapped})
        assert answer.status == 200
        refused, served = stand.sim.turns[-2:]
        assert (refused.account, served.account) == (first.name, second.name)
        assert TURN_STATE in refused.headers
        assert TURN_STATE not in served.headers
        # The new account's own state is the caller's from now on.
        new = _state_of(answer)
        assert new != wrapped
        stand.known(first).holds.clear()
        first.set("ok")
        assert (await stand.ask("go on", codex=True, headers={TURN_STATE: new})).status == 200
        assert stand.sim.turns[-1].account == second.name


@pytest.mark.parametrize("state", ["", "nonsense", "gAAAAAraw", "000000000000.gAAAAAraw", ".x", "a.b.c"])
async def test_a_turn_state_that_is_not_ours_goes_nowhere(tmp_path: Path, state: str) -> None:
    async with standing(tmp_path) as stand:
        answer = await stand.ask(
            "hi", codex=True, headers={TURN_STATE: state}, client_metadata={TURN_STATE: state}
        )
        assert answer.status == 200
        (turn,) = stand.sim.turns
        assert TURN_STATE not in turn.headers
        assert turn.json["client_metadata"] == {}


async def test_a_compaction_binds_the_turn_as_well(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first = stand.accounts[0]
        message = {"type": "message", "role": "user", "content": "long story"}
        answer = await stand.post(
            "/backend-api/codex/responses/compact",
            {"model": STANDARD, "input": [message]},
            headers=CODEX_HEADERS,
        )
        assert answer.status == 200
        assert "set-cookie" not in answer.headers
        wrapped = answer.headers[TURN_STATE]
        stand.in_order_of(*reversed(stand.accounts))
        history = [*answer.json["output"], message]
        assert (await stand.ask(input=history, codex=True, headers={TURN_STATE: wrapped})).status == 200
        turn = stand.sim.turns[-1]
        assert turn.account == first.name
        assert turn.headers[TURN_STATE] == wrapped.partition(".")[2]
        assert json.loads(turn.body)["input"][1]["type"] == "compaction"


async def test_events_reach_a_codex_client_byte_for_byte(tmp_path: Path) -> None:
    """What needs no change is not rendered again."""
    odd = b'{"type": "response.output_text.delta",  "delta":"\\u00e9\\/","output_index":0,"sequence_number":1, "x":1.0}'
    async with standing(tmp_path, accounts=1) as stand:
        stream = b"event: response.output_text.delta\ndata: " + odd + b"\n\n"
        done = b'data: {"type":"response.completed","response":{"id":"r","output":[{"id":"m"}]}}\n\n'
        stand.sim.script(Script.recorded(stream + done, chunk=7))
        answer = await stand.ask("hi", codex=True)
        assert stream in answer.body


async def test_a_list_of_models_that_is_known_is_not_sent_again(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        etag = (await stand.get("/backend-api/codex/models")).headers["etag"]
        for known, status in (
            (etag, 304),
            (f"W/{etag}", 304),
            (f'"old", {etag}', 304),
            ("*", 304),
            ('"old"', 200),
        ):
            answer = await stand.get("/v1/models?client_version=1", headers={"If-None-Match": known})
            assert (answer.status, bool(answer.body)) == (status, status == 200), known
            assert answer.headers["etag"] == etag


async def test_a_turn_state_that_is_no_header_hurts_no_account(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        given = (await stand.ask("hi", codex=True)).headers[TURN_STATE]
        tag = given.partition(".")[0]
        for state in (f"{tag}.a\r\nx-evil: 1", f"{tag}." + "x" * 20_000):
            stand.sim.clear()
            answer = await stand.ask("hi", codex=True, client_metadata={TURN_STATE: state})
            assert answer.status == 200
            (turn,) = stand.sim.turns
            assert TURN_STATE not in turn.headers
            assert turn.json["client_metadata"] == {}
        assert {account.state for account in stand.daemon.pool.accounts()} == {State.READY}
