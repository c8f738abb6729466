"""What the doctor finds: nothing where all is well, and each thing that can be wrong with what to do about it."""

import asyncio
import json
import os
import resource
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy import cli, config
from codex_proxy.commands import checks
from codex_proxy.commands.checks import Finding, Patient, look, patient
from codex_proxy.simulator import Simulator
from tests.harness import standing
from tests.process import write_config


async def examine(
    file: Path, *, is_offline: bool = False, now: Callable[[], float] = time.time
) -> list[Finding]:
    loaded = await asyncio.to_thread(config.load, file, {})
    async with patient(loaded, is_offline=is_offline, now=now) as one:
        return [finding async for finding in look(one)]


def of(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


@pytest.fixture
async def sim(tmp_path: Path) -> AsyncIterator[Simulator]:
    async with Simulator(2) as backend:
        backend.write_auth_files(tmp_path / "auths")
        yield backend


async def test_where_all_is_well_it_says_so_and_spends_nothing(sim: Simulator, tmp_path: Path) -> None:
    findings = await examine(write_config(tmp_path, sim))
    assert bad(findings) == []
    assert [name for name, _, _ in checks.CHECKS] == list(
        dict.fromkeys(finding.check for finding in findings)
    )
    assert len(of(findings, "accounts")) == len(of(findings, "logins")) == 2
    assert sim.turns == []
    assert sim.exchanges == []
    assert {request.path.rpartition("/")[2] for request in sim.requests} == {"", "usage"}
    assert not (tmp_path / "data").exists(), "nothing is made"
    said = "\n".join(f"{finding.text} {finding.advice}" for finding in findings)
    for account in sim.accounts:
        assert account.tokens.access not in said
        assert account.tokens.refresh not in said
        assert "@" not in said


async def test_a_daemon_that_runs_is_asked_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with standing(tmp_path, accounts=2, listen=f"127.0.0.1:{port}") as stand:
        (first, _) = stand.accounts
        stand.daemon.pool.reject(stand.known(first))
        stand.daemon.pool.login_lost(stand.known(first), "refresh_token_reused")
        findings = await examine(tmp_path / "config.yaml")
        assert "runs" in of(findings, "daemon")[0].text
        assert of(findings, "port")[0].text.endswith("taken by the daemon that runs")
        (problem,) = [finding for finding in of(findings, "accounts") if finding.level == "problem"]
        assert "needs a login" in problem.text
        assert problem.advice.startswith("codex-proxy accounts relogin ")


async def test_another_version_that_runs_is_named(
    sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with standing(tmp_path, simulator=Simulator(1)):
        monkeypatch.setattr(checks, "__version__", "9.9.9")
        (finding,) = of(await examine(tmp_path / "config.yaml", is_offline=True), "daemon")
        assert finding.level == "warning"
        assert "codex-proxy restart" in finding.advice


# -- this machine -------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["doctor", *arguments])
    output = capsys.readouterr()
    assert output.err == ""
    return code, output.out


def test_a_broken_configuration_is_a_problem_like_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path, max_retry=99)
    code, out = run(capsys, "-config", str(file))
    assert code == 1
    assert out.startswith("problem  config    ")
    assert "max-retry" in out
    assert out.endswith("\n1 problem.\n")
    code, out = run(capsys, "-config", str(file), "--json")
    document = json.loads(out)
    assert (code, document["problems"]) == (1, 1)
    assert document["findings"][0]["check"] == "config"


def test_offline_nobody_is_asked_and_the_output_is_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "auths").mkdir(mode=0o700)
    code, out = run(capsys, "-config", str(write_config(tmp_path)), "--offline")
    assert code == 1
    assert "problem  accounts  no account in" in out
    assert "-> codex-proxy login, or codex-proxy import FILE" in out
    assert "dns" not in out
    assert "backend" not in out


async def test_what_others_may_read_or_write_is_named(sim: Simulator, tmp_path: Path) -> None:
    file = write_config(tmp_path, sim, api_keys="[a-secret-key-of-a-test]")
    file.chmod(0o644)
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "auths").chmod(0o777)
    path = min((tmp_path / "auths").glob("*.json"))
    path.chmod(0o640)
    findings = bad(await examine(file))
    assert {finding.check for finding in findings} == {"config", "folders", "accounts"}
    assert all(finding.level == "warning" for finding in findings)
    assert all(finding.advice.startswith("chmod ") for finding in findings)
    assert len(findings) == 4
    assert "a-secret-key" not in str(findings)


