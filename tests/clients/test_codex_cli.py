"""The real Codex CLI as a caller, in both ways in which people put the proxy under it.

With a key: the CLI knows the proxy as a provider. With a login: the CLI has an account of its own,
asks its workspaces and models, and compresses what it sends. Nothing leaves this machine: all
that is not loopback would go through a proxy that only notes who asked.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest

from codex_proxy.simulator import Script, Simulator
from codex_proxy.trace import End, Trace
from tests.harness import LITE, STANDARD, Stand, standing

pytestmark = pytest.mark.clients

VERSION = "0.169.0"
KEY = "the-key-of-the-caller"

# Far more than a turn takes; a CLI that retries as it should not is seen by its requests.
PATIENCE = 30.0

EXPECTED = (
    # Whatever follows a refused upgrade, the CLI notes it and goes on over HTTP.
    "failed to connect to Responses WebSocket",
    # Where the tests live.
    "Refusing to create helper binaries under temporary dir",
)
"""What the CLI says about itself and not about us."""

COMPLAINT = re.compile(r"(?i)\bWARN|ERROR|warning|flagged|cyber|reconnect|limit|capacity|retry|unexpected")

# Arithmetic that only a shell can have done.
COMMAND = "echo marker-$((40+2))"
CALLS: dict[str, Script] = {
    LITE: Script.custom_tool(
        "exec", f"const r = await tools.exec_command({{cmd: {COMMAND!r}}}); text(JSON.stringify(r));"
    ),
    STANDARD: Script.tool("exec_command", {"cmd": COMMAND}),
}
"""How each kind of model runs a command."""


@pytest.fixture(scope="session")
def codex(request: pytest.FixtureRequest) -> Path:
    """Install the CLI, once for as long as pytest's cache lives."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm to install the Codex CLI with")
    assert request.config.cache is not None
    cache = request.config.cache.mkdir("codex-cli")
    folder = cache / VERSION
    if not folder.exists():
        # Renamed when it is whole: an install that was broken off is none.
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            made = Path(fresh) / "made"
            asyncio.run(
                _install(
                    npm,
                    "install",
                    "--prefix",
                    str(made),
                    "--no-audit",
                    "--no-fund",
                    f"@openai/codex@{VERSION}",
                )
            )
            with contextlib.suppress(OSError):
                made.rename(folder)
    return folder / "node_modules" / ".bin" / "codex"


