"""What a conversation is known by, seen from both ends: where its turns go, and what the backend is told."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import SimAccount
from codex_proxy.simulator.quota import quota_headers
from tests.daemon.sockets import line
from tests.harness import CODEX_HEADERS, STANDARD, Answer, Stand, question, standing

RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
COMPLETIONS = "/v1/completions"

KEYS = {name: f"the-key-of-{name}-0123456789" for name in ("anna", "bert")}
UUID = "00000000-0000-4000-8000-00000000000"

CLAUDE = "x-claude-code-session-id"
AGENT = "x-claude-code-agent-id"

HEADERS: dict[str, dict[str, str]] = {
    "session-id": {"session-id": "conversation-number-1"},
    "session_id": {"session_id": "conversation-number-2"},
    "thread-id": {"thread-id": "conversation-number-3"},
    "conversation_id": {"conversation_id": "conversation-number-4"},
    "x-session-id": {"x-session-id": "conversation-number-5"},
    "claude session": {CLAUDE: "conversation-number-6"},
    "claude agent": {CLAUDE: "conversation-number-6", AGENT: "agent-number-1"},
}
FIELDS: dict[str, dict[str, Any]] = {
    "prompt_cache_key": {"prompt_cache_key": "conversation-number-7"},
    "conversation": {"conversation": {"id": "conversation-number-8"}},
    "user": {"user": "conversation-number-9"},
    "safety_identifier": {"safety_identifier": "conversation-number-10"},
    "user of a relay": {"user": json.dumps({"session_id": "conversation-number-11"})},
    "beginning": {},
}

# A Responses body that names a stored conversation is refused: there are none here.
WAYS = [
    *((path, name) for path in (RESPONSES, CHAT, MESSAGES, COMPLETIONS) for name in HEADERS),
    *((RESPONSES, name) for name in FIELDS if name != "conversation"),
    *((CHAT, name) for name in FIELDS),
    *((MESSAGES, name) for name in ("metadata.user_id", "metadata.user_id as JSON", "beginning")),
    (COMPLETIONS, "prompt_cache_key"),
]

SENT_ON = {
    "session-id": "conversation-number-1",
    "prompt_cache_key": "conversation-number-7",
}
"""Which names the backend hears as they are: the callers' own words for the same thing."""


@contextlib.asynccontextmanager
async def standing_firm(folder: Path, accounts: int = 3) -> AsyncIterator[Stand]:
    """Start a pool in which a conversation without a home goes to the account that `in_order_of` names."""
    keys = ", ".join(f'{{{name}: "{key}"}}' for name, key in KEYS.items())
    async with standing(folder, accounts=accounts, strategy="quota-balance", api_keys=f"[{keys}]") as stand:
        yield stand


class Talk:
    """One conversation of one caller, whose turns each bring the whole of it."""

    def __init__(
        self,
        stand: Stand,
        path: str,
        *,
        caller: str = "anna",
        headers: dict[str, str] | None = None,
        say: str = "hello",
        **fields: Any,
    ) -> None:
        self.stand = stand
        self.path = path
        self.headers = {"x-api-key": KEYS[caller], **(headers or {})}
        self.fields = fields
        self.say = say
        self.history: list[dict[str, Any]] = []
        self.count = 0

    async def turn(self, **more: Any) -> str | None:
        """Take a turn; return the account that answered."""
        answer = await self.stand.post(self.path, self._body(**more), headers=self.headers)
        assert answer.status == 200, answer.body
        self.history.append({"role": "assistant", "content": _said(self.path, answer)})
        self.count += 1
        return self.stand.tried()[-1]

    def _body(self, **more: Any) -> dict[str, Any]:
        self.history.append({"role": "user", "content": f"{self.say} {'again ' * self.count}".strip()})
        # Such prompts tell the time, and each turn another one.
        system = f"You are brief. It is {self.count}:59."
        body: dict[str, Any] = {"model": STANDARD, "stream": False, **self.fields, **more}
        if self.path == COMPLETIONS:
            return {**body, "prompt": "".join(str(message["content"]) for message in self.history)}
        if self.path == RESPONSES:
            return {**body, "instructions": system, "input": self.history}
        if self.path == MESSAGES:
            return {**body, "system": system, "messages": self.history, "max_tokens": 1000}
        return {**body, "messages": [{"role": "system", "content": system}, *self.history]}