async def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = write_config(tmp_path, auth_dir=tmp_path / "file", data_dir=tmp_path / "file" / "below")
    findings = of(await examine(file, is_offline=True), "folders")
    assert [finding.level for finding in findings] == ["problem", "problem"]
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    findings = of(await examine(write_config(tmp_path, data_dir=deep), is_offline=True), "folders")
    assert "control socket" in bad(findings)[0].text


async def test_folders_that_cannot_be_looked_at_are_named(tmp_path: Path) -> None:
    """As those of another user cannot; a name that is too long fails in the same way, for root too."""
    auths, data = tmp_path / ("x" * 300), tmp_path / ("y" * 300) / "data"
    findings = await examine(write_config(tmp_path, auth_dir=auths, data_dir=data), is_offline=True)
    one, other = of(findings, "folders")[:2]
    assert one.text == f"auth-dir {auths}: cannot be looked at: file name too long"
    assert other.text.startswith(f"data-dir {data}: cannot be looked at")
    assert "as the user that runs the daemon" in one.advice
    # What can be said of the disk is said all the same.
    assert [finding.text.split(":")[0] for finding in of(findings, "disk")] == ["data-dir"]
    (finding,) = of(findings, "accounts")
    assert finding.text == f"auth-dir {auths}: cannot be looked at: file name too long"
    assert finding.advice


@pytest.mark.parametrize("target", ["nowhere", "link"])
async def test_a_link_that_leads_nowhere_is_no_folder_that_will_be_made(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    file = write_config(tmp_path, data_dir=tmp_path / "link")
    finding = of(await examine(file, is_offline=True), "folders")[1]
    assert (finding.level, "leads to a folder that is not there" in finding.text) == ("problem", True)


async def test_a_folder_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auths").mkdir()

    def probe(_: Path) -> None:
        raise OSError(30, os.strerror(30), str(tmp_path / "auths"))

    monkeypatch.setattr("codex_proxy.accounts.files.probe", probe)
    finding = of(await examine(write_config(tmp_path), is_offline=True), "folders")[0]
    assert (finding.level, "read-only file system" in finding.text) == ("problem", True)


@pytest.mark.parametrize(("free", "level"), [(10**6, "problem"), (5 * 10**8, "warning"), (10**11, "ok")])
async def test_room_on_the_disk(
    free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free))
    findings = of(await examine(write_config(tmp_path), is_offline=True), "disk")
    assert [finding.level for finding in findings] == [level]


