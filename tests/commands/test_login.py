"""`codex-proxy login` and `accounts relogin` as processes: browser, pasted address, device, Ctrl-C."""

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.accounts import store
from codex_proxy.simulator import SimAccount, Simulator
from tests.process import PATIENCE_SECONDS, client, running, until, write_config


class Login:
    """A login that waits for somebody."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.out: list[str] = []

    async def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stdout that *pattern* is found in."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                text = (await self.process.stdout.readline()).decode()
                assert text, f"it ended without {pattern!r}: {self.out}"
                self.out.append(text)
                match = re.search(pattern, text)
                if match is not None:
                    return match

    async def url(self) -> str:
        """Wait for the address of the page to log in at."""
        return (await self.line(r"^  (http\S+/oauth/authorize\S+)"))[1]

    async def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        await self.process.stdin.drain()

    async def ended(self) -> tuple[int, str, str]:
        """Wait for its end; return the exit code, all of stdout, and stderr."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, "".join(self.out) + out.decode(), err.decode()


class Place:
    """A configuration, a simulated issuer, and a browser."""

    def __init__(self, folder: Path, sim: Simulator, browser: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.sim = sim
        self.browser = browser

    @property
    def auths(self) -> Path:
        return self.folder / "auths"

    @property
    def account(self) -> SimAccount:
        return self.sim.accounts[0]

    @contextlib.asynccontextmanager
    async def login(self, *arguments: str, environ: dict[str, str] | None = None) -> AsyncIterator[Login]:
        """Start a login on a port of its own."""
        words = list(arguments) if arguments[:1] == ("accounts",) else ["login", *arguments]
        base = {name: value for name, value in os.environ.items() if name not in ("BROWSER", "DISPLAY")}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "codex_proxy", "-config", str(self.folder / "config.yaml"),
            *words, "--callback-port", "0",
            stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**base, **(environ or {})},
        )  # fmt: skip
        try:
            yield Login(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def visit(self, url: str) -> tuple[int, str]:
        async with self.browser.get(url) as answer:
            return answer.status, await answer.text()

    async def returns_to(self, url: str) -> str:
        async with self.browser.get(url, allow_redirects=False) as answer:
            return answer.headers["location"]

    def files(self) -> list[Path]:
        return sorted(self.auths.glob("*.json"))

    def content(self) -> dict[str, Any]:
        """Return what the one account file holds."""
        (path,) = self.files()
        document = json.loads(path.read_bytes())
        assert isinstance(document, dict)
        return document


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with Simulator(3) as sim, aiohttp.ClientSession() as browser:
        write_config(tmp_path, sim)
        yield Place(tmp_path, sim, browser)


async def test_a_login_in_the_browser_ends_with_a_file_of_its_own(place: Place) -> None:
    async with place.login("--alias", "work") as login:
        url = await login.url()
        assert "originator=codex_proxy" in url
        status, page = await place.visit(url)
        code, out, err = await login.ended()
    assert (status, "Logged in" in page) == (200, True)
    assert (code, err) == (0, "")
    (path,) = place.files()
    assert out.splitlines()[-2:] == [
        f"Logged in: work (plus); its login is in {path}.",
        "No daemon runs with this configuration: start it with `codex-proxy`.",
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert place.account.email not in path.name
    file = place.content()
    assert (file["alias"], file["type"], file["email"]) == ("work", "codex", place.account.email)
    assert file["refresh_token"] == place.account.tokens.refresh
    assert store.load(path).identity.account_id == place.account.account_id
    assert place.account.tokens.refresh not in out


async def test_a_browser_is_opened_where_there_is_one(place: Place) -> None:
    script = place.folder / "browser"
    script.write_text(
        f"#!{sys.executable}\nimport sys, urllib.request\nurllib.request.urlopen(sys.argv[1]).read()\n",
        encoding="utf-8",
    )
    script.chmod(0o700)
    async with place.login(environ={"BROWSER": f"{script} %s"}) as login:
        code, out, _ = await login.ended()
    assert code == 0
    assert out.startswith("A browser should open now. If it does not, open this page to log in:\n")


async def test_an_account_that_is_there_gets_the_new_login_into_its_file(place: Place) -> None:
    place.auths.mkdir()
    path = place.auths / "mine.json"
    old = {**place.account.codex_file(), "alias": "work", "disabled": True, "priority": 3}
    # Our clock was wrong once: what the file says of its time is no reason to drop a new login.
    path.write_text(json.dumps({**old, "last_refresh": "2099-01-01T00:00:00Z"}), encoding="utf-8")
    async with place.login() as login:
        await place.visit(await login.url())
        code, out, _ = await login.ended()
    assert code == 0
    assert f"Logged in: work (plus); its new login is in {path}." in out
    assert "It is disabled; `codex-proxy accounts enable work` puts it to use." in out
    assert place.files() == [path]
    file = place.content()
    assert (file["alias"], file["disabled"], file["priority"]) == ("work", True, 3)
    assert file["tokens"]["refresh_token"] == place.account.tokens.refresh != old["tokens"]["refresh_token"]
    assert file["tokens"]["login_owner_id"] == old["tokens"]["login_owner_id"]
    assert not file["last_refresh"].startswith("2099")


async def test_what_the_browser_ended_at_can_be_pasted(place: Place) -> None:
    async with place.login("--no-browser") as login:
        url = await login.url()
        hint = await login.line("ends at an address that cannot be")
        assert len(hint.string.rstrip()) <= 78
        await login.type("hello")
        await login.type(await place.returns_to(url))
        code, out, err = await login.ended()
    assert code == 0
    assert "Logged in: acct-" in out
    assert err == (
        "codex-proxy: that is no address with a code in it: paste the whole address from the browser\n"
    )


async def test_the_browser_may_come_back_while_somebody_could_type(place: Place) -> None:
    async with place.login("--no-browser") as login:
        url = await login.url()
        assert login.process.stdin is not None
        # The end of stdin is not the end of the login.
        login.process.stdin.close()
        await place.visit(url)
        code, _, err = await login.ended()
    assert (code, err) == (0, "")


async def test_the_code_alone_may_be_typed_without_a_line_break(place: Place) -> None:
    async with place.login("--no-browser") as login:
        address = await place.returns_to(await login.url())
        match = re.search(r"code=([^&]+)", address)
        assert match is not None
        assert login.process.stdin is not None
        login.process.stdin.write(match[1].encode())
        login.process.stdin.close()
        assert (await login.ended())[0] == 0


async def test_a_login_on_another_device(place: Place) -> None:
    place.sim.issuer_state.device_interval = "1"
    async with place.login("--device", "--alias", "phone") as login:
        page = (await login.line(r"^  (http\S+)"))[1]
        user_code = (await login.line(r"^  ([0-9A-F]{4}-[0-9A-F]{5})$"))[1]
        await place.visit(f"{page}?user_code={user_code}&account=a2")
        code, out, err = await login.ended()
    assert (code, err) == (0, "")
    assert "Logged in: phone (plus)" in out
    assert place.content()["email"] == "a2@example.com"


async def test_a_login_that_is_refused_writes_nothing(place: Place) -> None:
    place.sim.issuer_state.login_error = "missing_codex_entitlement"
    async with place.login() as login:
        await place.visit(await login.url())
        code, _, err = await login.ended()
    assert code == 1
    assert err.startswith(
        "codex-proxy: this account may not use Codex: its plan or its workspace does not include it"
    )
    assert place.files() == []


async def test_ctrl_c_leaves_nothing_behind(place: Place) -> None:
    async with place.login() as login:
        url = await login.url()
        await login.line("Waiting for the login")
        login.process.send_signal(signal.SIGINT)
        code, _, err = await login.ended()
    assert (code, err) == (1, "codex-proxy: the login was broken off; nothing was changed\n")
    assert place.files() == []
    with pytest.raises(aiohttp.ClientConnectionError):
        await place.visit(await place.returns_to(url))


@pytest.mark.parametrize(
    ("alias", "words"),
    [
        ("a@b", "--alias 'a@b' is no name"),
        ("", "--alias '' is no name"),
        ("work", "there is an account 'work' already; `codex-proxy accounts relogin work` logs it in again"),
    ],
)
async def test_a_name_that_cannot_be_had_is_told_before_the_login(
    place: Place, alias: str, words: str
) -> None:
    place.auths.mkdir()
    (place.auths / "x.json").write_text(
        json.dumps({**place.account.flat_file(), "alias": "work"}), encoding="utf-8"
    )
    async with place.login("--alias", alias) as login:
        code, out, err = await login.ended()
    assert (code, out) == (1, "")
    assert words in err
    assert not place.sim.requests


async def test_a_folder_that_takes_no_file_is_told_before_the_login(place: Place) -> None:
    (place.folder / "auths").write_text("a file where the folder should be", encoding="utf-8")
    async with place.login() as login:
        code, out, err = await login.ended()
    assert (code, out) == (1, "")
    assert "auths is no folder" in err


# --- the same account again


async def test_relogin_puts_the_new_login_into_the_same_file(place: Place) -> None:
    place.sim.write_auth_files(place.auths)
    path = place.auths / "simulated-a1.json"
    alias = store.load(path).default_alias
    before = place.account.tokens.refresh
    async with place.login("accounts", "relogin", alias) as login:
        await place.visit(await login.url())
        code, out, err = await login.ended()
    assert (code, err) == (0, "")
    assert f"Logged in: {alias} (plus); its new login is in {path}." in out
    assert store.load(path).refresh.reveal() == place.account.tokens.refresh != before
    assert len(place.files()) == 3


async def test_relogin_of_another_account_changes_nothing(place: Place) -> None:
    place.sim.write_auth_files(place.auths)
    before = {path: path.read_bytes() for path in place.files()}
    alias = store.load(place.auths / "simulated-a1.json").default_alias
    place.sim.login_as = "a2"
    async with place.login("accounts", "relogin", alias) as login:
        status, page = await place.visit(await login.url())
        code, _, err = await login.ended()
    assert code == 1
    assert f"another account logged in than {alias}" in err
    assert (status, "Another account logged in" in page) == (400, True)
    assert {path: path.read_bytes() for path in place.files()} == before


async def test_relogin_of_nobody_names_those_called_alike(place: Place) -> None:
    place.auths.mkdir()
    (place.auths / "x.json").write_text(
        json.dumps({**place.account.flat_file(), "alias": "work"}), encoding="utf-8"
    )
    async with place.login("accounts", "relogin", "wrok") as login:
        code, _, err = await login.ended()
    assert (code, err) == (1, "codex-proxy: there is no account 'wrok'; did you mean work?\n")


async def test_a_file_that_names_nobody_is_not_logged_in_again(place: Place) -> None:
    place.auths.mkdir()
    path = place.auths / "x.json"
    path.write_text(json.dumps({"refresh_token": "rt_opaque", "alias": "bare"}), encoding="utf-8")
    async with place.login("accounts", "relogin", "bare") as login:
        code, _, err = await login.ended()
    assert code == 1
    assert "the file of bare does not say whose it is" in err


# --- with a daemon


async def test_a_running_daemon_takes_a_new_account_up_by_itself(place: Place) -> None:
    async with running(place.folder / "config.yaml") as daemon, client(daemon.url) as session:
        async with place.login("--alias", "work") as login:
            await place.visit(await login.url())
            code, out, _ = await login.ended()
            assert (code, out.splitlines()[-1]) == (0, "The running daemon takes it up by itself.")
        await daemon.logged("account loaded alias=work state=ready")
        body = {"model": "gpt-5.5", "input": "hi"}
        async with session.post("/v1/responses", json=body) as answer:
            assert answer.status == 200
        assert await daemon.stop() == 0
    await until(lambda: not (place.folder / "data" / "control.sock").exists())