def _said(path: str, answer: Answer) -> Any:
    body = answer.json
    if path == RESPONSES:
        return answer.text
    if path == MESSAGES:
        return body["content"]
    choice = body["choices"][0]
    return choice["text"] if path == COMPLETIONS else choice["message"]["content"]


def talk(stand: Stand, path: str, way: str, **options: Any) -> Talk:
    """Return a conversation that is named in one of the ways."""
    if way in HEADERS:
        return Talk(stand, path, headers=HEADERS[way], **options)
    if way == "metadata.user_id":
        return Talk(stand, path, metadata={"user_id": f"user_0a_account__session_{UUID}1"}, **options)
    if way == "metadata.user_id as JSON":
        return Talk(stand, path, metadata={"user_id": json.dumps({"session_id": f"{UUID}2"})}, **options)
    return Talk(stand, path, **FIELDS[way], **options)


async def stranger(stand: Stand, account: SimAccount, caller: str = "anna") -> None:
    """Let the pool prefer *account*, and see that others go there."""
    stand.in_order_of(account)
    body = question(f"something else {len(stand.sim.turns)}")
    assert (await stand.post(RESPONSES, body, headers={"x-api-key": KEYS[caller]})).status == 200
    assert stand.tried()[-1] == account.name


def level(stand: Stand) -> None:
    """Let the pool prefer no account."""
    for account in stand.accounts:
        account.use(primary=10, secondary=0)
        stand.known(account).quota.read_headers(quota_headers(account), stand.daemon.clock.now())


def names(stand: Stand, turn: int = -1) -> tuple[str, str]:
    """Return by which names the backend knows the conversation of a turn."""
    received = stand.sim.turns[turn]
    return received.headers["session-id"], received.json["prompt_cache_key"]


@pytest.mark.parametrize(("path", "way"), WAYS)
async def test_the_turns_of_a_conversation_stay_while_others_go_elsewhere(
    path: str, way: str, tmp_path: Path
) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, third = stand.accounts
        await stranger(stand, first)
        conversation = talk(stand, path, way)
        found = []
        assert await conversation.turn() == first.name
        found.append(names(stand))
        for other in (second, third):
            await stranger(stand, other)
            assert await conversation.turn() == first.name
            found.append(names(stand))
        assert len(set(found)) == 1
        session, key = found[0]
        # What the caller did not say is made for it, and says nothing of what it said.
        assert session == SENT_ON.get(way, session)
        assert (key == SENT_ON["prompt_cache_key"]) == (way == "prompt_cache_key")
        for received in stand.sim.turns:
            # The account's token is the proxy's own, and may hold any letters by chance.
            headers = {name: value for name, value in received.headers.items() if name != "Authorization"}
            told = f"{headers}{received.body.decode()}".replace(SENT_ON.get(way, UUID), "")
            assert "Bearer" not in told
            for word in ("conversation-number", "agent-number", UUID, *KEYS, *KEYS.values(), "key-"):
                assert word not in told