async def test_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, 1024))
    (finding,) = of(await examine(write_config(tmp_path), is_offline=True), "limits")
    assert (finding.level, "512 streams" in finding.text) == ("warning", True)
    monkeypatch.setattr("resource.getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    (finding,) = of(await examine(write_config(tmp_path), is_offline=True), "limits")
    assert finding.level == "ok"


async def test_ports(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = {
            f"127.0.0.1:{port}": "another program",
            "192.0.2.1:80": "cannot assign",
            "none.invalid:80": "no such host",
        }
        for listen, words in cases.items():
            (finding,) = of(await examine(write_config(tmp_path, listen=listen), is_offline=True), "port")
            assert (finding.level, words in finding.text) == ("problem", True), finding
            assert finding.advice
    for listen in (f"127.0.0.1:{port}", f'":{port}"', f"localhost:{port}"):
        (finding,) = of(await examine(write_config(tmp_path, listen=listen), is_offline=True), "port")
        assert finding.level == "ok", finding


# -- the way out --------------------------------------------------------------------------


@pytest.fixture
def silent() -> Any:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_nobody_there(
    sim: Simulator, tmp_path: Path, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_CALL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    cases: list[tuple[dict[str, object], str]] = [
        ({"base_url": f"http://127.0.0.1:{closed}"}, "nobody answers"),
        ({"base_url": f"http://127.0.0.1:{silent}"}, "no answer in time"),
        ({"base_url": sim.base_url.replace("http:", "https:")}, "certificate is not trusted"),
        ({"base_url": "https://backend.invalid"}, "no address"),
        ({"proxy_url": f"http://user:hidden-word@127.0.0.1:{closed}"}, "the proxy does not let us through"),
    ]  # fmt: skip
    for settings, words in cases:
        findings = await examine(write_config(tmp_path, sim, **settings))
        (finding,) = of(findings, "backend")
        assert (finding.level, words in finding.text) == ("problem", True), finding
        assert finding.advice
        assert "hidden-word" not in str(findings)
        assert "proxy-url" not in settings or "through http://***@127.0.0.1" in finding.text
        if "invalid" in str(settings):
            assert of(findings, "dns")[0].level == "problem"


async def test_a_backend_that_is_not_encrypted_gets_no_token(sim: Simulator, tmp_path: Path) -> None:
    findings = await examine(write_config(tmp_path, sim, base_url="http://backend.invalid/codex"))
    (finding,) = of(findings, "logins")
    assert finding.level == "problem"
    assert "no token is sent" in finding.text


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [
        (0.0, "ok", "agrees"),
        (100.0, "warning", "1m ahead of"),
        (-100.0, "warning", "1m behind"),
        (7200.0, "problem", "2h ahead of"),
    ],
)
async def test_the_clock(ahead: float, level: str, words: str, sim: Simulator, tmp_path: Path) -> None:
    findings = await examine(write_config(tmp_path, sim), now=lambda: time.time() + ahead)
    (finding,) = of(findings, "clock")
    assert (finding.level, words in finding.text) == (level, True), finding


# -- accounts -----------------------------------------------------------------------------


async def test_accounts_that_are_no_use(tmp_path: Path) -> None:
    async with Simulator(5) as sim:
        good, over, lost, off, refused = sim.accounts
        over.issue(expires_in=-60)
        lost.issue(expires_in=-60)
        paths = dict(zip(sim.accounts, sim.write_auth_files(tmp_path / "auths"), strict=True))

        def edit(path: Path, **changes: object) -> None:
            path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")

        edit(paths[lost], refresh_token="")
        edit(paths[off], disabled=True)
        for place, account in enumerate(sim.accounts):
            edit(paths[account], alias=f"n{place}")
        refused.set("unauthorized")
        (tmp_path / "auths" / "broken.json").write_text("{", encoding="utf-8")
        (tmp_path / "auths" / "twice.json").write_bytes(paths[good].read_bytes())
        for path in (tmp_path / "auths").iterdir():
            path.chmod(0o600)
        findings = await examine(write_config(tmp_path, sim))
        said = {finding.text.split(":")[0]: finding for finding in of(findings, "accounts")}
        assert said["n0"].level == "ok"
        assert said["n1"].text.endswith("the daemon exchanges it at its start")
        assert (said["n2"].level, said["n2"].advice) == ("problem", "codex-proxy accounts relogin n2")
        assert said["n3"].text == "n3: disabled by its owner"
        assert said["broken.json"].level == "problem"
        (double,) = [finding for finding in of(findings, "accounts") if "same account" in finding.text]
        assert double.level == "problem"
        asked = {finding.text.split(":")[0]: finding for finding in of(findings, "logins")}
        assert asked["n0"].level == "ok"
        assert (asked["n4"].level, "refresh n4" in asked["n4"].advice) == ("problem", True)
        assert asked.keys() == {"n0", "n4"}
        assert sim.exchanges == []


async def test_of_very_many_accounts_some_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MAX_ASKED", 2)
    async with Simulator(5) as sim:
        sim.write_auth_files(tmp_path / "auths")
        findings = of(await examine(write_config(tmp_path, sim)), "logins")
        assert len(findings) == 3
        assert findings[-1].text.startswith("3 more were not asked for")


# -- the doctor itself --------------------------------------------------------------------


async def test_a_check_that_hangs_is_a_finding_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> None:
        time.sleep(30)  # noqa: TID251 -- what blocks for ever

    async def hanging(_: Patient) -> AsyncIterator[Finding]:
        await checks._aside(hang)
        yield Finding("hangs", "ok", "never")

    async def failing(one: Patient) -> AsyncIterator[Finding]:
        if one.now() > 0:
            raise PermissionError(13, "Permission denied", "/a/path")
        yield Finding("fails", "ok", "never")

    monkeypatch.setattr(checks, "DEADLINE_SECONDS", 0.05)
    rows = (("hangs", hanging, False), ("fails", failing, False), checks.CHECKS[0])
    monkeypatch.setattr(checks, "CHECKS", rows)
    findings = await examine(write_config(tmp_path))
    assert [(finding.check, finding.level) for finding in findings] == [
        ("hangs", "problem"),
        ("fails", "problem"),
        ("version", "ok"),
    ]
    assert findings[1].text == "permission denied"


def test_a_proxy_with_upstreams_alone_needs_no_account(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "auths").mkdir(mode=0o700)
    said = '[{"name": "relay", "base-url": "http://127.0.0.1:1"}]'
    _, out = run(capsys, "-config", str(write_config(tmp_path, upstreams=said)), "--offline")
    assert "no account in" in out
    assert "upstreams serve: relay" in out