async def _install(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()


@dataclass(slots=True)
class Head:
    """The head of a request as the CLI sent it."""

    method: str
    path: str
    headers: dict[str, str]


class Tap:
    """Stands between the CLI and the proxy, passes everything on and notes the heads of requests."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self.heads: list[Head] = []

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def sent(self, method: str, path: str) -> list[Head]:
        return [h for h in self.heads if h.method == method and h.path.partition("?")[0].endswith(path)]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_proxy, to_proxy = await asyncio.open_connection(*self._to)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_pass(from_proxy, writer), self._requests(reader, to_proxy))
        for end in (writer, to_proxy):
            end.close()

    async def _requests(self, reader: asyncio.StreamReader, to_proxy: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").rstrip().split("\r\n")
                method, path, _ = first.split(" ")
                headers = {
                    name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
                }
                self.heads.append(Head(method, path, headers))
                to_proxy.write(head + await reader.readexactly(int(headers.get("content-length", "0"))))
                await to_proxy.drain()
        # The CLI has left, and the proxy has to hear it.
        to_proxy.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass(slots=True)
class Ran:
    """What a person saw of one run."""

    code: int | None
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        return [
            line
            for line in self.err.splitlines()
            if COMPLAINT.search(line) and not any(known in line for known in EXPECTED)
        ]


@dataclass(slots=True)
class Desk:
    """A CLI that is set up, the proxy it talks to, and all that was said."""

    codex: Path
    stand: Stand
    tap: Tap
    home: Path
    environment: dict[str, str]
    traces: list[Trace] = field(default_factory=list)

    @property
    def sim(self) -> Simulator:
        return self.stand.sim

    async def start(self, *arguments: str, model: str = LITE) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self.codex,
            "exec",
            "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox",
            *("-m", model),
            *arguments,
            env=self.environment,
            cwd=self.home,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # What npm installs is a launcher: it and the CLI itself form a group.
            start_new_session=True,
        )

    async def run(self, *arguments: str, model: str = LITE) -> Ran:
        """Run the CLI to its end."""
        process = await self.start(*(arguments or ("say hello",)), model=model)
        try:
            out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        finally:
            if process.returncode is None:
                await kill(process)
        return Ran(process.returncode, out.decode(), err.decode())


async def kill(process: asyncio.subprocess.Process) -> None:
    """End the CLI without a chance to say goodbye."""
    os.killpg(process.pid, signal.SIGKILL)
    await process.communicate()


@contextlib.asynccontextmanager
async def no_way_out() -> AsyncIterator[dict[str, str]]:
    """Yield the environment that sends every call to another host to a listener; fail if one came."""
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    try:
        yield {
            **{name: proxy for upper in names for name in (upper, upper.lower())},
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        }
    finally:
        server.close()
    assert asked == []


@contextlib.asynccontextmanager
async def sitting(
    codex: Path, folder: Path, config: str, *, login: str | None = None, **settings: Any
) -> AsyncIterator[Desk]:
    """Set everything up; *config* is the CLI's, with the places of proxy and backend left open."""
    simulator = Simulator(accounts=3)
    if login is not None:
        simulator.add_account(login)

    def auths(sim: Simulator, directory: Path) -> None:
        sim.write_auth_files(directory)
        if login is not None:
            # This one is the person's own, and not one of the pool.
            (directory / f"simulated-{login}.json").unlink()

    home = folder / "home"
    settled = home / "codex"
    settled.mkdir(parents=True)
    async with (
        no_way_out() as environment,
        standing(folder, simulator=simulator, auths=auths, **settings) as stand,
        Tap("127.0.0.1", stand.daemon.port) as tap,
    ):
        if login is not None:
            text = json.dumps(simulator.account(login).codex_file())
            (settled / "auth.json").write_text(text, encoding="utf-8")
        backend = simulator.url.replace("127.0.0.1", "localhost")
        text = config.replace("PROXY", tap.url).replace("BACKEND", backend) + QUIET
        (settled / "config.toml").write_text(text, encoding="utf-8")
        environment |= {
            "PATH": os.environ["PATH"],
            "TZ": "UTC",
            "HOME": str(home),
            "CODEX_HOME": str(settled),
            "POOL_KEY": KEY,
            "CODEX_REFRESH_TOKEN_URL_OVERRIDE": f"{simulator.issuer}/oauth/token",
        }
        desk = Desk(codex, stand, tap, home, environment)
        stand.daemon.executor.listen(desk.traces.append)
        yield desk


QUIET = """
check_for_update_on_startup = false
analytics.enabled = false
features.plugins = false
features.apps = false
"""

WITH_KEY = """
model_provider = "pool"
model_providers.pool.name = "OpenAI"
model_providers.pool.base_url = "PROXY/backend-api/codex"
model_providers.pool.wire_api = "responses"
model_providers.pool.env_key = "POOL_KEY"
model_providers.pool.supports_websockets = true
"""

WITH_LOGIN = """
openai_base_url = "PROXY/backend-api/codex"
chatgpt_base_url = "BACKEND/backend-api"
"""


@pytest.fixture
async def desk(codex: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY]) as desk:
        yield desk


