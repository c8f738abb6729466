"""The real Claude Code as a caller, with the proxy in the place of Anthropic's API.

Nothing leaves this machine: all that is not loopback would go through a proxy that only notes who asked.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script, Simulator
from codex_proxy.trace import End, Trace
from tests.clients.fence import Head, Tap, installed, kill, no_way_out
from tests.clients.sdk_bench import KEY, PIXEL, PIXEL_URL, sealed, told
from tests.harness import LITE, STANDARD, Stand, standing

pytestmark = pytest.mark.clients

VERSION = "2.1.329"

# Far more than a turn takes; a CLI that retries as it should not is seen by its requests.
PATIENCE = 40.0

# It does not know our models' names and says so, to whoever looks after it.
UNRECOGNIZED = "[claude-code:unrecognized_model]"

# Arithmetic that only a shell can have done.
COMMAND = "echo marker-$((40+2)) | tee shell.txt"


@pytest.fixture(scope="session")
def claude(request: pytest.FixtureRequest) -> Path:
    """Install the CLI, once for as long as pytest's cache lives."""
    modules = installed(request.config, "@anthropic-ai/claude-code", VERSION)
    # The program itself: its launcher is set up by a script that npm may be told not to run.
    (program,) = (modules / "@anthropic-ai").glob("claude-code-*/claude")
    return program


@dataclass(slots=True)
class Ran:
    """What a person, or a program that reads its JSON, saw of one run."""

    code: int | None
    told: dict[str, Any]
    err: str

    @property
    def result(self) -> str:
        return str(self.told["result"])

    @property
    def is_well(self) -> bool:
        noise = [line for line in self.err.splitlines() if not line.startswith(UNRECOGNIZED)]
        return self.code == 0 and not self.told["is_error"] and not noise


@dataclass(slots=True)
class Desk:
    """A CLI that is set up, the proxy it talks to, and all that was said."""

    claude: Path
    stand: Stand
    tap: Tap
    home: Path
    work: Path
    environment: dict[str, str]
    traces: list[Trace] = field(default_factory=list)

    @property
    def sim(self) -> Simulator:
        return self.stand.sim

    @property
    def asked(self) -> list[Head]:
        """The requests for answers."""
        return self.tap.sent("POST", "/v1/messages")

    async def start(self, *arguments: str, form: str = "json") -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.claude,
            "-p",
            *arguments,
            "--dangerously-skip-permissions",
            *("--output-format", form),
            env=self.environment,
            cwd=self.work,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def run(self, *arguments: str) -> Ran:
        """Run the CLI to its end."""
        process = await self.start(*(arguments or ("say hello",)))
        try:
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        finally:
            if process.returncode is None:
                await kill(process)
        return Ran(process.returncode, json.loads(out), err.decode())


@contextlib.asynccontextmanager
async def sitting(claude: Path, folder: Path, **settings: Any) -> AsyncIterator[Desk]:
    """Set everything up."""
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    async with (
        no_way_out() as environment,
        standing(folder, api_keys=[KEY], **settings) as stand,
        Tap("127.0.0.1", stand.daemon.port) as tap,
    ):
        environment |= {
            "PATH": os.environ["PATH"],
            "TZ": "UTC",
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": tap.url,
            "ANTHROPIC_AUTH_TOKEN": KEY,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # Else it refuses to skip permissions where tests run as root.
            "IS_SANDBOX": "1",
        }
        desk = Desk(claude, stand, tap, home, work, environment)
        stand.daemon.executor.listen(desk.traces.append)
        yield desk


