"""A desk with the real Codex CLI on it: installed, set up in front of the proxy, and run to its end.

Nothing leaves this machine: all that is not loopback would go through a proxy that only notes who asked.
"""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.simulator import Script, Simulator
from codex_proxy.trace import Trace
from tests.clients.fence import Tap, installed, kill, no_way_out
from tests.harness import LITE, STANDARD, Stand, standing

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
    return installed(request.config, "@openai/codex", VERSION) / ".bin" / "codex"


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