@pytest.mark.parametrize(
    ("path", "way"),
    [
        (RESPONSES, "session-id"),
        (RESPONSES, "prompt_cache_key"),
        (RESPONSES, "beginning"),
        (CHAT, "x-session-id"),
        (CHAT, "user"),
        (CHAT, "beginning"),
        (MESSAGES, "claude agent"),
        (MESSAGES, "metadata.user_id"),
    ],
)
async def test_two_client_keys_share_no_conversation(path: str, way: str, tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, third = stand.accounts
        anna, bert = (talk(stand, path, way, caller=caller) for caller in KEYS)
        stand.in_order_of(first)
        assert await anna.turn() == first.name
        theirs = names(stand)
        stand.in_order_of(second)
        assert await bert.turn() == second.name
        # Only what both of them said themselves is the same.
        same = {one for one, other in zip(theirs, names(stand), strict=True) if one == other}
        assert same == ({SENT_ON[way]} if way in SENT_ON else set())
        stand.in_order_of(third)
        assert await anna.turn() == first.name
        assert await bert.turn() == second.name


@pytest.mark.parametrize("path", [RESPONSES, CHAT])
async def test_a_user_who_is_always_the_same_is_spread_over_the_accounts(path: str, tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        level(stand)
        talks = [Talk(stand, path, say=f"task number {number}:", user="the-only-one") for number in range(30)]
        homes = [await one.turn() for one in talks]
        assert sorted(homes.count(account.name) for account in stand.accounts) == [10, 10, 10]
        # And each of them stays.
        assert [await one.turn() for one in talks] == homes


async def test_who_begins_alike_does_not_crowd_on_one_account(tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        level(stand)
        homes = [await Talk(stand, CHAT).turn() for _ in range(9)]
        assert sorted(homes.count(account.name) for account in stand.accounts) == [3, 3, 3]


async def test_a_sub_agent_of_claude_code_is_a_conversation_of_its_own(tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, third = stand.accounts
        main, one, two = (
            Talk(stand, MESSAGES, headers={CLAUDE: "s-1", **({AGENT: agent} if agent else {})})
            for agent in ("", "a-1", "a-2")
        )
        known = []
        for conversation, account in ((main, first), (one, second), (two, third)):
            stand.in_order_of(account)
            assert await conversation.turn() == account.name
            known.append(names(stand))
        assert len(set(known)) == 3
        for preferred in (third, first, second):
            stand.in_order_of(preferred)
            assert [await each.turn() for each in (main, one, two)] == [first.name, second.name, third.name]


async def test_threads_of_a_codex_session_share_its_account_and_go_out_as_they_came(tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, _ = stand.accounts
        stand.in_order_of(first)
        for thread, preferred in (("s-1", first), ("t-1", second)):
            stand.in_order_of(preferred)
            raw = json.dumps(
                {
                    **question("go", prompt_cache_key="s-1"),
                    "store": False,
                    "include": ["reasoning.encrypted_content"],
                },
                indent=1,
            ).encode()
            headers = {
                **CODEX_HEADERS,
                "x-api-key": KEYS["anna"],
                "Content-Type": "application/json",
                "session-id": "s-1",
                "thread-id": thread,
                "x-openai-subagent": "collab_spawn",
            }
            async with stand.session.post(RESPONSES, data=raw, headers=headers) as answer:
                assert answer.status == 200
                await answer.read()
            received = stand.sim.turns[-1]
            assert received.account == first.name
            assert received.body == raw
            assert (received.headers["session-id"], received.headers["thread-id"]) == ("s-1", thread)


async def test_a_codex_client_that_names_nothing_is_known_by_its_beginning_and_sent_as_it_is(
    tmp_path: Path,
) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, _ = stand.accounts
        headers = {**CODEX_HEADERS, "x-api-key": KEYS["anna"]}
        folder = {"role": "user", "content": "<environment_context>/home</environment_context>"}
        items: list[dict[str, Any]] = [folder, {"role": "user", "content": "fix it"}]
        body = {"model": STANDARD, "stream": True, "instructions": "Be brief."}
        stand.in_order_of(first)
        assert (await stand.post(RESPONSES, {**body, "input": items}, headers=headers)).status == 200
        stand.in_order_of(second)
        other = [folder, {"role": "user", "content": "another task"}]
        assert (await stand.post(RESPONSES, {**body, "input": other}, headers=headers)).status == 200
        items += [{"role": "assistant", "content": "done"}, {"role": "user", "content": "thanks"}]
        assert (await stand.post(RESPONSES, {**body, "input": items}, headers=headers)).status == 200
        assert stand.tried() == [first.name, second.name, first.name]
        for received in stand.sim.turns:
            assert "session-id" not in received.headers
            assert "prompt_cache_key" not in received.json


# Conversations that are gone on from.


@pytest.mark.parametrize("over", ["http", "socket"])
async def test_a_chain_keeps_its_account_however_many_begin_alike(over: str, tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand, contextlib.AsyncExitStack() as stack:
        anna = {"x-api-key": KEYS["anna"]}

        async def begin_over_http() -> Callable[[], Any]:
            last = (await stand.ask("hi", stream=False, headers=anna)).json["id"]

            async def go_on() -> None:
                nonlocal last
                answer = await stand.ask("on", stream=False, headers=anna, previous_response_id=last)
                assert answer.status == 200, answer.body
                last = answer.json["id"]

            return go_on

        async def begin_over_socket() -> Callable[[], Any]:
            caller = await stack.enter_async_context(line(stand, headers=anna))
            last = (await caller.complete("hi"))["id"]

            async def go_on() -> None:
                nonlocal last
                last = (await caller.complete("on", previous_response_id=last))["id"]

            return go_on

        chains = []
        for account in stand.accounts:
            stand.in_order_of(account)
            chains.append(await (begin_over_http if over == "http" else begin_over_socket)())
        home = [account.name for account in stand.accounts]
        assert stand.tried() == home
        for preferred in stand.accounts:
            await stranger(stand, preferred)
            for chain in chains:
                await chain()
            assert stand.tried()[-3:] == home
        # For the backend's cache all of them begin alike.
        assert len({names(stand, turn) for turn in (0, 1, 2, -3, -2, -1)}) == 1


async def test_an_answer_may_be_gone_on_from_or_sent_back_whole(tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, _ = stand.accounts
        anna = {"x-api-key": KEYS["anna"]}
        stand.in_order_of(first)
        one = await stand.ask("tell me a story", stream=False, headers=anna)
        stand.in_order_of(second)
        history = [{"role": "user", "content": "tell me a story"}, *one.json["output"]]
        whole = {"model": STANDARD, "input": [*history, {"role": "user", "content": "on"}]}
        assert (await stand.post(RESPONSES, whole, headers=anna)).status == 200
        going_on = await stand.ask("on", headers=anna, previous_response_id=one.json["id"])
        assert going_on.status == 200
        assert stand.tried() == [first.name] * 3
        assert len({names(stand, turn) for turn in range(3)}) == 1


async def test_a_compaction_goes_where_its_conversation_lives(tmp_path: Path) -> None:
    async with standing_firm(tmp_path) as stand:
        first, second, _ = stand.accounts
        stand.in_order_of(first)
        conversation = Talk(stand, RESPONSES)
        assert await conversation.turn() == first.name
        known = names(stand)[0]
        stand.in_order_of(second)
        answer = await stand.post(
            "/v1/responses/compact",
            {"model": STANDARD, "instructions": "You are brief. It is 7:59.", "input": conversation.history},
            headers={"x-api-key": KEYS["anna"]},
        )
        assert answer.status == 200
        received = stand.sim.requests[-1]
        assert received.account == first.name
        assert received.headers["session-id"] == known


async def test_the_story_of_a_turn_tells_what_it_was_known_by(tmp_path: Path) -> None:
    async with standing_firm(tmp_path, accounts=1) as stand:
        told: list[str] = []
        stand.daemon.executor.listen(lambda trace: told.append(trace.binding))
        for way in ("x-session-id", "claude agent", "prompt_cache_key", "user", "beginning"):
            await talk(stand, CHAT, way).turn()
            await stand.idle()
        first = await stand.ask("hi", stream=False, headers={"x-api-key": KEYS["anna"]})
        headers = {"x-api-key": KEYS["anna"]}
        await stand.ask("on", headers=headers, previous_response_id=first.json["id"])
        await stand.post("/v1/alpha/search", {"commands": {}}, headers=headers)
        await stand.idle()
        assert told == [
            "x-session-id", "claude agent", "prompt_cache_key", "user", "beginning", "beginning",
            "previous_response_id", "",
        ]  # fmt: skip