@pytest.fixture
async def desk(claude: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(claude, tmp_path) as desk:
        yield desk


def output_of(desk: Desk, turn: int = -1) -> list[Any]:
    """Return what the last tool said, as the backend got it."""
    outputs = [item for item in told(desk.sim.turns[turn]) if item[0] == "output"]
    return list(outputs[-1][1:])


def tools_of(desk: Desk, turn: int = -1) -> set[str]:
    """Return the names of the functions that a turn declared."""
    body = desk.sim.turns[turn].json
    groups = [*(body.get("tools") or [])]
    for item in body["input"]:
        groups += item.get("tools") or [] if item.get("type") == "additional_tools" else []
    plain = [tool for group in groups for tool in (group.get("tools") or [group])]
    return {tool["name"] for tool in plain if tool["type"] == "function"}


def texts(value: Any) -> Iterator[str]:
    """Yield every text in *value*, those in JSON within it too."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value
        with contextlib.suppress(ValueError):
            inner = json.loads(value)
            yield from texts(inner) if isinstance(inner, dict) else ()


def words_of(body: dict[str, Any]) -> Iterator[str]:
    """Yield all that the CLI says in a request: to the model, about its tools, and what the tools said."""
    for tool in body["tools"]:
        if tool["name"] == "DeferredToolPlaceholder":
            # It is for Anthropic's servers: "never call this tool".
            continue
        yield tool["name"]
        yield tool["description"]
    blocks = [*body["system"]]
    for message in body["messages"]:
        content = message["content"]
        blocks += [{"type": "text", "text": content}] if isinstance(content, str) else content
    while blocks:
        block = blocks.pop(0)
        match block["type"]:
            case "text":
                yield block["text"]
            case "tool_use":
                yield block["name"]
                yield from texts(block["input"])
            case "tool_result":
                content = block["content"]
                blocks += [{"type": "text", "text": content}] if isinstance(content, str) else content
            case "image":
                yield block["source"]["data"]
            case "thinking":
                yield block["signature"]
            case kind:
                raise AssertionError(kind)


# Turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        (None, LITE),
        ("opus", LITE),
        ("sonnet", LITE),
        ("haiku", "gpt-6-luna"),
        ("claude-sonnet-4-5", LITE),
        (STANDARD, STANDARD),
        (f"claude-{STANDARD}", STANDARD),
    ],
)
async def test_a_text_turn_works_with_claudes_names_and_with_ours(
    desk: Desk, asked: str | None, model: str
) -> None:
    desk.sim.script(Script.reasoning("**Greeting**", "Hello from afar."))
    ran = await desk.run("say hello", *(("--model", asked) if asked else ()))
    assert ran.is_well
    assert ran.result == "Hello from afar."
    assert ran.told["stop_reason"] == "end_turn"
    assert ran.told["usage"]["output_tokens"] > 0
    (turn,) = desk.sim.turns
    assert turn.json["model"] == model
    assert KEY not in turn.headers["authorization"]
    assert turn.headers["chatgpt-account-id"] == desk.sim.account(str(turn.account)).account_id
    assert [trace.end for trace in desk.traces] == [End.COMPLETED]
    assert len(desk.asked) == 1


@pytest.mark.parametrize(("name", "effort"), [(f"claude-{STANDARD}-low", "low"), (f"{LITE}-xhigh", "xhigh")])
async def test_an_effort_in_the_name_outranks_the_one_of_the_cli(desk: Desk, name: str, effort: str) -> None:
    ran = await desk.run("say hello", "--model", name)
    assert ran.is_well
    assert desk.sim.turns[-1].json["reasoning"]["effort"] == effort


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_tool_turn_runs_the_tools_and_brings_their_output_back(desk: Desk, model: str) -> None:
    desk.sim.script(
        Script.of(
            Script.reasoning("**Plan**", "I write it."),
            Script.tool("Write", {"file_path": str(desk.work / "out.txt"), "content": "written\n"}),
        ),
        Script.of(
            Script.reasoning("**Next**", ""),
            Script.tool("Bash", {"command": COMMAND, "description": "Mark"}),
        ),
    )
    ran = await desk.run("Write out.txt", "--model", model)
    assert ran.is_well
    assert ran.result == "The tool said: marker-42"
    assert (desk.work / "out.txt").read_text(encoding="utf-8") == "written\n"
    assert (desk.work / "shell.txt").read_text(encoding="utf-8") == "marker-42\n"
    assert [turn.status for turn in desk.sim.turns] == [200] * 3
    assert len({turn.account for turn in desk.sim.turns}) == 1
    _, *conversation = [item for item in told(desk.sim.turns[-1]) if item[0] != "developer"]
    assert [item[0] for item in conversation] == [
        "thought",
        "assistant",
        "call",
        "output",
        "thought",
        "call",
        "output",
    ]
    assert conversation[0] == ("thought", "**Plan**")
    assert conversation[5][2]["command"] == COMMAND
    assert conversation[6] == ("output", "marker-42")
    assert len(sealed(desk.sim.turns[-1])) == 2


async def test_an_image_that_is_read_is_seen_by_the_model(desk: Desk) -> None:
    (desk.work / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    desk.sim.script(Script.tool("Read", {"file_path": str(desk.work / "pixel.png")}), "One pixel.")
    ran = await desk.run("look at pixel.png")
    assert ran.is_well
    assert ran.result == "One pixel."
    pictures = [part for part in output_of(desk) if str(part).startswith("data:image/")]
    assert pictures == [PIXEL_URL]


async def test_tools_that_are_called_at_once_all_run(desk: Desk) -> None:
    desk.sim.script(
        Script.parallel_tools([
            ("Bash", {"command": "echo one-$((1+1))"}),
            ("Write", {"file_path": str(desk.work / "c.txt"), "content": "three"}),
            ("Bash", {"command": "echo two-$((2+2))"}),
        ]),
        "All done.",
    )
    ran = await desk.run("do it all")
    assert ran.is_well
    assert ran.result == "All done."
    assert (desk.work / "c.txt").read_text(encoding="utf-8") == "three"
    ended = told(desk.sim.turns[-1])[-6:]
    assert [item[0] for item in ended] == ["call"] * 3 + ["output"] * 3
    assert ended[3] == ("output", "one-2")
    assert ended[5] == ("output", "two-4")
    assert len(desk.asked) == 2


async def test_not_a_word_of_what_it_sends_is_lost(desk: Desk) -> None:
    (desk.work / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    (desk.work / "CLAUDE.md").write_text("Always say please, naïvely. \U0001f389\n", encoding="utf-8")
    desk.sim.script(
        Script.of(
            Script.reasoning(["**One**", "**Two**"], "All at once."),
            Script.tool("Read", {"file_path": str(desk.work / "pixel.png")}),
            Script.tool("Bash", {"command": "printf 'caf\\u00e9\\tx\\n'; exit 2"}),
            Script.tool("Read", {"file_path": str(desk.work / "CLAUDE.md")}),
        ),
        Script.reasoning("**Three**", "And that is that."),
        "Bye.",
    )
    assert (await desk.run("Say “it”: <b>\\n</b>")).is_well
    assert (await desk.run("and on", "--continue")).is_well
    assert len(desk.asked) == len(desk.sim.turns) == 3
    for asked, turn in zip(desk.asked, desk.sim.turns, strict=True):
        received = set(texts(turn.json))
        missing = [
            text
            for text in words_of(json.loads(asked.body))
            if not any(text == one or text in one for one in received)
        ]
        assert [text.partition(":")[0] for text in missing] == ["x-anthropic-billing-header"]


async def test_a_failed_tool_is_told_as_an_error(desk: Desk) -> None:
    desk.sim.script(Script.tool("Bash", {"command": "echo oops >&2; exit 3"}), "I see.")
    ran = await desk.run("fail")
    assert ran.is_well
    (said,) = output_of(desk)
    assert said.startswith("Error:")
    assert "oops" in said


async def test_context_is_counted_here_at_once_and_costs_no_account_anything(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.sim.set_all("usage_limit", resets_in=3600)
    with caplog.at_level(logging.DEBUG, logger="codex_proxy.server.middleware"):
        ran = await desk.run("/context")
    assert ran.is_well
    counted = desk.tap.sent("POST", "/v1/messages/count_tokens")
    assert len(counted) >= 24
    answered = [record for record in caplog.records if "count_tokens" in record.getMessage()]
    assert len(answered) == len(counted)
    assert all("status=200" in record.getMessage() for record in answered)
    assert answered[-1].created - answered[0].created < 2
    # What is counted here is what it shows.
    assert "**Tokens:**" in ran.result
    assert "| System tools |" in ran.result
    assert desk.asked == []
    assert desk.sim.turns == []


async def test_a_tool_that_is_loaded_later_is_declared_from_then_on(desk: Desk) -> None:
    desk.sim.script(
        Script.tool("ToolSearch", {"query": "select:WebFetch,WebSearch", "max_results": 5}), "Found them."
    )
    ran = await desk.run("fetch it")
    assert ran.is_well
    assert ran.result == "Found them."
    assert {"WebFetch", "WebSearch"} & tools_of(desk, 0) == set()
    assert {"WebFetch", "WebSearch"} <= tools_of(desk, 1)
    assert "DeferredToolPlaceholder" not in tools_of(desk, 1)
    said = " ".join(map(str, output_of(desk)))
    assert "WebFetch" in said
    assert "WebSearch" in said


async def test_a_web_search_is_the_backends_own(desk: Desk) -> None:
    desk.sim.script(
        Script.tool("ToolSearch", {"query": "select:WebSearch", "max_results": 5}),
        Script.tool("WebSearch", {"query": "the news"}),
        Script.web_search("the news", "It is sunny."),
        "So it is.",
    )
    ran = await desk.run("what is the news?")
    assert ran.is_well
    assert ran.result == "So it is."
    (search,) = [turn for turn in desk.sim.turns if turn.json.get("tools") == [{"type": "web_search"}]]
    assert "the news" in json.dumps(told(search))
    assert "It is sunny." in " ".join(map(str, output_of(desk)))
    used = sum(one["webSearchRequests"] for one in ran.told["modelUsage"].values())
    assert used == 1


async def test_a_structured_answer_is_what_the_schema_asks_for(desk: Desk) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    desk.sim.script(Script.tool("StructuredOutput", {"city": "Oslo"}))
    ran = await desk.run("where is it?", "--json-schema", json.dumps(schema))
    assert ran.is_well
    assert ran.told["structured_output"] == {"city": "Oslo"}
    assert "StructuredOutput" in tools_of(desk)


async def test_a_sub_agent_has_a_conversation_of_its_own(desk: Desk) -> None:
    task = {"description": "Look", "prompt": "say sub", "subagent_type": "general-purpose"}
    desk.sim.script(Script.tool("Agent", task), *(["Done."] * 4))
    ran = await desk.run("delegate it")
    assert ran.is_well
    agents = [head for head in desk.asked if "x-claude-code-agent-id" in head.headers]
    assert agents
    keys = {turn.json["prompt_cache_key"] for turn in desk.sim.turns}
    assert len(keys) == 2
    (sub,) = [turn for turn in desk.sim.turns if "say sub" in json.dumps(told(turn)[1:2])]
    assert [turn.json["prompt_cache_key"] for turn in desk.sim.turns].count(
        sub.json["prompt_cache_key"]
    ) == len(agents)


async def test_every_turn_of_a_conversation_begins_as_the_one_before_it(desk: Desk) -> None:
    desk.sim.script(
        Script.of(Script.reasoning("**One**", "I run it."), Script.tool("Bash", {"command": COMMAND})),
        Script.reasoning("**Two**", "First."),
        Script.reasoning("**Three**", "Second."),
    )
    first = await desk.run("one")
    # Another account would be the better choice if nothing held the conversation.
    desk.sim.account(str(desk.sim.turns[0].account)).use(primary=80)
    await desk.stand.post("/check-quota", headers={"Authorization": f"Bearer {KEY}"})
    second = await desk.run("two", "--continue")
    assert (first.result, second.result) == ("First.", "Second.")
    turns = desk.sim.turns
    assert [turn.status for turn in turns] == [200] * 3
    assert len({turn.account for turn in turns}) == 1
    assert len({turn.json["prompt_cache_key"] for turn in turns}) == 1
    for before, after in itertools.pairwise(turns):
        sent = before.json["input"]
        assert after.json["input"][: len(sent)] == sent
        assert after.json.get("tools") == before.json.get("tools")
    assert [item[0] for item in told(turns[-1])].count("thought") == 2
    # The backend found what it had kept, and the CLI could see it.
    assert second.told["usage"]["cache_read_input_tokens"] > 0
    # The line that differs from conversation to conversation stays here.
    assert all(b"x-anthropic-billing-header" not in turn.body for turn in turns)


async def test_every_piece_is_seen_as_it_comes(desk: Desk) -> None:
    desk.sim.script(Script.reasoning("**Hm**", "one two three"))
    process = await desk.start("talk", "--verbose", "--include-partial-messages", form="stream-json")
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    lines = [json.loads(line) for line in out.splitlines()]
    events = [line["event"] for line in lines if line["type"] == "stream_event"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert [delta["text"] for delta in deltas if delta["type"] == "text_delta"] == ["one", " two", " three"]
    assert [delta["type"] for delta in deltas].count("signature_delta") == 1
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert lines[-1]["result"] == "one two three"


async def test_a_key_may_come_in_the_other_header(desk: Desk) -> None:
    del desk.environment["ANTHROPIC_AUTH_TOKEN"]
    desk.environment["ANTHROPIC_API_KEY"] = KEY
    assert (await desk.run()).is_well
    (asked,) = desk.asked
    assert "authorization" not in asked.headers
    assert asked.headers["x-api-key"] == KEY


async def test_an_output_limit_is_kept_here_and_the_answer_goes_on(desk: Desk) -> None:
    desk.environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = "100"
    desk.sim.script(Script.long_text(300), "The rest.")
    ran = await desk.run()
    assert ran.is_well
    assert ran.result == "The rest."
    assert [trace.end for trace in desk.traces] == [End.INCOMPLETE, End.COMPLETED]
    *_, (role, begun), _ = told(desk.sim.turns[-1])
    assert role == "assistant"
    assert 300 < len(begun) <= 400


async def test_two_conversations_begin_alike_and_are_kept_apart(desk: Desk) -> None:
    desk.sim.script("One.", "Two.")
    for words in ("the same words", "the same words"):
        assert (await desk.run(words)).is_well
    one, two = desk.sim.turns
    assert one.json["prompt_cache_key"] != two.json["prompt_cache_key"]
    assert one.json["input"][:2] == two.json["input"][:2]
    assert one.json["input"][0]["type"] == "additional_tools"


async def test_the_models_are_discovered_under_names_that_can_be_asked(desk: Desk) -> None:
    desk.environment["CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY"] = "1"
    assert (await desk.run()).is_well
    (asked,) = desk.tap.sent("GET", "/v1/models")
    assert asked.path.endswith("?limit=1000")
    kept = json.loads((desk.home / ".claude/cache/gateway-models.json").read_text(encoding="utf-8"))
    names = [model["id"] for model in kept["models"]]
    listed = await desk.stand.get(
        "/v1/models?limit=1000",
        headers={"Authorization": f"Bearer {KEY}", "anthropic-version": "2023-06-01"},
    )
    assert names == [model["id"] for model in listed.json["data"] if "claude" in model["id"]]
    assert {f"claude-{STANDARD}", f"claude-{LITE}-high"} <= set(names)
    assert (await desk.run("again", "--model", f"claude-{LITE}-high")).is_well
    assert desk.sim.turns[-1].json["model"] == LITE
    assert desk.sim.turns[-1].json["reasoning"]["effort"] == "high"


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        "usage_limit",
        "rate_limit",
        "overloaded",
        "overloaded_in_stream",
        "server_error",
        "cloudflare",
        "payment",
        "unauthorized",
        "refuse",
    ],
)
async def test_an_accounts_failure_is_not_seen_by_the_cli(desk: Desk, state: str) -> None:
    desk.sim.script(Script.state(state), "Nothing happened.")
    ran = await desk.run()
    assert ran.is_well
    assert ran.result == "Nothing happened."
    assert len(desk.asked) == 1
    assert len(desk.sim.turns) == 2


async def test_an_account_that_hits_its_limit_within_a_conversation_is_left_unnoticed(desk: Desk) -> None:
    desk.sim.script(
        Script.of(Script.reasoning("**Plan**", ""), Script.tool("Bash", {"command": COMMAND})),
        Script.state("usage_limit", resets_in=3600),
    )
    ran = await desk.run("run it")
    assert ran.is_well
    assert ran.result == "The tool said: marker-42"
    assert len(desk.asked) == 2
    first, limited, *_, last = desk.sim.turns
    assert (first.status, limited.status, last.status) == (200, 429, 200)
    assert last.account != first.account


async def test_an_exhausted_pool_is_told_once_and_clearly(desk: Desk) -> None:
    for account, resets_in in zip(desk.sim.accounts, (7200, 3600, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    ran = await desk.run()
    assert ran.code == 1
    assert ran.told["api_error_status"] == 429
    assert "usage limit" in ran.result
    assert ran.told["duration_ms"] < 10_000
    assert len(desk.asked) == 1
    assert [trace.status for trace in desk.traces] == [429]


async def test_a_conversation_that_is_too_long_is_recognised_and_not_sent_again(desk: Desk) -> None:
    desk.sim.script(Script.state("context_length"))
    ran = await desk.run()
    assert ran.code == 1
    assert ran.told["terminal_reason"] == "prompt_too_long"
    assert ran.result.startswith("Prompt is too long")
    assert len(desk.asked) == 1
    assert len(desk.sim.turns) == 1


async def test_a_conversation_that_grew_too_long_is_compacted_and_goes_on(desk: Desk) -> None:
    desk.sim.script(
        Script.tool("Bash", {"command": "seq 1 3000"}),
        Script.state("context_length"),
        "<summary>It counted to 3000.</summary>",
        "On from there.",
    )
    ran = await desk.run("count")
    assert ran.is_well
    assert ran.result == "On from there."
    assert [trace.status for trace in desk.traces] == [200, 400, 200, 200]
    last = json.dumps(told(desk.sim.turns[-1]))
    assert "It counted to 3000." in last
    assert "2999" not in last


async def test_a_model_that_nobody_has_is_said_to_be_the_trouble(desk: Desk) -> None:
    desk.sim.set_all("bad_model")
    ran = await desk.run("say hello", "--model", STANDARD)
    assert ran.code == 1
    assert f"the model '{STANDARD}' is not available on any of the accounts" in ran.result
    # It asks in other ways before it believes a 400; no account is troubled with that.
    assert sorted(str(turn.account) for turn in desk.sim.turns) == ["a1", "a2", "a3"]


async def test_a_wrong_key_is_said_at_once_and_not_shown(desk: Desk) -> None:
    desk.environment["ANTHROPIC_AUTH_TOKEN"] = "another-key"
    ran = await desk.run()
    assert ran.code == 1
    assert ran.told["api_error_status"] == 401
    assert "another-key" not in json.dumps(ran.told)
    assert len(desk.asked) == 1
    assert desk.sim.turns == []


async def test_a_passing_shortage_is_waited_for(claude: Path, tmp_path: Path) -> None:
    async with sitting(claude, tmp_path, max_retry=0) as desk:
        desk.sim.script(Script.state("overloaded"), "There was room.")
        ran = await desk.run()
        assert ran.is_well
        assert ran.result == "There was room."
        assert [trace.status for trace in desk.traces] == [529, 200]


@pytest.mark.parametrize(
    "fail",
    [
        lambda: Script.state("cut", after=6),
        lambda: Script.state("failed", code="server_error", after=3),
        lambda: Script.state("overloaded_in_stream", after=3),
    ],
    ids=["cut", "failed", "overloaded"],
)
async def test_a_stream_that_breaks_is_asked_for_again_and_never_taken_for_whole(
    desk: Desk, fail: Callable[[], Script]
) -> None:
    desk.sim.script(fail(), "Whole again.")
    ran = await desk.run()
    assert ran.is_well
    assert ran.result == "Whole again."
    assert len(desk.asked) == 2


async def test_a_long_silence_is_bridged(claude: Path, tmp_path: Path) -> None:
    async with sitting(claude, tmp_path, keep_alive_after=0.2) as desk:
        desk.sim.script(Script.state("stall", where="created", seconds=1.5))
        ran = await desk.run()
        assert ran.is_well
        assert len(desk.asked) == 1


async def test_a_cli_that_is_killed_frees_its_account(desk: Desk) -> None:
    desk.sim.script(Script.long_text(2000, delay=0.01))
    process = await desk.start("talk")
    await desk.stand.until(lambda: any(turn.status == 200 for turn in desk.sim.turns), PATIENCE)
    await kill(process)
    (turn,) = desk.sim.turns
    await asyncio.wait_for(turn.closed.wait(), 5)
    assert turn.cancelled
    await desk.stand.until(lambda: bool(desk.traces))
    assert desk.traces[0].end is End.CALLER_GONE
