"""Every way in which the backend refuses a turn: what the caller sees, and who is tried next."""

from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts.account import BACKOFF, Backoff, Cause
from codex_proxy.accounts.affinity import Origins
from codex_proxy.accounts.state import State
from codex_proxy.protocol.wire import JsonObject
from codex_proxy.simulator import Script
from codex_proxy.simulator.checks import seal
from tests.harness import STANDARD, Answer, Stand, standing

# How fast a silent backend is given up where silence is the subject.
IMPATIENT: dict[str, Any] = {"connect_timeout": 0.3, "first_byte_timeout": 0.3, "idle_timeout": 0.3}

REFUSALS: list[tuple[str, JsonObject, State, Cause | None]] = [
    ("usage_limit", {"resets_in": 3600}, State.COOLING, Cause.LIMIT),
    ("usage_limit", {"resets_in": 3600, "window": "secondary"}, State.COOLING, Cause.LIMIT),
    ("usage_limit", {"headers": False, "body_reset": False}, State.COOLING, Cause.LIMIT),
    ("rate_limit", {}, State.COOLING, Cause.RATE),
    ("rate_limit", {"retry_after": 7}, State.COOLING, Cause.RATE),
    ("overloaded", {}, State.COOLING, Cause.OVERLOAD),
    ("overloaded", {"retry_after": 9}, State.COOLING, Cause.OVERLOAD),
    ("overloaded_in_stream", {"how": "failed"}, State.COOLING, Cause.OVERLOAD),
    ("overloaded_in_stream", {"how": "error"}, State.COOLING, Cause.OVERLOAD),
    ("failed", {"code": "server_is_overloaded"}, State.COOLING, Cause.OVERLOAD),
    ("failed", {"code": "slow_down"}, State.COOLING, Cause.OVERLOAD),
    ("failed", {"code": "rate_limit_exceeded"}, State.COOLING, Cause.RATE),
    ("failed", {"code": "rate_limit_exceeded", "how": "error"}, State.COOLING, Cause.RATE),
    ("failed", {"code": "usage_limit_reached"}, State.COOLING, Cause.LIMIT),
    ("failed", {"code": "usage_limit_reached", "how": "error"}, State.COOLING, Cause.LIMIT),
    ("failed", {"code": "server_error"}, State.COOLING, Cause.SERVER),
    ("failed", {"code": "server_error", "how": "error"}, State.COOLING, Cause.SERVER),
    ("failed", {"code": "never_heard_of"}, State.COOLING, Cause.SERVER),
    ("failed", {"code": "insufficient_quota"}, State.UNAVAILABLE, None),
    ("failed", {"code": "credit_balance_exhausted"}, State.UNAVAILABLE, None),
    ("failed", {"code": "organization_spend_limit_exceeded"}, State.UNAVAILABLE, None),
    ("failed", {"code": "project_spend_limit_exceeded"}, State.UNAVAILABLE, None),
    ("failed", {"code": "organization_usage_limit_exceeded"}, State.UNAVAILABLE, None),
    ("failed", {"code": "usage_not_included"}, State.READY, None),
    ("insufficient_quota", {}, State.UNAVAILABLE, None),
    ("insufficient_quota", {"code": "workspace_owner_credits_depleted"}, State.UNAVAILABLE, None),
    ("payment", {}, State.UNAVAILABLE, None),
    ("not_included", {}, State.READY, None),
    ("bad_model", {}, State.READY, None),
    ("not_found", {}, State.READY, None),
    ("cloudflare", {}, State.COOLING, Cause.PATH),
    ("forbidden", {}, State.COOLING, Cause.FORBIDDEN),
    ("server_error", {"status": 500}, State.COOLING, Cause.SERVER),
    ("server_error", {"status": 502}, State.COOLING, Cause.SERVER),
    ("server_error", {"status": 503, "body": "no healthy upstream"}, State.COOLING, Cause.OVERLOAD),
    ("server_error", {"status": 504}, State.COOLING, Cause.SERVER),
    ("server_error", {"status": 529}, State.COOLING, Cause.OVERLOAD),
    ("refuse", {}, State.COOLING, Cause.CUT),
    ("cut", {"after": 0, "clean": True}, State.COOLING, Cause.CUT),
    ("cut", {"after": 0}, State.COOLING, Cause.CUT),
    ("cut", {"after": 2, "clean": True}, State.COOLING, Cause.CUT),
    ("cut", {"after": 2}, State.COOLING, Cause.CUT),
    ("cut", {"after": 2, "reset": True}, State.COOLING, Cause.CUT),
    ("stall", {"where": "headers"}, State.COOLING, Cause.SILENT),
    ("stall", {"after": 0}, State.COOLING, Cause.SILENT),
    ("stall", {"where": "created"}, State.COOLING, Cause.SILENT),
]


