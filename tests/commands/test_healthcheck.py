"""The health check asks the address that the daemon listens at, and says in one exit code what it heard."""

import asyncio
import socket
from pathlib import Path

import pytest

from codex_proxy import cli
from codex_proxy.commands import healthcheck
from codex_proxy.config import Settings
from tests.harness import standing
from tests.process import write_config


async def check(*arguments: str) -> int:
    return await asyncio.to_thread(cli.main, ["healthcheck", *arguments])


def a_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


async def test_a_daemon_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = a_port()
    # Listening everywhere needs a client key; the check needs none.
    async with standing(tmp_path, accounts=1, listen=f'":{port}"'):
        file = str(tmp_path / "config.yaml")
        assert await check("-config", file) == 0
        assert await check("-config", file, "--ready") == 0
        assert await check("--url", f"http://127.0.0.1:{port}") == 0
    assert capsys.readouterr().out.split() == ["ok", "ready", "ok"]
    assert await check("-config", str(tmp_path / "config.yaml")) == 1
    assert f"no answer from 127.0.0.1 port {port}: " in capsys.readouterr().err


async def test_a_daemon_without_an_account_is_alive_and_not_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = a_port()
    async with standing(tmp_path, accounts=0, listen=f"127.0.0.1:{port}"):
        file = str(tmp_path / "config.yaml")
        assert await check("-config", file) == 0
        assert await check("-config", file, "--ready") == 1
    assert "/readyz answered 503: no_accounts" in capsys.readouterr().err


async def test_whoever_does_not_answer_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert await check("--url", f"http://127.0.0.1:{port}", "--timeout", "0.1") == 1
    assert "timed out" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"SSH-2.0-x\r\n", b""])
async def test_another_program_at_the_port(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await check("--url", f"http://127.0.0.1:{port}") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert ("another program" in said.err) is answer.startswith(b"HTTP")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "https://127.0.0.1:1",
        "http://127.0.0.1",
        "http://:1",
        "http://a:b",
        "http://a:65536",
    ],
)
async def test_a_url_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await check("--url", url) == 2
    assert "--url must be" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["inf", "1e300", "nan"])
async def test_a_time_that_no_socket_can_wait_for(seconds: str) -> None:
    assert await check("--url", f"http://127.0.0.1:{a_port()}", "--timeout", seconds) == 1


async def test_a_name_that_is_none_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert await check("--url", "http://a..b:1") == 1
    assert "no answer from a..b port 1: " in capsys.readouterr().err


async def test_a_port_that_nobody_can_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await check("-config", str(write_config(tmp_path))) == 2
    assert "port 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        (":1", "127.0.0.1"),
        ("0.0.0.0:1", "127.0.0.1"),
        ("[::]:1", "::1"),
        ("[::1]:1", "::1"),
        ("box:1", "box"),
    ],
)
def test_an_address_for_everybody_is_asked_at_home(listen: str, host: str) -> None:
    assert healthcheck._of_settings(Settings(listen=listen)) == (host, 1)