# Turns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_text_turn_is_printed_after_one_refused_upgrade(desk: Desk, model: str) -> None:
    desk.sim.script(Script.reasoning("**Greeting**", "Hello from afar."))
    ran = await desk.run("say hello", model=model)
    assert (ran.code, ran.out) == (0, "Hello from afar.\n")
    assert ran.complaints == []
    # One look at the WebSocket, and never again.
    assert [(head.method, head.path) for head in desk.tap.heads] == [
        ("GET", "/backend-api/codex/responses"),
        ("POST", "/backend-api/codex/responses"),
    ]
    (turn,) = desk.sim.turns
    assert KEY not in turn.headers["authorization"]
    assert turn.headers["originator"] == "codex_exec"
    assert turn.headers["user-agent"].startswith(f"codex_exec/{VERSION}")
    assert turn.headers["x-codex-routing-hint"] == f"model={model}"
    assert turn.headers.get("x-openai-internal-codex-responses-lite") == ("true" if model == LITE else None)
    assert turn.headers["chatgpt-account-id"] == desk.sim.account(str(turn.account)).account_id
    assert turn.json["prompt_cache_key"] == turn.headers["session-id"]
    assert [trace.end for trace in desk.traces] == [End.COMPLETED]


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_tool_turn_runs_the_command_and_brings_its_output_back(desk: Desk, model: str) -> None:
    desk.sim.script(CALLS[model])
    ran = await desk.run("run it", model=model)
    assert ran.code == 0
    assert ran.complaints == []
    # The simulator speaks of what the tool said.
    assert ran.out.startswith("The tool said: ")
    assert "marker-42" in ran.out
    first, second = desk.sim.turns
    assert (first.status, second.status) == (200, 200)
    assert second.account == first.account
    *_, call, output = second.json["input"]
    assert output["type"] == f"{call['type']}_output"
    assert output["call_id"] == call["call_id"]
    assert "marker-42" in json.dumps(output)
    # The turn stays on its node: the state came down wrapped, and goes up as the backend gave it.
    assert "x-codex-turn-state" not in first.headers
    wrapped = [head.headers.get("x-codex-turn-state") for head in desk.tap.sent("POST", "/responses")]
    assert wrapped[0] is None
    assert wrapped[1] is not None
    assert wrapped[1].endswith(second.headers["x-codex-turn-state"])
    assert wrapped[1] != second.headers["x-codex-turn-state"]


async def test_a_conversation_is_resumed_on_its_account(desk: Desk) -> None:
    desk.sim.script(Script.reasoning("**One**", "First."))
    first = await desk.run("one")
    desk.sim.script(Script.reasoning("**Two**", "Second."))
    # Another account would be the better choice if nothing held the conversation.
    desk.sim.account(str(desk.sim.turns[0].account)).use(primary=80)
    await desk.stand.post("/check-quota", headers={"Authorization": f"Bearer {KEY}"})
    second = await desk.run("resume", "--last", "two")
    assert (first.out, second.out) == ("First.\n", "Second.\n")
    assert second.complaints == []
    one, two = desk.sim.turns
    assert one.account == two.account
    assert [item["type"] for item in two.json["input"]].count("reasoning") == 1


async def test_a_full_context_is_compacted_and_the_turn_goes_on(desk: Desk) -> None:
    desk.sim.script(CALLS[LITE])
    ran = await desk.run("-c", "model_auto_compact_token_limit=1000", "run it")
    assert ran.code == 0
    assert desk.sim.turns[-1].status == 200
    kinds = [[item["type"] for item in turn.json["input"]] for turn in desk.sim.turns]
    assert any(kind[-1] == "compaction_trigger" for kind in kinds)
    assert "compaction" in kinds[-1]
    assert {turn.status for turn in desk.sim.turns} == {200}