def _name(value: Any) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items()) or "plain"
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("state", "options", "left_as", "cause"), REFUSALS, ids=_name)
async def test_another_account_answers_and_the_caller_never_knows(
    tmp_path: Path, state: str, options: JsonObject, left_as: State, cause: Cause | None
) -> None:
    async with standing(tmp_path, **(IMPATIENT if state == "stall" else {})) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set(state, **options)
        second.script(Script.text("all is well"))
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert answer.text == "all is well"
        assert answer.types[0] == "response.created"
        assert answer.types.count("response.created") == 1
        assert answer.types[-1] == "response.completed"
        assert stand.tried() == [first.name, second.name]
        refused, served = stand.sim.turns
        assert refused.body == served.body
        await stand.idle()
        account = stand.known(first)
        assert account.state is left_as
        assert account.cooling_cause() is cause
        assert account.in_flight == 0
        assert stand.known(second).state is State.READY
        # The next turn does not try in vain again.
        assert (await stand.ask("hi")).status == 200
        assert stand.tried()[2:] == [second.name]


CALLERS: dict[str, dict[str, Any]] = {
    "sdk stream": {"stream": True},
    "sdk whole": {"stream": False},
    "codex stream": {"stream": True, "codex": True},
    "codex whole": {"stream": False, "codex": True},
}

HELPLESS = "no_account_available"
EXHAUSTED = "usage_limit_reached"
SHORT = "rate_limit_exceeded"

EVERYWHERE: list[tuple[str, JsonObject, int, str]] = [
    ("usage_limit", {"resets_in": 3600}, 429, EXHAUSTED),
    ("rate_limit", {}, 429, SHORT),
    ("overloaded", {}, 429, SHORT),
    ("overloaded_in_stream", {"how": "failed"}, 429, SHORT),
    ("overloaded_in_stream", {"how": "error"}, 429, SHORT),
    ("failed", {"code": "server_error"}, 429, SHORT),
    ("failed", {"code": "usage_limit_reached"}, 429, EXHAUSTED),
    ("failed", {"code": "insufficient_quota"}, 429, HELPLESS),
    ("insufficient_quota", {}, 429, HELPLESS),
    ("payment", {}, 429, HELPLESS),
    ("revoked", {}, 429, HELPLESS),
    ("cloudflare", {}, 429, SHORT),
    ("forbidden", {}, 429, SHORT),
    ("server_error", {"status": 500}, 429, SHORT),
    ("server_error", {"status": 503, "body": "no healthy upstream"}, 429, SHORT),
    ("server_error", {"status": 504}, 429, SHORT),
    ("server_error", {"status": 529}, 429, SHORT),
    ("refuse", {}, 429, SHORT),
    ("cut", {"after": 2}, 429, SHORT),
    ("stall", {"where": "headers"}, 429, SHORT),
    ("not_included", {}, 400, "model_not_found"),
    ("bad_model", {}, 400, "model_not_found"),
    ("not_found", {}, 400, "model_not_found"),
]


@pytest.mark.parametrize(("state", "options", "status", "code"), EVERYWHERE, ids=_name)
async def test_trouble_everywhere_reaches_no_caller_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, options: JsonObject, status: int, code: str
) -> None:
    if code == SHORT:
        # Four callers in a row: each must meet the fault, not the cooldown of the one before.
        for cause in Cause:
            monkeypatch.setitem(BACKOFF, cause, Backoff(0.001, 0.001))
    async with standing(tmp_path, max_retry=1, **(IMPATIENT if state == "stall" else {})) as stand:
        for account in stand.accounts:
            account.set(state, **dict(options))
        for caller, how in CALLERS.items():
            answer = await stand.ask("hi", **how)
            error = answer.json["error"]
            assert answer.status == status, caller
            assert error["code"] == code, caller
            assert answer.headers["content-type"] == "application/json", caller
            if code in (EXHAUSTED, SHORT):
                assert error["type"] == code
                assert int(answer.headers["retry-after"]) >= 1, caller
            else:
                assert "retry-after" not in answer.headers, caller
            text = answer.body.decode().lower()
            for leaked in ("cloudflare", "<html", "example.com", "token", "upgrade to plus", "healthy"):
                assert leaked not in text, caller


