"""The process as its owner and its supervisor see it: start, signals, exit codes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy.protocol.sse import Batch, Parser
from codex_proxy.simulator import Script, Simulator
from tests.process import Running, client, run, running, until, write_config

MODEL = "gpt-5.5"
TURN = {"model": MODEL, "input": "hi"}


@contextlib.asynccontextmanager
async def serving(
    folder: Path, sim: Simulator | None = None, **settings: object
) -> AsyncIterator[tuple[Simulator, Running, aiohttp.ClientSession]]:
    """Start a simulator, a daemon process in front of it, and a session with it."""
    async with sim if sim is not None else Simulator(2) as backend:
        if not (folder / "auths").exists():
            backend.write_auth_files(folder / "auths")
        config = write_config(folder, backend, **settings)
        async with running(config) as daemon, client(daemon.url) as session:
            yield backend, daemon, session


def events_in(body: bytes) -> Batch:
    parser = Parser()
    return parser.feed(body) + parser.finish()


async def ask(session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
    return await session.post("/v1/responses", json=TURN)


async def wait_refused(port: int) -> None:
    """Wait until the port takes no connection."""
    async with asyncio.timeout(2):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                # It was in the queue of the port when that closed.
                pass


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- start


async def test_it_starts_without_accounts_and_serves_the_first_file_that_comes(tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        config = write_config(tmp_path, sim)
        async with running(config) as daemon, client(daemon.url) as session:
            assert "no account loaded yet" in daemon.log
            assert (tmp_path / "auths").is_dir()
            async with session.get("/readyz") as answer:
                assert (answer.status, await answer.json()) == (503, {"status": "no_accounts"})
            async with session.post("/v1/responses", json=TURN) as answer:
                assert answer.status == 429
                assert (await answer.json())["error"]["code"] == "no_account_available"
            sim.write_auth_files(tmp_path / "auths")
            async with asyncio.timeout(5):
                while True:
                    async with session.get("/readyz") as answer:
                        if answer.status == 200:
                            break
                    await asyncio.sleep(0.05)
            async with session.post("/v1/responses", json=TURN) as answer:
                assert answer.status == 200
            assert await daemon.stop() == 0


async def test_a_busy_port_is_a_sentence_and_exit_code_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(tmp_path, listen=address)
        code, out, err = await run("-config", str(config))
    assert (code, out) == (1, "")
    assert f"cannot listen on {address}: " in err
    assert "in use" in err
    assert "Traceback" not in err


async def test_a_wrong_setting_is_named_with_its_place_and_exit_code_2(tmp_path: Path) -> None:
    config = write_config(tmp_path, max_retry=99)
    code, out, err = await run("-config", str(config))
    assert (code, out) == (2, "")
    line = config.read_text(encoding="utf-8").splitlines().index("max-retry: 99") + 1
    assert f"{config}:{line}" in err
    assert "max-retry" in err
    assert "0 to 10" in err
    assert "Traceback" not in err


async def test_a_folder_that_cannot_be_made_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, data_dir=tmp_path / "file" / "data")
    code, _, err = await run("-config", str(config))
    assert code == 1
    assert f"data-dir: {tmp_path / 'file' / 'data'}" in err
    assert "listen" not in err


# --- the end, in order


async def test_a_stream_ends_whole_while_newcomers_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as (sim, daemon, session):
        sim.script(Script.long_text(40, "word ", delay=0.01))
        async with session.post("/v1/responses", json={**TURN, "stream": True}) as answer:
            await answer.content.readany()
            daemon.send(signal.SIGTERM)
            await daemon.logged("draining turns=1")
            await wait_refused(daemon.port)
            rest = await answer.read()
        events = events_in(rest)
        assert events[-1].type == "response.completed"
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert len(deltas) > 1, "the stream was still under way when newcomers were refused"
        assert answer.headers.get("connection", "") != "close", "its head was out before"
        assert await daemon.ended() == 0
        assert "Traceback" not in daemon.log
    assert [turn.finished for turn in sim.turns] == [True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stream_past_the_drain_timeout_gets_a_terminal_event(
    number: signal.Signals, tmp_path: Path
) -> None:
    async with serving(tmp_path, drain_timeout="200ms") as (sim, daemon, session):
        for account in sim.accounts:
            account.set("stall", where="middle")
        async with session.post("/v1/responses", json={**TURN, "stream": True}) as answer:
            daemon.send(number)
            events = events_in(await answer.read())
        assert [event.type for event in events].count("response.failed") == 1
        assert events[-1].type == "response.failed"
        error = events[-1].json["response"]["error"]
        assert error["code"] == "rate_limit_exceeded"
        # The Codex CLI reads the wait out of the words.
        assert "try again in 1s" in error["message"]
        assert await daemon.ended() == 0
        await asyncio.wait_for(sim.turns[0].closed.wait(), 2)
        assert sim.turns[0].cancelled


async def test_a_plain_request_past_the_drain_timeout_gets_a_429(tmp_path: Path) -> None:
    async with serving(tmp_path, drain_timeout="100ms") as (sim, daemon, session):
        for account in sim.accounts:
            account.set("stall", where="middle")
        asking = asyncio.ensure_future(session.post("/v1/responses", json=TURN))  # noqa: TID251 -- a caller
        await until(lambda: bool(sim.turns))
        daemon.send(signal.SIGTERM)
        async with await asking as answer:
            assert answer.status == 429
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["connection"] == "close"
            error = (await answer.json())["error"]
        assert (error["type"], error["code"]) == ("rate_limit_exceeded", "rate_limit_exceeded")
        assert await daemon.ended() == 0


async def test_a_second_signal_ends_streams_at_once_and_properly(tmp_path: Path) -> None:
    async with serving(tmp_path, drain_timeout=60) as (sim, daemon, session):
        for account in sim.accounts:
            account.set("stall", where="middle")
        async with session.post("/v1/responses", json={**TURN, "stream": True}) as answer:
            daemon.send(signal.SIGTERM)
            await daemon.logged("draining")
            loop = asyncio.get_running_loop()
            signalled = loop.time()
            daemon.send(signal.SIGINT)
            events = events_in(await answer.read())
        assert events[-1].type == "response.failed"
        assert await daemon.ended() == 0
        assert loop.time() - signalled < 3


async def test_a_request_whose_body_is_on_its_way_is_still_served(tmp_path: Path) -> None:
    body = json.dumps(TURN).encode()
    async with serving(tmp_path) as (sim, daemon, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[:10])
        await writer.drain()
        # Another connection's answer tells that the first one's head has been read.
        async with client(daemon.url) as other, other.get("/health"):
            pass
        daemon.send(signal.SIGTERM)
        await daemon.logged("draining turns=0 requests=1")
        writer.write(body[10:])
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer.lower()
        assert await daemon.ended() == 0
        assert len(sim.turns) == 1


async def test_an_idle_connection_does_not_hold_the_end_up(tmp_path: Path) -> None:
    async with serving(tmp_path, drain_timeout=60) as (_, daemon, session):
        async with session.get("/health") as answer:
            await answer.read()
        silent, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        loop = asyncio.get_running_loop()
        signalled = loop.time()
        assert await daemon.stop() == 0
        assert loop.time() - signalled < 3
        assert await silent.read() == b""
        writer.close()


@pytest.mark.parametrize("hurries", [False, True])
async def test_a_token_exchange_ends_and_its_answer_is_saved(hurries: bool, tmp_path: Path) -> None:
    async with Simulator(1) as sim:
        (account,) = sim.accounts
        account.issue(expires_in=30)
        account.tokens.issued_at -= 3600
        (path,) = sim.write_auth_files(tmp_path / "auths")
        before = content(path)
        account.set("ok", refresh="slow", refresh_seconds=0.5)
        async with running(write_config(tmp_path, sim)) as daemon:
            await until(lambda: bool(sim.exchanges))
            daemon.send(signal.SIGTERM)
            if hurries:
                await daemon.logged("draining")
                daemon.send(signal.SIGTERM)
            assert await daemon.ended() == 0
        assert sim.exchanges[0].finished
        assert not sim.exchanges[0].cancelled
        after = content(path)
        assert after["refresh_token"] != before["refresh_token"]
        assert after["refresh_token"] == account.tokens.refresh
        assert after["access_token"] == account.tokens.access
        # Nothing of the exchange is left open for the next start.
        assert not list((tmp_path / "data").rglob("*exchange*"))
        assert len(sim.exchanges) == 1


# --- the demo


async def test_the_demo_answers_in_every_dialect_and_ends() -> None:
    code, out, err = await run("demo", "--once")
    assert (code, err) == (0, "")
    assert "last event response.completed" in out
    assert out.count("HTTP 200") == 4
    for words in ("demo.", "Hello from Chat.", "Hello from Claude Code."):
        assert f"pong: Say hello from the {words}" in out or f"pong: {words}" in out
    assert "curl -N http://127.0.0.1:" in out


async def test_the_demo_stays_up_until_it_is_told_to_end(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "codex_proxy", "demo", "--accounts", "1",
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    seen = b""
    async with asyncio.timeout(20):
        while b"Up until Ctrl-C." not in seen:
            line = await process.stdout.readline()
            assert line, "it ended by itself"
            seen += line
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