async def test_tier_effort_schema_and_picture_arrive_as_the_cli_means_them(desk: Desk) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    (desk.home / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    (desk.home / "pixel.png").write_bytes(base64.b64decode(PIXEL))
    ran = await desk.run(
        *("-c", 'service_tier="fast"', "-c", 'model_reasoning_effort="ultra"'),
        *("--output-schema", "schema.json"),
        *("-i", "pixel.png", "--", "where is this?"),
    )
    assert ran.code == 0
    assert ran.complaints == []
    assert json.loads(ran.out) == {"city": "simulated"}
    turn = desk.sim.turns[-1]
    assert turn.json["service_tier"] == "priority"
    assert turn.json["reasoning"]["effort"] == "xhigh"
    assert turn.json["text"]["format"]["schema"] == schema
    assert turn.headers["x-codex-routing-hint"] == f"model={LITE};tier=priority"
    pictures = [
        part["image_url"]
        for item in turn.json["input"]
        for part in item.get("content") or ()
        if part["type"] == "input_image"
    ]
    assert len(pictures) == 1
    assert pictures[0].startswith("data:image/png;base64,")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize(
    ("name", "model", "effort", "tier"),
    [
        (f"{LITE}-high", LITE, "high", None),
        (f"{STANDARD}-xhigh-fast", STANDARD, "xhigh", "priority"),
        ("gpt-6-luna-fast", "gpt-6-luna", None, "priority"),
    ],
)
async def test_a_model_with_a_suffix_serves_without_a_word_about_misuse(
    desk: Desk, name: str, model: str, effort: str | None, tier: str | None
) -> None:
    # The backend names what it served, in its headers and in its events; here it even rerouted.
    desk.sim.served_model = "gpt-of-another-name"
    desk.sim.script("Served.")
    ran = await desk.run(model=name)
    assert (ran.code, ran.out) == (0, "Served.\n")
    assert ran.complaints == []
    (turn,) = desk.sim.turns
    assert turn.json["model"] == model
    if effort is not None:
        assert turn.json["reasoning"]["effort"] == effort
    assert turn.json.get("service_tier") == tier


# Failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "options"),
    [
        ("usage_limit", {"resets_in": 3600}),
        ("rate_limit", {"retry_after": 30}),
        ("overloaded", {}),
        ("overloaded_in_stream", {}),
        ("failed", {"code": "server_error"}),
        ("server_error", {"status": 502}),
        ("unauthorized", {}),
        ("payment", {}),
        ("cloudflare", {}),
        ("refuse", {}),
    ],
)
async def test_an_accounts_failure_is_not_seen_by_the_cli(
    desk: Desk, state: str, options: dict[str, Any]
) -> None:
    desk.sim.script(Script.state(state, **options), "Nothing happened.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "Nothing happened.\n")
    assert ran.complaints == []
    assert len(desk.tap.sent("POST", "/responses")) == 1
    assert len(desk.sim.turns) == 2


async def test_an_account_that_hits_its_limit_within_a_turn_is_left_unnoticed(desk: Desk) -> None:
    desk.sim.script(CALLS[LITE], Script.state("usage_limit", resets_in=3600))
    ran = await desk.run("run it")
    assert ran.code == 0
    assert "marker-42" in ran.out
    assert ran.complaints == []
    assert [turn.status for turn in desk.sim.turns] == [200, 429, 200]
    assert desk.sim.turns[2].account != desk.sim.turns[1].account
    # The state of the turn was the other account's.
    assert "x-codex-turn-state" not in desk.sim.turns[2].headers


async def test_an_exhausted_pool_is_told_once_with_its_reset(desk: Desk) -> None:
    for account, resets_in in zip(desk.sim.accounts, (7200, 3600, 5400), strict=True):
        account.set("usage_limit", resets_in=resets_in)
    ran = await desk.run()
    assert ran.code == 1
    assert ran.out == ""
    resets = [datetime.fromtimestamp(desk.sim.now() + 3600 + minute, UTC) for minute in (-60, 0, 60)]
    told = [f"Try again at {moment:%I:%M %p}".replace(" at 0", " at ") for moment in resets]
    assert "hit your usage limit" in ran.err
    assert any(words in ran.err for words in told), ran.err
    assert "econnect" not in ran.err
    assert len(desk.tap.sent("POST", "/responses")) == 1
    assert [trace.status for trace in desk.traces] == [429]


async def test_a_late_overload_is_retried_politely_and_succeeds(desk: Desk) -> None:
    desk.sim.script(Script.state("overloaded_in_stream", after=3), "After a moment.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "After a moment.\n")
    assert not any("capacity" in line for line in ran.complaints)
    assert len(desk.tap.sent("POST", "/responses")) == 2
    first, second = desk.traces
    # It waited as long as it was told to.
    assert second.started - (first.finished or 0.0) > 0.9


async def test_a_stream_that_breaks_off_is_taken_up_again(desk: Desk) -> None:
    desk.sim.script(Script.state("cut", after=6), "Whole again.")
    ran = await desk.run()
    assert (ran.code, ran.out) == (0, "Whole again.\n")
    assert len(desk.tap.sent("POST", "/responses")) == 2


async def test_a_passing_shortage_is_waited_for(codex: Path, tmp_path: Path) -> None:
    async with sitting(codex, tmp_path, WITH_KEY, api_keys=[KEY], max_retry=0) as desk:
        desk.sim.script(Script.state("overloaded"), "There was room.")
        ran = await desk.run()
        assert (ran.code, ran.out) == (0, "There was room.\n")
        assert [trace.status for trace in desk.traces] == [429, 200]


async def test_a_context_that_is_too_long_ends_the_turn_at_once(desk: Desk) -> None:
    desk.sim.script(Script.state("context_length"))
    ran = await desk.run()
    assert ran.code == 1
    assert "ran out of room" in ran.err
    assert len(desk.tap.sent("POST", "/responses")) == 1
    assert len(desk.sim.turns) == 1


async def test_a_wrong_key_is_said_to_be_one_and_not_shown(desk: Desk) -> None:
    desk.environment["POOL_KEY"] = "another-key"
    # Left alone, the CLI tries a 401 five times more.
    ran = await desk.run("-c", "model_providers.pool.stream_max_retries=0", "say hello")
    assert ran.code == 1
    assert "401 Unauthorized" in ran.err
    assert "api-keys" in ran.err
    assert "another-key" not in ran.err
    assert KEY not in ran.err
    assert desk.sim.turns == []


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


# With a login of one's own -----------------------------------------------------------------


@pytest.fixture
async def owner(codex: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    async with sitting(codex, tmp_path, WITH_LOGIN, login="person") as desk:
        yield desk


@pytest.mark.parametrize("model", [LITE, STANDARD])
async def test_a_login_of_ones_own_uses_the_pool_all_the_same(owner: Desk, model: str) -> None:
    owner.sim.script(CALLS[model])
    ran = await owner.run("run it", model=model)
    assert ran.code == 0
    assert "marker-42" in ran.out
    assert ran.complaints == []
    person = owner.sim.account("person")
    for turn in owner.sim.turns:
        assert turn.account in {"a1", "a2", "a3"}
        assert turn.status == 200
        assert person.tokens.access not in turn.headers["authorization"]
        assert turn.headers["chatgpt-account-id"] != person.account_id
        assert turn.headers["version"] == VERSION
    sent = owner.tap.sent("POST", "/responses")
    assert [head.headers["content-encoding"] for head in sent] == ["zstd", "zstd"]
    assert [head.headers["authorization"] for head in sent] == [f"Bearer {person.tokens.access}"] * 2
    # What it asked of the backend itself went to the backend, as the person.
    others = {(r.path.removeprefix("/backend-api"), r.account) for r in owner.sim.requests} - {
        (turn.path.removeprefix("/backend-api"), turn.account) for turn in owner.sim.turns
    }
    assert ("/wham/accounts/check", "person") in others
    assert not any(account in {"a1", "a2", "a3"} for _, account in others)


async def test_the_list_of_models_is_taken_whole_and_asked_for_no_more_than_needed(owner: Desk) -> None:
    await owner.run()
    asked = len(owner.tap.sent("GET", "/models"))
    assert 1 <= asked <= 2
    kept = json.loads((owner.home / "codex" / "models_cache.json").read_text(encoding="utf-8"))
    listed = (await owner.stand.get(f"/backend-api/codex/models?client_version={VERSION}")).json["models"]
    assert [model["slug"] for model in kept["models"]] == [model["slug"] for model in listed]
    assert len(listed) > 5
    # An etag that moves would make it ask again and again.
    again = await owner.run()
    assert again.complaints == []
    assert len(owner.tap.sent("GET", "/models")) <= asked + 1