async def test_a_page_of_cloudflare_on_all_accounts_cools_nobody(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("cloudflare")
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert [account.state for account in stand.daemon.pool.accounts()] == [State.READY] * 3
        # The way is mended: everybody serves at once.
        stand.sim.set_all("ok")
        stand.sim.clear()
        assert {(await stand.ask("hi")).status for _ in range(3)} == {200}
        assert len(stand.sim.turns) == 3


async def test_a_refused_connection_cools_nobody(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        await stand.sim.aclose()
        answer = await stand.ask("hi")
        assert answer.status == 429
        assert answer.json["error"]["code"] == SHORT
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert [account.state for account in stand.daemon.pool.accounts()] == [State.READY] * 3
        await stand.idle()
        assert all(account.in_flight == 0 for account in stand.daemon.pool)


async def test_a_page_of_cloudflare_never_cools_the_only_account(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0) as stand:
        (account,) = stand.accounts
        account.set("cloudflare", times=1)
        assert (await stand.ask("hi")).status == 429
        assert stand.known(account).state is State.READY
        assert (await stand.ask("hi")).status == 200


async def test_a_slow_backend_is_waited_for(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("slow", delay=0.1, per_event=0.002)
        answer = await stand.ask("hi")
        assert answer.status == 200
        assert answer.types[-1] == "response.completed"
        assert len(stand.sim.turns) == 1


# What is the caller's own fault ---------------------------------------------------------------


async def _unpunished(stand: Stand) -> None:
    await stand.idle()
    for account in stand.daemon.pool.accounts():
        assert account.state is State.READY
        assert account.in_flight == 0
        assert not account.holds
        assert not account.strikes
        assert not account.refusals
        assert account.total_errors == 0


@pytest.mark.parametrize("how", CALLERS.values(), ids=list(CALLERS))
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_bad_request_is_the_callers_in_the_backends_words(
    tmp_path: Path, status: int, how: dict[str, Any]
) -> None:
    body = {
        "error": {
            "message": "Invalid 'input[0].id': too long.",
            "type": "invalid_request_error",
            "param": "input[0].id",
            "code": "string_above_max_length",
        }
    }
    async with standing(tmp_path) as stand:
        stand.sim.set_all("bad_request", body=body, status=status)
        answer = await stand.ask("hi", **how)
        assert answer.status == status
        assert answer.json == body
        assert len(stand.sim.turns) == 1
        await _unpunished(stand)


async def test_a_bad_request_without_an_error_object_keeps_its_sentence(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("bad_request", body={"detail": "Unsupported parameter: color"})
        answer = await stand.ask("hi")
        assert answer.status == 400
        assert answer.json["error"]["message"] == "Unsupported parameter: color"
        assert answer.json["error"]["type"] == "invalid_request_error"
        assert len(stand.sim.turns) == 1
        await _unpunished(stand)


FATAL = (
    "context_length_exceeded",
    "invalid_prompt",
    "bio_policy",
    "cyber_policy",
    "misalignment_policy_violation",
)


@pytest.mark.parametrize("how", CALLERS.values(), ids=list(CALLERS))
@pytest.mark.parametrize("code", FATAL)
async def test_a_prompt_that_will_not_do_is_told_to_the_caller(
    tmp_path: Path, code: str, how: dict[str, Any]
) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("failed", code=code, message=f"about {code}")
        answer = await stand.ask("hi", **how)
        if how == CALLERS["codex stream"]:
            # The Codex CLI reads the code in the stream only.
            assert answer.status == 200
            assert answer.types[-1] == "response.failed"
            assert answer.types.count("response.failed") == 1
            error = answer.events[-1].json["response"]["error"]
        else:
            assert answer.status == 400
            error = answer.json["error"]
        assert error["code"] == code
        assert error["message"] == f"about {code}"
        assert len(stand.sim.turns) == 1
        await _unpunished(stand)


@pytest.mark.parametrize("how", CALLERS.values(), ids=list(CALLERS))
async def test_a_full_context_refused_as_a_status_stays_one(tmp_path: Path, how: dict[str, Any]) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("context_length", how="http")
        answer = await stand.ask("hi", **how)
        assert answer.status == 400
        assert answer.json["error"]["code"] == "context_length_exceeded"
        assert len(stand.sim.turns) == 1
        await _unpunished(stand)


# Models ---------------------------------------------------------------------------------------


async def test_a_model_that_one_account_lacks_is_not_asked_of_it_again(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set("bad_model")
        for _ in range(3):
            assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [first.name, second.name, second.name, second.name]
        first.set("ok")
        # Other models are as welcome as before.
        assert (await stand.ask("hi", model="gpt-6.1-sol")).status == 200
        assert stand.tried()[-1] == first.name


async def test_a_model_that_nobody_has_is_a_400_that_names_models(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.set_all("bad_model")
        answer = await stand.ask("hi")
        assert answer.status == 400
        error = answer.json["error"]
        assert error["param"] == "model"
        assert error["code"] == "model_not_found"
        told, _, served = error["message"].partition("they serve:")
        assert STANDARD in told
        assert "gpt-6.1-sol" in served
        assert f" {STANDARD}," not in served
        assert len(stand.sim.turns) == 3
        # All are known to refuse: nobody is asked again.
        assert (await stand.ask("hi")).status == 400
        assert len(stand.sim.turns) == 3


async def test_a_model_in_no_list_is_passed_on(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        last = stand.accounts[-1]
        last.models.append("gpt-next-preview")
        answer = await stand.ask("hi", model="gpt-next-preview")
        assert answer.status == 200
        assert stand.tried() == [account.name for account in stand.accounts]
        assert stand.sim.turns[-1].json["model"] == "gpt-next-preview"
        assert (await stand.ask("hi", model="gpt-next-preview")).status == 200
        assert stand.tried()[3:] == [last.name]


async def test_an_account_whose_list_lacks_the_model_is_not_asked(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        known = stand.known(first)
        stand.daemon.pool.set_models(known, [one for one in known.model_objects if one["slug"] != STANDARD])
        assert (await stand.ask("hi")).status == 200
        assert stand.tried() == [second.name]


async def test_missing_endpoints_are_remembered_apart_from_models(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1) as stand:
        (account,) = stand.accounts
        account.set("not_found")
        answer = await stand.post("/v1/alpha/search", {"commands": {}})
        assert answer.status == 400
        account.set("ok")
        assert (await stand.ask("hi")).status == 200


# Encrypted items ------------------------------------------------------------------------------


def _with_history(answer: Answer, text: str) -> list[JsonObject]:
    output = [event.json["item"] for event in answer.events if event.type == "response.output_item.done"]
    return [
        {"type": "message", "role": "user", "content": "think"},
        *output,
        {"type": "message", "role": "user", "content": text},
    ]


def _sealed(body: JsonObject, kind: str = "reasoning") -> list[str]:
    return [item["encrypted_content"] for item in body["input"] if item.get("type") == kind]


async def test_foreign_reasoning_is_left_out_and_stays_out(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        stand.sim.script(Script.reasoning())
        start = await stand.ask("think", prompt_cache_key="talk")
        history = _with_history(start, "and then?")
        assert [turn.account for turn in stand.sim.turns] == [first.name]
        first.set("usage_limit")

        stand.sim.script(Script.reasoning())
        answer = await stand.ask(input=history, prompt_cache_key="talk")
        assert answer.status == 200
        assert stand.tried()[1:] == [first.name, second.name]
        whole, served = stand.sim.turns[-2:]
        assert _sealed(whole.json) == _sealed({"input": history})
        assert _sealed(served.json) == []
        # Nothing but the reasoning was left out.
        assert [i for i in whole.json["input"] if i.get("type") != "reasoning"] == served.json["input"]
        assert stand.known(second).state is State.READY
        assert stand.known(second).total_errors == 0

        # The next turn has items of both accounts; only the second's own go to it.
        longer = [*history, *_with_history(answer, "go on")[1:]]
        before = len(stand.sim.turns)
        answer = await stand.ask(input=longer, prompt_cache_key="talk")
        assert answer.status == 200
        (received,) = stand.sim.turns[before:]
        assert received.account == second.name
        assert len(_sealed(received.json)) == 1
        assert _sealed(received.json) == _sealed({"input": longer})[1:]

        # Back on the first account its own are whole again.
        first.set("ok")
        stand.known(first).holds.clear()
        second.set("usage_limit")
        stand.in_order()
        answer = await stand.ask(input=history, prompt_cache_key="other talk")
        assert answer.status == 200
        assert stand.sim.turns[-1].account == first.name
        assert _sealed(stand.sim.turns[-1].json) == _sealed({"input": history})


async def test_reasoning_of_unknown_origin_is_tried_and_left_out_when_refused(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        stand.sim.script(Script.reasoning())
        history = _with_history(await stand.ask("think", prompt_cache_key="talk"), "and then?")
        first.set("usage_limit")
        # As after a restart.
        stand.daemon.pool.origins = Origins()
        answer = await stand.ask(input=history, prompt_cache_key="talk")
        assert answer.status == 200
        assert stand.tried()[1:] == [first.name, second.name, second.name]
        refused, served = stand.sim.turns[-2:]
        assert refused.status == 400
        assert _sealed(refused.json) == _sealed({"input": history})
        assert _sealed(served.json) == []
        assert stand.known(second).total_errors == 0


async def test_encrypted_history_is_kept_and_finds_its_account(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        last = stand.accounts[-1]
        history = [
            {"type": "compaction", "encrypted_content": seal(last.tag, k="compaction")},
            {"type": "message", "role": "user", "content": "go on"},
        ]
        answer = await stand.ask(input=history, codex=True, prompt_cache_key="long talk")
        assert answer.status == 200
        assert stand.tried() == [account.name for account in stand.accounts]
        assert all(_sealed(turn.json, "compaction") for turn in stand.sim.turns)
        await _unpunished(stand)
        # The conversation stays where it can be read.
        assert (await stand.ask(input=history, codex=True, prompt_cache_key="long talk")).status == 200
        assert stand.tried()[3:] == [last.name]


@pytest.mark.parametrize("codex", [True, False])
async def test_encrypted_history_waits_for_the_account_that_wrote_it(tmp_path: Path, codex: bool) -> None:
    async with standing(tmp_path) as stand:
        compact = await stand.post("/v1/responses/compact", {"model": STANDARD, "input": "a long talk"})
        home = stand.sim.account(str(stand.sim.requests[-1].account))
        history = [*compact.json["output"], {"type": "message", "role": "user", "content": "go on"}]
        home.set("overloaded", retry_after=1, times=1)
        answer = await stand.ask(input=history, codex=codex)
        assert answer.status == 200
        assert stand.tried()[0] == stand.tried()[-1] == home.name

        home.set("usage_limit", resets_in=3600)
        for _ in range(2):
            answer = await stand.ask(input=history, codex=codex)
            assert answer.status == 429
            assert answer.json["error"]["code"] == "usage_limit_reached"
            assert 3590 < answer.json["error"]["resets_in_seconds"] <= 3601
        others = [stand.known(account) for account in stand.accounts if account is not home]
        assert {account.state for account in others} == {State.READY}


async def test_encrypted_history_that_nobody_can_read_is_the_callers(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        history = [
            {"type": "compaction", "encrypted_content": "gAAAAAnobodys"},
            {"type": "message", "role": "user", "content": "go on"},
        ]
        answer = await stand.ask(input=history, codex=True)
        assert answer.status == 400
        assert answer.json["error"]["code"] == "invalid_encrypted_content"
        assert len(stand.sim.turns) == 3
        assert all(_sealed(turn.json, "compaction") == ["gAAAAAnobodys"] for turn in stand.sim.turns)
        await _unpunished(stand)


# Other endpoints take the same way ------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses/compact", {"model": STANDARD, "input": []}),
        ("/v1/alpha/search", {"commands": {"search_query": [{"q": "weather"}]}}),
        ("/v1/images/generations", {"prompt": "a dot", "model": "gpt-image-1"}),
    ],
)
@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("usage_limit", {}),
        ("server_error", {"status": 500}),
        ("unauthorized", {}),
        ("cut", {}),
        ("refuse", {}),
    ],
    ids=_name,
)
async def test_other_endpoints_change_accounts_too(
    tmp_path: Path, path: str, body: JsonObject, state: str, options: JsonObject
) -> None:
    async with standing(tmp_path) as stand:
        stand.in_order()
        first, second, _ = stand.accounts
        first.set(state, **options)
        answer = await stand.post(path, body)
        assert answer.status == 200
        received = [one for one in stand.sim.requests if one.path.endswith(path.removeprefix("/v1"))]
        served = first if state == "unauthorized" else second
        assert [one.account for one in received] == [first.name, served.name]
        assert received[0].json == received[1].json == body
        assert stand.known(served).in_flight == 0
